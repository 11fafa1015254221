"""The first gradient: of the right images with their labels, however they come in batches."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F

from lorafair.config.schema import Config
from lorafair.experiment import build_experiment
from lorafair.server.start import first_gradients
from tests.conftest import launched


@pytest.mark.slow
def test_the_first_gradient_is_that_of_training_images_of_all_clients(tiny: Callable[..., Config]) -> None:
    config = tiny("method.name=fed_sb", "data.train_images=10", "data.test_images=4", "client.batch_size=7")
    experiment, _ = build_experiment(launched(1), config)
    experiment.open_inputs()
    model, adapters = experiment.model, experiment.model.adapters
    drawn = adapters.draw(0, 0)
    found = first_gradients(experiment, drawn, count=1000)
    indices = torch.cat([torch.from_numpy(client.indices) for client in experiment.clients]).numpy()
    assert len(indices) == 30
    [inputs] = experiment.inputs.train.batches([indices])
    adapters.write(drawn)
    layers = {path: model.backbone.get_submodule(path).base.weight.requires_grad_(True) for path in found}
    loss = F.cross_entropy(model(inputs), experiment.labels[torch.from_numpy(indices)], reduction="sum")
    expected = torch.autograd.grad(loss, list(layers.values()))
    for path, wanted in zip(layers, expected, strict=True):
        torch.testing.assert_close(found[path], wanted, rtol=1e-3, atol=1e-4)
    some = first_gradients(experiment, drawn, count=5)
    assert not any(torch.equal(some[path], found[path]) for path in found)
