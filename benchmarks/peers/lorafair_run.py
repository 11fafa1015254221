"""lorafair: `prepare WORK ARGUMENT...` writes the work that a configuration describes, `run OUT ARGUMENT...` does it.

The run is that of the command train.py; the clock is read where a round begins and around the training of a client.
"""

import sys
from pathlib import Path

import torch
from common import Stopwatch

from lorafair import cli, federation
from lorafair.client.cohort import LocalTraining
from lorafair.config import load_config
from lorafair.data.loading import local_batches
from lorafair.experiment import build_experiment
from lorafair.launch import in_place
from lorafair.model.backbone import build_model, image_size_of
from lorafair.seeding import seeded


def prepare(out: str, arguments: list[str]) -> None:
    config = load_config(arguments)
    with in_place(config.fabric) as fabric:
        experiment, _ = build_experiment(fabric, config)
    data, clients, local = experiment.data, experiment.clients, experiment.local
    layout, size = experiment.layout, image_size_of(config.model)
    start = layout.unpack(experiment.model.adapters.draw(config.seed, 0))

    def visits(round_index: int, client: int) -> torch.Tensor:
        generator = seeded(config.seed, round_index, client)
        return torch.cat([*map(torch.from_numpy, local_batches(clients[client].indices, local, generator))])

    trained = {f"{path}.A": factors.A for path, factors in start.factors.items()}
    trained |= {f"{path}.B": factors.B for path, factors in start.factors.items()} | start.head
    plain = build_model(config.model, len(data.classes), config.seed)  # before its adapters become views of one tensor
    images = torch.stack([torch.from_numpy(data.train.images.read(i, size)) for i in range(len(data.train))])
    torch.save(
        {
            "images": images.permute(0, 3, 1, 2).contiguous(),
            "labels": experiment.labels,
            "mean": plain.mean,
            "std": plain.std,
            "order": [[visits(r, client) for client in range(len(clients))] for r in range(config.rounds)],
            "model": config.model.name,
            "size": size,
            "classes": len(data.classes),
            "lora": {path: a[0] for path, (a, _) in layout.factors.items()},
            "scaling": plain.backbone.get_submodule(next(iter(layout.factors))).scaling,
            "backbone": {name: tensor.clone() for name, tensor in {**plain.backbone.state_dict(), **trained}.items()},
            "trained": list(trained),
            "batch_size": local.batch_size,
            "learning_rate": local.learning_rate,
            "weight_decay": local.weight_decay,
            "clip_norm": local.clip_norm,
        },
        out,
    )


def run(out: str, arguments: list[str]) -> None:
    watch, states = Stopwatch(), []
    begin_round = federation.begin_round

    def marked(experiment, state, clock):
        watch.begin_round()
        states.append(state)
        return begin_round(experiment, state, clock)

    federation.begin_round, LocalTraining.train = marked, watch.timed(LocalTraining.train)
    status = cli.main([*arguments, f"run_dir={Path(out).with_suffix('.run')}"])
    if status:
        sys.exit(status)
    watch.save(out, states[-1].adapter)


if __name__ == "__main__":
    {"prepare": prepare, "run": run}[sys.argv[1]](sys.argv[2], sys.argv[3:])
