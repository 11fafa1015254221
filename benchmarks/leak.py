"""Whether a client's update tells which images it has, without and with differential privacy: an attack as a check.

A client trains one round from the same start, again and again. In every trial each of some candidate images is one of
its images with probability 1/2. The attacker is the server: it knows the start, the update that the client sends, and
the candidates with their labels. It estimates from the candidates' gradients at the start how much of each is in the
update, and compares the estimate with those of the other trials, with and without the candidate (a likelihood ratio as
in LiRA, arXiv 2112.03570). Written are the rate of true positives at rates of false positives, and the highest rate
that the accountant's ε allows (arXiv 1311.0776). Training is `LocalTraining`, as in a run; trials are clients side by
side. Examples:

    python benchmarks/leak.py --out leak.csv --figure leak.svg
    python benchmarks/leak.py --trials 16 --candidates 24 --epsilons 1
"""

from __future__ import annotations

import argparse
import csv
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from torch import Tensor

from lorafair.client.cohort import Cohort, LocalTraining
from lorafair.client.private_step import ExamplePrivacy
from lorafair.config import ClientConfig, load_config
from lorafair.data.loading import ImageSource, Indices, cohort_steps
from lorafair.data.sources import load_images
from lorafair.model.adapted_model import AdaptedModel
from lorafair.model.backbone import build_model
from lorafair.privacy.accounting import Releases, epsilon_of, noise_multiplier_for
from lorafair.seeding import seeded

NO_PRIVACY = "no privacy"
SAMPLING = 0.5  # with which each of a client's images is in a step
FALSE_POSITIVES = (*np.geomspace(0.002, 0.1, 12).tolist(), *np.linspace(0.15, 1.0, 18).tolist())
SHOWN_FROM = 0.004  # below, a rate of true positives hangs on a handful of answers
SIDE_BY_SIDE = 8  # trials
_COLOURS = ("#D55E00", "#E69F00", "#CC79A7", "#0072B2", "#009E73", "#56B4E9", "#000000")
FIELDS = ("setting", "epsilon", "noise_multiplier", "area", "false_positives", "true_positives", "allowed")


@dataclass(frozen=True)
class Probe:
    """The client under attack, and the images that it may have."""

    model: AdaptedModel
    tokens: Tensor  # (N, T, D) of the candidates
    labels: Tensor  # (N,)
    start: Tensor  # (P,)
    local: ClientConfig
    clip_norm: float
    delta: float
    seed: int

    @staticmethod
    def of(options: argparse.Namespace) -> Probe:
        """Candidates from the training images of the first domain of a run, and the run's model."""
        config = load_config([f"seed={options.seed}", *options.run])
        images = load_images(config.data, config.seed)
        own = np.flatnonzero(images.train.domains == 0)
        order = torch.randperm(len(own), generator=seeded(options.seed, "candidates")).numpy()
        chosen = np.sort(own[order[: options.candidates]])
        model = build_model(config.model, len(images.classes), config.seed)
        model = model.attach("cpu", max(SIDE_BY_SIDE, options.candidates))
        [pixels] = ImageSource(images.train.images, config.model.image_size, workers=0).batches([chosen])
        with torch.inference_mode():
            tokens = model.embed(pixels)
        local = ClientConfig(
            learning_rate=options.learning_rate,
            momentum=0.0,
            weight_decay=0.0,
            clip_norm=None,
            epochs=None,
            steps=options.steps,
            batch_size=max(1, round(SAMPLING * options.candidates / 2)),
        )
        labels = torch.from_numpy(images.train.labels[chosen])
        start = model.adapters.draw(config.seed, 0)
        return Probe(model, tokens.clone(), labels, start, local, options.clip_norm, options.delta, options.seed)

    def gradients(self) -> Tensor:
        """Of every candidate at the start, (N, P): each is a client of its own."""
        adapters, count = self.model.adapters, len(self.labels)
        adapters.resize(count)
        adapters.write(self.start)
        adapters.train_only(("A", "B", "head"))
        losses = torch.nn.functional.cross_entropy(self.model(self.tokens), self.labels, reduction="sum")
        losses.backward()
        assert adapters.flat.grad is not None
        return adapters.flat.grad.clone()

    def updates(self, has: Tensor, noise_multiplier: float | None) -> Tensor:
        """What the client sends (M, P) in trials in which it has these candidates (M, N); None: without privacy."""
        rows = []
        for first in range(0, len(has), SIDE_BY_SIDE):
            trials = range(first, min(first + SIDE_BY_SIDE, len(has)))
            steps = cohort_steps([self._batches(has[trial], trial, noise_multiplier is None) for trial in trials])
            privacy = None if noise_multiplier is None else self._mechanism(trials, noise_multiplier)
            start = self.start.repeat(len(trials), 1)
            cohort = Cohort(start, steps, [seeded(self.seed, trial) for trial in trials], privacy=privacy)
            inputs = (self.tokens[step.indices.reshape(-1)] for step in steps)
            training = LocalTraining(self.model, self.labels, self.local, ("A", "B", "head"))
            rows.append(training.train(cohort, inputs).rows - start)
        return torch.cat(rows)

    def _batches(self, has: Tensor, trial: int, shuffled: bool) -> list[Indices]:
        """Of one trial: shuffled passes over the client's images, or a random sample a step."""
        own, generator = np.flatnonzero(has.numpy()), seeded(self.seed, "batches", trial)
        steps = self.local.steps or 1
        if not shuffled:
            return [own[torch.rand(len(own), generator=generator).numpy() < SAMPLING] for _ in range(steps)]
        passes = [own[torch.randperm(len(own), generator=generator).numpy()] for _ in range(steps)]
        size = self.local.batch_size
        return [batch for order in passes for batch in np.array_split(order, max(1, len(own) // size))][:steps]

    def _mechanism(self, trials: Sequence[int], noise_multiplier: float) -> ExamplePrivacy:
        generators = [seeded(self.seed, "noise", trial) for trial in trials]
        return ExamplePrivacy(
            self.clip_norm, noise_multiplier, [float(self.local.batch_size)] * len(trials), generators
        )

    @property
    def scale(self) -> float:
        """By how much of its gradient an image of the client moves the update in a round, on average."""
        return self.local.learning_rate * (self.local.steps or 1) * SAMPLING / self.local.batch_size

    def releases(self, noise_multiplier: float) -> tuple[Releases, ...]:
        """What the accountant has to know: noisy sums, one a step."""
        return (Releases(noise_multiplier, SAMPLING, self.local.steps or 1),)

    def allowed(self, noise_multiplier: float | None) -> np.ndarray:
        """The largest rate of true positives at each of FALSE_POSITIVES, from ε at many δ; all 1 without noise."""
        rates = np.array(FALSE_POSITIVES)
        largest = np.ones_like(rates)
        for delta in np.geomspace(1e-6, 0.5, 24) if noise_multiplier else ():
            epsilon = epsilon_of(self.releases(noise_multiplier or 0.0), float(delta))
            if epsilon < 500:
                largest = np.minimum(largest, math.exp(epsilon) * rates + delta)
                largest = np.minimum(largest, 1 - math.exp(-epsilon) * (1 - delta - rates))
        return largest


def memberships(updates: Tensor, gradients: Tensor, noise: float) -> Tensor:
    """How much of each candidate's gradient is in each update, (M, N): a sum of those of the client's images and noise.

    The linear estimate of least mean square error, for gradients (N, P) and noise of this standard deviation, both as
    multiples of what one image adds to an update.
    """
    G = gradients.double()
    gram = G @ G.T
    ridge = 4 * noise**2 + 1e-3 * float(gram.diagonal().mean())  # 1/4 is the variance of a coin
    return torch.linalg.solve(gram + ridge * torch.eye(len(G), dtype=G.dtype), -(G @ updates.double().T)).T


def membership_scores(projections: Tensor, has: Tensor) -> Tensor:
    """How likely each candidate is one of the client's images in each trial, (M, N): logarithms of likelihood ratios.

    Its estimates are taken for normal with one variance and two means, those of the other trials with it and without.
    """
    scores = torch.empty_like(projections)
    inside = has.double()
    for trial in range(len(has)):
        others = torch.arange(len(has)) != trial
        x, w = projections[others], inside[others]
        means = [(x * v).sum(0) / v.sum(0) for v in (w, 1 - w)]
        variance = (w * (x - means[0]).square() + (1 - w) * (x - means[1]).square()).mean(0)
        now = projections[trial]
        scores[trial] = ((now - means[1]).square() - (now - means[0]).square()) / (2 * variance)
    return scores


def rates(scores: Tensor, has: Tensor) -> tuple[list[float], float]:
    """The rates of true positives at FALSE_POSITIVES, and the area under the curve."""
    members, others = scores[has], scores[~has]
    thresholds = torch.quantile(others, 1 - torch.tensor(FALSE_POSITIVES, dtype=others.dtype))
    found = [(members > threshold).double().mean().item() for threshold in thresholds]
    order = torch.cat([others, members]).argsort().argsort().double()  # no ties: scores are continuous
    above = order[len(others) :].sum() - len(members) * (len(members) - 1) / 2
    return found, float(above / (len(members) * len(others)))


def measure(options: argparse.Namespace) -> Iterator[dict[str, str]]:
    """The lines of the table."""
    probe = Probe.of(options)
    gradients = probe.gradients()
    generator = seeded(options.seed, "members")
    has = torch.rand(options.trials, options.candidates, generator=generator) < 0.5
    print(
        f"{options.candidates} candidates, {options.trials} trials, {gradients.shape[1]:,} numbers in an update; ",
        end="",
    )
    print(f"norms of the candidates' gradients: median {gradients.norm(dim=1).median():.2f}")
    settings: list[tuple[str, float, float | None]] = [(NO_PRIVACY, math.inf, None), ("clipped only", math.inf, 0.0)]
    for epsilon in options.epsilons:
        sigma = noise_multiplier_for(epsilon, options.delta, probe.releases)
        settings.append((f"ε = {epsilon:g}", epsilon, sigma))
    for setting, epsilon, sigma in settings:
        began = time.perf_counter()
        updates = probe.updates(has, sigma) / probe.scale
        contributions, noise = gradients, 0.0
        if sigma is not None:
            contributions = gradients * (probe.clip_norm / gradients.norm(dim=1, keepdim=True)).clamp(max=1)
            noise = sigma * probe.clip_norm / (SAMPLING * math.sqrt(options.steps))
        found, area = rates(membership_scores(memberships(updates, contributions, noise), has), has)
        near = int(np.argmin(np.abs(np.array(FALSE_POSITIVES) - 0.01)))
        print(
            f"{setting:<14} σ {sigma if sigma is not None else math.nan:6.2f}  area {area:.3f}  true positives "
            f"{100 * found[near]:5.1f} % at {100 * FALSE_POSITIVES[near]:.1f} % false ones  "
            f"{time.perf_counter() - began:.0f} s"
        )
        for rate, hit, most in zip(FALSE_POSITIVES, found, probe.allowed(sigma), strict=True):
            numbers = (epsilon, math.nan if sigma is None else sigma, area, rate, hit, most)
            yield dict(zip(FIELDS, (setting, *(f"{number:.4g}" for number in numbers)), strict=True))


def draw(lines: Sequence[Mapping[str, str]]) -> Figure:
    """Rates of true positives over those of false ones: what the attack reaches, and what ε allows at most."""
    colours = dict(zip(dict.fromkeys(line["setting"] for line in lines), _COLOURS, strict=False))
    figure = Figure(figsize=(6.4, 3.7), layout="constrained")
    axes = figure.subplots()
    for setting, colour in colours.items():
        own = [line for line in lines if line["setting"] == setting]
        x, hits, allowed = ([float(line[name]) for line in own] for name in FIELDS[-3:])
        axes.plot(x, hits, color=colour, label=f"{setting}, area {float(own[0]['area']):.2f}")
        if min(allowed) < 1:
            axes.plot(x, allowed, color=colour, linestyle=(0, (2, 2)), linewidth=1)
    axes.plot(FALSE_POSITIVES, FALSE_POSITIVES, color="#7F7F7F", linewidth=1)
    axes.annotate("guessing", (0.03, 0.022), color="#7F7F7F", fontsize=9)
    axes.set(xscale="log", yscale="log", xlim=(SHOWN_FROM, 1), ylim=(SHOWN_FROM, 1.1))
    axes.set(xlabel="rate of false positives", ylabel="rate of true positives")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1, decimals=None))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", type=int, default=40, help="images, of which the client has about half")
    parser.add_argument("--trials", type=int, default=64, help="rounds of the client, each with other images")
    parser.add_argument("--steps", type=int, default=10, help="of local training in a round")
    parser.add_argument("--learning-rate", type=float, default=0.001)
    parser.add_argument("--clip-norm", type=float, default=10.0, help="of an image's gradient")
    parser.add_argument("--epsilons", type=float, nargs="+", default=[30.0, 8.0, 1.0], help="of the round")
    parser.add_argument("--delta", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a file for the table, as CSV")
    parser.add_argument("--figure", type=Path, help="a file for the picture, as SVG, PNG or PDF")
    parser.add_argument(
        "run",
        nargs="*",
        default=["conf/digits.yaml", "model.lora.last_blocks=2"],
        help="a configuration and key=value, of which images and model are taken",
    )
    options = parser.parse_args()
    lines = list(measure(options))
    if options.out is not None:
        with options.out.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(lines)
    if options.figure is not None:
        draw(lines).savefig(options.figure, dpi=200, metadata={})


if __name__ == "__main__":
    main()
