"""The driver's record of the slabs: which bytes belong to a run, and which are free again."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Sequence

from .slab import PAGE, pages

__all__ = ["SLAB_BYTES", "Extent", "Pool", "first_gap"]

SLAB_BYTES = 64 << 20  # the smallest slab: many small runs share one


@dataclasses.dataclass
class Extent:
    """A run's bytes in a slab. They are not reused while tensors made from them live."""

    slab: str
    slab_bytes: int
    base: int
    num_bytes: int
    released: bool = False
    _pins: int = 0
    # finalizers, which run in any thread, only append here
    _dead: collections.deque[None] = dataclasses.field(default_factory=collections.deque)

    @property
    def tensors(self) -> int:
        """How many live tensors were made from it."""
        return self._pins - len(self._dead)

    def pin(self) -> Callable[[], None]:
        """Count a tensor made from it. Call the returned function when that tensor dies; any
        thread or finalizer may."""
        while self._dead:
            self._dead.popleft()
            self._pins -= 1
        self._pins += 1
        return functools.partial(self._dead.append, None)


class Pool:
    """Leases extents of slabs to runs. It reuses an extent once it is released and no tensor made
    from it lives."""

    def __init__(self, prefix: str, smallest: int = SLAB_BYTES):
        self._prefix, self._smallest, self._count = prefix, smallest, 0
        self._sizes: dict[str, int] = {}
        self._extents: dict[str, list[Extent]] = {}  # slab → its extents by base

    def lease(self, num_bytes: int) -> Extent:
        """An extent for a run: in the first slab with a large enough gap, else in a new slab."""
        self.drain()
        need = max(pages(num_bytes), PAGE)
        for slab, extents in self._extents.items():
            base = first_gap(extents, need, self._sizes[slab])
            if base is not None:
                return self._put(slab, base, need)
        self._count += 1
        slab = f"{self._prefix}-{self._count}.slab"
        self._sizes[slab] = -(-need // self._smallest) * self._smallest
        self._extents[slab] = []
        return self._put(slab, 0, need)

    def growth(self, num_bytes: int) -> int:
        """Bytes of the new slab that such an extent would need; 0 if an existing one has a gap."""
        need = max(pages(num_bytes), PAGE)
        fits = any(
            first_gap(e, need, self._sizes[slab]) is not None for slab, e in self._extents.items()
        )
        return 0 if fits else -(-need // self._smallest) * self._smallest

    def _put(self, slab: str, base: int, num_bytes: int) -> Extent:
        extent = Extent(slab, self._sizes[slab], base, num_bytes)
        self._extents[slab].append(extent)
        self._extents[slab].sort(key=lambda e: e.base)
        return extent

    def adopt(self, extent: Extent) -> None:
        """Add an extent that an earlier driver leased."""
        self._sizes[extent.slab] = extent.slab_bytes
        self._extents.setdefault(extent.slab, []).append(extent)
        self._extents[extent.slab].sort(key=lambda e: e.base)

    def release(self, extent: Extent) -> None:
        """The run no longer needs it. It is reused once no tensor made from it lives."""
        extent.released = True
        self.drain()

    def abandon(self, extent: Extent) -> None:
        """Release an extent whose slab could not be made, and forget the slab if nothing else lies
        in it."""
        self.release(extent)
        if not self._extents[extent.slab]:
            del self._extents[extent.slab], self._sizes[extent.slab]

    def drain(self) -> None:
        """Take back the extents that are released and no longer pinned."""
        for slab, extents in self._extents.items():
            self._extents[slab] = [e for e in extents if not (e.released and e.tensors <= 0)]

    @property
    def num_bytes(self) -> int:
        """Bytes that are leased."""
        return sum(e.num_bytes for extents in self._extents.values() for e in extents)

    @property
    def slabs(self) -> dict[str, int]:
        """Slab → bytes of its file."""
        return dict(self._sizes)


def first_gap(extents: Sequence[Extent], need: int, size: int) -> int | None:
    """Where the first gap of `need` bytes begins in a slab of `size` bytes; None if it has none.
    extents: sorted by base."""
    base = 0
    for extent in extents:
        if extent.base - base >= need:
            return base
        base = extent.base + extent.num_bytes
    return base if size - base >= need else None
