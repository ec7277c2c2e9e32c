"""Parameters and buffers: which part of one lies on this rank, and writing it into its place in
the whole.

A DTensor says where it lies, over any axes of any mesh. A plain tensor lies whole on every rank
that has it, unless it was declared or its layer is known to split it. Nothing is sent, and FSDP2's
own copies are freed. Only FSDP1, which keeps pieces of flattened parameters, has to gather.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

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

__all__ = [
    "get",
    "local_shard",
    "owned",
    "owner_of",
    "parameter_of",
    "put",
    "restore",
    "shard_of",
    "write",
]

Value = SlabValue | tuple[Blob, ...]  # where a new value lies, or the parts of it


class Owned(NamedTuple):
    """A parameter or buffer as its module has it, sharded as it is."""

    name: str
    module: torch.nn.Module
    tensor: torch.Tensor

    @property
    def last(self) -> str:
        """Its name within the module."""
        return self.name.rpartition(".")[2]


class Split(NamedTuple):
    """How an axis of a mesh splits a tensor, and which part of it is here."""

    placement: Any
    num_parts: int
    part: int


@dataclass(frozen=True)
class ParameterPlacing:
    """Where a parameter lies, as the evidence says. over: the placements, in words."""

    evidence: str
    shape: tuple[int, ...]
    splits: list[Split]
    over: str


def shard_of(runtime: Runtime, name: str) -> ParameterShard | list[str]:
    """What this rank holds of a parameter or buffer. The nearest names that there are, if it holds
    nothing of that name; none of them, if it holds no part of it."""
    owned_here = find(runtime, name)
    if owned_here is None:
        return nearest(name, list(names_in(runtime.part.named)))
    tensor = owned_here.tensor
    if isinstance(tensor, DTensor) and tensor.device_mesh.get_coordinate() is None:
        return []  # it lies on a mesh that this rank has no part in
    flat = flat_shape(runtime.part.model, owned_here.module, owned_here.last)
    if flat is not None:  # the ranks give all of it to every rank
        dtype = dtype_name(tensor.dtype)
        return ParameterShard(flat, dtype, WHOLE, "flat", "part of a flat parameter over fsdp")
    return local_shard(runtime, owned_here)[0]


def write(
    runtime: Runtime, name: str, region: Region, slab_bytes: int, writes: bool
) -> ShardRecord:
    """Copy what this rank holds of a parameter into its place, if it is the one that writes; its
    digest in any case. All ranks that hold it must call: FSDP1 gathers it."""
    shard = shard_of(runtime, name)
    assert isinstance(shard, ParameterShard), "it was there when it was planned"
    with local_part(runtime, name) as local:
        if writes:
            whole = runtime.memory.slab(region.slab, slab_bytes).tensor(region)
            shard.shard.put(local, whole)
        record = ShardRecord(shard.evidence, shard.placement, digest(local), shard.shard, None)
        if writes:
            record = replace(record, written=shard.shard)
        return record


@contextlib.contextmanager
def local_part(runtime: Runtime, name: str, change: bool = False) -> Iterator[torch.Tensor]:
    """Within it: what this rank holds of a parameter, in its own shape, dtype and memory, to be
    read, or with `change` to be written into. All ranks that hold it must call: FSDP1 gathers."""
    name, module, _ = owned_here = get(runtime, name)
    last = owned_here.last
    if flat_shape(runtime.part.model, module, last) is None:
        yield local_shard(runtime, owned_here)[1]
        return
    runtime.breaker.busy = True  # the ranks wait for each other
    try:
        with unflattened(runtime.part.model, module, last, writeback=change):
            yield getattr(module, last).detach()
    finally:
        runtime.breaker.busy = False


# --- changing it for a while ----------------------------------------------------------


class Saved(NamedTuple):
    """What a parameter had before it was changed. memory: the parameter's own, on this rank."""

    name: str
    memory: torch.Tensor
    before: torch.Tensor


def put(runtime: Runtime, owner: str, changes: Sequence[tuple[str, Value]]) -> None:
    """Give parameters new values in place, until restore(owner). All ranks that hold them must
    call: FSDP1 gathers.

    changes: (name, where its whole new value lies, or the parts of it that this rank holds).
    HookError: a parameter has two of the names."""
    changed = runtime.part.changed
    if not changed or changed[-1][0] != owner:
        changed.append((owner, []))
    saved: list[Saved] = changed[-1][1]
    num_earlier = len(saved)
    for name, value in changes:
        shard = shard_of(runtime, name)
        assert isinstance(shard, ParameterShard), "it was there when it was read"
        if not save(runtime, name, saved, num_earlier):
            continue
        with local_part(runtime, name, change=True) as local:
            for i, (part, piece) in enumerate(shard.shard.pieces()):
                target = piece.cut(local)
                if target.numel():
                    target.copy_(new_part(runtime, value, part, i))


def save(runtime: Runtime, name: str, saved: list[Saved], num_earlier: int) -> bool:
    """Remember what a parameter has before it changes. False: under another name it has been
    changed already.

    num_earlier: how many of those saved are of earlier changes. HookError: this is one of them."""
    owned_here = get(runtime, name)
    flat = flat_local(runtime.part.model, owned_here.module, owned_here.last)
    memory = flat
    if memory is None:
        memory = local_shard(runtime, owned_here)[1]
    same = [i for i, earlier in enumerate(saved) if is_same_memory(earlier.memory, memory)]
    if flat is None and same and same[0] < num_earlier:
        raise HookError(f"{saved[same[0]].name} and {name} are one parameter: change one of them")
    if not same:
        saved.append(Saved(name, memory, memory.clone()))
    return flat is not None or not same  # a flat parameter holds others, too


def is_same_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors of any shape begin at the same byte. Empty ones never do."""
    return one.data_ptr() == other.data_ptr() and other.numel() > 0


def new_part(runtime: Runtime, value: Value, part: Box, i: int) -> torch.Tensor:
    """The new value of the part of a parameter that is number i of this rank's: the part's shape,
    on the CPU."""
    if isinstance(value, SlabValue):
        slab = runtime.memory.slab(value.region.slab, value.slab_bytes)
        return part.cut(slab.tensor(value.region))
    return from_blob(value[i])


def restore(runtime: Runtime, owner: str = "") -> None:
    """Give parameters back what they had before put(owner), and before whatever was put since; "":
    all. It may be called again where it was broken off. Sends nothing."""
    if runtime.loaded is None:
        return
    changed = runtime.part.changed
    if not any(other == owner or not owner for other, _ in changed):
        return
    reshard(runtime.part.model)  # what FSDP holds whole is the changed one
    while changed:
        last_owner, saved = changed[-1]
        with torch.no_grad():
            for each in reversed(saved):
                each.memory.copy_(each.before)
        changed.pop()
        if last_owner == owner:
            return


# --- finding it -----------------------------------------------------------------------


def get(runtime: Runtime, name: str) -> Owned:
    """The parameter or buffer of that name, as find() returns it. KeyError: this rank has none."""
    owned_here = find(runtime, name)
    if owned_here is None:
        raise KeyError(name)
    return owned_here


def find(runtime: Runtime, name: str) -> Owned | None:
    """The parameter or buffer of that name on this rank; None where another stage has it.

    What FSDP left unsharded after a forward is sharded again, which moves nothing between
    ranks."""
    module = owner_of(runtime, name)
    last = name.rpartition(".")[2]
    if module is None:
        return None
    tensor: torch.Tensor | None = module._parameters.get(last)
    if tensor is None:
        tensor = module._buffers.get(last)
    if tensor is None and flat_shape(runtime.part.model, module, last) is not None:
        # of FSDP1's flat parameter, which has taken the place of the module's own
        tensor = getattr(module, last)
    if tensor is None:
        return None
    return Owned(name, module, tensor)


def owner_of(runtime: Runtime, name: str) -> torch.nn.Module | None:
    """The module of which it is the name of a parameter or buffer, its parameters sharded as they
    are between forwards; None where another stage has it."""
    reshard(runtime.part.model)
    module = runtime.part.named.get(name.rpartition(".")[0])
    if module is None or is_placeholder(module):
        return None
    return module


def parameter_of(runtime: Runtime, name: str) -> torch.nn.Parameter | None:
    """The parameter of that name, sharded as it is; None where this rank has none."""
    module = owner_of(runtime, name)
    if module is None:
        return None
    return module._parameters.get(name.rpartition(".")[2])


def owned(runtime: Runtime, names: Sequence[str]) -> list[torch.nn.Parameter]:
    """Those of the named parameters that this rank has, each once."""
    parameters = (parameter_of(runtime, name) for name in names)
    return list({id(p): p for p in parameters if p is not None}.values())


def names_in(modules: Mapping[str, torch.nn.Module]) -> Iterator[str]:
    """The names of all parameters and buffers of these modules, as the unsharded model has them."""
    for name, module in modules.items():
        for last, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                yield f"{name}.{last}" if name else last


# --- where it lies --------------------------------------------------------------------


def local_shard(runtime: Runtime, owned_here: Owned) -> tuple[ParameterShard, torch.Tensor]:
    """(which part of a parameter this rank holds, that part as a plain tensor of the part's shape,
    on its own device). PlacementError: where it lies is not known."""
    name, module, tensor = owned_here
    if isinstance(tensor, DTensor):
        placing = placing_of_dtensor(tensor)
        local = tensor.detach().to_local()
    else:
        placing = placing_of_plain(runtime, name, module, tensor)
        local = tensor.detach()
    shape = placing.shape
    known_shape = runtime.part.info.parameters.get(name)
    if known_shape is not None and shape != known_shape:
        raise PlacementError(f"{name}: it is {shape} here, the unsharded model's is {known_shape}")
    indices = indices_here(shape, placing.splits, name)
    expected = tuple(len(index) for index in indices)
    if tuple(local.shape) != expected:
        declare = ""
        if placing.evidence != "dtensor":
            declare = f": declare it, placements={{{name!r}: 'shard:0'}}"
        raise PlacementError(
            f"{name}: {placing.evidence} says {placing.over}, so rank {runtime.rank} should hold "
            f"{expected} of {shape}; it holds {tuple(local.shape)}{declare}"
        )
    dtype = dtype_name(local.dtype)
    box = Box.of_indices(shape, indices)
    return ParameterShard(shape, dtype, box, placing.evidence, placing.over), local


def placing_of_dtensor(tensor: DTensor) -> ParameterPlacing:
    """tensor: of any shape, over any mesh that this rank is part of."""
    mesh = tensor.device_mesh
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    axes = mesh.mesh_dim_names or [f"axis {i}" for i in range(mesh.ndim)]
    splits = [
        Split(placement, mesh.size(i), coordinate[i])
        for i, placement in enumerate(tensor.placements)
    ]
    pairs = zip(tensor.placements, axes, strict=True)
    over = ", ".join(f"{placement!r} over {axis}" for placement, axis in pairs)
    return ParameterPlacing("dtensor", tuple(tensor.shape), splits, over)


def placing_of_plain(
    runtime: Runtime, name: str, module: torch.nn.Module, tensor: torch.Tensor
) -> ParameterPlacing:
    """tensor: this rank's part, of any shape."""
    info = runtime.part.info
    tp = info.layout.tp
    evidence, placement = placement_over_tp(runtime, name, module, tensor)
    known_shape = info.parameters.get(name)
    if evidence == "scan" and known_shape is None:
        evidence = "described"
    split = Split(placement, tp, info.layout.coordinate(runtime.rank).tp)
    shape = known_shape or whole_shape(tensor, placement, tp)
    return ParameterPlacing(evidence, shape, [split], repr(placement))


def placement_over_tp(
    runtime: Runtime, name: str, module: torch.nn.Module, tensor: torch.Tensor
) -> tuple[str, Placement]:
    """(evidence, placement over tp) of a plain tensor of any shape: as declared, as its layer
    splits it, else whole."""
    for glob, at, declared in runtime.part.placer.declared:
        if at == "output" and declared.placement is not None and match(glob, name):
            return "declared", declared.placement
    if runtime.part.info.layout.tp == 1:
        return "scan", Replicate()
    by_class = weight_placement(name, module, tensor)
    if by_class is None:
        return "scan", Replicate()
    return "class", by_class


def whole_shape(tensor: torch.Tensor, placement: Placement, tp: int) -> tuple[int, ...]:
    """The whole's shape where no unsharded model says it: tp parts, each of the tensor's shape."""
    shape = list(tensor.shape)
    if is_split(placement) and -len(shape) <= placement.dim < len(shape):
        shape[placement.dim] *= tp
    return tuple(shape)


def indices_here(shape: Sequence[int], splits: Sequence[Split], name: str) -> list[torch.Tensor]:
    """For each dim the indices that lie here, (n,) int64 on the CPU: the axes split an index as
    they split the tensor, from left to right.

    FSDP over TP writes that it split last as a strided shard at the left. If parts are uneven, that
    can say something else than what it did: then nobody knows, and it is a PlacementError."""
    for placement, _, _ in splits:
        if not isinstance(placement, Replicate) and not is_split(placement):
            raise PlacementError(f"{name} is {placement!r}, which is no part of a whole")
        if is_split(placement) and not -len(shape) <= placement.dim < len(shape):
            raise PlacementError(
                f"{name} is said to be {placement!r}, but it has {len(shape)} dims: {tuple(shape)}"
            )
    real = [split for split in splits if is_split(split.placement)]
    as_written = split_indices(shape, real)
    as_made = split_indices(shape, in_order_of_making(real, len(shape)))
    if not all(map(torch.equal, as_written, as_made)):
        placements = tuple(placement for placement, _, _ in splits)
        raise PlacementError(
            f"{name}: {placements} splits {tuple(shape)} unevenly and in an order that is not known"
        )
    return as_written


def split_indices(shape: Sequence[int], splits: Sequence[Split]) -> list[torch.Tensor]:
    """For each dim the indices, (n,) int64 on the CPU, that these splits leave here."""
    indices = [torch.arange(size) for size in shape]
    for placement, num_parts, part in splits:
        dim = placement.dim
        indices[dim] = split_index(placement, indices[dim], num_parts, part)
    return indices


def in_order_of_making(splits: Sequence[Split], ndim: int) -> list[Split]:
    """The splits in the order in which they were made: one whose strides are the splits at its
    right came after those."""
    first: list[Split] = []
    last: list[Split] = []
    for i, split in enumerate(splits):
        dim = split.placement.dim % ndim
        same_dim = [later for later in splits[i + 1 :] if later.placement.dim % ndim == dim]
        strides = math.prod(later.num_parts for later in same_dim)
        if strides > 1 and split_factor(split.placement) == strides:
            last.append(Split(Shard(dim), split.num_parts, split.part))
        else:
            first.append(split)
    return first + last
