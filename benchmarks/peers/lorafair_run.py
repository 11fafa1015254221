"""lorafair: `prepare WORK ARGUMENT...` writes the work that a configuration describes, `run OUT ARGUMENT...` does it.

The run is that of the command train.py; the clock is read where a round begins and around the training of a client.
"""

import sys
from pathlib import Path

import torch
from common import Stopwatch

import lorafair.cli
from lorafair import federation
from lorafair.assembly import assemble
from lorafair.config import load_config
from lorafair.data.loading import local_batches
from lorafair.exchange import make_fabric
from lorafair.models import build_model
from lorafair.seeding import seeded


def prepare(out: str, arguments: list[str]) -> None:
    config = load_config(arguments)
    fabric = make_fabric(config.fabric)
    fabric.launch()
    job, _ = assemble(fabric, config)
    adapters, data, size = job.model.adapters, job.data, config.model.image_size
    assert size is not None
    layout, start = adapters.layout, adapters.layout.unpack(adapters.draw(config.seed, 0))

    def visits(round_index: int, client: int) -> torch.Tensor:
        generator = seeded(config.seed, round_index, client)
        return torch.cat([*map(torch.from_numpy, local_batches(job.clients[client].indices, job.local, generator))])

    trained = {f"{path}.A": factors.A for path, factors in start.factors.items()}
    trained |= {f"{path}.B": factors.B for path, factors in start.factors.items()} | start.head
    plain = build_model(config.model, len(data.classes), config.seed)  # before its adapters become views of one tensor
    images = torch.stack([torch.from_numpy(data.train.images.read(i, size)) for i in range(len(data.train))])
    torch.save(
        {
            "images": images.permute(0, 3, 1, 2).contiguous(),
            "labels": job.labels,
            "mean": plain.mean,
            "std": plain.std,
            "order": [[visits(r, client) for client in range(len(job.clients))] for r in range(config.rounds)],
            "model": config.model.name,
            "size": size,
            "classes": len(data.classes),
            "lora": {path: a[0] for path, (a, _) in layout.factors.items()},
            "scaling": plain.backbone.get_submodule(next(iter(layout.factors))).scaling,
            "backbone": {name: tensor.clone() for name, tensor in {**plain.backbone.state_dict(), **trained}.items()},
            "trained": list(trained),
            "batch_size": job.local.batch_size,
            "learning_rate": job.local.learning_rate,
            "weight_decay": job.local.weight_decay,
            "clip_norm": job.local.clip_norm,
        },
        out,
    )


def run(out: str, arguments: list[str]) -> None:
    watch, states = Stopwatch(), []
    begin_round = federation.begin_round

    def marked(job, state):
        watch.begin_round()
        states.append(state)
        return begin_round(job, state)

    federation.begin_round, federation.train_cohort = marked, watch.timed(federation.train_cohort)
    status = lorafair.cli.main([*arguments, f"run_dir={Path(out).with_suffix('.run')}"])
    if status:
        sys.exit(status)
    watch.save(out, states[-1].adapter)


if __name__ == "__main__":
    {"prepare": prepare, "run": run}[sys.argv[1]](sys.argv[2], sys.argv[3:])
