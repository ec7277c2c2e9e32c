"""The model tree: what the model is made of, where its pieces lie and which hooks are on them.
Static; no script."""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

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
        head = "".join(
            _cell(name, style, title="") for name, style in zip(_COLUMNS, _styles(), strict=True)
        )
        title = (
            f'<div style="font-weight:600;padding:2px 0">{html.escape(self.title)}</div>'
            if self.title
            else ""
        )
        top = "".join(_html(node, 0) for node in self._top)
        return (
            f'<div style="font-size:12px;line-height:1.7;overflow-x:auto"><div style="min-width:{_TOTAL}px">{title}'
            f'<div style="{_LINE}padding-left:16px;opacity:.65;{_RULE}">{head}</div>'
            f"{top}</div></div>"
        )

    def __str__(self) -> str:
        lines = [line for node in self._top for line in _text(node, 0)]
        table = Table(lines, _COLUMNS, right=(2,)).text()
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
            (node(above).below if above else top).append(nodes[name])
        return nodes[name]

    for row in rows:
        node(row.name).row = row
    return top


def _fold(nodes: list[_Node]) -> list[_Node]:
    """Numbered neighbours that look alike become one node with a count."""
    folded: list[_Node] = []
    for node in nodes:
        node.below = _fold(node.below)
        last = folded[-1] if folded else None
        if last and _follows(node, last) and last.looks() == node.looks():
            last.same += 1
        else:
            folded.append(node)
    return folded


def _follows(node: _Node, last: _Node) -> bool:
    numbers = node.label.isdigit() and last.label.isdigit()
    return numbers and int(node.label) == int(last.label) + last.same


def _label(node: _Node) -> str:
    if node.same == 1:
        return node.label
    return f"{node.label}–{int(node.label) + node.same - 1} ×{node.same}"


# --- the columns ----------------------------------------------------------------------

_COLUMNS = ("module", "class", "parameters", "whole output", "placement", "ranks", "hooks")
_WIDTHS = (250, 170, 96, 130, 110, 70, 220)
_TOTAL = sum(_WIDTHS) + 16
_LINE = "white-space:nowrap;"
_RULE = "border-bottom:1px solid rgba(128,128,128,.4)"
_CELL = (
    "display:inline-block;overflow:hidden;text-overflow:ellipsis;vertical-align:bottom;"
    "padding-right:10px;box-sizing:border-box;"
)


def _cells(node: _Node) -> tuple[str, ...]:
    row = node.row
    return (
        _label(node),
        row.cls,
        _parameters(row.num_parameters, node.same),
        _shape(row.shape),
        row.placement,
        ranks_text(row.ranks),
        ", ".join(f"{name} ({' '.join(groups)})" if groups else name for name, groups in row.hooks),
    )


def _hooked_below(node: _Node) -> bool:
    return any(child.row.hooks or _hooked_below(child) for child in node.below)


def _parameters(count: int, same: int) -> str:
    if not count:
        return ""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e4, "k")):
        if count >= size:
            text = f"{count / (1e3 if unit == 'k' else size):.4g} {unit}"
            break
    else:
        text = f"{count:,}"
    return f"{text} each" if same > 1 else text


def _shape(shape: str | Sequence[int] | None) -> str:
    if shape is None or isinstance(shape, str):
        return shape or ""
    return f"({', '.join(map(str, shape))})"


def ranks_text(ranks: Sequence[int]) -> str:
    """Runs of ranks as one range.

    >>> ranks_text([0, 1, 2, 5])
    '0–2, 5'
    """
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    return ", ".join(str(a) if a == b else f"{a}–{b}" for a, b in runs)


# --- text and html --------------------------------------------------------------------


def _text(node: _Node, depth: int) -> Iterator[tuple[str, ...]]:
    name, *rest = _cells(node)
    yield ("  " * depth + name, *rest)
    for child in node.below:
        yield from _text(child, depth + 1)


def _html(node: _Node, depth: int) -> str:
    """A line; with something below it, one that unfolds. Open down to the layers, closed inside
    them."""
    *cells, hooks = _cells(node)
    # a closed line still tells that there are some
    cells.append(hooks or ("below" if _hooked_below(node) else ""))
    styled = zip(cells, _styles(depth), strict=True)
    line = "".join(
        _cell(text, style, title=_title(node, i)) for i, (text, style) in enumerate(styled)
    )
    if not node.below:
        return f'<div style="{_LINE}padding-left:16px">{line}</div>'
    inside = "".join(_html(child, depth + 1) for child in node.below)
    is_open = " open" if not node.label.isdigit() and depth < 2 else ""
    summary = f'<summary style="{_LINE}cursor:pointer;list-style-position:outside;margin-left:16px">{line}</summary>'
    return f'<details{is_open}>{summary}<div style="padding-left:14px">{inside}</div></details>'


def _title(node: _Node, column: int) -> str:
    """What hovering says: the full name, the exact number of parameters."""
    if column == 0:
        return node.row.name
    return f"{node.row.num_parameters:,}" if column == 2 and node.row.num_parameters else ""


def _styles(depth: int = 0) -> list[str]:
    """One style a column; the first gives back what the indentation takes, so that the columns
    stay in line."""
    widths = (_WIDTHS[0] - 14 * depth, *_WIDTHS[1:])
    extra = (
        "font-family:monospace;",
        "opacity:.75;",
        "text-align:right;",
        "",
        "",
        "",
        "font-family:monospace;",
    )
    return [f"{_CELL}{more}width:{width}px" for more, width in zip(extra, widths, strict=True)]


def _cell(text: str, style: str, title: str) -> str:
    hint = f' title="{html.escape(title, quote=True)}"' if title else ""
    return f'<span style="{style}"{hint}>{html.escape(text) or "&nbsp;"}</span>'
