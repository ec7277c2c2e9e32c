"""Others' runs: the store of a session that only reads. What it gives out are copies, which it has
seen to be whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from flexkernel.errors import CaptureExpired, ClusterError
from flexkernel.memory.pool import Extent
from flexkernel.memory.slab import Slab, on_disk
from flexkernel.wire import Region

from .run import Run
from .store import Store

__all__ = ["OthersStore"]


class OthersStore(Store):
    """The runs that the owner of the engines had stored when this session joined.

    The owner lets go of runs and writes others in their place without a word. So a read is a copy,
    after which the engines are asked whether the run is still theirs: they forget it before
    anything else is written there."""

    def _adopt(self, extent: Extent) -> None:
        """It is booked where it was handed out."""

    def slab(self, name: str, num_bytes: int, create: bool = False) -> Slab:
        if on_disk(name):
            raise CaptureExpired(
                f"{name} lies on disk, where only the session that has the engines reads it"
            )
        if name not in self._slabs:
            self._slabs[name] = Copied(self, name, num_bytes)
        return self._slabs[name]

    def client(self, host: str) -> Any:
        raise ClusterError(f"read-only joining is for engines of this machine; some are on {host}")

    def check_there(self, region: Region) -> None:
        """CaptureExpired if the run whose bytes these are is not there any more."""
        number = self._run_of(region)
        extent = self._extents[number]
        if not self.engines.call("memory.has", number, extent.slab, extent.base, ranks=[0])[0]:
            raise CaptureExpired(
                f"run {number} is not there any more: the session that has the engines let go of it"
            )

    def _run_of(self, region: Region) -> int:
        for number, extent in self._extents.items():
            inside = extent.base <= region.offset < extent.base + extent.num_bytes
            if extent.slab == region.slab and inside:
                return number
        seen = (
            (n, s.region)
            for n, run in self.runs.items()
            for c in run.captures.values()
            for s in c.records.values()
        )
        # a file of its own
        return next(n for n, lies in seen if lies is not None and lies.slab == region.slab)

    def free(self, run: Run, why: str) -> None:
        self.engines.check_allowed("memory.forget")

    def may_keep(self) -> None:
        self.engines.check_allowed("memory.forget")

    def close(self) -> None:
        for run in self.runs.values():
            for capture in run.captures.values():
                capture.expire("its session has ended")
        self._slabs.clear()
        self._claim.close()


class Copied(Slab):
    """A slab of which copies are given out, once it is known that they are what they were asked
    for."""

    def __init__(self, store: OthersStore, name: str, num_bytes: int):
        super().__init__(store.folder / name, num_bytes, create=False, populate=False)
        self._store = store

    def tensor(self, region: Region) -> torch.Tensor:
        """A copy of what lies there, of the region's shape and dtype. CaptureExpired: the run was
        freed."""
        copy = super().tensor(region).clone()
        self._store.check_there(region)
        return copy

    def private(self, region: Region, freed: Callable[[], None]) -> torch.Tensor:
        """The same copy, of the region's shape: nothing looks into the slab after it."""
        try:
            return self.tensor(region)
        finally:
            freed()
