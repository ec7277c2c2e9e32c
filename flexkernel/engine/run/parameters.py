"""Parameters and buffers: which part of one lies on this rank, and writing it into its place in
the whole.

A DTensor says where it lies, over any axes of any mesh. A plain tensor lies whole on every rank
that has it, unless it was declared or its layer is known to split it. Nothing is sent, FSDP2's own
copies are let go; but FSDP1, which keeps pieces of flattened parameters, has to gather.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from flexkernel.boxes import WHOLE, Box
from flexkernel.engine.compat import (
    flat_local,
    flat_shape,
    is_placeholder,
    is_split,
    reshard,
    split_factor,
    split_index,
    unflattened,
)
from flexkernel.engine.place.layers import weight_placement
from flexkernel.engine.place.staging import digest
from flexkernel.engine.runtime import Runtime
from flexkernel.errors import HookError, PlacementError
from flexkernel.memory.tensors import from_blob
from flexkernel.names import match, nearest
from flexkernel.wire import Blob, ParameterShard, Region, ShardRecord, SlabValue, dtype_name

__all__ = ["held", "owner_of", "placed", "put", "restore", "write"]

Axis = tuple[Any, int, int]  # of a mesh: its placement, how many parts, which of them is here


def held(runtime: Runtime, name: str) -> ParameterShard | list[str]:
    """What this rank holds of it; the nearest names there are where it holds nothing of that
    name."""
    module, tensor = find(runtime, name)
    if module is None or tensor is None:
        return nearest(name, list(names(runtime.part.named)))
    if isinstance(tensor, DTensor) and tensor.device_mesh.get_coordinate() is None:
        return []  # it lies on a mesh that this rank has no part in
    flat = flat_shape(runtime.part.model, module, name.rpartition(".")[2])
    if flat is not None:  # every rank is given all of it, by all of them together
        return ParameterShard(
            flat,
            dtype_name(tensor.dtype),
            WHOLE,
            "flat",
            "part of a flat parameter over fsdp",
        )
    return placed(runtime, name, module, tensor)[0]


def write(
    runtime: Runtime, name: str, region: Region, slab_bytes: int, writes: bool
) -> ShardRecord:
    """Copy what this rank holds into its place, if it is the one that writes; its digest in any
    case.

    All ranks that hold it must call: FSDP1 gathers it."""
    found = held(runtime, name)
    assert isinstance(found, ParameterShard), "it was there when it was planned"
    with local_part(runtime, name) as local:
        if writes:
            whole = runtime.memory.slab(region.slab, slab_bytes).tensor(region)
            found.shard.put(local, whole)
        return ShardRecord(
            found.evidence,
            found.placement,
            digest(local),
            found.shard,
            found.shard if writes else None,
        )


@contextlib.contextmanager
def local_part(runtime: Runtime, name: str, change: bool = False) -> Iterator[torch.Tensor]:
    """What this rank holds of it, to be read, or with `change` to be written into, while it is
    entered."""
    module, tensor = find(runtime, name)
    assert module is not None and tensor is not None
    last = name.rpartition(".")[2]
    if flat_shape(runtime.part.model, module, last) is None:
        yield placed(runtime, name, module, tensor)[1]
        return
    runtime.breaker.busy = True  # the ranks wait for each other
    try:
        with unflattened(runtime.part.model, module, last, writeback=change):
            yield getattr(module, last).detach()
    finally:
        runtime.breaker.busy = False


# --- changing it for a while ----------------------------------------------------------


def put(
    runtime: Runtime, whose: str, changes: Sequence[tuple[str, SlabValue | tuple[Blob, ...]]]
) -> None:
    """Give a parameter a new value in place, until restore(whose). All ranks that hold it must
    call: FSDP1 gathers.

    changes: (name, where its whole new value lies, or the parts of it that this rank holds) for
    each of its names. HookError: it is the same parameter here as one that was changed before."""
    if not runtime.part.changed or runtime.part.changed[-1][0] != whose:
        runtime.part.changed.append((whose, []))
    kept = runtime.part.changed[-1][1]
    earlier = len(kept)
    for name, value in changes:
        found = held(runtime, name)
        assert isinstance(found, ParameterShard), "it was there when it was read"
        if not keep(kept, earlier, runtime, name):
            continue
        with local_part(runtime, name, change=True) as local:
            for i, (part, piece) in enumerate(found.shard.pieces()):
                if piece.cut(local).numel():
                    piece.cut(local).copy_(new_part(runtime, value, part, i))


def keep(kept: list, earlier: int, runtime: Runtime, name: str) -> bool:
    """Remember what is there before it changes, as (name, the memory, a copy); False: another name
    has changed it.

    earlier: how many of those kept are of other parameters."""
    module, tensor = find(runtime, name)
    assert module is not None and tensor is not None
    flat = flat_local(runtime.part.model, module, name.rpartition(".")[2])
    there = placed(runtime, name, module, tensor)[1] if flat is None else flat
    same = [
        i
        for i, (_, other, _) in enumerate(kept)
        if other.data_ptr() == there.data_ptr() and there.numel()
    ]
    if flat is not None:  # in which there are others too
        kept += [] if same else [(name, there, there.clone())]
        return True
    if same and same[0] < earlier:
        raise HookError(f"{kept[same[0]][0]} and {name} are one parameter: change one of them")
    kept += [] if same else [(name, there, there.clone())]
    return not same


def new_part(
    runtime: Runtime, value: SlabValue | tuple[Blob, ...], part: Box, i: int
) -> torch.Tensor:
    if isinstance(value, SlabValue):
        slab = runtime.memory.slab(value.region.slab, value.slab_bytes)
        return part.cut(slab.tensor(value.region))
    return from_blob(value[i])


def restore(runtime: Runtime, whose: str = "") -> None:
    """Give parameters back what they had before put(whose), and before whatever was put since; "":
    all. May be called again where it was broken off. Sends nothing."""
    if runtime.loaded is None:
        return
    if not any(owner == whose or not whose for owner, _ in runtime.part.changed):
        return
    reshard(runtime.part.model)  # what FSDP holds whole is the changed one
    while runtime.part.changed:
        owner, kept = runtime.part.changed[-1]
        with torch.no_grad():
            for _, there, before in reversed(kept):
                there.copy_(before)
        runtime.part.changed.pop()
        if owner == whose:
            return


# --- finding it -----------------------------------------------------------------------


def find(runtime: Runtime, name: str) -> tuple[torch.nn.Module | None, torch.Tensor | None]:
    """The module that owns it on this rank, and the parameter or buffer; None where another stage
    has it.

    What FSDP left unsharded after a forward is sharded again, which moves nothing between
    ranks."""
    module, last = owner_of(runtime, name), name.rpartition(".")[2]
    if module is None:
        return None, None
    found = module._parameters.get(last)
    found = module._buffers.get(last) if found is None else found
    if found is None and flat_shape(runtime.part.model, module, last) is not None:
        # of FSDP1's flat parameter, which has taken the place of the module's own
        found = getattr(module, last)
    return (module, found) if found is not None else (None, None)


def owner_of(runtime: Runtime, name: str) -> torch.nn.Module | None:
    """The module of which it is the name of a parameter or buffer, its parameters sharded as they
    are between forwards; None where another stage has it."""
    reshard(runtime.part.model)
    module = runtime.part.named.get(name.rpartition(".")[0])
    return None if module is None or is_placeholder(module) else module


def names(modules: Mapping[str, torch.nn.Module]) -> Iterator[str]:
    """The names of all parameters and buffers here, as the unsharded model has them."""
    for name, module in modules.items():
        for last, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                yield f"{name}.{last}" if name else last


# --- where it lies --------------------------------------------------------------------


def placed(
    runtime: Runtime, name: str, module: torch.nn.Module, tensor: torch.Tensor
) -> tuple[ParameterShard, torch.Tensor]:
    """Which part of the whole this rank holds, and that part. PlacementError where that is not
    known."""
    known = runtime.part.info.parameters.get(name)
    if isinstance(tensor, DTensor):
        evidence, shape, local = "dtensor", tuple(tensor.shape), tensor.detach().to_local()
        axes = axes_of(tensor)
        over = ", ".join(
            f"{p!r} over {axis}"
            for p, axis in zip(tensor.placements, axis_names(tensor), strict=True)
        )
    else:
        evidence, placement = said(runtime, name, module, tensor)
        if evidence == "scan" and known is None:
            evidence = "described"
        coordinate, tp = (
            runtime.part.info.layout.coordinate(runtime.rank),
            runtime.part.info.layout.tp,
        )
        axes, local, over = [(placement, tp, coordinate.tp)], tensor.detach(), repr(placement)
        shape = known or full_shape(tensor, placement, tp)
    if known is not None and shape != known:
        raise PlacementError(f"{name}: it is {shape} here, the unsharded model's is {known}")
    indices = split(shape, axes, name)
    if tuple(local.shape) != tuple(len(index) for index in indices):
        raise PlacementError(
            f"{name}: {evidence} says {over}, so rank {runtime.rank} should hold "
            f"{tuple(len(index) for index in indices)} of {shape}; it holds {tuple(local.shape)}"
            + ("" if evidence == "dtensor" else f": declare it, placements={{{name!r}: 'shard:0'}}")
        )
    dtype = dtype_name(local.dtype)
    return ParameterShard(shape, dtype, Box.of_indices(shape, indices), evidence, over), local


def axes_of(tensor: DTensor) -> list[Axis]:
    coordinate = tensor.device_mesh.get_coordinate()
    assert coordinate is not None
    return [(p, tensor.device_mesh.size(i), coordinate[i]) for i, p in enumerate(tensor.placements)]


def axis_names(tensor: DTensor) -> Sequence[str]:
    mesh = tensor.device_mesh
    return mesh.mesh_dim_names or [f"axis {i}" for i in range(mesh.ndim)]


def said(
    runtime: Runtime, name: str, module: torch.nn.Module, tensor: torch.Tensor
) -> tuple[str, Placement]:
    """(evidence, placement over tp) of a plain tensor: as declared, as its layer splits it, else
    whole."""
    for glob, at, placed in runtime.part.placer.declared:
        if at == "output" and placed.placement is not None and match(glob, name):
            return "declared", placed.placement
    if runtime.part.info.layout.tp == 1:
        return "scan", Replicate()
    by_class = weight_placement(name, module, tensor)
    return ("scan", Replicate()) if by_class is None else ("class", by_class)


def full_shape(tensor: torch.Tensor, placement: Placement, tp: int) -> tuple[int, ...]:
    """Of the whole, where no unsharded model tells it: equal parts."""
    shape = list(tensor.shape)
    if is_split(placement) and -len(shape) <= placement.dim < len(shape):
        shape[placement.dim] *= tp
    return tuple(shape)


def split(shape: Sequence[int], axes: Sequence[Axis], name: str) -> list[torch.Tensor]:
    """For each dim the indices that lie here: the axes split an index as they split the tensor,
    from left to right.

    FSDP over TP writes that it split last as a strided shard at the left. Where parts are uneven,
    that can say something else than what it did: then nobody knows, and it is refused."""
    for placement, _, _ in axes:
        if not isinstance(placement, Replicate) and not is_split(placement):
            raise PlacementError(f"{name} is {placement!r}, which is no part of a whole")
        if is_split(placement) and not -len(shape) <= placement.dim < len(shape):
            raise PlacementError(
                f"{name} is said to be {placement!r}, but it has {len(shape)} dims: {tuple(shape)}"
            )
    ordered = [(placement, *rest) for placement, *rest in axes if is_split(placement)]
    found, in_time = applied(shape, ordered), applied(shape, as_it_happened(ordered, len(shape)))
    if not all(map(torch.equal, found, in_time)):
        raise PlacementError(
            f"{name}: {tuple(p for p, _, _ in axes)} splits {tuple(shape)} unevenly and in an order that is not known"
        )
    return found


def applied(shape: Sequence[int], axes: Sequence[Axis]) -> list[torch.Tensor]:
    found = [torch.arange(size) for size in shape]
    for placement, num_parts, part in axes:
        found[placement.dim] = split_index(placement, found[placement.dim], num_parts, part)
    return found


def as_it_happened(axes: Sequence[Axis], ndim: int) -> list[Axis]:
    """The axes in the order in which they split: one whose strides are the splits at its right
    came after those."""
    first: list[Axis] = []
    last: list[Axis] = []
    for i, (placement, num_parts, part) in enumerate(axes):
        dim = placement.dim % ndim
        later = math.prod(n for p, n, _ in axes[i + 1 :] if p.dim % ndim == dim)
        if later > 1 and split_factor(placement) == later:
            last.append((Shard(dim), num_parts, part))
        else:
            first.append((placement, num_parts, part))
    return first + last
