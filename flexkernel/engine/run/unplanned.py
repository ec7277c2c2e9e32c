"""Values with no planned place: no formula gives their shape. Each goes into a file of this rank's
own and is described in the reply.
"""

from __future__ import annotations

import dataclasses

import torch
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from flexkernel.boxes import WHOLE, Box, chunk
from flexkernel.engine.place.placements import NO_BATCH, Place, rows_held
from flexkernel.errors import PlacementError
from flexkernel.names import display_name
from flexkernel.wire import HookSpec, ShardRecord

from .context import RunContext

__all__ = ["check_strided", "keep_unplanned"]


def keep_unplanned(
    context: RunContext, hook: HookSpec, name: str, path: str, value: torch.Tensor
) -> ShardRecord:
    """Keep this rank's part of a value, and say which part of the whole it is.

    value: any shape, dtype and device, at `path` of what hook sees at module `name`.
    PlacementError: nothing says where it lies."""
    here = context.here
    layout = here.layout
    check_unreduced(hook, name)
    evidence, placement, local = context.placer.evidence(name, hook.of, value, path)
    if placement is None and layout.tp == 1:
        evidence = "described"
        placement = Replicate()
    batch: int | str | None = NO_BATCH
    if layout.batch_groups > 1:
        batch = context.placer.batch_dim(name, hook.of, path)
    if placement is None or batch is None:
        raise PlacementError(unknown_place(hook, name, value, here))
    shard = part_over_tp(placement, local, value, here)
    if isinstance(batch, int):
        shard = rows_held(shard, batch, local.shape, here, declared_name(hook, name))
    record = ShardRecord(evidence, repr(placement), 0, shard, None)
    if isinstance(batch, int) and here.idle:
        return record  # its rows are copies that nobody wants
    record = dataclasses.replace(record, digest=context.copies.digest(local))
    if isinstance(placement, Partial):
        record = dataclasses.replace(record, partial=layout.tp)
    if is_keeper(placement, batch, here):
        record = dataclasses.replace(record, region=context.keep_apart(local))
    return record


def is_keeper(placement: Placement, batch: int | str, here: Place) -> bool:
    """Whether this rank keeps its part: of ranks that hold the same part the first one does."""
    first_group = here.layout.coordinate(here.rank).batch == 0
    if not isinstance(batch, int) and not first_group:
        return False
    return here.tp == 0 or not isinstance(placement, Replicate)


def part_over_tp(
    placement: Placement, local: torch.Tensor, value: torch.Tensor, here: Place
) -> Box:
    """The part of the whole that a rank of a tp group holds. local: that part, of any shape; value:
    the same, or the DTensor of which it is the part."""
    if not isinstance(placement, Shard):
        return WHOLE
    tp = here.layout.tp
    dim = placement.dim % local.dim()
    total = local.shape[dim] * tp
    if isinstance(value, DTensor):
        total = value.shape[dim]
    return WHOLE.plus(dim, *chunk(total, tp, here.tp))


def declared_name(hook: HookSpec, name: str) -> str:
    """The key of placements= that would declare the value."""
    if hook.of == "input":
        return f"{name} input"
    return name


def check_unreduced(hook: HookSpec, name: str) -> None:
    """PlacementError: only the whole value can be kept, since its shape is not known."""
    where = f"{display_name(name)} {hook.of}"
    if hook.kept_positions is not None:
        raise PlacementError(f"{where}: its positions are not known; hook it without positions")
    if hook.reduce is not None:
        raise PlacementError(f"{where}: no formula gives its shape; hook it without reduce")


def unknown_place(hook: HookSpec, name: str, value: torch.Tensor, here: Place) -> str:
    """Why the ranks' parts of a value, of any shape, cannot be put together."""
    declaration = f"placements={{{declared_name(hook, name)!r}: 'batch:0 replicate'}}"
    return (
        f"{display_name(name)} {hook.of}: its shape or its order of rows depends on the data, or "
        f"no reference says it, so that {tuple(value.shape)} on each rank cannot be put together "
        f"under {here.layout}; hook the modules around it, load with reference=, or declare it, "
        f"{declaration}"
    )


def check_strided(where: str, value: torch.Tensor) -> None:
    """PlacementError for a tensor, of any shape, whose elements do not lie side by side in memory.
    where: names the value in the error."""
    kind = None
    if value.is_nested:
        kind = "nested"
    elif value.is_quantized:
        kind = "quantised"
    elif value.layout != torch.strided:
        kind = f"sparse ({value.layout})"
    if kind is not None:
        raise PlacementError(
            f"{where}: it is a {kind} tensor; hook a module that puts out a plain one"
        )
