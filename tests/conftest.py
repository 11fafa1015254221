"""Fixtures: a run that takes a second, and ranks that start in a fraction of one."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Before torch is imported: several processes share few cores here, and a fixed number of threads fixes the last bits.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import pytest
from PIL import Image

from lorafair import console, registry, third_party
from lorafair.config.loading import load_config
from lorafair.config.schema import Config
from lorafair.launch import make_fabric
from lorafair.seeding import seeded_numpy
from tests.slurm_cluster import slurm  # noqa: F401

third_party.make_torchvision_importable()  # tests may import torchmetrics or timm before lorafair does

if TYPE_CHECKING:
    from lightning_fabric import Fabric

SECONDS_FOR_RANKS = 120

TINY = (
    "data.source=synthetic",
    "model.name=test_vit",
    "model.weights=random",
    "model.image_size=32",
    "model.lora.rank=4",
    "model.lora.last_blocks=2",
    "client.optimizer=adamw",
    "client.learning_rate=0.005",
    "checkpoint.every=1",
    "client.batch_size=16",
    "fabric.accelerator=cpu",
    "rounds=2",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with many slow tests first: then processes side by side, a file each, end at about the same time."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


@pytest.fixture(scope="module", autouse=True)
def clean_registries() -> Iterator[None]:
    """Take back what a file of tests has registered: others may run in this process."""
    before = {kind: set(names.names) for kind, names in registry.REGISTRIES.items()}
    yield
    for kind, names in registry.REGISTRIES.items():
        for name in set(names.names) - before[kind]:
            names.remove(name)
    for module in [name for name in sys.modules if name.startswith("lorafair_plugin_")]:
        del sys.modules[module]


@pytest.fixture(autouse=True)
def cache(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Keep the tests' cached tokens out of the user's cache; tests that download share the real one."""
    if "network" not in request.keywords:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(autouse=True)
def printed() -> Iterator[None]:
    """Print the lines of a run, as the command does."""
    with console.printing():
        yield


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., Config]:
    """A federation of three clients on made-up images with a small ViT; arguments are key=value overrides."""

    def build(*overrides: str) -> Config:
        return load_config([*TINY, f"run_dir={tmp_path / 'run'}", *overrides])

    return build


def run_ranks(
    world_size: int, function: Callable[..., Any], *arguments: Any, seconds: float = SECONDS_FOR_RANKS
) -> list[Any]:
    """Call function(fabric, *arguments) on every rank of a gloo world and return what each returns.

    The ranks are forked from a server process that has everything imported, which makes them start in 0.2 s. Results
    must be picklable; a rank that raises fails the test with its traceback.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.conftest", "lorafair.comparison.run"])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    results = context.Queue()
    ranks = [
        context.Process(target=_rank, args=(rank, world_size, port, results, function, arguments))
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    try:
        outcomes = dict(results.get(timeout=seconds) for _ in ranks)
        for process in ranks:
            process.join(timeout=SECONDS_FOR_RANKS)
    finally:
        for process in ranks:
            process.kill()
    failures = [f"rank {rank}:\n{text}" for rank, (ok, text) in sorted(outcomes.items()) if not ok]
    assert not failures, "\n".join(failures)
    return [outcomes[rank][1] for rank in range(world_size)]


def _rank(
    rank: int, world_size: int, port: int, results: Any, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    os.environ |= {
        "LOCAL_RANK": str(rank),
        "NODE_RANK": "0",
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    try:
        with console.printing():
            console.set_rank(rank)
            results.put((rank, (True, function(launched(world_size), *arguments))))
    except BaseException:
        results.put((rank, (False, traceback.format_exc())))
        raise


def launched(world_size: int) -> Fabric:
    """A launched Fabric of this process; with world_size > 1 only inside run_ranks."""
    fabric = make_fabric(load_config(["fabric.accelerator=cpu", f"fabric.devices={world_size}"]).fabric)
    fabric.launch()
    return fabric


def damaged_folder(root: Path) -> Path:
    """Pictures whose beginnings and ends are right, one of them with a damaged middle, found by decoding only."""
    pixels = seeded_numpy(0, "noise").integers(0, 256, (40, 40, 3), dtype=np.uint8)
    for domain in ("photo", "sketch"):
        for name in ("cat", "dog"):
            (root / domain / name).mkdir(parents=True)
            for number in range(10):
                Image.fromarray(pixels).save(root / domain / name / f"{number}.png")
    for number in range(10):  # in the training and in the test images of one domain
        path = root / "photo" / "cat" / f"{number}.png"
        content = bytearray(path.read_bytes())
        content[1000:1200] = bytes(200)
        path.write_bytes(content)
    return root
