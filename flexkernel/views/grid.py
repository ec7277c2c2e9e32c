"""A source as a matrix: rows × columns, with words for both. Knows nothing about pixels or
widgets."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from flexkernel.memory import reduce
from flexkernel.wire import dtype_name

from .axis import Axis, Piece, Span, cut_pieces, pieces_in, ticks_in
from .source import Drawable, Here, Numbers, Words, numbers_of, unravelled

__all__ = ["Grid", "exact", "visible"]


class Grid:
    """rows × columns of a source: a Capture, a tensor or array made by hand, or anything that
    reduces itself.

    The last dim is the columns, the dims before it are flattened into rows; a 1-d tensor is one
    row. words: what is written beside them.
    """

    def __init__(
        self,
        source: Drawable,
        title: str | None = None,
        x: Sequence[Any] | None = None,
        y: Sequence[Any] | None = None,
    ):
        if isinstance(source, np.ndarray):
            source = torch.as_tensor(source)
        self.source: Drawable | None = source
        self.shape = tuple(int(n) for n in source.shape)
        self.dtype = dtype_name(source.dtype)
        if isinstance(source, torch.Tensor) and source.is_complex():
            raise TypeError(f"a map shows real numbers, not {self.dtype}; take .abs() or .angle()")
        self.lead = self.shape[:-1]
        self.num_cols = self.shape[-1] if self.shape else 1
        self.num_rows = math.prod(self.lead)
        self.words = Words.of(source)
        if title:
            self.words = replace(self.words, name=title)
        if x is not None:
            self.words = replace(self.words, column_labels=labels("x", x, self.num_cols, "columns"))
        if y is not None:
            self.words = replace(self.words, row_labels=labels("y", y, self.num_rows, "rows"))
        self.tokens = [[visible(token) for token in row] for row in self.words.tokens]
        self._numbers: Numbers = numbers_of(source)

    @property
    def name(self) -> str:
        return self.words.name

    @property
    def centre(self) -> float | None:
        """The value that colours diverge from, if the source says one."""
        return self.words.centre

    @property
    def empty(self) -> bool:
        return not (self.shape and self.num_rows and self.num_cols)

    # --- numbers ----------------------------------------------------------------------

    def tiles(self, rows: Span, cols: Span, height: int, width: int, how: str) -> torch.Tensor:
        """The part in at most height × width pixels, as memory.reduce.tiles makes it: (h, w)
        float32. "extreme" is the element farthest from the centre."""
        if how == "extreme" and self.centre:
            return self.extreme(*self.bounds(rows, cols, height, width))
        return self._numbers.tiles(rows, cols, height, width, how)

    def bounds(
        self, rows: Span, cols: Span, height: int, width: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The "max" and the "min" tile of a part, (h, w) float32 each."""
        return self._numbers.bounds(rows, cols, height, width)

    def extreme(self, most: torch.Tensor, least: torch.Tensor) -> torch.Tensor:
        """Of two tiles of bounds, whichever is farther from the centre: (h, w) float32."""
        centre = self.centre or 0.0
        return reduce.extreme(most - centre, least - centre) + centre

    def count_nan(self) -> int | None:
        """How many NaN there are; None where a source that reduces itself does not say."""
        return self._numbers.count_nan()

    def part(self, rows: Span, cols: Span) -> torch.Tensor:
        """The exact elements of a part, (rows, columns), in the tensor's own dtype; a view where
        the tensor lies here. CaptureExpired: the run has given its memory back."""
        return self._numbers.part(Span(*rows), Span(*cols))

    def within(self, rows: Span, cols: Span) -> tuple[Span, Span]:
        """The part of a part that there is."""
        return (
            Span(max(0, rows.start), min(self.num_rows, rows.stop)),
            Span(max(0, cols.start), min(self.num_cols, cols.stop)),
        )

    def scalar(self) -> str:
        """The value of a 0-d tensor."""
        return exact(Here(self.source).matrix().flatten()[0].cpu())

    def release(self) -> None:
        """Let the tensor go and keep the words."""
        self.source = None
        self._numbers = Here(None)

    # --- words ------------------------------------------------------------------------

    def index(self, row: int) -> tuple[int, ...]:
        """The leading indices of a row: b, s for a (B, S, D) tensor."""
        return unravelled(row, self.lead)

    def token(self, row: int) -> str:
        """The label of a row, or the token at its position; "" if there is none."""
        if self.words.row_labels:
            return visible(self.words.row_labels[row])
        if not 1 <= len(self.lead) <= 2:
            return ""
        batch, position = (0, *self.index(row))[-2:]
        (tokens,) = self.tokens[batch : batch + 1] or [[]]
        (token,) = tokens[position : position + 1] or [""]
        return token

    def row_label(self, row: int) -> str:
        place = ", ".join(map(str, self.index(row)))
        if len(self.lead) > 1:
            place = f"[{place}]"
        return f"{place} {self.token(row)}".strip()

    def row_name(self, row: int) -> str:
        """The row in a sentence, before the column: "row 3 Paris, ", and nothing for a vector."""
        if not self.lead:
            return ""
        label = self.row_label(row)
        if len(self.lead) == 1:
            return f"row {label}, "
        return f"{label}, "

    def column_label(self, column: int) -> str:
        if self.words.column_labels:
            return visible(self.words.column_labels[column])
        return str(column)

    def column_name(self, column: int) -> str:
        """The column in a sentence, after the row: "column 3", or its label."""
        label = self.column_label(column)
        if self.words.column_labels:
            return label
        return f"column {label}"

    def cell_name(self, row: int, column: int) -> str:
        return self.row_name(row) + self.column_name(column)

    @property
    def shape_text(self) -> str:
        return f"({', '.join(map(str, self.shape))})"

    def __str__(self) -> str:
        return f"{self.name} {self.shape_text} {self.dtype}"

    # --- axes -------------------------------------------------------------------------

    def row_axis(self, rows: Span, most: int) -> Axis:
        """The rows of a part, with at most so many labels."""
        ticks = [(row, self.row_label(row)) for row in ticks_in(*rows, most)]
        return Axis(*rows, ticks, pieces_in(self._row_pieces(), Span(*rows)))

    def col_axis(self, cols: Span, most: int) -> Axis:
        """The columns of a part, with at most so many labels."""
        ticks = [(column, self.column_label(column)) for column in ticks_in(*cols, most)]
        return Axis(*cols, ticks, pieces_in(self._col_pieces(), Span(*cols)))

    def _col_pieces(self) -> Iterator[Piece]:
        for dim, cuts, ranks in self.words.shards:
            if dim % len(self.shape) == len(self.shape) - 1:
                yield from cut_pieces(cuts, ranks, self.num_cols)

    def _row_pieces(self) -> Iterator[Piece]:
        """A cut leading dim cuts the flattened rows once per index of the dims before it."""
        for dim, cuts, ranks in self.words.shards:
            dim %= len(self.shape)
            if dim == len(self.lead):
                continue
            unit = math.prod(self.lead[dim + 1 :])
            pieces = cut_pieces(cuts, ranks, self.lead[dim])
            for begin in range(0, self.num_rows, unit * self.lead[dim]):
                for start, stop, label in pieces:
                    yield Piece(begin + start * unit, begin + stop * unit, label)


def labels(name: str, given: Sequence[Any], count: int, what: str) -> list[str]:
    """Labels that a user gives, as text. ValueError: there are more or fewer than cells."""
    if len(given) != count:
        raise ValueError(f"{name}= has {len(given)} labels; the tensor has {count} {what}")
    return [str(label) for label in given]


SEEN = {"\n": "↵", "\r": "\\r", "\t": "⇥", "\u00a0": "⍽", "\u200b": "∅"}


def visible(token: str) -> str:
    """A token as one line of text: spaces at its ends, newlines and control characters are seen,
    nothing is markup.

    >>> visible(" the"), visible("\\n"), visible("</think>"), visible("\\u202e")
    ('·the', '↵', '</think>', '\\\\u202e')
    """
    core = token.strip(" ")
    if not core:
        return "·" * len(token)
    before = token.index(core)
    after = len(token) - before - len(core)
    return "·" * before + "".join(map(_seen, core)) + "·" * after


def _seen(character: str) -> str:
    if character in SEEN:
        return SEEN[character]
    # a joiner holds an emoji together
    if character.isprintable() or character in " \u200d":
        return character
    return f"\\u{ord(character):04x}"


DIGITS = {torch.float64: 12, torch.float32: 7}  # of a number; others have fewer


def exact(value: torch.Tensor) -> str:
    """An element, a 0-d tensor, as the notebook would print it: all digits of a float32, no more of
    a bfloat16."""
    item = value.item()
    if not isinstance(item, float):
        return str(item)
    return f"{item:.{DIGITS.get(value.dtype, 5)}g}"
