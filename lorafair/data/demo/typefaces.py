"""Open type faces from PyPI (fontpkg-*, SIL Open Font License) and characters drawn with them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lorafair.files.download import fetch_wheels

Colour = tuple[int, int, int]

# family: (version, sha256 of the wheel fontpkg-<family>)
_WHEELS = {
    "abril-fatface": ("1.1", "3ed5bfda9351aa0941bd168e3935f078c30665552059a3193f1b63b9d4f96475"),
    "black-ops-one": ("1.4", "2095d055a4dca526b4ec263315a2d5c7ab47a140c8f92ddc65534c772b7a2fc4"),
    "caveat": ("2.0", "fcab480da07243af667fd70098d54f34129f8e5c42c1bf5da5c5842b7c187c19"),
    "crimson-text": ("1.100", "25e7eeb1b3aa5381d17d629f3e099b0342feba1e721ae61371f6730b036bbb44"),
    "dancing-script": ("2.1", "93289d8e20448317d94091f8aac2201009d75e650ac7e88639d8c88587782f25"),
    "dm-mono": ("1.0", "544c508bcd4c560fc97e67d1b6bfa78fe0fba84aa096356bbc35aaa7cd2bb76a"),
    "eb-garamond": ("1.3", "026191b72c59d5fa6657657b49972604bb583fbe496e16afbb0d3849b6bd62b7"),
    "fira-code": ("5.2.post1", "6e791df212ca8ba4e334613e7ae7f95c0faa2d13b31a322977918e107879a5cd"),
    "great-vibes": ("1.103", "31945472e065e42c9a54a8530fa22c416bbbfd57898305a453ddfbad8b52af4b"),
    "ibm-plex-mono": ("2.3", "a4ac4311b1fe40e715a5b93e7bdefb6d23d608217f560e064446b25c1ffa2804"),
    "inconsolata": ("3.1", "9428dd98d26739e511fc97032c22c35666f925a686119fc91c9540801bea67f1"),
    "indie-flower": ("2.0", "30fd37149b5d91068e7614628b0f3d139d9fb880929d7e163d389691d778c21d"),
    "jetbrains-mono": ("2.211", "546e53afe7048f4c4ac2be8cbc00c42d7208bb5f6cd00f852225aa2797335de4"),
    "kalam": ("2.1", "6effb7ee67f3b862de84524a705beb362777153da60c4417805c93b3548e147d"),
    "lato": ("2.15", "7bce7eef5522260b06ab597c21edd20d840c89909f0ec9b8ac3da2812a43ed93"),
    "lobster": ("2.100", "34c366bf94110496fddb53d8f3afd83e72487461342df013f5fc49862f5fc29c"),
    "lora": ("3.8", "b0d7761989bf25e4b5f23e2d5964bd896fcac2a7e2719a294c19fe5235552043"),
    "luckiest-guy": ("1.1", "c18eb2fb6d1f4ec189812ca41f3ea376ff2212c7fdad37090caecda8c97b8b85"),
    "merriweather": ("2.100", "61aefb10d743f23dc59c07a26c21f7ad0b181cc7e1ad304d6527df792bc4d7da"),
    "montserrat": ("9.0", "0baf3f7a2061e590a1511bce18bd06c437bf124dc87f8b710eeab2f2d0efe6d1"),
    "open-sans": ("3.3", "de2b20526dacabfb0b7f736b01a6c0175b9d6a3e83453ea14d268c59dec0424c"),
    "orbitron": ("2.1", "dac61edd20093fd3005afa0195a2350bbc7015f54c0a05534d16b87bf72e0d7e"),
    "playfair-display": ("1.203", "5941b14cc9742d6d93b8a163b4582b81761d1fd99fbe312ad2efb116f1d1106e"),
    "poppins": ("4.4", "4f8f7a9ac953658bf32a935d0c2cbc79ca0bedd72305b63b7229017849c7d335"),
    "press-start-2p": ("3.0", "6b26eb9b52d970393c9738a72c01d59251c5c4b1ca9ff412ba2e2987b2d09c97"),
    "pt-serif": ("1.0", "f3980ea3ffb56e34d65d8e425ffedd012dbd8313dcff9780fc7476712d98b2af"),
    "raleway": ("4.26", "25ff0a6368821242c5cf840fa5a0c3d6c1da3cc2029a7409c7ca714dab40e862"),
    "roboto": ("3.15", "5502431dd22fe30911cd497cefac11760e48b4a1ed78df26c02288664eeddb9f"),
    "satisfy": ("1.1", "7a2ec779ff1b3e329d11d28a8a442fb1fc215ef315864f010c5328da58e41ead"),
    "source-code-pro": ("1.26", "986a0c5b67ed28c3753b49d9c51139f1dfb517c9b441b901c79cb7545076089f"),
}
_HAIRLINES = ("Thin", "ExtraLight")  # strokes of less than a pixel at the sizes drawn here
_LIGHTEST = 300.0  # weight axis of variable fonts: the same limit as without the hairlines


def fetch_typefaces(families: Iterable[str], folder: Path) -> dict[str, list[Path]]:
    """Fetch the upright font files of every family into `folder`, sorted by name, without hairline weights."""
    families = list(families)
    fetch_wheels({f"fontpkg-{family}=={_WHEELS[family][0]}": _WHEELS[family][1] for family in families}, folder)
    return {family: _font_files(folder / f"fontpkg_{family.replace('-', '_')}" / "files") for family in families}


def _font_files(folder: Path) -> list[Path]:
    return sorted(
        file for file in folder.glob("*.ttf") if not any(style in file.stem for style in ("Italic", *_HAIRLINES))
    )


def draw_character(
    character: str, font_file: Path, rng: np.random.Generator, *, side: int, ink: Colour, paper: Colour
) -> Image.Image:
    """One character on a square of `side` pixels: random size, weight (variable fonts), tilt and place.

    Sizes of 45–80 % of the side, a tilt of 6° standard deviation, up to 1/16 of the side off the centre. Nothing is
    cut off: what is too large is made smaller.
    """
    points = int(rng.integers(round(0.45 * side), round(0.8 * side) + 1))
    # The basic layout: the other one needs a library that not every Pillow has, and may shape letters differently.
    font = ImageFont.truetype(str(font_file), points, layout_engine=ImageFont.Layout.BASIC)
    if "wght" in font_file.stem:
        font.set_variation_by_axes(_random_weight(font, rng))
    left, top, right, bottom = font.getbbox(character)
    sheet = Image.new("L", (round(right - left) + 2, round(bottom - top) + 2))
    ImageDraw.Draw(sheet).text((1 - left, 1 - top), character, font=font, fill=255)
    sheet = sheet.rotate(float(rng.normal(0.0, 6.0)), resample=Image.Resampling.BICUBIC, expand=True)
    glyph = sheet.crop(sheet.getbbox())
    limit = side - side // 16
    glyph.thumbnail((limit, limit), Image.Resampling.LANCZOS)
    image = Image.new("RGB", (side, side), paper)
    image.paste(ink, (_place(glyph.width, side, rng), _place(glyph.height, side, rng)), glyph)
    return image


def _random_weight(font: ImageFont.FreeTypeFont, rng: np.random.Generator) -> list[float]:
    """Positions on the axes of a variable font: a random weight, everything else as designed."""
    return [
        float(rng.uniform(max(axis["minimum"] or 0, _LIGHTEST), axis["maximum"] or _LIGHTEST))
        if axis["name"] == b"Weight"
        else float(axis["default"] or 0)
        for axis in font.get_variation_axes()
    ]


def _place(length: int, side: int, rng: np.random.Generator) -> int:
    """Where a glyph begins: the centre, off by up to 1/16 of the side, as far as it stays inside."""
    shift = int(rng.integers(-(side // 16), side // 16 + 1))
    return int(np.clip((side - length) // 2 + shift, 0, side - length))
