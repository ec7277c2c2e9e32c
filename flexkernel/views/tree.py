"""The model tree: what the model is made of, where its pieces lie and which hooks are on them.
Static; no script."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from flexkernel.names import display_name

from .table import Table

__all__ = ["ModelTree", "ModuleRow"]


@dataclass(frozen=True)
class ModuleRow:
    """One module.

    name: as named_modules() of the unsharded model says. num_parameters: of it and all below.
    shape: of its whole output, a tuple or a formula such as "(B, S, 576)". placement: "Shard(-1)",
    "Replicate", ... ranks: those that hold it. hooks: (hook name, its groups) pairs.
    """

    name: str
    cls: str = ""
    num_parameters: int = 0
    shape: str | Sequence[int] | None = None
    placement: str = ""
    ranks: Sequence[int] = ()
    hooks: Sequence[tuple[str, Sequence[str]]] = ()


@dataclass
class _Node:
    """A place in the tree: its last name, its module, what is below. same: how many layers are
    folded into it."""

    label: str
    row: ModuleRow
    below: list[_Node] = field(default_factory=list)
    same: int = 1

    def looks(self) -> tuple[Any, ...]:
        """What must be equal for two layers to be one line: all that is shown but their number."""
        row = self.row
        own = (
            row.cls,
            row.num_parameters,
            str(row.shape),
            row.placement,
            tuple(row.ranks),
            str(row.hooks),
        )
        return (own, tuple((node.label, node.same, node.looks()) for node in self.below))


class ModelTree:
    """The tree of these modules: an unfolding table in a notebook, indented text anywhere else.

    Equal layers in a row are folded into one line.

    >>> layers = [ModuleRow(f"layers.{i}", "Block", 10) for i in range(30)]
    >>> print(ModelTree([ModuleRow("layers"), *layers, ModuleRow("head")]))
    module      class  parameters  whole output  placement  ranks  hooks
    layers
      0–29 ×30  Block     10 each
    head
    """

    def __init__(self, rows: Sequence[ModuleRow], title: str = ""):
        self.rows = list(rows)
        self.title = title
        self._top = _fold(_grow(self.rows))

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        return {"text/html": self._repr_html_(), "text/plain": str(self)}

    def _repr_html_(self) -> str:
        title = ""
        if self.title:
            title = f'<div style="font-weight:600;padding:2px 0">{html.escape(self.title)}</div>'
        head = "".join(_cell(column.name, column) for column in COLUMNS)
        top = "".join(_html(node, 0) for node in self._top)
        return (
            f'<div style="font-size:12px;line-height:1.7;overflow-x:auto">'
            f'<div style="min-width:{TOTAL}px">{title}'
            f'<div style="{LINE}padding-left:16px;opacity:.65;{RULE}">{head}</div>'
            f"{top}</div></div>"
        )

    def __str__(self) -> str:
        lines = [line for node in self._top for line in _text(node, 0)]
        table = Table(lines, [column.name for column in COLUMNS], right=(2,)).text()
        return "\n".join(filter(None, [self.title, table]))

    __repr__ = __str__


# --- the tree -------------------------------------------------------------------------


def _grow(rows: Iterable[ModuleRow]) -> list[_Node]:
    """Nodes by dotted name. The root ("") is a line of its own on top; containers that no row
    names are made up."""
    top: list[_Node] = []
    nodes: dict[str, _Node] = {}

    def node(name: str) -> _Node:
        if name not in nodes:
            above, _, label = name.rpartition(".")
            nodes[name] = _Node(display_name(label), ModuleRow(name))
            beside = node(above).below if above else top
            beside.append(nodes[name])
        return nodes[name]

    for row in rows:
        node(row.name).row = row
    return top


def _fold(nodes: list[_Node]) -> list[_Node]:
    """Numbered neighbours that look alike become one node with a count."""
    folded: list[_Node] = []
    for node in nodes:
        node.below = _fold(node.below)
        if folded and _follows(node, folded[-1]) and folded[-1].looks() == node.looks():
            folded[-1].same += 1
        else:
            folded.append(node)
    return folded


def _follows(node: _Node, last: _Node) -> bool:
    numbers = node.label.isdigit() and last.label.isdigit()
    return numbers and int(node.label) == int(last.label) + last.same


# --- the columns ----------------------------------------------------------------------

LINE = "white-space:nowrap;"
RULE = "border-bottom:1px solid rgba(128,128,128,.4)"
CELL = (
    "display:inline-block;overflow:hidden;text-overflow:ellipsis;vertical-align:bottom;"
    "padding-right:10px;box-sizing:border-box;"
)
MONO = "font-family:monospace;"
INDENT = 14  # pixels that a level stands further in


class Column(NamedTuple):
    """A column: its name, its width in pixels, what a line has there, its CSS."""

    name: str
    width: int
    text: Callable[[_Node], str]
    style: str = ""


def _label(node: _Node) -> str:
    if node.same == 1:
        return node.label
    return f"{node.label}–{int(node.label) + node.same - 1} ×{node.same}"


def _parameters(node: _Node) -> str:
    count = counted(node.row.num_parameters)
    if count and node.same > 1:
        return f"{count} each"
    return count


def counted(number: int) -> str:
    """A large number, to read.

    >>> counted(0), counted(9_500), counted(28_311_552)
    ('', '9,500', '28.31 M')
    """
    if number == 0:
        return ""
    for least, size, unit in ((1e9, 1e9, "B"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if number >= least:
            return f"{number / size:.4g} {unit}"
    return f"{number:,}"


def _shape(node: _Node) -> str:
    shape = node.row.shape
    if shape is None or isinstance(shape, str):
        return shape or ""
    return f"({', '.join(map(str, shape))})"


def _hooks(node: _Node) -> str:
    """The hooks, and their groups."""
    return ", ".join(
        f"{name} ({' '.join(groups)})" if groups else name for name, groups in node.row.hooks
    )


def ranks_text(ranks: Sequence[int]) -> str:
    """Runs of ranks as one range.

    >>> ranks_text([0, 1, 2, 5])
    '0–2, 5'
    """
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    return ", ".join("–".join(map(str, dict.fromkeys((run[0], run[-1])))) for run in runs)


COLUMNS = (
    Column("module", 250, _label, MONO),
    Column("class", 170, lambda node: node.row.cls, "opacity:.75;"),
    Column("parameters", 96, _parameters, "text-align:right;"),
    Column("whole output", 130, _shape),
    Column("placement", 110, lambda node: node.row.placement),
    Column("ranks", 70, lambda node: ranks_text(node.row.ranks)),
    Column("hooks", 220, _hooks, MONO),
)
TOTAL = sum(column.width for column in COLUMNS) + 16


# --- text and html --------------------------------------------------------------------


def _text(node: _Node, depth: int) -> Iterator[tuple[str, ...]]:
    name, *rest = (column.text(node) for column in COLUMNS)
    yield ("  " * depth + name, *rest)
    for child in node.below:
        yield from _text(child, depth + 1)


def _html(node: _Node, depth: int) -> str:
    """A line; with something below it, one that unfolds. Open down to the layers, closed inside
    them."""
    line = _line(node, depth)
    if not node.below:
        return f'<div style="{LINE}padding-left:16px">{line}</div>'
    inside = "".join(_html(child, depth + 1) for child in node.below)
    opened = ""
    if not node.label.isdigit() and depth < 2:
        opened = " open"
    style = f"{LINE}cursor:pointer;list-style-position:outside;margin-left:16px"
    return (
        f'<details{opened}><summary style="{style}">{line}</summary>'
        f'<div style="padding-left:{INDENT}px">{inside}</div></details>'
    )


def _line(node: _Node, depth: int) -> str:
    """The cells of a module. A closed line still tells that there are hooks inside it."""
    module, *between, hooks = COLUMNS
    hooked = hooks.text(node)
    if not hooked and _hooked_below(node):
        hooked = "below"
    count = node.row.num_parameters
    # what the indentation takes comes off the first column: the others stay in line
    cells = [_cell(module.text(node), module, node.row.name, INDENT * depth)]
    for column in between:
        hint = ""
        if column.name == "parameters" and count > 0:
            hint = f"{count:,}"
        cells.append(_cell(column.text(node), column, hint))
    return "".join([*cells, _cell(hooked, hooks)])


def _hooked_below(node: _Node) -> bool:
    return any(child.row.hooks or _hooked_below(child) for child in node.below)


def _cell(text: str, column: Column, hint: str = "", taken: int = 0) -> str:
    """hint: what hovering says. taken: pixels that the indentation has taken."""
    title = f' title="{html.escape(hint, quote=True)}"' if hint else ""
    style = f"{CELL}{column.style}width:{column.width - taken}px"
    return f'<span style="{style}"{title}>{html.escape(text) or "&nbsp;"}</span>'
