"""The look of methods in figures: one colour, marker and line style each. Nothing heavy is imported.

The colours are those of Okabe and Ito, which readers with any kind of colour vision tell apart
(https://jfly.uni-koeln.de/color/; Wong, Nature Methods 8, 441, 2011), without the yellow, which is too light for a line
on white paper, and with a grey. In print without colours the marker and the line style tell the methods apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Literal

COLOURS = {
    "blue": "#0072B2", "black": "#000000", "vermilion": "#D55E00", "green": "#009E73", "purple": "#CC79A7",
    "orange": "#E69F00", "sky": "#56B4E9", "grey": "#7F7F7F",
}  # fmt: skip
# The colour that a shipped method has in every figure, unless a method named before it has taken the colour.
_OF_METHOD = {
    "lora_fair": "blue", "fedit": "black", "fedex_lora": "vermilion", "ffa_lora": "green", "flora": "purple",
    "flex_lora": "orange", "fedsa_lora": "sky", "centralized": "grey", "local_only": "grey",
    "fedrot_lora": "sky", "fedrpca": "purple", "fedsvd": "green", "florist": "orange", "het_lora": "vermilion",
    "raflora": "sky", "rbla": "purple", "ro_lora": "green", "flora_na": "purple", "fedmomentum": "orange",
    "frlora": "vermilion", "ravan": "sky", "fed_sb": "green", "fed_plora": "orange", "fed_alora": "sky",
    "la_lora": "vermilion", "fedask": "purple", "glora": "green",
}  # fmt: skip
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "p", "h", "d", "8", "H", "$+$")
_SOLID: tuple[float, ...] = ()
_DASHES = (
    _SOLID, (5.0, 1.5), (1.0, 1.0), (3.0, 1.0, 1.0, 1.0), (7.0, 1.0, 2.0, 1.0), (2.5, 1.0),
    (5.0, 1.0, 1.0, 1.0, 1.0, 1.0), (8.0, 2.0),
)  # fmt: skip


@dataclass(frozen=True)
class Style:
    """How a method is drawn."""

    colour: str  # as #RRGGBB
    marker: str  # as matplotlib names it
    dashes: tuple[float, ...]  # lengths of ink and gap in line widths; empty for a solid line

    @property
    def linestyle(self) -> Literal["-"] | tuple[float, tuple[float, ...]]:
        """For matplotlib."""
        return (0.0, self.dashes) if self.dashes else "-"


def styles(labels: Mapping[str, str]) -> dict[str, Style]:
    """A style for each label, from label -> name of its method.

    A shipped method under its own name has its own colour in every figure. Other labels get what is left, in their
    order, and once no colour is left the colours come again with other markers and line styles.
    """
    given: dict[str, Style] = {}
    used = dict.fromkeys(COLOURS, 0)  # how many labels have the colour
    own = [label for label, method in labels.items() if label == method and method in _OF_METHOD]
    for label in _by_rank(own):
        wanted = _OF_METHOD[label]
        given[label] = _style(wanted if not used[wanted] else _free(used), used)
    for label in labels:
        if label not in given:
            given[label] = _style(_free(used), used)
    return {label: given[label] for label in labels}


def _by_rank(labels: Iterable[str]) -> list[str]:
    """Those with the first claim to their colour first."""
    ranks = dict(zip(_OF_METHOD, count(), strict=False))
    return sorted(labels, key=ranks.__getitem__)


def _free(used: Mapping[str, int]) -> str:
    """The colour that the fewest labels have."""
    return min(used, key=used.__getitem__)


def _style(name: str, used: dict[str, int]) -> Style:
    """The next style of a colour."""
    number, again = list(COLOURS).index(name), used[name]
    used[name] += 1
    slot = number + len(COLOURS) * again
    return Style(COLOURS[name], _MARKERS[slot % len(_MARKERS)], _DASHES[(number + 3 * again) % len(_DASHES)])
