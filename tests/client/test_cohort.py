"""Local training: against a plain PyTorch loop, side by side against one by one, and on devices that are not there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from scipy.ndimage import convolve1d
from torch import Tensor, nn

from lorafair.aggregation.factor_algebra import lora_ranks_of
from lorafair.aggregation.la_lora import LALoRA
from lorafair.client.cohort import Cohort, GradientRule, LocalTraining, client_losses, make_optimizer
from lorafair.config.loading import load_config
from lorafair.config.schema import ClientConfig, LoRAConfig, ModelConfig
from lorafair.data.loading import CohortStep, Indices, cohort_steps, local_batches
from lorafair.errors import ConfigError
from lorafair.launch import make_fabric
from lorafair.model.adapted_model import AdaptedModel
from lorafair.model.adapter import PARTS, AdapterState, LoRAFactors, Part
from lorafair.model.adapter import row as row_of
from lorafair.model.backbone import build_model, check_model
from lorafair.model.patches import PatchEmbedding
from lorafair.schedule import effective_step_size, with_scheduled_learning_rate
from lorafair.seeding import seeded
from tests.torch_private import FakeTensorMode

MODEL = ModelConfig(
    name="test_vit", weights="random", image_size=32, lora=LoRAConfig(rank=4, alpha=8, last_blocks=2, dropout=0.0)
)
SGD = ClientConfig(learning_rate=0.05, momentum=0.9, weight_decay=1e-3, clip_norm=0.5, epochs=2, batch_size=5)
ADAMW = ClientConfig(optimizer="adamw", learning_rate=0.01, clip_norm=None, epochs=2, batch_size=5)
IMAGES = torch.randint(0, 256, (40, 3, 32, 32), dtype=torch.uint8, generator=seeded(0, "images"))
LABELS = torch.randint(0, 3, (40,), generator=seeded(0, "labels"))


def model(cohort: int = 1, dropout: float = 0.0, device: str = "cpu") -> AdaptedModel:
    config = replace(MODEL, lora=replace(MODEL.lora, dropout=dropout))
    return build_model(config, classes=3, seed=0).attach(device, cohort)


def batches(clients: list[Indices], config: ClientConfig) -> list[list[Indices]]:
    return [local_batches(images, config, seeded(0, 0, client)) for client, images in enumerate(clients)]


def images_of(steps: list[CohortStep]) -> Iterator[Tensor]:
    return (IMAGES[step.indices.reshape(-1)] for step in steps)


def train(m: AdaptedModel, start: Tensor, of_clients: list[list[Indices]], config: ClientConfig, *names: int) -> Tensor:
    steps = cohort_steps(of_clients)
    cohort = Cohort(start, steps, generators=[seeded(0, "dropout", name) for name in names])
    result = LocalTraining(m, LABELS, config).train(cohort, images_of(steps))
    return torch.cat([result.rows, result.losses.unsqueeze(1)], dim=1)


PROXIMAL = replace(SGD, proximal=3.0)
FASTER_B = replace(SGD, b_learning_rate_ratio=4.0)
FASTER_B_ADAMW = replace(ADAMW, b_learning_rate_ratio=4.0)
LOCAL = {"sgd": SGD, "adamw": ADAMW, "proximal": PROXIMAL, "faster_b": FASTER_B, "faster_b_adamw": FASTER_B_ADAMW}


@pytest.mark.parametrize("config", LOCAL.values(), ids=LOCAL)
def test_a_client_is_trained_as_a_plain_loop_would(config: ClientConfig) -> None:
    """The reference knows nothing of flat parameters or cohorts: autograd, torch.optim and clip_grad_norm_."""
    m = model()
    start = m.adapters.draw(0, 0)
    [plan] = batches([np.arange(13)], config)
    [trained] = train(m, start.unsqueeze(0), [plan], config, 0)
    torch.testing.assert_close(trained, plain_loop(m, start, plan, config), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(trained[:-1], start, atol=1e-3)


Look = Callable[[int, list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]], None]


def plain_loop(
    m: AdaptedModel,
    start: Tensor,
    plan: list[Indices],
    config: ClientConfig,
    before_clipping: Look = lambda step, A, B, head: None,
    before_step: Look = lambda step, A, B, head: None,
) -> Tensor:
    """The packed adapter after training, and the mean loss, (P + 1,)."""
    state = m.adapters.layout.unpack(start.clone())
    parameters = [nn.Parameter(t.clone()) for f in state.factors.values() for t in (f.A, f.B)]
    parameters += [nn.Parameter(t.clone()) for t in state.head.values()]
    kind = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[config.optimizer]
    extra = {"momentum": config.momentum} if config.optimizer == "sgd" else {}
    pairs = 2 * len(state.factors)
    groups = [
        {"params": parameters[0:pairs:2] + parameters[pairs:]},
        {"params": parameters[1:pairs:2], "lr": config.learning_rate * config.b_learning_rate_ratio},
    ]
    optimizer = kind(groups, lr=config.learning_rate, weight_decay=config.weight_decay, **extra)
    origin = [parameter.detach().clone() for parameter in parameters]
    losses = []
    for batch in plan:
        logits = reference_logits(m, parameters, IMAGES[batch])
        loss = nn.functional.cross_entropy(logits, LABELS[batch])
        way = sum((p - o).square().sum() for p, o in zip(parameters, origin, strict=True))
        optimizer.zero_grad()
        (loss + config.proximal / 2 * way).backward()
        parts = parameters[0:pairs:2], parameters[1:pairs:2], parameters[pairs:]
        before_clipping(len(losses), *parts)
        if config.clip_norm is not None:
            nn.utils.clip_grad_norm_(parameters, config.clip_norm)
        before_step(len(losses), *parts)
        optimizer.step()
        losses.append(loss.item())
    values = iter(parameter.detach() for parameter in parameters)
    reached = AdapterState(
        factors={path: LoRAFactors(A=next(values), B=next(values)) for path in state.factors},
        head={name: next(values) for name in state.head},
    )
    return torch.cat([m.adapters.layout.pack(reached), torch.tensor([np.mean(losses)])]).float()


@pytest.mark.parametrize("filtered", [True, False])
@pytest.mark.parametrize("config", LOCAL.values(), ids=LOCAL)
def test_factors_take_turns_and_gradients_are_smoothed_as_in_a_plain_loop(config: ClientConfig, filtered: bool) -> None:
    """With momentum and decay of their own: the optimiser does not see a factor in the steps that are not its turn."""

    def skip(step: int, A: list[nn.Parameter], B: list[nn.Parameter], head: list[nn.Parameter]) -> None:
        for idle in A if step % 2 == 0 else B:
            idle.grad = None

    def smooth(step: int, A: list[nn.Parameter], B: list[nn.Parameter], head: list[nn.Parameter]) -> None:
        for factor, axis in [(B, 0), (A, 1)][step % 2 : step % 2 + 1]:
            for parameter in factor:
                assert parameter.grad is not None
                exact = parameter.grad.double().numpy()
                smoothed = convolve1d(exact, np.array([1, 4, 6, 4, 1]) / 16, axis=axis, mode="reflect")
                parameter.grad = torch.from_numpy(smoothed).float()

    m, method = model(), LALoRA(filter=filtered)
    start = m.adapters.draw(0, 0)
    [plan] = batches([np.arange(13)], config)
    training = LocalTraining(
        m, LABELS, config, parts_of_step=partial(method.trains_in_step, 0), smoothing=method.smoothing
    )
    steps = cohort_steps([plan])
    trained = training.train(Cohort(start.unsqueeze(0), steps, [seeded(0)]), images_of(steps))
    expected = plain_loop(m, start, plan, config, skip, *([smooth] if filtered else []))
    torch.testing.assert_close(torch.cat([trained.rows[0], trained.losses]), expected, rtol=1e-4, atol=1e-5)
    rows = training.train(Cohort(start.unsqueeze(0), steps[:1], [seeded(0)]), images_of(steps[:1])).rows[0]
    same = rows == start
    assert same[m.adapters.layout.slices["A"]].all()
    assert not same[m.adapters.layout.slices["B"]].any()


@pytest.mark.parametrize("config", [SGD, ADAMW], ids=["sgd", "adamw"])
def test_factors_take_turns_beside_other_clients_as_alone(config: ClientConfig) -> None:
    plans = batches([np.arange(0, 13), np.arange(13, 20), np.arange(20, 23)], config)
    m, method = model(cohort=3), LALoRA()
    training = LocalTraining(
        m, LABELS, config, parts_of_step=partial(method.trains_in_step, 0), smoothing=method.smoothing
    )
    start = m.adapters.draw(0, 0).repeat(3, 1)

    def trained(clients: slice) -> Tensor:
        steps = cohort_steps(plans[clients])
        generators = [seeded(0, "dropout", name) for name in range(3)][clients]
        return training.train(Cohort(start[clients], steps, generators), images_of(steps)).rows

    together = trained(slice(0, 3))
    for client in range(3):
        alone = trained(slice(client, client + 1))
        torch.testing.assert_close(together[client : client + 1], alone, rtol=1e-4, atol=2e-5)


def reference_logits(m: AdaptedModel, parameters: list[nn.Parameter], images: Tensor) -> Tensor:
    """The same backbone with dense weights W0 + s·B·A put in place of the adapted layers."""
    layers = list(m.adapters.layout.factors)
    weights = {
        f"{path}.base.weight": m.backbone.get_submodule(path).base.weight
        + 8 / 4 * parameters[2 * i + 1] @ parameters[2 * i]
        for i, path in enumerate(layers)
    }
    zeros = {f"{path}.B": torch.zeros_like(m.backbone.get_submodule(path).B) for path in layers}
    head = {"head.weight": parameters[-2].unsqueeze(0), "head.bias": parameters[-1].unsqueeze(0)}
    return torch.func.functional_call(m.backbone, {**weights, **zeros, **head}, m.normalize(images))


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("config", LOCAL.values(), ids=LOCAL)
def test_side_by_side_equals_one_by_one_with_unequal_sizes(config: ClientConfig, dropout: float) -> None:
    """13, 7 and 3 images: different numbers of steps, last batches of different size, one smaller than a batch."""
    clients = [np.arange(0, 13), np.arange(13, 20), np.arange(20, 23)]
    plans = batches(clients, config)
    m = model(cohort=3, dropout=dropout)
    start = torch.stack([m.adapters.draw(0, 0)] * 3)
    together = train(m, start, plans, config, 0, 1, 2)
    for client, plan in enumerate(plans):
        [alone] = train(m, start[client : client + 1], [plan], config, client)
        torch.testing.assert_close(together[client], alone, rtol=1e-4, atol=2e-5)


def test_corrections_are_added_to_every_gradient_after_clipping() -> None:
    """One SGD step without momentum goes lr times the correction further; a client keeps its own one."""
    config = replace(SGD, momentum=0.0, clip_norm=1e-3, epochs=None, steps=1)
    m = model(cohort=2)
    start = torch.stack([m.adapters.draw(0, 0)] * 2)
    plans = batches([np.arange(5), np.arange(5)], config)
    corrections = torch.randn(start.shape, generator=seeded(0, "corrections"))
    steps = cohort_steps(plans)

    def reached(with_corrections: Tensor | None) -> Tensor:
        cohort = Cohort(start, steps, [seeded(0, name) for name in (0, 1)], with_corrections)
        return LocalTraining(m, LABELS, config).train(cohort, images_of(steps)).rows

    torch.testing.assert_close(reached(None) - reached(corrections), config.learning_rate * corrections)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_step_size_is_how_far_a_constant_gradient_moves_a_parameter(momentum: float) -> None:
    config = replace(SGD, momentum=momentum, weight_decay=0.0, b_learning_rate_ratio=2.0)
    parameter = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = torch.optim.SGD([parameter], lr=config.learning_rate, momentum=momentum)
    for _ in range(7):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    assert effective_step_size(config, "A", 7) == pytest.approx(-parameter.item())
    assert effective_step_size(config, "B", 7) == pytest.approx(-2 * parameter.item())


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ({"schedule": "constant"}, [1, 1, 1, 1, 1, 1]),
        ({"schedule": "linear", "schedule_rounds": 4, "final_fraction": 0.2}, [1, 0.8, 0.6, 0.4, 0.2, 0.2]),
        ({"schedule": "cosine", "schedule_rounds": 4, "final_fraction": 0.0}, [1, 0.853553, 0.5, 0.146447, 0, 0]),
        ({"schedule": "exponential", "decay": 0.5}, [1, 0.5, 0.25, 0.125, 0.0625, 0.03125]),
    ],
)
def test_the_learning_rate_follows_the_schedule(schedule: dict[str, Any], expected: list[float]) -> None:
    config = replace(SGD, learning_rate=0.3, **schedule)
    rates = [with_scheduled_learning_rate(config, round_index).learning_rate for round_index in range(6)]
    assert rates == pytest.approx([0.3 * fraction for fraction in expected], abs=1e-6)


def test_batches_visit_every_image_once_an_epoch() -> None:
    images = np.arange(100, 113)
    made = local_batches(images, SGD, seeded(0, 0, 0))
    assert [len(batch) for batch in made] == [5, 5, 3, 5, 5, 3]
    assert sorted(np.concatenate(made[:3])) == sorted(np.concatenate(made[3:])) == list(images)
    assert not np.array_equal(np.concatenate(made[:3]), np.concatenate(made[3:]))


def test_steps_count_batches_over_as_many_epochs_as_needed() -> None:
    made = local_batches(np.arange(7), replace(SGD, epochs=None, steps=5), seeded(0, 0, 0))
    assert [len(batch) for batch in made] == [5, 2, 5, 2, 5]


def test_a_cohort_must_be_ordered_by_falling_number_of_batches() -> None:
    with pytest.raises(ValueError, match="falling number"):
        cohort_steps([[np.arange(2)], [np.arange(2), np.arange(2)]])


def step_images(device: str) -> Tensor:
    """The images of a step of two clients with three images each, with no values yet."""
    return torch.empty(6, 3, 32, 32, dtype=torch.uint8, device=device)


def test_a_training_step_reads_nothing_back_from_the_device() -> None:
    """On the meta device there is nothing to read: .item(), a Python branch on a tensor or a CPU tensor would fail."""
    with torch.device("meta"):
        m = build_model(MODEL, classes=3, seed=0).attach(max_cohort=2)
    m.adapters.resize(2)
    training = LocalTraining(m, torch.empty(40, dtype=torch.int64, device="meta"), SGD)
    rule = GradientRule(1.0, 0.1, torch.empty_like(m.adapters.flat), torch.empty_like(m.adapters.flat))
    step = CohortStep(indices=np.zeros((2, 3), np.int64), counts=(3, 2))
    losses = training.step(make_optimizer(m.adapters.train_only(PARTS), SGD), rule, step_images("meta"), step)
    assert (losses.device.type, losses.shape) == ("meta", (2,))
    assert m.adapters.flat.grad is not None
    assert m.adapters.flat.grad.device.type == "meta"


def on_pretended_gpu(config: ModelConfig) -> AdaptedModel:
    """The model with fake CUDA tensors, which know their device without there being one; inside FakeTensorMode only."""
    m = build_model(config, classes=3, seed=0)
    for module in m.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(torch.empty(parameter.shape, device="cuda"), parameter.requires_grad))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty(buffer.shape, device="cuda"))
    return m.attach(max_cohort=2)


# An MLP-Mixer, because a ViT's class token is taken by indexing, which torch refuses for CUDA tensors without CUDA.
MIXER = replace(MODEL, name="mixer_s16_224")


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_the_forward_pass_and_loss_of_a_cohort_stay_on_a_gpu(precision: str) -> None:
    with FakeTensorMode(), torch.no_grad():
        m = on_pretended_gpu(MIXER)
        assert sum(isinstance(module, PatchEmbedding) for module in m.modules()) == 1
        m.adapters.resize(2)
        m.set_precision(precision)
        images, weights = step_images("cuda"), torch.empty(2, 3, device="cuda")
        losses = client_losses(m(images), torch.empty(2, 3, dtype=torch.int64, device="cuda"), weights)
        assert (losses.device.type, losses.dtype) == ("cuda", torch.float32)
        m.mean = torch.zeros(1, 3, 1, 1)  # the test can fail: one tensor left on the CPU
        with pytest.raises(RuntimeError, match=r"two (different )?devices"):
            m(images)


@pytest.mark.slow
@pytest.mark.parametrize("config", [SGD, ADAMW], ids=["sgd", "adamw"])
@pytest.mark.parametrize("parts", [("B", "head"), ("A", "head"), ("A", "B")])
def test_only_the_chosen_parts_are_trained(config: ClientConfig, parts: tuple[Part, ...]) -> None:
    """Also with weight decay and momentum, beside another client, and after a round that trained everything."""
    decaying = replace(config, weight_decay=0.1)
    m = model(cohort=2)
    layout, start = m.adapters.layout, m.adapters.draw(0, 0) + 0.01
    of_clients = batches([np.arange(13), np.arange(20)], decaying)
    train(m, start.expand(2, -1), sorted(of_clients, key=len, reverse=True), decaying, 1, 0)
    steps = cohort_steps(sorted(of_clients, key=len, reverse=True))
    cohort = Cohort(start.expand(2, -1), steps, [seeded(0, "dropout", name) for name in (1, 0)])
    rows = LocalTraining(m, LABELS, decaying, parts).train(cohort, images_of(steps)).rows
    for part, span in layout.slices.items():
        same = rows[:, span] == start[span]
        assert not same.all(dim=1).any() if part in parts else same.all()


def test_a_client_of_smaller_rank_stays_there() -> None:
    m = model(cohort=2)
    layout, start = m.adapters.layout, (m.adapters.draw(0, 0) + 0.01).expand(2, -1)
    truncated = layout.truncated(start, torch.tensor([1, 2]))
    of_clients = batches([np.arange(20), np.arange(20)], ADAMW)
    rows = train(m, truncated, of_clients, replace(ADAMW, weight_decay=0.1), 0, 1)[:, :-1]
    for factors in layout.unpack(rows).factors.values():
        assert lora_ranks_of(factors).tolist() == [1, 2]
        assert not factors.B[0, :, 1:].any()
        assert not factors.B[1, :, 2:].any()


def test_half_precision_scales_the_loss_and_what_overflows_counts_as_zero() -> None:
    rule = GradientRule(clip_norm=1.0, loss_scale=8.0)
    gradient = torch.tensor([[0.8, 1.6], [torch.inf, 1.0], [80.0, 0.0]])
    rule.apply(gradient, torch.zeros_like(gradient))
    assert torch.allclose(gradient, torch.tensor([[0.1, 0.2], [0.0, 0.0], [1.0, 0.0]]))

    def trained(scale: float, autocast: Callable[[], AbstractContextManager[object]]) -> Tensor:
        m = model()
        steps = cohort_steps(batches([np.arange(20)], SGD))
        cohort = Cohort(m.adapters.draw(0, 0).unsqueeze(0), steps, [seeded(0)])
        return LocalTraining(m, LABELS, SGD, autocast=autocast, loss_scale=scale).train(cohort, images_of(steps)).rows

    exact = trained(1.0, nullcontext)
    assert torch.allclose(trained(4096.0, nullcontext), exact, rtol=1e-4, atol=1e-7)
    half = trained(4096.0, lambda: torch.autocast("cpu", torch.float16))
    assert 0 < (half - exact).norm() / exact.norm() < 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("config", [MODEL, MIXER], ids=["vit", "mixer"])
@pytest.mark.parametrize("last_blocks", [None, 2])
def test_gradient_checkpointing_and_compilation_change_no_bit(config: ModelConfig, last_blocks: int | None) -> None:
    config = replace(config, lora=replace(config.lora, last_blocks=last_blocks))
    rows = []
    for changed in (config, replace(config, gradient_checkpointing=True), config):
        m = build_model(changed, classes=3, seed=0).attach()
        if len(rows) == 2:
            m.compile(backend="eager")
        steps = cohort_steps(batches([np.arange(9)], SGD))
        inputs = images_of(steps) if last_blocks is None else (m.embed(images) for images in images_of(steps))
        cohort = Cohort(m.adapters.draw(0, 0).unsqueeze(0), steps, [seeded(0)])
        rows.append(LocalTraining(m, LABELS, SGD).train(cohort, inputs).rows)
    assert torch.equal(rows[1], rows[0])
    assert torch.equal(rows[2], rows[0])
    assert not torch.equal(rows[0][0], m.adapters.draw(0, 0))


def test_options_of_the_computation_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"gradient_checkpointing=true does not fit model\.lora\.dropout=0\.1"):
        build_model(
            replace(MODEL, gradient_checkpointing=True, lora=replace(MODEL.lora, dropout=0.1)), classes=3, seed=0
        )
    with pytest.raises(ConfigError, match=r"model\.compile=turbo is no backend .*inductor"):
        check_model(replace(MODEL, compile="turbo"))
    with pytest.raises(ConfigError, match=r"fabric\.precision=16-mixed is for GPUs"):
        make_fabric(load_config(["fabric.accelerator=cpu", "fabric.precision=16-mixed"]).fabric)


@pytest.mark.parametrize("parts", [PARTS, ("A", "head")])
def test_a_client_with_a_scaling_of_its_own_trains_as_a_model_of_its_rank(parts: tuple[Part, ...]) -> None:
    """alpha / r_k: beside others in a model of LoRA rank 4, against alone in one of rank 2, by plain SGD."""
    config = replace(SGD, momentum=0.0, proximal=0.3)
    large, plan = model(2), batches([np.arange(13), np.arange(13, 26)], config)
    start = large.adapters.draw(0, 0).repeat(2, 1)
    layout = large.adapters.layout
    start[:, layout.slices["B"]] = torch.randn(layout.length_of(("B",)), generator=seeded(0, "B"))
    start = layout.truncated(start, torch.tensor([2, 4]))
    cohort = Cohort(start, cohort_steps(plan), generators=[], scales=torch.tensor([2.0, 1.0]))
    training = LocalTraining(large, LABELS, config, parts)
    found = layout.unpack(training.train(cohort, images_of(list(cohort.steps))).rows)

    small = build_model(replace(MODEL, lora=replace(MODEL.lora, rank=2)), classes=3, seed=0).attach("cpu", 1)
    sent = layout.unpack(start[0])
    own = {path: LoRAFactors(A=f.A[:2], B=f.B[:, :2] / 2) for path, f in sent.factors.items()}
    alone = Cohort(small.adapters.layout.pack(AdapterState(own, sent.head)).unsqueeze(0), cohort_steps(plan[:1]), [])
    [row] = LocalTraining(small, LABELS, config, parts).train(alone, images_of(list(alone.steps))).rows
    expected = small.adapters.layout.unpack(row)
    for path, factors in found.factors.items():
        torch.testing.assert_close(factors.A[0, :2], expected.factors[path].A, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(factors.B[0, :, :2], 2 * expected.factors[path].B, rtol=1e-4, atol=1e-6)
        assert not factors.A[0, 2:].any()
    torch.testing.assert_close(found.head["head.weight"][0], expected.head["head.weight"], rtol=1e-4, atol=1e-6)
    other = Cohort(start[1:], cohort_steps(plan[1:]), generators=[])
    large.adapters.resize(1)
    [unscaled] = training.train(other, images_of(list(other.steps))).rows
    torch.testing.assert_close(layout.pack(row_of(found, 1)), unscaled, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("config", [SGD, ADAMW, PROXIMAL], ids=["sgd", "adamw", "proximal"])
def test_directions_that_are_not_chosen_stay_and_take_part_as_if_folded(config: ClientConfig) -> None:
    """Beside one of all directions: a smaller adapter on frozen weights that hold the others trains the same."""
    m, chosen = model(cohort=2), torch.tensor([[False, True, False, True], [True] * 4])
    layout, own = m.adapters.layout, torch.tensor([False, True, False, True])
    start = torch.randn(layout.length, generator=seeded(0, "start")) * 0.1
    of_clients = batches([np.arange(13), np.arange(20, 31)], config)
    steps = cohort_steps(of_clients)
    cohort = Cohort(start.expand(2, -1), steps, [seeded(0, k) for k in range(2)], fixed=layout.outside(chosen))
    trained = LocalTraining(m, LABELS, config).train(cohort, images_of(steps)).rows
    sent, reached = layout.unpack(start), row_of(layout.unpack(trained), 0)
    small = replace(MODEL.lora, rank=2, alpha=MODEL.lora.alpha / 2)
    folded = build_model(replace(MODEL, lora=small), classes=3, seed=0).attach("cpu", 1)
    others = {path: LoRAFactors(A=f.A[~own], B=f.B[:, ~own]) for path, f in sent.factors.items()}
    for path, f in others.items():
        assert torch.equal(reached.factors[path].A[~own], f.A)
        assert torch.equal(reached.factors[path].B[:, ~own], f.B)
    folded.adapters.fold_into_base(others)
    mine = {path: LoRAFactors(A=f.A[own], B=f.B[:, own]) for path, f in sent.factors.items()}
    first, alone = folded.adapters.layout.pack(AdapterState(mine, sent.head)), cohort_steps(of_clients[:1])
    small_cohort = Cohort(first.unsqueeze(0), alone, [seeded(0, 0)])
    result = LocalTraining(folded, LABELS, config).train(small_cohort, images_of(alone)).rows
    expected = folded.adapters.layout.unpack(result[0])
    for path, f in expected.factors.items():
        torch.testing.assert_close(reached.factors[path].A[own], f.A, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(reached.factors[path].B[:, own], f.B, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(reached.head["head.weight"], expected.head["head.weight"], rtol=1e-3, atol=1e-4)
