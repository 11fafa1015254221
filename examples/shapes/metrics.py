"""A metric: the recall of every class counts the same, however many images it has."""

from __future__ import annotations

from torchmetrics import Metric
from torchmetrics.classification import MulticlassRecall

import lorafair


@lorafair.register_metric("macro_recall")
def macro_recall(classes: int) -> Metric:
    """Its curves are eval/macro_recall and eval/macro_recall/<domain>."""
    return MulticlassRecall(classes, average="macro")
