"""Parameters: a whole parameter or buffer as a Capture, from whichever ranks hold it.

Every rank says what it holds; who writes what is settled here, and each writes its part into its
place in a slab. An edit goes the other way: the new whole lies in a slab, and each rank takes its
part from it.
"""

from __future__ import annotations

import contextlib
import math
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from flexkernel.boxes import Box
from flexkernel.errors import EditError, HookError, PlacementError
from flexkernel.memory.slab import size_of
from flexkernel.memory.tensors import to_blob
from flexkernel.names import nearest, select
from flexkernel.wire import (
    Blob,
    CaptureKey,
    ModelInfo,
    ParameterShard,
    Region,
    ShardRecord,
    SlabValue,
    dtype_name,
)

from .capture import Capture, Location, Value, ranks_text

if TYPE_CHECKING:
    from flexkernel.cluster.cluster import Cluster

    from .store import Store

__all__ = ["edited", "read", "shapes"]


def shapes(
    info: ModelInfo, own: Mapping[str, tuple[int, ...]], glob: str
) -> dict[str, tuple[int, ...]]:
    """Name → whole shape, of the parameters that a glob names: the model's, and `own`, those of
    trainable modules. HookError: there are none."""
    every = {name: shape for name, shape in info.parameters.items() if name not in info.buffers}
    every |= own
    return {name: every[name] for name in select(glob, list(every))}


def read(store: Store, info: ModelInfo, name: str) -> Capture:
    """The parameter of that name, whole, as it is now; in memory until capture.free(), or until
    nobody has it any more.

    HookError: no such name. PlacementError: where its parts lie is not known. MemoryBudgetError:
    before any is read."""
    engines = store.engines
    held, shape, dtype = where(engines, info, name)
    writers = {
        min(ranks, key=lambda r: (store.hosts[r] != store.here, r))
        for ranks in holders(held).values()
    }
    with store.room(size_of(shape, dtype), name) as extent:
        region = Region(extent.slab, extent.base, shape, dtype)
        each = [(name, region, extent.slab_bytes, rank in writers) for rank in held]
        freed = store.take_freed()
        # who only reads asks the engines whether a run is still there, and this may lie where one
        # was
        if freed:
            engines.call("memory.forget", freed)
        seen = dict(
            zip(held, engines.call("parameters.write", ranks=list(held), each=each), strict=True)
        )
        check_copies(name, held, seen)
        of = Value(CaptureKey("parameter", name), shape, getattr(torch, dtype))
        whole = Capture(of, Location(store, region, extent), seen)
        assert whole.error is None, "checked before"
        store.lend(whole, extent)
    return whole


def where(
    engines: Cluster, info: ModelInfo, name: str
) -> tuple[dict[int, ParameterShard], tuple[int, ...], str]:
    """(rank → what it holds of the parameter, the whole's shape, its dtype); as read() refuses."""
    if info.parameters and not info.built and name not in info.parameters:
        raise unknown(name, info, nearest(name, list(info.parameters)))
    answers = engines.call("parameters.held", name)
    held = {
        rank: answer for rank, answer in enumerate(answers) if isinstance(answer, ParameterShard)
    }
    if not held:
        raise unknown(name, info, [near for answer in answers for near in answer])
    shape, dtype = agreed(name, held)
    check_cover(name, shape, held)
    return held, shape, dtype


@contextlib.contextmanager
def edited(store: Store, info: ModelInfo, edits: Mapping[str, Any]) -> Iterator[None]:
    """While it is entered, these parameters have other values: name → the whole new tensor, or a
    function that makes it from the whole old one. After it they are bit for bit what they were,
    however it ends."""
    check_tied(info, edits)
    whose = secrets.token_hex(8)
    try:
        for name, change in edits.items():
            put(store, info, whose, name, change)
        yield
    finally:
        if not store.engines.closed:
            surely(lambda: store.engines.call("parameters.restore", whose))


def surely(action: Callable[[], Any]) -> None:
    """Do it, also when the user presses stop meanwhile: then again, and only then stop."""
    interrupted = 0
    while interrupted < 5:
        try:
            action()
            break
        except KeyboardInterrupt:
            interrupted += 1
    if interrupted:
        raise KeyboardInterrupt


def check_tied(info: ModelInfo, edits: Mapping[str, Any]) -> None:
    """HookError for nothing to edit, or for two names of one parameter."""
    if not isinstance(edits, Mapping) or not edits:
        raise HookError(
            "parameters_edited takes {name: tensor, or function of the whole parameter}, at least "
            "one"
        )
    for group in info.tied:
        twice = [name for name in edits if name in group]
        if len(twice) > 1:
            raise HookError(f"{' and '.join(twice)} are one parameter: change one of them")


def put(store: Store, info: ModelInfo, whose: str, name: str, change: Any) -> None:
    """Give a parameter, under each of its names, its new value on every rank that holds a part of
    it."""
    capture = read(store, info, name)
    new = changed(capture, name, change)
    capture.free()
    by_name = {alias: where(store.engines, info, alias)[0] for alias in aliases(info, name)}
    with lying_in(store, new, name) as value:

        def of(rank: int) -> list[tuple[str, Any]]:
            near = store.hosts[rank] == store.here
            there = [(alias, held[rank]) for alias, held in by_name.items() if rank in held]
            return [(alias, value if near else parts(new, one.shard)) for alias, one in there]

        ranks = sorted({rank for held in by_name.values() for rank in held})
        store.engines.call(
            "parameters.put", ranks=ranks, each=[(whose, of(rank)) for rank in ranks]
        )


def aliases(info: ModelInfo, name: str) -> list[str]:
    """The names of a parameter: tied ones may lie apart, on the first and on the last stage."""
    return next((list(group) for group in info.tied if name in group), [name])


def changed(capture: Capture, name: str, change: Any) -> torch.Tensor:
    """The new value, whole: the parameter's shape and dtype, on the CPU.
    EditError: it cannot take the parameter's place."""
    new = change(capture.tensor()) if callable(change) else change
    if not isinstance(new, torch.Tensor):
        raise EditError(
            f"{name}: its new value is {type(new).__name__}; it has to be a tensor like it"
        )
    if tuple(new.shape) != capture.shape or new.dtype != capture.dtype:
        raise EditError(
            f"{name}: its new value is {tuple(new.shape)} {new.dtype}; it is {capture.shape} "
            f"{capture.dtype}"
        )
    return new.detach().cpu().contiguous()


@contextlib.contextmanager
def lying_in(store: Store, new: torch.Tensor, name: str) -> Iterator[SlabValue]:
    """The tensor (any shape, on the CPU) in a slab of this host, for as long as it is entered."""
    dtype = dtype_name(new.dtype)
    with store.room(size_of(new.shape, dtype), name) as extent:
        region = Region(extent.slab, extent.base, tuple(new.shape), dtype)
        store.slab(extent.slab, extent.slab_bytes, create=True).tensor(region).copy_(new)
        yield SlabValue(region, extent.slab_bytes)
        store.pool.release(extent)


def parts(new: torch.Tensor, holds: Box) -> tuple[Blob, ...]:
    """What a rank on another host holds of it, as plain data that travels with the call: a Blob
    for each of the boxes that `holds` consists of, of that box's shape and new's dtype.

    new: the whole parameter, on the CPU. holds: which part of it the rank holds."""
    return tuple(to_blob(box.cut(new)) for box in holds.parts())


def unknown(name: str, info: ModelInfo, near: Sequence[str]) -> HookError:
    beneath = [n for n in info.parameters if n.startswith(f"{name}.")][:3]
    if beneath:
        return HookError(f"{name!r} is a module; a parameter of it is {' or '.join(beneath)}")
    near = list(dict.fromkeys(near))[:3]
    return HookError(
        f"{info.cls} has no parameter or buffer {name!r}"
        + (f"; nearest: {', '.join(near)}" if near else "")
    )


def agreed(name: str, held: Mapping[int, ParameterShard]) -> tuple[tuple[int, ...], str]:
    """The whole's shape and dtype, on which all must agree."""
    first, one = next(iter(held.items()))
    for rank, other in held.items():
        if (other.shape, other.dtype) != (one.shape, one.dtype):
            raise PlacementError(
                f"{name} is {one.shape} {one.dtype} on rank {first} and {other.shape} "
                f"{other.dtype} on rank {rank}: if "
                f"it is split, declare it, placements={{{name!r}: 'shard:0'}}"
            )
    return one.shape, one.dtype


def holders(held: Mapping[int, ParameterShard]) -> dict[Box, list[int]]:
    """Each part that there is → the ranks that hold it."""
    found: dict[Box, list[int]] = {}
    for rank, one in held.items():
        found.setdefault(one.shard, []).append(rank)
    return found


def check_cover(name: str, shape: tuple[int, ...], held: Mapping[int, ParameterShard]) -> None:
    """PlacementError unless the parts make the whole, each element in one of them."""
    there = holders(held)
    parts = [part for box in there for part in box.parts() if part.volume(shape)]
    written = sum(part.volume(shape) for part in parts)
    total = math.prod(shape)
    if written != total or any(a.overlaps(b) for i, a in enumerate(parts) for b in parts[:i]):
        what = "; ".join(
            f"{ranks_text(ranks)} {list(box) or 'all of it'}"
            for box, ranks in list(there.items())[:6]
        )
        raise PlacementError(
            f"{name}: the parts there are make {written:,} of its {total:,} elements, or lie over "
            f"each other: {what}"
        )


def check_copies(
    name: str, held: Mapping[int, ParameterShard], seen: Mapping[int, ShardRecord]
) -> None:
    """PlacementError unless ranks that hold the same part hold the same numbers."""
    for first, *others in holders(held).values():
        for rank in others:
            if seen[rank].digest != seen[first].digest:
                raise PlacementError(
                    f"{name}: ranks {first} and {rank} hold the same part of it with different "
                    "numbers: it is split "
                    "and nothing says so, or these ranks have diverged. If it is split, declare "
                    "it, "
                    f"placements={{{name!r}: 'shard:0'}}"
                )
