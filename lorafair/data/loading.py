"""From index lists to batches: one loader a rank walks through all its clients' batches.

Letters: C clients in the cohort, N images of the largest batch, S side of the image.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lorafair.config import ClientConfig, ConfigError
from lorafair.data.images import DataError, ImageReader

Indices = NDArray[np.int64]
_PART = 64  # inputs sent to the device at a time
_SETTLE_SECONDS = 0.1
_MEMORY_SHARE = 0.8  # of the device's free memory that resident inputs may take


@dataclass(frozen=True)
class CohortStep:
    """One training step of the C clients that still have batches, padded to the largest batch."""

    indices: Indices  # (C, N) into the training images; padding repeats a client's first image
    counts: tuple[int, ...]  # (C,) images that are not padding


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
        width = max(len(batch) for batch in active)
        padded = [np.pad(batch, (0, width - len(batch)), constant_values=batch[0]) for batch in active]
        steps.append(CohortStep(indices=np.stack(padded), counts=tuple(len(batch) for batch in active)))
    return steps


class ImageSource:
    """Decoded images (B, 3, S, S) uint8 of one split, through one DataLoader for the whole run."""

    def __init__(self, images: ImageReader, size: int, workers: int, pin_memory: bool = False) -> None:
        self._order = _Order()
        self._loader: DataLoader[Tensor] = DataLoader(
            _Images(images, size),
            batch_sampler=self._order,
            num_workers=workers,
            persistent_workers=workers > 0,
            # Forked workers start at once and share what is loaded; they never touch a GPU or a collective.
            multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
            pin_memory=pin_memory,
            collate_fn=_as_is,
            worker_init_fn=_begin_worker,
            generator=torch.Generator(),  # else every pass over the loader would draw from the global generator
        )
        if workers:
            # Before multiprocessing ends its children at exit, by a SIGTERM that they ignore, and waits for them.
            atexit.register(_end_workers, weakref.ref(self._loader))

    def batches(self, indices: Sequence[Indices]) -> Iterator[Tensor]:
        """One tensor (len(i), 3, S, S) uint8 for each index array i, in order; DataError names an unreadable image."""
        self._order.batches = indices
        loader: Any = self._loader
        if loader.num_workers and loader._iterator is None:
            # Workers are forked now. In CPython 3.11 a fork while another thread, of a pool that is done, say, takes
            # its state down leaves a child that waits for ever: let such threads end.
            time.sleep(_SETTLE_SECONDS)
        try:
            yield from self._loader
        except DataError as error:  # from a worker process it comes with a traceback in its text
            raise DataError(str(error).strip().splitlines()[-1].removeprefix(f"{_name(DataError)}: ")) from error


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

    def batches(self, indices: Sequence[Indices]) -> Iterator[Tensor]:
        """One tensor (len(i), ...) on the device for each index array i, in order."""
        device = self._inputs.device
        places = (torch.from_numpy(batch).to(device, non_blocking=True) for batch in indices)
        return (self._inputs.index_select(0, of_batch) for of_batch in places)


def _check_room(size: int, device: torch.device) -> None:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        if size > _MEMORY_SHARE * free:
            raise ConfigError(
                f"data.resident=true: the training images need {size / 1e9:.1f} GB, and {device} has {free / 1e9:.1f} "
                "GB free, also for training; set data.resident=false, or a smaller model.image_size or "
                "data.train_images"
            )


class _Order:
    """The batch sampler of the loader: the index arrays of the pass that comes next."""

    def __init__(self) -> None:
        self.batches: Sequence[Indices] = []

    def __iter__(self) -> Iterator[list[int]]:
        return (batch.tolist() for batch in self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class _Images(Dataset[Tensor]):
    def __init__(self, images: ImageReader, size: int) -> None:
        self._images = images
        self._size = size

    def __len__(self) -> int:
        return len(self._images)

    def __getitems__(self, indices: Iterable[int]) -> Tensor:
        pixels = self._images.read_many(np.fromiter(indices, np.int64), self._size)  # (B, S, S, 3)
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))  # twice as fast as PyTorch's copy


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _as_is(batch: Any) -> Tensor:
    return cast(Tensor, batch)


def _end_workers(reference: weakref.ref[DataLoader[Tensor]]) -> None:
    loader: Any = reference()
    if loader is not None and loader._iterator is not None:  # PyTorch has no public name for it
        loader._iterator._shutdown_workers()


def _begin_worker(_worker: int) -> None:
    """The scheduler signals every process of a job; only the training process may act on it.

    A worker that hangs in a file system would outlive the training process, and keep its console open.
    """
    threading.Thread(target=_leave_after, args=(os.getppid(),), daemon=True).start()
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)


def _leave_after(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)
