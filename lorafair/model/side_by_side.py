"""How many clients train side by side: as many as pay, and on a GPU as many as its memory has room for.

Letters: C clients side by side, N clients of the run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch

from lorafair.config.schema import Config
from lorafair.model.adapted_model import AdaptedModel

# Enough cohorts for many ranks (a GPU loses more by small steps), and steps whose activations fit into a core's cache,
# or fill a GPU.
COHORTS_OF_ROUND = {"cpu": 16, "gpu": 8}
NUMBERS_OF_STEP = {"cpu": 2**19, "gpu": 2**25}  # that enter an adapted layer
ROOM = 0.8  # of a GPU's free memory that the activations of a cohort may fill


def cohort_size(config: Config, sizes: Sequence[int], model: AdaptedModel, device: torch.device) -> int:
    """C, the clients trained side by side: client.cohort, or for auto what follows from model, batch and sizes (N,)."""
    if config.client.cohort != "auto":
        return config.client.cohort
    selected = min(config.federation.clients_per_round or len(sizes), len(sizes))
    return clients_that_pay(model, selected, largest_batch(config, sizes), device)


def largest_batch(config: Config, sizes: Sequence[int]) -> int:
    """Images of a client in a step, of clients with so many (N,); a random sample is hardly ever larger than that."""
    batch = config.client.batch_size
    if config.privacy.unit == "example":
        batch += math.ceil(4 * math.sqrt(batch))  # four standard deviations
    return min(batch, max(sizes))


def clients_that_pay(model: AdaptedModel, selected: int, batch: int, device: torch.device) -> int:
    """How many of the clients `selected` for a round train side by side, with at most `batch` images each in a step.

    It depends on no measurement and not on the number of ranks, because the last bits of a client's numbers can depend
    on the clients beside it.
    """
    kind = "cpu" if device.type == "cpu" else "gpu"
    most = selected // COHORTS_OF_ROUND[kind]
    if most <= 1:
        return 1
    return max(1, min(most, int(NUMBERS_OF_STEP[kind] / (batch * model.numbers_per_image()))))


def clients_with_room(
    model: AdaptedModel, autocast: Callable[[], AbstractContextManager[object]], batch: int, device: torch.device
) -> int:
    """How many clients of `batch` images have room on this GPU, by the memory that a step of one of them takes.

    0 where that one has none.
    """
    model.adapters.resize(1)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    try:
        with autocast():
            logits = model(model.empty_images(batch))
        logits.float().sum().backward()
    except torch.OutOfMemoryError:  # training will say so, with what to change
        return 0
    of_client = torch.cuda.max_memory_allocated(device) - before
    del logits
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by PyTorch, for what comes next
    return int(ROOM * (torch.cuda.mem_get_info(device)[0] + kept) / max(of_client, 1))
