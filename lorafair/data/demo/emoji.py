"""EmojiDomains: the same Unicode emoji as six sets of drawings, tested on emoji that were never trained on.

    noto         @iconify-json/noto                         Apache-2.0     shaded
    twemoji      @iconify-json/twemoji                      CC-BY-4.0      flat colour
    openmoji     openmoji, color/svg                        CC-BY-SA-4.0   colour with outlines
    line         openmoji, black/svg                        CC-BY-SA-4.0   line drawing
    silhouette   @iconify-json/fluent-emoji-high-contrast   MIT            filled, one colour
    fluent3d     @lobehub/fluent-emoji-3d                   MIT            3-D rendering

The classes are groups of Unicode's own order, as listed in openmoji. Left out are skin tones, joined sequences, an
emoji that one of the six lacks, and one that a set draws exactly like an earlier emoji (circles that differ in colour,
as line drawings): no test image is a training image.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType

import numpy as np
from PIL import Image
from tqdm import tqdm

from lorafair.config.schema import DataConfig
from lorafair.data.images import ImageCollection, Source
from lorafair.data.stored import load_stored, store
from lorafair.files.cache import build_once
from lorafair.files.download import fetch_npm, fetch_wheels

DOMAINS = ("noto", "twemoji", "openmoji", "line", "silhouette", "fluent3d")
DESCRIPTION = (
    "EmojiDomains: real drawings of emoji in 6 styles, 12 Unicode groups as classes; test emoji never trained on"
)
_SIDE = 64

# (Unicode group, beginning of the subgroup, class); the first that fits counts, and none means left out
_CLASS_RULES = (
    ("smileys-emotion", "face-", "face"),
    ("smileys-emotion", "cat-face", "face"),
    ("smileys-emotion", "monkey-face", "face"),
    ("people-body", "hand", "hand"),
    ("people-body", "body-parts", "hand"),
    ("people-body", "", "person"),
    ("animals-nature", "animal-", "animal"),
    ("food-drink", "", "food"),
    ("travel-places", "transport-", "vehicle"),
    ("travel-places", "place-", "place"),
    ("travel-places", "sky-weather", "sky"),
    ("objects", "clothing", "clothing"),
    ("objects", "", "object"),
    ("activities", "", "activity"),
    ("symbols", "keycap", None),
    ("symbols", "", "sign"),
)
CLASSES = tuple(dict.fromkeys(name for _, _, name in _CLASS_RULES if name is not None))

_NPM = {
    "openmoji": (
        "openmoji@17.0.0",
        "sha512-EBnYrNGdcdw+OSXmENeNE1yBNRu6tOraTmoOyUbJkTmvT/+XETp8RZLSJFzD3lrPc5N9CzsyPnRTk0Vp4UaI9w==",
    ),
    "noto": (
        "@iconify-json/noto@1.2.9",
        "sha512-DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==",
    ),
    "twemoji": (
        "@iconify-json/twemoji@1.2.5",
        "sha512-uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw==",
    ),
    "silhouette": (
        "@iconify-json/fluent-emoji-high-contrast@1.2.6",
        "sha512-esqhZPpkrF7sNX3NsLoh8KW64okEr/bzko7WNnFP+qTJGAqDPDYjp0925yxuivXy3HtVQB8xhIKu3+Nq1byX5w==",
    ),
    "fluent3d": (
        "@lobehub/fluent-emoji-3d@1.1.0",
        "sha512-Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g==",
    ),
}
_RESVG = {  # draws SVG; wheels for Linux (x86-64, aarch64) and macOS (arm64, x86-64)
    "resvg-py==0.5.0": "84f2378ecc7a8e38b03429efaefc816daec1b1970114909a6f973393b297c91b "
    "1e66216f78c84a27d34ce75f4535d8e26565771be4f1848ddc71e8a7ce78973a "
    "7b43f942157f5d16126e108dab8ab37e4bc2b198099e5f6274b753a3b1ac7b6e "
    "9d3f5c2544d6b5f74847513e07e6ab6a70f9e7f0d8a141bc16bd4b0c555f4234"
}

_BOX = {"left": 0, "top": 0, "width": 16, "height": 16}  # of an icon, Iconify's defaults

Package = dict[str, bytes]  # the files of an npm package by their path
Draw = Callable[[str], Image.Image | None]  # a code point sequence such as "1F600" -> RGBA, None if there is no drawing


def emoji_domains(config: DataConfig, seed: int) -> ImageCollection:
    """6 domains, 12 classes, 839 training and 405 test images a domain; built on first use, the same for every seed."""
    return load_stored(build_once("emoji_domains-1", _build))


EMOJI_DOMAINS = Source(emoji_domains, DOMAINS)


def _build(folder: Path) -> None:
    packages = {name: fetch_npm(spec, integrity) for name, (spec, integrity) in _NPM.items()}
    draw = _drawings(packages, _import_resvg())
    images: list[np.ndarray] = []
    emoji: list[tuple[str, str]] = []  # (code, class), for every six images
    seen: set[bytes] = set()
    for code, name in tqdm(list(_emoji(packages["openmoji"])), desc="drawing emoji", disable=None):
        drawn = [_on_white(picture) for domain in DOMAINS if (picture := draw[domain](code)) is not None]
        pixels = {image.tobytes() for image in drawn}
        if len(drawn) == len(DOMAINS) and pixels.isdisjoint(seen):
            images += drawn
            emoji.append((code, name))
            seen |= pixels
    store(
        folder,
        images=np.stack(images),
        labels=np.repeat([CLASSES.index(name) for _, name in emoji], len(DOMAINS)),
        domain_of=np.tile(np.arange(len(DOMAINS)), len(emoji)),
        held_out=np.repeat([_is_held_out(code) for code, _ in emoji], len(DOMAINS)),
        domains=DOMAINS,
        classes=CLASSES,
        description=DESCRIPTION,
    )


def _is_held_out(code: str) -> bool:
    """Three emoji in ten, by a hash of the code: the same whichever other emoji there are."""
    return int(hashlib.sha256(code.encode()).hexdigest(), 16) % 10 < 3


def _emoji(openmoji: Package) -> Iterator[tuple[str, str]]:
    """(code, class) of every emoji that belongs to a class."""
    for entry in json.loads(openmoji["data/openmoji.json"]):
        if entry["skintone"] or "-200D-" in entry["hexcode"]:
            continue
        for group, subgroup, name in _CLASS_RULES:
            if entry["group"] == group and entry["subgroups"].startswith(subgroup):
                if name is not None:
                    yield entry["hexcode"], name
                break


def _drawings(packages: Mapping[str, Package], resvg: ModuleType) -> dict[str, Draw]:
    def raster(svg: str | None) -> Image.Image | None:
        if svg is None:
            return None
        # Twice the size, because shrinking smooths better than resvg alone; no system fonts: they differ.
        png = resvg.svg_to_bytes(svg_string=svg, width=2 * _SIDE, height=2 * _SIDE, skip_system_fonts=True)
        return Image.open(io.BytesIO(bytes(png)))

    def svg_files(folder: str) -> Draw:
        files = packages["openmoji"]
        return lambda code: raster(text.decode() if (text := files.get(f"{folder}/{code}.svg")) else None)

    def iconify(package: Package) -> Draw:
        documents = _iconify_documents(package)
        return lambda code: raster(documents.get(_plain(code)))

    drawings: dict[str, Draw] = {name: iconify(packages[name]) for name in ("noto", "twemoji", "silhouette")}
    drawings["openmoji"] = svg_files("color/svg")
    drawings["line"] = svg_files("black/svg")
    webp = {_plain(Path(path).stem): data for path, data in packages["fluent3d"].items() if path.endswith(".webp")}
    drawings["fluent3d"] = lambda code: Image.open(io.BytesIO(data)) if (data := webp.get(_plain(code))) else None
    return drawings


def _iconify_documents(package: Package) -> dict[str, str]:
    """The SVG documents of an icon set in Iconify's JSON, by plain code."""
    icons, chars = (json.loads(package[name]) for name in ("icons.json", "chars.json"))
    aliases = icons.get("aliases", {})
    documents = {}
    for code, name in chars.items():
        icon = icons["icons"].get(name) or icons["icons"].get(aliases.get(name, {}).get("parent"))
        if icon is not None:
            box = [icon.get(key, icons.get(key, default)) for key, default in _BOX.items()]
            documents[_plain(code)] = (
                '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
                f'viewBox="{" ".join(map(str, box))}" color="#202020">{icon["body"]}</svg>'
            )
    return documents


def _plain(code: str) -> str:
    """A code point sequence in lower case without the variation selector, which not all packages write."""
    return "-".join(point for point in code.lower().split("-") if point != "fe0f")


def _on_white(picture: Image.Image) -> np.ndarray:
    """uint8 (S, S, 3), transparent parts white."""
    picture = picture.convert("RGBA")
    white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
    small = Image.alpha_composite(white, picture).convert("RGB").resize((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    return np.asarray(small)


def _import_resvg() -> ModuleType:
    """The module resvg_py, from the cache: a dependency of building this set only, so not one of the package."""
    folder = build_once("resvg-py-0.5.0", lambda folder: fetch_wheels(_RESVG, folder))
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module("resvg_py")
    finally:
        sys.path.remove(str(folder))
