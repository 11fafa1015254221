"""From the results of a round, or of an evaluation, to scalars by name; tags.py says what each of them is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lorafair.communication.collectives import ClientResults
from lorafair.communication.traffic import Traffic
from lorafair.evaluation import Evaluation
from lorafair.experiment import Experiment
from lorafair.model.adapter import AdapterLayout
from lorafair.privacy.measures import measured_scalars
from lorafair.reporting.left_behind import client_spread
from lorafair.reporting.tags import NORMS_OF_A, NORMS_OF_B
from lorafair.schedule import RoundPlan, with_scheduled_learning_rate
from lorafair.virtual_time.record import RoundWork

CLIENT_CURVES = 1000  # clients of a run of which each has a curve of its own; TensorBoard stalls with many more


@dataclass(frozen=True)
class RoundSummary:
    """What is reported of one round."""

    round: int  # from 1
    plan: RoundPlan
    results: ClientResults
    bias: Mapping[str, Tensor]  # what `bias_metrics` gives, or nothing
    evaluation: Evaluation | None
    seconds: Mapping[str, float]  # of the phases
    traffic: Traffic
    total_bytes: float  # since round 1
    total_seconds: float  # since round 1
    adapter: Tensor  # (P,) where clients start next
    shared_seconds: Mapping[int, float] = field(default_factory=dict)  # of clients that another run has trained, there
    work: RoundWork | None = None  # client by client

    @property
    def train_loss(self) -> float:
        """Mean over clients with their weights."""
        return sum(w * loss for w, loss in zip(self.results.weights, self.results.losses, strict=True))


def round_scalars(experiment: Experiment, summary: RoundSummary) -> dict[str, float]:
    """Everything that is recorded of a round."""
    rate = with_scheduled_learning_rate(experiment.local, summary.round - 1).learning_rate
    losses = summary.results.losses
    scalars = {"train/loss": summary.train_loss} if losses else {}  # clients sampled independently may be none
    scalars |= {"train/learning_rate": rate}
    if losses:
        scalars |= {"train/loss_highest": max(losses), "train/loss_lowest": min(losses)}
    scalars |= summary.results.metrics
    if len(experiment.clients) <= CLIENT_CURVES:
        for client, loss in zip(summary.results.clients, losses, strict=True):
            scalars[f"train/loss/{experiment.clients[client].name}"] = loss
    if experiment.measured > 2:  # weights follow from losses
        weights = summary.results.weights
        scalars |= {"train/weight_highest": max(weights), "train/weight_lowest": min(weights)}
        scalars["server/step"] = summary.results.step
    scalars |= _server_scalars(list(experiment.layout.factors), summary.bias)
    scalars |= {
        "comm/up_bytes": summary.traffic.up,
        "comm/down_bytes": summary.traffic.down,
        "comm/total_bytes": summary.total_bytes,
        "server/dropped_clients": len(summary.results.dropped),
        "server/late_clients": 0 if summary.plan.choice is None else len(summary.plan.choice.late),
    }
    scalars |= {f"time/{phase}": seconds for phase, seconds in summary.seconds.items()}
    scalars |= {"time/round": sum(summary.seconds.values()), "time/total": summary.total_seconds}
    if summary.shared_seconds:
        scalars["time/shared_training"] = sum(summary.shared_seconds.values())
    scalars |= _idle_fractions(summary)
    scalars |= _privacy_scalars(experiment, summary)
    if summary.evaluation is not None:
        scalars |= evaluation_scalars(experiment, summary.evaluation)
    return scalars


def evaluation_scalars(experiment: Experiment, evaluation: Evaluation) -> dict[str, float]:
    """Accuracies and loss of every domain and their means, their spread over clients, and the metrics of plug-ins."""
    balanced, answer = evaluation.balanced_accuracy, evaluation.most_frequent_answer
    scalars = {"eval/accuracy": evaluation.mean_accuracy, "eval/loss": evaluation.mean_loss}
    scalars["eval/balanced_accuracy"] = float(balanced.mean())
    scalars["eval/majority_class"] = float(evaluation.majority_class.mean())
    if answer is not None:
        scalars["eval/most_frequent_answer"] = float(answer.mean())
    for index, domain in enumerate(experiment.data.domains):
        scalars[f"eval/accuracy/{domain}"] = float(evaluation.accuracy[:, index].mean())
        scalars[f"eval/balanced_accuracy/{domain}"] = float(balanced[index])
        scalars[f"eval/loss/{domain}"] = float(evaluation.loss[:, index].mean())
    scalars["eval/accuracy_worst_domain"] = float(evaluation.accuracy.mean(0).min())
    for name, values in (("macro_f1", evaluation.macro_f1), ("calibration_error", evaluation.calibration_error)):
        if values is not None:
            scalars[f"eval/{name}"] = float(values.mean())
            of_domains = zip(experiment.data.domains, values.mean(0).tolist(), strict=True)
            scalars |= {f"eval/{name}/{domain}": value for domain, value in of_domains}
    if (spread := client_spread(experiment, evaluation)) is not None:
        scalars |= spread.curves
    own = own_domain_mask(experiment, evaluation)
    if own is not None:
        scalars["eval/accuracy_own_domain"] = float(evaluation.accuracy[own].mean())
        scalars["eval/accuracy_other_domains"] = float(evaluation.accuracy[~own].mean())
    return scalars | {f"eval/{name}": value for name, value in evaluation.metrics.items()}


def factor_norms(layout: AdapterLayout, adapter: Tensor) -> dict[str, np.ndarray[Any, Any]]:
    """The norms of the rows of every A and of the columns of every B, (L R,) each, by the tag of their histogram."""
    factors = layout.unpack(adapter.cpu()).factors.values()
    return {
        NORMS_OF_A: torch.cat([layer.A.norm(dim=1) for layer in factors]).numpy(),
        NORMS_OF_B: torch.cat([layer.B.norm(dim=0) for layer in factors]).numpy(),
    }


def own_domain_mask(experiment: Experiment, evaluation: Evaluation) -> Tensor | None:
    """(M, D) true where a client's domain is its own; None unless every client is evaluated and has one domain."""
    domains = [client.domain for client in experiment.clients]
    if not experiment.aggregator.personal_parts or len(experiment.data.domains) < 2 or None in domains:
        return None
    mask = torch.zeros_like(evaluation.accuracy, dtype=torch.bool)
    mask[torch.arange(len(domains)), torch.tensor(domains)] = True
    return mask


def _privacy_scalars(experiment: Experiment, summary: RoundSummary) -> dict[str, float]:
    """What the mechanism has done in the round, and the ε of all rounds so far, where there is one."""
    measures, epsilon = summary.results.measures, experiment.largest_epsilon(summary.round)
    scalars = {} if measures is None else measured_scalars(measures)
    return scalars if epsilon is None or math.isinf(epsilon) else {"privacy/epsilon": epsilon, **scalars}


def _server_scalars(paths: Sequence[str], bias: Mapping[str, Tensor]) -> dict[str, float]:
    if not bias:
        return {}
    values = torch.stack(list(bias.values())).cpu()  # (metrics, layers) in one transfer
    scalars: dict[str, float] = {}
    for name, row in zip(bias, values.tolist(), strict=True):
        scalars[f"server/{name}"] = sum(row) / len(row)
        scalars |= {f"server/{name}/{path}": v for path, v in zip(paths, row, strict=True)}
        if name == "error_after":
            scalars |= {"server/error_after_largest": max(row), "server/error_after_smallest": min(row)}
    return scalars


def _idle_fractions(summary: RoundSummary) -> dict[str, float]:
    """Fraction of the training phase each rank spent without work."""
    plan = summary.plan
    seconds = dict(zip(plan.clients, summary.results.seconds, strict=True)) | dict.fromkeys(summary.shared_seconds, 0.0)
    busy = [sum(seconds[c] for c in clients) for clients in plan.clients_of_rank]
    longest = max(busy)
    return {f"time/idle_fraction/rank{rank}": 1 - b / longest if longest else 0.0 for rank, b in enumerate(busy)}
