"""Fonts: a line of text as a mask of ink, each character drawn by a font that has it.

DejaVu Sans comes with flexkernel: Latin, Greek, Cyrillic, Hebrew, Arabic, arrows. What it lacks,
such as Chinese or emoji, is drawn by a font of this machine; a box stands for what no font has.
"""

from __future__ import annotations

import os
import unicodedata
import warnings
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import groupby
from pathlib import Path

import numpy as np
import regex
from PIL import Image, ImageDraw, ImageFont, features

__all__ = ["HEIGHT", "mask", "width"]

# pixels
SIZE = 16  # of an em
HEIGHT = 20  # of a line
BASELINE = 15  # from a line's top to where letters stand
OURS = Path(__file__).with_name("DejaVuSans.ttf")
OWN_FOLDER = "~/.local/share/fonts"
FOLDERS = (
    OWN_FOLDER,
    "~/.fonts",
    "~/Library/Fonts",
    "/usr/local/share/fonts",
    "/usr/share/fonts",
    "/Library/Fonts",
    "/System/Library/Fonts",
    "C:/Windows/Fonts",
)
# Words in the names of fonts that have many characters: these are asked first.
WIDE = ("cjk", "wqy", "fallback", "pingfang", "msyh", "noto", "emoji", "symbola", "unifont")
OTHER_STYLES = regex.compile(
    "bold|italic|oblique|light|thin|black|medium|condensed|mono|serif", regex.I
)
MOST_FONTS = 400  # of this machine that are asked for a character
PICTURE_SIZES = (109, 136, 160)  # fonts of coloured pictures have one of these sizes only
NOWHERE = "\U0010fffd"  # a character that no font has: it looks as all do that a font lacks
JOINERS = "\u200d\ufe0e\ufe0f"  # hold an emoji together, and are not seen themselves
BOX = 11  # pixels that a box is wide
SHAPED = features.check("raqm")  # it joins Arabic letters, and knows which text is read from right
ENGINE = ImageFont.Layout.RAQM if SHAPED else ImageFont.Layout.BASIC

Font = ImageFont.FreeTypeFont


@lru_cache(maxsize=2048)
def mask(text: str) -> np.ndarray:
    """How much ink each pixel of a line of text gets: (HEIGHT, w) uint8, 0 to 255."""
    one_line = " ".join(text.splitlines())
    parts = [_drawn("".join(run), font) for font, run in groupby(_clusters(one_line), _font_of)]
    return np.concatenate([np.zeros((HEIGHT, 0), np.uint8), *parts], axis=1)


def width(text: str) -> int:
    """How many pixels wide the text is."""
    return mask(text).shape[1]


# --- which font -----------------------------------------------------------------------


def _clusters(text: str) -> list[str]:
    """What a reader takes for one character: a letter with its accents, an emoji of several."""
    return regex.findall(r"\X", text)


@lru_cache(maxsize=8192)
def _font_of(cluster: str) -> Font | None:
    """The first font that has all of a character; None and a warning where there is none."""
    needed = [c for c in cluster if c not in JOINERS]
    for font in _fonts():
        if all(_has(font, character) for character in needed):
            return font
    warnings.warn(
        "no font on this machine has some characters of these labels; they are drawn as boxes. "
        "Install one (on Debian fonts-noto-cjk, fonts-noto-color-emoji, fonts-noto-core) or put "
        f"its file into {OWN_FOLDER}, and restart the kernel",
        stacklevel=2,
    )
    return None


def _fonts() -> Iterator[Font]:
    """The fonts to ask, in turn; those of this machine are opened when they are first needed."""
    yield _ours()
    yield from _of_this_machine()


@lru_cache(maxsize=1)
def _ours() -> Font:
    return _font(OURS, SIZE)


def _font(path: Path, size: int) -> Font:
    return ImageFont.truetype(path, size, layout_engine=ENGINE)


@lru_cache(maxsize=1)
def _of_this_machine() -> Sequence[Font]:
    opened = (_opened(path) for path in _font_files()[:MOST_FONTS])
    return [font for font in opened if font is not None]


def _font_files() -> list[Path]:
    """The plain styles of the fonts that are installed, those of many characters first."""
    found: list[Path] = []
    for folder in FOLDERS:
        for parent, _, names in os.walk(os.path.expanduser(folder)):
            found += [Path(parent, name) for name in names]
    plain = [path for path in found if _is_plain(path)]
    return sorted(plain, key=lambda path: (_rank(path), path.name))


def _is_plain(path: Path) -> bool:
    is_font = path.suffix.lower() in (".ttf", ".otf", ".ttc")
    return is_font and not OTHER_STYLES.search(path.stem)


def _rank(path: Path) -> int:
    """Where in WIDE a font's name stands, or behind all of it."""
    name = path.name.lower()
    return next((i for i, word in enumerate(WIDE) if word in name), len(WIDE))


def _opened(path: Path) -> Font | None:
    """The font in our size, or in the only one that a font of pictures has."""
    for size in (SIZE, *PICTURE_SIZES):
        try:
            return _font(path, size)
        except OSError:
            continue
    return None


@lru_cache(maxsize=65536)
def _has(font: Font, character: str) -> bool:
    return _canvas(character, font).tobytes() != _looks_missing(font)


@lru_cache(maxsize=MOST_FONTS)
def _looks_missing(font: Font) -> bytes:
    return _canvas(NOWHERE, font).tobytes()


# --- drawing --------------------------------------------------------------------------


def _drawn(text: str, font: Font | None) -> np.ndarray:
    """The mask of a text of one font, (HEIGHT, w) uint8."""
    if font is None:
        return np.concatenate([_box() for _ in _clusters(text)], axis=1)
    canvas = _canvas(text, font)
    if font.size == SIZE:
        return np.asarray(canvas.getchannel("A"))
    return np.asarray(_small(canvas, font))


def _canvas(text: str, font: Font) -> Image.Image:
    """The text in black, or in the colours of a font of pictures, on nothing: RGBA."""
    scale = font.size / SIZE
    if not SHAPED and unicodedata.bidirectional(text[0]) in ("R", "AL"):
        text = text[::-1]  # as it is read, though its letters are not joined
    # the words of a label keep their places, also beside one that is read from the right
    direction = "ltr" if SHAPED else None
    size = max(1, round(font.getlength(text, direction=direction))), round(HEIGHT * scale)
    canvas = Image.new("RGBA", size, (0, 0, 0, 0))
    ImageDraw.Draw(canvas).text(
        (0, round(BASELINE * scale)),
        text,
        (0, 0, 0, 255),
        font,
        anchor="ls",
        direction=direction,
        embedded_color=True,
    )
    return canvas


def _small(canvas: Image.Image, font: Font) -> Image.Image:
    """A coloured picture as ink: dark where it is dark, and a little wherever it is."""
    light = np.asarray(canvas.convert("L"), float) / 255
    there = np.asarray(canvas.getchannel("A"), float)
    ink = Image.fromarray((there * (1 - 0.75 * light)).astype(np.uint8))
    wide = max(1, round(canvas.width * SIZE / font.size))
    return ink.resize((wide, HEIGHT), Image.Resampling.LANCZOS)


@lru_cache(maxsize=1)
def _box() -> np.ndarray:
    """What stands for a character that no font has, (HEIGHT, BOX) uint8."""
    box = Image.new("L", (BOX, HEIGHT), 0)
    ImageDraw.Draw(box).rectangle((1, 3, BOX - 3, BASELINE), outline=255)
    return np.asarray(box)
