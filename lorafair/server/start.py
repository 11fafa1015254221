"""Where the first round starts, of a method or an option that makes it of the frozen weights or of a first gradient.

Letters: P packed length, O out_features, I in_features.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lorafair.aggregation.base import ServerUpdate
from lorafair.aggregation.initialization import initial_update, is_drawn
from lorafair.cluster.watchdog import heartbeat
from lorafair.communication.agreement import same_error_on_all_ranks
from lorafair.communication.collectives import broadcast_update
from lorafair.data.loading import index_on, on_device
from lorafair.experiment import Experiment
from lorafair.model.adapter import LoRAFactors, Part
from lorafair.seeding import seeded


def initial_adapter(experiment: Experiment, drawn: Tensor) -> tuple[Tensor, dict[str, LoRAFactors]]:
    """The initial adapter (P,), and what is folded into the frozen weights first. Call on every rank.

    What is made of the frozen weights is made on rank 0: a decomposition may have other last bits on another machine.
    """
    fabric, layout, update = experiment.fabric, experiment.layout, None
    if is_drawn(experiment.aggregator, experiment.config.model.lora.initialization):
        return drawn, {}
    with same_error_on_all_ranks(fabric):
        if fabric.is_global_zero:
            update = _made(experiment, drawn)
    parts: tuple[Part, ...] = ("A", "B", "core")
    start, folded = broadcast_update(fabric, update, layout, parts=parts, folds=True)
    return layout.replaced(drawn, parts, start), folded


def _made(experiment: Experiment, drawn: Tensor) -> ServerUpdate:
    lora, aggregator = experiment.config.model.lora, experiment.aggregator
    count = aggregator.images_at_start
    return initial_update(
        aggregator,
        lora.initialization,
        experiment.layout.unpack(drawn),
        experiment.model.adapters.base_weights(),
        scaling=lora.alpha / lora.rank,
        seed=experiment.config.seed_of("model"),
        gradients=first_gradients(experiment, drawn, count) if count else None,
    )


def first_gradients(experiment: Experiment, adapter: Tensor, count: int) -> dict[str, Tensor]:
    """Gradients (O, I) of the loss by the frozen weights, summed over training images drawn from all clients'."""
    images = np.concatenate([client.indices for client in experiment.clients])
    order = torch.randperm(len(images), generator=seeded(experiment.config.seed_of("model"), "first gradient"))
    chosen, size = images[order[:count].numpy()], experiment.config.client.batch_size
    batches = [chosen[i : i + size] for i in range(0, len(chosen), size)]
    adapters, device = experiment.model.adapters, experiment.fabric.device
    scale = experiment.loss_scale
    adapters.resize(1)
    adapters.write(adapter)
    with adapters.base_gradients() as gradients:
        for indices, inputs in zip(batches, on_device(experiment.inputs.train.batches(batches), device), strict=True):
            heartbeat()
            with experiment.fabric.autocast():
                logits = experiment.model.forward(inputs)  # not what is compiled, in which hooks would not be called
            loss = F.cross_entropy(logits.float(), experiment.labels[index_on(indices, device)], reduction="sum")
            (loss * scale).backward()
    return {path: gradient / scale for path, gradient in gradients.items()}
