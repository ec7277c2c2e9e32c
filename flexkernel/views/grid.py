"""A source as a matrix: rows × columns, with words for both. Knows nothing about pixels or
widgets."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from flexkernel.memory import reduce

from . import png

__all__ = ["Grid", "Span", "exact", "ticks_in", "visible"]

Span = tuple[int, int]


class Grid:
    """rows × columns of a source: a Capture, a tensor or array made by hand, or anything that
    reduces itself.

    The last dim is the columns, the dims before it are flattened into rows; a 1-d tensor is one
    row.
    """

    def __init__(self, source: Any, title: str | None = None):
        self.source = torch.as_tensor(source) if isinstance(source, np.ndarray) else source
        self.shape = tuple(int(n) for n in self.source.shape)
        self.dtype = str(self.source.dtype).removeprefix("torch.")
        by_hand = isinstance(self.source, torch.Tensor)
        if by_hand and self.source.is_complex():
            raise TypeError(f"a map shows real numbers, not {self.dtype}; take .abs() or .angle()")
        self.name = title or (not by_hand and getattr(source, "name", None)) or "tensor"
        self.evidence = "" if by_hand else getattr(source, "evidence", None) or ""
        self.shards = (not by_hand and getattr(source, "shards", None)) or []
        tokens = None if by_hand else getattr(source, "tokens", None)
        self.columns = (not by_hand and getattr(source, "columns", None)) or []
        self.lead = self.shape[:-1]
        self.num_cols = self.shape[-1] if self.shape else 1
        self.num_rows = math.prod(self.lead)
        self.tokens = [[visible(t) for t in row] for row in tokens] if tokens else []

    @property
    def empty(self) -> bool:
        return not (self.shape and self.num_rows and self.num_cols)

    def matrix(self) -> torch.Tensor:
        """(rows, columns) view of the whole tensor; CaptureExpired when the run has given its
        memory back."""
        whole = self.source if isinstance(self.source, torch.Tensor) else self.source.tensor()
        return whole.detach().reshape(-1, self.num_cols)

    @property
    def _elsewhere(self) -> bool:
        return callable(getattr(self.source, "tiles", None))

    def tiles(self, rows: Span, cols: Span, height: int, width: int, how: str) -> torch.Tensor:
        if self._elsewhere:
            return torch.as_tensor(self.source.tiles(rows, cols, height, width, how))
        return reduce.tiles(self.matrix(), rows, cols, height, width, how)

    def bounds(
        self, rows: Span, cols: Span, height: int, width: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if callable(bounds := getattr(self.source, "bounds", None)):
            return bounds(rows, cols, height, width)
        if self._elsewhere:
            most, least = (self.tiles(rows, cols, height, width, how) for how in ("max", "min"))
            return most, least
        return reduce.bounds(self.matrix(), rows, cols, height, width)

    def count_nan(self) -> int | None:
        """How many NaN there are; None where a source that reduces itself does not say."""
        if callable(count := getattr(self.source, "count_nan", None)):
            return count()
        return None if self._elsewhere else reduce.count_nan(self.matrix())

    def part(self, rows: Span, cols: Span) -> torch.Tensor:
        """The exact elements of a part, in the tensor's own dtype; a view where the tensor lies
        here."""
        if not self._elsewhere:
            return self.matrix()[slice(*rows), slice(*cols)]
        return torch.cat(
            [torch.as_tensor(self.source[index]) for index in self._runs(rows, cols)]
        ).reshape(-1, cols[1] - cols[0])

    def _runs(self, rows: Span, cols: Span) -> Iterator[tuple[Any, ...]]:
        """Indices into the source, one for each run of rows that differ in the last leading dim
        only."""
        row = rows[0]
        while row < rows[1]:
            *before, first = self.index(row) or (0,)
            length = min(rows[1] - row, (self.lead[-1] if self.lead else 1) - first)
            last = (slice(first, first + length),) if self.lead else ()
            yield (*before, *last, slice(*cols))
            row += length

    def within(self, rows: Span, cols: Span) -> tuple[Span, Span]:
        """The part of a part that there is."""
        (r0, r1), (c0, c1) = rows, cols
        return (max(0, r0), min(self.num_rows, r1)), (max(0, c0), min(self.num_cols, c1))

    def scalar(self) -> str:
        """The value of a 0-d tensor."""
        return exact(self.matrix().flatten()[0].cpu())

    def release(self) -> None:
        """Lets the tensor go and keeps the words."""
        self.source = None

    # words

    def index(self, row: int) -> tuple[int, ...]:
        """The leading indices of a row: b, s for a (B, S, D) tensor."""
        return tuple(int(i) for i in np.unravel_index(row, self.lead)) if self.lead else ()

    def token(self, row: int) -> str:
        if not self.tokens or not 1 <= len(self.lead) <= 2:
            return ""
        batch, position = self.index(row) if len(self.lead) == 2 else (0, row)
        held = self.tokens[batch] if batch < len(self.tokens) else []
        return held[position] if position < len(held) else ""

    def row_label(self, row: int) -> str:
        index = self.index(row)
        where = (
            f"{index[0]}" if len(index) == 1 else f"[{', '.join(map(str, index))}]" if index else ""
        )
        return f"{where} {self.token(row)}".strip()

    def row_name(self, row: int) -> str:
        """The row in a sentence, before the column: "row 3 Paris, ", and nothing for a vector."""
        kind = {0: "", 1: "row "}.get(len(self.lead), "")
        return f"{kind}{self.row_label(row)}, " if self.lead else ""

    @property
    def shape_text(self) -> str:
        return f"({', '.join(map(str, self.shape))})"

    def __str__(self) -> str:
        return f"{self.name} {self.shape_text} {self.dtype}"

    def row_axis(self, rows: Span, most: int) -> png.Axis:
        ticks = [(row, self.row_label(row)) for row in ticks_in(*rows, most)]
        return png.Axis(*rows, ticks, pieces_in(self._row_pieces(), rows))

    def col_axis(self, cols: Span, most: int) -> png.Axis:
        ticks = [
            (col, self.columns[col] if self.columns else str(col)) for col in ticks_in(*cols, most)
        ]
        return png.Axis(*cols, ticks, pieces_in(self._col_pieces(), cols))

    def _col_pieces(self) -> Iterator[tuple[int, int, str]]:
        for dim, cuts, labels in self.shards:
            if dim % len(self.shape) == len(self.shape) - 1:
                yield from cut_pieces(cuts, labels, self.num_cols)

    def _row_pieces(self) -> Iterator[tuple[int, int, str]]:
        """A cut leading dim cuts the flattened rows once per index of the dims before it."""
        for dim, cuts, labels in self.shards:
            dim %= len(self.shape)
            if dim < len(self.lead):
                unit = math.prod(self.lead[dim + 1 :])
                for begin in range(0, self.num_rows, unit * self.lead[dim]):
                    for start, stop, label in cut_pieces(cuts, labels, self.lead[dim]):
                        yield begin + start * unit, begin + stop * unit, label


def cut_pieces(
    cuts: Sequence[int], labels: Sequence[Any], size: int
) -> Iterator[tuple[int, int, str]]:
    """Pieces of a cut dim; `cuts` may hold its two ends (0 and size) or leave them out."""
    edges = sorted({0, *(int(c) for c in cuts), size})
    for i, (start, stop) in enumerate(pairwise(edges)):
        yield start, stop, f"rank {labels[i]}" if isinstance(labels[i], int) else str(labels[i])


def pieces_in(
    pieces: Iterator[tuple[int, int, str]], span: Span, most: int = 64
) -> list[tuple[int, int, str]]:
    """The pieces that a part of an axis shows, cut to it; none where they would be too many to
    read."""
    shown = [
        (max(a, span[0]), min(b, span[1]), label)
        for a, b, label in pieces
        if a < span[1] and b > span[0]
    ]
    return shown if len(shown) <= most else []


def ticks_in(start: int, stop: int, most: int) -> list[int]:
    """At most `most` round cell numbers in start..stop; all of them where they fit.

    >>> ticks_in(3, 7, 10), ticks_in(100, 4096, 5)
    ([3, 4, 5, 6], [1000, 2000, 3000, 4000])
    """
    least = max(1, (stop - start) / max(1, most))
    ten = 10 ** math.floor(math.log10(least))
    step = next(math.ceil(ten * k) for k in (1, 2, 5, 10) if ten * k >= least)
    return list(range(-(-start // step) * step, stop, step))


_SHOWN = {"\n": "↵", "\r": "␍", "\t": "⇥", "\u00a0": "⍽", "\u200b": "∅"}


def visible(token: str) -> str:
    """A token as one line of text: spaces at its ends, newlines and control characters are seen,
    nothing is markup.

    >>> visible(" the"), visible("\\n"), visible("</think>"), visible("\\u202e")
    ('·the', '↵', '</think>', '\\\\u202e')
    """
    core = token.strip(" ")
    lead = len(token) - len(token.lstrip(" ")) if core else len(token)
    trail = len(token) - len(token.rstrip(" ")) if core else 0
    return "·" * lead + "".join(map(_shown, core)) + "·" * trail


def _shown(character: str) -> str:
    if character in _SHOWN:
        return _SHOWN[character]
    # a joiner holds an emoji together
    hidden = not character.isprintable() and character not in " \u200d"
    return f"\\u{ord(character):04x}" if hidden else character


def exact(value: torch.Tensor) -> str:
    """An element as the notebook would print it: all digits of a float32, no more of a
    bfloat16."""
    item = value.item()
    digits = {torch.float64: 12, torch.float32: 7}.get(value.dtype, 5)
    return f"{item:.{digits}g}" if isinstance(item, float) else str(item)
