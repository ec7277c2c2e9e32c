"""Messages between a live map and its browser: what the browser asks, what it gets."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from flexkernel.memory import reduce

from . import png
from .axis import Axis, Span
from .grid import Grid, exact
from .tile import REDUCED, Overview, Tile, Window

__all__ = ["TILE_PIXELS", "VALUES", "about", "asked_window", "probe", "span", "tile_message"]

# A first picture of pure noise, the worst case, costs a tile of 200 kB, a static picture of 2 × 70
# kB (html and png, both in base64) and 22 kB of ESM: under the 0.4 MB that a view may cost.
TILE_PIXELS = 200_000  # one byte each; a larger screen stretches them
MOST_PIXELS = 4096  # along one side
VALUES = 8_192  # so many native cells go along as fp32, so that hovering needs no question
NAMES = 512  # so many row or column labels go along


def about(grid: Grid, window: Window) -> dict[str, Any]:
    """What the browser needs to know once."""
    if grid.empty:
        return {}
    some_rows = np.linspace(0, grid.num_rows - 1, 64).astype(int).tolist()
    return {
        "title": grid.name,
        "about": f"{grid.shape_text} {grid.dtype}",
        "evidence": grid.words.evidence,
        "size": [grid.num_rows, grid.num_cols],
        "open": [window.rows, window.cols],
        "gutter": max(len(grid.row_label(row)) for row in some_rows),
        "pixels": TILE_PIXELS,
        "hows": list(REDUCED.items()),
        "label": f"Tensor map of {grid.name}, {grid.num_rows} rows by {grid.num_cols} columns",
    }


def asked_window(asked: dict[str, Any]) -> Window:
    """The window that a browser asks for. What comes over the wire is checked, not trusted.
    ValueError: it makes no sense."""
    height, width = (max(1, min(MOST_PIXELS, int(n))) for n in asked["size"])
    too_many = math.sqrt(max(1.0, height * width / TILE_PIXELS))
    how = asked.get("how", "extreme")
    if how not in REDUCED:
        raise ValueError(f"no reduction {how!r}; there are {', '.join(REDUCED)}")
    given = asked.get("range")
    fixed = None
    if isinstance(given, list) and given[0] < given[1]:
        fixed = float(given[0]), float(given[1])
    size = max(1, int(height / too_many)), max(1, int(width / too_many))
    return Window(span(asked["rows"]), span(asked["cols"]), *size, how, fixed)


def span(given: Any) -> Span:
    start, stop = given
    return Span(int(start), int(stop))


def tile_message(
    grid: Grid, overview: Overview, tile: Tile, ticks: Any
) -> tuple[dict[str, Any], list[bytes]]:
    """The answer to a view: words as JSON, pixels (and few native values) as raw buffers. ticks:
    labels that fit beside the rows, below the columns."""
    lo, hi = tile.range
    most_rows, most_columns = map(int, ticks)
    rows = grid.row_axis(tile.window.rows, most_rows)
    cols = grid.col_axis(tile.window.cols, most_columns)
    content = {
        "kind": "tile",
        "rows": tile.window.rows,
        "cols": tile.window.cols,
        "cells": tile.cells,
        "size": tile.values.shape,
        "how": tile.window.how,
        "range": tile.range,
        "signed": tile.signed,
        "says": tile.caption(overview.nan),
        "bar": tile.bar(),
        "ticks": [rows.ticks, cols.ticks],
        "shards": [rows.shards, cols.shards],
        "names": names(grid.row_name, rows),
        "columns": names(grid.column_name, cols) if grid.words.column_labels else None,
    }
    buffers = [png.quantise(tile.values, lo, hi).tobytes()]
    if tile.native and tile.values.size <= VALUES:
        buffers.append(np.ascontiguousarray(tile.values, np.float32).tobytes())
    return content, buffers


def names(name_of: Callable[[int], str], axis: Axis) -> list[str] | None:
    """The names of an axis' cells, for hovering; None if there are too many."""
    if axis.stop - axis.start > NAMES:
        return None
    return [name_of(cell) for cell in range(axis.start, axis.stop)]


def probe(grid: Grid, rows: Span, cols: Span, how: str) -> str:
    """What is under the pointer, exactly: one cell, or a pixel's block and where in it the value
    is."""
    rows, cols = grid.within(rows, cols)
    block = grid.part(rows, cols).cpu()
    if block.numel() == 1:
        return f"{grid.cell_name(rows.start, cols.start)}: {exact(block.flatten()[0])}"
    value = reduced(grid, block, how)
    nan = reduce.count_nan(block)
    missing = f" · {nan} NaN" if nan else ""
    place = f"rows {rows.start}–{rows.stop - 1}, columns {cols.start}–{cols.stop - 1}"
    if how in ("mean", "std") or value.isnan():
        return f"{place}: {REDUCED[how]} {exact(value)}{missing}"
    cell = int((block.float() == value).flatten().int().argmax())
    row = rows.start + cell // block.shape[1]
    column = cols.start + cell % block.shape[1]
    element = exact(block.flatten()[cell])
    return f"{place}: {REDUCED[how]} {element} at {grid.cell_name(row, column)}{missing}"


def reduced(grid: Grid, block: torch.Tensor, how: str) -> torch.Tensor:
    """A block of the grid, (rows, columns), as one pixel: () float32."""
    if how == "extreme":
        most, least = (reduce.tiles(block, height=1, width=1, how=end) for end in ("max", "min"))
        return grid.extreme(most, least).flatten()[0]
    return reduce.tiles(block, height=1, width=1, how=how).flatten()[0]
