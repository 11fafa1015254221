"""What TensorBoard shows of a run: the tag, unit and meaning of every scalar, its pictures, charts and table of runs.

TensorBoard sorts groups by name and opens the first two, so the groups carry numbers. metrics.csv, loggers, callbacks
and `RunResult.metrics` have the names alone. Nothing heavy is imported: a reference page can be made from these tables.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise

_PLACE = re.compile(r"<\w+>")  # stands for a name in a tag or a name of a scalar


@dataclass(frozen=True)
class Scalar:
    """A curve. <domain>, <client>, <layer>, <rank>, <phase> and <metric> stand for names."""

    name: str  # in metrics.csv; empty where the value is in TensorBoard alone
    tag: str
    unit: str
    meaning: str
    scale: float = 1.0  # from the unit of metrics.csv


_FRACTION, _NATS, _SECONDS, _RATIO = "fraction", "nats", "seconds", "ratio"
_ERROR = "‖ΔW − X‖/‖ΔW‖, mean of the layers"

SCALARS = (
    Scalar("eval/accuracy", "1 accuracy/mean of domains", _FRACTION, "Top-1 accuracy, unweighted mean of the domains"),
    Scalar(
        "eval/accuracy_worst_domain", "1 accuracy/minimum of domains", _FRACTION,
        "Accuracy on the domain where it is lowest",
    ),
    Scalar(
        "eval/accuracy_own_domain", "1 accuracy/mean on own domain", _FRACTION,
        "Mean of the clients' own models, each on its own domain",
    ),
    Scalar(
        "eval/accuracy_other_domains", "1 accuracy/mean on other domains", _FRACTION,
        "Mean of the clients' own models, each on the other domains",
    ),
    Scalar(
        "eval/balanced_accuracy", "1 accuracy/mean, balanced over classes", _FRACTION,
        "Mean recall of the classes with test images in a domain, unweighted mean of the domains",
    ),
    Scalar(
        "eval/balanced_accuracy/<domain>", "1 accuracy/other balanced on <domain>", _FRACTION, "The same for one domain"
    ),
    Scalar(
        "eval/majority_class", "1 accuracy/other majority class", _FRACTION,
        "Accuracy of always predicting the class with the most test images, mean of the domains",
    ),
    Scalar(
        "eval/most_frequent_answer", "1 accuracy/other most frequent answer", _FRACTION,
        "Largest fraction of predictions that are one class, mean of the domains; only with a global model",
    ),
    Scalar(
        "eval/macro_f1", "1 accuracy/mean, F1 of classes", _FRACTION,
        "Mean F1 of the classes that a domain's labels or predictions have, unweighted mean of the domains",
    ),
    Scalar(
        "eval/macro_f1/<domain>", "1 accuracy/other F1 of classes on <domain>", _FRACTION, "The same for one domain"
    ),
    Scalar(
        "eval/calibration_error", "1 accuracy/other calibration error", _FRACTION,
        "Expected calibration error, 15 equal bins of the confidence, unweighted mean of the domains",
    ),
    Scalar(
        "eval/calibration_error/<domain>", "1 accuracy/other calibration error on <domain>", _FRACTION,
        "The same for one domain",
    ),
    Scalar(
        "eval/client_accuracy", "1 accuracy/of clients, mean", _FRACTION,
        "Accuracy on test images with a client's own mix of domains and classes, mean of the clients",
    ),
    Scalar(
        "eval/client_accuracy_worst_decile", "1 accuracy/of clients, worst decile", _FRACTION,
        "The same, mean of the tenth of the clients where it is lowest",
    ),
    Scalar(
        "eval/client_accuracy_best_decile", "1 accuracy/of clients, best decile", _FRACTION,
        "The same, mean of the tenth of the clients where it is highest",
    ),
    Scalar(
        "eval/client_accuracy_deviation", "1 accuracy/of clients, standard deviation", _FRACTION,
        "The same, standard deviation over the clients",
    ),
    Scalar("eval/accuracy/<domain>", "1 accuracy/on <domain>", _FRACTION, "Top-1 accuracy on the domain's test images"),
    Scalar("eval/<metric>", "1 accuracy/other <metric>", "of the metric", "A metric of evaluation.metrics"),
    Scalar("train/loss", "2 loss/local training", _NATS, "Mean over a client's steps, weighted mean of the clients"),
    Scalar("eval/loss", "2 loss/test mean of domains", _NATS, "Cross-entropy on test images, mean of the domains"),
    Scalar("eval/loss/<domain>", "2 loss/test on <domain>", _NATS, "Cross-entropy on the domain's test images"),
    Scalar(
        "server/error_after", "3 aggregation/bias after", _RATIO, f"{_ERROR}; X: what clients hold after the method"
    ),
    Scalar("server/error_before", "3 aggregation/bias before", _RATIO, f"{_ERROR}; X: plain averaging of the factors"),
    Scalar(
        "server/error_after_largest", "3 aggregation/bias after, largest", _RATIO,
        "The same for the layer where it is largest",
    ),
    Scalar(
        "server/error_after_smallest", "3 aggregation/bias after, smallest", _RATIO,
        "The same for the layer where it is smallest",
    ),
    Scalar("server/cosine_after", "3 aggregation/cosine after", "-1 to 1", "Cosine of ΔW and what clients hold"),
    Scalar("server/cosine_before", "3 aggregation/cosine before", "-1 to 1", "Cosine of ΔW and plain averaging"),
    Scalar("server/norm_ratio", "3 aggregation/norm of B", _RATIO, "‖B'‖/‖B̄‖: B after the method and the mean B"),
    Scalar("server/correction_ratio", "3 aggregation/norm of correction", _RATIO, "‖B' − B̄‖/‖B̄‖"),
    Scalar("server/<metric>/<layer>", "8 layers/<metric> <layer>", _RATIO, "With tensorboard.layers=curves"),
    Scalar("comm/up_bytes", "4 traffic/up MB", "MB", "Traffic from the round's clients", 1e-6),
    Scalar("comm/down_bytes", "4 traffic/down MB", "MB", "Traffic to the round's clients", 1e-6),
    Scalar("comm/total_bytes", "4 traffic/total MB", "MB", "Both, since round 1", 1e-6),
    Scalar("time/round", "5 time/round", _SECONDS, "All phases of the round"),
    Scalar("time/total", "5 time/total", _SECONDS, "All rounds since round 1"),
    Scalar(
        "time/idle_fraction/<rank>", "5 time/waiting <rank>", _FRACTION,
        "Fraction of the training phase in which the process waited",
    ),
    Scalar(
        "time/<phase>", "5 time/<phase>", _SECONDS,
        "train, gather, server, broadcast, evaluate; shared_training: what was taken over, as long as it took there",
    ),
    Scalar("server/dropped_clients", "6 clients/dropped", "clients", "Clients left out because of NaN or infinity"),
    Scalar(
        "defence/left_out", "6 defence/left out", _FRACTION,
        "Clients of the round that get no weight (defence.name)",
    ),
    Scalar(
        "defence/shortened", "6 defence/shortened", _FRACTION,
        "Clients of the round whose update was longer than the bound (defence.name=norm_bounding)",
    ),
    Scalar(
        "defence/attackers_weight", "6 defence/weight of attackers", _FRACTION,
        "Weight of the clients that lie, after the defence (attack.name); a real server does not know it",
    ),
    Scalar(
        "server/late_clients", "6 clients/late", "clients",
        "Clients that were asked and came later than the others or the deadline (federation.profile)",
    ),
    Scalar("train/learning_rate", "6 clients/learning rate", "", "Learning rate of the round (client.schedule)"),
    Scalar("train/loss_highest", "6 clients/loss highest", _NATS, "Training loss of the client where it is highest"),
    Scalar("train/loss_lowest", "6 clients/loss lowest", _NATS, "Training loss of the client where it is lowest"),
    Scalar(
        "train/weight_highest", "6 clients/weight highest", _FRACTION,
        "Largest weight of a client in the mean, with federation.weighting=q or afl",
    ),
    Scalar("train/weight_lowest", "6 clients/weight lowest", _FRACTION, "Smallest weight of a client in the mean"),
    Scalar(
        "server/step", "3 aggregation/part of the way", _RATIO,
        "How far the server goes to the mean, with federation.weighting=q (1: all the way)",
    ),
    Scalar("train/loss/<client>", "6 clients/loss of <client>", _NATS, "In runs of up to 1,000 clients"),
    Scalar("privacy/epsilon", "6 privacy/epsilon", "", "ε of what was released so far; the largest of all units"),
    Scalar(
        "privacy/clip_fraction", "6 privacy/clip fraction", _FRACTION,
        "Fraction of the contributions that privacy.clip_norm shortens",
    ),
    Scalar("privacy/norm", "6 privacy/norm", "", "Norm of a contribution before clipping, mean"),
    Scalar("privacy/norm_lowest_tenth", "6 privacy/norm, lowest tenth", "", "Norm below which a tenth of them is"),
    Scalar("privacy/norm_median", "6 privacy/norm, median", "", "Median of the norms of the clients' updates"),
    Scalar("privacy/norm_highest_tenth", "6 privacy/norm, highest tenth", "", "Norm above which a tenth of them is"),
    Scalar(
        "privacy/clip_norm", "6 privacy/clip norm", "",
        "Largest norm of a clipped update in the round, with privacy.unit=client",
    ),
    Scalar("privacy/clip_norm/<part>", "6 privacy/clip norm of <part>", "", "The same of a part, with clip_parts"),
    Scalar("privacy/clients", "6 privacy/clients", "clients", "Clients that privacy.unit=client has sampled"),
    Scalar(
        "privacy/noise_std", "6 privacy/noise", "",
        "Standard deviation of the noise on each number of the clients' mean update",
    ),
    Scalar(
        "privacy/products_clip_fraction", "6 privacy/clip fraction of products", _FRACTION,
        "The same as the clip fraction for the second release of LoRA-FAIR",
    ),
    Scalar("privacy/norm/<part>", "6 privacy/norm of <part>", "", "The same for a part of it: A, B, core, head"),
    Scalar(
        "privacy/signal_to_noise/<part>", "6 privacy/signal to noise of <part>", _RATIO,
        "Norm of the clipped sum to that of the noise on it, root of the mean squares",
    ),
    Scalar("", "9 stacked time/<phase>", _SECONDS, "From the start of the round to the end of the phase"),
)  # fmt: skip


@dataclass(frozen=True)
class Shown:
    """A picture, a histogram or a text."""

    tag: str
    when: str
    meaning: str


_OFTEN = "after the last round and at most every tensorboard.pictures_every rounds"
CARD, LABEL_COUNTS, SAMPLES, CONFUSION = "run", "6 clients/label counts", "6 clients/samples", "7 confusion/<domain>"
LOSSES, NORMS_OF_A, NORMS_OF_B = "6 clients/loss by client", "3 aggregation/norms of A", "3 aggregation/norms of B"

PICTURES = (
    Shown(CARD, "at the start", "Text: command, settings, clients, versions, links"),
    Shown("3 aggregation/<metric> by layer", _OFTEN, "Every metric of the group as layer × round"),
    Shown(NORMS_OF_A, "after each round with tensorboard.histograms", "Histogram: norms of the rows of every A"),
    Shown(NORMS_OF_B, "after each round with tensorboard.histograms", "Histogram: norms of the columns of every B"),
    Shown(LABEL_COUNTS, "at the start", "Training images of each client and class"),
    Shown(SAMPLES, "at the start", "tensorboard.samples training images of each client"),
    Shown(LOSSES, _OFTEN, "Training loss as client × round"),
    Shown(CONFUSION, "at the end", "Predicted by true class, in percent of the true class; up to 150 classes"),
)


@dataclass(frozen=True)
class Chart:
    """A chart of the tab Custom Scalars: lines, or bands (value, lower edge, upper edge)."""

    category: str
    title: str
    lines: tuple[str, ...] = ()
    bands: tuple[tuple[str, str, str], ...] = ()
    needs_curves: bool = False  # tensorboard.layers=curves
    most_clients: int | None = None  # of a run; lines of more cannot be told apart


PHASES = ("train", "gather", "server", "broadcast", "evaluate")  # of a round, in their order
_EDGES = tuple(f"9 stacked time/{place} {name}" for place, name in enumerate(("start", *PHASES)))

CHARTS = (
    Chart("Accuracy", "All domains", ("1 accuracy/on <domain>",)),
    Chart(
        "Accuracy", "Mean and worst domain",
        bands=(("1 accuracy/mean of domains", "1 accuracy/minimum of domains", "1 accuracy/mean of domains"),),
    ),
    Chart("Accuracy", "Top-1 and balanced", ("1 accuracy/mean of domains", "1 accuracy/mean, balanced over classes")),
    Chart(
        "Accuracy", "Clients: mean, worst and best decile",
        bands=(
            (
                "1 accuracy/of clients, mean", "1 accuracy/of clients, worst decile",
                "1 accuracy/of clients, best decile",
            ),
        ),
    ),
    Chart("Loss", "Training and test", ("2 loss/local training", "2 loss/test mean of domains")),
    Chart("Loss", "Test, all domains", ("2 loss/test on <domain>",)),
    Chart(
        "Loss", "Clients: mean, lowest and highest",
        bands=(("2 loss/local training", "6 clients/loss lowest", "6 clients/loss highest"),),
    ),
    Chart("Loss", "All clients", ("6 clients/loss of <client>",), most_clients=50),
    Chart("Aggregation", "Bias before and after", ("3 aggregation/bias before", "3 aggregation/bias after")),
    Chart(
        "Aggregation", "Bias after: mean, smallest and largest of the layers",
        bands=(
            (
                "3 aggregation/bias after", "3 aggregation/bias after, smallest",
                "3 aggregation/bias after, largest",
            ),
        ),
    ),
    Chart("Aggregation", "Bias after, every layer", ("8 layers/bias after <layer>",), needs_curves=True),
    Chart("Traffic", "MB of a round", ("4 traffic/up MB", "4 traffic/down MB")),
    Chart("Traffic", "MB since round 1", ("4 traffic/total MB",)),
    Chart(
        "Time", "Seconds of a round: phases on top of each other",
        bands=tuple((after, before, after) for before, after in pairwise(_EDGES)),
    ),
    Chart("Time", "Seconds of a round: each phase", tuple(f"5 time/{phase}" for phase in PHASES)),
)  # fmt: skip


@dataclass(frozen=True)
class Column:
    """A column of the tab HParams that tells runs apart. TensorBoard shows five, the others where they are ticked."""

    name: str
    meaning: str
    is_shown: bool = False


COLUMNS = (
    Column("method", "method.name", is_shown=True),
    Column("options", "The other options of method that are set", is_shown=True),
    Column("setting", "The folder that contains the run directory", is_shown=True),
    Column("seed", "seed", is_shown=True),
    Column("rounds", "rounds"),
    Column("learning rate", "client.learning_rate", is_shown=True),
    Column("LoRA rank", "model.lora.rank"),
    Column("clients", "Clients of the run"),
    Column("clients a round", "federation.clients_per_round, or all"),
    Column("data", "data.source"),
    Column("model", "model.name"),
)
RESULTS = {  # title of a metric of that tab -> the curve whose last value it is
    "accuracy": "1 accuracy/mean of domains",
    "balanced": "1 accuracy/mean, balanced over classes",
    "worst domain": "1 accuracy/minimum of domains",
    "worst decile": "1 accuracy/of clients, worst decile",
    "bias": "3 aggregation/bias after",
    "MB": "4 traffic/total MB",
    "seconds": "5 time/total",
}

_EXACT = {scalar.name: scalar for scalar in SCALARS if scalar.name and "<" not in scalar.name}
_PATTERNS = sorted(  # the longest beginning first
    (
        (scalar.name.partition("<")[0], scalar)
        for scalar in SCALARS
        if "<" in scalar.name and scalar.name.count("<") == 1
    ),
    key=lambda found: -len(found[0]),
)


def split_layer(name: str) -> tuple[str, str] | None:
    """(metric, layer) of a scalar of one layer; None for any other."""
    group, _, rest = name.partition("/")
    metric, slash, layer = rest.partition("/")
    return (f"server/{metric}", layer) if group == "server" and slash else None


def title_of(name: str) -> str:
    """What a scalar is called within its group: `bias after` for server/error_after."""
    return shown_as(name)[0].rpartition("/")[2]


def shown_as(name: str) -> tuple[str, float]:
    """The tag of a scalar, and what its value is multiplied by; a name that is in no table is its own tag."""
    if (exact := _EXACT.get(name)) is not None:
        return exact.tag, exact.scale
    if (found := split_layer(name)) is not None:
        metric, layer = found
        return f"8 layers/{title_of(metric)} {layer}", 1.0
    for beginning, scalar in _PATTERNS:
        if name.startswith(beginning):
            before, after = _PLACE.split(scalar.tag)
            return f"{before}{name.removeprefix(beginning)}{after}", scalar.scale
    return name, 1.0


def pattern(tag: str) -> str:
    """A regular expression for a tag, with any text for what stands for a name."""
    return f"^{'.+'.join(re.escape(part) for part in _PLACE.split(tag))}$"


def edges(values: Mapping[str, float]) -> dict[str, float]:
    """The seconds from the start of a round to its start and to the end of each phase, by tag."""
    seconds = [values[name] for phase in PHASES if (name := f"time/{phase}") in values]
    if len(seconds) < len(PHASES):
        return {}
    return dict(zip(_EDGES, accumulate(seconds, initial=0.0), strict=True))
