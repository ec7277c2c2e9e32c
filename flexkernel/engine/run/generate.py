"""A generation: transformers' own loop on every rank. What a forward computes goes to its own
positions of the whole.

A step is one forward: the first runs the prompt, each later one the newest token. A counter on the
root says which step and which positions it is, never the cache. All ranks make as many forwards,
since each of them may hold collectives.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.tensor import Partial

from flexkernel.boxes import WHOLE, Box, share_of
from flexkernel.engine.compat import StageCache, as_written
from flexkernel.engine.place.placements import Place, Placed
from flexkernel.engine.place.staging import joined_digest
from flexkernel.engine.runtime import Runtime
from flexkernel.errors import CaptureError, GenerationError, PlacementError
from flexkernel.memory import reduce
from flexkernel.memory.plan import Entry, kept_columns
from flexkernel.names import display_name
from flexkernel.wire import HookSpec, RunPlan, ShapeFormula, ShardRecord

from .hooks import Recording, failed, mask_of
from .tokens import TokenStreamer

__all__ = ["Steps", "check", "ends", "generate"]


def check(runtime: Runtime) -> None:
    """GenerationError: this model cannot go on by itself."""
    model = runtime.part.model
    if not (hasattr(model, "can_generate") and model.can_generate()):
        raise GenerationError(
            f"{type(model).__name__} has no generate(): it is no language model of transformers"
        )
    if runtime.part.info.layout.pp > 1 and not hasattr(model, "_pp_stage"):
        raise GenerationError(
            f"{type(model).__name__} is a pipeline of your own: its stages share no cache to go on from"
        )
    if runtime.part.caller.forward is not None:
        raise GenerationError(
            f"{type(model).__name__} is called by your forward=, and its generate() would not be"
        )


def ends(runtime: Runtime, plan: RunPlan) -> list[int]:
    """The tokens that end a row."""
    assert plan.generation is not None
    there = getattr(runtime.part.model.generation_config, "eos_token_id", None)
    found = dict(plan.generation.options).get("eos_token_id", there)
    return [] if found is None else [found] if isinstance(found, int) else list(found)


def generate(
    runtime: Runtime, plan: RunPlan, recording: Steps, batch: dict[str, torch.Tensor]
) -> None:
    """Go on after the batch; its tokens are in recording.text. All ranks must call; all make as
    many forwards."""
    asked, model = plan.generation, runtime.part.model
    assert asked is not None
    layout = runtime.part.info.layout
    options = dict(asked.options)
    if layout.pp > 1:
        options["past_key_values"] = StageCache(model)
    if (
        behind_the_base(runtime, recording)
        and "logits_to_keep" in inspect.signature(model.forward).parameters
    ):
        options["logits_to_keep"] = 0  # all: a hook sees what only the newest position would have
    with (
        counted(runtime.part.hooks.modules[""], recording),
        drawn_from(asked.seed, recording.here, runtime.device),
        as_written(runtime.part.caller.compiled),
    ):
        model.generate(
            batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=asked.max_new_tokens,
            pad_token_id=asked.pad_id,
            num_beams=1,
            num_return_sequences=1,
            use_cache=True,
            return_dict_in_generate=False,
            synced_gpus=layout.batch_groups > 1,  # none leaves before all have stopped
            streamer=TokenStreamer(recording.text, runtime.tick),
            **options,
        )
    recording.finish()


def behind_the_base(runtime: Runtime, recording: Recording) -> bool:
    """Whether a hook of the run is on a module that sees what is left for the logits: the root, or
    the head."""
    base = runtime.part.model.base_model_prefix
    hooks = [h for h in runtime.part.hook_set.hooks if h.key in recording.active]
    names = {name for hook in hooks for name in runtime.part.planner.targets(hook.glob)}
    return any(name != base and not name.startswith(f"{base}.") for name in names)


@contextmanager
def counted(root: torch.nn.Module, recording: Steps) -> Iterator[None]:
    """Before each forward the recording learns how many positions it runs. Before any other
    hook."""

    def before(_module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        recording.begin(ids.shape[1])

    handle = root.register_forward_pre_hook(before, with_kwargs=True, prepend=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def drawn_from(seed: int, here: Place, device: str) -> Iterator[None]:
    """Ranks that share rows draw alike, others do not; where the batch is not split, as one
    process with this seed."""
    group = 0 if here.idle else here.coordinate.batch
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if device == "cuda" else []):
        torch.manual_seed((seed + group * 0x9E3779B97F4A7C15) % (1 << 63))
        yield


class Steps(Recording):
    """A recording in which each forward writes its own positions of the whole text."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.prompt = self.here
        self.forwards = 0
        self.wrote: dict[int, int] = {}
        # forwards → what was whole after so many; of the last two
        self.whole: dict[int, dict[int, ShardRecord]] = {}
        self._columns: dict[tuple[int, ...] | None, tuple[list[tuple[int, ...]], list[int]]] = {}

    def begin(self, num_positions: int) -> None:
        """The next forward, over that many positions. What fires in it is call 0 again."""
        past = self.here.past + self.here.S if self.forwards else 0
        if self.forwards:
            before = list(self.whole.items())[-1:]
            self.whole = dict([*before, (self.forwards, self._whole_now())])
        self.here = dataclasses.replace(self.prompt, S=num_positions, past=past, step=self.forwards)
        self.forwards += 1
        self.calls.clear()
        self.edits.clear()
        if self.editor is not None:
            self.editor.here = self.here

    def _whole_now(self) -> dict[int, ShardRecord]:
        """What came in every forward so far, each in a place of its own: ranks are at most one
        forward apart."""
        entries = self.plan.entries
        return {
            i: seen
            for i, seen in self.planned.items()
            if self.wrote.get(i) == self.forwards and not entries[i].newest
        }

    def finish(self) -> None:
        """What did not come in every forward is not whole."""
        for i, seen in self.planned.items():
            if seen.error is None and self.wrote.get(i, 0) != self.forwards:
                key = self.plan.entries[i].key
                self.planned[i] = failed(
                    CaptureError(
                        f"{key}: it came in {self.wrote.get(i, 0)} of {self.forwards} forwards"
                    )
                )

    def _write(self, i: int, value: torch.Tensor | None, tape: Any = None) -> ShardRecord:
        before = self.planned.get(i)
        if before is not None and before.error is not None:
            return before  # one forward of it is missing: it stays so
        entry = self.plan.entries[i]
        here = (
            self._of_logits(value)
            if entry.hook.name == "logits" and value is not None
            else self.here
        )
        placed = self._placed(entry, value, here)
        if isinstance(placed.placement, Partial):
            raise PlacementError(
                f"{entry.key}: its addends are not summed over the steps of a generation"
            )
        self.wrote[i] = self.wrote.get(i, 0) + 1
        put = self._put if entry.hook.reduce is None else self._put_reduced
        kept, holds, box = put(entry, placed, here)
        said = joined_digest(
            before.digest if before is not None else 0, self._digest(kept, placed, entry.formula)
        )
        placement = repr(placed.placement) if here.layout.tp > 1 else "whole"
        return ShardRecord(placed.evidence, placement, said, holds, box)

    def _of_logits(self, value: torch.Tensor) -> Place:
        """transformers computes those of the newest position only, if nobody asks for more."""
        n = value.shape[1] if value.dim() == 3 else self.here.S
        return dataclasses.replace(self.here, S=n, past=self.here.past + self.here.S - n)

    def _put(
        self, entry: Entry, placed: Placed, here: Place
    ) -> tuple[torch.Tensor, Box, Box | None]:
        """Copy what this forward has of the capture to its positions: (what is kept of it, the
        part of the whole that this rank holds, the part that it writes)."""
        assert self.slab is not None
        whole, view = self.slab.tensor(self.region(entry)), Unfolded(entry, placed, here)
        local, target, holds = view.local, view.of_whole(whole), view.shard
        if view.dim is not None:
            local, target = self._positions(entry, view, target, here)
        if here.idle and entry.formula.batched:
            return local, view.box(holds, whole), None
        copies, index = self._copies(placed, entry.formula)
        target = holds.cut(target)
        piece = self._piece(view, target.shape, copies, index)
        if piece is None:
            return local, view.box(holds, whole), None
        view.put(piece.cut(target), piece.cut(local), here, self.copies.write)
        return local, view.box(holds, whole), view.box(holds.within(piece), whole)

    def _put_reduced(
        self, entry: Entry, placed: Placed, here: Place
    ) -> tuple[torch.Tensor, Box, Box | None]:
        """The same of a reduction: over positions too, what a forward says is added to what those
        before it said."""
        assert self.slab is not None
        view, place = Unfolded(entry, placed, here), self.slab.tensor(self.region(entry))
        if view.folded is not None or view.keys is not None:
            raise PlacementError(
                f"{entry.key} is {entry.formula}: its steps cannot be reduced; hook it without reduce"
            )
        local, dim = view.local, view.dim
        real: torch.Tensor | None = None
        wanted: tuple[int, ...] = ()
        if dim is not None:
            wanted, first = self._wanted(entry, here), here.columns(view.local.shape[dim]).start
            local = picked(local, dim, [c - first for c in wanted])
            real = self.text.mask(here.columns(here.S))[:, [c - here.past for c in wanted]]
            real = None if real.all() else real
        if here.idle and entry.formula.batched:
            return local, view.shard, None
        copies, index = self._copies(placed, entry.formula)
        piece = self._piece(view, local.shape, copies, index)
        if piece is None:
            return local, view.shard, None
        box = view.shard.within(piece)
        shape = tuple(len(wanted) if d == dim else size for d, size in enumerate(entry.shape))
        step = dataclasses.replace(entry, shape=shape)
        found = self._parts(step, piece.cut(local), mask_of(step, real, box))
        if dim in entry.over:
            self._add_parts(found, entry, place, box)
        else:
            if dim is not None:
                along = dim + 2 - sum(d < dim for d in entry.over)
                start, stop = self._span(entry, here)
                place = place.narrow(along, start, stop - start)
            self._put_parts(found, entry, place, box)
        return local, view.shard, box

    def _add_parts(
        self, found: reduce.Partial, entry: Entry, place: torch.Tensor, box: Box
    ) -> None:
        if self.here.step:
            self.copies.land()
            before = place[:, entry.slot(self.here.layout, self.here.rank)]
            device = found.parts[0].device
            inner = box.without(entry.over)
            parts = tuple(inner.cut(part).to(device, copy=True) for part in before)
            found = reduce.combine([dataclasses.replace(found, parts=parts), found])
        self._put_parts(found, entry, place, box)

    def _piece(self, view: Unfolded, shape: Sequence[int], copies: int, index: int) -> Box | None:
        """What this rank copies of a part that several hold, the same in every forward; None:
        nothing."""
        if copies == 1:
            return WHOLE
        flat = [1 if d in (view.dim, view.keys) else size for d, size in enumerate(shape)]
        piece = share_of(flat, copies, index)
        if piece is not None and piece.dims & {view.dim, view.keys}:
            return WHOLE  # every other dim has one element
        return piece

    def _positions(
        self, entry: Entry, view: Unfolded, target: torch.Tensor, here: Place
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What of this forward's positions is kept, and where they lie along the position dim."""
        assert view.dim is not None
        first = here.columns(view.local.shape[view.dim]).start
        local = picked(view.local, view.dim, [c - first for c in self._wanted(entry, here)])
        start, stop = self._span(entry, here)
        return local, target.narrow(view.dim, start, stop - start)

    def _wanted(self, entry: Entry, here: Place) -> tuple[int, ...]:
        """Which of this forward's positions are kept."""
        return self._kept(entry.hook.kept_positions)[0][here.step]

    def _span(self, entry: Entry, here: Place) -> tuple[int, int]:
        """Where they lie along the position dim, (start, stop)."""
        start = 0 if entry.newest else self._kept(entry.hook.kept_positions)[1][here.step]
        return start, start + len(self._wanted(entry, here))

    def _kept(self, positions: tuple[int, ...] | None) -> tuple[list[tuple[int, ...]], list[int]]:
        """For each forward the positions that are kept, and how many before it; made once."""
        if positions not in self._columns:
            assert self.text.generation is not None
            each = kept_columns(positions, self.prompt.S, self.text.generation.max_new_tokens)
            self._columns[positions] = each, list(itertools.accumulate(map(len, each), initial=0))
        return self._columns[positions]

    def _record_other(self, hook: HookSpec, name: str, call: int, value: Any, at: str) -> None:
        if hook.name != "logits":
            raise PlacementError(
                f"{display_name(name)} {at}: no formula gives its shape, so that a generation's steps cannot be "
                "put together; hook the modules around it"
            )


def picked(local: torch.Tensor, dim: int, index: list[int]) -> torch.Tensor:
    """Only these along a dim; the tensor itself where that is all."""
    if index == list(range(local.shape[dim])):
        return local
    return local.index_select(dim, torch.tensor(index, dtype=torch.long, device=local.device))


class Unfolded:
    """A value of one forward, its rows and its positions in dims of their own even where the
    module has them in one.

    dim: along which its positions lie, None if it has none. keys: the second such dim of
    @pattern."""

    def __init__(self, entry: Entry, placed: Placed, here: Place):
        formula = entry.formula
        self.local, self.shard, self.B = placed.local, placed.shard, here.B
        self.keys: int | None = None
        self.folded = formula.folded
        self.dim = formula.positions
        along = formula.dims_of("S", "P", "P+S", "W+S")
        if self.folded is not None:
            self.dim = self.folded + 1
            self._unfold(self.folded, here)
        elif len(along) > 1:
            if entry.key.site.point != "pattern":
                raise PlacementError(
                    f"{entry.key} is {formula}: its steps cannot be put together in a generation"
                )
            self.keys = along[1]
        if self.odd(formula, along) or self.dim in self.shard.dims:
            raise PlacementError(
                f"{entry.key} is {formula}: its positions cannot be told apart in a generation"
            )

    def odd(self, formula: ShapeFormula, along: list[int]) -> bool:
        dims = formula.dims or ()
        return any(dims[d][0] != 1 or dims[d][1] == "P" for d in along) or (
            self.folded is not None and bool(along)
        )

    def _unfold(self, dim: int, here: Place) -> None:
        self.local = self.local.unflatten(dim, (here.local_rows, here.S))
        self.shard = Box((d + (d > dim), a, b) for d, a, b in self.shard if d != dim)
        if here.layout.batch_groups > 1:
            self.shard = self.shard.plus(dim, *here.rows)

    def of_whole(self, whole: torch.Tensor) -> torch.Tensor:
        return whole if self.folded is None else whole.unflatten(self.folded, (self.B, -1))

    def box(self, box: Box, whole: torch.Tensor) -> Box:
        """A box of the unfolded whole as one of the whole."""
        if self.folded is None:
            return box
        each = whole.shape[self.folded] // self.B
        return Box(
            (d, a * each, b * each) if d == self.folded else (d - (d > self.folded), a, b)
            for d, a, b in box
        )

    def put(self, target: torch.Tensor, local: torch.Tensor, here: Place, write: Callable) -> None:
        """Write it into the target; of a pattern each query has the keys so far, and zeros after
        them."""
        if self.keys is not None:
            columns = here.columns(local.shape[self.keys])
            target.narrow(self.keys, 0, columns.start).zero_()
            target.narrow(self.keys, columns.stop, target.shape[self.keys] - columns.stop).zero_()
            target = target.narrow(self.keys, columns.start, len(columns))
        write(target, local)
