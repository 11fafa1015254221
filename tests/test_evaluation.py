"""Accuracy and loss: every test image once, equal to brute force, the same on any number of ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError, MulticlassF1Score

from lorafair.config.schema import LoRAConfig, ModelConfig
from lorafair.data.images import ImageData, ImagesInMemory, Split
from lorafair.data.loading import Indices
from lorafair.errors import LorafairError
from lorafair.evaluation import Evaluation, Evaluator, register_metric
from lorafair.model.adapted_model import AdaptedModel
from lorafair.model.backbone import build_model
from lorafair.registry import METRICS
from lorafair.seeding import seeded
from tests.conftest import launched, run_ranks

CONFIG = ModelConfig(name="test_vit", weights="random", image_size=32, lora=LoRAConfig(rank=2))
IMAGES = torch.randint(0, 256, (53, 3, 32, 32), dtype=torch.uint8, generator=seeded(0, "images"))
LABELS = torch.randint(0, 4, (53,), generator=seeded(0, "labels")).numpy()
DOMAINS = np.array([0] * 20 + [2] * 10 + [1] * 23)


IN_MEMORY = ImagesInMemory(np.zeros((53, 1, 1, 3), np.uint8))  # not read: batches come from Source
SPLIT = Split(IN_MEMORY, LABELS, DOMAINS)
DATA = ImageData("made-up", ("photo", "sketch", "art"), ("a", "b", "c", "d"), SPLIT, SPLIT, "made up", "none")


class Source:
    def batches(self, indices: list[Indices]) -> Any:
        return (IMAGES[i] for i in indices)


def model() -> AdaptedModel:
    return build_model(CONFIG, classes=4, seed=0).attach("cpu")


def adapters(m: AdaptedModel, count: int) -> torch.Tensor:
    return torch.stack([m.adapters.draw(seed, 0) * 20 for seed in range(count)])


def evaluated(fabric: Any, count: int) -> Evaluation:
    m = model()
    evaluator = Evaluator(fabric, Source(), DATA, batch_size=8)
    found = evaluator(m, adapters(m, count))
    assert found.hits is not None
    assert found.macro_f1 is not None
    assert found.calibration_error is not None
    return Evaluation(  # plain arrays travel
        *(t.numpy() for t in (found.accuracy, found.loss, found.confusion)), {},
        *(t.numpy() for t in (found.hits, found.macro_f1, found.calibration_error)),
    )  # fmt: skip


def test_equal_to_brute_force() -> None:
    m = model()
    found = Evaluator(launched(1), Source(), DATA, batch_size=8)(m, adapters(m, 2))
    for index, adapter in enumerate(adapters(m, 2)):
        m.adapters.write(adapter)
        for domain in range(3):
            logits = torch.cat([m(IMAGES[i : i + 1]) for i in np.flatnonzero(domain == DOMAINS)])
            labels = torch.from_numpy(LABELS[domain == DOMAINS])
            right = (logits.argmax(1) == labels).double().mean()
            assert found.accuracy[index, domain] == right
            loss = torch.nn.functional.cross_entropy(logits.double(), labels)
            assert found.loss[index, domain].item() == pytest.approx(loss.item(), rel=1e-5)
    assert found.confusion.sum() == 2 * 53
    assert found.mean_accuracy == pytest.approx(found.accuracy.mean().item())


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 3])
def test_the_same_on_1_2_and_3_ranks(count: int) -> None:
    results = [found for world_size in (1, 2, 3) for found in run_ranks(world_size, evaluated, count)]
    for found in results[1:]:
        assert np.array_equal(found.accuracy, results[0].accuracy)
        assert np.array_equal(found.loss, results[0].loss)
        assert np.array_equal(found.confusion, results[0].confusion)
        assert np.array_equal(found.hits, results[0].hits)
        assert np.array_equal(found.macro_f1, results[0].macro_f1)
        assert np.array_equal(found.calibration_error, results[0].calibration_error)


class Seen(Metric):
    """Keeps what it was shown: by domain and client, the number of images and the sum of their true classes' logits."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, float] = {}

    def update(self, logits: torch.Tensor, labels: torch.Tensor, domain: int, client: int | None) -> None:
        key = f"{domain}-{client}"
        self.counts[f"images-{key}"] = self.counts.get(f"images-{key}", 0) + len(labels)
        own = logits.gather(1, labels.unsqueeze(1)).sum()
        self.counts[f"logits-{key}"] = self.counts.get(f"logits-{key}", 0.0) + float(own)

    def compute(self) -> dict[str, float]:
        return self.counts


@pytest.fixture
def metrics() -> Iterator[None]:
    register()
    yield
    for name in ("top2", "seen", "vector", "broken"):
        METRICS.remove(name)


def register() -> None:
    register_metric("top2")(top2)
    register_metric("seen")(seen)
    register_metric("vector")(vector)
    register_metric("broken")(broken)


def top2(classes: int) -> Metric:
    return MulticlassAccuracy(classes, top_k=2, average="micro")


def seen(classes: int) -> Metric:
    return Seen()


def vector(classes: int) -> Metric:
    return MulticlassAccuracy(classes, average=None)


def broken(classes: int) -> Metric:
    return MulticlassAccuracy(classes + 1, top_k=7, average="micro")


def with_metrics(fabric: Any, count: int, names: tuple[str, ...]) -> dict[str, float]:
    register()
    m = model()
    return Evaluator(fabric, Source(), DATA, batch_size=8, metrics=names)(m, adapters(m, count)).metrics


def test_a_metric_of_a_plug_in_is_fed_with_all_answers(metrics: None) -> None:
    m = model()
    found = Evaluator(launched(1), Source(), DATA, batch_size=8, metrics=["top2", "seen"])(m, adapters(m, 2)).metrics
    right = torch.zeros(2, 3, 2)  # adapter, domain, (right, all)
    for index, adapter in enumerate(adapters(m, 2)):
        m.adapters.write(adapter)
        for domain in range(3):
            members = np.flatnonzero(domain == DOMAINS)
            logits, labels = m(IMAGES[members]), torch.from_numpy(LABELS[members])
            among = (logits.topk(2).indices == labels.unsqueeze(1)).any(1).sum()
            right[index, domain] = torch.tensor([float(among), len(members)])
            assert found[f"seen/images-{domain}-{index}"] == len(members)
            own = logits.gather(1, labels.unsqueeze(1)).sum()
            assert found[f"seen/logits-{domain}-{index}"] == pytest.approx(own.item(), rel=1e-4)
    total = right.sum((0, 1))
    assert found["top2"] == pytest.approx(float(total[0] / total[1]))
    for domain, name in enumerate(DATA.domains):
        of_domain = right[:, domain].sum(0)
        assert found[f"top2/{name}"] == pytest.approx(float(of_domain[0] / of_domain[1]))
    one = Evaluator(launched(1), Source(), DATA, batch_size=8, metrics=["seen"])(m, adapters(m, 1)).metrics
    assert set(one) == {f"seen/{kind}-{domain}-None" for kind in ("images", "logits") for domain in range(3)}


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 3])
def test_metrics_of_plug_ins_are_the_same_on_1_2_and_3_ranks(count: int) -> None:
    results = [r for world_size in (1, 2, 3) for r in run_ranks(world_size, with_metrics, count, ("top2", "seen"))]
    assert results[0]
    assert all(result == results[0] for result in results[1:])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vector", r"evaluation\.metrics: vector computes a tensor of shape \(4,\); a metric computes one number"),
        ("broken", r"evaluation\.metrics: broken failed: "),
    ],
)
def test_a_metric_that_cannot_be_used_is_named(name: str, message: str, metrics: None) -> None:
    m = model()
    with pytest.raises(LorafairError, match=message):
        Evaluator(launched(1), Source(), DATA, batch_size=8, metrics=[name])(m, adapters(m, 1))


def test_a_metric_cannot_take_the_name_of_what_every_run_has() -> None:
    with pytest.raises(LorafairError, match="there is a metric accuracy already"):
        register_metric("accuracy")(top2)


def test_balanced_accuracy_is_the_mean_recall_of_the_classes_there_are() -> None:
    """Against torchmetrics, class by class; and by hand where one has no images."""
    m = model()
    found = Evaluator(launched(1), Source(), DATA, batch_size=8)(m, adapters(m, 2))
    recalls = torch.zeros(2, 3)
    for index, adapter in enumerate(adapters(m, 2)):
        m.adapters.write(adapter)
        for domain in range(3):
            labels = torch.from_numpy(LABELS[domain == DOMAINS])
            recall = MulticlassAccuracy(4, average=None)(m(IMAGES[domain == DOMAINS]), labels)
            recalls[index, domain] = recall[labels.unique()].mean()
    torch.testing.assert_close(found.balanced_accuracy, recalls.mean(0).double(), rtol=0, atol=1e-6)
    assert found.most_frequent_answer is None, "two adapters may have one each"

    confusion = torch.tensor([[[6, 0, 0], [2, 1, 1], [0, 0, 0]]])
    one = Evaluation(torch.tensor([[0.7]]), torch.zeros(1, 1), confusion)
    assert one.balanced_accuracy.tolist() == [(1 + 1 / 4) / 2], "nobody can recall a class without images"
    assert one.recall[0, :2].tolist() == [1, 1 / 4]
    assert one.recall[0, 2].isnan()
    assert one.majority_class.tolist() == [0.6]
    assert one.most_frequent_answer is not None
    assert one.most_frequent_answer.tolist() == [0.8]


@pytest.mark.parametrize("scale", [1.0, 40.0])  # confidences of all bins, and some that are exactly 1
def test_f1_and_calibration_are_those_of_torchmetrics_and_of_the_definitions(scale: float) -> None:
    m = model()
    packed = adapters(m, 2)
    packed[:, m.adapters.layout.slices["head"]] *= scale
    found = Evaluator(launched(1), Source(), DATA, batch_size=8)(m, packed)
    assert found.macro_f1 is not None
    assert found.calibration_error is not None
    assert found.recall_of_adapters is not None
    for index, adapter in enumerate(packed):
        m.adapters.write(adapter)
        for domain in range(3):
            batches = np.array_split(np.flatnonzero(domain == DOMAINS), range(8, (domain == DOMAINS).sum(), 8))
            with torch.inference_mode():
                logits = torch.cat([m(IMAGES[batch]) for batch in batches])
            labels = torch.from_numpy(LABELS[domain == DOMAINS])
            f1, error = float(found.macro_f1[index, domain]), float(found.calibration_error[index, domain])
            assert f1 == pytest.approx(float(MulticlassF1Score(4, average="macro")(logits, labels)), abs=1e-6)
            assert error == pytest.approx(float(MulticlassCalibrationError(4)(logits, labels)), abs=1e-6)
            assert f1 == pytest.approx(macro_f1_of(logits.argmax(1).numpy(), labels.numpy()))
            assert error == pytest.approx(calibration_error_of(logits.softmax(1).numpy(), labels.numpy()), abs=1e-9)
            recall = [(logits.argmax(1) == labels)[labels == c].double().mean() for c in range(4)]
            assert found.recall_of_adapters[index, domain].tolist() == [float(value) for value in recall]


def macro_f1_of(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Of the classes in either, as scikit-learn's f1_score(average="macro")."""
    found = []
    for c in set(predicted) | set(labels):
        right = ((predicted == c) & (labels == c)).sum()
        precision, recall = right / max(1, (predicted == c).sum()), right / max(1, (labels == c).sum())
        found.append(2 * precision * recall / (precision + recall) if right else 0.0)
    return float(np.mean(found))


def calibration_error_of(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """With 15 bins of equal width, image by image; a confidence of 1 has a bin of its own."""
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    bins = [int(np.searchsorted(np.linspace(0, 1, 16, dtype=np.float32), c, side="right")) for c in confidence]
    members = [[i for i, b in enumerate(bins) if b == bin] for bin in set(bins)]
    errors = [abs(np.mean([float(right[i]) - float(confidence[i]) for i in of_bin])) for of_bin in members]
    return float(sum(len(of_bin) * error for of_bin, error in zip(members, errors, strict=True)) / len(labels))
