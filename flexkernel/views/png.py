"""A palette PNG that explains itself: pixels, axis labels, shard strips, colour bar and caption,
all drawn in.

A saved notebook on GitHub loses styles and scripts; a picture with its labels inside it does not.
No image library.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np

__all__ = ["Axis", "colours", "encode", "quantise", "render"]

# Stops of the two maps, low to high. Blue-white-red and viridis-like: both keep their order for
# the colour-blind.
SIGNED = ["0b3d7e", "2f79b9", "7db5d9", "cfe3f0", "f8f8f6", "fbd3bd", "ee9273", "cb3f3b", "86081f"]
UNSIGNED = ["fbfaf5", "d9ecc8", "93d3ae", "49b3ac", "2a86a8", "2b5892", "2c2a63"]
NAN = (176, 176, 176)
INK, SOFT, FAINT, PAPER = (32, 33, 36), (104, 108, 114), (214, 217, 221), (255, 255, 255)
BANDS = ((222, 228, 236), (196, 206, 219))

# what the plot area grows towards, in whole pixels per tile pixel
PLOT_WIDTH, PLOT_HEIGHT = 960, 480
# colours of a static picture: enough for the eye, and noise compresses a third better than with
# 255
LEVELS = 63


@dataclass(frozen=True)
class Axis:
    """Cells start..stop along one side of a view.

    ticks: (cell, label) pairs; a label sits at its cell's middle. shards: (start, stop, label)
    pieces within the view.
    """

    start: int
    stop: int
    ticks: Sequence[tuple[int, str]] = ()
    shards: Sequence[tuple[int, int, str]] = field(default=())

    def place(self, cell: float) -> float:
        """Where a cell's edge lies, as a share of the axis."""
        return (cell - self.start) / (self.stop - self.start)


def colours(signed: bool) -> np.ndarray:
    """(256, 3) uint8: index 0 is NaN, 1 to 255 run from the lowest to the highest value."""
    stops = np.array([tuple(bytes.fromhex(s)) for s in (SIGNED if signed else UNSIGNED)], float)
    at = np.linspace(0, len(stops) - 1, 255)
    ramp = np.stack([np.interp(at, np.arange(len(stops)), channel) for channel in stops.T], 1)
    return np.concatenate([[NAN], ramp]).round().astype(np.uint8)


def quantise(values: np.ndarray, lo: float, hi: float, levels: int = 255) -> np.ndarray:
    """Float (h, w) -> uint8 palette indices: 0 where NaN, else 1 for <= lo up to `levels` for >=
    hi."""
    with np.errstate(invalid="ignore"):
        share = np.clip((values.astype(np.float64) - lo) / (hi - lo), 0, 1)
        return np.where(
            np.isnan(share), 0, 1 + np.round(np.nan_to_num(share) * (levels - 1))
        ).astype(np.uint8)


def encode(index: np.ndarray, palette: np.ndarray) -> bytes:
    """PNG bytes of uint8 palette indices (h, w) and a palette (n <= 256, 3)."""
    height, width = index.shape
    lines = np.zeros((height, width + 1), np.uint8)  # each line begins with its filter: none
    lines[:, 1:] = index
    header = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)
    body = zlib.compress(lines.tobytes(), 9)
    chunks = [(b"IHDR", header), (b"PLTE", np.ascontiguousarray(palette, np.uint8).tobytes())]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        _chunk(*c) for c in [*chunks, (b"IDAT", body), (b"IEND", b"")]
    )


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def render(
    values: np.ndarray,
    lo: float,
    hi: float,
    signed: bool,
    rows: Axis,
    cols: Axis,
    title: str = "",
    caption: str = "",
    bar: Sequence[tuple[float, str]] = (),
    cells: tuple[int, int] = (1, 1),
) -> tuple[bytes, int, int]:
    """A labelled picture of a tile: PNG bytes, width, height.

    values: (h, w) float, covering rows × cols, cells[0] × cells[1] of them a pixel (those at the
    end may have fewer). bar: (value, label) beside the colour bar.
    """
    rows = replace(rows, ticks=[(cell, _short(label)) for cell, label in rows.ticks])
    paint = _Paint(signed)
    plot = _grown(quantise(values, lo, hi, LEVELS), (rows, cols), cells)
    high, wide = plot.shape
    gutter = max((_width(label) for _, label in rows.ticks), default=0) + 22
    strip = 26 if cols.shards else 0
    left, top = max(gutter, 20), 36 + strip
    side = 26 if rows.shards else 0
    bar_left = left + wide + side + 22
    right = bar_left + 22 + max((_width(label) for _, label in bar), default=0) + 12
    right = max(right, left + _width(title), left + _width(caption) + 8)
    paint.start(top + high + (66 if caption else 36), right)
    paint.text(left, 10, title, paint.ink)
    paint.frame(left, top, plot)
    paint.row_axis(rows, left, top, high)
    paint.col_axis(cols, left, top, wide, high)
    paint.col_shards(cols, left, top, wide, high, strip)
    paint.row_shards(rows, left, top, wide, high, side)
    paint.colour_bar(bar_left, top, high, lo, hi, bar)
    paint.text(left, top + high + 42, caption, paint.soft)
    return encode(paint.image, paint.palette), right, paint.image.shape[0]


def _grown(index: np.ndarray, axes: tuple[Axis, Axis], cells: tuple[int, int]) -> np.ndarray:
    """Each tile pixel as a block of whole pixels, so that the plot area is near its usual size."""
    down = max(1, min(40, PLOT_HEIGHT // index.shape[0]))
    along = max(1, min(160, PLOT_WIDTH // index.shape[1]))
    grown = index.repeat(down, 0).repeat(along, 1)
    high, wide = (
        # the last pixel is as wide as its cells are many
        max(1, round((axis.stop - axis.start) / block * scale))
        for axis, block, scale in zip(axes, cells, (down, along), strict=True)
    )
    return grown[:high, :wide]


class _Paint:
    """The picture while it is drawn: palette indices, and the indices of the colours that are not
    the map's."""

    def __init__(self, signed: bool):
        ramp = colours(signed)
        levels = np.linspace(1, 255, LEVELS).round().astype(int)
        self.palette = np.concatenate([ramp[:1], ramp[levels], [INK, SOFT, FAINT, PAPER, *BANDS]])
        self.ink, self.soft, self.faint, self.paper, *self.bands = range(LEVELS + 1, LEVELS + 7)
        self.image = np.zeros((0, 0), np.uint8)

    def start(self, height: int, width: int) -> None:
        self.image = np.full((height, width), self.paper, np.uint8)

    def text(self, x: float, y: float, text: str, colour: int, upright: bool = True) -> None:
        mask = _mask(text)
        self.stamp(x, y, mask if upright else np.rot90(mask), colour)

    def stamp(self, x: float, y: float, mask: np.ndarray, colour: int) -> None:
        x, y = max(0, round(x)), max(0, round(y))
        spot = self.image[y : y + mask.shape[0], x : x + mask.shape[1]]
        spot[mask[: spot.shape[0], : spot.shape[1]]] = colour

    def frame(self, left: int, top: int, plot: np.ndarray) -> None:
        high, wide = plot.shape
        self.image[top - 1 : top + high + 1, left - 1 : left + wide + 1] = self.faint
        self.image[top : top + high, left : left + wide] = plot

    def row_axis(self, rows: Axis, left: int, top: int, high: int) -> None:
        for cell, label in rows.ticks:
            y = top + rows.place(cell + 0.5) * high
            self.image[round(y) - (high < 2) :][:1, left - 6 : left - 1] = self.soft
            self.text(left - 10 - _width(label), y - 7, label, self.ink)

    def col_axis(self, cols: Axis, left: int, top: int, wide: int, high: int) -> None:
        free = 0.0
        for cell, label in cols.ticks:
            x = left + cols.place(cell + 0.5) * wide
            start = x - _width(label) / 2
            if start < free:
                continue
            self.image[top + high + 1 : top + high + 6, round(x) : round(x) + 1] = self.soft
            self.text(start, top + high + 12, label, self.ink)
            free = start + _width(label) + 12

    def col_shards(self, cols: Axis, left: int, top: int, wide: int, high: int, strip: int) -> None:
        for i, (start, stop, label) in enumerate(cols.shards):
            x0, x1 = (left + round(cols.place(cell) * wide) for cell in (start, stop))
            self.image[top - strip : top - 4, x0:x1] = self.bands[i % 2]
            if _width(label) + 8 <= x1 - x0:
                self.text((x0 + x1 - _width(label)) / 2, top - strip + 4, label, self.ink)
            if start > cols.start:
                self.image[top : top + high : 6, x0] = self.ink  # dotted, so that it is no data
                self.image[top + 1 : top + high : 6, x0] = self.ink

    def row_shards(self, rows: Axis, left: int, top: int, wide: int, high: int, side: int) -> None:
        x = left + wide + 4
        for i, (start, stop, label) in enumerate(rows.shards):
            y0, y1 = (top + round(rows.place(cell) * high) for cell in (start, stop))
            self.image[y0:y1, x : x + side - 4] = self.bands[i % 2]
            if _width(label) + 8 <= y1 - y0:
                self.text(x + 4, (y0 + y1 - _width(label)) / 2, label, self.ink, upright=False)
            if start > rows.start:
                self.image[y0, left : left + wide : 6] = self.ink
                self.image[y0, left + 1 : left + wide : 6] = self.ink

    def colour_bar(
        self, x: int, top: int, high: int, lo: float, hi: float, bar: Sequence[tuple[float, str]]
    ) -> None:
        high = max(high, 60)
        ramp = quantise(np.linspace(hi, lo, high)[:, None], lo, hi, LEVELS)
        height = min(high, self.image.shape[0] - top - 8)
        rows = np.linspace(0, high - 1, height).round().astype(int)
        self.image[top - 1 : top + height + 1, x - 1 : x + 17] = self.faint
        self.image[top : top + height, x : x + 16] = ramp[rows]
        free = -20.0
        for value, label in sorted(bar, reverse=True):
            y = min(max((hi - value) / (hi - lo) * height - 7, 0), height - 14)
            if y >= free:
                self.text(x + 22, top + y, label, self.ink)
                free = y + 16


# --- the font: 5 × 8, one byte a column, lowest bit on top ----------------------------

_GLYPHS = (  # noqa: SIM905
    "0000000000 00005f0000 0007000700 147f147f14 242a7f2a12 2313086462 3649562050 0005030000 001c224100 0041221c00 "
    "2a1c7f1c2a 08083e0808 0080703000 0808080808 0060600000 2010080402 3e5149453e 00427f4000 4261514946 2141454b31 "
    "1814127f10 2745454539 3c4a494930 0171090503 3649494936 064949291e 0036360000 0080763600 0814224100 1414141414 "
    "0041221408 0201510906 324979413e 7e1111117e 7f49494936 3e41414122 7f4141221c 7f49494941 7f09090901 3e4149497a "
    "7f0808087f 00417f4100 2040413f01 7f08142241 7f40404040 7f020c027f 7f0408107f 3e4141413e 7f09090906 3e4151215e "
    "7f09192946 4649494931 01017f0101 3f4040403f 1f2040201f 3f4038403f 6314081463 0708700807 6151494543 007f414100 "
    "0204081020 0041417f00 0402010204 4040404040 0001020400 2054545478 7f48444438 3844444420 384444487f 3854545418 "
    "087e090102 18a4a49c78 7f08040478 00447d4000 4080847d00 7f10284400 00417f4000 7c04180478 7c08040478 3844444438 "
    "fc18242418 18242418fc 7c08040408 4854545420 043f444020 3c4040207c 1c2040201c 3c4030403c 4428102844 4c9090907c "
    "4464544c44 0008364100 00007f0000 0041360800 1008081008"
).split()
_EXTRA = {
    "×": "2214081422",
    "±": "44445f4444",
    "·": "0018180000",
    "–": "0808080808",
    "−": "0808080808",
    "…": "4000400040",
    "↵": "081c2a080f",
    "→": "08082a1c08",
    "⇥": "082a1c087f",
    "≈": "2412362412",
    "σ": "38443c0404",
}
_MISSING = "7f4141417f"
_FONT = {chr(32 + i): glyph for i, glyph in enumerate(_GLYPHS)} | _EXTRA
STEP = 12  # pixels from one character to the next, at twice the font's size


def _width(text: str) -> int:
    return STEP * len(text)


def _short(text: str, most: int = 28) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _mask(text: str) -> np.ndarray:
    """(16, 12 * characters) bool: the text at twice the font's size. A character the font lacks is
    a box."""
    if not text:
        return np.zeros((16, 0), bool)
    return np.concatenate([_glyph(character) for character in text], axis=1)


@lru_cache(maxsize=512)
def _glyph(character: str) -> np.ndarray:
    columns = np.frombuffer(bytes.fromhex(_FONT.get(character, _MISSING)), np.uint8)
    small = np.unpackbits(columns[:, None], axis=1, bitorder="little").T.astype(bool)
    return np.pad(_twice(small), ((0, 0), (0, 2)))


def _twice(small: np.ndarray) -> np.ndarray:
    """Scale2x: doubles a bitmap and rounds its stairs, which plain doubling would make coarse."""
    padded = np.pad(small, 1)
    up, down, left, right = padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]
    big = small.repeat(2, 0).repeat(2, 1)
    corners = (
        (0, 0, left, up, right, down),
        (0, 1, up, right, left, down),
        (1, 0, down, left, up, right),
        (1, 1, right, down, up, left),
    )
    for y, x, a, b, not_a, not_b in corners:
        big[y::2, x::2] = np.where((a == b) & (a != not_a) & (b != not_b), a, small)
    return big
