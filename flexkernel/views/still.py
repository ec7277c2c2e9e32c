"""Still: the static copy of a view, which a saved notebook keeps.

No script, no SVG, inline styles only: nothing that a sanitiser would take out.
"""

from __future__ import annotations

import html
from base64 import b64encode
from typing import Any

from flexkernel.errors import CaptureExpired

from . import png
from .grid import Grid
from .table import Cell, Table
from .tile import Overview, Tile, Window, number

__all__ = ["noted", "still_bundle", "text_bundle"]

SHOWN = 0.75  # CSS pixels to a pixel of the picture, so that it is sharp
MOST_ROW_LABELS = 16
MOST_COLUMN_LABELS = 8


def still_bundle(grid: Grid, overview: Overview, tile: Tile) -> dict[str, Any]:
    """text/plain, text/html, image/png, and the size to show the picture at."""
    title = f"{grid.name}  {grid.shape_text} {grid.dtype}"
    caption = tile.caption(overview.nan)
    image, width, height = png.render(
        tile.values,
        png.Scale(*tile.range, tile.signed, tile.bar()),
        grid.row_axis(tile.window.rows, max(1, min(MOST_ROW_LABELS, tile.values.shape[0]))),
        grid.col_axis(tile.window.cols, MOST_COLUMN_LABELS),
        title,
        caption,
        tile.cells,
    )
    encoded = b64encode(image).decode()
    size = {"width": round(width * SHOWN), "height": round(height * SHOWN)}
    facts = facts_of(grid, overview)
    picture = (
        f'<img src="data:image/png;base64,{encoded}" '
        f'alt="{html.escape(f"{title}: {caption}", quote=True)}" '
        f'style="display:block;width:{size["width"]}px;max-width:100%;height:auto;'
        'border-radius:4px">'
    )
    return {
        "text/plain": "\n".join([title, caption, *(f"{name}: {value}" for name, value in facts)]),
        "text/html": figure(picture, size["width"], part_text(grid, tile.window), facts),
        "image/png": encoded,
        "size": size,
    }


def facts_of(grid: Grid, overview: Overview) -> list[tuple[str, str]]:
    """What a saved picture cannot be asked any more: bounds, largest elements, where they lie."""
    largest = ", ".join(
        f"{text} at {grid.cell_name(row, column)}" for row, column, text in overview.largest
    )
    centre = "zero" if grid.centre is None else number(grid.centre)
    facts = [
        ("lowest, highest", f"{number(overview.low)}, {number(overview.high)}"),
        (f"farthest from {centre}", largest or "none"),
    ]
    if grid.words.evidence:
        facts.append(("evidence", grid.words.evidence))
    return facts


def part_text(grid: Grid, window: Window) -> str:
    """Which part of the tensor a picture shows."""
    rows = f"{grid.num_rows:,} rows"
    cols = f"{grid.num_cols:,} columns"
    if (window.rows.size, window.cols.size) == (grid.num_rows, grid.num_cols):
        return f"All {rows} × {cols}."
    top, bottom = window.rows
    left, right = window.cols
    return f"Rows {top}–{bottom - 1} and columns {left}–{right - 1} of {rows} × {cols}."


def figure(picture: str, width: int, caption: str, facts: list[tuple[str, str]]) -> str:
    """The picture above its caption and facts, as HTML."""
    rows = [
        # a token that is read from the right must not turn the rest of its line round
        (
            Cell(name, style="opacity:.7;white-space:nowrap"),
            Cell("", f"<bdi>{html.escape(value)}</bdi>"),
        )
        for name, value in facts
    ]
    return (
        f'<figure style="margin:4px 0;max-width:{width}px">{picture}'
        f'<figcaption style="font-size:90%;margin-top:4px">{html.escape(caption)}</figcaption>'
        f'<div style="font-size:85%">{Table(rows).html()}</div></figure>'
    )


def noted(still: dict[str, Any], note: str) -> dict[str, Any]:
    """The static copy with a line that says why it is one."""
    if not note:
        return still
    noted = {**still, "text/plain": f"{still['text/plain']}\n{note}"}
    if "text/html" in still:
        line = f'<div style="font-size:85%;opacity:.8">{html.escape(note)}</div>'
        noted["text/html"] = still["text/html"] + line
    return noted


def text_bundle(grid: Grid) -> dict[str, Any]:
    """What is said of a tensor without cells to draw: a 0-d tensor's value, an empty one's
    shape."""
    try:
        said = "no elements, nothing to draw" if grid.shape else grid.scalar()
    except CaptureExpired as gone:
        return {"text/plain": f"{grid}\n{gone}"}
    return {"text/plain": f"{grid}: {said}"}
