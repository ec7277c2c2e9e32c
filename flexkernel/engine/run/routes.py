"""Where a planned value goes on this rank: decided once for each capture, local shape and dtype."""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace

import torch
from torch.distributed.tensor import Partial, Replicate

from flexkernel.boxes import WHOLE, Box, share_of
from flexkernel.engine.place.placements import Place, Placed
from flexkernel.errors import PlacementError
from flexkernel.memory.plan import Entry
from flexkernel.wire import ShapeFormula, ShardRecord

__all__ = ["Kind", "Route", "copies_of", "placement_text", "route_of"]


class Kind(enum.Enum):
    """What a rank writes of a value."""

    NOTHING = enum.auto()
    COPY = enum.auto()
    STATISTICS = enum.auto()  # of a reduction
    ADDEND = enum.auto()  # of a sum over tp, into a file of its own


@dataclass(frozen=True)
class Route:
    """Where a value goes on this rank.

    record: what the rank reports of it, but for the digest. kept: the positions that are kept, as
    (dim, index); None: all. is_end: whether a gradient can come in here; counts: whether it counts
    on this rank. shared: other ranks hold the same part, so that digests are compared. piece: which
    part of what it holds this rank writes: its index in the kept tensor is `source`, in the
    capture's place `target`."""

    kind: Kind
    record: ShardRecord
    kept: tuple[int, torch.Tensor] | None
    is_end: bool
    counts: bool
    shared: bool = False
    piece: Box | None = None
    source: tuple[slice, ...] = ()
    target: tuple[slice, ...] = ()


def route_of(entry: Entry, placed: Placed, here: Place) -> Route:
    """The route of a value that lies so. PlacementError: it cannot be kept so."""
    batched = bool(entry.formula.batched)
    is_first_group = here.coordinate.batch == 0
    is_addend = isinstance(placed.placement, Partial)
    nothing = Route(
        kind=Kind.NOTHING,
        record=ShardRecord(placed.evidence, placement_text(placed, here), 0, placed.shard, None),
        kept=kept_positions(entry, placed, here),
        is_end=not is_addend,
        counts=not here.idle if batched else is_first_group,
    )
    if here.idle and batched:
        return nothing  # its rows are copies that nobody wants
    if not is_addend:
        return with_piece(nothing, entry, placed, here)
    check_unreduced(entry)
    addend = replace(nothing, record=replace(nothing.record, partial=here.layout.tp))
    if batched or is_first_group:
        return replace(addend, kind=Kind.ADDEND)
    return addend  # the addends of one group of ranks are the sum


def with_piece(route: Route, entry: Entry, placed: Placed, here: Place) -> Route:
    """The same route with the piece that this rank writes."""
    shape = list(placed.local.shape)
    if route.kept is not None:
        dim, index = route.kept
        shape[dim] = len(index)
    copies, number = copies_of(placed, entry.formula, here)
    piece: Box | None = WHOLE
    if copies > 1:
        piece = share_of(shape, copies, number)
    kind = Kind.COPY
    if entry.hook.reduce is not None:
        kind = Kind.STATISTICS
    if piece is None:
        return replace(route, kind=kind, shared=copies > 1)
    written = placed.shard.within(piece)
    return replace(
        route,
        kind=kind,
        record=replace(route.record, written=written),
        shared=copies > 1,
        piece=piece,
        source=index_of(piece, shape),
        target=index_of(written, shape),
    )


def index_of(box: Box, shape: list[int]) -> tuple[slice, ...]:
    """What indexes a box in a tensor of that shape; () for all of it, so that nobody indexes."""
    return box.slices(len(shape)) if box else ()


def copies_of(placed: Placed, formula: ShapeFormula, here: Place) -> tuple[int, int]:
    """(how many ranks hold this part, which of them this one is)."""
    layout = here.layout
    copies = 1
    index = 0
    if isinstance(placed.placement, Replicate):
        copies = layout.tp
        index = here.coordinate.tp
    if layout.batch_groups > 1 and not formula.batched:
        index += copies * here.coordinate.batch
        copies *= layout.batch_groups
    return copies, index


def placement_text(placed: Placed, here: Place) -> str:
    """The placement over tp, as a report says it."""
    return repr(placed.placement) if here.layout.tp > 1 else "whole"


def kept_positions(entry: Entry, placed: Placed, here: Place) -> tuple[int, torch.Tensor] | None:
    """(the dim, (n,) int64 on the value's device): the positions that the hook keeps. None: all.

    PlacementError: they cannot be picked from the value."""
    hook = entry.hook
    formula = entry.formula
    if hook.kept_positions is None:
        return None
    dim = formula.positions
    if formula.folded is not None or dim in placed.shard.dims:
        raise PlacementError(
            f"{hook.key}: positions cannot be picked from {formula}, whose rows run over the batch "
            "or are split along the sequence; hook it without positions"
        )
    if dim is None:
        return None
    positions = [position % here.S for position in hook.kept_positions]
    return dim, torch.tensor(positions, device=placed.local.device)


def check_unreduced(entry: Entry) -> None:
    """PlacementError: a reduction of addends is not that of their sum."""
    if entry.hook.reduce is not None:
        raise PlacementError(
            f"{entry.key}: each rank holds an addend of it, and no {entry.hook.reduce} of addends "
            "is that of their sum; hook it without reduce"
        )
