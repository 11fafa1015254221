"""What TensorBoard shows of a run before its first round: a card, its line in the table of runs, charts, pictures.

Letters: N clients, Q classes.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lorafair.config.schema import Config
from lorafair.console import format_count, format_value
from lorafair.data.images import DataError, ImageData
from lorafair.data.partition import Client
from lorafair.experiment import Experiment
from lorafair.reporting.board import Board
from lorafair.reporting.metrics import CLIENT_CURVES
from lorafair.reporting.pictures import Pixels, heat_map, mosaic
from lorafair.reporting.results import versions
from lorafair.reporting.run_dir import CONFIG_FILE
from lorafair.reporting.tags import CARD, COLUMNS, LABEL_COUNTS, SAMPLES

DOCUMENTATION = "https://lorafair.readthedocs.io/en/latest/"
_TILE = 40  # pixels of a sample image
_TILES = 120  # samples of all clients together: a few tenths of a second to decode
_ROWS = 300  # clients of a picture
_LISTED = 12  # clients of the card


def introduce(experiment: Experiment, board: Board) -> None:
    """Write what is known before the first round."""
    config, clients = experiment.config, experiment.clients
    names = [client.name for client in clients] if len(clients) <= CLIENT_CURVES else []
    board.expect(layers=experiment.layout.factors, clients=names)
    board.charts(len(clients))
    folder = config.folder.resolve()
    board.table_of_runs(columns_of(config, len(clients)), f"{folder.name} in {folder.parent}")
    board.text(CARD, card(experiment))
    board.picture(LABEL_COUNTS, label_counts(experiment.data, clients), 0)
    if config.tensorboard.samples:
        board.picture(SAMPLES, samples(experiment.data, clients, config.tensorboard.samples), 0, is_drawing=False)


def columns_of(config: Config, clients: int) -> dict[str, str | float]:
    """What tells a run apart: the columns of COLUMNS."""
    wanted = config.federation.clients_per_round
    others = {key: value for key, value in config.method.items() if key != "name"}
    values: dict[str, str | float] = {
        "method": str(config.method["name"]),
        "options": ", ".join(f"{key}={format_value(value)}" for key, value in others.items()) or "none",
        "setting": config.folder.resolve().parent.name,
        "seed": str(config.seed),  # as a number it would be shown as 0.0000
        "rounds": config.rounds,
        "learning rate": config.client.learning_rate,
        "LoRA rank": config.model.lora.rank,
        "clients": clients,
        "clients a round": clients if wanted is None else wanted,
        "data": config.data.source,
        "model": config.model.name,
    }
    return {column.name: values[column.name] for column in COLUMNS}


def card(experiment: Experiment) -> str:
    """A run in Markdown: command, what it trains, clients, versions, all settings."""
    config, clients = experiment.config, experiment.clients
    rows = columns_of(config, len(clients)) | {"local training": _local_training(config)}
    images = [len(client.indices) for client in clients]
    listed = [f"{client.name}: {count:,}" for client, count in zip(clients, images, strict=True)][:_LISTED]
    more = [f"and {len(clients) - _LISTED:,} more"] if len(clients) > _LISTED else []
    parts = [
        f"# {rows['method']} on {rows['data']}",
        f"Started by `{command()}`. The same run again: `lorafair run {config.folder / CONFIG_FILE}`.",
        _table(rows),
        "## Clients",
        f"{format_count(len(clients), 'client')} with {min(images):,} to {max(images):,} training images each. "
        f"{experiment.data.description}.",
        ", ".join([*listed, *more]),
        "## Versions",
        ", ".join(f"{name} {version}" for name, version in versions().items()),
        f"Documentation: [{DOCUMENTATION}]({DOCUMENTATION})",
        "## All settings",
        f"```\n{(config.folder / CONFIG_FILE).read_text(encoding='utf-8')}\n```",
    ]
    return "\n\n".join(parts)


def command() -> str:
    """What has started this process, without the folders of programs."""
    program, *arguments = sys.argv
    name = Path(program).name
    if name == "__main__.py":
        return shlex.join(["python", "-m", Path(program).parent.name, *arguments])
    return shlex.join([*(["python"] if name.endswith(".py") else []), name, *arguments])


def label_counts(data: ImageData, clients: tuple[Client, ...]) -> Pixels:
    """Training images by client and class; of many clients some that are spread evenly."""
    shown = [clients[index] for index in _spread(len(clients), _ROWS)]
    labels = data.train.labels
    counts = np.stack([np.bincount(labels[client.indices], minlength=len(data.classes)) for client in shown])
    title = f"Training images of each client and class{_some_of(len(shown), len(clients))}"
    return heat_map(
        counts, [client.name for client in shown], data.classes, title, ("Client", "Class"), limits=(0.0, None)
    )


def samples(data: ImageData, clients: tuple[Client, ...], each: int) -> Pixels:
    """Some training images of each client, spread evenly over its classes; of many clients some."""
    shown = [clients[index] for index in _spread(len(clients), _TILES)]
    each = max(1, min(each, _TILES // max(len(shown), 1)))
    groups = [(client.name, list(_tiles(data, client, each))) for client in shown]
    return mosaic(groups, f"Training images of each client{_some_of(len(shown), len(clients))}")


def _tiles(data: ImageData, client: Client, each: int) -> Iterator[Pixels | None]:
    """Images of a client by class; None where one cannot be read: training says so, if it is used."""
    by_class = client.indices[np.argsort(data.train.labels[client.indices], kind="stable")]
    for place in _spread(len(by_class), each):
        try:
            yield data.train.images.read(int(by_class[place]), _TILE)
        except DataError:
            yield None


def _spread(count: int, most: int) -> list[int]:
    """At most so many of `count` places, at equal distances."""
    return np.linspace(0, count - 1, min(count, most)).round().astype(int).tolist() if count else []


def _some_of(shown: int, there: int) -> str:
    return f" ({shown:,} of {there:,} clients)" if shown < there else ""


def _local_training(config: Config) -> str:
    client = config.client
    work = f"{client.steps} steps" if client.steps is not None else format_count(client.epochs or 1, "epoch")
    return f"{work} of {client.optimizer}, batches of {client.batch_size}"


def _table(rows: Mapping[str, Any]) -> str:
    lines = [f"| {name} | {str(value).replace('|', '/')} |" for name, value in rows.items()]
    return "\n".join(["| | value |", "|---|---|", *lines])
