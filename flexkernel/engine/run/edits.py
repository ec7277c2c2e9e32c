"""Edits: functions that change an activation inside the forward. Each sees the whole one and runs
once, on one rank.

The presets that treat every element by itself run where the shards lie, without a word between
ranks.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Partial, Replicate

from flexkernel.boxes import WHOLE, Box
from flexkernel.engine.model.pytree import leaf, leaves, replaced, users_line
from flexkernel.engine.place.placements import Place, Placed, Placer
from flexkernel.engine.place.staging import digest, joined_digest
from flexkernel.engine.ranks.gather import Exchange
from flexkernel.errors import EditError, HookError, PlacementError
from flexkernel.memory.plan import check_positions
from flexkernel.memory.slab import Slab
from flexkernel.memory.tensors import from_blob
from flexkernel.names import split_point
from flexkernel.wire import (
    EDITED,
    Blob,
    CaptureKey,
    EditSpec,
    HookSpec,
    ModelInfo,
    RunPlan,
    ShapeFormula,
    ShardRecord,
    SlabValue,
    dtype_name,
)

from .autograd import differentiable
from .sandbox import EditRNG, sandbox
from .tokens import TokenBuffer

__all__ = ["PRESETS", "Context", "Editor"]


@dataclass
class Context:
    """What an edit is told beside the activation.

    module: its name. save: a dict that lives on between runs, on the rank where the edit runs.
    step: of the generation. tokens: ids (B, S) of the positions that x has: in a generation the
    prompt's, then at each step the newest token's; at @k and @v all so far. mask: (B, S) bool,
    False on pads and after a row's end. positions: (B, S), of each token in its row. All on the
    activation's device.
    """

    module: str
    # said, since nnsight gives every object a `save`, which would be its default
    save: dict[str, Any] = field()
    tokens: torch.Tensor
    mask: torch.Tensor
    positions: torch.Tensor
    step: int = 0
    modules: Mapping[str, torch.nn.Module] = field(default_factory=dict)


class Modules(dict):
    """The trainable modules as an edit sees them: not from the shards, where each rank would count
    its gradient."""

    def __init__(self, modules: Mapping[str, torch.nn.Module], edit: str, per: str):
        super().__init__(modules if per != "element" else {})
        self.edit, self.per, self.there = edit, per, list(modules)

    def __missing__(self, name: str) -> torch.nn.Module:
        if name in self.there:
            raise EditError(
                f"edit {self.edit!r} is per='element', which sees no modules: make it 'whole' or 'row'"
            )
        raise EditError(
            f"edit {self.edit!r} asks for the module {name!r}; there are {self.there or 'none'}"
        )


# --- presets --------------------------------------------------------------------------
#
# x is what a rank holds, or the whole; value is what the hook was given, already cut to the same part.


def mean(x: torch.Tensor, _value: Any, at: _Part) -> torch.Tensor:
    """The mean over rows and positions, pads left out, in every place."""
    weight = at.formula.broadcast(at.context.mask)
    if weight is None:
        raise EditError(f"mean at {at.context.module}: {at.formula} has no positions")
    weight = weight.to(x)
    along = (at.formula.rows, at.formula.positions, at.formula.folded)
    dims = [dim for dim in along if dim is not None]
    return ((x * weight).sum(dims, keepdim=True) / weight.sum()).expand_as(x)


def project_out(x: torch.Tensor, value: torch.Tensor, _at: _Part) -> torch.Tensor:
    """Without its part along a direction of the last dim."""
    unit = value / value.norm()
    return x - (x @ unit)[..., None] * unit


def noise(x: torch.Tensor, value: Any, at: _Part) -> torch.Tensor:
    """Plus normal noise of this standard deviation, drawn for the whole, so that it does not
    depend on the layout."""
    drawn = (
        at.drawn()
        if at.generating
        else torch.randn(at.whole, generator=torch.Generator().manual_seed(at.seed))
    )
    return x + (at.box.cut(drawn) * value).to(x)


PRESETS: dict[str, tuple[str, Callable[[torch.Tensor, Any, Any], torch.Tensor]]] = {
    "zero": ("element", lambda x, _value, _at: torch.zeros_like(x)),
    "scale": ("element", lambda x, value, _at: x * value),
    "add": ("element", lambda x, value, _at: x + value),
    "set": ("element", lambda x, value, _at: torch.zeros_like(x) + value),
    "clamp": ("element", lambda x, value, _at: x.clamp(*value)),
    "noise": ("element", noise),
    "patch": ("element", lambda x, value, _at: x if value is None else value.to(x)),
    "mean": ("whole", mean),
    "project_out": ("row", project_out),
}


@dataclass(frozen=True)
class _Part:
    """Which part of the whole an edit sees: its box, the whole's shape and formula, the positions
    of the text that it has."""

    whole: tuple[int, ...]
    box: Box
    formula: ShapeFormula
    context: Context
    seed: int
    columns: range
    generating: bool

    def drawn(self) -> torch.Tensor:
        """Normal noise of the whole's shape, for each position of the text from a seed of its own:
        a generation then gives a position the same noise at every step that sees it."""
        shape, dim = list(self.whole), self.formula.positions
        folded = self.formula.folded
        if folded is not None:
            dim = folded + 1
            shape[folded:dim] = [shape[folded] // len(self.columns), len(self.columns)]
        if dim is None:
            return torch.randn(shape, generator=torch.Generator().manual_seed(self.seed))
        each = [*shape[:dim], *shape[dim + 1 :]]
        seeds = ((self.seed + c * 0x9E3779B97F4A7C15) & (2**63 - 1) for c in self.columns)
        columns = [
            torch.randn(each, generator=torch.Generator().manual_seed(seed)) for seed in seeds
        ]
        return torch.stack(columns, dim).reshape(self.whole)


# --- making them ----------------------------------------------------------------------


class Editor:
    """Makes the edits of one run on this rank. The ranks that hold parts of an activation reach
    each edit together."""

    def __init__(
        self,
        info: ModelInfo,
        plan: RunPlan,
        here: Place,
        text: TokenBuffer,
        placer: Placer,
        edits: Mapping[str, tuple[EditSpec, Callable]],
        saved: dict[str, Any],
        exchange: Exchange | None,
        open_slab: Callable[[str, int], Slab],
        modules: Mapping[str, torch.nn.Module],
        device: str = "cpu",
    ):
        self.device = device
        self.info, self.here, self.placer, self.edits = info, here, placer, edits
        self.saved, self.exchange, self.open_slab, self.seed = saved, exchange, open_slab, plan.seed
        self.text, self.generation, self.modules = text, plan.generation, modules
        self.of_the_model = frozenset(placer.modules.values())
        self.drawn = (
            EditRNG(plan.generation.seed + here.rank + 1) if plan.generation is not None else None
        )
        # before each edit, and after some: of which copies must be equal
        self.edited: dict[CaptureKey, ShardRecord] = {}

    def edit(self, hook: HookSpec, name: str, call: int, value: Any) -> Any:
        """The value with its tensor edited. EditError: the edit raised, or returned what cannot
        take its place."""
        path, tensor, formula = self._find(hook, name, call, value)
        new = self.edit_tensor(hook, name, call, path, tensor, formula)
        return value if new is None else replaced(value, path, new)

    def edit_gradient(
        self, hook: HookSpec, name: str, call: int, path: str, gradient: torch.Tensor
    ) -> torch.Tensor:
        """The gradient of the module's tensor at that path, edited: it lies as that tensor
        does."""
        formula = self._formula(hook, name, call, path)
        new = self.edit_tensor(hook, name, call, path, gradient, formula)
        return gradient if new is None else new

    def edit_tensor(
        self,
        hook: HookSpec,
        name: str,
        call: int,
        path: str,
        tensor: torch.Tensor,
        formula: ShapeFormula,
    ) -> torch.Tensor | None:
        """What takes the tensor's place; None: nobody wants it edited here."""
        placed = self.placer.place(name, hook.of, tensor, formula, self.here)
        if isinstance(placed.placement, Partial):
            raise PlacementError(
                f"{name}: each rank holds an addend of a sum here; edit the module that sums it"
            )
        per, function = self._function(hook)
        if per != "whole" and self.here.idle and formula.batched:
            return None  # copied rows that nobody wants
        key = CaptureKey(hook.key, name, hook.at, path, call)
        before = self._note(key, placed, placed.local)
        if per == "element":
            part = self._part(hook, name, placed.shard, formula, own_rows=True, per=per)
            local = guarded(
                hook,
                name,
                placed.local.clone(),
                lambda x: function(x, self._cut(hook, part, x), part),
            )
            # it may draw at random, and copies would differ from here on
            if hook.edit not in PRESETS:
                self._note(replace(key, at=f"{hook.at} {EDITED}"), placed, local)
        else:
            local = self._once(hook, name, call, placed, formula, per, function)
        local = self._chosen(hook, name, placed, formula, local)
        if has_nan(local) and not has_nan(placed.local):
            self.edited[key] = replace(before, nan=True)  # it may be meant; the run says so
        return again_distributed(tensor, local)

    def edit_parameter(
        self, hook: HookSpec, name: str, gradient: torch.Tensor, seen: ShardRecord
    ) -> torch.Tensor:
        """This rank's part of a parameter's gradient, edited; the edit sees the whole and runs
        once. All ranks.

        gradient: what this rank holds of it. seen: which part that is; it counts if it was
        written."""
        shape = tuple(self.info.parameters[name])
        formula = ShapeFormula("", tuple((size, "") for size in shape), dtype_name(gradient.dtype))
        part = self._part(hook, name, WHOLE, formula, own_rows=False)
        _, function = self._function(hook)

        def run(whole: torch.Tensor) -> torch.Tensor:
            new = guarded(
                hook, name, whole.clone(), lambda x: function(x, self._cut(hook, part, x), part)
            )
            return self._chosen(hook, name, Placed(whole, "", Replicate(), WHOLE), formula, new)

        if self.exchange is None:
            return run(gradient)
        title, holds = f"{hook.key} {name}", seen.shard
        return self.exchange.once(
            title, 0, "world", gradient, shape, holds, holds, seen.written is not None, run
        )

    def note(self, key: CaptureKey, before: ShardRecord, nan: bool) -> None:
        """What was there before an edit, of which copies must have been equal; nan: the edit has
        made some."""
        self.edited[key] = replace(before, nan=nan)

    def _note(self, key: CaptureKey, placed: Placed, value: torch.Tensor) -> ShardRecord:
        """Note a value of which all copies must be equal; in a generation after those of the steps
        before."""
        earlier = self.edited.get(key)
        said = joined_digest(earlier.digest if earlier is not None else 0, digest(value.detach()))
        nan = earlier is not None and earlier.nan
        self.edited[key] = ShardRecord(
            placed.evidence, repr(placed.placement), said, placed.shard, nan=nan
        )
        return self.edited[key]

    def _find(
        self, hook: HookSpec, name: str, call: int, value: Any
    ) -> tuple[str, torch.Tensor, ShapeFormula]:
        known = next(iter(self.info.scan.get((name, hook.of), ())[call : call + 1]), ())
        path = (
            hook.index
            if hook.index is not None
            else next((f.path for f in known), next(leaves(value), ("",))[0])
        )
        tensor = leaf(value, path)
        if tensor is None:
            raise HookError(f"{name}: there is no tensor at {path!r} to edit")
        return path, tensor, self._formula(hook, name, call, path)

    def _formula(self, hook: HookSpec, name: str, call: int, path: str) -> ShapeFormula:
        known = next(iter(self.info.scan.get((name, hook.of), ())[call : call + 1]), ())
        formula = next((f for f in known if f.path == path), None)
        if formula is None or formula.dims is None:
            raise PlacementError(
                f"{name}: its shape or order depends on the data, so that no edit can be placed there"
            )
        return formula

    def _function(self, hook: HookSpec) -> tuple[str, Callable]:
        """(per, function of (x, value, part))."""
        assert hook.edit is not None
        if hook.edit in PRESETS:
            return PRESETS[hook.edit]
        if hook.edit not in self.edits:
            raise HookError(f"no edit is called {hook.edit!r} on this rank; define it again")
        spec, function = self.edits[hook.edit]

        def users(x: torch.Tensor, _value: Any, part: _Part) -> Any:
            apart = contextlib.nullcontext() if self.drawn is None else self.drawn.active()
            with apart, sandbox(self.of_the_model):
                return function(x, part.context)

        return spec.per, users

    def _part(
        self,
        hook: HookSpec,
        name: str,
        box: Box,
        formula: ShapeFormula,
        own_rows: bool,
        per: str = "",
    ) -> _Part:
        """What an edit is told. own_rows: it sees this group's rows of the batch only."""
        rows = slice(*self.here.rows) if own_rows else slice(None)
        saved = self.saved.setdefault(hook.edit or "", {})
        whole, dim = self.here.whole(formula), formula.positions
        columns = self.here.columns(self.here.S if dim is None else whole[dim])
        text = (self.text.ids(columns), self.text.mask(columns), self.text.positions(columns))
        ids, mask, positions = (of_text[rows].to(self.device) for of_text in text)
        modules = Modules(self.modules, hook.edit or "", per)
        context = Context(name, saved, ids, mask, positions, step=self.here.step, modules=modules)
        seed = (self.seed << 32) ^ zlib.crc32(f"{hook.key} {name}".encode())
        return _Part(whole, box, formula, context, seed, columns, self.generation is not None)

    def _cut(self, hook: HookSpec, part: _Part, x: torch.Tensor) -> Any:
        """The hook's value as the preset takes it: a number, or the tensor's part that belongs to
        this part."""
        given = hook.value
        if isinstance(given, Blob):
            tensor = from_blob(given)
        elif isinstance(given, SlabValue):
            tensor = self.open_slab(given.region.slab, given.slab_bytes).tensor(given.region)
        else:
            return given
        if hook.edit == "project_out":
            return tensor.to(x)
        if hook.edit == "patch" and part.generating:
            tensor = self._patched(tensor, part)
            if tensor is None:
                return None
        if hook.edit == "patch" and tuple(tensor.shape) != part.whole:
            raise EditError(
                f"patch at {part.context.module}: the source has shape {tuple(tensor.shape)}, not {part.whole}"
            )
        return part.box.cut(tensor.expand(part.whole)).to(x)

    def _patched(self, source: torch.Tensor, part: _Part) -> torch.Tensor | None:
        """What a source that covers the text up to some position has for this forward; None after
        its end."""
        dim = part.formula.positions
        if dim is None or source.dim() != len(part.whole):
            return source
        if part.columns.start >= source.shape[dim]:
            return None
        return source[(slice(None),) * dim + (slice(part.columns.start, part.columns.stop),)]

    def _once(
        self,
        hook: HookSpec,
        name: str,
        call: int,
        placed: Placed,
        formula: ShapeFormula,
        per: str,
        function: Callable,
    ) -> torch.Tensor:
        """The edit run on one rank of those that hold a part, on the whole of it; this rank's part
        of the result."""
        layout = self.here.layout
        batched = formula.batched
        group = "tp" if per == "row" and batched else "stage"
        part = self._part(hook, name, WHOLE, formula, own_rows=group == "tp")

        def run(x: torch.Tensor) -> torch.Tensor:
            now = self._part(
                hook, name, WHOLE, formula, own_rows=group == "tp"
            )  # once more: now all rows' tokens are there
            return guarded(hook, name, x, lambda y: function(y, self._cut(hook, now, y), now))

        size = layout.tp if group == "tp" else layout.tp * layout.batch_groups
        if size == 1:
            return run(placed.local.clone())  # the edit may write into it
        assert self.exchange is not None
        if torch.is_grad_enabled() and group == "stage" and not batched and layout.batch_groups > 1:
            raise PlacementError(
                f"{name}: {formula} has no rows, so that the groups of rows have parts of its gradient"
            )
        mine = placed.shard
        # the rows of this group are all that it sees
        if group == "tp" and layout.batch_groups > 1:
            mine = placed.shard.only(placed.shard.dims.difference(batched))
            shape = self.here.own(formula)
        else:
            shape = part.whole
        writes = self._writes(placed, group) and not (
            self.here.idle and batched and group == "stage"
        )
        # a copied row: give it the first one
        fallback = self.here.idle and batched and group == "stage"
        reads = mine
        if fallback:
            reads = Box((d, 0, 1) if d in batched else (d, a, b) for d, a, b in mine)
        call |= self.here.step << 16

        def meet(
            part: torch.Tensor, function: Callable[[torch.Tensor], torch.Tensor], what: str
        ) -> torch.Tensor:
            assert self.exchange is not None
            title = f"{hook.key} {name}{what}"
            got = self.exchange.once(title, call, group, part, shape, mine, reads, writes, function)
            # a copied row has no gradient
            return torch.zeros_like(got) if what and self.here.idle and batched else got

        return differentiable(placed.local, meet, run)

    def _writes(self, placed: Placed, group: str) -> bool:
        """Of ranks that hold the same part the first writes it."""
        where = self.here.coordinate
        copies_tp = isinstance(placed.placement, Replicate) and where.tp > 0
        return not copies_tp

    def _chosen(
        self, hook: HookSpec, name: str, placed: Placed, formula: ShapeFormula, new: torch.Tensor
    ) -> torch.Tensor:
        """The edited values where the hook's positions, heads and neurons are, the old ones
        elsewhere."""
        old = placed.local
        if hook.positions is None and hook.heads is None and hook.neurons is None:
            return new
        chosen = torch.ones((), dtype=torch.bool, device=old.device)
        for what, dim in self._dims(hook, name, formula, old.dim()):
            total = self.here.whole(formula)[dim]
            if what is hook.positions and self.generation is not None:
                what = self._of_this_forward(hook, total)
            outside = [i for i in what if not -total <= i < total]
            if outside:
                raise HookError(f"{hook.key}: index {outside[0]} is outside the {total} of {name}")
            mask = torch.zeros(total, dtype=torch.bool, device=old.device)
            mask[list(what)] = True
            mask = mask[slice(*placed.shard.span(dim, total))]
            chosen = chosen & mask.view([-1 if d == dim else 1 for d in range(old.dim())])
        return torch.where(chosen, new, old)

    def _of_this_forward(self, hook: HookSpec, total: int) -> tuple[int, ...]:
        """The hook's positions, which are the whole text's, as indices of what this forward has.
        Negative ones count from the end of the text as it is now: -1 is each forward's newest
        token."""
        assert hook.positions is not None and self.generation is not None
        check_positions(hook, self.text.S, self.generation.max_new_tokens)
        columns = self.here.columns(total)
        absolute = (p if p >= 0 else columns.stop + p for p in hook.positions)
        return tuple(p - columns.start for p in absolute if p in columns)

    def _dims(
        self, hook: HookSpec, name: str, formula: ShapeFormula, ndim: int
    ) -> list[tuple[tuple[int, ...], int]]:
        """(chosen indices, the dim they count along)."""
        found: list[tuple[tuple[int, ...], int]] = []
        if hook.positions is not None:
            if formula.positions is None:
                raise HookError(
                    f"{hook.key}: {name} is {formula}, it has no dim of positions alone"
                )
            found.append((hook.positions, formula.positions))
        if hook.heads is not None:
            point = split_point(name)[1]
            if not point:
                raise HookError(
                    f"{hook.key}: heads are there at @q, @k, @v, @pattern and @z, not at {name}"
                )
            found.append((hook.heads, 2 if point == "z" else 1))
        if hook.neurons is not None:
            found.append((hook.neurons, ndim - 1))
        return found


def guarded(
    hook: HookSpec, name: str, x: torch.Tensor, function: Callable[[torch.Tensor], Any]
) -> torch.Tensor:
    """What the function makes of x, which must be able to take its place. EditError names the edit
    and its line."""
    shape, dtype, device = x.shape, x.dtype, x.device
    try:
        new = function(x)
    except EditError:
        raise
    except (
        BaseException
    ) as error:  # SystemExit and KeyboardInterrupt in it too: the engine is not the edit's to end
        raise EditError(
            f"edit {hook.edit!r} at {name} raised {type(error).__name__}: {error}{users_line(error)}"
        ) from error
    if not isinstance(new, torch.Tensor):
        raise EditError(
            f"edit {hook.edit!r} at {name} returned {type(new).__name__}; it has to return a tensor like x"
        )
    if new.shape != shape or new.dtype != dtype or new.device != device:
        raise EditError(
            f"edit {hook.edit!r} at {name} returned {tuple(new.shape)} {new.dtype} on {new.device}; "
            f"x is {tuple(shape)} {dtype} on {device}"
        )
    return new


def has_nan(value: torch.Tensor) -> bool:
    """One look at each number where their sum is one, as nearly always; infinities may make NaN of
    it, too.

    >>> has_nan(torch.tensor([1.0, float("nan")])), has_nan(torch.tensor([float("inf"), -float("inf")]))
    (True, False)
    """
    value = value.detach()
    return bool(value.sum().isnan()) and bool(value.isnan().any())


def again_distributed(old: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
    """A DTensor again, where the module put one out."""
    if not isinstance(old, DTensor):
        return local
    return DTensor.from_local(
        local,
        old.device_mesh,
        old.placements,
        run_check=False,
        shape=old.shape,
        stride=old.stride(),
    )


def seen_by(hook: HookSpec, edits: Mapping[str, tuple[EditSpec, Callable]]) -> str:
    """What the hook's edit is per: "whole", "row" or "element". HookError: it is not known
    here."""
    assert hook.edit is not None
    if hook.edit not in PRESETS and hook.edit not in edits:
        raise HookError(f"no edit is called {hook.edit!r} on this rank; define it again")
    if hook.of == "param":
        return "whole"
    return PRESETS[hook.edit][0] if hook.edit in PRESETS else edits[hook.edit][0].per
