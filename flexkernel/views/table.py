"""Table: rows of cells, as text for a terminal and as HTML for a notebook.

The HTML brings its own padding and rules and takes its colours from the page, so that it reads
alike in Jupyter, light or dark, in VS Code and in marimo.
"""

from __future__ import annotations

import html
from collections.abc import Collection, Sequence
from dataclasses import dataclass

__all__ = ["Cell", "Table", "page"]

TABLE = "border-collapse:collapse;border:0;margin:4px 0;color:inherit"
CELL = "padding:1px 14px 1px 0;border:0;vertical-align:top;text-align:"
HEAD = "font-weight:600;border-bottom:1px solid rgba(128,128,128,.4);" + CELL


@dataclass(frozen=True)
class Cell:
    """A cell that a notebook draws in its own way.

    html: what it holds there, instead of its text. style: more CSS. span: how many columns it
    takes."""

    text: str
    html: str = ""
    style: str = ""
    span: int = 1


@dataclass(frozen=True)
class Table:
    """Rows of cells under a head.

    right: columns of numbers, which end at the right. code: columns of names, in a monospaced
    font.

    >>> print(Table([("mlp", "30")], ("captures", "n"), right=(1,)).text())
    captures   n
    mlp       30
    """

    rows: Sequence[Sequence[str | Cell]]
    head: Sequence[str | Cell] = ()
    right: Collection[int] = ()
    code: Collection[int] = ()

    def text(self, indent: str = "") -> str:
        """The columns side by side, two blanks between them."""
        rows = [row for row in (self.head, *self.rows) if row]
        lines = [[_cell(cell).text for cell in row] for row in rows]
        count = max(map(len, lines), default=0)
        lines = [line + [""] * (count - len(line)) for line in lines]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(self._line(line, widths, indent) for line in lines)

    def _line(self, cells: Sequence[str], widths: Sequence[int], indent: str) -> str:
        padded = []
        for i, (cell, width) in enumerate(zip(cells, widths, strict=True)):
            side = ">" if i in self.right else "<"
            padded.append(f"{cell:{side}{width}}")
        return (indent + "  ".join(padded)).rstrip()

    def html(self) -> str:
        rows = [self._row(row, "td", CELL) for row in self.rows]
        if self.head:
            rows.insert(0, self._row(self.head, "th", HEAD))
        return f'<table style="{TABLE}">{"".join(rows)}</table>'

    def _row(self, cells: Sequence[str | Cell], tag: str, style: str) -> str:
        drawn = (self._drawn(i, _cell(cell), tag, style) for i, cell in enumerate(cells))
        return f'<tr style="background:none">{"".join(drawn)}</tr>'

    def _drawn(self, column: int, cell: Cell, tag: str, style: str) -> str:
        inside = cell.html or html.escape(cell.text)
        if column in self.code and tag == "td" and inside:
            inside = f"<code>{inside}</code>"
        side = "right" if column in self.right else "left"
        span = f' colspan="{cell.span}"' if cell.span > 1 else ""
        return f'<{tag}{span} style="{style}{side};{cell.style}">{inside}</{tag}>'


def _cell(cell: str | Cell) -> Cell:
    if isinstance(cell, Cell):
        return cell
    return Cell(cell)


def page(title: str, *parts: str) -> str:
    """A bold title above parts that are HTML already."""
    return f"<div><b>{html.escape(title)}</b>{''.join(parts)}</div>"
