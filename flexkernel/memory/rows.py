"""Rows of a capture: its values prompt by prompt, or token by token without pads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from flexkernel.boxes import Box
from flexkernel.errors import HookError

from .plan import Entry

__all__ = ["Rows", "row_dims"]

LONG = ("S", "P", "P+S", "W+S", "B", "B*S")  # terms of dims that grow with the batch or the prompt
Dims = tuple[int | None, int | None, int | None]


def row_dims(entry: Entry) -> Dims:
    """(dim of the batch's rows, of the positions, of both folded into one) of what is kept. None:
    it has no such dim.

    HookError: the prompts' rows cannot be separated, or another dim is as long as a prompt."""
    formula = entry.formula
    reduced = set(entry.over)
    folded = formula.folded
    positions = formula.positions if folded is None else None
    of_rows = {formula.rows, folded} - {None}
    others = set(formula.dims_of(*LONG)) - {formula.rows, positions, folded}
    if not of_rows or of_rows & reduced or others - reduced:
        raise HookError(
            f"{entry.key} is {formula}: its prompts cannot be told apart, or more than one dim is "
            "as long as a prompt. Reduce such dims, or leave it out"
        )

    def renumbered(dim: int | None) -> int | None:
        if dim is None or dim in reduced:
            return None
        return dim - sum(other < dim for other in reduced)

    return renumbered(formula.rows), renumbered(positions), renumbered(folded)


class Rows:
    """One rank's part of a value, split into rows, or into tokens without pads.

    dims: from row_dims(). shape: the whole value's. box: the part's place in it."""

    def __init__(self, dims: tuple[int | None, ...], shape: Sequence[int], box: Box):
        self.first = [dim for dim in dims if dim is not None]
        self.by_token = dims[1] is not None or dims[2] is not None
        self.rest = [dim for dim in range(len(shape)) if dim not in self.first]
        self.spans = [slice(*box.span(dim, size)) for dim, size in enumerate(shape)]

    def of(self, part: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """(rows or tokens, the other dims), in part's dtype and device, in memory of its own.

        part: of box.shape_in(shape). mask: (B, S) bool, of the whole batch; False on pads."""
        rows = part.permute(*self.first, *self.rest)
        if self.by_token:
            rows = rows[self._own(mask)]
        return rows.clone(memory_format=torch.contiguous_format)

    def put(self, rows: torch.Tensor, mask: torch.Tensor, into: torch.Tensor) -> None:
        """The inverse of of(): write its result to its place among the whole's rows or tokens.

        rows: the result of of(). into: (all rows or tokens, the other dims). mask: (B, S) bool, of
        the whole batch."""
        index: list[Any] = [self.spans[self.first[0]]]
        if self.by_token:
            numbers = torch.full(mask.shape, -1)
            numbers[mask] = torch.arange(int(mask.sum()))
            index = [self._own(numbers)[self._own(mask)]]
        into[(*index, *(self.spans[dim] for dim in self.rest))] = rows

    def _own(self, whole: torch.Tensor) -> torch.Tensor:
        """This part of a (B, S) tensor: a view with two dims, or with one if rows and positions
        are folded."""
        if len(self.first) == 1:
            whole = whole.reshape(-1)
        return whole[tuple(self.spans[dim] for dim in self.first)]
