"""Parameters: a whole parameter or buffer as a Capture, from whichever ranks hold it.

Every rank says what it holds; who writes what is settled here, and each writes its part into its place in a slab.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from .capture import Capture, ranks_text
from .errors import HookError, PlacementError
from .names import nearest
from .slabs import size_of
from .wire import Box, CaptureKey, Held, ModelInfo, Region, Seen, boxes

if TYPE_CHECKING:
    from .run import Store

__all__ = ["read"]


def read(cluster: Any, store: Store | None, info: ModelInfo, name: str) -> Capture:
    """The parameter of that name, whole, as it is now; in memory until capture.free(), or until nobody has it any more.

    HookError: no such name. PlacementError: where its parts lie is not known. MemoryBudgetError: before any is read."""
    assert store is not None, "a loaded model has one"
    if info.parameters and not info.built and name not in info.parameters:
        raise unknown(name, info, nearest(name, list(info.parameters)))
    answers = cluster.call("parameters.held", name)
    held = {rank: answer for rank, answer in enumerate(answers) if isinstance(answer, Held)}
    if not held:
        raise unknown(name, info, [near for answer in answers for near in answer])
    shape, dtype = agreed(name, held)
    check_cover(name, shape, held)
    writers = {min(ranks, key=lambda r: (store.hosts[r] != store.here, r)) for ranks in holders(held).values()}
    with store.room(size_of(shape, dtype), name) as extent:
        region = Region(extent.slab, extent.base, shape, dtype)
        each = [(name, region, extent.slab_bytes, rank in writers) for rank in held]
        seen = dict(zip(held, cluster.call("parameters.write", ranks=list(held), each=each), strict=True))
        check_copies(name, held, seen)
        whole = Capture(
            CaptureKey("parameter", name),
            shape,
            getattr(torch, dtype),
            seen,
            region,
            store,
            extent.slab_bytes,
            lambda: store.pool.looked_into(extent),
        )
        assert whole.error is None, "checked before"
        store.lend(whole, extent)
    return whole


def unknown(name: str, info: ModelInfo, near: Sequence[str]) -> HookError:
    beneath = [n for n in info.parameters if n.startswith(f"{name}.")][:3]
    if beneath:
        return HookError(f"{name!r} is a module; a parameter of it is {' or '.join(beneath)}")
    near = list(dict.fromkeys(near))[:3]
    return HookError(
        f"{info.cls} has no parameter or buffer {name!r}" + (f"; nearest: {', '.join(near)}" if near else "")
    )


def agreed(name: str, held: Mapping[int, Held]) -> tuple[tuple[int, ...], str]:
    """The whole's shape and dtype, on which all must agree."""
    first, one = next(iter(held.items()))
    for rank, other in held.items():
        if (other.shape, other.dtype) != (one.shape, one.dtype):
            raise PlacementError(
                f"{name} is {one.shape} {one.dtype} on rank {first} and {other.shape} {other.dtype} on rank {rank}: if "
                f"it is split, declare it, placements={{{name!r}: 'shard:0'}}"
            )
    return one.shape, one.dtype


def holders(held: Mapping[int, Held]) -> dict[Box, list[int]]:
    """Each part that there is → the ranks that hold it."""
    found: dict[Box, list[int]] = {}
    for rank, one in held.items():
        found.setdefault(one.holds, []).append(rank)
    return found


def check_cover(name: str, shape: tuple[int, ...], held: Mapping[int, Held]) -> None:
    """PlacementError unless the parts make the whole, each element in one of them."""
    there = holders(held)
    parts = [part for box in there for part in boxes(box) if volume(part, shape)]
    written = sum(volume(part, shape) for part in parts)
    total = volume((), shape)
    if written != total or any(overlap(a, b) for i, a in enumerate(parts) for b in parts[:i]):
        what = "; ".join(f"{ranks_text(ranks)} {list(box) or 'all of it'}" for box, ranks in list(there.items())[:6])
        raise PlacementError(
            f"{name}: the parts there are make {written:,} of its {total:,} elements, or lie over each other: {what}"
        )


def volume(part: Box, shape: Sequence[int]) -> int:
    """How many elements a part of one run a dim has."""
    count, sizes = 1, {dim: stop - start for dim, start, stop in part}
    for dim, size in enumerate(shape):
        count *= sizes.get(dim, size)
    return count


def overlap(a: Box, b: Box) -> bool:
    """Whether two parts that are not empty have an element in common.

    >>> overlap(((0, 0, 2),), ((0, 2, 4),)), overlap(((0, 0, 2),), ((1, 0, 9),))
    (False, True)
    """
    there = {dim: (start, stop) for dim, start, stop in a}
    return all(start < there[dim][1] and there[dim][0] < stop for dim, start, stop in b if dim in there)


def check_copies(name: str, held: Mapping[int, Held], seen: Mapping[int, Seen]) -> None:
    """PlacementError unless ranks that hold the same part hold the same numbers."""
    for first, *others in holders(held).values():
        for rank in others:
            if seen[rank].digest != seen[first].digest:
                raise PlacementError(
                    f"{name}: ranks {first} and {rank} hold the same part of it with different numbers: it is split "
                    f"and nothing says so, or these ranks have diverged. If it is split, declare it, "
                    f"placements={{{name!r}: 'shard:0'}}"
                )
