"""Spill: what runs keep beyond the budget of memory lies in files on disk, a file a run, mapped
like any slab.

The engines move it: the driver's process never holds it. A file goes with its run; a tensor made
from it stays good.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import IO, Any

from flexkernel.errors import CaptureError, EngineError, MemoryBudgetError
from flexkernel.memory.pool import Extent
from flexkernel.memory.slab import PAGE, SPILLED, claim_folder, folder_path, pages, spill_root

__all__ = ["Spill"]

SHARE = 4  # of the disk's free bytes, one part in so many is the budget, where the user names none


class Spill:
    """One session's files on disk. near: the driver is on a host of the engines', and maps what
    they write.

    given: the user has said where; only then is a run that is larger than the budget of memory put
    there at once. budget: bytes on disk; None: not looked at yet; 0: nothing is moved there.
    problem: why nothing can be."""

    def __init__(self, cluster: Any, name: str, near: bool):
        self._cluster, self._name, self._near = cluster, name, near
        self.root, self.given = spill_root(), "FLEX_SPILL" in os.environ
        self.budget: int | None = None
        self.folder: Path | None = None
        self._claim: IO[bytes] | None = None
        self.problem = ""
        self._token = secrets.token_hex(4)
        self.extents: dict[str, Extent] = {}

    @property
    def num_bytes(self) -> int:
        return sum(extent.num_bytes for extent in self.extents.values())

    def to(self, root: str | os.PathLike[str], budget: int | None) -> None:
        """From here on in this folder, up to so many bytes. CaptureError: it is no folder, or runs
        lie in another."""
        if self.extents and Path(root) != self.root:
            raise CaptureError(
                f"{len(self.extents)} runs lie in {self.root}: free them first (run.free())"
            )
        if not Path(root).is_dir():
            raise CaptureError(f"{root} is not a folder: make it, or name another")
        self.root, self.given, self.budget = Path(root).resolve(), True, None
        self._close()
        self.open(budget)

    def open(self, budget: int | None = None) -> None:
        """Have the engines make their folders, once; the driver's is the one of its host."""
        if self.budget is not None:
            return
        try:
            answers = self._cluster.call("memory.spill_to", self.root)
        except (CaptureError, EngineError) as error:
            if self.given:
                raise
            # captures expire instead, and session.status() says why
            self.budget, self.problem = 0, str(error)
            return
        self.budget = (
            min(free for _, free in answers) // (1 if self.given else SHARE)
            if budget is None
            else budget
        )
        if self._near:
            self.folder, self._claim = claim_folder(self._name, self.root)
            if getattr(self._cluster, "reaper", None) is not None:
                self._cluster.reaper.sweep_at_end(self.folder)

    def reopen(self) -> None:
        """There are new engines, which have not heard of it."""
        if self.budget is not None and not self.problem:
            self._cluster.call("memory.spill_to", self.root)

    def useful(self) -> bool:
        """Whether moving captures there gives memory back: not where slabs lie on that disk
        already."""
        if self.given:
            return True
        here = folder_path(self._name).parent
        return (
            self.root.is_dir() and here.is_dir() and here.stat().st_dev != self.root.stat().st_dev
        )

    def room(self) -> int:
        """Bytes that are left of its budget."""
        self.open()
        assert self.budget is not None
        return max(self.budget - self.num_bytes, 0)

    def take(self, run: int, num_bytes: int) -> Extent:
        """A file for a run that the engines will write into."""
        size = max(pages(num_bytes), PAGE)
        return self.adopt(Extent(f"{SPILLED}{self._token}-{run}.slab", size, 0, size))

    def move(self, run: int, extent: Extent) -> Extent | None:
        """Have the engines move what a run keeps from a slab to a file; None: the disk is full."""
        target = self.take(run, extent.num_bytes)
        try:
            self._cluster.call(
                "memory.spill",
                run,
                target.slab,
                extent.slab,
                extent.slab_bytes,
                extent.base,
                target.num_bytes,
            )
        except BaseException as error:
            self.release(target)
            if isinstance(error, MemoryBudgetError):
                return None
            raise
        return target

    def recover(self) -> None:
        """Where an earlier driver of these engines had its files."""
        root = self._cluster.call("memory.spill_to", None)[0][0]
        if root is not None:
            self.root = root
            self.open()

    def adopt(self, extent: Extent) -> Extent:
        self.extents[extent.slab] = extent
        return extent

    def release(self, extent: Extent) -> None:
        """The run is done with it. The engines of other hosts remove theirs when they hear that
        the run was freed."""
        self.extents.pop(extent.slab, None)
        if self.folder is not None:
            (self.folder / extent.slab).unlink(missing_ok=True)

    def close(self) -> None:
        for extent in list(self.extents.values()):
            self.release(extent)
        self._close()

    def _close(self) -> None:
        if self._claim is not None:
            self._claim.close()
        self.folder = self._claim = None
