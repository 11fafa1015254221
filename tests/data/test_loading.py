"""The way of images to the model: read by worker processes, resident on the device, augmented there."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from lorafair.checkpointing.checkpoint import list_checkpoints, load_checkpoint
from lorafair.client import training
from lorafair.config.identity import identity_settings
from lorafair.config.schema import Config
from lorafair.data.augmentation import augmented, flip_and_crop
from lorafair.data.files import ImageFiles
from lorafair.data.images import DataError
from lorafair.data.loading import CohortStep, ImageSource, Indices, ResidentSource, cohort_steps
from lorafair.errors import ConfigError
from lorafair.federation import run_federation
from lorafair.seeding import below, hashed, seeded
from tests.conftest import damaged_folder, launched
from tests.torch_private import FakeTensorMode

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


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_images_come_in_the_order_that_is_asked_for(workers: int) -> None:
    source = ImageSource(Pixels(), 4, workers)
    for order in ([np.array([7, 3]), np.arange(5), np.array([99])], [np.array([1])]):
        found = list(source.batches(order))
        assert all(len(batch) == len(asked) for batch, asked in zip(found, order, strict=True))
        assert [batch[:, 2, 3, 3].tolist() for batch in found] == [asked.tolist() for asked in order]


@pytest.mark.slow
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


# Worker processes


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_cannot_be_decoded_is_named_in_one_line(tmp_path: Path, workers: int) -> None:
    entries = sorted(path.relative_to(tmp_path) for path in damaged_folder(tmp_path).rglob("*.png"))
    damaged = [i for i, entry in enumerate(entries) if entry.parts[:2] == ("photo", "cat")]
    files = ImageFiles(tmp_path, np.array([os.fsencode(entry) for entry in entries]))
    source = ImageSource(files, 8, workers)
    with pytest.raises(DataError) as caught:
        list(source.batches([np.setdiff1d(np.arange(len(files)), damaged), np.array(damaged[3:4])]))
    assert str(caught.value).startswith(f"{tmp_path}/photo/cat/3.png cannot be decoded (")
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_workers_end_with_their_source_wherever_the_garbage_collector_begins() -> None:
    """In a reference cycle, as with an error's traceback, it may close the queues before it ends the workers."""
    others = multiprocessing.active_children()
    source = ImageSource(Pixels(), 4, workers=2)
    assert [len(batch) for batch in source.batches([np.arange(3)])] == [3]
    workers = [child for child in multiprocessing.active_children() if child not in others]
    assert len(workers) == 2
    vars(source)["cycle"] = source
    del source
    gc.collect()
    assert not any(worker.is_alive() for worker in workers)


READS_IMAGES = """
import numpy as np
from lorafair.data.images import ImagesInMemory
from lorafair.data.loading import ImageSource

print("the script runs", flush=True)
greys = np.arange(9, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 3), np.uint8)
source = ImageSource(ImagesInMemory(greys), 4, workers=2)
print([batch[:, 0, 0, 0].tolist() for batch in source.batches([np.array([7, 3]), np.array([5])])], flush=True)
"""


@pytest.mark.slow
def test_a_script_without_a_guard_is_not_run_again_by_its_workers(tmp_path: Path) -> None:
    """Processes that are not forked import the user's script, unless that is prevented."""
    ended = run_script(tmp_path, READS_IMAGES)
    assert (ended.stderr, ended.returncode) == ("", 0)
    assert ended.stdout == "the script runs\n[[7, 3], [5]]\n"


READS_ITS_OWN_IMAGES = """
import numpy as np
from lorafair.data.loading import ImageSource

class Greys:
    def __len__(self):
        return 9

    def read_many(self, indices, size):
        return indices.astype(np.uint8)[:, None, None, None] * np.ones((1, size, size, 3), np.uint8)

if __name__ == "__main__":
    source = ImageSource(Greys(), 4, workers=2)
    print([batch[:, 0, 0, 0].tolist() for batch in source.batches([np.array([7, 3]), np.array([5])])])
"""


@pytest.mark.slow
def test_workers_find_a_class_that_the_script_defines(tmp_path: Path) -> None:
    ended = run_script(tmp_path, READS_ITS_OWN_IMAGES)
    assert (ended.stdout, ended.stderr) == ("[[7, 3], [5]]\n", "")


PLUG_IN = """
import lorafair
import numpy as np

class Greys:
    def __len__(self):
        return 9

    def read_many(self, indices, size):
        return indices.astype(np.uint8)[:, None, None, None] * np.ones((1, size, size, 3), np.uint8)

    def digest(self, indices):
        return indices.tobytes()

@lorafair.register_source("greys")
def greys(config, seed):
    labels = np.arange(9) % 2
    held_out = np.arange(9) > 6
    return lorafair.ImageCollection(("grey",), ("even", "odd"), Greys(), labels, 0 * labels, held_out, "shades of grey")
"""

READS_IMAGES_OF_A_PLUG_IN = """
import sys
import numpy as np
from lorafair import registry
from lorafair.config.schema import DataConfig
from lorafair.data.loading import ImageSource
from lorafair.data.sources import load_images

registry.load_plugins([sys.argv[1]])
data = load_images(DataConfig(source="greys"), seed=0)
source = ImageSource(data.train.images, 4, workers=2)
print([batch[:, 0, 0, 0].tolist() for batch in source.batches([np.array([6, 3]), np.array([5])])])
"""


@pytest.mark.slow
def test_workers_find_a_class_that_a_plug_in_file_defines(tmp_path: Path) -> None:
    (tmp_path / "greys.py").write_text(PLUG_IN)
    ended = run_script(tmp_path, READS_IMAGES_OF_A_PLUG_IN, str(tmp_path / "greys.py"))
    assert (ended.stdout, ended.stderr) == ("[[6, 3], [5]]\n", "")


@pytest.mark.slow
def test_workers_refuse_what_they_could_not_read() -> None:
    """A prompt and a notebook have no file to import, and a lambda has no name."""
    prompt = [sys.executable, "-c", READS_ITS_OWN_IMAGES]
    ended = subprocess.run(prompt, capture_output=True, text=True, timeout=100, check=False)
    assert ended.stdout == ""
    assert "data.workers=2 starts processes, which cannot know what a notebook or a prompt has defined" in ended.stderr

    class Local:
        def read_many(self, indices: Indices, size: int) -> np.ndarray[Any, Any]:
            raise NotImplementedError

    with pytest.raises(ConfigError, match=r"data\.workers=1 .* the data set cannot be sent there: .*Local.*workers=0"):
        ImageSource(cast(Any, Local()), 4, workers=1)


def run_script(folder: Path, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    file = folder / "script.py"
    file.write_text(code)
    command = [sys.executable, str(file), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)


READS_UNTIL_TOLD = f"""
{READS_IMAGES}
import signal, sys
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT):
    signal.signal(number, lambda *arguments: None)
print("ready", flush=True)
for line in sys.stdin:
    print(len(list(source.batches([np.array([1])] * int(line)))), flush=True)
"""


@pytest.fixture
def reading() -> Iterator[subprocess.Popen[str]]:
    """A process with two workers, in a group of its own, that reads as many batches as a line of its input says."""
    process = subprocess.Popen(
        [sys.executable, "-c", READS_UNTIL_TOLD],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(3)] == ["the script runs\n", "[[7, 3], [5]]\n", "ready\n"]
    yield process
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


@pytest.mark.slow
def test_workers_heed_no_signal_of_the_scheduler(reading: subprocess.Popen[str]) -> None:
    """It signals every process of a job, as does Ctrl-C at a console; the training process decides."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT):
        os.killpg(reading.pid, number)
    time.sleep(0.5)
    output, _ = reading.communicate("8\n", timeout=60)
    assert (output, reading.returncode) == ("8\n", 0)


@pytest.mark.slow
def test_workers_end_with_their_process_even_if_it_is_killed(reading: subprocess.Popen[str]) -> None:
    reading.kill()
    reading.communicate(timeout=30)  # until no process has an end of its pipe any more, the workers included


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


def test_an_image_is_changed_alike_whatever_clients_train_beside_its_own() -> None:
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


@pytest.mark.slow
def test_a_run_trains_on_augmented_images_and_tests_on_the_images(
    tiny: Callable[..., Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    configs = [tiny(f"data.augmentation={a}", f"run_dir={tmp_path / a}") for a in ("none", "flip", "crop_flip")]
    adapters = [trained(config) for config in configs]
    assert not torch.equal(adapters[0], adapters[1])
    assert not torch.equal(adapters[1], adapters[2])
    assert "are not cached: data.augmentation=flip changes the images in every pass" in capsys.readouterr().out
    assert identity_settings(configs[0]) != identity_settings(configs[1])


def inputs_of_clients(config: Config, monkeypatch: pytest.MonkeyPatch) -> dict[int, torch.Tensor]:
    """What each client of the first round was trained on in its first step."""
    seen: dict[int, torch.Tensor] = {}

    def watch(inputs: Iterator[torch.Tensor], steps: list[CohortStep], clients: list[int], **rest: int) -> object:
        for number, batch in enumerate(augmented(inputs, steps, clients, **rest)):  # type: ignore[arg-type]
            if number == 0:
                rows = batch.view(len(clients), -1, *batch.shape[1:])
                seen.update({c: rows[i, : steps[0].counts[i]] for i, c in enumerate(clients) if c not in seen})
            yield batch

    monkeypatch.setattr(training, "augmented", watch)
    run_federation(launched(1), config)
    return seen


@pytest.mark.slow
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
