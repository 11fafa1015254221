"""Client-level differential privacy: the method gets the noisy mean of clipped updates, and nothing else.

What the method, the server optimiser and the evaluation make of it is post-processing. The releases of a round share
one budget: the i-th has the noise multiplier σ/√w_i with Σ w_i = 1, so that together they are one Gaussian mechanism of
multiplier σ, also where one depends on the result of another. docs/concepts/privacy_client.md has the proofs.

Letters: K clients, E pieces of an adapter, G groups of pieces that are clipped together, P packed length.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from secrets import SystemRandom

import torch
from torch import Tensor

from lorafair.aggregation.privacy_budget import budget_shares
from lorafair.communication.collectives import ClientResults, sum_over_ranks
from lorafair.config.schema import PrivacyConfig
from lorafair.console import log
from lorafair.experiment import Experiment
from lorafair.model.adapter import AdapterLayout, LoRAFactors, Part
from lorafair.privacy.clipped_updates import (
    TOGETHER,
    Clipping,
    Piece,
    change_of,
    clipped_sum,
    first_bounds,
    next_bound,
    pieces_of,
    scales_to,
    squares_of,
)
from lorafair.privacy.gaussian import GaussianNoise
from lorafair.privacy.measures import Watch
from lorafair.privacy.products import ReleasedLayer, largest_norm, products_fraction, row_basis, seen_products
from lorafair.server.state import ServerState

_QUANTILES = {"lowest_tenth": 0.1, "median": 0.5, "highest_tenth": 0.9}  # of the norms of updates


class ClientRelease:
    """Makes the releases of a round. Called on every rank; what they are is the same on any number of them."""

    def __init__(self, experiment: Experiment) -> None:
        privacy, self.experiment = experiment.config.privacy, experiment
        self.privacy = privacy
        self.noise = GaussianNoise(None if privacy.noise_source == "system" else experiment.config.seed)
        shares = budget_shares(privacy, experiment.aggregator)
        self.with_products = shares.products > 0
        self.budget = shares.multipliers(experiment.noise_multiplier or 0.0)
        self.denominator = float(experiment.scheduler.expected_clients)
        self.watch = Watch()

    def __call__(
        self, state: ServerState, shard: AdapterLayout, start: Tensor, results: ClientResults
    ) -> ClientResults:
        """The results with rows that stand for all clients: one with the released mean, for LoRA-FAIR two."""
        of_round = _OfRound(self, state, shard, start, results)
        mean = of_round.mean()
        rows, weights = self.stand_ins(of_round, mean)
        metrics = of_round.metrics()
        if of_round.count or results.dropped:  # a round in which nobody was drawn says nothing
            for line in self.watch.lines(metrics, of_round.unmoved()):
                log.warning(line)
        self.adapt(state, of_round)
        clipped = of_round.clipped_fraction() * of_round.count
        counts = {"privacy_updates": float(of_round.count), "privacy_clipped": clipped}
        return replace(
            results, rows=rows, row_weights=weights, metrics={**results.metrics, **metrics},
            counts={**results.counts, **counts},
        )  # fmt: skip

    def stand_ins(self, of_round: _OfRound, mean: Tensor) -> tuple[Tensor, tuple[float, ...]]:
        """Rows (1 or 2, P) and their weights."""
        rows = (of_round.start.to(torch.float64) + mean).to(of_round.start.dtype).unsqueeze(0)
        if not self.with_products:
            return rows, (1.0,)
        rows = rows.repeat(2, 1)
        factors = of_round.shard.unpack(rows).factors
        for path, layer in of_round.products(mean).items():
            pair = layer.pair()
            factors[path].A.copy_(pair.A)
            factors[path].B.copy_(pair.B)
        return rows, (0.5, 0.5)

    def adapt(self, state: ServerState, of_round: _OfRound) -> None:
        """Move the bounds of the next round, where they follow a quantile of the norms."""
        if state.clip_bounds is None:
            return
        privacy, groups = self.privacy, list(first_bounds(self.privacy))
        assert privacy.clip_quantile is not None
        assert privacy.clip_rate is not None
        fractions = of_round.noisy_fractions()
        for index, group in enumerate(groups):
            if group in fractions:
                bound = next_bound(
                    float(state.clip_bounds[index]), fractions[group],
                    quantile=privacy.clip_quantile, rate=privacy.clip_rate,
                )  # fmt: skip
                state.clip_bounds[index] = bound


class _OfRound:
    """The sums of one round over the layers of this rank."""

    def __init__(
        self, release: ClientRelease, state: ServerState, shard: AdapterLayout, start: Tensor, results: ClientResults
    ) -> None:
        self.release, self.experiment, self.round = release, release.experiment, state.completed_rounds
        self.shard, self.start, self.rows = shard, start, results.rows
        self.sent = self.experiment.aggregator.sends(self.round)
        self.clipping = clipping_of(release.privacy, state, self.sent)
        self.all_pieces, self.pieces = pieces_of(self.experiment.layout, self.sent), pieces_of(shard, self.sent)
        self._place = {(piece.part, piece.name): index for index, piece in enumerate(self.all_pieces)}
        self.count = len(results.clients)
        self.squares = self.everywhere(squares_of(self.rows, start, self.pieces), self.count)
        self.norms = self.clipping.norms(self.all_pieces, self.squares)
        self.scales = self.clipping.scales(self.norms)
        self.signal = torch.zeros(len(self.all_pieces), dtype=torch.float64)  # ‖mean clipped update‖² of each piece
        self.product_norms: Tensor | None = None

    def everywhere(self, mine: Tensor, width: int) -> Tensor:
        """A row for each piece of all layers (E, width) from this rank's: added to zeros, which keeps every bit."""
        table = torch.zeros(len(self.all_pieces), width, dtype=torch.float64, device=mine.device)
        if self.pieces:
            table[[self._place[piece.part, piece.name] for piece in self.pieces]] = mine
        if table.numel():
            sum_over_ranks(self.experiment.fabric, table)
        return table.cpu()

    def noise(self, *purpose: str, shape: Sequence[int]) -> Tensor:
        """Standard normal numbers of this round."""
        return self.release.noise.draw(shape, self.round, *purpose)

    @property
    def noise_std(self) -> float:
        """Of each number of the released mean."""
        return self.release.budget.mean * self.clipping.total / self.release.denominator

    def mean(self) -> Tensor:
        """(Σ clipped updates + noise) / expected number of clients, (P,) float64; 0 where nothing is sent."""
        mean, signal = torch.zeros_like(self.start, dtype=torch.float64), torch.zeros(len(self.pieces), 1)
        signal = signal.to(torch.float64)
        for index, piece in enumerate(self.pieces):
            scales = self.scales[self.clipping.group_of(piece.part)]
            clean = clipped_sum(self.rows, self.start, piece, scales) / self.release.denominator
            signal[index] = clean.square().sum()
            noise = self.noise(piece.part, piece.name, shape=clean.shape).to(clean.device)
            mean[piece.columns] = clean + self.noise_std * noise
        self.signal = self.everywhere(signal, 1).squeeze(1)
        return mean

    def products(self, mean: Tensor) -> dict[str, ReleasedLayer]:
        """The second release of LoRA-FAIR, by layer."""
        changes, start = self.shard.unpack(mean).factors, self.shard.unpack(self.start.to(torch.float64)).factors
        basis = {path: row_basis(start[path].A + change.A) for path, change in changes.items()}
        at = {(piece.part, piece.name): piece for piece in self.pieces}

        def of_clients(path: str) -> Tensor:
            A, B = self.clipped(at["A", path]), self.clipped(at["B", path])
            like = changes[path]
            return seen_products(LoRAFactors(A=A.view(-1, *like.A.shape), B=B.view(-1, *like.B.shape)), basis[path])

        squares = torch.zeros(len(self.pieces), self.count, dtype=torch.float64, device=self.rows.device)
        for index, piece in enumerate(self.pieces):
            if piece.part == "B":
                squares[index] = of_clients(piece.name).square().sum((1, 2))
        bound = products_fraction(self.release.privacy, len(self.experiment.layout.factors)) * largest_norm(
            self.clipping
        )
        self.product_norms = self.everywhere(squares, self.count).sum(0).sqrt() / bound
        scales = scales_to(self.product_norms, 1.0).to(self.rows.device)
        std = self.release.budget.products * bound / self.release.denominator
        found = {}
        for path, change in changes.items():
            total = torch.einsum("k,kor->or", scales, of_clients(path)) / self.release.denominator
            noise = self.noise("products", path, shape=total.shape).to(total.device)
            mean_factors = LoRAFactors(A=start[path].A + change.A, B=start[path].B + change.B)
            found[path] = ReleasedLayer(mean_factors, change, basis[path], total + std * noise, std)
        return found

    def clipped(self, piece: Piece) -> Tensor:
        """The clipped changes of one piece (K, n)."""
        scales = self.scales[self.clipping.group_of(piece.part)].to(self.rows.device)
        return scales.unsqueeze(1) * change_of(self.rows, self.start, piece)

    def noisy_fractions(self) -> dict[str, float]:
        """The fraction of clients whose norm is within the bound, with noise, by group (arXiv 1905.03871).

        A client counts +1/2 or −1/2 in each group, so one client changes the G counts by √G/2.
        """
        groups = list(self.clipping.bounds)
        counts = torch.stack([(self.norms[g] <= self.clipping.bounds[g]).to(torch.float64).sum() for g in groups])
        std = self.release.budget.count * math.sqrt(len(groups)) / 2
        noise = self.noise("count", shape=[len(groups)])
        if self.release.noise.seed is None:  # every rank has drawn its own
            fabric = self.experiment.fabric
            noise = fabric.broadcast(noise)
        noisy = (counts - self.count / 2 + std * noise) / self.release.denominator + 0.5
        return dict(zip(groups, noisy.tolist(), strict=True))

    def metrics(self) -> dict[str, float]:
        """What is told of the round: of the clients' data, without noise, so for who runs the simulation alone."""
        found = {
            "privacy/clients": float(self.count),
            "privacy/clip_norm": self.clipping.total,
            "privacy/noise_std": self.noise_std,
        }
        if len(self.clipping.bounds) > 1:
            found |= {f"privacy/clip_norm/{part}": bound for part, bound in self.clipping.bounds.items()}
        for part in self.parts:
            expected = self.noise_std * math.sqrt(self.experiment.layout.length_of([part]))
            if expected:
                found[f"privacy/signal_to_noise/{part}"] = (
                    float(self.signal[self.of_part(part)].sum().sqrt()) / expected
                )
        if not self.count:
            return found
        norms = self.squares.sum(0).sqrt()
        found |= {"privacy/clip_fraction": self.clipped_fraction(), "privacy/norm": float(norms.mean())}
        found |= {f"privacy/norm_{name}": float(norms.quantile(q)) for name, q in _QUANTILES.items()}
        for part in self.parts:
            found[f"privacy/norm/{part}"] = float(self.squares[self.of_part(part)].sum(0).sqrt().mean())
        if self.product_norms is not None:
            found["privacy/products_clip_fraction"] = float((self.product_norms > 1).double().mean())
        return found

    @property
    def parts(self) -> list[Part]:
        """What is sent and is not empty."""
        return [part for part in self.sent if self.experiment.layout.length_of([part])]

    def of_part(self, part: Part) -> list[int]:
        """The places of a part's pieces among all."""
        return [index for index, piece in enumerate(self.all_pieces) if piece.part == part]

    def clipped_fraction(self) -> float:
        """Of the clients of which anything is clipped."""
        over = torch.stack([self.norms[group] > bound for group, bound in self.clipping.bounds.items()]).any(0)
        return float(over.double().mean()) if self.count else 0.0

    def unmoved(self) -> tuple[Part, ...]:
        """The parts that are sent and that no client has changed; none where no client has sent anything."""
        if not self.count:
            return ()
        return tuple(part for part in self.parts if not bool((self.squares[self.of_part(part)] > 0).any()))


def clipping_of(privacy: PrivacyConfig, state: ServerState, sent: Sequence[Part]) -> Clipping:
    """The bounds of this round, of what is sent in it."""
    bounds = first_bounds(privacy)
    if state.clip_bounds is not None:
        bounds = dict(zip(bounds, state.clip_bounds.tolist(), strict=True))
    return Clipping({group: bound for group, bound in bounds.items() if group == TOGETHER or group in sent})


def make_release(experiment: Experiment) -> ClientRelease | None:
    """With privacy.unit=client."""
    return ClientRelease(experiment) if experiment.config.privacy.unit == "client" else None


def numbers_beside_mean(experiment: Experiment) -> int:
    """What a client sends in a round beside its update: its count for the bounds, and b·a·Q for LoRA-FAIR.

    For the latter Ã comes down before the rest of the adapter, and not again.
    """
    privacy, layout = experiment.config.privacy, experiment.layout
    if privacy.unit != "client":
        return 0
    counts = len(first_bounds(privacy)) if privacy.clip_quantile is not None else 0
    with_products = budget_shares(privacy, experiment.aggregator).products > 0
    return counts + (layout.length_of(("B",)) if with_products else 0)


def clients_of_round(experiment: Experiment) -> list[int] | None:
    """Who takes part, where the system's generator decides; None where it follows from the seed. Call on every rank.

    An interrupted round is drawn again: what some of its clients had done is used where they are drawn together again.
    """
    if experiment.config.privacy.unit != "client" or experiment.config.privacy.noise_source != "system":
        return None
    scheduler, drawn = experiment.scheduler, None
    if experiment.fabric.is_global_zero:
        chance, secret = scheduler.sampling_probability, SystemRandom()
        drawn = [client for client in range(len(scheduler.sizes)) if secret.random() < chance]
    return experiment.fabric.broadcast(drawn)
