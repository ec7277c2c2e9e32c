"""Tile: a part of a matrix, reduced to pixels and coloured over a range."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch

from flexkernel.memory import reduce

from .axis import Span
from .grid import Grid, exact

__all__ = ["REDUCED", "Overview", "Tile", "Window", "draw", "fitting", "number", "still_window"]

STILL = (176, 704, 62_000)  # rows and columns of the static picture, and its pixels, at most
REDUCED = {"extreme": "signed extreme", "mean": "mean", "max": "max", "min": "min", "std": "std"}
MOST_LARGEST = 3  # elements that a view names

Range = tuple[float, float]


@dataclass(frozen=True)
class Window:
    """What is looked at: rows × cols, at most height × width pixels, how they are reduced, the
    colour range."""

    rows: Span
    cols: Span
    height: int = 1
    width: int = 1
    how: str = "extreme"
    range: Range | None = None

    @property
    def place(self) -> tuple[Span, Span, int, int]:
        return self.rows, self.cols, self.height, self.width


class Cells(NamedTuple):
    """How many cells stand behind a pixel."""

    down: int
    along: int


@dataclass(frozen=True)
class Tile:
    """A drawn part: values (h, w) float32, the cells of each, the range it is coloured by.

    middle: the value that its colours diverge from; None: they run from low to high."""

    window: Window
    values: np.ndarray
    cells: Cells
    range: Range
    middle: float | None

    @property
    def signed(self) -> bool:
        return self.middle is not None

    @property
    def native(self) -> bool:
        """Whether a pixel is a cell."""
        return self.cells == (1, 1)

    @property
    def beyond(self) -> int:
        """How many pixels lie outside of the range."""
        lo, hi = self.range
        return int(((self.values < lo) | (self.values > hi)).sum())

    def caption(self, nan: int | None) -> str:
        """What was reduced, what was clipped, what is missing: nothing of it silently."""
        what = "one pixel is one cell"
        if not self.native:
            down, along = self.cells
            what = f"{REDUCED[self.window.how]} of {down}×{along} cells/pixel"
        parts = [f"range {range_text(self.range, self.middle)}"]
        if self.beyond:
            pixels = "pixel" if self.beyond == 1 else "pixels"
            parts.append(f"{self.beyond:,} {pixels} beyond")
        caption = f"{what} · {', '.join(parts)}"
        if nan:
            caption += f" · {nan:,} NaN"
        return caption

    def bar(self) -> list[tuple[float, str]]:
        """The labels of the colour bar."""
        lo, hi = self.range
        return [(v, number(v)) for v in np.linspace(lo, hi, 5)]


def number(value: float) -> str:
    """Three digits, for an axis.

    >>> number(0.123456), number(-2.0), number(1234567.0)
    ('0.123', '-2', '1.23e+06')
    """
    if abs(value) < 1e-30:
        return "0"
    return f"{value:.3g}"


def range_text(bounds: Range, middle: float | None) -> str:
    """A colour range in words.

    >>> range_text((-2.0, 2.0), 0.0), range_text((5.0, 7.0), 6.0), range_text((0.0, 1.0), None)
    ('±2', '6 ± 1', '0 to 1')
    """
    lo, hi = bounds
    if lo == -hi:
        return f"±{number(hi)}"
    if middle is not None:
        return f"{number(middle)} ± {number(hi - middle)}"
    return f"{number(lo)} to {number(hi)}"


def still_size(rows: Span) -> tuple[int, int]:
    """The pixels of a static picture: few rows leave room for more columns."""
    height = max(1, min(STILL[0], rows.size))
    return height, max(1, min(STILL[1], STILL[2] // height))


def still_window(window: Window) -> Window:
    """The same window in the pixels of a static picture."""
    height, width = still_size(window.rows)
    return replace(window, height=height, width=width)


class Overview:
    """What is known of the whole matrix once it was looked at: bounds, NaN, largest elements,
    colour ranges."""

    def __init__(self, grid: Grid):
        rows = Span(0, grid.num_rows)
        cols = Span(0, grid.num_cols)
        self.whole = Window(rows, cols, *still_size(rows))
        self.most, self.least = grid.bounds(*self.whole.place)
        self.nan = grid.count_nan()
        self.middle = grid.centre
        self.robust = grid.centre is None
        if self.middle is None and bool((self.least < 0).any()):
            self.middle = 0.0
        self.low = _finite(self.least, min)
        self.high = _finite(self.most, max)
        self.largest = self._largest(grid)
        self._ranges: dict[str, Range] = {}

    def middle_of(self, how: str) -> float | None:
        """What the colours of a reduction diverge from; a spread has no middle."""
        if how == "std":
            return None
        return self.middle

    def range(self, grid: Grid, how: str) -> Range:
        """The colour range of one reduction: what 99.5 % of the whole map's pixels lie in.

        Of its pixels, not of its cells: the extreme of 180 cells lies beyond 99.5 % of cells half
        of the time, and the map would be nothing but its two end colours. It then stays the same
        at every zoom.
        """
        if how not in self._ranges:
            self._ranges[how] = self.fitted(self.tile(grid, how), how)
        return self._ranges[how]

    def fitted(self, values: torch.Tensor, how: str) -> Range:
        """The colour range that fits a tile of a reduction, (h, w) float32."""
        middle = self.middle_of(how)
        return fitting(values, middle, self.robust or middle is None)

    def tile(self, grid: Grid, how: str) -> torch.Tensor:
        """The whole matrix reduced to the pixels of a static picture: (h, w) float32."""
        if how == "max":
            return self.most
        if how == "min":
            return self.least
        if how == "extreme":
            return grid.extreme(self.most, self.least)
        return grid.tiles(*self.whole.place, how)

    def covers(self, window: Window) -> bool:
        """Whether that is what tile() gives."""
        shape = (window.height, window.width)
        same = (window.rows, window.cols) == (self.whole.rows, self.whole.cols)
        return same and shape == tuple(self.most.shape)

    def _largest(self, grid: Grid) -> list[tuple[int, int, str]]:
        """(row, column, value) of the elements farthest from the centre: they lie in the pixels
        farthest from it."""
        far = torch.maximum(_distance(self.most, self.middle), _distance(self.least, self.middle))
        down = -(-grid.num_rows // self.whole.height)
        along = -(-grid.num_cols // self.whole.width)
        found: list[tuple[float, int, int, str]] = []
        for pixel in far.flatten().topk(min(MOST_LARGEST, far.numel())).indices.tolist():
            row = pixel // far.shape[1] * down
            column = pixel % far.shape[1] * along
            rows, cols = grid.within(Span(row, row + down), Span(column, column + along))
            block = grid.part(rows, cols).cpu()
            distance = _distance(block.double(), self.middle).flatten()
            for cell in distance.topk(min(MOST_LARGEST, len(distance))).indices.tolist():
                if distance[cell] >= 0:  # not a NaN
                    at = row + cell // block.shape[1], column + cell % block.shape[1]
                    found.append((float(distance[cell]), *at, exact(block.flatten()[cell])))
        found.sort(key=lambda element: -element[0])
        return [element[1:] for element in found[:MOST_LARGEST]]


def _distance(values: torch.Tensor, middle: float | None) -> torch.Tensor:
    """How far values are from the middle, -1 for NaN: same shape and dtype."""
    return (values - (middle or 0.0)).abs().nan_to_num(-1.0, posinf=math.inf)


def _finite(values: torch.Tensor, pick: Any) -> float:
    """The least or the most of the finite values of a tensor of any shape; NaN: there are none."""
    finite = values[values.isfinite()]
    if not len(finite):
        return math.nan
    return float(pick(finite.min(), finite.max()))


def fitting(values: torch.Tensor, middle: float | None, robust: bool = True) -> Range:
    """The colour range of a tile, any shape, float32: symmetric around a middle.

    robust: leave a few outliers out. Where the source says its centre they are what one looks
    for."""
    if robust:
        lo, hi = reduce.robust_range(values)
        if middle is None:
            return lo, hi
        far = max(abs(lo), abs(hi))
        return middle - far, middle + far
    finite = values[values.isfinite()]
    centre = middle or 0.0
    far = float((finite - centre).abs().max()) if len(finite) else 0.0
    far = far or abs(centre) or 1.0
    return centre - far, centre + far


def draw(grid: Grid, overview: Overview, window: Window) -> Tile:
    """The window as a tile. Its blocks are counted from row and column 0, so that panning does not
    make them shimmer."""
    rows, height = _snapped(window.rows, window.height, grid.num_rows)
    cols, width = _snapped(window.cols, window.width, grid.num_cols)
    window = replace(window, rows=rows, cols=cols, height=height, width=width)
    if overview.covers(window):
        values = overview.tile(grid, window.how)
    else:
        values = grid.tiles(*window.place, window.how)
    cells = Cells(-(-rows.size // height), -(-cols.size // width))
    bounds = window.range or overview.range(grid, window.how)
    return Tile(window, values.numpy(), cells, bounds, overview.middle_of(window.how))


def _snapped(span: Span, pixels: int, size: int) -> tuple[Span, int]:
    """The span widened to whole blocks, and how many blocks it has."""
    start = max(0, min(span.start, size - 1))
    stop = min(size, max(span.stop, span.start + 1))
    block = -(-(stop - start) // max(1, pixels))
    start = start // block * block
    stop = min(size, -(-stop // block) * block)
    return Span(start, stop), -(-(stop - start) // block)
