"""From index lists to batches: one loader a rank walks through all its clients' batches.

Letters: C clients in the cohort, N images of the largest batch, S side of the image.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import resource_tracker
from typing import Any, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lorafair import registry, third_party
from lorafair.cluster.watchdog import heartbeat
from lorafair.config.schema import ClientConfig
from lorafair.data.images import DataError, ImageReader
from lorafair.errors import ConfigError, one_line
from lorafair.seeding import system_uniform

Indices = NDArray[np.int64]
_PART = 64  # inputs sent to the device at a time
_SCHEDULER_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
_MEMORY_FRACTION = 0.8  # of the device's free memory that resident inputs may take


@dataclass(frozen=True)
class CohortStep:
    """One training step of the C clients that still have batches, padded to the largest batch."""

    indices: Indices  # (C, N) into the training images; padding repeats a client's first image
    counts: tuple[int, ...]  # (C,) images that are not padding; 0 for an empty random sample


class BatchSource(Protocol):
    """What the model is fed with: images, or the cached tokens of the frozen prefix."""

    def batches(self, indices: Sequence[Indices]) -> Iterator[Tensor]:
        """One tensor (len(i), ...) for each index array i, in order."""
        ...


def local_batches(images: Indices, config: ClientConfig, generator: torch.Generator) -> list[Indices]:
    """A client's batches of one round: shuffled anew each epoch, the last batch of an epoch may be smaller.

    With `steps`, exactly that many batches, over as many epochs as that takes.
    """
    wanted = number_of_batches(len(images), config)
    batches: list[Indices] = []
    while len(batches) < wanted:
        order = images[torch.randperm(len(images), generator=generator).numpy()]
        batches += [order[i : i + config.batch_size] for i in range(0, len(order), config.batch_size)]
    return batches[:wanted]


def poisson_batches(images: Indices, config: ClientConfig, generator: torch.Generator | None) -> list[Indices]:
    """A client's random samples of one round, as many as it has batches otherwise: each image is in each of them with
    probability batch_size / images, independently, so a sample may be empty.

    From the generator, or without one from the operating system's.
    """
    probability = sampling_probability(len(images), config)

    def drawn() -> NDArray[np.float64]:
        if generator is None:
            return system_uniform(len(images))
        return torch.rand(len(images), generator=generator, dtype=torch.float64).numpy()

    return [images[drawn() < probability] for _ in range(number_of_batches(len(images), config))]


def sampling_probability(images: int, config: ClientConfig) -> float:
    """With which an image of a client with so many is in a random sample."""
    return min(1.0, config.batch_size / images)


def number_of_batches(images: int, config: ClientConfig) -> int:
    """How many batches a client with so many images trains in a round."""
    return config.steps if config.steps is not None else (config.epochs or 1) * -(-images // config.batch_size)


def cohort_steps(batches: Sequence[Sequence[Indices]]) -> list[CohortStep]:
    """Interleave the batches of a cohort's clients, which must be ordered by falling number of batches.

    The clients that still have a batch at step t are then the first ones, and a step holds just those.
    """
    lengths = [len(of_client) for of_client in batches]
    if lengths != sorted(lengths, reverse=True):
        raise ValueError("order the clients of a cohort by falling number of batches")
    steps = []
    for t in range(lengths[0]):
        active = [of_client[t] for of_client in batches if t < len(of_client)]
        width = max(1, *(len(batch) for batch in active))
        indices = np.empty((len(active), width), np.int64)
        for row, batch, of_client in zip(indices, active, batches, strict=False):
            row[: len(batch)] = batch
            row[len(batch) :] = batch[0] if len(batch) else next((b[0] for b in of_client if len(b)), 0)
        steps.append(CohortStep(indices=indices, counts=tuple(len(batch) for batch in active)))
    return steps


def index_on(indices: Indices, device: torch.device) -> Tensor:
    """An index for tensors of a device. Memory that is not pinned has been read when `to` returns, without waiting."""
    return torch.from_numpy(indices).to(device, non_blocking=True)


def on_device(batches: Iterator[Tensor], device: torch.device) -> Iterator[Tensor]:
    """The batches on a device. A GPU gets each one while it works on the one before, where they come pinned."""
    if device.type != "cuda":
        yield from (batch.to(device) for batch in batches)
        return
    copying, before = torch.cuda.Stream(device), None
    for batch in batches:
        if batch.device == device:  # resident
            yield batch
            continue
        with torch.cuda.stream(copying):
            sent = batch.to(device, non_blocking=True)
            arrived = copying.record_event()
        if before is not None:
            yield _arrived(*before)
        before = sent, arrived
    if before is not None:
        yield _arrived(*before)


def _arrived(batch: Tensor, event: torch.cuda.Event) -> Tensor:
    """A batch from another stream, for work on the current one."""
    current = torch.cuda.current_stream(batch.device)
    current.wait_event(event)
    batch.record_stream(current)  # its memory belongs to the other stream, which would use it again too early
    return batch


class ImageSource:
    """Decoded images (B, 3, S, S) uint8 of one split; with workers through one DataLoader for the whole run."""

    def __init__(self, images: ImageReader, size: int, workers: int, pin_memory: bool = False) -> None:
        self._images, self._pin_memory = _Images(images, size), pin_memory
        self._workers = _Workers(self._images, workers, pin_memory) if workers else None

    def batches(self, indices: Sequence[Indices]) -> Iterator[Tensor]:
        """One tensor (len(i), 3, S, S) uint8 for each index array i, in order; DataError names an unreadable image."""
        if self._workers is not None:
            return self._workers.batches(indices)
        read = (self._images.__getitems__(batch) for batch in indices)
        return (batch.pin_memory() for batch in read) if self._pin_memory else read


class _Workers:
    """The processes that read images, and the DataLoader they belong to.

    They are forked from a server process without threads (multiprocessing's forkserver): forked from this one, they
    could inherit a lock that another thread holds, and wait for ever.
    """

    def __init__(self, images: _Images, count: int, pin_memory: bool) -> None:
        self._order = _Order()
        try:
            content = pickle.dumps(images)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise ConfigError(
                f"data.workers={count} starts processes, and the data set cannot be sent there: {one_line(error)}; use "
                "functions and classes of a file instead of lambdas and local ones, or set data.workers=0"
            ) from error
        self._needs_main = b"__main__" in content  # the user's script defines how images are read
        if self._needs_main and getattr(sys.modules["__main__"], "__file__", None) is None:
            raise ConfigError(
                f"data.workers={count} starts processes, which cannot know what a notebook or a prompt has defined; "
                "put the data source into a file and name that in `plugins`, or set data.workers=0"
            )
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        self._loader: DataLoader[Tensor] = DataLoader(
            images,
            batch_sampler=cast(Any, self._order),  # of arrays, not lists
            num_workers=count,
            persistent_workers=True,
            multiprocessing_context=context,
            pin_memory=pin_memory,
            collate_fn=_no_collate,
            worker_init_fn=_begin_worker,
            generator=torch.Generator(),  # else every pass over the loader would draw from the global generator
        )
        # The workers act on no SIGTERM, by which they are ended otherwise: at exit by multiprocessing, which then waits
        # for them, and by the loader where the garbage collector finds it, which may close its queues first.
        atexit.register(weakref.finalize(self, third_party.end_loader_workers, self._loader))

    def batches(self, indices: Sequence[Indices]) -> Iterator[Tensor]:
        """As `ImageSource.batches`."""
        self._order.batches = indices
        try:
            with _starting_workers(self._needs_main):
                batches = iter(self._loader)  # the first pass starts the server and the workers
            yield from batches
        except DataError as error:  # from a worker process it comes with a traceback in its text
            raise DataError(str(error).strip().splitlines()[-1].removeprefix(f"{_name(DataError)}: ")) from error


@contextmanager
def _starting_workers(needs_main: bool) -> Iterator[None]:
    """Start processes in this block that neither get the scheduler's signals nor run the user's script again.

    Signals go to every process of a job: a process inherits what is blocked, and this one gets what comes meanwhile
    afterwards. The script is `__main__`: multiprocessing imports it in every process that it starts, unless it has no
    file, and without `if __name__ == "__main__"` it would begin another run there.
    """
    main = sys.modules["__main__"]
    found = () if needs_main else ("__file__", "__spec__")
    hidden = {name: getattr(main, name) for name in found if hasattr(main, name)}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SCHEDULER_SIGNALS)
    resource_tracker.ensure_running()  # comes before the server, and when it is started it unblocks SIGTERM
    signal.pthread_sigmask(signal.SIG_BLOCK, _SCHEDULER_SIGNALS)
    for name in hidden:
        setattr(main, name, None)
    try:
        yield
    finally:
        for name, value in hidden.items():
            setattr(main, name, value)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class ResidentSource:
    """The inputs of a split, all on one device: a batch is an index there, and nothing is read or sent for it."""

    def __init__(self, source: BatchSource, count: int, device: torch.device) -> None:
        """Read `count` inputs from `source`, images or tokens. ConfigError where they do not fit on the device."""
        parts = [np.arange(i, min(i + _PART, count)) for i in range(0, count, _PART)]
        self._inputs = torch.empty(0)
        for part, values in zip(parts, source.batches(parts), strict=True):
            if not len(self._inputs):
                _check_room(values[0].numel() * values.element_size() * count, device)
                self._inputs = torch.empty(count, *values.shape[1:], dtype=values.dtype, device=device)
            self._inputs[part[0] : part[-1] + 1] = values.to(device)
            heartbeat()

    def batches(self, indices: Sequence[Indices]) -> Iterator[Tensor]:
        """One tensor (len(i), ...) on the device for each index array i, in order."""
        device = self._inputs.device
        return (self._inputs.index_select(0, index_on(batch, device)) for batch in indices)


def _check_room(size: int, device: torch.device) -> None:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        if size > _MEMORY_FRACTION * free:
            raise ConfigError(
                f"data.resident=true: the training images need {size / 1e9:.1f} GB, and {device} has {free / 1e9:.1f} "
                "GB free, also for training; set data.resident=false, or a smaller model.image_size or "
                "data.train_images"
            )


class _Order:
    """The batch sampler of the loader: the index arrays of the pass that comes next."""

    def __init__(self) -> None:
        self.batches: Sequence[Indices] = []

    def __iter__(self) -> Iterator[Indices]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class _Images(Dataset[Tensor]):
    def __init__(self, images: ImageReader, size: int) -> None:
        self._images = images
        self._size = size

    def __reduce__(self) -> tuple[Any, ...]:
        """To a worker process, which has to import the plug-ins that have defined what it gets."""
        content = pickle.dumps((self._images, self._size))
        plugins = [file for file in registry.loaded_files() if registry.module_name(file).encode() in content]
        return _unpickled, (plugins, content)

    def __len__(self) -> int:
        return len(self._images)

    def __getitems__(self, indices: Indices) -> Tensor:
        pixels = self._images.read_many(indices, self._size)  # (B, S, S, 3)
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))  # twice as fast as PyTorch's copy


def _unpickled(plugins: Sequence[str], content: bytes) -> _Images:
    registry.load_plugins(plugins)
    return _Images(*pickle.loads(content))


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _no_collate(batch: Any) -> Tensor:
    return cast(Tensor, batch)


def _begin_worker(_worker: int) -> None:
    """A worker that hangs in a file system would outlive the training process, and keep its console open."""
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes; the training process acts on it
    signal.pthread_sigmask(signal.SIG_BLOCK, _SCHEDULER_SIGNALS)  # the server may have been started by others before
    torch.set_num_threads(1)


def _exit_with_parent() -> None:
    """A worker's parent is the server process, which in turn stays as long as there are workers."""
    training = multiprocessing.parent_process()
    assert training is not None
    training.join()
    os._exit(1)
