"""Which Linear layers of timm's families can be adapted, proven by numbers; and whether the exported line runs.

Of every family (a file of timm) it takes the smallest architecture with Linear layers, and the next larger ones as long
as they have kinds of layers that the smaller ones lack, with random weights at the smallest image size that they
accept. Each kind of layer is adapted: two clients side by side must give the logits and gradients of each alone, or be
refused in a line. Then the model is exported, and the line that export prints must give its logits. Example:

    python benchmarks/families.py --families swin_transformer_v2 beit eva
    python benchmarks/families.py --models test_vit levit_128s
"""

from __future__ import annotations

import argparse
import fnmatch
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from lorafair import third_party
from lorafair.commands.export import TrainedModel, write_merged
from lorafair.config import Config, LoRAConfig, ModelConfig
from lorafair.errors import LorafairError
from lorafair.model.adapted_model import AdaptedModel
from lorafair.model.backbone import build_model, check_model
from lorafair.model.lora import kind_of
from lorafair.seeding import seeded

third_party.make_torchvision_importable()

import timm  # noqa: E402

SIZES = (32, 64, 96, 128, 160, 192, 224, 256, 288, 384)
CLASSES = 3
TOLERANCE = 1e-6  # of the largest number, in float64; some architectures compute parts in float32
EXPORT_TOLERANCE = 1e-3


@dataclass
class Finding:
    """What came out for one architecture."""

    family: str
    name: str
    size: int | None = None
    works: dict[str, float] = field(default_factory=dict)  # kind of layer -> largest relative difference
    refused: dict[str, str] = field(default_factory=dict)  # kind of layer, or "" for the architecture -> the message
    exported: str = ""
    failures: list[str] = field(default_factory=list)  # there should be none


def on_meta(name: str) -> nn.Module | None:
    """A model without numbers; None where timm needs something that is not installed."""
    try:
        with torch.device("meta"):
            model: nn.Module = timm.create_model(name, num_classes=CLASSES)
    except Exception as error:
        print(f"{name}: left out, timm cannot make it ({type(error).__name__}: {error})", file=sys.stderr)
        return None
    return model


def kinds_of(model: nn.Module) -> dict[str, list[str]]:
    """Paths of the Linear layers by kind, without the classifier."""
    head = getattr(model, "get_classifier", lambda: None)()
    kinds: dict[str, list[str]] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head:
            kinds.setdefault(kind_of(path), []).append(path)
    return kinds


def end_of(kind: str) -> str:
    """attn.proj of blocks.*.attn.proj."""
    return kind.rpartition("*.")[2]


def ends(model: nn.Module) -> set[str]:
    """Ends of the layers' paths; what differs between architectures beyond that is their nesting."""
    return {end_of(kind) for kind in kinds_of(model)}


def architectures(patterns: list[str], most: float) -> Iterator[tuple[str, str]]:
    """(family, name) of the architectures to go through."""
    for family in sorted(timm.list_modules()):
        if not any(fnmatch.fnmatch(family, pattern) for pattern in patterns):
            continue
        models = {name: model for name in timm.list_models(module=family) if (model := on_meta(name)) is not None}
        sizes = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
        seen: set[str] = set()
        for name in sorted(models, key=lambda name: (sizes[name], name)):
            if not (new := ends(models[name]) - seen):
                continue
            seen |= new
            if sizes[name] <= most:
                yield family, name
            else:
                print(f"{name}: left out, it has {sizes[name] / 1e6:.0f} million parameters", file=sys.stderr)


def accepted_size(config: ModelConfig) -> int | None:
    """The smallest image size of SIZES that the backbone accepts, None for its own."""
    for size in SIZES:
        try:
            check_model(replace(config, image_size=size))
        except LorafairError as error:
            if not str(error).startswith("model.image_size"):
                raise
        else:
            return size
    return None


def examine(family: str, name: str) -> Finding:
    """Go through the kinds of layers of one architecture."""
    found = Finding(family, name)
    plain = on_meta(name)
    assert plain is not None
    kinds = kinds_of(plain)
    config = ModelConfig(name=name, weights="random", lora=LoRAConfig(rank=1, targets=("*",)))
    for kind, paths in kinds.items():
        of_kind = replace(config, lora=replace(config.lora, targets=tuple(paths)))
        try:
            if found.size is None:
                found.size = accepted_size(of_kind)
            check_model(replace(of_kind, image_size=found.size))
            found.works[kind] = 0.0
        except LorafairError as error:
            found.refused[kind] = str(error)
    config = replace(config, image_size=found.size)
    separate(found, config, kinds)
    if found.works:
        compare(found, config, kinds)
        export(found, config, kinds)
    return found


def targets(found: Finding, kinds: dict[str, list[str]]) -> tuple[str, ...]:
    return tuple(path for kind in found.works for path in kinds[kind])


def separate(found: Finding, config: ModelConfig, kinds: dict[str, list[str]]) -> None:
    """Move the kinds that are refused for clients side by side; one by one where all together are refused."""

    def refusal(paths: tuple[str, ...]) -> str:
        try:
            build_model(replace(config, lora=replace(config.lora, targets=paths)), CLASSES, 0).attach(max_cohort=2)
        except LorafairError as error:
            return str(error)
        return ""

    if found.works and refusal(targets(found, kinds)):
        for kind in list(found.works):
            if message := refusal(tuple(kinds[kind])):
                found.refused[kind] = message
                del found.works[kind]


def awake(model: AdaptedModel) -> AdaptedModel:
    """Frozen weights that are all zero, such as those of Swin V2's norms at the start, would hide what comes before."""
    for name, parameter in model.backbone.named_parameters():
        if not parameter.requires_grad and not parameter.any():
            parameter.data.normal_(0, 0.5, generator=seeded(0, name))
    return model


def compare(found: Finding, config: ModelConfig, kinds: dict[str, list[str]]) -> None:
    """Logits and gradients of two clients side by side against each alone, for all accepted kinds at once."""
    config = replace(config, lora=replace(config.lora, targets=targets(found, kinds)))
    torch.set_default_dtype(torch.float64)
    try:
        model = exact(awake(build_model(config, CLASSES, 0))).attach(max_cohort=2)
        compare_clients(found, model)
    finally:
        torch.set_default_dtype(torch.float32)


def exact(model: AdaptedModel) -> AdaptedModel:
    """With images in float64, as its weights are."""
    normalize = model.normalize
    model.normalize = lambda images: normalize(images).double()  # type: ignore[method-assign]
    return model


def compare_clients(found: Finding, model: AdaptedModel) -> None:
    """As `compare` says; the factors of two clients are different and not zero."""
    adapters, layout = model.adapters, model.adapters.layout
    rows = torch.randn(2, layout.length, generator=seeded(0, "rows")) * 0.1
    images = made_up(model)

    def passed(which: slice) -> tuple[Tensor, Tensor]:
        adapters.resize(len(rows[which]))
        adapters.write(rows[which])
        assert adapters.flat.grad is not None
        adapters.flat.grad.zero_()
        logits = model(images[which])
        logits.square().sum().backward()
        return logits.detach(), adapters.flat.grad.clone()

    together = passed(slice(0, 2))
    alone = [torch.cat(parts) for parts in zip(passed(slice(0, 1)), passed(slice(1, 2)), strict=True)]
    difference = relative(together[0], alone[0])
    if not difference < TOLERANCE:
        found.failures.append(f"logits differ by {difference:.1e}")
    largest = float(alone[1].abs().max())  # at a small size some have none: attention to a single token is constant
    of_both, of_each = layout.unpack(together[1]).factors, layout.unpack(alone[1]).factors
    for path, factors in of_each.items():
        kind = kind_of(path)
        for mine, other in ((of_both[path].A, factors.A), (of_both[path].B, factors.B)):
            difference = float((mine - other).abs().max()) / max(float(other.abs().max()), 1e-6 * largest)
            found.works[kind] = max(found.works[kind], difference)
        if not found.works[kind] < TOLERANCE:
            found.failures.append(f"{path}: gradients differ by {found.works[kind]:.1e}")


def made_up(model: AdaptedModel) -> Tensor:
    size = model.image_size
    return torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8, generator=seeded(0, "images"))


def relative(mine: Tensor, other: Tensor) -> float:
    return float((mine - other).abs().max() / other.abs().max().clamp(min=1e-12))


def export(found: Finding, config: ModelConfig, kinds: dict[str, list[str]]) -> None:
    """Run the line that `lorafair export` prints, in a fresh namespace, and compare its logits."""
    config = replace(config, lora=replace(config.lora, targets=targets(found, kinds)))
    model = awake(build_model(config, CLASSES, 0)).attach()
    model.adapters.write(torch.randn(model.adapters.layout.length, generator=seeded(0, "row")) * 0.1)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        images = made_up(model)
        expected = model(images)
        line = write_merged(TrainedModel(Config(model=config), model, CLASSES, folded=False), Path(folder))
        found.exported = "img_size" if "img_size" in line else "plain"
        try:
            again = eval(line, {"timm": timm}).eval()
            difference = relative(again(model.normalize(images)), expected)
        except Exception as error:
            found.failures.append(f"{line}: {type(error).__name__}: {error}")
            return
    if not difference < EXPORT_TOLERANCE:
        found.failures.append(f"exported: logits differ by {difference:.1e}")


def short(kinds: dict[str, object]) -> str:
    """Ends of paths, each once."""
    return ", ".join(dict.fromkeys(map(end_of, kinds))) or "-"


def line_of(found: Finding) -> str:
    worst = max(found.works.values(), default=0.0)
    cells = [
        found.family, found.name, str(found.size or "own"), short({**found.works}), short({**found.refused}),
        f"{worst:.0e}", found.exported or "-",
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=["*"], metavar="PATTERN", help="files of timm (all)")
    parser.add_argument("--models", nargs="+", metavar="NAME", help="these architectures instead")
    parser.add_argument("--millions", type=float, default=150, help="of parameters, at most (150)")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    chosen = (
        [("", name) for name in options.models]
        if options.models
        else architectures(options.families, 1e6 * options.millions)
    )
    print(f"timm {timm.__version__}, torch {torch.__version__}, {options.threads} CPU threads\n")
    print("| family | architecture | px | can be adapted | refused | largest relative difference | exported line |")
    print("|---|---|---|---|---|---|---|", flush=True)
    failures, messages = [], []
    for family, name in chosen:
        try:
            found = examine(family, name)
        except Exception as error:
            failures.append(f"{name}: crashed with {type(error).__name__}: {error}")
            continue
        print(line_of(found), flush=True)
        failures += [f"{name}: {failure}" for failure in found.failures]
        messages += [f"{name}: {message}" for message in dict.fromkeys(found.refused.values())]
    print("\nRefusals:\n" + "\n".join(messages))
    print("\nFailures:\n" + ("\n".join(failures) or "none"))
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
