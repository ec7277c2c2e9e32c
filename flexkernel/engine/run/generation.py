"""The recording of a generation: each forward writes its own positions of the whole text."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.tensor import Partial

from flexkernel.boxes import WHOLE, Box, share_of
from flexkernel.engine.model.hooks import Tap
from flexkernel.engine.place.placements import Place, Placed
from flexkernel.engine.place.staging import Copies, joined_digest
from flexkernel.engine.runtime import Runtime
from flexkernel.errors import CaptureError, PlacementError
from flexkernel.memory import reduce
from flexkernel.memory.plan import Entry
from flexkernel.memory.selection import kept_columns
from flexkernel.names import display_name
from flexkernel.wire import Generation, ShapeFormula, ShardRecord

from .context import RunContext
from .edits import Editor
from .generate import generate
from .recording import Batch, Recording, failure, tensor_in
from .reductions import padding_mask, statistics_of, write_statistics
from .routes import copies_of, placement_text

__all__ = ["GenerationRecording"]


class GenerationRecording(Recording):
    """What the hooks of a generation write.

    forwards: how many have begun. A capture is whole if it came in each of them."""

    def __init__(
        self,
        context: RunContext,
        active: frozenset[str],
        editor: Editor,
        generation: Generation,
    ):
        super().__init__(context, active, editor)
        self.generation = generation
        self.forwards = 0
        # of the last two forwards: ranks are at most one forward apart
        self._whole: dict[int, dict[int, ShardRecord]] = {}
        self._times_written = [0] * len(self.entries)
        self._kept: dict[tuple[int, ...] | None, KeptColumns] = {}

    def run(self, runtime: Runtime, batch: Batch) -> None:
        generate(runtime, self, batch)
        self._refuse_incomplete()

    def whole_by_forward(self) -> dict[int, dict[int, ShardRecord]]:
        return self._whole

    def begin(self, num_positions: int) -> None:
        """Begin the next forward, over that many positions."""
        past = 0
        if self.forwards:
            past = self.here.past + self.here.S
            last = list(self._whole.items())[-1:]
            self._whole = dict([*last, (self.forwards, self._whole_now())])
        self.here = dataclasses.replace(
            self.context.here, S=num_positions, past=past, step=self.forwards
        )
        self.forwards += 1
        self.begin_forward()
        self.editor.here = self.here

    def _whole_now(self) -> dict[int, ShardRecord]:
        """The records of what came in every forward so far, each in a place of its own."""
        return {
            i: record
            for i, record in self.planned.items()
            if self._times_written[i] == self.forwards and not self.entries[i].newest
        }

    def _refuse_incomplete(self) -> None:
        """What did not come in every forward is not whole."""
        for i, record in self.planned.items():
            times = self._times_written[i]
            if record.error is None and times != self.forwards:
                problem = f"{self.entries[i].key}: it came in {times} of {self.forwards} forwards"
                self.planned[i] = failure(CaptureError(problem))

    def watch(self, tap: Tap, value: Any) -> Any:
        return None  # a generation has no loss

    def write_unplanned(self, tap: Tap, at: str, call: int, value: Any) -> None:
        if tap.key != "logits":
            raise PlacementError(
                f"{display_name(tap.name)} {at}: no formula gives its shape, so that a "
                "generation's steps cannot be put together; hook the modules around it"
            )

    def write(self, i: int, value: Any) -> ShardRecord:
        earlier = self.planned.get(i)
        if earlier is not None and earlier.error is not None:
            return earlier  # one forward of it is missing: it stays so
        entry = self.entries[i]
        tensor = tensor_in(value, entry).detach()
        here = self.here
        if entry.hook.name == "logits":
            here = self._logits_place(tensor)
        placed = self.locate(entry, tensor, here)
        if isinstance(placed.placement, Partial):
            raise PlacementError(
                f"{entry.key}: its addends are not summed over the steps of a generation"
            )
        self._times_written[i] += 1
        step = Step(entry, placed, here, self._kept_of(entry))
        copies, index = copies_of(placed, entry.formula, here)
        digest: Any = 0
        if copies > 1:
            digest = self.context.copies.digest(step.local)
        if earlier is not None:
            digest = joined_digest(earlier.digest, digest)
        return ShardRecord(
            placed.evidence,
            placement_text(placed, here),
            digest,
            step.box_in(self.place(i), step.shard),
            self._put(i, step, copies, index),
        )

    def _logits_place(self, logits: torch.Tensor) -> Place:
        """transformers computes the logits of the newest positions only, if nobody asks for more.
        logits: (B, n, V), or a shape in which n is not known."""
        if logits.dim() != 3:
            return self.here
        n = logits.shape[1]
        return dataclasses.replace(self.here, S=n, past=self.here.past + self.here.S - n)

    def _kept_of(self, entry: Entry) -> KeptColumns:
        """Which columns of the text the capture keeps; worked out once."""
        positions = entry.hook.kept_positions
        if positions not in self._kept:
            S = self.context.here.S
            self._kept[positions] = KeptColumns(positions, S, self.generation.max_new_tokens)
        return self._kept[positions]

    def _put(self, i: int, step: Step, copies: int, index: int) -> Box | None:
        """Write this rank's share of a step; which part of the whole that is, or None.

        copies: how many ranks hold the same; index: which of them this one is."""
        entry = self.entries[i]
        place = self.place(i)
        if step.here.idle and entry.formula.batched:
            return None  # copied rows that nobody wants
        piece = step.piece(copies, index)
        if piece is None:
            return None
        box = step.shard.within(piece)
        if entry.hook.reduce is None:
            step.write_into(place, piece, self.context.copies)
        else:
            self._write_statistics(entry, step, piece, place)
        return step.box_in(place, box)

    def _write_statistics(self, entry: Entry, step: Step, piece: Box, place: torch.Tensor) -> None:
        """Write what a step says of a reduction. If it is over positions, too, it is added to what
        the steps before it said.

        place: of the shape (statistics, slots, *kept), float64 in the slab."""
        box = step.shard.within(piece)
        shape = list(entry.shape)
        if step.dim is not None:
            shape[step.dim] = len(step.columns)
        of_step = dataclasses.replace(entry, shape=tuple(shape))
        mask = padding_mask(of_step, self._mask(step), box)
        statistics = statistics_of(of_step, piece.cut(step.local), mask)
        slot = place[:, entry.slot(self.here.layout, self.here.rank)]
        if step.dim in entry.over:
            if self.here.step:
                statistics = self._added(statistics, entry, slot, box)
        elif step.dim is not None:
            positions = Box(((step.dim, *step.span),)).without(entry.over)
            slot = Box((dim + 1, start, stop) for dim, start, stop in positions).cut(slot)
        write_statistics(statistics, entry, slot, box, self.context.copies)

    def _mask(self, step: Step) -> torch.Tensor | None:
        """(B, n) bool on the CPU, n the positions of this forward that are kept: False on pads.
        None: there are none."""
        if step.dim is None:
            return None
        past = step.here.past
        mask = self.context.tokens.mask(range(past, past + step.here.S))
        mask = mask[:, [column - past for column in step.columns]]
        if mask.all():
            return None
        return mask

    def _added(
        self, statistics: reduce.Partial, entry: Entry, slot: torch.Tensor, box: Box
    ) -> reduce.Partial:
        """The statistics together with those that the slot holds of the steps before.

        slot: of the shape (statistics, *kept), float64 in the slab."""
        self.context.copies.land()
        device = statistics.parts[0].device
        kept = box.without(entry.over)
        earlier = tuple(kept.cut(part).to(device, copy=True) for part in slot)
        before = dataclasses.replace(statistics, parts=earlier)
        return reduce.combine([before, statistics])


class KeptColumns:
    """Which columns of the text a hook keeps, forward by forward.

    columns: for each forward those of its columns that are kept. starts: how many are kept before
    it."""

    def __init__(self, positions: tuple[int, ...] | None, S: int, max_new_tokens: int):
        self.columns = kept_columns(positions, S, max_new_tokens)
        self.starts = list(itertools.accumulate(map(len, self.columns), initial=0))


class Step:
    """This rank's part of one forward's value, with rows and positions in dims of their own even
    where the module folds them into one.

    local: the columns of it that are kept. shard: its place in the whole of this forward. dim:
    along which the positions lie, or None. folded: the dim that B and S share in the module. keys:
    the second dim of positions of an attention pattern. columns: of the text, that are kept. span:
    where they lie among all that the capture keeps, (start, stop)."""

    def __init__(self, entry: Entry, placed: Placed, here: Place, kept: KeptColumns):
        self.entry = entry
        self.here = here
        self.local = placed.local
        self.shard = placed.shard
        self.folded = entry.formula.folded
        self.dim = entry.formula.positions
        self.keys: int | None = None
        if self.folded is not None:
            self._unfold(self.folded)
        self._check(entry.formula)
        self.columns = kept.columns[here.step]
        start = kept.starts[here.step]
        if entry.newest:
            start = 0  # each forward writes over the one before
        self.span = start, start + len(self.columns)
        if self.dim is not None:
            first = here.columns(self.local.shape[self.dim]).start
            self.local = select(self.local, self.dim, [c - first for c in self.columns])

    def _unfold(self, dim: int) -> None:
        """Split dim into rows and positions."""
        here = self.here
        self.dim = dim + 1
        self.local = self.local.unflatten(dim, (here.local_rows, here.S))
        later = Box((d + (d > dim), a, b) for d, a, b in self.shard if d != dim)
        if here.layout.batch_groups > 1:
            later = later.plus(dim, *here.rows)
        self.shard = later

    def _check(self, formula: ShapeFormula) -> None:
        """PlacementError: the value's positions cannot be told apart."""
        key = self.entry.key
        along = formula.dims_of("S", "P", "P+S", "W+S")
        if self.folded is None and len(along) > 1:
            if key.site.point != "pattern":
                raise PlacementError(
                    f"{key} is {formula}: its steps cannot be put together in a generation"
                )
            self.keys = along[1]
        dims = formula.dims or ()
        odd = any(dims[d][0] != 1 or dims[d][1] == "P" for d in along)
        if self.folded is not None and along:
            odd = True
        if odd or self.dim in self.shard.dims:
            raise PlacementError(
                f"{key} is {formula}: its positions cannot be told apart in a generation"
            )
        if self.entry.hook.reduce is not None and (self.folded, self.keys) != (None, None):
            raise PlacementError(
                f"{key} is {formula}: its steps cannot be reduced; hook it without reduce"
            )

    def piece(self, copies: int, index: int) -> Box | None:
        """Which piece of the part this rank writes, where several hold it: the same in every
        forward, so that it is never along positions. None: nothing."""
        if copies == 1:
            return WHOLE
        growing = (self.dim, self.keys)
        shape = [1 if d in growing else size for d, size in enumerate(self.local.shape)]
        piece = share_of(shape, copies, index)
        if piece is None or piece.dims.isdisjoint(growing):
            return piece
        return WHOLE  # there is no other dim to share: the first rank writes all of it

    def write_into(self, place: torch.Tensor, piece: Box, copies: Copies) -> None:
        """Write a piece of the step into the capture's place, of the whole text's shape."""
        target = place
        if self.folded is not None:
            target = place.unflatten(self.folded, (self.here.B, -1))
        if self.dim is not None:
            target = target.narrow(self.dim, self.span[0], self.span[1] - self.span[0])
        target = piece.cut(self.shard.cut(target))
        local = piece.cut(self.local)
        if self.keys is not None:
            target = self._keys_in(target, self.keys, local.shape[self.keys])
        copies.write(target, local)

    def _keys_in(self, target: torch.Tensor, dim: int, num_keys: int) -> torch.Tensor:
        """The part of a pattern (B, H, n, T) that its queries have keys for, (B, H, n, num_keys).
        The rest becomes zeros."""
        keys = self.here.columns(num_keys)
        after = target.shape[dim] - keys.stop
        target.narrow(dim, 0, keys.start).zero_()
        target.narrow(dim, keys.stop, after).zero_()
        return target.narrow(dim, keys.start, num_keys)

    def box_in(self, place: torch.Tensor, box: Box) -> Box:
        """A box of the value with its own dims as one of the capture's place, of the whole text's
        shape."""
        if self.folded is None:
            return box
        folded = self.folded
        length = place.shape[folded] // self.here.B
        return Box(
            (d, a * length, b * length) if d == folded else (d - (d > folded), a, b)
            for d, a, b in box
        )


def select(local: torch.Tensor, dim: int, index: Sequence[int]) -> torch.Tensor:
    """These of a tensor along a dim; the tensor itself if that is all of it. local: any shape."""
    if list(index) == list(range(local.shape[dim])):
        return local
    picked = torch.tensor(index, dtype=torch.long, device=local.device)
    return local.index_select(dim, picked)
