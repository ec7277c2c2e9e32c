"""Pictures: what a view sends to the browser, and how long that takes; beside plotly's
FigureWidget."""

from __future__ import annotations

import json
import time
from typing import Any

import torch

from flexkernel.views import tensor_map

from .lab import Lab
from .moves import WIDE, wide
from .reads import constant, milliseconds
from .timing import Figure, in_turns

__all__ = ["first", "ten"]

SCREEN = (300, 600)  # pixels that a notebook's cell has for a map
PART = 64  # FigureWidget gets that part of the large map: the whole took 145 s


def first(lab: Lab) -> list[Figure]:
    """The first picture of a 4096 × 16384 sharded activation, from `.show()` to the pixels; and a
    zoom into it."""
    session, rows = wide(lab)
    session.hook(WIDE)
    capture = session.run(rows)[WIDE]
    num_rows, num_cols = capture.shape[-2:]
    sizes, views = [], []

    def open_one() -> float:
        begin = time.perf_counter()
        view = Shown(capture)
        view.ask((0, num_rows), (0, num_cols))
        seconds = time.perf_counter() - begin
        sizes.append(view.num_bytes)
        views.append(view)
        return seconds

    opened = in_turns({"open": open_one}, lab.repeats, warm=0)["open"]
    view, beyond = views[-1], []
    for i in range(lab.repeats):
        part = (i, num_rows // 2 + i), (i, num_cols // 2 + i)
        begin = time.perf_counter()
        view.ask(*part)
        zoomed = time.perf_counter() - begin
        begin = time.perf_counter()
        capture.tiles(*part, *SCREEN)
        beyond.append(max(zoomed - (time.perf_counter() - begin), 0.0))
    few = torch.randn(num_rows // 8, num_cols // 8)
    theirs = in_turns({"plotly": lambda: figure_widget(few)}, 1, warm=0)["plotly"]
    return [
        Figure("sent", constant(max(sizes) / 1e6), "MB", at_most=0.4),
        Figure("the first picture", milliseconds(opened[:1]), "ms", at_most=500),
        Figure("another of the same", milliseconds(opened), "ms"),
        Figure("a zoom beyond its reduction", milliseconds(beyond), "ms", at_most=50),
        Figure(f"FigureWidget of 1/{PART} of it: sends", constant(sent(figure(few)) / 1e6), "MB"),
        Figure("and is made in", milliseconds(theirs), "ms"),
    ]


def ten(lab: Lab) -> list[Figure]:
    """Ten views in one notebook, made and drawn: what ten modules of the real model put out for
    eight tokens."""
    session = lab.session(lab.real(), n=1)
    session.hook("model.layers.**")
    run = session.run([[3, 5, 7, 11, 13, 17, 19, 23]])
    tensors = [
        capture.tensor()[0] for capture in run if capture.error is None and capture.ndim == 3
    ][:10]
    assert len(tensors) == 10
    sizes: list[int] = []

    def ours() -> None:
        views = [Shown(tensor) for tensor in tensors]
        for view, tensor in zip(views, tensors, strict=True):
            view.ask((0, tensor.shape[0]), (0, tensor.shape[1]))
        sizes.append(sum(view.num_bytes for view in views))

    theirs = tensors[:1] if lab.quick else tensors
    times = in_turns(
        {"ours": ours, "plotly": lambda: [figure_widget(t) for t in theirs]},
        max(lab.repeats // 2, 2),
    )
    return [
        Figure("sent by ours", constant(max(sizes) / 1e6), "MB", at_most=1),
        Figure("ours made and drawn in", milliseconds(times["ours"]), "ms", at_most=2000),
        Figure(
            f"sent by {len(theirs)} FigureWidgets",
            constant(sum(sent(figure(t)) for t in theirs) / 1e6),
            "MB",
        ),
        Figure("they are made, not drawn, in", milliseconds(times["plotly"]), "ms"),
    ]


class Shown:
    """A map as a notebook shows it: all that goes over the wire is counted, with the widget's own
    code."""

    def __init__(self, source: Any):
        self.view = tensor_map(source)
        self.num_bytes = sent(self.view) + len(
            json.dumps(self.view._repr_mimebundle_()[0], default=str)
        )
        self.answers: list[Any] = []
        self.view.send = self._count

    def _count(self, content: Any, buffers: Any = None) -> None:
        assert content.get("kind") != "error", content
        self.answers.append(content)
        self.num_bytes += len(json.dumps(content)) + sum(
            memoryview(b).nbytes for b in buffers or ()
        )

    def ask(self, rows: tuple[int, int], cols: tuple[int, int]) -> None:
        """What the browser asks when it is opened, and at each zoom."""
        before = len(self.answers)
        asked = {
            "rows": list(rows),
            "cols": list(cols),
            "size": list(SCREEN),
            "ticks": [20, 9],
            "how": "extreme",
        }
        self.view._handle_custom_msg({"kind": "view", "view": "me", "seq": before, **asked}, [])
        assert len(self.answers) == before + 1, "it was answered"


def sent(widget: Any) -> int:
    """Bytes of a widget's state as it is opened in the browser, its code included."""
    from ipywidgets.widgets.widget import _remove_buffers

    state, _, buffers = _remove_buffers(widget.get_state())
    return len(json.dumps(state, default=str)) + sum(memoryview(b).nbytes for b in buffers)


def figure(tensor: torch.Tensor) -> Any:
    import plotly.graph_objects as go

    return go.FigureWidget(go.Heatmap(z=tensor.numpy()))


def figure_widget(tensor: torch.Tensor) -> None:
    assert sent(figure(tensor)) > tensor.numel()
