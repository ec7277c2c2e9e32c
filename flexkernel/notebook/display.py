"""How the magics' objects and the progress of their calls are shown."""

from __future__ import annotations

import html
import sys
import time
from typing import TYPE_CHECKING, Any

from IPython.display import display

from flexkernel.views.table import Table, page

if TYPE_CHECKING:
    from flexkernel.wire import ModelInfo

REDRAW_S = 0.05  # a text that grows faster than this is shown in larger pieces


class Progress:
    """How far something is: a bar that the output keeps as one line. A call tells it (stage, how
    many, of how many).

    That of a load stays, as what it came to; others go when they are done."""

    def __init__(self, shell: Any, name: str, total: int, unit: str = "engine"):
        self.name, self.stage, self.done, self.total, self.unit = name, "preparing", 0, total, unit
        self._notebook = hasattr(shell, "kernel")
        self._handle: Any = None
        self._began = time.perf_counter()

    def __enter__(self) -> Progress:
        self._draw()
        return self

    def __call__(self, stage: str, done: int, total: int) -> None:
        self.stage, self.done, self.total = stage, done, total
        self._draw()

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if kind is not None or self.unit != "engine":
            # the error, or the result, says it all: a bar beside it would be a second block
            self.stage = ""
            self._draw()
        if not self._notebook and sys.stderr.isatty():
            sys.stderr.write("\r" if kind else "\n")

    def _draw(self) -> None:
        if self._notebook and self._handle is None:
            self._handle = display(self, display_id=True)
        elif self._notebook:
            self._handle.update(self)
        elif sys.stderr.isatty():
            sys.stderr.write(f"\r{self!r:<100}")
            sys.stderr.flush()

    def _says(self) -> str:
        count = f"{self.total} {self.unit}{'s' * (self.total > 1)}"
        if self.stage == "loading" or self.unit != "engine":
            count = f"{self.done} of {count}"
        return f"{self.stage} {self.name}: {count}, {time.perf_counter() - self._began:.1f} s"

    def __repr__(self) -> str:
        full = 20 * self.done // max(self.total, 1)
        return f"{'█' * full}{'░' * (20 - full)} {self._says()}" if self.stage else ""

    def _repr_html_(self) -> str:
        if not self.stage:
            return ""
        bar = f'<progress value="{self.done}" max="{self.total}" style="width:12em;margin-right:1em"></progress>'
        return f"<div>{bar if self.stage != 'loaded' else ''}{html.escape(self._says())}</div>"


class Growing:
    """The text of a generation while it grows: one output of plain text, each row a line where
    there are several."""

    def __init__(self, shell: Any):
        self.rows: dict[int, str] = {}
        self._notebook = hasattr(shell, "kernel")
        self._handle: Any = None
        self._shown_at = 0.0

    def __enter__(self) -> Growing:
        return self

    def __call__(self, row: int, text: str) -> None:
        self.rows[row] = self.rows.get(row, "") + text
        if self._notebook and time.monotonic() - self._shown_at > REDRAW_S:
            self._draw()
        elif (
            not self._notebook and sys.stderr.isatty() and row == 0
        ):  # a terminal grows one text only
            sys.stderr.write(text)
            sys.stderr.flush()

    def __exit__(self, *_error: Any) -> None:
        """What came stays, also where an error or Ctrl-C ended it."""
        if self._notebook and self.rows:
            self._draw()
        elif sys.stderr.isatty():
            sys.stderr.write("\n")

    def _draw(self) -> None:
        self._shown_at = time.monotonic()
        if self._handle is None:
            self._handle = display(self, display_id=True)
        else:
            self._handle.update(self)

    def __repr__(self) -> str:
        if len(self.rows) == 1:
            return next(iter(self.rows.values()))
        return "\n".join(f"{row}: {self.rows[row]}" for row in sorted(self.rows))


def plain(thing: Any, printer: Any, _cycle: bool) -> None:
    """A Session or ModelInfo as text."""
    if hasattr(thing, "status"):
        printer.text(repr(thing.status()))
        return
    title, table = loaded(thing)
    printer.text(f"{title}\n{table.text()}")


def as_html(thing: Any) -> str:
    """A Session or ModelInfo as a table."""
    if hasattr(thing, "status"):
        return thing.status()._repr_html_()
    title, table = loaded(thing)
    return page(title, table.html())


def loaded(info: ModelInfo) -> tuple[str, Table]:
    """What a load came to: one line, and a table by rank."""
    title = (
        f"{info.cls}: {info.num_parameters:,} parameters, {len(info.modules)} modules, "
        f"{info.layout}, {info.dtype}, attention {info.attention}"
    )
    axes = [axis for axis in ("pp", "dp", "fsdp", "tp") if getattr(info.layout, axis) > 1]
    rows = [
        (
            str(rank),
            *(str(getattr(info.layout.coordinate(rank), axis)) for axis in axes),
            f"{count:,}",
            f"{count / info.num_parameters:.0%}",
            f"{size / 1e6:,.1f} MB",
        )
        for rank, (count, size) in enumerate(
            zip(info.rank_parameters, info.rank_bytes, strict=True)
        )
    ]
    head = ("rank", *axes, "parameters", "of all", "memory")
    return title, Table(rows, head, right=range(len(head)))


class Views(list):
    """Several views: a notebook shows them one after another."""

    def _ipython_display_(self) -> None:
        for view in self:
            display(view)
