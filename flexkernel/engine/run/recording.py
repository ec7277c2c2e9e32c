"""What the hooks of a run keep of the values they see, and where.

A read never communicates, never replaces the value and never raises into the forward: the capture
carries its failure. An edit replaces the value, and fails the run if it fails.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import time
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from flexkernel.engine.compat import waited
from flexkernel.engine.model.hooks import Tap
from flexkernel.engine.model.pytree import first_leaf, leaf, leaves, replaced
from flexkernel.engine.place.placements import Place, Placed
from flexkernel.engine.place.staging import with_landed_digests
from flexkernel.engine.runtime import Runtime
from flexkernel.errors import HookError, PlacementError
from flexkernel.memory.plan import Entry, logits_path
from flexkernel.names import display_name
from flexkernel.wire import CaptureKey, ShardRecord

from .autograd import Tape, watched
from .context import RunContext
from .edits import Editor
from .reductions import padding_mask, statistics_of, write_statistics
from .routes import Kind, Route, route_of
from .unplanned import check_strided, keep_unplanned

__all__ = ["Batch", "ForwardRecording", "Recording", "failure", "tensor_in"]

Batch = dict[str, torch.Tensor]  # what a model is called with: this rank's rows


class Recording(abc.ABC):
    """What the hooks of one run write, and what this rank reports of it.

    planned: index in the plan → record. others: the records of values that had no planned place.
    forwards: how many have begun. seconds: that recording took."""

    def __init__(self, context: RunContext, active: frozenset[str], editor: Editor):
        self.context = context
        self.active = active | {"logits"}
        self.editor = editor
        self.here = context.here
        self.entries = context.captures.entries
        self.places = context.open_places()
        self.tape: Tape | None = None
        self.keeps_graph = False
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
        """The tensor in the slab that planned capture i fills, of entry.lies' shape and dtype, on
        the CPU."""
        place = self.places[i]
        if place is None:
            place = self.places[i] = self.context.open_place(i)
        return place

    def locate(self, entry: Entry, value: torch.Tensor, here: Place) -> Placed:
        """Where a value lies in the whole. value: this rank's part, of any shape. PlacementError:
        it is not what the scan says."""
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
        editor: Editor,
        tape: Tape | None = None,
    ):
        super().__init__(context, active, editor)
        self.tape = tape
        self.keeps_graph = tape is not None and tape.graph
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
        if not self.keeps_graph:
            tensor = tensor.detach()
        route, local = self._route(i, tensor)
        if route.kept is not None:
            local = local.index_select(*route.kept)
        if self.tape is not None and route.is_end:
            self.tape.end(i, local, route.record.shard, route.counts)
        return self._follow(route, i, local.detach())

    def _route(self, i: int, tensor: torch.Tensor) -> tuple[Route, torch.Tensor]:
        """(the route of a value, this rank's part of it as a plain tensor of the part's shape)."""
        if type(tensor) is not torch.Tensor and not isinstance(tensor, DTensor):
            tensor = waited(tensor)
        plain = type(tensor) is torch.Tensor and tensor.layout is torch.strided
        if plain and not tensor.is_nested:
            route = self._routes.get((i, tensor.shape, tensor.dtype))
            if route is not None:
                return route, tensor
        entry = self.entries[i]
        placed = self.locate(entry, tensor, self.here)
        route = route_of(entry, placed, self.here)
        if not isinstance(tensor, DTensor):
            self._routes[i, placed.local.shape, placed.local.dtype] = route
        return route, placed.local

    def _follow(self, route: Route, i: int, local: torch.Tensor) -> ShardRecord:
        """Write what the route says. local: what is kept of this rank's part, of any shape, without
        a graph."""
        record = route.record
        if route.kind is Kind.ADDEND:
            return dataclasses.replace(record, region=self.context.keep_apart(local))
        if route.kind is Kind.STATISTICS:
            self._write_statistics(route, i, local)
        elif route.piece is not None:
            self._copy(route, i, local)
        if not route.shared:
            return record
        digest = self.context.copies.digest(local)
        return ShardRecord(record.evidence, record.placement, digest, record.shard, record.written)

    def _copy(self, route: Route, i: int, local: torch.Tensor) -> None:
        """Copy this rank's piece of a value into the capture's place. local: what is kept of this
        rank's part, of any shape."""
        place = self.place(i)
        if route.target:
            place = place[route.target]
        if route.source:
            local = local[route.source]
        self.context.copies.write(place, local)

    def _write_statistics(self, route: Route, i: int, local: torch.Tensor) -> None:
        """Write what this rank's part says of the reduction into a place of its own. The reader
        combines those of all ranks. local: what is kept of this rank's part, of any shape."""
        box = route.record.written
        if route.piece is None or box is None:
            return
        entry = self.entries[i]
        mask = padding_mask(entry, self._mask(entry), box)
        statistics = statistics_of(entry, route.piece.cut(local), mask)
        slot = entry.slot(self.here.layout, self.here.rank)
        write_statistics(statistics, entry, self.place(i)[:, slot], box, self.context.copies)

    def _mask(self, entry: Entry) -> torch.Tensor | None:
        """(B, n) bool on the CPU, n the positions that are kept: False on pads. None: there are
        none."""
        S = self.here.S
        mask = self.context.tokens.mask(range(S))
        positions = entry.hook.kept_positions
        if positions is not None:
            mask = mask[:, [position % S for position in positions]]
        if mask.all():
            return None
        return mask

    def write_unplanned(self, tap: Tap, at: str, call: int, value: Any) -> None:
        path, tensor = self._leaf_of(tap, value)
        if tensor is None:
            return  # the model puts out something else
        key = CaptureKey(tap.key, tap.name, at, path, call)
        try:
            check_strided(f"{display_name(tap.name)} {at}", tensor)
            self.others[key] = self._keep_unplanned(tap, path, tensor.detach())
        except PlacementError as error:
            self.others[key] = failure(error)

    def _keep_unplanned(self, tap: Tap, path: str, value: torch.Tensor) -> ShardRecord:
        """value: this rank's part, of any shape, without a graph."""
        return keep_unplanned(self.context, tap.hook, tap.name, path, value)

    def _leaf_of(self, tap: Tap, value: Any) -> tuple[str, torch.Tensor | None]:
        """(the path, this rank's part of the tensor that a hook asks for, of any shape); None: it
        is not there."""
        if tap.key == "logits":
            return logits_in(value)
        if tap.hook.index is None:
            return first_leaf(value)
        return tap.hook.index, leaf(value, tap.hook.index)

    # --- gradients --------------------------------------------------------------------

    def watch(self, tap: Tap, value: Any) -> Any:
        if not self.keeps_graph:
            return None
        call, i = self.next_call(tap, tap.at)
        path = tap.hook.index
        if i is not None:
            path = self.entries[i].key.index
        elif path is None:
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
            new = self.editor.edit_gradient(tap.hook, tap.name, call, path, gradient)
            gradient = new
        if tap.keeps_after:
            self._keep_gradient(tap, tap.at, call, path, gradient)
        return new

    def _keep_gradient(
        self, tap: Tap, at: str, call: int, path: str, gradient: torch.Tensor
    ) -> None:
        """Write the gradient of this rank's part of a value, of the part's shape. Never raises, as
        record()."""
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
    problem = "has no tensor there"
    if tensor is not None:
        problem = f"is {tensor.dtype}"
    return f"{display_name(tap.name)} {tap.hook.of} {problem}: it has no gradient"


def tensor_in(value: Any, entry: Entry) -> torch.Tensor:
    """The tensor that a plan means, of any shape, by its path in the unsharded model's value.

    Where a hook names no index it is the first one if that path is not there: a builder's module
    may put out a tensor where the unsharded one has a tuple. PlacementError: there is none."""
    path = entry.key.index
    if type(value) is torch.Tensor and (path == "" or entry.hook.index is None):
        return value
    if entry.hook.name == "logits":
        tensor = logits_in(value)[1]
    else:
        tensor = leaf(value, path)
        if tensor is None and entry.hook.index is None:
            tensor = first_leaf(value)[1]
    if tensor is None:
        raise PlacementError(
            f"{entry.key}: the value has no tensor at {path!r}, as the scan said it would"
        )
    return tensor


def logits_in(value: Any) -> tuple[str, torch.Tensor | None]:
    """(the path, the tensor) of the logits in a model's output, (B, S, V) or what it has instead;
    ("", None): it has none."""
    tensors = dict(leaves(value))
    path = logits_path(list(tensors))
    if path is None:
        return "", None
    return path, tensors[path]


def failure(error: Exception) -> ShardRecord:
    """The record of a capture that could not be made."""
    return ShardRecord("none", "unknown", written=None, error=(type(error).__name__, str(error)))
