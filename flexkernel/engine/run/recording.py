"""What the hooks of a run keep of the values they see, and where.

A read never communicates, never replaces the value and never raises into the forward: the capture
carries its failure. An edit replaces the value, and fails the run if it fails.
"""

from __future__ import annotations

import abc
import enum
import functools
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor, Partial, Replicate

from flexkernel.boxes import WHOLE, Box, share_of
from flexkernel.engine.compat import waited
from flexkernel.engine.model.hooks import Tap
from flexkernel.engine.model.pytree import first_leaf, leaf, leaves, replaced
from flexkernel.engine.place.placements import Place, Placed
from flexkernel.engine.place.staging import with_landed_digests
from flexkernel.errors import HookError, PlacementError
from flexkernel.memory.plan import Entry, logits_path
from flexkernel.names import display_name
from flexkernel.wire import CaptureKey, ShapeFormula, ShardRecord

from .autograd import Tape, watched
from .context import RunContext
from .edits import Editor
from .reductions import padding_mask, statistics_of, write_statistics
from .unplanned import check_strided, keep_unplanned

if TYPE_CHECKING:
    from flexkernel.engine.runtime import Runtime

__all__ = ["Batch", "ForwardRecording", "Recording", "copies_of", "failure", "tensor_in"]

Batch = dict[str, torch.Tensor]  # what a model is called with: this rank's rows


# --- where a value goes ---------------------------------------------------------------


class Kind(enum.Enum):
    """What a rank writes of a value."""

    NOTHING = enum.auto()  # its rows are copies that nobody wants
    COPY = enum.auto()
    STATISTICS = enum.auto()  # of a reduction
    ADDEND = enum.auto()  # of a sum over tp, into a file of its own


@dataclass(frozen=True)
class Route:
    """Where a planned value of one local shape and dtype goes on this rank. Decided once.

    record: what the rank reports of it, but for the digest. shared: other ranks hold the same part,
    so that digests are compared. piece: which part of what it holds this rank writes; its index in
    the kept tensor is `source`, in the capture's place `target`. kept: the positions that are kept,
    as (dim, index). is_end: whether a gradient can come in here; counts: whether it counts on this
    rank."""

    kind: Kind
    record: ShardRecord
    shared: bool = False
    piece: Box | None = None
    source: tuple[slice, ...] = ()
    target: tuple[slice, ...] = ()
    kept: tuple[int, torch.Tensor] | None = None
    is_end: bool = True
    counts: bool = True

    @classmethod
    def of(cls, entry: Entry, placed: Placed, here: Place) -> Route:
        """The route of a value that is placed so. PlacementError: it cannot be kept so."""
        formula = entry.formula
        batched = bool(formula.batched)
        first_group = here.layout.coordinate(here.rank).batch == 0
        counts = not here.idle if batched else first_group
        kept = kept_positions(entry, placed, here)
        placement = repr(placed.placement) if here.layout.tp > 1 else "whole"
        record = ShardRecord(placed.evidence, placement, 0, placed.shard, None)
        is_addend = isinstance(placed.placement, Partial)
        if here.idle and batched:
            return cls(Kind.NOTHING, record, kept=kept, is_end=not is_addend, counts=counts)
        if is_addend:
            check_addend(entry)
            # the addends of one group of ranks are the sum
            kind = Kind.ADDEND if batched or first_group else Kind.NOTHING
            partial = here.layout.tp
            record = ShardRecord(placed.evidence, placement, 0, placed.shard, None, partial=partial)
            return cls(kind, record, kept=kept, is_end=False)
        shape = list(placed.local.shape)
        if kept is not None:
            shape[kept[0]] = len(kept[1])
        copies, index = copies_of(placed, formula, here)
        piece = WHOLE if copies == 1 else share_of(shape, copies, index)
        written = None if piece is None else placed.shard.within(piece)
        return cls(
            Kind.COPY if entry.hook.reduce is None else Kind.STATISTICS,
            ShardRecord(placed.evidence, placement, 0, placed.shard, written),
            copies > 1,
            piece,
            piece.slices(len(shape)) if piece else (),
            written.slices(len(shape)) if written else (),
            kept,
            counts=counts,
        )


def copies_of(placed: Placed, formula: ShapeFormula, here: Place) -> tuple[int, int]:
    """(how many ranks hold this part, which of them this one is)."""
    layout = here.layout
    where = layout.coordinate(here.rank)
    copies = 1
    index = 0
    if isinstance(placed.placement, Replicate):
        copies = layout.tp
        index = where.tp
    if layout.batch_groups > 1 and not formula.batched:
        index += copies * where.batch
        copies *= layout.batch_groups
    return copies, index


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


def check_addend(entry: Entry) -> None:
    """PlacementError: what is kept of addends is not that of their sum."""
    if entry.hook.reduce is not None:
        raise PlacementError(
            f"{entry.key}: each rank holds an addend of it, and no {entry.hook.reduce} of addends "
            "is that of their sum; hook it without reduce"
        )


# --- the recordings -------------------------------------------------------------------


class Recording(abc.ABC):
    """What the hooks of one run write, and what this rank reports of it.

    planned: index in the plan → record. others: the records of values that had no planned place.
    forwards: how many have begun. seconds: that recording took."""

    def __init__(self, context: RunContext, active: frozenset[str], editor: Editor | None):
        self.context = context
        self.active = active | {"logits"}
        self.editor = editor
        self.here = context.here
        self.entries = context.captures.entries
        self.places = context.open_places()
        self.tape: Tape | None = None
        self.planned: dict[int, ShardRecord] = {}
        self.others: dict[CaptureKey, ShardRecord] = {}
        self.forwards = 1
        self.seconds = 0.0
        self.loss: float | None = None
        self._index = context.captures.index
        self._calls: dict[tuple[str, str, str], int] = {}
        self._edits: dict[tuple[str, str], int] = {}

    @abc.abstractmethod
    def run(self, runtime: Runtime, batch: Batch) -> None:
        """Run the model, and let it come to all ranks' collectives. All ranks must call."""

    @abc.abstractmethod
    def write(self, i: int, value: Any) -> ShardRecord:
        """Write a value of the model into the place of planned capture i. PlacementError: it is
        not what the plan says."""

    @abc.abstractmethod
    def write_unplanned(self, tap: Tap, at: str, call: int, value: Any) -> None:
        """Keep a value that has no planned place."""

    @abc.abstractmethod
    def watch(self, tap: Tap, value: Any) -> Any:
        """The same value, whose gradient is kept; None if this run has no gradients."""

    @abc.abstractmethod
    def whole_by_forward(self) -> dict[int, dict[int, ShardRecord]]:
        """Number of forwards → the records of what was whole after so many."""

    def record(self, tap: Tap, at: str, value: Any) -> None:
        """Keep a value. Never raises: the capture carries what goes wrong.

        at: the capture's, which is "output before" for what was there before an edit."""
        start = time.perf_counter()
        call, i = self.next_call(tap, at)
        try:
            if i is None:
                self.write_unplanned(tap, at, call, value)
            else:
                self.planned[i] = self.write(i, value)
        except Exception as error:
            self.note_failure(tap, at, call, error)
        self.seconds += time.perf_counter() - start

    def record_failure(self, tap: Tap, at: str, error: Exception) -> None:
        """Note that a value could not even be computed."""
        call, _ = self.next_call(tap, at)
        self.note_failure(tap, at, call, error)

    def edit(self, tap: Tap, value: Any) -> Any:
        """The value as the hook's edit makes it. It does raise: a forward without its edit is
        wrong."""
        assert self.editor is not None, "a run whose hooks edit has an editor"
        call = self._edits.get((tap.key, tap.name), 0)
        self._edits[tap.key, tap.name] = call + 1
        return self.editor.edit(tap.hook, tap.name, call, value)

    def land(self) -> None:
        """Wait for all copies and digests. Call before replying to the driver."""
        self.context.copies.land()
        if self.context.copies.in_flight:
            self.planned = with_landed_digests(self.planned)
            self.others = with_landed_digests(self.others)

    def begin_forward(self) -> None:
        """What fires from now on is call 0 again."""
        self._calls.clear()
        self._edits.clear()

    def next_call(self, tap: Tap, at: str) -> tuple[int, int | None]:
        """(how often this value has come in this forward, its index in the plan)."""
        key = (tap.key, tap.name, at)
        call = self._calls.get(key, 0)
        self._calls[key] = call + 1
        return call, self._index.get((*key, call))

    def note_failure(self, tap: Tap, at: str, call: int, error: Exception) -> None:
        """The capture says what went wrong."""
        i = self._index.get((tap.key, tap.name, at, call))
        if i is None:
            key = CaptureKey(tap.key, tap.name, at, tap.hook.index or "", call)
            self.others[key] = failure(error)
        else:
            self.planned[i] = failure(error)

    def place(self, i: int) -> torch.Tensor:
        """The tensor in the slab that planned capture i fills: entry.lies, on the CPU."""
        place = self.places[i]
        if place is None:
            place = self.places[i] = self.context.open_place(i)
        return place

    def locate(self, entry: Entry, value: torch.Tensor, here: Place) -> Placed:
        """Where a value lies in the whole. value: this rank's part. PlacementError: it is not what
        the scan says."""
        check_strided(f"{display_name(entry.key.module)} {entry.key.at}", value)
        of = entry.hook.of
        placed = self.context.placer.place(entry.key.module, of, value, entry.formula, here)
        if placed.local.dtype != getattr(torch, entry.formula.dtype):
            raise PlacementError(
                f"{entry.key}: the scan says {entry.formula.dtype}, the value is "
                f"{placed.local.dtype}"
            )
        return placed


class ForwardRecording(Recording):
    """The recording of one forward, and of the backward from its loss.

    tape: what the backward begins from; None for a run without a loss."""

    def __init__(
        self,
        context: RunContext,
        active: frozenset[str],
        editor: Editor | None = None,
        tape: Tape | None = None,
    ):
        super().__init__(context, active, editor)
        self.tape = tape
        self._keeps_graph = tape is not None and tape.graph
        # (index in the plan, local shape, dtype) → route
        self._routes: dict[tuple[int, torch.Size, torch.dtype], Route]
        self._routes = context.captures.memo.setdefault(self.here, {})

    def run(self, runtime: Runtime, batch: Batch) -> None:
        runtime.part.caller(batch, use_cache=False)

    def whole_by_forward(self) -> dict[int, dict[int, ShardRecord]]:
        return {1: self.planned}

    def write(self, i: int, value: Any) -> ShardRecord:
        entry = self.entries[i]
        tensor = tensor_in(value, entry)
        if not self._keeps_graph:
            tensor = tensor.detach()
        route, local = self._route(i, tensor)
        if route.kept is not None:
            local = local.index_select(*route.kept)
        if self.tape is not None and route.is_end:
            self.tape.end(i, local, route.record.shard, route.counts)
        return self._follow(route, i, local.detach())

    def _route(self, i: int, tensor: torch.Tensor) -> tuple[Route, torch.Tensor]:
        """(the route of a value, this rank's part of it as a plain tensor)."""
        if type(tensor) is not torch.Tensor and not isinstance(tensor, DTensor):
            tensor = waited(tensor)
        plain = type(tensor) is torch.Tensor and tensor.layout is torch.strided
        if plain and not tensor.is_nested:
            route = self._routes.get((i, tensor.shape, tensor.dtype))
            if route is not None:
                return route, tensor
        entry = self.entries[i]
        placed = self.locate(entry, tensor, self.here)
        route = Route.of(entry, placed, self.here)
        if not isinstance(tensor, DTensor):
            self._routes[i, placed.local.shape, placed.local.dtype] = route
        return route, placed.local

    def _follow(self, route: Route, i: int, local: torch.Tensor) -> ShardRecord:
        """Write what the route says. local: what is kept of this rank's part, without a graph."""
        record = route.record
        copies = self.context.copies
        region = None
        if route.kind is Kind.NOTHING:
            return record
        if route.kind is Kind.ADDEND:
            region = self.context.keep_apart(local)
        elif route.kind is Kind.STATISTICS:
            self._write_statistics(route, i, local)
        elif route.piece is not None:
            place = self.place(i)
            target = place[route.target] if route.target else place
            copies.write(target, local[route.source] if route.source else local)
        if region is None and not route.shared:
            return record
        digest = copies.digest(local) if route.shared else 0
        return ShardRecord(
            record.evidence,
            record.placement,
            digest,
            record.shard,
            record.written,
            region,
            record.partial,
        )

    def _write_statistics(self, route: Route, i: int, local: torch.Tensor) -> None:
        """Write what this rank's part says of the reduction into a place of its own. The reader
        combines those of all ranks. local: as in _follow()."""
        box = route.record.written
        if route.piece is None or box is None:
            return
        entry = self.entries[i]
        mask = padding_mask(entry, self._mask(entry), box)
        statistics = statistics_of(entry, route.piece.cut(local), mask)
        slot = entry.slot(self.here.layout, self.here.rank)
        write_statistics(statistics, entry, self.place(i)[:, slot], box, self.context.copies)

    def _mask(self, entry: Entry) -> torch.Tensor | None:
        """(B, positions that are kept) bool on the CPU: False on pads. None: there are none."""
        mask = self.context.tokens.mask(range(self.here.S))
        if entry.hook.kept_positions is not None:
            mask = mask[:, [p % self.here.S for p in entry.hook.kept_positions]]
        return None if mask.all() else mask

    def write_unplanned(self, tap: Tap, at: str, call: int, value: Any) -> None:
        path = logits_in(value) if tap.key == "logits" else tap.hook.index
        if path is not None:
            tensor = leaf(value, path)
        elif tap.key == "logits":
            return  # the model puts out something else
        else:
            path, tensor = first_leaf(value)
        if tensor is None:
            return
        key = CaptureKey(tap.key, tap.name, at, path, call)
        try:
            check_strided(f"{display_name(tap.name)} {at}", tensor)
            self.others[key] = self._keep_unplanned(tap, path, tensor.detach())
        except PlacementError as error:
            self.others[key] = failure(error)

    def _keep_unplanned(self, tap: Tap, path: str, value: torch.Tensor) -> ShardRecord:
        """value: this rank's part, of any shape, without a graph."""
        return keep_unplanned(self.context, tap.hook, tap.name, path, value)

    # --- gradients --------------------------------------------------------------------

    def watch(self, tap: Tap, value: Any) -> Any:
        if not self._keeps_graph:
            return None
        call, i = self.next_call(tap, tap.at)
        path = self.entries[i].key.index if i is not None else tap.hook.index
        if path is None:
            path = first_leaf(value)[0]
        tensor = leaf(value, path)
        if tensor is None or not (tensor.is_floating_point() or tensor.is_complex()):
            if i is not None:
                self.planned[i] = failure(HookError(no_gradient(tap, tensor)))
            return None
        arrived = functools.partial(self._gradient_arrived, tap, call, path)
        return replaced(value, path, watched(waited(tensor), arrived))

    def _gradient_arrived(
        self, tap: Tap, call: int, path: str, gradient: torch.Tensor
    ) -> torch.Tensor | None:
        """Keep the gradient of a value, and edit it: what goes on in its place, or None.

        gradient: of this rank's part, of the value's shape, dtype and device."""
        if tap.keeps_before:
            self._keep_gradient(tap, tap.before, call, path, gradient)
        new = None
        if tap.hook.edit is not None:
            assert self.editor is not None, "a run whose hooks edit has an editor"
            new = self.editor.edit_gradient(tap.hook, tap.name, call, path, gradient)
        if tap.keeps_after:
            self._keep_gradient(tap, tap.at, call, path, gradient if new is None else new)
        return new

    def _keep_gradient(
        self, tap: Tap, at: str, call: int, path: str, gradient: torch.Tensor
    ) -> None:
        """Write the gradient of this rank's part of a value. Never raises, as record()."""
        start = time.perf_counter()
        i = self._index.get((tap.key, tap.name, at, call))
        try:
            gradient = gradient.detach()
            if i is None:
                record = self._keep_unplanned(tap, path, gradient)
            else:
                route, local = self._route(i, gradient)
                if route.kept is not None:
                    local = local.index_select(*route.kept)
                record = self._follow(route, i, local)
        except Exception as error:
            record = failure(error)
        if i is None:
            self.others[CaptureKey(tap.key, tap.name, at, path, call)] = record
        else:
            self.planned[i] = record
        self.seconds += time.perf_counter() - start


def no_gradient(tap: Tap, tensor: torch.Tensor | None) -> str:
    """Why there is no gradient of a value of any shape; None: it holds no tensor."""
    problem = "has no tensor there" if tensor is None else f"is {tensor.dtype}"
    return f"{display_name(tap.name)} {tap.hook.of} {problem}: it has no gradient"


def tensor_in(value: Any, entry: Entry) -> torch.Tensor:
    """The tensor that a plan means, by its path in the unsharded model's value.

    Where a hook names no index it is the first one if that path is not there: a builder's module
    may put out a tensor where the unsharded one has a tuple. PlacementError: there is none."""
    path = entry.key.index
    if type(value) is torch.Tensor and (path == "" or entry.hook.index is None):
        return value
    if entry.hook.name == "logits":
        named = logits_in(value)
        tensor = None if named is None else leaf(value, named)
    else:
        tensor = leaf(value, path)
        if tensor is None and entry.hook.index is None:
            tensor = first_leaf(value)[1]
    if tensor is None:
        raise PlacementError(
            f"{entry.key}: the value has no tensor at {path!r}, as the scan said it would"
        )
    return tensor


def logits_in(value: Any) -> str | None:
    """Where in a model's output its logits are, if it has any."""
    return logits_path([path for path, _ in leaves(value)])


def failure(error: Exception) -> ShardRecord:
    """The record of a capture that could not be made."""
    return ShardRecord("none", "unknown", written=None, error=(type(error).__name__, str(error)))
