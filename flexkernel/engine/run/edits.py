"""Edits: functions that change an activation inside the forward.

An edit sees the whole activation, or all of one row, and runs once, on one rank. Edits that treat
every element by itself run where the shards lie, and send nothing.
"""

from __future__ import annotations

import contextlib
import functools
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Partial, Replicate

from flexkernel.boxes import WHOLE, Box
from flexkernel.engine.model.pytree import first_leaf, leaf, replaced
from flexkernel.engine.place.placements import Placed
from flexkernel.engine.place.staging import digest, joined_digest
from flexkernel.engine.ranks.gather import Exchange, ExchangePlan
from flexkernel.engine.usercode import users_line
from flexkernel.errors import EditError, HookError, PlacementError
from flexkernel.memory.selection import check_positions
from flexkernel.memory.tensors import from_blob
from flexkernel.names import split_point
from flexkernel.sites import EDITED
from flexkernel.wire import (
    Blob,
    CaptureKey,
    EditSpec,
    HookSpec,
    ModelInfo,
    ShapeFormula,
    ShardRecord,
    SlabValue,
    dtype_name,
)

from .context import RunContext
from .gathered import Gathering, exchange_plan, gathered
from .presets import PRESETS, Context, EditModules, EditPart
from .sandbox import EditRNG, sandbox

__all__ = ["EditLibrary", "Editor"]

HEAD_DIMS = {"q": 1, "k": 1, "v": 1, "pattern": 1, "z": 2}  # virtual point → the dim of the heads


@dataclass(frozen=True)
class EditLibrary:
    """What a rank has for its edits, from one run to the next.

    defined: name → how it came, and the function. saved: name → what it keeps between runs.
    modules: trainable ones, beside the model."""

    defined: Mapping[str, tuple[EditSpec, Callable[..., Any]]]
    saved: dict[str, dict[str, Any]]
    modules: Mapping[str, torch.nn.Module]

    def per(self, hook: HookSpec) -> str:
        """What the hook's edit sees: "whole", "row" or "element". HookError: this rank does not
        know the edit."""
        name = hook.edit or ""
        if name not in PRESETS and name not in self.defined:
            raise HookError(f"no edit is called {name!r} on this rank; define it again")
        if hook.of == "param":
            return "whole"
        if name in PRESETS:
            return PRESETS[name][0]
        return self.defined[name][0].per


@dataclass(frozen=True)
class Target:
    """What an edit is made of: one value of the model.

    shard: this rank's part; all of it where the edit sees the whole. per: as in EditLibrary.per().
    own_rows: the edit sees only this group's rows of the batch."""

    hook: HookSpec
    name: str
    formula: ShapeFormula
    shard: Box
    per: str
    own_rows: bool


class Editor:
    """Makes the edits of one run on this rank. The ranks that hold parts of an activation come to
    each edit together.

    here: which positions the forward runs. edited: what was there before each edit, and after some:
    the ranks' copies of it must be equal. exchange: None where no edit needs other ranks."""

    def __init__(
        self,
        context: RunContext,
        info: ModelInfo,
        library: EditLibrary,
        exchange: Exchange | None,
        device: str,
    ):
        self.context = context
        self.here = context.here
        self.info = info
        self.library = library
        self.exchange = exchange
        self.device = device
        self.edited: dict[CaptureKey, ShardRecord] = {}
        generation = context.plan.generation
        self._rng: EditRNG | None = None
        if generation is not None:
            self._rng = EditRNG(generation.seed + context.here.rank + 1)

    def edit(self, hook: HookSpec, name: str, call: int, value: Any) -> Any:
        """The value with its tensor edited. EditError: the edit raised, or returned what cannot
        take the tensor's place."""
        path, tensor = self._tensor_in(hook, name, call, value)
        new = self._edit_tensor(hook, name, call, path, tensor)
        if new is None:
            return value
        return replaced(value, path, new)

    def edit_gradient(
        self, hook: HookSpec, name: str, call: int, path: str, gradient: torch.Tensor
    ) -> torch.Tensor:
        """The edited gradient of the module's tensor at that path, which lies as that tensor does.

        gradient: this rank's part, of any shape -> the same shape, dtype and device."""
        new = self._edit_tensor(hook, name, call, path, gradient)
        if new is None:
            return gradient
        return new

    def edit_parameter(
        self, hook: HookSpec, name: str, gradient: torch.Tensor, record: ShardRecord
    ) -> torch.Tensor:
        """This rank's part of a parameter's gradient, edited: the edit sees the whole and runs
        once. All ranks must call.

        gradient: this rank's part, which record.shard names -> the same shape, dtype and device. It
        is what the edit sees if it was written."""
        shape = tuple(self.info.parameters[name])
        dtype = dtype_name(gradient.dtype)
        formula = ShapeFormula("", tuple((size, "") for size in shape), dtype)
        edit = EditCall(self, Target(hook, name, formula, WHOLE, "whole", own_rows=False))
        if self.exchange is None:
            return edit.selected(gradient)
        plan = ExchangePlan("world", shape, record.shard, record.shard, record.written is not None)
        title = f"{hook.key} {name}"
        return self.exchange.once(plan, title, (0, 0), gradient, edit.selected)

    def note(self, key: CaptureKey, before: ShardRecord, nan: bool) -> None:
        """Note what was there before an edit; nan: the edit has made some."""
        self.edited[key] = replace(before, nan=nan)

    # --- one value --------------------------------------------------------------------

    def _edit_tensor(
        self, hook: HookSpec, name: str, call: int, path: str, tensor: torch.Tensor
    ) -> torch.Tensor | None:
        """What takes the tensor's place, of its shape, dtype and device; None: nobody wants it
        edited here. tensor: this rank's part of the value."""
        formula = self._formula(hook, name, call, path)
        placed = self.context.placer.place(name, hook.of, tensor, formula, self.here)
        if isinstance(placed.placement, Partial):
            raise PlacementError(
                f"{name}: each rank holds an addend of a sum here; edit the module that sums it"
            )
        per = self.library.per(hook)
        if per != "whole" and self.here.idle and formula.batched:
            return None  # copied rows that nobody wants
        key = CaptureKey(hook.key, name, hook.at, path, call)
        before = self._note_copy(key, placed, placed.local)
        if per == "element":
            target = Target(hook, name, formula, placed.shard, per, own_rows=True)
            local = EditCall(self, target)(placed.local.clone())
            if hook.edit not in PRESETS:  # it may draw at random, and copies would differ
                self._note_copy(replace(key, at=f"{hook.at} {EDITED}"), placed, local)
        else:
            local = self._edit_whole(Target(hook, name, formula, WHOLE, per, False), call, placed)
        local = self.selected(hook, name, placed, formula, local)
        if has_nan(local) and not has_nan(placed.local):
            self.note(key, before, nan=True)  # it may be meant; the run says so
        return distributed_like(tensor, local)

    def _edit_whole(self, target: Target, call: int, placed: Placed) -> torch.Tensor:
        """This rank's part of the value, of placed.local's shape, dtype and device, after the edit
        has run on one of the ranks that hold parts."""
        formula = target.formula
        layout = self.here.layout
        plan = exchange_plan(placed, formula, target.per, self.here)
        own_rows = plan.group == "tp"
        edit = EditCall(self, replace(target, own_rows=own_rows))
        is_alone = layout.tp == 1 and (own_rows or layout.batch_groups == 1)
        if self.exchange is None or is_alone:
            return edit(placed.local.clone())  # the edit may write into it
        batched = bool(formula.batched)
        split_rows = not own_rows and not batched and layout.batch_groups > 1
        if torch.is_grad_enabled() and split_rows:
            raise PlacementError(
                f"{target.name}: {formula} has no rows, so that the groups of rows have parts of "
                "its gradient"
            )
        title = f"{target.hook.key} {target.name}"
        number = (call, self.here.step)
        copied = self.here.idle and batched
        gathering = Gathering(self.exchange, plan, title, number, edit, no_gradient=copied)
        return gathered(placed.local, gathering)

    def _note_copy(self, key: CaptureKey, placed: Placed, value: torch.Tensor) -> ShardRecord:
        """Note a value, of any shape, of which all copies must be equal; in a generation after
        those of the steps before."""
        record = ShardRecord(
            placed.evidence, repr(placed.placement), digest(value.detach()), placed.shard
        )
        earlier = self.edited.get(key)
        if earlier is not None:
            joined = joined_digest(earlier.digest, record.digest)
            record = replace(record, digest=joined, nan=earlier.nan)
        self.edited[key] = record
        return record

    def _leaves(self, hook: HookSpec, name: str, call: int) -> tuple[ShapeFormula, ...]:
        """What the scan knows of the value at this call."""
        calls = self.info.scan.get((name, hook.of), ())
        if call >= len(calls):
            return ()
        return calls[call]

    def _tensor_in(
        self, hook: HookSpec, name: str, call: int, value: Any
    ) -> tuple[str, torch.Tensor]:
        """(the path of the tensor that is edited, this rank's part of it, of any shape). HookError:
        there is none."""
        path = hook.index
        if path is None:
            leaves = self._leaves(hook, name, call)
            if leaves:
                path = leaves[0].path
            else:
                path = first_leaf(value)[0]
        tensor = leaf(value, path)
        if tensor is None:
            raise HookError(f"{name}: there is no tensor at {path!r} to edit")
        return path, tensor

    def _formula(self, hook: HookSpec, name: str, call: int, path: str) -> ShapeFormula:
        for formula in self._leaves(hook, name, call):
            if formula.path == path and formula.dims is not None:
                return formula
        raise PlacementError(
            f"{name}: its shape or order depends on the data, so that no edit can be placed there"
        )

    # --- what an edit gets ------------------------------------------------------------

    def run(self, target: Target, x: torch.Tensor) -> Any:
        """What the edit's function returns for x: the value, or a part of it, of any shape."""
        hook = target.hook
        part = self._part(target)
        try:
            if hook.edit in PRESETS:
                return PRESETS[hook.edit][1](x, self._value(hook, part, x), part)
            _, function = self.library.defined[hook.edit or ""]
            with self._own_numbers(), sandbox(self.model):
                return function(x, part.context)
        except EditError:
            raise
        except BaseException as error:  # SystemExit, too: the engine is not the edit's to end
            raise EditError(
                f"edit {hook.edit!r} at {target.name} raised {type(error).__name__}: "
                f"{error}{users_line(error)}"
            ) from error

    @functools.cached_property
    def model(self) -> frozenset[torch.nn.Module]:
        """The model's modules, which an edit may not call."""
        return frozenset(self.context.placer.modules.values())

    def _own_numbers(self) -> contextlib.AbstractContextManager[None]:
        """Within it an edit draws: in a generation apart from what draws the tokens."""
        if self._rng is None:
            return contextlib.nullcontext()
        return self._rng.active()

    def _part(self, target: Target) -> EditPart:
        """What the edit gets beside x. In a generation the other ranks' tokens are there only once
        all ranks have come to the edit."""
        hook = target.hook
        tokens = self.context.tokens
        whole = self.here.whole(target.formula)
        num_columns = self.here.S
        if target.formula.positions is not None:
            num_columns = whole[target.formula.positions]
        columns = self.here.columns(num_columns)
        rows = slice(None)
        if target.own_rows:
            rows = slice(*self.here.rows)
        edit = hook.edit or ""
        context = Context(
            module=target.name,
            save=self.library.saved.setdefault(edit, {}),
            tokens=tokens.ids(columns)[rows].to(self.device),
            mask=tokens.mask(columns)[rows].to(self.device),
            positions=tokens.positions(columns)[rows].to(self.device),
            step=self.here.step,
            modules=EditModules(self.library.modules, edit, target.per),
        )
        seed = (self.context.plan.seed << 32) ^ zlib.crc32(f"{hook.key} {target.name}".encode())
        generating = self.context.plan.generation is not None
        return EditPart(whole, target.shard, target.formula, context, seed, columns, generating)

    def _value(self, hook: HookSpec, part: EditPart, x: torch.Tensor) -> Any:
        """The hook's value as the preset takes it: a number, or a tensor cut to the part of x, of
        x's dtype and device; project_out gets its direction (D,)."""
        tensor = self._tensor_of(hook.value)
        if tensor is None:
            return hook.value
        if hook.edit == "project_out":
            return tensor.to(x)
        if hook.edit == "patch":
            source = source_now(tensor, part)
            if source is None:
                return None
            tensor = source
            if tuple(tensor.shape) != part.whole:
                raise EditError(
                    f"patch at {part.context.module}: the source has shape "
                    f"{tuple(tensor.shape)}, not {part.whole}"
                )
        return part.box.cut(tensor.expand(part.whole)).to(x)

    def _tensor_of(self, value: Any) -> torch.Tensor | None:
        """The tensor that a hook's value is, on the CPU, of its own shape; None: it is none."""
        if isinstance(value, Blob):
            return from_blob(value)
        if isinstance(value, SlabValue):
            slab = self.context.memory.slab(value.region.slab, value.slab_bytes)
            return slab.tensor(value.region)
        return None

    # --- where it is made -------------------------------------------------------------

    def selected(
        self, hook: HookSpec, name: str, placed: Placed, formula: ShapeFormula, new: torch.Tensor
    ) -> torch.Tensor:
        """The edited values where the hook's positions, heads and neurons are, the old ones
        elsewhere. new: of placed.local's shape, dtype and device, as is the result."""
        if hook.positions is None and hook.heads is None and hook.neurons is None:
            return new
        old = placed.local
        selection = torch.ones((), dtype=torch.bool, device=old.device)
        for indices, dim in self._indices(hook, name, formula):
            total = self.here.whole(formula)[dim]
            outside = [i for i in indices if not -total <= i < total]
            if outside:
                raise HookError(f"{hook.key}: index {outside[0]} is outside the {total} of {name}")
            chosen = torch.zeros(total, dtype=torch.bool, device=old.device)
            chosen[list(indices)] = True
            chosen = chosen[slice(*placed.shard.span(dim, total))]
            shape = [1] * old.dim()
            shape[dim] = -1
            selection = selection & chosen.view(shape)
        return torch.where(selection, new, old)

    def _indices(
        self, hook: HookSpec, name: str, formula: ShapeFormula
    ) -> list[tuple[tuple[int, ...], int]]:
        """(chosen indices, the dim they count along) of the hook's positions, heads, neurons."""
        dims = formula.dims or ()
        found: list[tuple[tuple[int, ...], int]] = []
        if hook.positions is not None:
            along = formula.positions
            if along is None:
                raise HookError(
                    f"{hook.key}: {name} is {formula}, it has no dim of positions alone"
                )
            total = self.here.whole(formula)[along]
            found.append((self._positions(hook, hook.positions, total), along))
        if hook.heads is not None:
            point = split_point(name)[1]
            if not point:
                raise HookError(
                    f"{hook.key}: heads are there at @q, @k, @v, @pattern and @z, not at {name}"
                )
            found.append((hook.heads, HEAD_DIMS[point]))
        if hook.neurons is not None:
            found.append((hook.neurons, len(dims) - 1))
        return found

    def _positions(self, hook: HookSpec, positions: tuple[int, ...], total: int) -> tuple[int, ...]:
        """The hook's positions as indices of this forward's `total`. In a generation they are the
        whole text's; negative ones count from the end of the text as it is now: -1 is each
        forward's newest token."""
        generation = self.context.plan.generation
        if generation is None:
            return positions
        check_positions(hook, self.context.tokens.S, generation.max_new_tokens)
        columns = self.here.columns(total)
        absolute = [from_start(position, columns.stop) for position in positions]
        return tuple(column - columns.start for column in absolute if column in columns)


@dataclass(frozen=True)
class EditCall:
    """One edit of one value, as a function of what it sees."""

    editor: Editor
    target: Target

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The edited x: a part of the value, or the whole of it -> the same shape, dtype and
        device. x may be written into. EditError names the edit, and its line."""
        shape = x.shape
        dtype = x.dtype
        device = x.device
        new = self.editor.run(self.target, x)
        edit = f"edit {self.target.hook.edit!r} at {self.target.name}"
        if not isinstance(new, torch.Tensor):
            raise EditError(
                f"{edit} returned {type(new).__name__}; it has to return a tensor like x"
            )
        if new.shape != shape or new.dtype != dtype or new.device != device:
            raise EditError(
                f"{edit} returned {tuple(new.shape)} {new.dtype} on {new.device}; "
                f"x is {tuple(shape)} {dtype} on {device}"
            )
        return new

    def selected(self, whole: torch.Tensor) -> torch.Tensor:
        """The whole value with the edit where the hook's positions, heads and neurons are: the
        same shape, dtype and device."""
        new = self(whole.clone())
        placed = Placed(whole, "", Replicate(), WHOLE)
        target = self.target
        return self.editor.selected(target.hook, target.name, placed, target.formula, new)


def from_start(position: int, length: int) -> int:
    """A position of a text of that length, counted from its start; negative ones count from its
    end."""
    if position < 0:
        return length + position
    return position


def source_now(source: torch.Tensor, part: EditPart) -> torch.Tensor | None:
    """What a patch's source has for this forward. None: a generation has come to its end.

    source: of the whole text up to some position, (..., T, ...) -> (..., n, ...)."""
    dim = part.formula.positions
    if not part.generating or dim is None or source.dim() != len(part.whole):
        return source
    if part.columns.start >= source.shape[dim]:
        return None
    stop = min(part.columns.stop, source.shape[dim])
    return source.narrow(dim, part.columns.start, stop - part.columns.start)


def has_nan(value: torch.Tensor) -> bool:
    """Whether a tensor of any shape has a NaN. Its sum says so in one pass, nearly always;
    infinities may make NaN of it, too.

    >>> has_nan(torch.tensor([1.0, float("nan")]))
    True
    >>> has_nan(torch.tensor([float("inf"), -float("inf")]))
    False
    """
    value = value.detach()
    return bool(value.sum().isnan()) and bool(value.isnan().any())


def distributed_like(old: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
    """A DTensor of these local values where the module put one out, else the values themselves.
    local: the shape of old's local part."""
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
