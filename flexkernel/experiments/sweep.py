"""Sweep: one number for each module and position, of a run in which only that is edited."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from flexkernel.errors import CaptureError, HookError
from flexkernel.memory.plan import Planner
from flexkernel.session.capture import Capture, draw
from flexkernel.session.progress import Progress, reporting
from flexkernel.session.prompts import Batch, Prompts
from flexkernel.session.run import Run
from flexkernel.views.table import Cell, Table, page

if TYPE_CHECKING:
    from flexkernel.session.session import Session
    from flexkernel.views.tensormap import TensorMap

__all__ = ["Sweep", "sweep"]

NAME = "(sweep)"  # of the hook that a cell has
SHOWN = 40  # modules and positions in a table
ABOVE = "178,24,43"  # RGB of a cell above the baseline
BELOW = "33,102,172"
STRONGEST = 0.7  # opacity of the cell that is furthest from it

Metric = Callable[[Run], Any]
Edit = str | Callable[..., Any]


def sweep(  # noqa: PLR0913 - a user's keywords
    session: Session,
    prompt: Prompts,
    modules: str | Sequence[str],
    positions: Sequence[int] | None = None,
    *,
    metric: Metric,
    edit: Edit,
    value: Any = None,
    at: str = "output",
    progress: Progress | None = None,
) -> Sweep:
    """One number for each module of these globs and each position: metric(run) when that alone is
    edited. See Session.sweep."""
    batch = session.batch(prompt)
    names = firing(session.loaded.planner, modules, at)
    change = Change(edit, value, at)
    return Sweep(session, batch, names, positions, metric, change).resume(progress)


@dataclass(frozen=True)
class Change:
    """What is done to the value of a cell: an edit, what it takes, and where in the module.

    value: a Run stands for what it captured at each module."""

    edit: Edit
    value: Any
    at: str

    @property
    def name(self) -> str:
        if isinstance(self.edit, str):
            return self.edit
        return getattr(self.edit, "__name__", type(self.edit).__name__)

    def value_for(self, module: str) -> Any:
        """What the edit takes at this module. CaptureError: the run captured nothing there."""
        if not isinstance(self.value, Run):
            return self.value
        if (module, self.at) not in self.value:
            raise CaptureError(
                f"run {self.value.number} captured nothing at {module!r}, {self.at}, to patch in: "
                "hook it (session.hook), then run the other prompt"
            )
        return self.value[module, self.at]

    def captures(self, modules: Sequence[str]) -> list[Capture]:
        """The captures that are patched in."""
        values = [self.value_for(module) for module in modules]
        return [value for value in values if isinstance(value, Capture)]

    def check(self, modules: Sequence[str], batch: Batch) -> None:
        """CaptureError: a run is to be patched in, and lacks a module or has another length."""
        self.captures(modules)
        if not isinstance(self.value, Run):
            return
        here = len(batch.ids[0])
        there = len(self.value.plan.ids[0])
        if here != there:
            raise CaptureError(
                f"the prompt has {here} tokens and that of run {self.value.number} {there}: one "
                "patched into the other has to be as long"
            )


class Sweep:
    """What a metric says of a run when one module is edited at one position, for all of them.

    values: numpy, (modules, positions), NaN where not done yet. baseline: of the run without the
    edit. modules, positions: what the rows and columns are. labels: the positions with their
    tokens, of a prompt of one row. resume() goes on where it was interrupted."""

    def __init__(
        self,
        session: Session,
        batch: Batch,
        modules: Sequence[str],
        positions: Sequence[int] | None,
        metric: Metric,
        change: Change,
    ):
        change.check(modules, batch)  # before anything runs
        self._session = session
        self._loaded = session.loaded
        self._batch = batch
        self._metric = metric
        self._change = change
        self.modules = tuple(modules)
        self.positions = columns_of(batch, positions)
        self.values = np.full((len(self.modules), len(self.positions)), np.nan)
        self.baseline = math.nan
        self._done = np.zeros(self.values.shape, dtype=bool)

    # --- doing it ---------------------------------------------------------------------

    @property
    def left(self) -> int:
        """How many cells are not done."""
        return int((~self._done).sum())

    def resume(self, progress: Progress | None = None) -> Sweep:
        """Do what is left. Ctrl-C ends it with what there is so far. Your own hooks stay as they
        are, and fire too. HookError: another model has been loaded."""
        session = self._session
        if session.loaded is not self._loaded:
            raise HookError("another model has been loaded since this sweep began: sweep again")
        with reporting(session.bar, progress, "sweep", "cell") as report, self._pinned():
            try:
                self._measure_all(report)
            except KeyboardInterrupt:
                total = self._done.size
                print(f"{total - self.left} of {total} done: sweep.resume()", file=sys.stderr)
        return self

    def _measure_all(self, report: Progress) -> None:
        total = self._done.size
        if math.isnan(self.baseline):
            report("running", 0, total)
            self.baseline = self._measure()
        began = time.monotonic()
        todo = np.argwhere(~self._done)
        for count, (row, column) in enumerate(todo):
            eta = remaining(time.monotonic() - began, count, len(todo))
            report(f"running{eta}", total - len(todo) + count, total)
            self.values[row, column] = self._cell(self.modules[row], self.positions[column])
            self._done[row, column] = True

    def _cell(self, module: str, position: int) -> float:
        options: dict[str, Any] = {
            "at": self._change.at,
            "edit": self._change.edit,
            "value": self._change.value_for(module),
            "positions": [position],
            "capture": "none",
            "name": NAME,
        }
        with self._session.hooked(module, **options):
            return self._measure()

    def _measure(self) -> float:
        run = self._session.run(self._batch)
        try:
            return number(self._metric(run))
        finally:
            run.free()

    @contextlib.contextmanager
    def _pinned(self) -> Iterator[None]:
        """The captures that are patched in do not expire meanwhile."""
        with contextlib.ExitStack() as holds:
            for capture in self._change.captures(self.modules):
                holds.callback(capture.pin())
            yield

    # --- what a view draws ------------------------------------------------------------

    @property
    def labels(self) -> list[str]:
        """What the columns are: position, and the token there where the prompt is one row."""
        rows = self._batch.tokens
        if len(rows) > 1:
            return [str(position) for position in self.positions]
        # a negative position counts from the end, in a list as in a prompt
        return [f"{position} {rows[0][position]!r}" for position in self.positions]

    @property
    def name(self) -> str:
        return f"sweep of {self._change.name}"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def centre(self) -> float | None:
        """What the colours diverge from: the baseline."""
        if math.isnan(self.baseline):
            return None
        return self.baseline

    @property
    def row_labels(self) -> list[str]:
        return list(self.modules)

    @property
    def column_labels(self) -> list[str]:
        return self.labels

    def tensor(self) -> torch.Tensor:
        """The values, (modules, positions) float32."""
        return torch.from_numpy(self.values).float()

    def show(self, as_: str = "map", **options: Any) -> TensorMap:
        """The values as a picture: a row for each module, a column for each position. Its colours
        diverge from the baseline."""
        return draw(self, as_, **options)

    # --- repr -------------------------------------------------------------------------

    def __repr__(self) -> str:
        lines = [self._headline()]
        if self._done.any():
            row, column = self._furthest()
            lines.append(
                f"  furthest from the baseline: {self.values[row, column]:.4g} at "
                f"{self.modules[row]}, position {self.labels[column]}"
            )
        return "\n".join(lines)

    def _headline(self) -> str:
        num_modules, num_positions = self.values.shape
        left = f", {self.left} left: sweep.resume()" if self.left else ""
        return (
            f"Sweep of {self._change.name!r} over {num_modules} modules × {num_positions} "
            f"positions{left}; baseline {self.baseline:.4g}"
        )

    def _furthest(self) -> tuple[int, int]:
        """The cell that is furthest from the baseline."""
        apart = np.nan_to_num(np.abs(self.values - self.baseline), nan=-1.0)
        row, column = np.unravel_index(int(apart.argmax()), apart.shape)
        return int(row), int(column)

    def _repr_html_(self) -> str:
        most = float(abs(self.values[self._furthest()] - self.baseline))
        rows: list[list[str | Cell]] = [
            [module, *(self._drawn(value, most) for value in self.values[i, :SHOWN])]
            for i, module in enumerate(self.modules[:SHOWN])
        ]
        head = ["", *self.labels[:SHOWN]]
        parts = [Table(rows, head, right=range(1, len(head)), code=(0,)).html()]
        if max(self.values.shape) > SHOWN:
            parts.append(f"<p>the first {SHOWN} are shown; .values has all, .show() draws them</p>")
        return page(self._headline(), *parts)

    def _drawn(self, value: float, most: float) -> Cell:
        """A cell, the stronger coloured the further it is from the baseline: red above, blue
        below."""
        if math.isnan(value):
            return Cell("–")
        if not most > 0:  # nothing changes, or the baseline is no number
            return Cell(f"{value:.3g}")
        apart = value - self.baseline
        strength = STRONGEST * abs(apart) / most
        color = ABOVE if apart > 0 else BELOW
        return Cell(f"{value:.3g}", style=f"background:rgba({color},{strength:.2f})")


def firing(planner: Planner, globs: str | Sequence[str], at: str) -> list[str]:
    """The modules of these globs that fire in a forward, each once. HookError: there are none."""
    globs = [globs] if isinstance(globs, str) else globs
    names = dict.fromkeys(name for glob in globs for name in planner.targets(glob))
    scan = planner.info.scan
    modules = [name for name in names if not scan or scan.get((name, at))]
    if not modules:
        raise HookError(
            f"none of {', '.join(names) or 'no glob'} fires in a forward: there is nothing to edit"
        )
    return modules


def columns_of(batch: Batch, positions: Sequence[int] | None) -> tuple[int, ...]:
    """The positions of a sweep, all of the batch by default. HookError: one is outside of it."""
    length = len(batch.ids[0])
    if positions is None:
        return tuple(range(length))
    for position in positions:
        if not -length <= position < length:
            raise HookError(f"position {position} is outside the prompt, which has {length} tokens")
    return tuple(positions)


def number(measured: object) -> float:
    """What a metric returned, as one number. HookError: it is none."""
    try:
        return float(measured)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError) as error:
        kind = type(measured).__name__
        raise HookError(
            f"the metric takes a run and returns one number; it returned {kind}"
        ) from error


def remaining(seconds: float, done: int, total: int) -> str:
    """How long the rest will take, after `seconds` for what is done; "" before anything is.

    >>> remaining(3.0, 6, 420), remaining(0.0, 0, 420), remaining(9.0, 3, 600)
    (' (about 3 min left)', '', ' (about 30 min left)')
    """
    if not done:
        return ""
    left = seconds / done * (total - done)
    if left < 90:
        return f" (about {left:.0f} s left)"
    return f" (about {left / 60:.0f} min left)"
