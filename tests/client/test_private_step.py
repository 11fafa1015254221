"""DP-SGD at the clients: gradients of single images, what one image can change, noise, samples, clients apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from scipy.ndimage import convolve1d
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from lorafair.aggregation.la_lora import LALoRA
from lorafair.client.cohort import Cohort, CohortResult, LocalTraining
from lorafair.client.private_step import ExamplePrivacy, PrivateGradient
from lorafair.config.schema import ClientConfig, LoRAConfig, ModelConfig
from lorafair.data.loading import CohortStep, cohort_steps, poisson_batches, sampling_probability
from lorafair.model.adapted_model import AdaptedModel
from lorafair.model.adapter import PARTS, CoreShape
from lorafair.model.backbone import build_model
from lorafair.model.per_sample import ImageGradients, spread
from lorafair.privacy.measures import MEASURES, measured_scalars
from lorafair.privacy.noise import standard_normal
from lorafair.seeding import seeded, system_uniform

CLASSES, SIDE = 3, 32
IMAGES = torch.randint(0, 256, (60, 3, SIDE, SIDE), dtype=torch.uint8, generator=seeded(0, "images"))
LABELS = torch.randint(0, CLASSES, (60,), generator=seeded(0, "labels"))
TARGETS = {
    "test_vit": ("attn.qkv", "attn.proj", "mlp.fc2"),
    "mixer_s16_224": ("mlp_tokens.fc1", "mlp_tokens.fc2", "mlp_channels.fc2"),
}
SGD = ClientConfig(learning_rate=0.1, momentum=0.0, weight_decay=0.0, clip_norm=None, steps=1, batch_size=6)


def model(name: str = "test_vit", cohort: int = 1, core: CoreShape | None = None, dropout: float = 0.0) -> AdaptedModel:
    lora = LoRAConfig(rank=4, alpha=8, last_blocks=1, dropout=dropout, targets=TARGETS.get(name))
    config = ModelConfig(name=name, weights="random", image_size=SIDE, lora=lora)
    return build_model(config, CLASSES, 0, core).attach("cpu", cohort)


def drawn(m: AdaptedModel, clients: int = 1) -> Tensor:
    """Packed adapters (C, P) none of whose factors is zero."""
    start = torch.stack([m.adapters.draw(client, 0) for client in range(clients)])
    return start + 0.05 * torch.randn(start.shape, generator=seeded(0, "start"))


def own_gradients(m: AdaptedModel, row: Tensor, indices: Sequence[int]) -> Tensor:
    """(N, P) by torch.func: the gradient of one image's loss, mapped over images."""
    m.adapters.resize(1)
    m.adapters.write(row)
    named = {id(parameter): name for name, parameter in m.named_parameters()}
    trained = {named[id(parameter)]: parameter.detach().clone() for _, parameter in m.adapters.tensors()}

    pixels = m.normalize(IMAGES[list(indices)])
    backbone = m.backbone

    def of_backbone(parameters: dict[str, Tensor], pixels: Tensor, label: Tensor) -> Tensor:
        inner = {name.removeprefix("backbone."): value for name, value in parameters.items()}
        logits = functional_call(backbone, inner, (pixels.unsqueeze(0),))
        return nn.functional.cross_entropy(logits, label.unsqueeze(0))

    found = vmap(grad(of_backbone), in_dims=(None, 0, 0))(trained, pixels, LABELS[list(indices)])
    return torch.cat([found[named[id(parameter)]].flatten(1) for _, parameter in m.adapters.tensors()], dim=1)


def step_of(batches: Sequence[Sequence[int]]) -> CohortStep:
    [step] = cohort_steps([[np.array(batch, dtype=np.int64)] for batch in batches])
    return step


def sums(
    m: AdaptedModel,
    start: Tensor,
    batches: Sequence[Sequence[int]],
    clip_norm: float = 1.0,
    noise: float = 0.0,
    expected: float = 1.0,
    loss_scale: float = 1.0,
) -> tuple[Tensor, PrivateGradient]:
    """What DP-SGD makes of one step of these clients: (C, P)."""
    m.adapters.resize(len(start))
    m.adapters.write(start)
    m.adapters.train_only(PARTS)
    step = step_of(batches)
    generators = [seeded(0, "noise", client) for client in range(len(start))]
    privacy = ExamplePrivacy(clip_norm, noise, [expected] * len(start), generators)
    private = PrivateGradient(m, privacy, PARTS, loss_scale=loss_scale)
    targets = LABELS[torch.from_numpy(step.indices)]
    private(IMAGES[step.indices.reshape(-1)], targets, step.counts, nullcontext)
    m.adapters.show()
    assert m.adapters.flat.grad is not None
    return m.adapters.flat.grad.clone(), private


CORE = CoreShape(heads=2, scaled=True)
CASES = [("test_vit", None), ("mixer_s16_224", None), ("test_vit", CORE), ("test_vit", CoreShape())]


@pytest.mark.parametrize(("name", "core"), CASES)
def test_gradients_of_images_are_those_of_torch_func(name: str, core: CoreShape | None) -> None:
    m = model(name, core=core)
    [row] = drawn(m)
    indices = list(range(5))
    expected = own_gradients(m, row, indices)
    m.adapters.write(row)
    spread(m.adapters, len(indices))
    logits = m(IMAGES[indices])
    nn.functional.cross_entropy(logits, LABELS[indices], reduction="sum").backward()
    found = ImageGradients.of(m.adapters, len(indices))
    mine = torch.zeros_like(expected)
    for _, columns, gradient in found.tensors:
        mine[:, columns] = gradient
    torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    squares = sum(found.squared_norms().values())
    torch.testing.assert_close(squares, expected.square().sum(1).unsqueeze(0), rtol=1e-4, atol=0)
    assert set(found.squared_norms()) == {part for part in PARTS if core or part != "core"}


def clipped(gradients: Tensor, bound: float) -> Tensor:
    """(N, P), each row at most so long."""
    return gradients * (bound / gradients.norm(dim=1, keepdim=True)).clamp(max=1.0)


def test_a_step_is_the_sum_of_clipped_gradients_over_the_expected_batch() -> None:
    m = model()
    start = drawn(m)
    indices = list(range(7))
    gradients = own_gradients(m, start[0], indices)
    norms = gradients.norm(dim=1).sort().values
    bound = float(norms[3:5].mean())  # between two of them: on one of them, the last bit would say who is clipped
    expected = clipped(gradients, bound).sum(0) / 5
    found, private = sums(m, start, [indices], bound, expected=5.0)
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-6)
    scaled, _ = sums(m, start, [indices], bound, expected=5.0, loss_scale=4096.0)
    torch.testing.assert_close(scaled[0], expected, rtol=1e-4, atol=1e-6)
    measured = dict(zip(MEASURES, private.tally.rows[0].tolist(), strict=True))
    assert (measured["images"], measured["clipped"]) == (7, 3)
    assert measured["norm"] == pytest.approx(float(gradients.norm(dim=1).sum()), rel=1e-4)
    parts = m.adapters.layout.slices
    head = gradients[:, parts["head"]].norm(dim=1).sum()
    assert measured["norm/head"] == pytest.approx(float(head), rel=1e-4)


@pytest.mark.parametrize("name", TARGETS)
def test_an_image_more_or_less_changes_the_sum_by_at_most_the_bound(name: str) -> None:
    m = model(name)
    start = drawn(m)
    bound, everyone = 0.3, [0, 1, 2, 3, 4]
    whole, free = sums(m, start, [everyone], bound)[0], sums(m, start, [everyone], 1e9)[0]
    for left_out in everyone:
        others = [i for i in everyone if i != left_out]
        changed = float((sums(m, start, [others], bound)[0] - whole).norm())
        assert 0.99 * bound < changed <= bound * (1 + 1e-4)  # every gradient here is longer than the bound
        assert float((sums(m, start, [others], 1e9)[0] - free).norm()) > 2 * bound


def test_an_empty_sample_gives_noise_alone_of_the_right_size() -> None:
    m = model()
    start = drawn(m)
    deviation, drawn_rows = 2.0 * 0.5 / 4, []
    m.adapters.write(start)
    m.adapters.train_only(PARTS)
    private = PrivateGradient(m, ExamplePrivacy(0.5, 2.0, [4.0], [seeded(0, "noise")]), PARTS)
    step = step_of([[]])
    assert step.counts == (0,)
    for _ in range(100):
        losses = private(IMAGES[step.indices.reshape(-1)], LABELS[step.indices.reshape(1, -1)], (0,), nullcontext)
        assert losses.tolist() == [0.0]
        assert m.adapters.flat.grad is not None
        drawn_rows.append(m.adapters.flat.grad[0].clone() / deviation)
    noise = torch.stack(drawn_rows).double()  # (100, P) standard normal
    count = noise.numel()
    assert abs(float(noise.mean())) < 5 / math.sqrt(count)
    assert abs(float(noise.var()) - 1) < 5 * math.sqrt(2 / count)
    assert float(noise.abs().max()) < 6.5
    by_step = torch.corrcoef(noise[:20])
    assert float((by_step - torch.eye(20)).abs().max()) < 6 / math.sqrt(noise.shape[1])
    scalars = measured_scalars(private.tally.rows)
    assert scalars["privacy/signal_to_noise/A"] == 0
    assert scalars["privacy/clip_fraction"] == 0


def test_noise_of_the_system_is_standard_normal_and_does_not_repeat() -> None:
    like = torch.empty(2, 50_001)
    one, other = standard_normal(like, None), standard_normal(like, None)
    assert one.shape == like.shape
    assert not torch.equal(one, other)
    for noise in (one, other):
        assert abs(float(noise.mean())) < 5 / math.sqrt(noise.numel())
        assert abs(float(noise.double().var()) - 1) < 5 * math.sqrt(2 / noise.numel())
        assert abs(float(noise.double().pow(4).mean()) - 3) < 0.2
    drawn = system_uniform(1000)
    assert drawn.min() >= 0
    assert drawn.max() < 1


@pytest.mark.parametrize("source", ["seeded", "system"])
def test_each_image_is_in_each_sample_with_its_probability(source: str) -> None:
    images, local = np.arange(100, 125), ClientConfig(steps=4, batch_size=5)
    assert sampling_probability(25, local) == 0.2
    generators = [seeded(0, n, "sample") if source == "seeded" else None for n in range(500)]
    samples = [sample for generator in generators for sample in poisson_batches(images, local, generator)]
    assert len(samples) == 2000
    member = np.stack([np.isin(images, sample) for sample in samples])  # (2000, 25)
    spread_of_rate = math.sqrt(0.2 * 0.8 / 2000)
    assert abs(member.mean(0) - 0.2).max() < 5 * spread_of_rate
    sizes = member.sum(1)
    assert abs(sizes.mean() - 5) < 5 * math.sqrt(25 * 0.16 / 2000)
    assert abs(sizes.var() - 25 * 0.16) < 5 * 4 * math.sqrt(2 / 2000)  # independent of each other
    assert any(len(sample) == 0 for sample in samples)
    both = np.cov(member.T) - np.diag(np.cov(member.T).diagonal())
    assert abs(both).max() < 5 * 0.16 / math.sqrt(2000)
    few = poisson_batches(images[:3], local, None)
    assert all(sample.tolist() == [100, 101, 102] for sample in few)  # a client with fewer images than a batch


def test_an_image_whose_gradient_is_not_finite_counts_as_zero() -> None:
    m = model()
    start = drawn(m)
    expected, _ = sums(m, start, [[0, 1, 3]], 0.3)
    poison = torch.tensor([1.0, 1.0, math.inf, 1.0]).unsqueeze(1)
    handle = m.register_forward_hook(lambda _, __, logits: logits * poison)
    found, private = sums(m, start, [[0, 1, 2, 3]], 0.3)
    handle.remove()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert private.tally.rows.isfinite().all()


def train(
    m: AdaptedModel, start: Tensor, samples: Sequence[Sequence[Sequence[int]]], names: Sequence[int], **more: Tensor
) -> CohortResult:
    """Train clients on these samples, with noise; `names` are those of their generators."""
    steps = cohort_steps([[np.array(batch, dtype=np.int64) for batch in of_client] for of_client in samples])
    privacy = ExamplePrivacy(0.5, 0.3, [4.0] * len(names), [seeded(0, name, "noise") for name in names])
    generators = [seeded(0, name, "dropout") for name in names]
    inputs = (IMAGES[step.indices.reshape(-1)] for step in steps)
    cohort = Cohort(start, steps, generators, privacy=privacy, **more)
    local = replace(SGD, momentum=0.9, clip_norm=20.0, proximal=0.1)
    return LocalTraining(m, LABELS, local).train(cohort, inputs)


SAMPLES = [
    [[0, 1, 2, 3, 4], [], [5, 6], [0, 7, 8]],
    [[], [20], [21, 22, 23, 24, 25, 26, 27]],
    [[40, 41], []],
]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_clients_side_by_side_are_as_one_by_one(dropout: float) -> None:
    m = model(cohort=3, dropout=dropout)
    start, scales = drawn(m, 3), torch.tensor([1.0, 2.0, 1.0])
    together = train(m, start, SAMPLES, [0, 1, 2], scales=scales)
    assert together.measures is not None
    for client, samples in enumerate(SAMPLES):
        alone = train(m, start[client : client + 1], [samples], [client], scales=scales[client : client + 1])
        torch.testing.assert_close(together.rows[client], alone.rows[0], rtol=1e-4, atol=2e-5)
        torch.testing.assert_close(together.losses[client], alone.losses[0], rtol=1e-4, atol=1e-5)
        assert alone.measures is not None
        torch.testing.assert_close(together.measures[client], alone.measures[0], rtol=1e-3, atol=1e-4)
    again = train(m, start, SAMPLES, [0, 1, 2], scales=scales)
    assert torch.equal(again.rows, together.rows)
    m.adapters.resize(1)
    assert m(IMAGES[:2]).shape == (2, CLASSES)  # the model is as without privacy again


def test_an_image_more_or_less_leaves_the_masks_of_the_others_as_they_are() -> None:
    """With masks drawn one image after the other the sum would change by more than the bound, for a known seed."""
    m, bound, everyone = model(dropout=0.5), 0.05, list(range(6))
    start = drawn(m)

    def trained(batch: Sequence[int]) -> Tensor:
        privacy = ExamplePrivacy(bound, 0.0, [1.0], [None])
        cohort = Cohort(start, [step_of([batch])], [seeded(0, "dropout")], privacy=privacy)
        return LocalTraining(m, LABELS, SGD).train(cohort, [IMAGES[batch]]).rows[0]

    whole = trained(everyone)
    for left_out in everyone:
        moved = (trained([i for i in everyone if i != left_out]) - whole) / SGD.learning_rate
        assert float(moved.norm()) == pytest.approx(bound, rel=1e-3)


def test_what_a_client_does_not_train_gets_no_noise() -> None:
    m = model()
    start = drawn(m)
    fixed = m.adapters.layout.outside(torch.tensor([[True, True, False, False]]))
    result = train(m, start, [SAMPLES[0]], [0], fixed=fixed)
    assert torch.equal(result.rows[fixed], start[fixed])
    assert not (result.rows == start)[~fixed].any()


def test_the_same_gradients_with_checkpointed_activations() -> None:
    m = model()
    start = drawn(m)
    expected, _ = sums(m, start, [[0, 1, 2]], 0.3)
    m.checkpoint_gradients()
    found, _ = sums(m, start, [[0, 1, 2]], 0.3)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_a_private_step_reads_nothing_back_from_the_device() -> None:
    """On the meta device there is nothing to read: .item(), a Python branch on a tensor or a CPU tensor would fail."""
    lora = LoRAConfig(rank=4, alpha=8, last_blocks=1)
    with torch.device("meta"):
        m = build_model(ModelConfig(name="test_vit", weights="random", image_size=SIDE, lora=lora), CLASSES, 0)
        m.attach(max_cohort=2)
    m.adapters.resize(2)
    private = PrivateGradient(m, ExamplePrivacy(1.0, 0.0, [4.0, 4.0], [None, None]), PARTS)
    images = torch.empty(6, 3, SIDE, SIDE, dtype=torch.uint8, device="meta")
    losses = private(images, torch.empty(2, 3, dtype=torch.int64, device="meta"), (3, 0), nullcontext)
    assert (losses.device.type, losses.shape) == ("meta", (2,))
    assert private.tally.rows.device.type == "meta"


def test_factors_that_take_turns_are_clipped_noised_and_smoothed_by_themselves() -> None:
    """Two steps of LA-LoRA without momentum, from gradients of torch.func: B and the head, then A and the head."""
    m, method = model(), LALoRA()
    start, slices = drawn(m), m.adapters.layout.slices
    local = replace(SGD, steps=2, learning_rate=0.5)
    privacy = ExamplePrivacy(0.3, 0.7, [4.0], [seeded(0, "noise")])
    batches = [np.arange(5), np.arange(5, 9)]
    steps = cohort_steps([batches])
    training = LocalTraining(
        m, LABELS, local, parts_of_step=partial(method.trains_in_step, 0), smoothing=method.smoothing
    )
    cohort = Cohort(start, steps, [seeded(0)], privacy=privacy)
    found = training.train(cohort, (IMAGES[step.indices.reshape(-1)] for step in steps)).rows[0]

    row, generator = start[0].clone(), seeded(0, "noise")
    for index, batch in enumerate(batches):
        factor, idle = ("B", "A") if index % 2 == 0 else ("A", "B")
        gradients = own_gradients(m, row, batch.tolist())
        gradients[:, slices[idle]] = 0  # type: ignore[index]
        clipped = gradients * (0.3 / gradients.norm(dim=1, keepdim=True)).clamp(max=1)
        total = clipped.sum(0)
        for part in (factor, "head"):
            span = slices[part]  # type: ignore[index]
            total[span] += 0.3 * 0.7 * torch.empty(span.stop - span.start).normal_(generator=generator)
        for layer in m.adapters.layout.unpack(total).factors.values():
            values, axis = (layer.B, 0) if factor == "B" else (layer.A, 1)
            values.copy_(torch.from_numpy(convolve1d(values.numpy(), np.array([1, 4, 6, 4, 1]) / 16, axis=axis)))
        row = row - 0.5 * total / 4.0
    torch.testing.assert_close(found, row, rtol=1e-4, atol=1e-5)
