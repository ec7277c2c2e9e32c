"""What a run keeps, and where each value lies.

A run is planned before its forward. Every process computes the same plan, so nobody has to send it
where an activation goes. Captures start on page boundaries, so that each can be mapped alone."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from flexkernel.errors import HookError
from flexkernel.names import select, split_point
from flexkernel.sites import joined
from flexkernel.wire import (
    REDUCTIONS,
    CaptureKey,
    HookSpec,
    Layout,
    ModelInfo,
    Region,
    ShapeFormula,
)

from .selection import check_positions, kept_shape, leaf_of, reduced_dims, reduced_shape
from .slab import pages, size_of

__all__ = ["Entry", "Plan", "Planner", "logits_path"]

LOGITS_BYTES = 64 << 20  # if all logits are larger, a run keeps only the last position's
MOST_PLANS = 64  # how many plans a Planner caches


@dataclasses.dataclass(frozen=True)
class Entry:
    """A planned capture.

    key: which value. formula, shape: of the whole value in this run. offset: its first byte,
    counted from the run's base. newest: each forward of a generation overwrites the value of the
    one before. over: the dims that are reduced. slots: how many ranks keep float64 statistics of
    their part of a reduction. ranks: those that see the value; () if that is unknown before the
    run."""

    key: CaptureKey
    hook: HookSpec
    formula: ShapeFormula
    shape: tuple[int, ...]
    offset: int
    newest: bool = False
    over: tuple[int, ...] = ()
    slots: int = 0
    ranks: tuple[int, ...] = ()

    @property
    def at(self) -> str:
        """What the hook reads, `output` for example, without the reduction that the key's site
        also names."""
        return self.key.site.value

    @functools.cached_property
    def kept_shape(self) -> tuple[int, ...]:
        """The shape that a reader sees: without the reduced dims."""
        return reduced_shape(self.shape, self.over)

    @functools.cached_property
    def lies(self) -> tuple[tuple[int, ...], str]:
        """(shape, dtype) of what is stored in the slab; of a reduction (statistics, slots,
        *kept_shape) float64."""
        if self.hook.reduce is None:
            return self.shape, self.formula.dtype
        return (REDUCTIONS[self.hook.reduce.op], self.slots, *self.kept_shape), "float64"

    @property
    def num_bytes(self) -> int:
        return size_of(*self.lies)

    def slot(self, layout: Layout, rank: int) -> int:
        """The index of a rank's statistics among the slots."""
        where = layout.coordinate(rank)
        if self.slots == layout.tp:
            return where.tp
        return where.batch * layout.tp + where.tp


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run will keep.

    silent: names that a hook matches and that never fire in a forward. unplanned: names whose size
    depends on the data. logits_last: only the last position's logits are kept. text: the first
    byte of a generation's new tokens, which are int64 of text_shape."""

    entries: tuple[Entry, ...]
    num_bytes: int
    silent: tuple[str, ...]
    logits_last: bool
    text: int = 0
    text_shape: tuple[int, int] = (0, 0)
    unplanned: tuple[str, ...] = ()
    # what this process computes once for all runs of the plan
    memo: dict[Any, Any] = dataclasses.field(default_factory=dict, compare=False, repr=False)

    @functools.cached_property
    def index(self) -> dict[tuple[str, str, str, int], int]:
        """(hook, module, at, call) → index in entries."""
        return {
            (entry.key.hook, entry.key.module, entry.at, entry.key.call): i
            for i, entry in enumerate(self.entries)
        }

    def by_hook(self) -> dict[str, tuple[int, int]]:
        """Hook → (number of captures, bytes in whole pages), the largest first."""
        found: dict[str, tuple[int, int]] = {}
        for entry in self.entries:
            count, num_bytes = found.get(entry.key.hook, (0, 0))
            found[entry.key.hook] = count + 1, num_bytes + pages(entry.num_bytes)
        return dict(sorted(found.items(), key=lambda item: -item[1][1]))

    def text_region(self, slab: str, base: int) -> Region:
        """Where the new tokens of a run lie whose extent begins at `base`."""
        return Region(slab, base + self.text, self.text_shape, "int64")

    def region(self, entry: Entry, slab: str, base: int) -> Region:
        """Where the entry lies in a run whose extent begins at `base`."""
        return Region(slab, base + entry.offset, *entry.lies)


@dataclasses.dataclass(frozen=True)
class HookedValue:
    """A value that a hook captures. call: its number among the times that the module fires in one
    forward."""

    hook: HookSpec
    name: str
    call: int
    formula: ShapeFormula


class Planner:
    """Plans the runs of one model. It caches its plans, so that a repeated run costs nothing per
    module."""

    def __init__(self, info: ModelInfo):
        self.info = info
        self._plans: dict[tuple, Plan] = {}
        self._modules = {module.name: module for module in info.modules}
        self.targets = functools.lru_cache(maxsize=4096)(self._targets)
        self.ranks = functools.lru_cache(maxsize=4096)(self._ranks)
        self.parameters = functools.lru_cache(maxsize=256)(self._parameters)

    # --- names ------------------------------------------------------------------------

    def names(self, hook: HookSpec) -> tuple[str, ...]:
        """The modules and virtual points, or the parameters, that match the hook's glob.
        HookError: there are none."""
        if hook.of == "param":
            return self.parameters(hook.glob)
        return self.targets(hook.glob)

    def _parameters(self, glob: str) -> tuple[str, ...]:
        if not self.info.parameters:
            raise HookError(
                f"{self.info.cls} was built without a reference: the names of its parameters are "
                "not known"
            )
        names = [name for name in self.info.parameters if name not in self.info.buffers]
        return tuple(select(glob, names))

    def _targets(self, glob: str) -> tuple[str, ...]:
        if "@" in glob and not any(split_point(name)[1] for name in self.info.names):
            raise HookError(
                f"{self.info.cls} does not compute attention through transformers' interface: it "
                "has no @ points"
            )
        return tuple(select(glob, self.info.names))

    def _ranks(self, name: str, of: str) -> tuple[int, ...]:
        """The ranks that see this value of a module or virtual point; () if that is unknown."""
        module = self._modules.get(split_point(name)[0])
        if of == "param" or module is None:
            return ()
        layout = self.info.layout
        stage = module.read_on(of)
        return tuple(rank for rank in range(layout.world) if layout.coordinate(rank).pp == stage)

    # --- plans ------------------------------------------------------------------------

    def plan(
        self, hooks: Sequence[HookSpec], B: int, S: int, new: int = 0, backward: bool = False
    ) -> Plan:
        """Where each capture of these hooks lies, for B rows of S positions and at most `new`
        generated tokens.

        backward: the run has a loss. Then it has gradients, and keeps the logits of all positions.
        HookError: a value lacks the index or the position that a hook names."""
        key = (tuple(hooks), B, S, new, backward)
        if key not in self._plans:
            if len(self._plans) > MOST_PLANS:
                self._plans.clear()
            self._plans[key] = self._plan(hooks, B, S, new, backward)
        return self._plans[key]

    def _plan(self, hooks: Sequence[HookSpec], B: int, S: int, new: int, backward: bool) -> Plan:
        active = [hook for hook in hooks if hook.kept_at and (backward or not hook.gradient)]
        logits, large = self._logits(B, S, new, backward)
        if logits is not None:
            active.append(logits)
        values = list(self._values(active))
        entries: list[Entry] = []
        offset = 0
        for value in values:
            if value.formula.dims is None:
                continue
            newest = large and value.hook is logits
            shape = self._shape(value, B, S, forwards=1 if newest else max(new, 1))
            for at in value.hook.kept_at:
                entries.append(self._entry(value, at, shape, offset, newest))
                offset += pages(entries[-1].num_bytes)
        return Plan(
            entries=tuple(entries),
            num_bytes=offset + pages(B * new * 8),
            silent=tuple(self._silent(active)),
            logits_last=large,
            text=offset if new else 0,
            text_shape=(B if new else 0, new),
            unplanned=tuple(value.name for value in values if value.formula.dims is None),
        )

    def _values(self, hooks: Iterable[HookSpec]) -> Iterator[HookedValue]:
        """The values that these hooks read in one forward, in the order of the hooks."""
        for hook in hooks:
            for name in self.names(hook):
                for call, leaves in enumerate(self._calls(hook, name)):
                    formula = leaf_of(leaves, hook, name)
                    if formula is not None:
                        yield HookedValue(hook, name, call, formula)

    def _silent(self, hooks: Iterable[HookSpec]) -> Iterator[str]:
        for hook in hooks:
            for name in self.names(hook):
                if not self._calls(hook, name):
                    yield name

    def _calls(self, hook: HookSpec, name: str) -> Sequence[Sequence[ShapeFormula]]:
        """For each time the value fires in a forward, its tensors."""
        if hook.of != "param":
            return self.info.scan.get((name, hook.of), ())
        dims = tuple((size, "") for size in self.info.parameters[name])
        return [[ShapeFormula("", dims, self.info.dtype)]]

    def _shape(self, value: HookedValue, B: int, S: int, forwards: int) -> tuple[int, ...]:
        if value.hook.kept_positions is not None:
            check_positions(value.hook, S, forwards)
        return kept_shape(value.formula, value.hook, B, S, self.info.window, forwards)

    def _entry(
        self, value: HookedValue, at: str, shape: tuple[int, ...], offset: int, newest: bool
    ) -> Entry:
        hook = value.hook
        formula = value.formula
        over = reduced_dims(hook, formula, value.name)
        slots = 0
        if hook.reduce is not None:
            at = joined(at, str(hook.reduce))
            slots = num_slots(self.info.layout, formula, over)
        key = CaptureKey(hook.key, value.name, at, formula.path, value.call)
        ranks = self.ranks(value.name, hook.of)
        return Entry(key, hook, formula, shape, offset, newest, over, slots, ranks)

    def _logits(self, B: int, S: int, new: int, backward: bool) -> tuple[HookSpec | None, bool]:
        """(the hook on the model's logits that every run has, whether it keeps the last position
        only because all of them would be large).

        In a generation each forward has one position, of which the next token is taken."""
        calls = self.info.scan.get(("", "output"), ())
        leaves = {leaf.path: leaf for leaf in calls[0]} if calls else {}
        formula = leaves.get(logits_path(list(leaves)) or "")
        if formula is None or formula.dims is None:
            return None, False
        num_bytes = size_of(formula.shape(B, new or S), formula.dtype)
        large = num_bytes > LOGITS_BYTES and not backward
        positions = (-1,) if new or large else None
        return HookSpec("", index=formula.path, name="logits", positions=positions), large


def logits_path(paths: Sequence[str]) -> str | None:
    """Which of a model's output tensors are its logits: the one of that name, else the first if no
    output has a name. None: there are none.

    >>> logits_path(["loss", "logits"]), logits_path(["0", "1"]), logits_path(["last_hidden_state"])
    ('logits', '0', None)
    """
    if "logits" in paths:
        return "logits"
    if not paths:
        return None
    has_name = any(not key.isdigit() for key in paths[0].split(".") if key)
    return None if has_name else paths[0]


def num_slots(layout: Layout, formula: ShapeFormula, over: Sequence[int]) -> int:
    """How many ranks keep statistics of their own: all, or one tp group if rows are not reduced.

    In the second case ranks with other rows fill other entries of the same slot."""
    rows = set(formula.batched)
    if rows and not rows & set(over):
        return layout.tp
    return layout.tp * layout.batch_groups
