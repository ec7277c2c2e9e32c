"""A palette PNG that explains itself: pixels, axis labels, shard strips, colour bar and caption,
all drawn in.

A saved notebook on GitHub loses styles and scripts; a picture with its labels inside it does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from PIL import Image

from . import fonts
from .axis import Axis

__all__ = ["Axis", "Scale", "colours", "encode", "quantise", "render"]

# Stops of the two maps, low to high. Blue-white-red and viridis-like: both keep their order for
# the colour-blind.
SIGNED = ["0b3d7e", "2f79b9", "7db5d9", "cfe3f0", "f8f8f6", "fbd3bd", "ee9273", "cb3f3b", "86081f"]
UNSIGNED = ["fbfaf5", "d9ecc8", "93d3ae", "49b3ac", "2a86a8", "2b5892", "2c2a63"]
NAN = (176, 176, 176)
INK = (32, 33, 36)
SOFT = (104, 108, 114)
FAINT = (214, 217, 221)
PAPER = (255, 255, 255)
BANDS = ((222, 228, 236), (196, 206, 219))

# what the plot area grows towards, in whole pixels per tile pixel
PLOT_WIDTH = 960
PLOT_HEIGHT = 480
# colours of a static picture: enough for the eye, and noise compresses a third better than with
# 255
LEVELS = 63
SHADES = 5  # from the ground to the ink, along the edges of letters

# pixels around the plot
MARGIN = 20
TITLE = 36
STRIP = 26  # of shards
BAR = 16
GAP = 22
TICKS = 36  # below the plot: the column labels
CAPTION = 30  # below them


@dataclass(frozen=True)
class Scale:
    """What the colours stand for: lo to hi, with a middle of its own if signed; the labels of the
    colour bar as (value, label)."""

    lo: float
    hi: float
    signed: bool
    ticks: Sequence[tuple[float, str]] = ()


def colours(signed: bool) -> np.ndarray:
    """(256, 3) uint8: index 0 is NaN, 1 to 255 run from the lowest to the highest value."""
    names = SIGNED if signed else UNSIGNED
    stops = np.array([tuple(bytes.fromhex(name)) for name in names], float)
    at = np.linspace(0, len(stops) - 1, 255)
    ramp = np.stack([np.interp(at, np.arange(len(stops)), channel) for channel in stops.T], 1)
    return np.concatenate([[NAN], ramp]).round().astype(np.uint8)


def quantise(values: np.ndarray, lo: float, hi: float, levels: int = 255) -> np.ndarray:
    """Palette indices of values: float (h, w) -> uint8 (h, w).

    0 where the value is NaN, else 1 for <= lo up to `levels` for >= hi."""
    with np.errstate(invalid="ignore"):
        share = np.clip((values.astype(np.float64) - lo) / (hi - lo), 0, 1)
    index = 1 + np.round(np.nan_to_num(share) * (levels - 1))
    return np.where(np.isnan(share), 0, index).astype(np.uint8)


def encode(index: np.ndarray, palette: np.ndarray) -> bytes:
    """PNG bytes of uint8 palette indices (h, w) and a palette (n <= 256, 3)."""
    image = Image.fromarray(index, "P")
    image.putpalette(np.ascontiguousarray(palette, np.uint8).tobytes())
    written = BytesIO()
    image.save(written, "PNG", bits=8, compress_level=9)
    return written.getvalue()


def render(
    values: np.ndarray,
    scale: Scale,
    rows: Axis,
    cols: Axis,
    title: str = "",
    caption: str = "",
    cells: tuple[int, int] = (1, 1),
) -> tuple[bytes, int, int]:
    """A labelled picture of a tile: PNG bytes, width, height.

    values: (h, w) float, covering rows × cols, cells[0] × cells[1] of them a pixel (those at the
    end may have fewer).
    """
    rows, cols = rows.shortened(), cols.shortened()
    plot = _grown(quantise(values, scale.lo, scale.hi, LEVELS), (rows, cols), cells)
    gutter = _widest(rows.ticks) + GAP
    strip = STRIP if cols.shards else 0
    paint = _Paint(scale, plot, left=max(gutter, MARGIN), top=TITLE + strip)
    side = STRIP if rows.shards else 0
    bar_left = paint.right + side + GAP
    width = max(
        bar_left + BAR + 6 + _widest(scale.ticks) + 12,
        paint.left + fonts.width(title) + 8,
        paint.left + fonts.width(caption) + 8,
    )
    below = TICKS
    if caption:
        below += CAPTION
    paint.start(paint.bottom + below, width)
    paint.text(paint.left, 8, title)
    paint.draw_plot()
    paint.row_axis(rows)
    paint.col_axis(cols)
    paint.col_shards(cols)
    paint.row_shards(rows)
    paint.colour_bar(bar_left)
    paint.text(paint.left, paint.bottom + TICKS + 4, caption, paint.soft)
    return encode(paint.image, np.array(paint.palette)), width, len(paint.image)


def _widest(ticks: Sequence[tuple[float, str]]) -> int:
    return max((fonts.width(label) for _, label in ticks), default=0)


def _grown(index: np.ndarray, axes: tuple[Axis, Axis], cells: tuple[int, int]) -> np.ndarray:
    """Each tile pixel as a block of whole pixels, so that the plot area is near its usual size:
    uint8 (h, w) -> uint8 (H, W)."""
    down = max(1, min(40, PLOT_HEIGHT // index.shape[0]))
    along = max(1, min(160, PLOT_WIDTH // index.shape[1]))
    grown = index.repeat(down, 0).repeat(along, 1)
    high, wide = (
        # the last pixel is as wide as its cells are many
        max(1, round((axis.stop - axis.start) / block * size))
        for axis, block, size in zip(axes, cells, (down, along), strict=True)
    )
    return grown[:high, :wide]


class _Paint:
    """The picture while it is drawn: palette indices, and the indices of the colours that are not
    the map's. left, top, right, bottom: of the plot."""

    def __init__(self, scale: Scale, plot: np.ndarray, left: int, top: int):
        self.scale = scale
        self.plot = plot
        self.left = left
        self.top = top
        self.high, self.wide = plot.shape
        self.right = left + self.wide
        self.bottom = top + self.high
        ramp = colours(scale.signed)
        levels = np.linspace(1, 255, LEVELS).round().astype(int)
        self.palette = [*map(tuple, ramp[[0, *levels]].tolist())]
        self.ink, self.soft, self.faint, self.paper = map(self._colour, (INK, SOFT, FAINT, PAPER))
        self.bands = [self._colour(band) for band in BANDS]
        self.edges = {
            (ink, ground): self._shades(ink, ground)
            for ink in (self.ink, self.soft)
            for ground in (self.paper, *self.bands)
        }
        self.image = np.zeros((0, 0), np.uint8)

    def _colour(self, colour: tuple[int, ...]) -> int:
        """The index of a colour that is added to the palette."""
        self.palette.append(colour)
        return len(self.palette) - 1

    def _shades(self, ink: int, ground: int) -> np.ndarray:
        """The indices from a ground to an ink, (SHADES,) uint8."""
        ends = np.array([self.palette[ground], self.palette[ink]], float)
        between = [ends[0] + (ends[1] - ends[0]) * i / (SHADES - 1) for i in range(1, SHADES - 1)]
        added = [self._colour(tuple(map(int, colour.round()))) for colour in between]
        return np.array([ground, *added, ink], np.uint8)

    def start(self, height: int, width: int) -> None:
        self.image = np.full((height, width), self.paper, np.uint8)

    def text(self, x: float, y: float, text: str, ink: int = 0, upright: bool = True) -> None:
        """Write a line of text with its top left corner at x, y. ink: the index of its colour."""
        mask = fonts.mask(text)
        if not upright:
            mask = np.rot90(mask)
        ink = ink or self.ink
        left = max(0, round(x))
        top = max(0, round(y))
        spot = self.image[top : top + mask.shape[0], left : left + mask.shape[1]]
        shade = np.round(mask[: spot.shape[0], : spot.shape[1]] / 255 * (SHADES - 1)).astype(int)
        for ground in (self.paper, *self.bands):
            here = spot == ground
            spot[here] = self.edges[ink, ground][shade[here]]

    def draw_plot(self) -> None:
        frame = slice(self.top - 1, self.bottom + 1), slice(self.left - 1, self.right + 1)
        self.image[frame] = self.faint
        self.image[self.top : self.bottom, self.left : self.right] = self.plot

    def row_axis(self, rows: Axis) -> None:
        for cell, label in rows.ticks:
            y = self.top + rows.place(cell + 0.5) * self.high
            self.image[round(y) - (self.high < 2) :][:1, self.left - 6 : self.left - 1] = self.soft
            self.text(self.left - 10 - fonts.width(label), y - fonts.HEIGHT / 2, label)

    def col_axis(self, cols: Axis) -> None:
        free = 0.0
        for cell, label in cols.ticks:
            x = self.left + cols.place(cell + 0.5) * self.wide
            start = x - fonts.width(label) / 2
            if start < free:
                continue
            self.image[self.bottom + 1 : self.bottom + 6, round(x) : round(x) + 1] = self.soft
            self.text(start, self.bottom + 10, label)
            free = start + fonts.width(label) + 12

    def col_shards(self, cols: Axis) -> None:
        top = self.top - STRIP
        for i, (start, stop, label) in enumerate(cols.shards):
            x0, x1 = (self.left + round(cols.place(cell) * self.wide) for cell in (start, stop))
            self.image[top : self.top - 4, x0:x1] = self.bands[i % 2]
            if fonts.width(label) + 8 <= x1 - x0:
                self.text((x0 + x1 - fonts.width(label)) / 2, top + 1, label)
            if start > cols.start:  # dotted, so that it is no data
                self.image[self.top : self.bottom : 6, x0] = self.ink
                self.image[self.top + 1 : self.bottom : 6, x0] = self.ink

    def row_shards(self, rows: Axis) -> None:
        x = self.right + 4
        for i, (start, stop, label) in enumerate(rows.shards):
            y0, y1 = (self.top + round(rows.place(cell) * self.high) for cell in (start, stop))
            self.image[y0:y1, x : x + STRIP - 4] = self.bands[i % 2]
            if fonts.width(label) + 8 <= y1 - y0:
                self.text(x + 1, (y0 + y1 - fonts.width(label)) / 2, label, upright=False)
            if start > rows.start:
                self.image[y0, self.left : self.right : 6] = self.ink
                self.image[y0, self.left + 1 : self.right : 6] = self.ink

    def colour_bar(self, x: int) -> None:
        lo = self.scale.lo
        hi = self.scale.hi
        height = min(max(self.high, 60), len(self.image) - self.top - 8)
        ramp = quantise(np.linspace(hi, lo, height)[:, None], lo, hi, LEVELS)
        self.image[self.top - 1 : self.top + height + 1, x - 1 : x + BAR + 1] = self.faint
        self.image[self.top : self.top + height, x : x + BAR] = ramp
        free = -20.0
        for value, label in sorted(self.scale.ticks, reverse=True):
            y = (hi - value) / (hi - lo) * height - fonts.HEIGHT / 2
            y = min(max(y, 0), height - fonts.HEIGHT + 2)
            if y >= free:
                self.text(x + BAR + 6, self.top + y, label)
                free = y + fonts.HEIGHT - 2
