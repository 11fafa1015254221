"""Accuracy, recall, F1, calibration, loss and the metrics of plug-ins for every domain, exact on any number of ranks.

Every test image is visited once: batches do not depend on the number of ranks, ranks take them in turn, and what is
added up over ranks are integers, or numbers that only one rank holds. Metrics of plug-ins see all batches on rank 0, in
their order.

The definitions are those of torchmetrics: MulticlassF1Score(average="macro") and MulticlassCalibrationError(n_bins=15).
Its objects are not used here: to import them takes seconds of every run, and the latter keeps and gathers every
confidence, in float32, whose sum depends on the order. Here all states are small sums of integers.

Letters: M adapters evaluated (1, or one a client), D domains, Q classes, U batches, P packed length, N images.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lorafair.cluster.watchdog import heartbeat
from lorafair.communication.agreement import same_error_on_all_ranks
from lorafair.communication.collectives import gather_objects, sum_over_ranks
from lorafair.communication.progress import SharedProgress
from lorafair.data.images import ImageData
from lorafair.data.loading import BatchSource, Indices, index_on, on_device
from lorafair.errors import ConfigError, of_plugin
from lorafair.model.adapted_model import AdaptedModel
from lorafair.registry import METRICS

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from torchmetrics import Metric

# names of curves that every run has
_TAKEN = (
    "accuracy", "balanced_accuracy", "macro_f1", "calibration_error", "most_frequent_answer", "majority_class", "loss",
    "confusion", "client_accuracy",
)  # fmt: skip
_BINS = 15  # of confidences; a last one holds those that are exactly 1, as in torchmetrics
# A confidence as an integer, so that sums have no order. Exact: float32 has 24 bits, and the largest of Q <= 4096
# probabilities is at least 2^-12. 2^27 images of a domain have room.
_CONFIDENCE_UNIT = 2.0**-36


@dataclass(frozen=True)
class Evaluation:
    """The results of M adapters on the test images of D domains; the same on every rank.

    Example:
        >>> class Accuracy(lorafair.Callback):
        ...     def on_evaluation(self, round, evaluation):
        ...         print(round, evaluation.mean_accuracy, evaluation.accuracy.mean(0).tolist())
    """

    accuracy: Tensor  # (M, D) fraction of right answers
    loss: Tensor  # (M, D) mean cross-entropy in nats
    confusion: Tensor  # (D, Q, Q) images by true and predicted class, added up over the adapters
    metrics: dict[str, float] = field(default_factory=dict)  # of plug-ins: name, or name/domain
    hits: Tensor | None = None  # (M, D, Q) images by true class that an adapter classifies correctly
    macro_f1: Tensor | None = None  # (M, D) mean F1 of the classes that a domain's labels or the predictions have
    calibration_error: Tensor | None = None  # (M, D) expected calibration error, 15 equal bins of the confidence

    @property
    def mean_accuracy(self) -> float:
        """Unweighted mean over domains and adapters, as the LoRA-FAIR paper reports it."""
        return float(self.accuracy.mean())

    @property
    def mean_loss(self) -> float:
        """Unweighted mean over domains and adapters."""
        return float(self.loss.mean())

    @property
    def recall(self) -> Tensor:
        """(D, Q) fraction of a class's images that are classified correctly, over all adapters; NaN without images."""
        return self.confusion.diagonal(dim1=1, dim2=2) / self.confusion.sum(2).to(torch.float64)

    @property
    def balanced_accuracy(self) -> Tensor:
        """(D,) mean recall over the classes of which a domain has test images."""
        return self.recall.nanmean(1)

    @property
    def recall_of_adapters(self) -> Tensor | None:
        """(M, D, Q) as `recall`, of every adapter; NaN without images."""
        images = self.confusion.sum(2) // len(self.accuracy)  # (D, Q)
        return None if self.hits is None else self.hits / images.to(torch.float64)

    @property
    def majority_class(self) -> Tensor:
        """(D,) the accuracy of always predicting the class with the most test images."""
        images = self.confusion.sum(2).to(torch.float64)
        return images.amax(1) / images.sum(1)

    @property
    def most_frequent_answer(self) -> Tensor | None:
        """(D,) the largest fraction of all predictions that are the same class; None if there are several adapters."""
        answers = self.confusion.sum(1).to(torch.float64)
        return answers.amax(1) / answers.sum(1) if len(self.accuracy) == 1 else None


def register_metric(name: str) -> Callable[[Callable[[int], Metric]], Callable[[int], Metric]]:
    """Make a torchmetrics object a value of evaluation.metrics.

    Args:
        name: The name to use in evaluation.metrics. Its curves are eval/<name>, over all test images, and
            eval/<name>/<domain>.

    Returns:
        A decorator for a function that makes the metric for a number of classes. Its `update` gets the logits (N, Q)
        and the labels (N,) of one batch, and, if it has parameters of these names, `domain`: the index of the
        batch's domain, and `client`: the index of the client whose own model is evaluated (None for the global one). A
        metric that takes the domain is made once; any other metric is also made for each domain. `compute` returns a
        number, or numbers by name.

    Raises:
        ConfigError: The name is taken.

    Example:
        >>> @lorafair.register_metric("top5")
        ... def top5(classes):
        ...     return torchmetrics.classification.MulticlassAccuracy(classes, top_k=5, average="micro")
    """

    def register(make: Callable[[int], Metric]) -> Callable[[int], Metric]:
        if name in _TAKEN:
            raise ConfigError(
                f"there is a metric {name} already, which every run has; register yours under another name"
            )
        METRICS.add(name, make)
        return make

    return register


class Evaluator:
    """The test images of a run, cut into batches of one domain each."""

    def __init__(
        self, fabric: Fabric, source: BatchSource, data: ImageData, *, batch_size: int, metrics: Sequence[str] = ()
    ) -> None:
        self._fabric, self._source, self._data, self._metrics = fabric, source, data, metrics
        _PluginMetrics(metrics, data, personal=False)  # one that cannot be made is an error now
        self._labels = torch.from_numpy(data.test.labels).to(fabric.device)
        self._batches: list[Indices] = []
        self._domain_of_batch: list[int] = []
        self._images: list[int] = []  # (D,)
        for domain in range(len(data.domains)):
            members = np.flatnonzero(data.test.domains == domain)
            cut = [members[i : i + batch_size] for i in range(0, len(members), batch_size)]
            self._batches += cut
            self._domain_of_batch += [domain] * len(cut)
            self._images.append(len(members))

    @torch.inference_mode()
    def __call__(self, model: AdaptedModel, adapters: Tensor, what: str = "evaluation") -> Evaluation:
        """Evaluate packed adapters (M, P). Call on every rank; the model is left with the last adapter written."""
        counts = _Counts.zero(
            len(adapters), len(self._images), len(self._batches), len(self._data.classes), self._fabric
        )
        metrics = _PluginMetrics(self._metrics, self._data, personal=len(adapters) > 1)
        everyone = list(range(len(adapters)))
        with SharedProgress(self._fabric, what, len(adapters) * sum(self._images), "images") as progress:
            # In one go, unless the answers of each adapter have to be brought to rank 0 before the next one.
            for indices in [[index] for index in everyone] if self._metrics else [everyone]:
                answers: list[tuple[int, Tensor]] = []
                with same_error_on_all_ranks(self._fabric):
                    for index in indices:
                        model.adapters.write(adapters[index])
                        answers += self._evaluate(model, index, counts, progress)
                if self._metrics:
                    self._update(metrics, indices[0], answers)
        return counts.evaluation(self._fabric, self._images, self._domain_of_batch, self._computed(metrics))

    def _evaluate(
        self, model: AdaptedModel, index: int, counts: _Counts, progress: SharedProgress
    ) -> list[tuple[int, Tensor]]:
        """This rank's batches of one adapter into `counts`; returns batch and logits where metrics need them."""
        fabric, units = self._fabric, len(self._batches)
        mine = range((fabric.global_rank - index * units) % fabric.world_size, units, fabric.world_size)
        answers: list[tuple[int, Tensor]] = []
        batches = on_device(self._source.batches([self._batches[u] for u in mine]), fabric.device)
        for u, inputs in zip(mine, batches, strict=True):
            heartbeat()
            labels = self._labels[index_on(self._batches[u], fabric.device)]
            with fabric.autocast():
                logits = model(inputs)
            counts.add(index, u, self._domain_of_batch[u], logits, labels)
            if self._metrics:
                answers.append((u, logits.float().cpu()))
            progress.add(len(labels))
        return answers

    def _update(self, metrics: _PluginMetrics, index: int, answers: list[tuple[int, Tensor]]) -> None:
        """Update the metrics on rank 0 with all ranks' answers of one adapter, batch by batch in their order."""
        gathered = gather_objects(self._fabric, answers) or []
        with same_error_on_all_ranks(self._fabric):
            for u, logits in sorted(chain.from_iterable(gathered), key=lambda answer: answer[0]):
                labels = torch.from_numpy(self._data.test.labels[self._batches[u]])
                metrics.update(logits, labels, self._domain_of_batch[u], index)

    def _computed(self, metrics: _PluginMetrics) -> dict[str, float]:
        """The values of the metrics, on every rank."""
        values: dict[str, float] = {}
        if not self._metrics:
            return values
        with same_error_on_all_ranks(self._fabric):
            if self._fabric.is_global_zero:
                values = metrics.compute()
        return dict(self._fabric.broadcast(values))


@dataclass(frozen=True)
class _Counts:
    """What is added up over batches and ranks."""

    hits: Tensor  # (M, D, Q) int64, right answers by class
    answers: Tensor  # (M, D, Q) int64, all answers by class
    bins: Tensor  # (M, D, bins + 1, 3) int64 by confidence: images, right answers, sum of confidences in their unit
    confusion: Tensor  # (D, Q, Q) int64
    losses: Tensor  # (M, U) float64, each from one rank

    @staticmethod
    def zero(adapters: int, domains: int, batches: int, classes: int, fabric: Fabric) -> _Counts:
        """No batch is added yet."""

        def integers(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=fabric.device)

        return _Counts(
            hits=integers(adapters, domains, classes),
            answers=integers(adapters, domains, classes),
            bins=integers(adapters, domains, _BINS + 1, 3),
            confusion=integers(domains, classes, classes),
            losses=torch.zeros(adapters, batches, dtype=torch.float64, device=fabric.device),
        )

    def add(self, adapter: int, batch: int, domain: int, logits: Tensor, labels: Tensor) -> None:
        """One batch of one adapter."""
        self.losses[adapter, batch] = F.cross_entropy(logits.double(), labels, reduction="sum")
        predicted = logits.argmax(1)
        right, one = (predicted == labels).to(torch.int64), torch.ones_like(predicted)
        self.hits[adapter, domain].index_add_(0, labels, right)
        self.answers[adapter, domain].index_add_(0, predicted, one)
        confidence = logits.float().softmax(1).amax(1).nan_to_num(0.0)
        edges = torch.linspace(0, 1, _BINS + 1, device=logits.device)
        counted = torch.stack([one, right, (confidence.double() / _CONFIDENCE_UNIT).to(torch.int64)], dim=1)  # (N, 3)
        self.bins[adapter, domain].index_add_(0, torch.bucketize(confidence, edges, right=True) - 1, counted)
        # As torchmetrics' multiclass_confusion_matrix, which takes two seconds to import and waits for the device.
        cells = labels * self.confusion.shape[1] + predicted
        self.confusion[domain].view(-1).index_add_(0, cells, one)

    def evaluation(
        self, fabric: Fabric, images: Sequence[int], domain_of_batch: Sequence[int], metrics: dict[str, float]
    ) -> Evaluation:
        """The result over all ranks. Call on every rank."""
        for partial in (self.hits, self.answers, self.bins, self.confusion, self.losses):
            sum_over_ranks(fabric, partial)
        hits, confusion = self.hits.cpu(), self.confusion.cpu()
        either = confusion.sum(2) // len(hits) + self.answers.cpu()  # (M, D, Q) images of a class and answers of it
        _, right, confidence = self.bins.cpu().to(torch.float64).unbind(3)  # (M, D, bins + 1)
        by_domain = torch.zeros(hits.shape[:2], dtype=torch.float64)
        by_domain.index_add_(1, torch.tensor(domain_of_batch), self.losses.cpu())
        of_domain = torch.tensor(images, dtype=torch.float64)  # (D,)
        return Evaluation(
            accuracy=hits.sum(2) / of_domain,
            loss=by_domain / of_domain,
            confusion=confusion,
            metrics=metrics,
            hits=hits,
            macro_f1=(2 * hits / either.to(torch.float64)).nanmean(2),
            calibration_error=(right - _CONFIDENCE_UNIT * confidence).abs().sum(2) / of_domain,
        )


class _PluginMetrics:
    """The metrics that evaluation.metrics names, over all test images and for each domain. Used on rank 0."""

    def __init__(self, names: Sequence[str], data: ImageData, *, personal: bool) -> None:
        self._domains, self._personal = data.domains, personal
        self._overall: dict[str, Any] = {}
        self._by_domain: dict[str, list[Any]] = {}
        for name in names:
            with of_plugin(f"evaluation.metrics: {name}"):
                self._overall[name] = _make(name, len(data.classes))
                if "domain" not in inspect.signature(self._overall[name].update).parameters:
                    self._by_domain[name] = [_make(name, len(data.classes)) for _ in data.domains]

    def update(self, logits: Tensor, labels: Tensor, domain: int, adapter: int) -> None:
        """One batch (N, Q), (N,) of one domain, answered by one adapter."""
        for name, metric in self._overall.items():
            known = {"domain": domain, "client": adapter if self._personal else None}
            wanted = inspect.signature(metric.update).parameters
            more = {key: value for key, value in known.items() if key in wanted}
            with of_plugin(f"evaluation.metrics: {name}"):
                metric.update(logits, labels, **more)
                if name in self._by_domain:
                    self._by_domain[name][domain].update(logits, labels, **more)

    def compute(self) -> dict[str, float]:
        """All values by name, and by name/domain."""
        values: dict[str, float] = {}
        for name, metric in self._overall.items():
            with of_plugin(f"evaluation.metrics: {name}"):
                values |= _numbers(name, metric.compute())
                for domain, of_domain in zip(self._domains, self._by_domain.get(name, ()), strict=False):
                    values |= {f"{key}/{domain}": value for key, value in _numbers(name, of_domain.compute()).items()}
        return values


def _make(name: str, classes: int) -> Any:
    """A metric that computes from the batches of this rank; by default it would wait for the other ranks."""
    metric: Any = METRICS[name](classes)
    for part in metric.modules():
        part.distributed_available_fn = lambda: False
    return metric


def _numbers(name: str, value: Any) -> dict[str, float]:
    """What a metric has computed, as numbers by name."""
    if isinstance(value, Mapping):
        return {f"{name}/{key}": number for key, part in value.items() for number in _numbers(name, part).values()}
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ConfigError(
            f"evaluation.metrics: {name} computes a tensor of shape {tuple(value.shape)}; a metric computes one "
            "number, or numbers by name"
        )
    return {name: float(value)}
