"""Reduced captures: each rank writes statistics of its part, and the reader combines them."""

from __future__ import annotations

import torch

from flexkernel.boxes import Box
from flexkernel.engine.place.staging import Copies
from flexkernel.errors import PlacementError
from flexkernel.memory import reduce
from flexkernel.memory.plan import Entry
from flexkernel.memory.selection import reduced_shape

__all__ = ["padding_mask", "statistics_of", "write_statistics"]


def statistics_of(entry: Entry, part: torch.Tensor, mask: torch.Tensor | None) -> reduce.Partial:
    """What one part of a value says of its reduction: float64 statistics on the part's device, each
    of the part's shape without the reduced dims.

    part: any shape, dtype and device. mask: as padding_mask() returns it."""
    assert entry.hook.reduce is not None
    op = entry.hook.reduce.op
    if part.numel() == 0:
        return reduce.nothing(op, reduced_shape(part.shape, entry.over), part.dtype)
    return reduce.masked(op, part, entry.over, mask)


def write_statistics(
    statistics: reduce.Partial, entry: Entry, slot: torch.Tensor, box: Box, copies: Copies
) -> None:
    """Write them into this rank's slot of the capture.

    slot: of the shape (statistics, *kept), float64 in the slab. box: of which part of the whole
    value they are."""
    kept = box.without(entry.over)
    for statistic, into in zip(statistics.parts, slot, strict=True):
        copies.write(kept.cut(into), statistic)


def padding_mask(entry: Entry, mask: torch.Tensor | None, box: Box) -> torch.Tensor | None:
    """Which elements of a part of the whole are real: bool on the CPU, to be broadcast over the
    part. None: all, or it makes no difference.

    mask: (B, positions) bool, or None. PlacementError: the reduction is over rows or positions,
    and which elements are pads is not known."""
    formula = entry.formula
    masked = {formula.rows, formula.folded, formula.positions}
    if mask is None or masked.isdisjoint(entry.over):
        return None
    if formula.folded is None and formula.rows is None:
        return None
    real = formula.broadcast(mask)
    if real is None:
        return None
    if any(size not in (1, entry.shape[dim]) for dim, size in enumerate(real.shape)):
        raise PlacementError(
            f"{entry.key} is {formula}: which of it are pads is not known; hook it without reduce"
        )
    return box.only([dim for dim, size in enumerate(real.shape) if size > 1]).cut(real)
