"""What one run has on this rank, for those who carry it out."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from flexkernel.engine.place.placements import Place, Placer
from flexkernel.engine.place.slabs import Memory
from flexkernel.engine.place.staging import Copies
from flexkernel.memory.plan import Plan
from flexkernel.memory.slab import size_of
from flexkernel.wire import Region, RunPlan, dtype_name

from .tokens import TokenBuffer

__all__ = ["RunContext"]


@dataclass(frozen=True)
class RunContext:
    """What one run has on this rank.

    captures: which value lies where, from plan.base on in the slab plan.slab. here: this rank's
    rows; in a generation as they are in its first forward. tokens: of all rows."""

    plan: RunPlan
    captures: Plan
    here: Place
    tokens: TokenBuffer
    placer: Placer
    copies: Copies
    memory: Memory

    def open_place(self, i: int) -> torch.Tensor:
        """The tensor in the slab that planned capture i fills: shape and dtype as entry.lies has
        them, on the CPU."""
        slab = self.memory.slab(self.plan.slab, self.plan.slab_bytes)
        entry = self.captures.entries[i]
        return slab.tensor(self.captures.region(entry, self.plan.slab, self.plan.base))

    def open_places(self) -> list[torch.Tensor | None]:
        """For each planned capture its place, of the shape that open_place() says; None where
        another pipeline stage writes it."""
        places: list[torch.Tensor | None] = []
        for i, entry in enumerate(self.captures.entries):
            if entry.ranks and self.here.rank not in entry.ranks:
                places.append(None)
            else:
                places.append(self.open_place(i))
        return places

    def keep_apart(self, tensor: torch.Tensor) -> Region:
        """Copy a tensor, of any shape, into a file of this rank's own; where it lies there."""
        dtype = dtype_name(tensor.dtype)
        slab, name = self.memory.extra(self.plan.run, size_of(tensor.shape, dtype))
        region = Region(name, 0, tuple(tensor.shape), dtype)
        self.copies.write(slab.tensor(region), tensor)
        return region
