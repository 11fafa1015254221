"""Which tensors of a checkpoint are the model's: the section, what stands before its names, and what is left out.

Names are compared with those of the model, so no prefix has to be known: what a wrapper, a training program or a
framework has put before them is whatever stands before the model's own names.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from lorafair.model.weights.files import WeightsError
from lorafair.model.weights.layouts import LAYOUTS, renamed

# Where several sections hold the model, the first of these is taken: weights averaged over the training before others,
# as timm's loaders do and DINO's evaluation does.
_ORDER = (
    "state_dict_ema", "model_ema", "ema_state_dict", "model_ema_state_dict", "params_ema", "ema_model", "ema",
    "teacher", "state_dict", "model", "encoder", "base_encoder", "encoder_q", "student",
)  # fmt: skip
_WRAPPERS = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile
_INNER_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")  # of single blocks, too
_ENOUGH = 0.5  # of the model's tensors have to be found by name, else names are converted
_ALIKE = 0.9  # of the tensors of the best section: such a section holds the model, too

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Selected:
    """The tensors of the model, under the model's names or names that timm converts, and how they were found."""

    tensors: dict[str, Tensor]
    section: str = ""  # a group in the file, with dots between nested ones; empty: the whole file
    prefix: str = ""  # what stood before each name
    layout: str = ""  # whose names were converted; empty: none
    wrappers: tuple[str, ...] = ()  # parts within the names that were removed
    others: tuple[str, ...] = ()  # sections that hold the model, too
    left_out: Mapping[str, int] = field(default_factory=dict)  # how many tensors, by the beginning of their names

    def __str__(self) -> str:
        """How they were found, for one line; empty where the file holds them as they are."""
        section = f"section {self.section}" if self.section else ""
        if self.others:
            section = (
                f"{section or 'the whole file'} and not {' or '.join(self.others)} (model.weights_section chooses)"
            )
        removed = f"{self.prefix} removed from the names" if self.prefix else ""
        within = f"{' and '.join(self.wrappers)} removed within the names" if self.wrappers else ""
        converted = f"names of {self.layout} converted" if self.layout else ""
        return ", ".join(part for part in (section, removed, within, converted) if part)


def select(content: Mapping[str, Any], shapes: Shapes, wanted: str | None, path: Path) -> Selected:
    """The tensors of a file's content that belong to a model with parameters of these names and shapes.

    `wanted`: the section that the user has named. Raises WeightsError where there is no such section, and where two
    hold the model alike.
    """
    tensors, groups = _flat(content)
    if not tensors:
        raise WeightsError(f"model.weights={path} holds no state dict: names and tensors, alone or in a group")
    tensors, wrappers = _unwrapped(tensors, shapes)
    selected = _select(tensors, groups, shapes, wanted, path)
    return replace(selected, wrappers=wrappers)


def _select(
    tensors: Mapping[str, Tensor], groups: Counter[str], shapes: Shapes, wanted: str | None, path: Path
) -> Selected:
    best: list[str] = []
    for layout in ("", *LAYOUTS):
        flat = renamed(tensors, layout) if layout else tensors
        places = _places(flat, shapes)
        best = best or places
        if (chosen := _chosen(places, wanted, path)) is not None:
            others = tuple(place.rstrip(".") for place in places if place != chosen)
            return _selected(flat, groups, chosen, others, layout)
    return _selected(tensors, groups, _chosen_group(tensors, groups, wanted, best, path), (), "")


def _flat(content: Mapping[str, Any]) -> tuple[dict[str, Tensor], Counter[str]]:
    """Tensors by name, with the names of the groups around them before it; and how many lie in each group."""
    tensors: dict[str, Tensor] = {}
    groups: Counter[str] = Counter()

    def walk(group: Mapping[Any, Any], before: str) -> None:
        for name, value in group.items():
            if isinstance(value, Mapping):
                walk(value, f"{before}{name}.")
            elif isinstance(value, Tensor):
                tensors[f"{before}{name}"] = value
                groups[before] += 1

    walk(content, "")
    return tensors, groups


def _unwrapped(tensors: dict[str, Tensor], shapes: Shapes) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The tensors without the wrappers of single blocks in their names, and these: blocks.0._orig_mod.norm1.weight.

    Wrappers before the model's names stay: they are of what is found before them.
    """
    of_model = {part for name in shapes for part in name.split(".")}
    found: dict[str, Tensor] = {}
    removed: dict[str, None] = {}
    for name, tensor in tensors.items():
        kept: list[str] = []
        for part in name.split("."):
            if part in _INNER_WRAPPERS and kept and kept[-1] in of_model:
                removed[part] = None
            else:
                kept.append(part)
        found[".".join(kept)] = tensor
    return (found, tuple(removed)) if len(found) == len(tensors) else (tensors, ())


def _places(flat: Mapping[str, Tensor], shapes: Shapes) -> list[str]:
    """What stands before the model's names, one for each time that the model is in the file; the best first.

    Places are compared by the tensors that have the model's names and shapes: the text tower beside an image tower has
    the names alone.
    """
    named, fitting = Counter[str](), Counter[str]()
    for name, tensor in flat.items():
        for start in _starts(name):
            if (shape := shapes.get(name[start:])) is not None:
                named[name[:start]] += 1
                fitting[name[:start]] += tuple(tensor.shape) == shape
    places = [place for place, count in named.items() if count >= _ENOUGH * len(shapes)]
    most = max((fitting[place] for place in places), default=0)
    places = [place for place in places if fitting[place] >= _ALIKE * most]
    most = max((named[place] for place in places), default=0)
    return sorted((place for place in places if named[place] >= _ALIKE * most), key=_order)


def _starts(name: str) -> Iterator[int]:
    """Where a part of a dotted name begins."""
    yield 0
    yield from (i + 1 for i, letter in enumerate(name) if letter == ".")


def _order(place: str) -> tuple[int, ...]:
    """Sorts places: those first whose parts are known earlier in `_ORDER`."""
    return tuple(sorted(_ORDER.index(part) if part in _ORDER else len(_ORDER) for part in place.rstrip(".").split(".")))


def _chosen(places: list[str], wanted: str | None, path: Path) -> str | None:
    """The place to take; None where there is none. WeightsError where nothing tells which of several."""
    if wanted is not None:
        places = [place for place in places if f".{wanted}." in f".{place}"]
    if not places:
        return None
    first, *others = places
    if others and _order(others[0])[: len(_order(first))] == _order(first)[: len(_order(others[0]))]:
        raise _several(places, path)
    return first


def _several(places: list[str], path: Path) -> WeightsError:
    names = [place.rstrip(".") for place in places]
    return WeightsError(
        f"model.weights={path} holds {len(names)} models; choose one: "
        + " or ".join(f"model.weights_section={name}" for name in names[:4] if name)
    )


def _chosen_group(
    tensors: Mapping[str, Tensor], groups: Counter[str], wanted: str | None, places: list[str], path: Path
) -> str:
    """The group whose names are left to timm's conversion, with the wrappers' prefixes that all of its names have."""
    named = [group for group in groups if wanted is None or f".{wanted}." in f".{group}"]
    if not named:
        there = ", ".join(place.rstrip(".") or "the whole file" for place in places or sorted(groups, key=_order)[:5])
        raise WeightsError(
            f"model.weights_section={wanted}: {path} has no such section with tensors; there are: {there}"
        )
    chosen = min(named, key=lambda group: (min(_order(group)), -groups[group]))
    while wrapper := next(
        (w for w in _WRAPPERS if all(name.startswith(chosen + w) for name in tensors if name.startswith(chosen))), ""
    ):
        chosen += wrapper
    return chosen


def _selected(
    flat: Mapping[str, Tensor], groups: Counter[str], place: str, others: tuple[str, ...], layout: str
) -> Selected:
    section = max((group for group in groups if place.startswith(group)), key=len, default="")
    return Selected(
        tensors={name.removeprefix(place): tensor for name, tensor in flat.items() if name.startswith(place)},
        section=section.rstrip("."),
        prefix=place.removeprefix(section),
        layout=layout,
        others=others,
        left_out=Counter(_beside(name, place) for name in flat if not name.startswith(place)),
    )


def _beside(name: str, place: str) -> str:
    """The beginning of a name, up to the part in which it differs from the place."""
    parts, of_place = name.split("."), place.split(".")
    same = next((i for i, (part, other) in enumerate(zip(parts, of_place, strict=False)) if part != other), 0)
    return ".".join(parts[: same + 1])
