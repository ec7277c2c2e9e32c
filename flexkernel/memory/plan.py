"""What a run keeps, and where each value lies.

A run is planned before its forward. Every process computes the same plan, so that no process has to
be told where an activation goes. Captures start on page boundaries, so that one can be mapped alone.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch

from flexkernel.boxes import Box
from flexkernel.errors import HookError
from flexkernel.names import display_name, nearest, select, split_point
from flexkernel.wire import (
    REDUCTIONS,
    CaptureKey,
    HookSpec,
    Layout,
    ModelInfo,
    Region,
    ShapeFormula,
)

from .slab import pages, size_of

__all__ = [
    "Entry",
    "Plan",
    "Planner",
    "Rows",
    "check_index",
    "check_positions",
    "cut",
    "kept_columns",
    "kept_shape",
    "left",
    "row_dims",
]

LOGITS_BYTES = 64 << 20  # above this a run keeps the last position's logits only


@dataclasses.dataclass(frozen=True)
class Entry:
    """A planned capture: which value, its formula, its whole shape in this run, its first byte
    after the run's base.

    newest: of a generation's forwards only the last is kept, each writes over the one before.
    over: the dims that are reduced, of which `slots` ranks each keep what they know of their part,
    as float64 statistics. ranks: which see it; none where that is not known beforehand."""

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
        """The key's, of the value before it was reduced."""
        return self.key.site.value

    @functools.cached_property
    def kept(self) -> tuple[int, ...]:
        """The shape of what is kept."""
        return left(self.shape, self.over)

    @functools.cached_property
    def lies(self) -> tuple[tuple[int, ...], str]:
        """(shape, dtype) of what lies in the slab."""
        if self.hook.reduce is None:
            return self.shape, self.formula.dtype
        return (REDUCTIONS[self.hook.reduce.op], self.slots, *self.kept), "float64"

    @property
    def num_bytes(self) -> int:
        return size_of(*self.lies)

    def slot(self, layout: Layout, rank: int) -> int:
        """Where a rank's statistics lie."""
        where = layout.coordinate(rank)
        return where.tp if self.slots == layout.tp else where.batch * layout.tp + where.tp


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run will keep. silent: names that a hook asks for and that the scan never saw fire;
    unplanned: those of which the size depends on the data.

    text: the first byte of a generation's new tokens, int64 of that shape."""

    entries: tuple[Entry, ...]
    num_bytes: int
    silent: tuple[str, ...]
    logits_last: bool
    text: int = 0
    text_shape: tuple[int, int] = (0, 0)
    unplanned: tuple[str, ...] = ()
    # what this process works out once a plan and reads at each of its runs
    memo: dict[Any, Any] = dataclasses.field(default_factory=dict, compare=False, repr=False)

    @functools.cached_property
    def index(self) -> dict[tuple[str, str, str, int], int]:
        """(hook, module, at, call) → which of the entries."""
        return {
            (entry.key.hook, entry.key.module, entry.at, entry.key.call): i
            for i, entry in enumerate(self.entries)
        }

    def by_hook(self) -> dict[str, tuple[int, int]]:
        """Hook → (how many captures, how many bytes, in whole pages), what costs most first."""
        found: dict[str, tuple[int, int]] = {}
        for entry in self.entries:
            count, num_bytes = found.get(entry.key.hook, (0, 0))
            found[entry.key.hook] = count + 1, num_bytes + pages(entry.num_bytes)
        return dict(sorted(found.items(), key=lambda item: -item[1][1]))

    def text_region(self, slab: str, base: int) -> Region:
        return Region(slab, base + self.text, self.text_shape, "int64")

    def region(self, entry: Entry, slab: str, base: int) -> Region:
        return Region(slab, base + entry.offset, *entry.lies)


class Planner:
    """Plans runs of one model; remembers the plans it made, so that a run costs nothing per
    module."""

    def __init__(self, info: ModelInfo):
        self.info = info
        self._plans: dict[tuple, Plan] = {}
        self._modules = {module.name: module for module in info.modules}
        self.targets = functools.lru_cache(maxsize=4096)(self._targets)
        self.ranks = functools.lru_cache(maxsize=4096)(self._ranks)
        self.parameters = functools.lru_cache(maxsize=256)(self._parameters)

    def names(self, hook: HookSpec) -> tuple[str, ...]:
        """What the hook's glob names: modules and virtual points, or parameters. HookError:
        nothing."""
        return self.parameters(hook.glob) if hook.of == "param" else self.targets(hook.glob)

    def _parameters(self, glob: str) -> tuple[str, ...]:
        if not self.info.parameters:
            raise HookError(
                f"{self.info.cls} was built without a reference, its parameters' names are not known"
            )
        return tuple(
            select(glob, [name for name in self.info.parameters if name not in self.info.buffers])
        )

    def _targets(self, glob: str) -> tuple[str, ...]:
        if "@" in glob and not any(".@" in name for name in self.info.names):
            cls = self.info.cls
            raise HookError(
                f"{cls} does not compute attention through transformers' interface: it has no @ points"
            )
        return tuple(select(glob, self.info.names))

    def _ranks(self, name: str, of: str) -> tuple[int, ...]:
        """Those that see this value of a module or virtual point."""
        module = self._modules.get(split_point(name)[0])
        if of == "param" or module is None:
            return ()
        layout, stage = self.info.layout, module.read_on(of)
        return tuple(rank for rank in range(layout.world) if layout.coordinate(rank).pp == stage)

    def plan(
        self, hooks: Sequence[HookSpec], B: int, S: int, new: int = 0, backward: bool = False
    ) -> Plan:
        """Where each capture of these hooks lies for B rows of S positions, and of those that at
        most `new` generated tokens add. HookError: an index that is not there.

        backward: the run has a loss, so that there are gradients, and it keeps the logits of all
        positions."""
        key = (tuple(hooks), B, S, new, backward)
        if key not in self._plans:
            if len(self._plans) > 64:
                self._plans.clear()
            self._plans[key] = self._plan(hooks, B, S, new, backward)
        return self._plans[key]

    def _plan(self, hooks: Sequence[HookSpec], B: int, S: int, new: int, backward: bool) -> Plan:
        logits, large = self._logits(B, S, new, backward)
        entries, offset, silent, unplanned = [], 0, [], []
        for hook in (*hooks, *([logits] if logits else [])):
            wanted = hook.kept_at and (backward or not hook.gradient)
            for name in self.names(hook) if wanted else ():
                calls = self._calls(hook, name)
                if not calls:
                    silent.append(name)
                for call, leaves in enumerate(calls or ()):
                    formula = leaf_of(leaves, hook, name)
                    if formula is None:
                        continue
                    if formula.dims is None:
                        unplanned.append(name)
                        continue
                    newest = hook is logits and large
                    shape = kept_shape(
                        formula, hook, B, S, self.info.window, 1 if newest else max(new, 1)
                    )
                    over: tuple[int, ...] = ()
                    slots, kind = 0, ""
                    if hook.reduce is not None:
                        over, kind = reduced_dims(hook, formula, name), f" {hook.reduce}"
                        slots = num_slots(self.info.layout, formula, over)
                    for at in hook.kept_at:
                        key = CaptureKey(hook.key, name, at + kind, formula.path, call)
                        ranks = self.ranks(name, hook.of)
                        entries.append(
                            Entry(key, hook, formula, shape, offset, newest, over, slots, ranks)
                        )
                        offset += pages(entries[-1].num_bytes)
        num_bytes = offset + pages(B * new * 8)
        text, text_shape = offset if new else 0, (B * bool(new), new)
        return Plan(
            tuple(entries), num_bytes, tuple(silent), large, text, text_shape, tuple(unplanned)
        )

    def _calls(self, hook: HookSpec, name: str) -> Sequence[Sequence[ShapeFormula]] | None:
        """For each time the value shows in a run, its leaves."""
        if hook.of != "param":
            return self.info.scan.get((name, hook.of))
        return (
            (
                ShapeFormula(
                    "", tuple((size, "") for size in self.info.parameters[name]), self.info.dtype
                ),
            ),
        )

    def _logits(self, B: int, S: int, new: int, backward: bool) -> tuple[HookSpec | None, bool]:
        """The hook that every run has, on the model's logits, and whether all of them would be
        large, so that it keeps the last position only. A generation has one position a forward,
        from which the next token is taken."""
        calls = self.info.scan.get(("", "output"), ())
        path = logits_path([leaf.path for leaf in calls[0]]) if calls else None
        formula = next((leaf for leaf in calls[0] if leaf.path == path), None) if calls else None
        if formula is None or formula.dims is None:
            return None, False
        large = not backward and size_of(formula.shape(B, new or S), formula.dtype) > LOGITS_BYTES
        return HookSpec(
            "", index=formula.path, name="logits", positions=(-1,) if new or large else None
        ), large


def logits_path(paths: Sequence[str]) -> str | None:
    """Which of the tensors that a model puts out are its logits: those it calls so, else the first
    if it gives that no other name; None: it has none.

    >>> logits_path(["loss", "logits"]), logits_path(["0", "1"]), logits_path(["last_hidden_state"])
    ('logits', '0', None)
    """
    if "logits" in paths:
        return "logits"
    return (
        paths[0]
        if paths and all(key.isdigit() for key in filter(None, paths[0].split(".")))
        else None
    )


def leaf_of(leaves: Sequence[ShapeFormula], hook: HookSpec, name: str) -> ShapeFormula | None:
    """The leaf a hook asks for; None where the value holds no tensor at all."""
    if hook.index is None:
        return leaves[0] if leaves else None
    for leaf in leaves:
        if leaf.path == hook.index:
            return leaf
    paths = [leaf.path for leaf in leaves]
    near = nearest(hook.index, paths) or paths[:6]
    raise HookError(
        f"{display_name(name)} {hook.at} has no tensor at index {hook.index!r}; there are {near}"
    )


def check_index(info: ModelInfo, names: Sequence[str], hook: HookSpec) -> None:
    """HookError if the hook's index, or a dim that it reduces, is not in the value of one of these
    modules."""
    for name in names if hook.of != "param" else ():
        for leaves in info.scan[name, hook.of]:
            formula = leaf_of(leaves, hook, name)
            if formula is not None and formula.dims is not None and hook.reduce is not None:
                reduced_dims(hook, formula, name)


def reduced_dims(hook: HookSpec, formula: ShapeFormula, name: str) -> tuple[int, ...]:
    """The dims of a value that its hook reduces. HookError: it has no such dim."""
    assert hook.reduce is not None and formula.dims is not None
    try:
        return hook.reduce.over(len(formula.dims))
    except IndexError as outside:
        raise HookError(
            f"{display_name(name)} {hook.at} is {formula}: it has no dim {outside}, which {hook.reduce} would reduce"
        ) from None


def num_slots(layout: Layout, formula: ShapeFormula, over: tuple[int, ...]) -> int:
    """Of how many ranks the parts of a reduction have to be told apart. Where rows stay apart,
    those of a tp group."""
    rows = formula.batched
    return layout.tp if rows and not set(rows) & set(over) else layout.tp * layout.batch_groups


def left(shape: Sequence[int], over: Sequence[int]) -> tuple[int, ...]:
    """What is left of a shape when these dims are reduced."""
    return tuple(size for dim, size in enumerate(shape) if dim not in over)


def kept_shape(
    formula: ShapeFormula,
    hook: HookSpec,
    B: int,
    S: int,
    window: int,
    forwards: int = 1,
    check: bool = True,
) -> tuple[int, ...]:
    """The shape a capture keeps: the whole, or only the positions its hook names. A generation's
    forwards after the first, over the prompt's S positions, add one each. check: HookError for
    positions that it will not have."""
    T = S + forwards - 1
    shape = list(formula.shape(B, T, 0, window))
    if hook.kept_positions is not None:
        if check:
            check_positions(hook, S, forwards)
        dim = formula.positions
        if dim is not None:
            shape[dim] = sum(map(len, kept_columns(hook.kept_positions, S, forwards)))
    return tuple(shape)


def kept_columns(
    positions: tuple[int, ...] | None, S: int, forwards: int = 1
) -> list[tuple[int, ...]]:
    """For each forward those of the positions that it runs; None: all of them. They are the whole
    text's; negative ones count from the end of the text as it is then: -1 is each forward's newest
    token.

    >>> kept_columns((0, -1), 5, 3)
    [(0, 4), (5,), (6,)]
    """
    ran = [range(S), *(range(c, c + 1) for c in range(S, S + forwards - 1))]
    if positions is None:
        return [tuple(columns) for columns in ran]
    absolute = [[p if p >= 0 else columns.stop + p for p in positions] for columns in ran]
    return [
        tuple(p for p in wanted if p in columns)
        for wanted, columns in zip(absolute, ran, strict=True)
    ]


def check_positions(hook: HookSpec, S: int, forwards: int = 1) -> None:
    """HookError if the hook names a position that no forward of the run will have."""
    last = S + forwards - 1
    outside = [p for p in hook.positions or () if not -S <= p < last]
    if outside:
        keeps = "keeps" if hook.edit is None else "edits"
        there = f"{last}, of which {S} are the prompt's" if forwards > 1 else last
        raise HookError(f"hook {hook.key!r} {keeps} position {outside[0]}, but the run has {there}")


def cut(whole: torch.Tensor, shape: Sequence[int], folded: int | None, B: int) -> torch.Tensor:
    """What of a planned whole there is, where a generation ended early: the first positions.
    folded: the dim in which rows and positions lie together, if any."""
    for dim, size in enumerate(shape):
        if size == whole.shape[dim]:
            continue
        if dim == folded:
            whole = (
                whole.unflatten(dim, (B, -1)).narrow(dim + 1, 0, size // B).flatten(dim, dim + 1)
            )
        else:
            whole = whole.narrow(dim, 0, size)
    return whole


# --- rows and tokens ------------------------------------------------------------------


def row_dims(entry: Entry) -> tuple[int | None, int | None, int | None]:
    """(the dim of a batch's rows, that of the positions, that in which both lie) of what is kept;
    None: there is none.

    HookError: rows are not to be told apart, or another dim is as long as the prompt."""
    formula, over = entry.formula, entry.over
    rows, folded = formula.rows, formula.folded
    positions = None if folded is not None else formula.positions
    longer = [
        d
        for d in formula.dims_of("S", "P", "P+S", "W+S", "B", "B*S")
        if d not in (rows, positions, folded)
    ]
    if (
        (rows is None and folded is None)
        or ({rows, folded} - {None}) & set(over)
        or set(longer) - set(over)
    ):
        raise HookError(
            f"{entry.key} is {formula}: prompts cannot be told apart in it, or more than one dim is as long as a "
            "prompt; reduce such dims, or leave it out"
        )

    def now(dim: int | None) -> int | None:
        return None if dim is None or dim in over else dim - sum(d < dim for d in over)

    return now(rows), now(positions), now(folded)


class Rows:
    """A part of a value by rows, or by tokens without pads. dims: as row_dims() says; shape: the
    whole's; box: the part's."""

    def __init__(self, dims: tuple[int | None, ...], shape: Sequence[int], box: Box):
        self.first = [dim for dim in dims if dim is not None]
        self.by_token = dims[1] is not None or dims[2] is not None
        self.rest = [dim for dim in range(len(shape)) if dim not in self.first]
        self.spans = [box.span(dim, size) for dim, size in enumerate(shape)]

    def of(self, part: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """(rows or tokens, the other dims) in memory of its own. mask: (rows, positions), of the
        whole."""
        ordered = part.permute(*self.first, *self.rest)
        return (ordered[self._own(mask)] if self.by_token else ordered).clone(
            memory_format=torch.contiguous_format
        )

    def put(self, held: torch.Tensor, mask: torch.Tensor, into: torch.Tensor) -> None:
        """The way back: `held` into its place in the whole's rows or tokens."""
        index: list[Any] = [slice(*self.spans[self.first[0]])]
        if self.by_token:
            numbers = torch.full(mask.shape, -1)
            numbers[mask] = torch.arange(int(mask.sum()))
            index = [self._own(mask, numbers)[self._own(mask)]]
        into[(*index, *(slice(*self.spans[dim]) for dim in self.rest))] = held

    def _own(self, mask: torch.Tensor, of: torch.Tensor | None = None) -> torch.Tensor:
        """The part of (rows, positions) that this is a part of."""
        whole = mask if of is None else of
        whole = whole if len(self.first) == 2 else whole.reshape(-1)
        return whole[tuple(slice(*self.spans[dim]) for dim in self.first)]
