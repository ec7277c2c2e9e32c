"""Sweep: one number for each module and position, of a run in which only that is edited."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from flexkernel.errors import CaptureError, HookError
from flexkernel.memory.plan import Planner
from flexkernel.session.capture import Capture, draw
from flexkernel.session.progress import Progress, reporting
from flexkernel.session.prompts import Batch
from flexkernel.session.run import Run
from flexkernel.views.table import Cell, Table, page

if TYPE_CHECKING:
    from flexkernel.session.session import Session

__all__ = ["Sweep", "modules_of", "sweep"]

NAME = "(sweep)"  # of the hook that a cell has
SHOWN = 40  # modules and positions in a table


def sweep(
    session: Session,
    prompt: Any,
    modules: str | Sequence[str],
    positions: Sequence[int] | None = None,
    *,
    metric: Callable[[Run], Any],
    edit: str,
    value: Any = None,
    at: str = "output",
    progress: Progress | None = None,
) -> Sweep:
    """One number for each module and each position; see Session.sweep."""
    batch = session.batch(prompt)
    names = modules_of(session.loaded.planner, modules, at)
    options = {"edit": edit, "at": at}
    return Sweep(session, batch, names, positions, metric, options, value).resume(progress)


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
        metric: Callable[[Run], Any],
        options: dict[str, Any],
        value: Any = None,
    ):
        self._session = session
        self._loaded = session.loaded
        self._batch = batch
        self._metric, self._options, self._value = metric, options, value
        self.modules = tuple(modules)
        S = len(batch.ids[0])
        self.positions = tuple(range(S)) if positions is None else tuple(positions)
        outside = [p for p in self.positions if not -S <= p < S]
        if outside:
            raise HookError(f"position {outside[0]} is outside the prompt, which has {S} tokens")
        self.values = np.full((len(self.modules), len(self.positions)), np.nan)
        self.baseline = math.nan
        self._done = np.zeros(self.values.shape, dtype=bool)
        if isinstance(value, Run):
            self._sources()  # what is not there is said before anything runs

    # --- doing it ---------------------------------------------------------------------

    @property
    def left(self) -> int:
        """How many cells are not done."""
        return int((~self._done).sum())

    def resume(self, progress: Progress | None = None) -> Sweep:
        """Do what is left. Ctrl-C ends it with what there is so far. Your own hooks stay as they
        are, and fire too."""
        session = self._session
        if session.loaded is not self._loaded:
            raise HookError("another model has been loaded since this sweep began: sweep again")
        with (
            reporting(session.bar, progress, "sweep", "cell") as told,
            self._held(),
            contextlib.suppress(KeyboardInterrupt),
        ):
            if math.isnan(self.baseline):
                told("running", 0, self._done.size)
                self.baseline = self._measure()
            for row, column in np.argwhere(~self._done):
                told("running", int(self._done.sum()), self._done.size)
                self.values[row, column] = self._cell(self.modules[row], self.positions[column])
                self._done[row, column] = True
        return self

    def _cell(self, module: str, position: int) -> float:
        value = self._value
        if isinstance(value, Run):
            value = value[module, self._options["at"]]
        options = {"positions": [position], "value": value, "capture": "none", "name": NAME}
        with self._session.hooked(module, **options, **self._options):
            return self._measure()

    def _measure(self) -> float:
        run = self._session.run(self._batch)
        try:
            return number(self._metric(run))
        finally:
            run.free()

    def _sources(self) -> dict[str, Capture]:
        """Module → what the run that was given as value captured there. CaptureError: nothing, or
        something else."""
        at = self._options["at"]
        found = {}
        for module in self.modules:
            if (module, at) not in self._value:
                raise CaptureError(
                    f"run {self._value.number} captured nothing at {module!r}, {at}, to patch in: hook it "
                    f"(session.hook), then run the other prompt"
                )
            found[module] = self._value[module, at]
        if len(self._value.plan.ids[0]) != len(self._batch.ids[0]):
            raise CaptureError(
                f"the prompt has {len(self._batch.ids[0])} tokens and that of run {self._value.number} "
                f"{len(self._value.plan.ids[0])}: one patched into the other has to be as long"
            )
        return found

    @contextlib.contextmanager
    def _held(self) -> Iterator[None]:
        """The captures that are patched in do not expire meanwhile."""
        captures = [self._value] if isinstance(self._value, Capture) else []
        if isinstance(self._value, Run):
            captures = list(self._sources().values())
        let_go = [capture.pin() for capture in captures]
        try:
            yield
        finally:
            for each in let_go:
                each()

    # --- looking ----------------------------------------------------------------------

    @property
    def labels(self) -> list[str]:
        """What the columns are: position, and the token there where the prompt is one row."""
        S, rows = len(self._batch.ids[0]), self._batch.tokens
        if len(rows) > 1:
            return [str(p) for p in self.positions]
        return [f"{p} {rows[0][p % S]!r}" for p in self.positions]

    @property
    def name(self) -> str:
        return f"sweep of {self._options['edit']}"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def centre(self) -> float | None:
        """What a view's colours diverge from: the baseline."""
        return None if math.isnan(self.baseline) else self.baseline

    @property
    def row_labels(self) -> list[str]:
        """What a view writes beside the rows."""
        return list(self.modules)

    @property
    def column_labels(self) -> list[str]:
        """What a view writes below the columns."""
        return self.labels

    def tensor(self) -> torch.Tensor:
        """The values, (modules, positions) float32."""
        return torch.from_numpy(self.values).float()

    def show(self, as_: str = "map", **options: Any) -> Any:
        """The values as a picture: a row for each module, a column for each position."""
        return draw(self, as_, **options)

    def __repr__(self) -> str:
        lines = [self._headline()]
        if self._done.any():
            row, column = self._furthest()
            lines.append(
                f"  furthest from the baseline: {self.values[row, column]:.4g} at {self.modules[row]}, "
                f"position {self.labels[column]}"
            )
        return "\n".join(lines)

    def _headline(self) -> str:
        num_modules, num_positions = self.values.shape
        left = f", {self.left} left: sweep.resume()" if self.left else ""
        return (
            f"Sweep of {self._options['edit']!r} over {num_modules} modules × {num_positions} positions{left}; "
            f"baseline {self.baseline:.4g}"
        )

    def _furthest(self) -> tuple[int, int]:
        apart = np.nan_to_num(np.abs(self.values - self.baseline), nan=-1.0)
        row, column = np.unravel_index(int(apart.argmax()), apart.shape)
        return int(row), int(column)

    def _repr_html_(self) -> str:
        most = float(np.nanmax(np.abs(self.values - self.baseline))) if self._done.any() else 0.0
        rows: list[list[str | Cell]] = [
            [module, *(self._cell_of(value, most) for value in self.values[i, :SHOWN])]
            for i, module in enumerate(self.modules[:SHOWN])
        ]
        head = ["", *self.labels[:SHOWN]]
        table = Table(rows, head, right=range(1, len(head)), code=(0,))
        cut = max(self.values.shape) > SHOWN
        more = (
            f"<p>the first {SHOWN} are shown; .values has all, .show() draws them</p>"
            if cut
            else ""
        )
        return page(self._headline(), table.html(), more)

    def _cell_of(self, value: float, most: float) -> Cell:
        """A cell, the stronger coloured the further it is from the baseline: red above, blue
        below."""
        if math.isnan(value):
            return Cell("–")
        apart = value - self.baseline
        color = "178,24,43" if apart > 0 else "33,102,172"
        strength = abs(apart) / most * 0.7 if most else 0.0
        return Cell(f"{value:.3g}", style=f"background:rgba({color},{strength:.2f})")


def number(said: Any) -> float:
    """What a metric said, as one number."""
    try:
        return float(said)
    except (TypeError, ValueError, RuntimeError) as error:
        raise HookError(
            f"the metric takes a run and returns one number; it returned {type(said).__name__}"
        ) from error


def modules_of(planner: Planner, globs: str | Sequence[str], at: str) -> list[str]:
    """The modules of these globs that fire in a forward, each once. HookError: there are none."""
    globs = [globs] if isinstance(globs, str) else globs
    names = dict.fromkeys(name for glob in globs for name in planner.targets(glob))
    scan = planner.info.scan
    found = [name for name in names if not scan or scan.get((name, at))]
    if not found:
        raise HookError(
            f"none of {', '.join(names) or 'no glob'} fires in a forward: there is nothing to edit"
        )
    return found
