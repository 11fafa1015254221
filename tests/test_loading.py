"""The way of images to the model: resident on the device, augmented there."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.synchronize import Semaphore
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import lorafair.federation as federation_module
from lorafair.checkpoint import list_checkpoints, load_checkpoint
from lorafair.config import Config, ConfigError, numeric_settings
from lorafair.data import loading
from lorafair.data.augmentation import augmented, flip_and_crop
from lorafair.data.images import DataError
from lorafair.data.loading import CohortStep, ImageSource, Indices, ResidentSource, cohort_steps
from lorafair.federation import run_federation
from lorafair.seeding import below, hashed, seeded
from tests.conftest import launched

IMAGES = torch.randint(0, 256, (150, 3, 16, 16), dtype=torch.uint8, generator=seeded(0, "images"))


class Source:
    def __init__(self, inputs: torch.Tensor = IMAGES) -> None:
        self.inputs = inputs
        self.read = 0

    def batches(self, indices: Sequence[Indices]) -> Iterator[torch.Tensor]:
        for batch in indices:
            self.read += len(batch)
            yield self.inputs[batch]


def trained(config: Config) -> torch.Tensor:
    run_federation(launched(1), config)
    return load_checkpoint(list_checkpoints(config.folder)[-1]).tensors["adapter"]


@pytest.mark.parametrize("inputs", [IMAGES, IMAGES.float()], ids=["images", "tokens"])
def test_resident_inputs_are_read_once_and_are_the_same(inputs: torch.Tensor) -> None:
    source = Source(inputs)
    resident = ResidentSource(source, len(inputs), torch.device("cpu"))
    order = [np.array([149, 3, 3]), np.arange(100), np.array([64])]
    for _ in range(2):
        for batch, found in zip(order, resident.batches(order), strict=True):
            assert found.dtype == inputs.dtype
            assert torch.equal(found, inputs[batch])
    assert source.read == len(inputs)


class Pixels:
    """Images whose pixels are their number."""

    def __len__(self) -> int:
        return 100

    def read_many(self, indices: Indices, size: int) -> np.ndarray:
        return np.tile(indices.astype(np.uint8)[:, None, None, None], (1, size, size, 3))


@pytest.mark.parametrize("workers", [0, 2])
def test_images_come_in_the_order_that_is_asked_for(workers: int) -> None:
    source = ImageSource(Pixels(), 4, workers)
    for order in ([np.array([7, 3]), np.arange(5), np.array([99])], [np.array([1])]):
        found = list(source.batches(order))
        assert all(len(batch) == len(asked) for batch, asked in zip(found, order, strict=True))
        assert [batch[:, 2, 3, 3].tolist() for batch in found] == [asked.tolist() for asked in order]


@pytest.mark.parametrize("healthy_start", [2, 4], ids=["then starts", "never starts"])
def test_workers_that_do_not_start_are_started_again(
    healthy_start: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As a process forked while another thread holds a lock: it waits for ever, and heeds no SIGTERM."""
    begin = loading._begin_worker

    def stuck(started: Semaphore, worker: int) -> None:
        starts = tmp_path / str(worker)
        starts.write_text(f"{starts.read_text() if starts.exists() else ''}{os.getpid()} ")
        if worker == 1 and len(starts.read_text().split()) < healthy_start:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(600)
        begin(started, worker)

    monkeypatch.setattr(loading, "_begin_worker", stuck)
    monkeypatch.setattr(loading, "_START_SECONDS", 0.5)
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.1)  # for which a worker's end is awaited
    source = ImageSource(Pixels(), 4, workers=2)
    if healthy_start > loading._STARTS:
        with pytest.raises(DataError, match=r"worker processes did not start in 3 x 0\.5 s; set data.workers=0"):
            list(source.batches([np.arange(3)]))
    else:
        assert [len(batch) for batch in source.batches([np.arange(3), np.arange(2)])] == [3, 2]
    *ended, _ = (tmp_path / "1").read_text().split()
    for process in ended:
        with pytest.raises(ProcessLookupError):
            os.kill(int(process), 0)


@pytest.mark.parametrize("cache", ["never", "always"], ids=["images", "tokens"])
def test_training_is_the_same_with_resident_inputs(tiny: Callable[..., Config], cache: str, tmp_path: Path) -> None:
    adapters = [
        trained(tiny(f"data.resident={resident}", f"model.prefix_cache={cache}", f"run_dir={tmp_path / resident}"))
        for resident in ("true", "false")
    ]
    assert torch.equal(*adapters)


def test_inputs_that_do_not_fit_on_the_device_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100_000, 10**9))
    with pytest.raises(ConfigError, match=r"data\.resident=true: the training images need 0\.0 GB, and cuda:0 has"):
        ResidentSource(Source(), len(IMAGES), torch.device("cuda:0"))


# Augmentation


def test_the_hash_is_splitmix64() -> None:
    """The first outputs from the state 1234567, as published with the algorithm's reference code."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert [int(z) % 2**64 for z in hashed(1234567, torch.arange(4))] == published
    assert below(hashed(5, torch.arange(60_000)), 3).bincount().tolist() == pytest.approx([20_000] * 3, rel=0.03)


def step_of(*clients: list[int]) -> list[CohortStep]:
    return cohort_steps([[np.array(images)] for images in clients])


def augment(steps: list[CohortStep], clients: list[int], round_index: int = 0, crop: bool = True) -> list[torch.Tensor]:
    inputs = (IMAGES[step.indices.reshape(-1)] for step in steps)
    return list(augmented(inputs, steps, clients, seed=0, round_index=round_index, crop=crop))


def test_an_image_is_changed_alike_whoever_trains_beside_the_client() -> None:
    [alone] = augment(step_of([5, 7]), [2])
    [together] = augment(step_of([1, 9, 4], [5, 7], [3]), [8, 2, 0])
    assert torch.equal(together.view(3, 3, *alone.shape[1:])[1, :2], alone)


def test_it_is_changed_otherwise_in_another_round_client_step_and_image() -> None:
    many = list(range(150))
    steps = cohort_steps([[np.array(many), np.array(many)]])
    first, second = augment(steps, [2])
    others = [second, augment(steps, [2], round_index=1)[0], augment(steps, [3])[0]]
    for other in others:
        same = (other == first).flatten(1).all(1).float().mean()
        assert same < 0.1  # 2 flips, 5 x 5 places


@pytest.mark.parametrize("crop", [False, True])
def test_images_are_flipped_and_cut_out_of_their_reflection(crop: bool) -> None:
    """Against padding, slicing and flipping every image by itself; every outcome occurs."""
    keys = hashed(3, torch.arange(150))
    found = flip_and_crop(IMAGES, keys, crop=crop)
    padded = torch.nn.functional.pad(IMAGES.float(), (2, 2, 2, 2), mode="reflect").to(torch.uint8)
    padded = padded if crop else IMAGES
    places = range(5) if crop else range(1)
    seen = set()
    for image, source in zip(found, padded, strict=True):
        outcomes = {
            (flipped, y, x): candidate
            for flipped, whole in ((False, source), (True, source.flip(2)))
            for y in places
            for x in places
            for candidate in (whole[:, y : y + 16, x : x + 16],)
        }
        [outcome] = [name for name, candidate in outcomes.items() if torch.equal(candidate, image)]
        seen.add(outcome)
    assert len(seen) > 40 if crop else len(seen) == 2


def test_the_pixels_stay_on_a_gpu() -> None:
    with FakeTensorMode():
        images = torch.empty(6, 3, 16, 16, dtype=torch.uint8, device="cuda")
        found = flip_and_crop(images, torch.empty(6, dtype=torch.int64, device="cuda"), crop=True)
    assert (found.device.type, found.dtype, found.shape) == ("cuda", torch.uint8, images.shape)


def test_a_run_trains_on_augmented_images_and_tests_on_the_images(
    tiny: Callable[..., Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    configs = [tiny(f"data.augmentation={a}", f"run_dir={tmp_path / a}") for a in ("none", "flip", "crop_flip")]
    adapters = [trained(config) for config in configs]
    assert not torch.equal(adapters[0], adapters[1])
    assert not torch.equal(adapters[1], adapters[2])
    assert "are not cached: data.augmentation=flip changes the images in every pass" in capsys.readouterr().out
    assert numeric_settings(configs[0]) != numeric_settings(configs[1])


def inputs_of_clients(config: Config, monkeypatch: pytest.MonkeyPatch) -> dict[int, torch.Tensor]:
    """What each client of the first round was trained on in its first step."""
    seen: dict[int, torch.Tensor] = {}

    def watch(inputs: Iterator[torch.Tensor], steps: list[CohortStep], clients: list[int], **rest: int) -> object:
        for number, batch in enumerate(augmented(inputs, steps, clients, **rest)):  # type: ignore[arg-type]
            if number == 0:
                rows = batch.view(len(clients), -1, *batch.shape[1:])
                seen.update({c: rows[i, : steps[0].counts[i]] for i, c in enumerate(clients) if c not in seen})
            yield batch

    monkeypatch.setattr(federation_module, "augmented", watch)
    run_federation(launched(1), config)
    return seen


def test_the_round_gives_clients_the_same_images_in_cohorts_of_1_and_of_3(
    tiny: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for cohort in (1, 3):
        options = ("data.augmentation=crop_flip", f"client.cohort={cohort}", f"run_dir={tmp_path / str(cohort)}")
        with monkeypatch.context() as patch:
            found.append(inputs_of_clients(tiny(*options, "rounds=1"), patch))
    assert found[0].keys() == found[1].keys() == {0, 1, 2}
    assert all(torch.equal(found[0][client], found[1][client]) for client in found[0])
