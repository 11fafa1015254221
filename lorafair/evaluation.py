"""Top-1 accuracy and loss of every domain, exact on any number of ranks.

Every test image is visited once: batches do not depend on the number of ranks, ranks take them in turn, and what is
added up over ranks are integers, or numbers that only one rank holds.

Letters: M adapters evaluated (1, or one a client), D domains, Q classes, U batches, P packed length.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from lightning.fabric import Fabric
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.classification import multiclass_confusion_matrix

from lorafair.data.loading import BatchSource, Indices
from lorafair.exchange import same_error_on_all_ranks, sum_over_ranks
from lorafair.models import AdaptedModel
from lorafair.watchdog import step


@dataclass(frozen=True)
class Evaluation:
    """What M adapters do on the test images of D domains; the same on every rank."""

    accuracy: Tensor  # (M, D) share of right answers
    loss: Tensor  # (M, D) mean cross-entropy in nats
    confusion: Tensor  # (D, Q, Q) images by true and predicted class, added up over the adapters

    @property
    def mean_accuracy(self) -> float:
        """Unweighted mean over domains and adapters, as the LoRA-FAIR paper reports it."""
        return float(self.accuracy.mean())

    @property
    def mean_loss(self) -> float:
        """Unweighted mean over domains and adapters."""
        return float(self.loss.mean())


class Evaluator:
    """The test images of a run, cut into batches of one domain each."""

    def __init__(
        self, fabric: Fabric, source: BatchSource, labels: Indices, domains: Indices, *, classes: int, batch_size: int
    ) -> None:
        self._fabric = fabric
        self._source = source
        self._labels = torch.from_numpy(labels).to(fabric.device)
        self._classes = classes
        self._batches: list[Indices] = []
        self._domain_of_batch: list[int] = []
        self._images: list[int] = []  # (D,)
        for domain in range(int(np.max(domains)) + 1):
            members = np.flatnonzero(domains == domain)
            cut = [members[i : i + batch_size] for i in range(0, len(members), batch_size)]
            self._batches += cut
            self._domain_of_batch += [domain] * len(cut)
            self._images.append(len(members))

    @torch.inference_mode()
    def __call__(self, model: AdaptedModel, adapters: Tensor) -> Evaluation:
        """Evaluate packed adapters (M, P). Call on every rank; the model is left with the last adapter written."""
        fabric = self._fabric
        domains, units = len(self._images), len(self._batches)
        right = torch.zeros(len(adapters), domains, dtype=torch.int64, device=fabric.device)
        confusion = torch.zeros(domains, self._classes, self._classes, dtype=torch.int64, device=fabric.device)
        losses = torch.zeros(len(adapters), units, dtype=torch.float64, device=fabric.device)  # (M, U)
        with same_error_on_all_ranks(fabric):
            for index, adapter in enumerate(adapters):
                mine = range((fabric.global_rank - index * units) % fabric.world_size, units, fabric.world_size)
                model.adapters.write(adapter)
                for u, inputs in zip(mine, self._source.batches([self._batches[u] for u in mine]), strict=True):
                    step()
                    labels = self._labels[torch.from_numpy(self._batches[u])]
                    with fabric.autocast():
                        logits = model(inputs.to(fabric.device, non_blocking=True))
                    losses[index, u] = F.cross_entropy(logits.double(), labels, reduction="sum")
                    counts = multiclass_confusion_matrix(logits, labels, self._classes, validate_args=False)
                    right[index, self._domain_of_batch[u]] += counts.trace()
                    confusion[self._domain_of_batch[u]] += counts
        for partial in (right, confusion, losses):
            sum_over_ranks(fabric, partial)
        by_domain = torch.zeros(len(adapters), domains, dtype=torch.float64)
        by_domain.index_add_(1, torch.tensor(self._domain_of_batch), losses.cpu())
        images = torch.tensor(self._images, dtype=torch.float64)  # (D,)
        return Evaluation(accuracy=right.cpu() / images, loss=by_domain / images, confusion=confusion.cpu())
