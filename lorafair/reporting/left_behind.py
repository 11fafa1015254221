"""Who is left behind: the accuracy of every client, and its spread over the clients.

Letters: N clients, M adapters evaluated (1, or one a client), D domains, Q classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from lorafair.evaluation import Evaluation
from lorafair.experiment import Experiment

DECILE = 10


@dataclass(frozen=True)
class ClientSpread:
    """The accuracies of the clients in a few numbers. Clients without an accuracy are counted, and left out."""

    clients: int
    without_test_images: int  # of them: they have no accuracy
    mean: float
    worst_decile: float  # mean of the tenth of the clients where it is lowest, rounded up to whole clients
    best_decile: float  # and of the tenth where it is highest
    deviation: float  # standard deviation: these are all clients, and no sample of them

    @property
    def curves(self) -> dict[str, float]:
        """The scalars of a round."""
        numbers = {"": self.mean, "_worst_decile": self.worst_decile, "_best_decile": self.best_decile}
        return {
            f"eval/client_accuracy{name}": value for name, value in (numbers | {"_deviation": self.deviation}).items()
        }


def client_accuracies(experiment: Experiment, evaluation: Evaluation) -> np.ndarray | None:
    """(N,) the accuracy that each client can expect on its own mix of domains and classes.

    a_k = Σ_dc n_kdc·a_dc / Σ_dc n_kdc: n_kdc training images of class c and domain d has client k, and of the test
    images of class c and domain d the model classifies the fraction a_dc correctly: the global model, or the client's
    own one where each has one. The sums are over the classes and domains that have test images; NaN for a client that
    has no training image of these. None where an evaluation does not hold what is needed.
    """
    recall = evaluation.recall_of_adapters  # (M, D, Q)
    if recall is None:
        return None
    owners, train = experiment.owners, experiment.data.train
    images = np.concatenate([owner.indices for owner in owners])
    owner_of = np.repeat(np.arange(len(owners)), [len(owner.indices) for owner in owners])
    adapter_of = owner_of if experiment.aggregator.personal_parts else np.zeros_like(owner_of)
    expected = recall.numpy()[adapter_of, train.domains[images], train.labels[images]]  # of every training image
    known = ~np.isnan(expected)
    counts = np.bincount(owner_of[known], minlength=len(owners))
    sums = np.bincount(owner_of[known], weights=expected[known], minlength=len(owners))
    accuracies = np.full(len(owners), np.nan)
    np.divide(sums, counts, out=accuracies, where=counts > 0)
    return accuracies


def client_spread(experiment: Experiment, evaluation: Evaluation) -> ClientSpread | None:
    """The spread of `client_accuracies`; None where there are none."""
    accuracies = client_accuracies(experiment, evaluation)
    return None if accuracies is None else spread_of(accuracies)


def spread_of(accuracies: np.ndarray) -> ClientSpread | None:
    """Of accuracies (N,), NaN for a client without; None where no client has one."""
    known = np.sort(accuracies[~np.isnan(accuracies)])
    if not known.size:
        return None
    tenth = math.ceil(known.size / DECILE)
    return ClientSpread(
        clients=accuracies.size,
        without_test_images=accuracies.size - known.size,
        mean=float(known.mean()),
        worst_decile=float(known[:tenth].mean()),
        best_decile=float(known[-tenth:].mean()),
        deviation=float(known.std()),
    )
