"""The tensor map: any tensor as pixels, of which only those on screen travel, and again at each
zoom.

The browser asks for a part of the matrix and a size in pixels; the part is reduced where it lies
and goes over the comm as one byte a pixel. Beside the live map lies a static picture of it, which
a saved notebook keeps.
"""

from __future__ import annotations

import html
import itertools
import math
import sys
import threading
import time
import uuid
import weakref
from base64 import b64encode
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import anywidget
import numpy as np
import torch
import traitlets

from flexkernel.errors import CaptureExpired
from flexkernel.memory import reduce

from . import png
from .grid import Grid, Span, exact
from .table import Cell, Table

__all__ = ["TensorMap", "freeze_all", "tensor_map"]

# A first picture of pure noise, the worst case, costs a tile of 200 kB, a static picture of 2 × 70
# kB (html and png, both in base64) and 22 kB of ESM: under the 0.4 MB that a view may cost.
TILE_PIXELS = 200_000  # one byte each; a larger screen stretches them
STILL = (176, 704, 62_000)  # rows and columns of the static picture, and its pixels, at most
VALUES = 8_192  # so many native cells go along as fp32, so that hovering needs no question
NAMES = 512  # so many row labels go along
REDUCED = {"extreme": "signed extreme", "mean": "mean", "max": "max", "min": "min", "std": "std"}
ESM = Path(__file__).with_name("tensormap.js").read_text(encoding="utf-8")

# ipywidgets keeps every widget for ever: above this the oldest map becomes a picture and is let go
MAX_LIVE = 32
_live: weakref.WeakValueDictionary[int, TensorMap] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def tensor_map(
    source: Any,
    *,
    rows: Span | slice | None = None,
    cols: Span | slice | None = None,
    title: str | None = None,
) -> TensorMap:
    """A map of a Capture, or of a torch tensor or numpy array made by hand, to zoom into.

    source: anything with `shape`, `dtype` and either `tensor()` or `tiles(rows, cols, height,
    width, how)` and `__getitem__`; `name`, `tokens`, `shards`, `evidence` are shown where it has
    them. Leading dims become rows, the last dim columns. rows, cols: the part to open at, (start,
    stop) in rows and columns; Home shows the whole.
    """
    return TensorMap(Grid(source, title), rows=rows, cols=cols)


def freeze_all() -> list[TensorMap]:
    """Replaces every live map by its static picture, for a notebook that is to be kept. Returns
    those it froze."""
    return [view.freeze() for _, view in sorted(_live.items())]


def _admit(view: TensorMap) -> int:
    """Makes room for a live map among at most MAX_LIVE, and numbers it."""
    for _, oldest in sorted(_live.items())[: max(0, len(_live) - MAX_LIVE + 1)]:
        oldest.freeze(
            f"Frozen: only the last {MAX_LIVE} maps stay live. Run the cell again for a live one."
        )
    number = next(_numbers)
    _live[number] = view
    return number


# --- one view, drawn ------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """What is looked at: rows × cols, at most height × width pixels, how they are reduced, the
    colour range."""

    rows: Span
    cols: Span
    height: int = 1
    width: int = 1
    how: str = "extreme"
    range: tuple[float, float] | None = None


@dataclass(frozen=True)
class Tile:
    """A drawn part: values (h, w) float32, each of cells[0] × cells[1] cells, the range it is
    coloured by."""

    part: Part
    values: np.ndarray
    cells: tuple[int, int]
    range: tuple[float, float]
    signed: bool

    @property
    def native(self) -> bool:
        return self.cells == (1, 1)

    @property
    def beyond(self) -> int:
        lo, hi = self.range
        return int(((self.values < lo) | (self.values > hi)).sum())

    def says(self, nan: int | None) -> str:
        """What was reduced, what was clipped, what is missing: nothing of it silently."""
        down, along = self.cells
        what = (
            "one pixel is one cell"
            if self.native
            else f"{REDUCED[self.part.how]} of {down}×{along} cells/pixel"
        )
        clipped = f", {self.beyond:,} pixel{'s' * (self.beyond > 1)} beyond" if self.beyond else ""
        return f"{what} · range {range_text(self.range)}{clipped}" + (
            f" · {nan:,} NaN" if nan else ""
        )

    def bar(self) -> list[tuple[float, str]]:
        lo, hi = self.range
        return [(v, number(v)) for v in np.linspace(lo, hi, 5)]


def number(value: float) -> str:
    """Three digits, for an axis.

    >>> number(0.123456), number(-2.0), number(1234567.0)
    ('0.123', '-2', '1.23e+06')
    """
    return f"{0.0 if abs(value) < 1e-30 else value:.3g}"


def range_text(bounds: tuple[float, float]) -> str:
    lo, hi = bounds
    return f"±{number(hi)}" if lo == -hi else f"{number(lo)} to {number(hi)}"


def still_size(rows: Span) -> tuple[int, int]:
    """The pixels of a static picture: few rows leave room for more columns."""
    height = max(1, min(STILL[0], rows[1] - rows[0]))
    return height, max(1, min(STILL[1], STILL[2] // height))


def still_part(part: Part) -> Part:
    height, width = still_size(part.rows)
    return replace(part, height=height, width=width)


class Overview:
    """What is known of the whole matrix once it was looked at: bounds, NaN, largest elements,
    colour ranges."""

    def __init__(self, grid: Grid):
        self.rows, self.cols = (0, grid.num_rows), (0, grid.num_cols)
        self.size = still_size(self.rows)
        self.most, self.least = grid.bounds(self.rows, self.cols, *self.size)
        self.nan = grid.count_nan()
        self.signed = bool((self.least < 0).any())
        self.low, self.high = (
            _finite(t, pick) for t, pick in ((self.least, min), (self.most, max))
        )
        self.largest = self._largest(grid)
        self._ranges: dict[str, tuple[float, float]] = {}

    def range(self, grid: Grid, how: str) -> tuple[float, float]:
        """The colour range of one reduction: what 99.5 % of the whole map's pixels lie in.

        Of its pixels, not of its cells: the extreme of 180 cells lies beyond 99.5 % of cells half
        of the time, and the map would be nothing but its two end colours. It then stays the same
        at every zoom.
        """
        if how not in self._ranges:
            self._ranges[how] = fitting(self.tile(grid, how), self.signed and how != "std")
        return self._ranges[how]

    def tile(self, grid: Grid, how: str) -> torch.Tensor:
        known = {
            "max": self.most,
            "min": self.least,
            "extreme": reduce.extreme(self.most, self.least),
        }
        return known[how] if how in known else grid.tiles(self.rows, self.cols, *self.size, how)

    def _largest(self, grid: Grid, count: int = 3) -> list[tuple[int, int, str]]:
        """(row, column, value) of the elements farthest from zero: they lie in the pixels farthest
        from zero."""
        far = torch.maximum(self.most.abs(), self.least.abs()).nan_to_num(-1.0, posinf=math.inf)
        down, along = (
            -(-n // s) for n, s in zip((grid.num_rows, grid.num_cols), self.size, strict=True)
        )
        found: list[tuple[float, int, int, str]] = []
        for pixel in far.flatten().topk(min(count, far.numel())).indices.tolist():
            r, c = (pixel // far.shape[1]) * down, (pixel % far.shape[1]) * along
            block = grid.part(*grid.within((r, r + down), (c, c + along))).cpu()
            size = block.double().abs().nan_to_num(-1.0, posinf=math.inf).flatten()
            for cell in size.topk(min(count, len(size))).indices.tolist():
                if size[cell] >= 0:  # not a NaN
                    at = r + cell // block.shape[1], c + cell % block.shape[1]
                    found.append((float(size[cell]), *at, exact(block.flatten()[cell])))
        return [(r, c, text) for _, r, c, text in sorted(found, key=lambda f: -f[0])[:count]]


def _finite(values: torch.Tensor, pick: Any) -> float:
    finite = values[values.isfinite()]
    return float(pick(finite.min(), finite.max())) if len(finite) else math.nan


def fitting(values: torch.Tensor, signed: bool) -> tuple[float, float]:
    """The robust range of a tile; symmetric where the whole tensor has negative elements, though
    this tile may not."""
    lo, hi = reduce.robust_range(values)
    far = max(abs(lo), abs(hi))
    return (-far, far) if signed else (lo, hi)


def draw(grid: Grid, overview: Overview, part: Part) -> Tile:
    """The part as a tile. Its blocks are counted from row and column 0, so that panning does not
    make them shimmer."""
    rows, height = _snapped(part.rows, part.height, grid.num_rows)
    cols, width = _snapped(part.cols, part.width, grid.num_cols)
    known = (rows, cols, (height, width)) == (
        overview.rows,
        overview.cols,
        tuple(overview.most.shape),
    )
    values = (
        overview.tile(grid, part.how) if known else grid.tiles(rows, cols, height, width, part.how)
    )
    cells = tuple(
        -(-(stop - start) // size) for (start, stop), size in ((rows, height), (cols, width))
    )
    signed = overview.signed and part.how != "std"
    bounds = part.range or overview.range(grid, part.how)
    return Tile(
        replace(part, rows=rows, cols=cols), values.numpy(), (cells[0], cells[1]), bounds, signed
    )


def _snapped(span: Span, pixels: int, size: int) -> tuple[Span, int]:
    """The span widened to whole blocks, and how many blocks it has."""
    start, stop = max(0, min(span[0], size - 1)), min(size, max(span[1], span[0] + 1))
    block = -(-(stop - start) // max(1, pixels))
    start, stop = start // block * block, min(size, -(-stop // block) * block)
    return (start, stop), -(-(stop - start) // block)


# --- the widget -----------------------------------------------------------------------


class TensorMap(anywidget.AnyWidget):
    """A live map. Wheel zooms, dragging pans (with shift: zooms to the box), arrows move the
    cursor, Home resets."""

    _esm = ESM
    info = traitlets.Dict().tag(sync=True)
    lut = traitlets.Bytes().tag(sync=True)

    def __init__(
        self, grid: Grid, rows: Span | slice | None = None, cols: Span | slice | None = None
    ):
        self._grid = grid
        # Jupyter may answer the browser from another thread than the cell's
        self._lock = threading.RLock()
        self._display_id = uuid.uuid4().hex
        self._displayed = self._answered = False
        self._frozen = False
        # the static copy: the last one drawn, and after `freeze` all there is
        self._still: dict[str, Any] = {}
        self._over: Overview | None = None
        self._part = still_part(Part(span_of(rows, grid.num_rows), span_of(cols, grid.num_cols)))
        super().__init__(info=about(grid, self._part), lut=_luts())
        self.on_msg(self._on_message)
        self._number = -1 if grid.empty else _admit(self)

    @property
    def window(self) -> tuple[Span, Span]:
        """Rows and columns on screen, as last asked for by the browser."""
        return self._part.rows, self._part.cols

    @property
    def frozen(self) -> bool:
        return self._frozen

    def to_tensor(self) -> torch.Tensor:
        """The elements on screen: (rows, columns), the tensor's own dtype; a view where it lies
        here."""
        with self._lock:
            if self._frozen:
                raise CaptureExpired(
                    "this map is frozen and has let its tensor go; make a new one from the capture"
                )
            return self._grid.part(self._part.rows, self._part.cols)

    def freeze(self, note: str = "") -> TensorMap:
        """Replaces the live map in the notebook by a static picture of what it shows, and lets the
        tensor go."""
        with self._lock:
            if not self._frozen:
                self._still = self._draw_still(note)
                self._frozen = True
                self._grid.release()
                _live.pop(self._number, None)
                self._replace_output(note)
        return self

    # --- what Jupyter calls

    def _ipython_display_(self) -> None:
        """Displays under an id of its own: without one, `freeze` could not find the output
        again."""
        data, metadata = self._repr_mimebundle_()
        display = _notebook_display()
        if display:
            self._displayed = True
            display.display(data, metadata=metadata, raw=True, display_id=self._display_id)
        else:
            print(data["text/plain"])

    def _repr_mimebundle_(self, **_: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        with self._lock:
            still = self._still if self._frozen else self._draw_still()
            self._still = still
        metadata = {"image/png": still["size"]} if "size" in still else {}
        data = {mime: value for mime, value in still.items() if mime != "size"}
        if self._frozen or "image/png" not in data:
            return data, metadata
        view = {"version_major": 2, "version_minor": 0, "model_id": self.model_id}
        return {"application/vnd.jupyter.widget-view+json": view, **data}, metadata

    def __repr__(self) -> str:
        return self._repr_mimebundle_()[0]["text/plain"]

    def _overview(self) -> Overview:
        if self._over is None:
            self._over = Overview(self._grid)
        return self._over

    def _draw_still(self, note: str = "") -> dict[str, Any]:
        """The static copy of what is on screen; the one drawn before where the tensor is gone."""
        if self._grid.empty:
            return text_bundle(self._grid)
        try:
            tile = draw(self._grid, self._overview(), still_part(self._part))
        except CaptureExpired as gone:
            return (
                noted(self._still, note or str(gone))
                if self._still
                else {"text/plain": f"{self._grid}\n{gone}"}
            )
        return noted(still_bundle(self._grid, self._overview(), tile), note)

    def _replace_output(self, note: str) -> None:
        self.send({"kind": "frozen", "text": note or "frozen"})
        display = _notebook_display()
        if display and self._displayed:
            data, metadata = self._repr_mimebundle_()
            display.update_display(data, metadata=metadata, raw=True, display_id=self._display_id)
        # in a box of widgets it stays, or there would be a hole
        if self._displayed or not self._answered:
            self.close()
            # ipywidgets blanks a closed widget; ours stays shown
            self.__dict__.pop("_repr_mimebundle_", None)

    # --- messages from the browser

    def _on_message(self, _: Any, asked: dict[str, Any], buffers: Any) -> None:
        """One answer to each question {view, seq, kind, ...}; `view` says which display of this
        map asks."""
        answer = {"view": self._answer_view, "probe": self._answer_probe}.get(asked.get("kind", ""))
        if answer is None:
            return
        with self._lock:
            self._answered = True
            if self._frozen:
                self.send({"kind": "frozen", "text": "frozen"})
                return
            try:
                content, data = answer(asked)
            except CaptureExpired as gone:
                self.freeze(str(gone))
                return
            except Exception as error:  # unanswered, the browser would wait
                content, data = {"kind": "error", "text": f"{type(error).__name__}: {error}"}, []
            self.send({"view": asked.get("view"), "seq": asked.get("seq"), **content}, data)

    def _answer_view(self, asked: dict[str, Any]) -> tuple[dict[str, Any], list[bytes]]:
        began = time.perf_counter()
        overview, part = self._overview(), asked_part(asked)
        tile = draw(self._grid, overview, part)
        if asked.get("range") == "view":
            tile = replace(tile, range=fitting(torch.from_numpy(tile.values), tile.signed))
        self._part = replace(part, range=tile.range)
        content, buffers = tile_message(self._grid, overview, tile, asked.get("ticks", (20, 10)))
        return {**content, "ms": round((time.perf_counter() - began) * 1e3, 1)}, buffers

    def _answer_probe(self, asked: dict[str, Any]) -> tuple[dict[str, Any], list[bytes]]:
        text = probe(self._grid, _pair(asked["rows"]), _pair(asked["cols"]), asked["how"])
        return {"kind": "value", "text": text}, []


def span_of(wanted: Span | slice | None, size: int) -> Span:
    """(start, stop) within 0..size, from a pair or a slice; ValueError when nothing is in it."""
    if wanted is None:
        return 0, size
    start, stop, _ = (wanted if isinstance(wanted, slice) else slice(*wanted)).indices(size)
    if start >= stop:
        raise ValueError(f"{wanted} holds none of {size} rows or columns")
    return start, stop


def about(grid: Grid, part: Part) -> dict[str, Any]:
    """What the browser needs to know once."""
    if grid.empty:
        return {}
    widest = max(
        len(grid.row_label(row))
        for row in np.linspace(0, grid.num_rows - 1, 64).astype(int).tolist()
    )
    return {
        "title": grid.name,
        "about": f"{grid.shape_text} {grid.dtype}",
        "evidence": grid.evidence,
        "size": [grid.num_rows, grid.num_cols],
        "open": [part.rows, part.cols],
        "gutter": widest,
        "pixels": TILE_PIXELS,
        "hows": list(REDUCED.items()),
        "label": f"Tensor map of {grid.name}, {grid.num_rows} rows by {grid.num_cols} columns",
    }


def asked_part(asked: dict[str, Any]) -> Part:
    """The part a browser asks for. What comes over the wire is checked, not trusted."""
    height, width = (max(1, min(4096, int(n))) for n in asked["size"])
    too_many = math.sqrt(max(1.0, height * width / TILE_PIXELS))
    how = asked.get("how", "extreme")
    if how not in REDUCED:
        raise ValueError(f"no reduction {how!r}; there are {', '.join(REDUCED)}")
    given = asked.get("range")
    fixed = (
        (float(given[0]), float(given[1]))
        if isinstance(given, list) and given[0] < given[1]
        else None
    )
    size = max(1, int(height / too_many)), max(1, int(width / too_many))
    return Part(_pair(asked["rows"]), _pair(asked["cols"]), *size, how, fixed)


def _pair(span: Any) -> Span:
    start, stop = span
    return int(start), int(stop)


def tile_message(
    grid: Grid, overview: Overview, tile: Tile, ticks: Any
) -> tuple[dict[str, Any], list[bytes]]:
    """The answer to a view: words as JSON, pixels (and few native values) as raw buffers."""
    lo, hi = tile.range
    rows, cols = (
        grid.row_axis(tile.part.rows, int(ticks[0])),
        grid.col_axis(tile.part.cols, int(ticks[1])),
    )
    content = {
        "kind": "tile",
        "rows": tile.part.rows,
        "cols": tile.part.cols,
        "cells": tile.cells,
        "size": tile.values.shape,
        "how": tile.part.how,
        "range": tile.range,
        "signed": tile.signed,
        "says": tile.says(overview.nan),
        "bar": tile.bar(),
        "ticks": [rows.ticks, cols.ticks],
        "shards": [rows.shards, cols.shards],
        "names": [grid.row_name(row) for row in range(*tile.part.rows)]
        if rows.stop - rows.start <= NAMES
        else None,
    }
    buffers = [png.quantise(tile.values, lo, hi).tobytes()]
    if tile.native and tile.values.size <= VALUES:
        buffers.append(np.ascontiguousarray(tile.values, np.float32).tobytes())
    return content, buffers


def probe(grid: Grid, rows: Span, cols: Span, how: str) -> str:
    """What is under the pointer, exactly: one cell, or a pixel's block and where in it the value
    is."""
    rows, cols = grid.within(rows, cols)
    block = grid.part(rows, cols).cpu()
    if block.numel() == 1:
        return f"{grid.row_name(rows[0])}column {cols[0]}: {exact(block.flatten()[0])}"
    value = reduce.tiles(block, height=1, width=1, how=how)
    nan = reduce.count_nan(block)
    missing = f" · {nan} NaN" if nan else ""
    where = f"rows {rows[0]}–{rows[1] - 1}, columns {cols[0]}–{cols[1] - 1}: {REDUCED[how]} "
    if how in ("mean", "std") or value.isnan():
        return f"{where}{exact(value.flatten()[0])}{missing}"
    cell = int((block.float() == value).flatten().int().argmax())
    row, col = rows[0] + cell // block.shape[1], cols[0] + cell % block.shape[1]
    return f"{where}{exact(block.flatten()[cell])} at {grid.row_name(row)}column {col}{missing}"


def _luts() -> bytes:
    return np.concatenate([png.colours(True), png.colours(False)]).tobytes()


def _notebook_display() -> Any:
    """IPython's display module where a notebook runs, else None. Looked up, not imported: without
    IPython running there is nobody to display to."""
    ipython = sys.modules.get("IPython")
    return sys.modules.get("IPython.display") if ipython and ipython.get_ipython() else None


# --- the static copy ------------------------------------------------------------------


def still_bundle(grid: Grid, overview: Overview, tile: Tile) -> dict[str, Any]:
    """text/plain, text/html, image/png, and the size to show the picture at. No script, no SVG,
    inline styles only."""
    rows = grid.row_axis(tile.part.rows, max(1, min(16, tile.values.shape[0])))
    cols = grid.col_axis(tile.part.cols, 8)
    title = f"{grid.name}  {grid.shape_text} {grid.dtype}"
    caption = tile.says(overview.nan)
    scale = png.Scale(*tile.range, tile.signed, tile.bar())
    image, width, height = png.render(tile.values, scale, rows, cols, title, caption, tile.cells)
    encoded = b64encode(image).decode()
    size = {"width": round(width * 0.75), "height": round(height * 0.75)}
    facts = facts_of(grid, overview)
    return {
        "text/plain": "\n".join([title, caption, *(f"{name}: {value}" for name, value in facts)]),
        "text/html": _still_html(
            encoded, size["width"], f"{title}: {caption}", part_text(grid, tile.part), facts
        ),
        "image/png": encoded,
        "size": size,
    }


def facts_of(grid: Grid, overview: Overview) -> list[tuple[str, str]]:
    """What a saved picture cannot be asked any more: bounds, largest elements, where they lie."""
    largest = ", ".join(
        f"{text} at {grid.row_name(r)}column {c}" for r, c, text in overview.largest
    )
    return [
        ("lowest, highest", f"{number(overview.low)}, {number(overview.high)}"),
        ("farthest from zero", largest or "none"),
        *([("evidence", grid.evidence)] if grid.evidence else []),
    ]


def part_text(grid: Grid, part: Part) -> str:
    """Which part of the tensor a picture shows."""
    whole = part.rows == (0, grid.num_rows) and part.cols == (0, grid.num_cols)
    rows, cols = f"{grid.num_rows:,} rows", f"{grid.num_cols:,} columns"
    if whole:
        return f"All {rows} × {cols}."
    (r0, r1), (c0, c1) = part.rows, part.cols
    return f"Rows {r0}–{r1 - 1} and columns {c0}–{c1 - 1} of {rows} × {cols}."


def _still_html(
    encoded: str, width: int, alt: str, caption: str, facts: list[tuple[str, str]]
) -> str:
    rows = [
        # a token written from right to left must not turn the rest of its line round
        (
            Cell(name, style="opacity:.7;white-space:nowrap"),
            Cell("", f"<bdi>{html.escape(value)}</bdi>"),
        )
        for name, value in facts
    ]
    return (
        f'<figure style="margin:4px 0;max-width:{width}px">'
        f'<img src="data:image/png;base64,{encoded}" alt="{html.escape(alt, quote=True)}" '
        f'style="display:block;width:{width}px;max-width:100%;height:auto;border-radius:4px">'
        f'<figcaption style="font-size:90%;margin-top:4px">{html.escape(caption)}</figcaption>'
        f'<div style="font-size:85%">{Table(rows).html()}</div></figure>'
    )


def noted(still: dict[str, Any], note: str) -> dict[str, Any]:
    """The static copy with a line that says why it is one."""
    if not note:
        return still
    line = f'<div style="font-size:85%;opacity:.8">{html.escape(note)}</div>'
    page = {"text/html": still["text/html"] + line} if "text/html" in still else {}
    return {**still, "text/plain": f"{still['text/plain']}\n{note}", **page}


def text_bundle(grid: Grid) -> dict[str, Any]:
    """What is said of a tensor without cells to draw: a 0-d tensor's value, an empty one's
    shape."""
    try:
        return {
            "text/plain": f"{grid}: {grid.scalar() if not grid.shape else 'no elements, nothing to draw'}"
        }
    except CaptureExpired as gone:
        return {"text/plain": f"{grid}\n{gone}"}
