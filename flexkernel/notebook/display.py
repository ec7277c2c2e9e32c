"""What the cell shows: bars, text that grows, several views; tables of what magics return."""

from __future__ import annotations

import contextlib
import contextvars
import html
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from IPython.display import display

from flexkernel.views.table import Table, page

if TYPE_CHECKING:
    from flexkernel.wire import ModelInfo

REDRAW_S = 0.05  # a text that grows faster than this is shown in larger pieces
TICK_S = 0.5  # how often a bar's clock moves while its call says nothing
PATIENCE_S = 2.0  # a run or a step of training gets a bar when it takes longer than this
BAR_WIDTH = 20  # characters, in a terminal

# Units of calls that a cell often repeats → what their common bar says.
REPEATED = {"run": "running", "step": "training"}


class LiveOutput:
    """One output of a cell, which is drawn again when the object that it shows has changed."""

    def __init__(self, shell: Any):
        self.in_notebook = hasattr(shell, "kernel")
        self.drawn = False
        self._handle: Any = None

    def draw(self, thing: Any) -> None:
        """In a notebook the thing's HTML or text; in a terminal its repr, on one line."""
        self.drawn = True
        if self.in_notebook and self._handle is None:
            self._handle = display(thing, display_id=True)
        elif self.in_notebook:
            self._handle.update(thing)
        elif sys.stderr.isatty():
            sys.stderr.write(f"\r{thing!r:<100}")
            sys.stderr.flush()


class Progress:
    """A bar that shows how far a call is, in one output. Call it with (stage, done, total).

    total=0: nobody knows of how many. unit: what is counted; "": the stage says it. stays: it stays
    as a summary when the call is done, else it goes. after_s: it appears only when the call takes
    longer than this.
    """

    def __init__(
        self,
        shell: Any,
        name: str,
        total: int = 0,
        unit: str = "engine",
        stage: str = "preparing",
        stays: bool = False,
        after_s: float = 0.0,
    ):
        self.name = name
        self.total = total
        self.unit = unit
        self.stage = stage
        self.done = 0
        self.stays = stays
        self.after_s = after_s
        self._output = LiveOutput(shell)
        self._began = time.perf_counter()
        self._ended = threading.Event()
        self._lock = threading.Lock()

    def __enter__(self) -> Progress:
        if self.after_s == 0:
            self._draw()
        # The clock's outputs belong to the cell that is running now.
        context = contextvars.copy_context()
        threading.Thread(target=context.run, args=(self._tick,), daemon=True).start()
        return self

    def __call__(self, stage: str, done: int, total: int) -> None:
        self.stage = stage
        self.done = done
        self.total = total
        if self.seconds() >= self.after_s:
            self._draw()

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        self._ended.set()
        if kind is not None or not self.stays:
            # The error, or the result, says it all: a bar beside it would be a second block.
            self.stage = ""
        with self._lock:
            if self._output.drawn:
                self._output.draw(self)
        if self._output.drawn and not self._output.in_notebook and sys.stderr.isatty():
            sys.stderr.write("\n" if self.stage else "\r")

    def seconds(self) -> float:
        return time.perf_counter() - self._began

    def _tick(self) -> None:
        while not self._ended.wait(TICK_S):
            if self.seconds() >= self.after_s:
                self._draw()

    def _draw(self) -> None:
        with self._lock:
            if not self._ended.is_set():
                self._output.draw(self)

    def _text(self) -> str:
        doing = f"{self.stage} {self.name}".strip()
        return ", ".join(filter(None, [self._count(doing), f"{self.seconds():.1f} s"]))

    def _count(self, doing: str) -> str:
        if self.total == 0 or not self.unit:
            return doing
        count = f"{self.total} {self.unit}{'s' * (self.total > 1)}"
        if self.stage == "loading" or self.unit != "engine":
            count = f"{self.done} of {count}"
        return f"{doing}: {count}"

    def __repr__(self) -> str:
        if not self.stage:
            return ""
        if self.total == 0:
            return self._text()
        full = BAR_WIDTH * self.done // self.total
        return f"{'█' * full}{'░' * (BAR_WIDTH - full)} {self._text()}"

    def _repr_html_(self) -> str:
        if not self.stage:
            return ""
        text = html.escape(self._text())
        if self.stage == "loaded":
            return f"<div>{text}</div>"
        value = f'value="{self.done}" max="{self.total}" ' if self.total else ""
        style = "width:12em;margin-right:1em"
        return f'<div><progress {value}style="{style}"></progress>{text}</div>'


class Bars:
    """The bars of a session in a notebook: session.bar(name, total, unit) is a context manager.

    Runs and steps of training share one bar a cell, so that a loop over them has one, too. They
    have none within another call's bar, or where their text grows.
    """

    def __init__(self, shell: Any, on_interrupt: Callable[[BaseException], None]):
        self.shell = shell
        self.on_interrupt = on_interrupt
        self._open = 0  # bars of calls that make runs of their own
        self._repeated: Repeated | None = None

    @contextlib.contextmanager
    def __call__(
        self, name: str = "", total: int = 0, unit: str = "", stage: str = "preparing"
    ) -> Iterator[Callable[[str, int, int], None]]:
        """A bar for a call that takes its time. That of a load (unit "engine") stays."""
        try:
            if unit == "text" or (unit in REPEATED and self._open):
                yield nobody
            elif unit in REPEATED:
                yield self._of_cell(unit)
            else:
                with self._own(name, total, unit, stage) as progress:
                    yield progress
        except KeyboardInterrupt as error:
            self.on_interrupt(error)
            raise

    @contextlib.contextmanager
    def _own(self, name: str, total: int, unit: str, stage: str) -> Iterator[Progress]:
        self._open += 1
        try:
            with Progress(self.shell, name, total, unit, stage, stays=unit == "engine") as progress:
                yield progress
        finally:
            self._open -= 1

    def _of_cell(self, unit: str) -> Callable[[str, int, int], None]:
        if self._repeated is None or self._repeated.over or self._repeated.unit != unit:
            self._repeated = Repeated(self.shell, unit)
        self._repeated.add()
        return nobody


class Repeated:
    """The bar of all runs of one cell. It appears after two seconds and goes with the cell's end.

    count: how many there were.
    """

    def __init__(self, shell: Any, unit: str):
        self.unit = unit
        self.count = 0
        self.over = False
        self._shell = shell
        self._bar = Progress(shell, "", stage=REPEATED[unit], after_s=PATIENCE_S)
        self._bar.__enter__()
        shell.events.register("post_run_cell", self._end)

    def add(self) -> None:
        """One more run begins."""
        self.count += 1
        if self.count > 1:
            self._bar.name = f"{self.unit} {self.count}"

    def _end(self, _result: Any = None) -> None:
        self.over = True
        self._shell.events.unregister("post_run_cell", self._end)
        self._bar.__exit__(None)


def nobody(_stage: str, _done: int, _total: int) -> None:
    """Report to nobody."""


class Growing:
    """The text of a generation while it grows, after its prompt; each row is a line.

    Call it with (row, new text). prompts: as session.generate takes them.
    """

    def __init__(self, shell: Any, prompts: Any = (), chat: bool | None = False):
        self.prompts = prompt_texts(prompts)
        self._after_prompt = "\n\n" if chat else ""
        self.rows: dict[int, str] = {}
        self._output = LiveOutput(shell)
        self._shown_at = 0.0

    def __enter__(self) -> Growing:
        return self

    def __call__(self, row: int, text: str) -> None:
        first = row not in self.rows
        if first:
            self.rows[row] = self._prompt(row)
        self.rows[row] += text
        if self._output.in_notebook:
            if time.monotonic() - self._shown_at > REDRAW_S:
                self._draw()
        elif row == 0 and sys.stderr.isatty():  # a terminal can let one text grow, no more
            sys.stderr.write(self.rows[0] if first else text)
            sys.stderr.flush()

    def _prompt(self, row: int) -> str:
        if row >= len(self.prompts):
            return ""
        return self.prompts[row] + self._after_prompt

    def __exit__(self, *_error: Any) -> None:
        """What came stays, also where an error or Ctrl-C ended it."""
        if self._output.in_notebook and self.rows:
            self._draw()
        elif sys.stderr.isatty():
            sys.stderr.write("\n")

    def _draw(self) -> None:
        self._shown_at = time.monotonic()
        self._output.draw(self)

    def __repr__(self) -> str:
        if len(self.rows) == 1:
            return next(iter(self.rows.values()))
        return "\n".join(f"{row}: {self.rows[row]}" for row in sorted(self.rows))


def prompt_texts(prompts: Any) -> list[str]:
    """Each row's prompt, where prompts are text; nothing for ids and messages."""
    if isinstance(prompts, str):
        return [prompts]
    is_text = isinstance(prompts, Sequence) and all(isinstance(row, str) for row in prompts)
    return list(prompts) if is_text else []


class Views(list):
    """Several views: a notebook shows them one after another."""

    def _ipython_display_(self) -> None:
        for view in self:
            display(view)


class Frozen(list):
    """The views that %flex_freeze made static."""

    def __repr__(self) -> str:
        if not self:
            return "no view is live"
        count = "1 view is" if len(self) == 1 else f"{len(self)} views are"
        return f"{count} static now: the notebook keeps the picture without a kernel"


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
