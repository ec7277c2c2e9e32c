"""The tensor map: any tensor as pixels, of which only those on screen travel, and again at each
zoom.

The browser asks for a part of the matrix and a size in pixels; the part is reduced where it lies
and goes over the comm as one byte a pixel. Beside the live map lies a static picture of it, which
a saved notebook keeps.
"""

from __future__ import annotations

import itertools
import sys
import threading
import time
import uuid
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import anywidget
import numpy as np
import torch
import traitlets

from flexkernel.errors import CaptureExpired

from . import messages, png
from .axis import Span
from .grid import Grid
from .source import Drawable
from .still import noted, still_bundle, text_bundle
from .tile import Overview, Window, draw, still_window

__all__ = ["TensorMap", "freeze_all", "tensor_map"]

ESM = Path(__file__).with_name("tensormap.js").read_text(encoding="utf-8")

# ipywidgets keeps every widget for ever: above this the oldest map becomes a picture and is let go
MAX_LIVE = 32
_live: weakref.WeakValueDictionary[int, TensorMap] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def tensor_map(
    source: Drawable,
    *,
    rows: tuple[int, int] | slice | None = None,
    cols: tuple[int, int] | slice | None = None,
    title: str | None = None,
    x: Sequence[Any] | None = None,
    y: Sequence[Any] | None = None,
) -> TensorMap:
    """A map of a Capture, or of a torch tensor or numpy array made by hand, to zoom into.

    Leading dims become rows, the last dim columns. source: anything with `shape`, `dtype` and
    either `tensor()` or `tiles(rows, cols, height, width, how)` and `__getitem__`; what
    views.source calls Words is shown where it has them. rows, cols: the part to open at, (start,
    stop) in rows and columns; Home shows the whole. x, y: labels of all columns, of all rows, for
    instance tokens.
    """
    return TensorMap(Grid(source, title, x, y), rows=rows, cols=cols)


def freeze_all() -> list[TensorMap]:
    """Replace every live map by its static picture, for a notebook that is to be kept. Returns
    those it froze."""
    return [view.freeze() for _, view in sorted(_live.items())]


def _admit(view: TensorMap) -> int:
    """Make room for a live map among at most MAX_LIVE. Returns its number."""
    for _, oldest in sorted(_live.items())[: max(0, len(_live) - MAX_LIVE + 1)]:
        oldest.freeze(
            f"Frozen: only the last {MAX_LIVE} maps stay live. Run the cell again for a live one."
        )
    number = next(_numbers)
    _live[number] = view
    return number


# --- the widget -----------------------------------------------------------------------


class TensorMap(anywidget.AnyWidget):
    """A live map. Wheel zooms, dragging pans (with shift: zooms to the box), arrows move the
    cursor, Home resets."""

    _esm = ESM
    info = traitlets.Dict().tag(sync=True)
    lut = traitlets.Bytes().tag(sync=True)

    def __init__(
        self,
        grid: Grid,
        rows: tuple[int, int] | slice | None = None,
        cols: tuple[int, int] | slice | None = None,
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
        self._window = still_window(
            Window(span_of(rows, grid.num_rows), span_of(cols, grid.num_cols))
        )
        super().__init__(info=messages.about(grid, self._window), lut=_luts())
        self.on_msg(self._on_message)
        self._number = -1 if grid.empty else _admit(self)

    @property
    def window(self) -> tuple[Span, Span]:
        """Rows and columns on screen, as last asked for by the browser."""
        return self._window.rows, self._window.cols

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
            return self._grid.part(self._window.rows, self._window.cols)

    def freeze(self, note: str = "") -> TensorMap:
        """Replace the live map in the notebook by a static picture of what it shows, and let the
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
        """Display under an id of its own: without one, `freeze` could not find the output
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
            if not self._frozen:
                self._still = self._draw_still()
            data = dict(self._still)
        metadata = {}
        if "size" in data:
            metadata["image/png"] = data.pop("size")
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
            tile = draw(self._grid, self._overview(), still_window(self._window))
        except CaptureExpired as gone:
            if self._still:
                return noted(self._still, note or str(gone))
            return {"text/plain": f"{self._grid}\n{gone}"}
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
        overview = self._overview()
        window = messages.asked_window(asked)
        tile = draw(self._grid, overview, window)
        if asked.get("range") == "view":
            fitted = overview.fitted(torch.from_numpy(tile.values), window.how)
            tile = replace(tile, range=fitted)
        self._window = replace(window, range=tile.range)
        ticks = asked.get("ticks", (20, 10))
        content, buffers = messages.tile_message(self._grid, overview, tile, ticks)
        return {**content, "ms": round((time.perf_counter() - began) * 1e3, 1)}, buffers

    def _answer_probe(self, asked: dict[str, Any]) -> tuple[dict[str, Any], list[bytes]]:
        rows, cols = messages.span(asked["rows"]), messages.span(asked["cols"])
        text = messages.probe(self._grid, rows, cols, asked["how"])
        return {"kind": "value", "text": text}, []


def span_of(wanted: tuple[int, int] | slice | None, size: int) -> Span:
    """(start, stop) within 0..size, from a pair or a slice; ValueError when nothing is in it."""
    if wanted is None:
        return Span(0, size)
    part = wanted if isinstance(wanted, slice) else slice(*wanted)
    start, stop, _ = part.indices(size)
    if start >= stop:
        raise ValueError(f"{wanted} holds none of {size} rows or columns")
    return Span(start, stop)


def _luts() -> bytes:
    return np.concatenate([png.colours(True), png.colours(False)]).tobytes()


def _notebook_display() -> Any:
    """IPython's display module where a notebook runs, else None. Looked up, not imported: without
    IPython running there is nobody to display to."""
    ipython = sys.modules.get("IPython")
    return sys.modules.get("IPython.display") if ipython and ipython.get_ipython() else None
