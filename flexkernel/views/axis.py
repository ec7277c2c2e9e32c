"""Axis: the cells along one side of a view, with the words beside them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

__all__ = ["Axis", "Piece", "Span", "cut_pieces", "pieces_in", "ticks_in"]

MOST_PIECES = 64  # more along one axis cannot be read
MOST_CHARACTERS = 28  # of a label


class Span(NamedTuple):
    """Cells start..stop of an axis, without stop."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start


class Piece(NamedTuple):
    """Cells start..stop that one rank holds, and its name."""

    start: int
    stop: int
    label: str


@dataclass(frozen=True)
class Axis:
    """Cells start..stop along one side of a view.

    ticks: (cell, label) pairs; a label sits at its cell's middle. shards: the pieces that ranks
    hold, within the view.
    """

    start: int
    stop: int
    ticks: Sequence[tuple[int, str]] = ()
    shards: Sequence[tuple[int, int, str]] = ()

    def place(self, cell: float) -> float:
        """Where a cell's edge lies, as a share of the axis."""
        return (cell - self.start) / (self.stop - self.start)

    def shortened(self) -> Axis:
        """The same with labels that are not too long for a picture."""
        return replace(self, ticks=[(cell, shortened(label)) for cell, label in self.ticks])


def shortened(text: str, most: int = MOST_CHARACTERS) -> str:
    if len(text) <= most:
        return text
    return text[: most - 1] + "…"


def cut_pieces(cuts: Sequence[int], labels: Sequence[int | str], size: int) -> list[Piece]:
    """Pieces of a dim that is cut between ranks. labels: ranks, or words.

    cuts may hold the dim's two ends, 0 and size, or leave them out.

    >>> cut_pieces([4], [0, 1], 8)
    [Piece(start=0, stop=4, label='rank 0'), Piece(start=4, stop=8, label='rank 1')]
    """
    edges = sorted({0, *map(int, cuts), size})
    names = [f"rank {label}" if isinstance(label, int) else str(label) for label in labels]
    return [Piece(*ends, names[i]) for i, ends in enumerate(pairwise(edges))]


def pieces_in(pieces: Iterable[Piece], span: Span) -> list[Piece]:
    """The pieces that a part of an axis shows, cut to it. None of them if there are too many to
    read."""
    shown = [
        Piece(max(piece.start, span.start), min(piece.stop, span.stop), piece.label)
        for piece in pieces
        if piece.start < span.stop and piece.stop > span.start
    ]
    if len(shown) > MOST_PIECES:
        return []
    return shown


def ticks_in(start: int, stop: int, most: int) -> list[int]:
    """At most `most` round cell numbers in start..stop; all of them where they fit.

    >>> ticks_in(3, 7, 10), ticks_in(100, 4096, 5)
    ([3, 4, 5, 6], [1000, 2000, 3000, 4000])
    """
    least = max(1, (stop - start) / max(1, most))
    ten = 10 ** math.floor(math.log10(least))
    step = next(math.ceil(ten * k) for k in (1, 2, 5, 10) if ten * k >= least)
    return list(range(-(-start // step) * step, stop, step))
