"""A capture of which only a reduction was kept, made by every rank of its part."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from flexkernel.boxes import Box
from flexkernel.memory import reduce
from flexkernel.memory.plan import Entry
from flexkernel.wire import Layout, ShardRecord

from .capture import Capture, Location, Value

__all__ = ["Reduced"]


class Reduced(Capture):
    """What was kept instead of an activation. In its place lie the statistics of each rank's part,
    (statistics, slots, what is kept), of which every look makes the whole.

    entry: the planned capture. layout: whose ranks they are. Its shape and dtype are the reduced
    value's."""

    def __init__(
        self,
        of: Value,
        lies: Location,
        records: Mapping[int, ShardRecord],
        entry: Entry,
        layout: Layout,
    ):
        self.entry = entry
        self.layout = layout
        super().__init__(of, lies, records)

    def _is_view(self) -> bool:
        return False

    def _client(self) -> None:
        return None

    def _assemble(self) -> torch.Tensor:
        """The reduced value, of shape self.shape, made of the statistics of all ranks."""
        assert self.entry.hook.reduce is not None
        op = self.entry.hook.reduce.op
        dtype = getattr(torch, self.entry.formula.dtype)
        whole = torch.stack(reduce.nothing(op, self.entry.kept_shape, dtype).parts)
        for rank, record in sorted(self.records.items()):
            if record.written is not None:
                into = whole[(slice(None), *self._kept_index(record.written))]
                ours = reduce.Partial(op, tuple(into), dtype)
                its = reduce.Partial(op, tuple(self._statistics(rank, record.written)), dtype)
                into.copy_(torch.stack(reduce.combine([ours, its]).parts))
        value = reduce.Partial(op, tuple(whole), dtype).value()
        assert isinstance(value, torch.Tensor)
        return self._lies.shown(value)

    def _statistics(self, rank: int, box: Box) -> torch.Tensor:
        """A rank's statistics of its part: (statistics, *the part's shape) float64, on the CPU."""
        slot = self.entry.slot(self.layout, rank)
        return self._part(rank, (slice(None), slot, *self._kept_index(box)))

    def _kept_index(self, box: Box) -> tuple[slice, ...]:
        """What indexes a part of the whole in what is left of it."""
        return box.without(self.entry.over).slices(len(self.entry.kept_shape))
