"""Part f: images a second that the loader gives, from files, packed, resident or as tokens, beside training's."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Sequence
from typing import Any

from bare_loop import open_experiment
from loading import write_images

from lorafair.config import FabricConfig, load_config
from lorafair.data.loading import on_device
from lorafair.experiment import Experiment
from lorafair.launch import in_place

from .record import Part
from .timing import seconds_of


def run(part: Part) -> None:
    images, side = (24, 48) if part.tiny else (768, 400)
    part.attempt("images", lambda: write_images(part.scratch / "jpeg", images, side))
    workers = "data.workers=0" if part.tiny else "data.workers=8"
    packed, tokens = (
        "data.cache=always",
        ("model.prefix_cache=always", f"model.lora.last_blocks={2 if part.tiny else 4}"),
    )
    # Tokens are those of the same model, of which only the last blocks are adapted.
    ways: dict[str, Sequence[str]] = {
        "decoding files": ("data.cache=never", workers),
        "packed": (packed,),
        "resident": (packed, "data.resident=true"),
        "tokens of the frozen blocks": (packed, *tokens),
        "tokens, resident": (packed, *tokens, "data.resident=true"),
    }
    if part.tiny:
        ways = {name: ways[name] for name in ("decoding files", "packed", "tokens, resident")}
    table = part.table(
        f"Images/s from JPEGs of {side} px, bf16",
        "from",
        "loader, to the device",
        "training with it",
        "loader over training",
    )
    for name, options in ways.items():
        part.attempt(name, lambda name=name, options=options: way(part, table, name, options))


def way(part: Part, table: Any, name: str, options: Sequence[str]) -> None:
    """One line: all training images once through the loader alone, and a round of training with it."""
    repeats = 2 if part.tiny else 3
    size = ("model.name=test_vit", "model.image_size=32") if part.tiny else ("model.image_size=224",)
    config = load_config([
        "data.source=folder", f"data.root={part.scratch / 'jpeg'}", "data.test_fraction=0.1", "partition.scheme=iid",
        "partition.clients=2", "model.prefix_cache=never", "model.weights=random", "model.lora.rank=4",
        "client.batch_size=" + ("8" if part.tiny else "128"), f"fabric.accelerator={part.accelerator}",
        f"run_dir={part.scratch / name.replace(' ', '-')}", *size, *options,
    ])  # fmt: skip
    with in_place(FabricConfig(accelerator=config.fabric.accelerator, precision="bf16-mixed")) as fabric:
        with contextlib.redirect_stdout(io.StringIO()):
            experiment, _, train = open_experiment(fabric, config)
        count = sum(len(client.indices) for client in experiment.clients)
        load = loader(experiment, config.client.batch_size)
        load()  # starts worker processes
        loaded = [count / seconds_of(part.device, load) for _ in range(repeats)]
        train()
        trained = [count / seconds_of(part.device, train) for _ in range(repeats)]
    table.row(name, loaded, trained, [a / b for a, b in zip(loaded, trained, strict=True)])


def loader(experiment: Experiment, batch: int) -> Callable[[], None]:
    """All clients' images once, to the device as training gets them."""
    parts = [c.indices[i : i + batch] for c in experiment.clients for i in range(0, len(c.indices), batch)]

    def load() -> None:
        for _ in on_device(experiment.inputs.train.batches(parts), experiment.fabric.device):
            pass

    return load
