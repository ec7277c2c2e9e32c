"""Source: where the numbers of a view come from, and what their owner says of them.

A tensor that lies here is reduced here. A Capture, or anything else with `tiles`, reduces itself
where it lies, and gives parts of itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch

from flexkernel.memory import reduce

from .axis import Span

__all__ = ["Drawable", "Here", "Numbers", "Words", "numbers_of"]


class CaptureLike(Protocol):
    """What a view draws beside a tensor: a Capture, a Sweep. It has either `tensor()`, or `tiles`
    as Numbers has it and `__getitem__`; and what it wants of Words."""

    @property
    def shape(self) -> Sequence[int]: ...
    @property
    def dtype(self) -> torch.dtype: ...


Drawable: TypeAlias = torch.Tensor | np.ndarray | CaptureLike


@dataclasses.dataclass(frozen=True)
class Words:
    """What a source says of itself beside its numbers. A tensor made by hand says nothing.

    name: its title. evidence: how its placement is known. tokens: the batch's, by row and
    position. row_labels, column_labels: one a row, one a column. shards: (dim, cuts, ranks).
    centre: the value that is nothing special; colours diverge from it, and "far" is far from it.
    """

    name: str = "tensor"
    evidence: str = ""
    tokens: Sequence[Sequence[str]] = ()
    row_labels: Sequence[str] = ()
    column_labels: Sequence[str] = ()
    shards: Sequence[tuple[int, Sequence[int], Sequence[int | str]]] = ()
    centre: float | None = None

    @classmethod
    def of(cls, source: Drawable) -> Words:
        if isinstance(source, torch.Tensor):
            return cls()
        said = {field.name: getattr(source, field.name, None) for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in said.items() if value is not None})


class Numbers(Protocol):
    """A matrix of numbers: (rows, columns), reduced for a picture or read element by element."""

    def tiles(self, rows: Span, cols: Span, height: int, width: int, how: str) -> torch.Tensor:
        """The part in at most height × width pixels, as memory.reduce.tiles makes it: (h, w)
        float32."""

    def bounds(
        self, rows: Span, cols: Span, height: int, width: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The "max" and the "min" tile of a part: (h, w) float32 each."""

    def count_nan(self) -> int | None:
        """How many NaN there are; None: the source does not say."""

    def part(self, rows: Span, cols: Span) -> torch.Tensor:
        """The exact elements of a part, (rows, columns), in the source's own dtype."""


def numbers_of(source: Drawable) -> Numbers:
    """The numbers of a Capture, a tensor, or anything that has `tiles` or `tensor()`."""
    if hasattr(source, "tiles"):
        return Elsewhere(source)
    return Here(source)


class Here:
    """Numbers of a tensor in this process. source: a tensor of any shape, or what gives one.

    CaptureExpired: the run has given its memory back."""

    def __init__(self, source: Any):
        self.source = source

    def matrix(self) -> torch.Tensor:
        """(rows, columns) view of the whole tensor, in its dtype."""
        whole = self.source
        if not isinstance(whole, torch.Tensor):
            whole = whole.tensor()
        return whole.detach().reshape(-1, *whole.shape[-1:] or (1,))

    def tiles(self, rows: Span, cols: Span, height: int, width: int, how: str) -> torch.Tensor:
        """(h, w) float32."""
        return reduce.tiles(self.matrix(), rows, cols, height, width, how)

    def bounds(
        self, rows: Span, cols: Span, height: int, width: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(h, w) float32 each."""
        return reduce.bounds(self.matrix(), rows, cols, height, width)

    def count_nan(self) -> int | None:
        return reduce.count_nan(self.matrix())

    def part(self, rows: Span, cols: Span) -> torch.Tensor:
        """A view of the tensor, (rows, columns)."""
        return self.matrix()[slice(*rows), slice(*cols)]


class Elsewhere:
    """Numbers of a source that reduces itself: only pixels, and the elements that are asked for,
    come here."""

    def __init__(self, source: Any):
        self.source = source
        self.lead = tuple(int(n) for n in source.shape[:-1])

    def tiles(self, rows: Span, cols: Span, height: int, width: int, how: str) -> torch.Tensor:
        """(h, w) float32."""
        return torch.as_tensor(self.source.tiles(rows, cols, height, width, how))

    def bounds(
        self, rows: Span, cols: Span, height: int, width: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(h, w) float32 each."""
        if hasattr(self.source, "bounds"):
            return self.source.bounds(rows, cols, height, width)
        most = self.tiles(rows, cols, height, width, "max")
        return most, self.tiles(rows, cols, height, width, "min")

    def count_nan(self) -> int | None:
        if not hasattr(self.source, "count_nan"):
            return None
        return self.source.count_nan()

    def part(self, rows: Span, cols: Span) -> torch.Tensor:
        """(rows, columns) in memory of its own."""
        pieces = [torch.as_tensor(self.source[index]) for index in self._indices(rows, cols)]
        return torch.cat(pieces).reshape(-1, cols.size)

    def _indices(self, rows: Span, cols: Span) -> Iterator[tuple[Any, ...]]:
        """Indices into the source, one for each run of rows that differ in the last leading dim
        only."""
        columns = slice(*cols)
        if not self.lead:
            yield (columns,)
            return
        row = rows.start
        while row < rows.stop:
            *before, first = unravelled(row, self.lead)
            length = min(rows.stop - row, self.lead[-1] - first)
            yield (*before, slice(first, first + length), columns)
            row += length


def unravelled(row: int, lead: Sequence[int]) -> tuple[int, ...]:
    """The leading indices of a row of the matrix.

    >>> unravelled(7, (2, 5))
    (1, 2)
    """
    index = []
    for size in reversed(lead):
        row, place = divmod(row, size)
        index.append(place)
    return tuple(reversed(index))
