"""pfl-research: WORK OUT. Its FederatedAveraging on its SimulatedBackend, in one process."""

import sys
from itertools import count

import torch
from common import Stopwatch, Work, packed
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.pytorch import PyTorchTensorDataset
from pfl.hyperparam import NNTrainHyperParams
from pfl.metrics import Weighted
from pfl.model.pytorch import PyTorchModel


class Model(Work):
    def metrics(self, images, labels):
        with torch.no_grad():
            return {"loss": Weighted(self.loss(images, labels).item() * len(labels), len(labels))}


class Marked(FederatedAveraging):
    def __init__(self, watch: Stopwatch) -> None:
        super().__init__()
        self.watch = watch

    def get_next_central_contexts(self, *arguments, **options):
        self.watch.begin_round()
        return super().get_next_central_contexts(*arguments, **options)


def main(path: str, out: str) -> None:
    work, watch = Model(path), Stopwatch()
    model = PyTorchModel(
        work,
        local_optimizer_create=lambda parameters, lr: work.optimizer(),
        central_optimizer=torch.optim.SGD(work.trained.values(), lr=1.0),  # the mean of the clients' steps, as it is
    )
    model.do_multiple_epochs_of = watch.timed(model.do_multiple_epochs_of)  # type: ignore[method-assign]
    visits = count()  # a visit is a client in a round: all clients take part, in their order
    data = FederatedDataset(
        lambda visit: PyTorchTensorDataset(work.client(*divmod(visit, work.clients))), lambda: next(visits)
    )
    Marked(watch).run(
        NNAlgorithmParams(
            central_num_iterations=work.rounds,
            evaluation_frequency=work.rounds,  # it evaluates in the first round, which no number but the start has
            train_cohort_size=work.clients,
            val_cohort_size=None,
        ),
        SimulatedBackend(data, data),
        model,
        NNTrainHyperParams(
            local_batch_size=work.batch_size,
            local_num_epochs=1,
            local_learning_rate=work.learning_rate,
            local_max_grad_norm=work.clip_norm,
        ),
    )
    del watch.began[work.rounds :], watch.cpu[work.rounds :]  # it asks once more, to hear that no round is left
    watch.save(out, packed(work.trained))


if __name__ == "__main__":
    main(*sys.argv[1:])
