"""What a run makes of the values that this rank's hooks see: captures, edits, gradients.

A read never communicates, never replaces the value (it returns None) and never raises into the
forward: a failure is written down. An edit replaces the value, and fails the run if it fails.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from flexkernel.boxes import WHOLE, Box, chunk, share_of
from flexkernel.engine.compat import waited
from flexkernel.engine.model.pytree import leaf, leaves, replaced
from flexkernel.engine.place.placements import (
    NO_BATCH,
    Place,
    Placed,
    Placer,
    rows_held,
)
from flexkernel.engine.place.staging import Copies, with_landed_digests
from flexkernel.engine.runtime import Runtime
from flexkernel.errors import HookError, PlacementError
from flexkernel.memory import reduce
from flexkernel.memory.plan import Entry, Plan, left, logits_path
from flexkernel.memory.slab import Slab, size_of
from flexkernel.names import display_name
from flexkernel.wire import (
    BEFORE,
    CaptureKey,
    HookSpec,
    Region,
    ShapeFormula,
    ShardRecord,
    dtype_name,
)

from .autograd import Tape, watched
from .gradients import write_gradient
from .tokens import TokenBuffer

__all__ = ["Recording", "StopForward", "failed"]


class StopForward(Exception):
    """Ends a forward at the module that the run said to stop at. Not an error."""


class Recording:
    """What the hooks of one run write, and where. region: a plan's entry → its place; spill: keeps
    what has none."""

    def __init__(
        self,
        plan: Plan,
        active: frozenset[str],
        slab: Slab | None,
        region: Callable[[Any], Region],
        placer: Placer,
        here: Place,
        spill: Callable[[torch.Tensor], Region],
        text: TokenBuffer,
        editor: Any = None,
        tape: Tape | None = None,
        copies: Copies | None = None,
    ):
        self.text, self.copies = text, copies or Copies()
        self.plan, self.active, self.slab, self.region = plan, active | {"logits"}, slab, region
        self.placer, self.here, self.spill, self.editor, self.tape = (
            placer,
            here,
            spill,
            editor,
            tape,
        )
        self.where = index_of(plan)
        self.calls: dict[tuple[str, str, str], int] = {}
        self.edits: dict[tuple[str, str], int] = {}
        self.planned: dict[int, ShardRecord] = {}
        self.others: dict[CaptureKey, ShardRecord] = {}
        self.seconds = 0.0
        self.loss: float | None = None

    def record(self, hook: HookSpec, name: str, value: Callable[[], Any], at: str = "") -> None:
        """Write a value into its place. Whatever goes wrong is kept for whoever reads the capture.

        at: the capture's, where it is not the hook's: what was there before an edit is kept apart
        from what it made."""
        start = time.perf_counter()
        at = at or hook.at
        call = self.calls.get((hook.key, name, at), 0)
        self.calls[hook.key, name, at] = call + 1
        i = self.where.get((hook.key, name, at, call))
        try:
            if i is None:
                self._record_other(hook, name, call, value(), at)
            else:
                entry = self.plan.entries[i]
                made = value()
                self.planned[i] = self._write(i, asked_for(made, hook, entry.key.index), self.tape)
        except (
            Exception
        ) as error:  # a read never raises into the forward; the capture carries its failure
            if i is None:
                self.others[CaptureKey(hook.key, name, at, hook.index or "", call)] = failed(error)
            else:
                self.planned[i] = failed(error)
        self.seconds += time.perf_counter() - start

    def land(self) -> None:
        """Have everything that was written be there, and every digest a number. Before anybody is
        told of it."""
        self.copies.land()
        if self.copies.in_flight:
            self.planned, self.others = (
                with_landed_digests(self.planned),
                with_landed_digests(self.others),
            )

    def edit(self, hook: HookSpec, name: str, value: Any) -> Any:
        """The value as the hook's edit makes it. Unlike a read it does raise: a forward without
        its edit is wrong."""
        call = self.edits.get((hook.key, name), 0)
        self.edits[hook.key, name] = call + 1
        return self.editor.edit(hook, name, call, value)

    def watch(self, hook: HookSpec, name: str, value: Callable[[], Any]) -> Any:
        """The same value, whose gradient is written, and edited, once it is there. None: this run
        has no gradients."""
        if self.tape is None or not self.tape.graph:
            return None
        call = self.calls.get((hook.key, name, hook.at), 0)
        self.calls[hook.key, name, hook.at] = call + 1
        before, found = hook.before, value()
        i = self.where.get((hook.key, name, hook.at, call))
        path = (
            self.plan.entries[i].key.index if i is not None else hook.index or first_leaf(found)[0]
        )
        tensor = leaf(found, path)
        if tensor is None or not (tensor.is_floating_point() or tensor.is_complex()):
            what = f"is {tensor.dtype}" if tensor is not None else "has no tensor there"
            problem = failed(
                HookError(f"{display_name(name)} {hook.of} {what}: it has no gradient")
            )
            if i is not None:
                self.planned[i] = problem
            return None

        def arrived(gradient: torch.Tensor) -> torch.Tensor | None:
            if before in hook.kept_at:
                self._keep_gradient(hook, name, before, call, path, gradient)
            new = (
                None
                if hook.edit is None
                else self.editor.edit_gradient(hook, name, call, path, gradient)
            )
            if hook.at in hook.kept_at:
                self._keep_gradient(
                    hook, name, hook.at, call, path, gradient if new is None else new
                )
            return new

        return replaced(found, path, watched(waited(tensor), arrived))

    def _keep_gradient(
        self, hook: HookSpec, name: str, at: str, call: int, path: str, gradient: torch.Tensor
    ) -> None:
        """As a read keeps a value: whatever goes wrong is kept for whoever reads the capture."""
        start = time.perf_counter()
        i = self.where.get((hook.key, name, at, call))
        try:
            seen = (
                self._write(i, gradient)
                if i is not None
                else self._described(hook, name, path, gradient.detach())
            )
        except Exception as error:  # as in record()
            seen = failed(error)
        if i is not None:
            self.planned[i] = seen
        else:
            self.others[CaptureKey(hook.key, name, at, path, call)] = seen
        self.seconds += time.perf_counter() - start

    def of_parameters(self, runtime: Runtime) -> list[tuple[HookSpec, tuple[str, ...]]]:
        """The hooks on parameters' gradients that are active in this run, and what each names."""
        hooks = [
            hook
            for hook in runtime.part.hook_set.hooks
            if hook.of == "param" and hook.key in self.active
        ]
        return [(hook, runtime.part.planner.names(hook)) for hook in hooks]

    def keep_parameters(self, runtime: Runtime, before: bool = False) -> None:
        """The gradients of the parameters that hooks name, after the backward; those of which the
        hook keeps what was there before its edit, before that. Nothing is sent."""
        for i, entry in enumerate(self.plan.entries):
            if entry.hook.of == "param" and (entry.key.site.side == BEFORE) is before:
                try:
                    seen = write_gradient(runtime, entry.key.module, self._place_of(i))
                except Exception as error:  # as in record()
                    seen = failed(error)
                if seen is not None:
                    self.planned[i] = seen

    def _place_of(self, i: int) -> torch.Tensor:
        assert self.slab is not None
        return self.slab.tensor(self.region(self.plan.entries[i]))

    def _placed(
        self, entry: Entry, value: torch.Tensor | None, here: Place, tape: Tape | None = None
    ) -> Placed:
        """Where the value lies. PlacementError: it is not what the scan said it would be."""
        if value is None:
            raise PlacementError(
                f"{entry.key}: the value has no tensor at {entry.key.index!r}, as the scan said it would"
            )
        check_strided(entry.key.module, entry.key.at, value)
        seen = value if tape is not None and tape.graph else value.detach()
        placed = self.placer.place(entry.key.module, entry.hook.of, seen, entry.formula, here)
        if placed.local.dtype != getattr(torch, entry.formula.dtype):
            raise PlacementError(
                f"{entry.key}: the scan says {entry.formula.dtype}, the value is {placed.local.dtype}"
            )
        return placed

    def _write(self, i: int, value: torch.Tensor | None, tape: Tape | None = None) -> ShardRecord:
        entry, here = self.plan.entries[i], self.here
        placed = self._placed(entry, value, here, tape)
        local = kept(placed.local, entry.hook, entry.formula, here, placed.shard)
        evidence, placement = (
            placed.evidence,
            repr(placed.placement) if here.layout.tp > 1 else "whole",
        )
        batched = entry.formula.batched
        if tape is not None and not isinstance(placed.placement, Partial):
            tape.end(i, local, placed, here, bool(batched))
        local = local.detach()
        if here.idle and batched:
            return ShardRecord(evidence, placement, 0, placed.shard, None)
        if entry.hook.reduce is not None:
            box = self._reduce(entry, local, placed, self._place_of(i), self._mask(entry))
            return ShardRecord(
                evidence, placement, self._digest(local, placed, entry.formula), placed.shard, box
            )
        if isinstance(placed.placement, Partial):
            # one group's addends are the sum
            copy = not batched and here.coordinate.batch > 0
            region = None if copy else self.spill(local)
            return ShardRecord(
                evidence, placement, 0, placed.shard, None, region, partial=here.layout.tp
            )
        assert self.slab is not None
        part, box = self._piece_of(local, placed, entry.formula)
        if box is not None:
            self.copies.write(box.cut(self._place_of(i)), part)
        return ShardRecord(
            evidence, placement, self._digest(local, placed, entry.formula), placed.shard, box
        )

    def _digest(self, local: torch.Tensor, placed: Placed, formula: ShapeFormula) -> Any:
        """Of what other ranks hold too; what this one holds alone is compared with nothing."""
        return self.copies.digest(local) if self._copies(placed, formula)[0] > 1 else 0

    def _piece_of(
        self, local: torch.Tensor, placed: Placed, formula: ShapeFormula
    ) -> tuple[torch.Tensor, Box | None]:
        """(what this rank copies of what it holds, its part of the whole): ranks that hold copies
        share the work, a piece each. None: it copies nothing."""
        copies, index = self._copies(placed, formula)
        if copies == 1:
            return local, placed.shard
        piece = share_of(local.shape, copies, index)
        if piece is None:
            return local, None
        return piece.cut(local), placed.shard.within(piece)

    def _reduce(
        self,
        entry: Entry,
        local: torch.Tensor,
        placed: Placed,
        place: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> Box | None:
        """Write what this rank's part says of the reduction into a place of its own; the reader
        combines all of them.

        place: (statistics, slots, what is kept). mask: (B, positions), which of the whole
        count."""
        self._check_reducible(entry, placed)
        part, box = self._piece_of(local, placed, entry.formula)
        if box is not None:
            self._put_parts(self._parts(entry, part, mask_of(entry, mask, box)), entry, place, box)
        return box

    def _check_reducible(self, entry: Entry, placed: Placed) -> None:
        if isinstance(placed.placement, Partial):
            raise PlacementError(
                f"{entry.key}: each rank holds an addend of it, and no {entry.hook.reduce} of addends is that of their "
                "sum; hook it without reduce"
            )

    def _parts(self, entry: Entry, part: torch.Tensor, mask: torch.Tensor | None) -> reduce.Partial:
        assert entry.hook.reduce is not None
        if part.numel() == 0:
            return reduce.nothing(entry.hook.reduce.op, left(part.shape, entry.over), part.dtype)
        return reduce.masked(entry.hook.reduce.op, part.detach(), entry.over, mask)

    def _put_parts(
        self, found: reduce.Partial, entry: Entry, place: torch.Tensor, box: Box
    ) -> None:
        target = place[:, entry.slot(self.here.layout, self.here.rank)]
        inner = box.without(entry.over)
        for statistic, into in zip(found.parts, target, strict=True):
            self.copies.write(inner.cut(into), statistic)

    def _mask(self, entry: Entry) -> torch.Tensor | None:
        """(B, positions that are kept), which are real; None: all of them."""
        mask = self.text.mask(range(self.here.S))
        if entry.hook.kept_positions is not None:
            mask = mask[:, [p % self.here.S for p in entry.hook.kept_positions]]
        return None if mask.all() else mask

    def _copies(self, placed: Placed, formula: ShapeFormula) -> tuple[int, int]:
        """(how many ranks hold this part, which of them this one is)."""
        layout, where = self.here.layout, self.here.coordinate
        copies, index = (
            (1, 0) if not isinstance(placed.placement, Replicate) else (layout.tp, where.tp)
        )
        if layout.batch_groups > 1 and not formula.batched:
            copies, index = copies * layout.batch_groups, index + copies * where.batch
        return copies, index

    def _record_other(self, hook: HookSpec, name: str, call: int, value: Any, at: str) -> None:
        """A value with no planned place: kept in a region of this rank's own, described in the
        reply."""
        path, tensor = (
            first_leaf(value) if hook.index is None else (hook.index, leaf(value, hook.index))
        )
        if hook.name == "logits":
            found = logits_in(value)
            if found is None:
                return  # the model puts out something else
            path, tensor = found, leaf(value, found)
        if tensor is not None:
            key = CaptureKey(hook.key, name, at, path, call)
            try:
                check_strided(name, at, tensor)
                self.others[key] = self._described(hook, name, path, tensor.detach())
            except PlacementError as error:
                self.others[key] = failed(error)

    def _described(self, hook: HookSpec, name: str, path: str, value: torch.Tensor) -> ShardRecord:
        """Its part of the whole as the evidence says it, without a formula: the batch must lie on
        one group."""
        layout, tp, at = self.here.layout, self.here.tp, hook.of
        if hook.kept_positions is not None:
            raise PlacementError(
                f"{display_name(name)} {at}: its positions are not known; hook it without positions"
            )
        if hook.reduce is not None:
            raise PlacementError(
                f"{display_name(name)} {at}: no formula gives its shape; hook it without reduce"
            )
        evidence, placement, local = self.placer.evidence(name, at, value, path)
        if placement is None and layout.tp == 1:
            evidence, placement = "described", Replicate()
        key = f"{name} input" if at == "input" else name
        batch = self.placer.batch_dim(name, at, path) if layout.batch_groups > 1 else NO_BATCH
        if placement is None or batch is None:
            raise PlacementError(
                f"{display_name(name)} {at}: its shape or its order of rows depends on the data, or no reference says "
                f"it, so that {tuple(value.shape)} on each rank cannot be put together under {layout}; hook the "
                f"modules around it, load with reference=, or declare it, placements={{{key!r}: 'batch:0 replicate'}}"
            )
        holds = WHOLE
        if isinstance(placement, Shard):
            dim = placement.dim % local.dim()
            total = value.shape[dim] if isinstance(value, DTensor) else local.shape[dim] * layout.tp
            holds = WHOLE.plus(dim, *chunk(total, layout.tp, tp))
        keeps = tp == 0 or not isinstance(placement, Replicate)
        if isinstance(batch, int):
            holds = rows_held(holds, batch, local.shape, self.here, key)
            if self.here.idle:  # copied rows that nobody wants
                return ShardRecord(evidence, repr(placement), 0, holds, None)
        elif self.here.coordinate.batch > 0:
            keeps = False  # every group of ranks has the same
        region = self.spill(local) if keeps else None
        partial = layout.tp if isinstance(placement, Partial) else 0
        return ShardRecord(
            evidence, repr(placement), self.copies.digest(local), holds, None, region, partial
        )


def asked_for(value: Any, hook: HookSpec, path: str) -> torch.Tensor | None:
    """The tensor that a plan means, by its path in the unsharded model's value. Where a hook names
    no index, that is the first one: a builder's module may put a tensor out where the unsharded
    one has a tuple."""
    if hook.name == "logits":
        named = logits_in(value)
        return None if named is None else leaf(value, named)
    found = leaf(value, path)
    return first_leaf(value)[1] if found is None and hook.index is None else found


def logits_in(value: Any) -> str | None:
    """Where in a model's output its logits are, if it has any."""
    return logits_path([path for path, _ in leaves(value)])


def first_leaf(value: Any) -> tuple[str, torch.Tensor | None]:
    return next(leaves(value), ("", None))


def failed(error: Exception) -> ShardRecord:
    """What is kept of a capture that could not be made."""
    return ShardRecord("none", "unknown", written=None, error=(type(error).__name__, str(error)))


def index_of(plan: Plan) -> dict[tuple[str, str, str, int], int]:
    """(hook, module, at, call) → index in the plan; made once a plan."""
    found = plan.__dict__.get("_index")
    if found is None:
        found = {
            (e.key.hook, e.key.module, e.at, e.key.call): i for i, e in enumerate(plan.entries)
        }
        object.__setattr__(plan, "_index", found)
    return found


def kept(
    local: torch.Tensor, hook: HookSpec, formula: ShapeFormula, here: Place, holds: Box
) -> torch.Tensor:
    """What a hook keeps of a value: all, or the positions it names."""
    if hook.kept_positions is None:
        return local
    dim = formula.positions
    if formula.folded is not None or dim in holds.dims:
        raise PlacementError(
            f"{hook.key}: positions cannot be picked from {formula}, whose rows run over the batch or are split along "
            "the sequence; hook it without positions"
        )
    if dim is None:
        return local
    return local.index_select(
        dim, torch.tensor([p % here.S for p in hook.kept_positions], device=local.device)
    )


def mask_of(entry: Entry, mask: torch.Tensor | None, box: Box) -> torch.Tensor | None:
    """Which numbers of that part of the whole are real, to be broadcast over it; None: all, or it
    makes no difference.

    mask: (B, positions). PlacementError: a reduction over rows or positions, and which are pads is
    not known."""
    formula = entry.formula
    rows, folded, along = formula.rows, formula.folded, formula.positions
    if mask is None or not {rows, folded, along}.intersection(entry.over):
        return None
    if folded is None and None in (rows, along):
        return None
    real = formula.broadcast(mask)
    if any(size not in (1, entry.shape[dim]) for dim, size in enumerate(real.shape)):
        raise PlacementError(
            f"{entry.key} is {formula}: which of it are pads is not known; hook it without reduce"
        )
    return box.only([d for d, size in enumerate(real.shape) if size > 1]).cut(real)


def check_strided(name: str, at: str, value: torch.Tensor) -> None:
    """PlacementError for a tensor whose elements do not lie side by side in memory."""
    if value.layout == torch.strided and not value.is_nested and not value.is_quantized:
        return
    odd = {
        "nested": value.is_nested,
        "quantised": value.is_quantized,
        f"sparse ({value.layout})": not value.is_nested and value.layout != torch.strided,
    }
    for what, there in odd.items():
        if there:
            raise PlacementError(
                f"{display_name(name)} {at}: it is a {what} tensor; hook a module that puts out a plain one"
            )


def spiller(
    slab_of: Callable[[int], tuple[Slab, str]], write: Callable[[torch.Tensor, torch.Tensor], None]
) -> Callable[[torch.Tensor], Region]:
    """Keeps tensors one after another in slab files of this rank's own; slab_of(bytes) → (slab,
    its name).

    write: copies a tensor into its place."""

    def spill(tensor: torch.Tensor) -> Region:
        dtype = dtype_name(tensor.dtype)
        slab, name = slab_of(size_of(tensor.shape, dtype))
        region = Region(name, 0, tuple(tensor.shape), dtype)
        write(slab.tensor(region), tensor)
        return region

    return spill
