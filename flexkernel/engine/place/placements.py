"""Where this rank's value lies in the whole value.

This is never a guess: each placement has named evidence, and is checked against the shapes. The
first evidence counts: the value is a DTensor; the user declared it; the model's parallel plan
covers the module; its class is a known parallel layer; the local shape compared with the whole
shape from the scan. Without any it is a PlacementError."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from flexkernel.boxes import WHOLE, Box, chunk
from flexkernel.engine.compat import waited
from flexkernel.errors import PlacementError
from flexkernel.names import match
from flexkernel.wire import STYLES, Coordinate, Layout, ShapeFormula

from .layers import LayerPlacement, layer_placement

__all__ = ["NO_BATCH", "Place", "Placed", "Placer", "rows_held"]

PLANNED: dict[str, Placement] = {"Replicate()": Replicate(), "Shard(-1)": Shard(-1)}
MOST_DECIDED = 4096  # how many placements a Placer caches
# styles in which a rank's columns are not adjacent in the whole
STRIDED = {"packed_colwise": "output", "packed_rowwise": "input"}


@dataclass(frozen=True)
class Place:
    """What a rank must know to place a value: its own coordinate, and its rows of the batch.

    rows: (start, stop) in the whole batch; equal if this rank has no rows and runs a copy of one.
    S: how many positions this forward runs. past: how many positions a generation's earlier
    forwards ran. step: the number of this forward."""

    layout: Layout
    rank: int
    B: int
    S: int
    rows: tuple[int, int]
    window: int = 0
    past: int = 0
    step: int = 0

    def whole(self, formula: ShapeFormula) -> tuple[int, ...]:
        """The shape of a value in this forward, over all ranks."""
        return formula.shape(self.B, self.S, self.past, self.window)

    def own(self, formula: ShapeFormula) -> tuple[int, ...]:
        """The same shape with only this rank's rows of the batch."""
        return formula.shape(self.local_rows, self.S, self.past, self.window)

    def columns(self, size: int) -> range:
        """The positions of the text that a dim of this size spans: the newest ones."""
        return range(self.past + self.S - size, self.past + self.S)

    @functools.cached_property
    def coordinate(self) -> Coordinate:
        return self.layout.coordinate(self.rank)

    @property
    def tp(self) -> int:
        return self.coordinate.tp

    @property
    def local_rows(self) -> int:
        return max(self.rows[1] - self.rows[0], 1)

    @property
    def idle(self) -> bool:
        """Whether this rank's rows are only a copy that is not recorded."""
        return self.rows[0] == self.rows[1]


@dataclass(frozen=True)
class Placed:
    """A local tensor and its place: local == whole[shard]. placement: over tp."""

    local: torch.Tensor
    evidence: str
    placement: Placement
    shard: Box


class Placer:
    """Places the values of one model.

    styles: name → transformers' tensor-parallel style. declared: glob → placement. modules: this
    rank's, by name."""

    def __init__(
        self,
        layout: Layout,
        styles: dict[str, str],
        declared: dict[str, str],
        modules: dict[str, torch.nn.Module] | None = None,
    ):
        self.layout, self.styles, self.modules = layout, styles, modules or {}
        self.declared = [(*aimed(key), parse(text)) for key, text in declared.items()]
        self._decided: dict[tuple, tuple[str, Placement, Box]] = {}

    def place(
        self, name: str, at: str, value: torch.Tensor, formula: ShapeFormula, here: Place
    ) -> Placed:
        """Where the value lies in the whole. value: this rank's, of any shape; PlacementError:
        unknown.

        Each rank decides alone and all decide alike; nothing is sent. The decision for plain
        tensors of one shape is cached: in a forward, with cold processor caches, deciding again
        took five times as long as outside of one."""
        if isinstance(value, DTensor):
            return self._place(name, at, value, formula, here)
        local = waited(value)
        shapes = local.shape, here.whole(formula), here.own(formula)
        key = (name, at, formula, *shapes, here.layout, here.rank, here.B, here.rows)
        decided = self._decided.get(key)
        if decided is None:
            placed = self._place(name, at, local, formula, here)
            if len(self._decided) >= MOST_DECIDED:
                self._decided.clear()
            decided = self._decided[key] = placed.evidence, placed.placement, placed.shard
        return Placed(local, *decided)

    def _place(
        self, name: str, at: str, value: torch.Tensor, formula: ShapeFormula, here: Place
    ) -> Placed:
        """As place(), without the cache. value: this rank's, of any shape."""
        evidence, placement, local = self.evidence(name, at, value, formula.path)
        name += " input" if at == "input" else ""  # the name that a declaration uses
        whole = here.whole(formula)
        batch = self.batch_dim(name.removesuffix(" input"), at, formula.path)
        expected = for_rows(whole, here.own(formula), formula, batch)
        if placement is None:
            evidence, placement = "scan", inferred(local.shape, expected, here, name)
        sharded = checked(placement, local.shape, expected, here, name, evidence)
        return Placed(
            local, evidence, placement, local_shard(whole, formula, sharded, here, name, batch)
        )

    def evidence(
        self, name: str, at: str, value: torch.Tensor, path: str
    ) -> tuple[str, Placement | None, torch.Tensor]:
        """(kind of evidence, placement over tp, local tensor) by the first evidence; placement
        None leaves it to the scan.

        value: this rank's, of any shape; the local tensor has this rank's shape, once its
        collective has ended. PlacementError: the placement is one that cannot be put together."""
        if isinstance(value, DTensor):
            return "dtensor", plain(tp_placement(value), name), waited(value.to_local())
        local = waited(value)
        for glob, of, placed in self.declared:
            if of == at and placed.placement is not None and match(glob, name):
                return "declared", placed.placement, local
        style = self.styles.get(name)
        if STRIDED.get(style or "") == at and self.layout.tp > 1:
            raise PlacementError(
                f"{name} is {style} over tp={self.layout.tp}: each rank's columns are interleaved "
                "in the whole; "
                "hook the modules around it"
            )
        planned = PLANNED.get(STYLES.get(style or "", {}).get(at, ""))
        first = path in ("", "0", "input", "hidden_states")
        if planned is not None and self.layout.tp > 1 and first:
            return "plan", planned, local
        by_class = self._by_class(name, at, path) if self.layout.tp > 1 else None
        if by_class is not None and by_class.placement is not None:
            return "class", plain(by_class.placement, f"{name} {at}"), local
        return "scan", None, local

    def batch_dim(self, name: str, at: str, path: str) -> int | str | None:
        """The dim of the batch's rows, as declared or by class. NO_BATCH: it has none. None:
        nothing tells."""
        for glob, of, placed in self.declared:
            if of == at and placed.batch is not None and match(glob, name):
                return placed.batch
        by_class = self._by_class(name, at, path)
        return None if by_class is None else by_class.batch

    def _by_class(self, name: str, at: str, path: str) -> LayerPlacement | None:
        parent = self.modules.get(name.rpartition(".")[0]) if name else None
        return layer_placement(name, self.modules.get(name), at, path, parent)


def aimed(key: str) -> tuple[str, str]:
    """(glob, at) of a declaration's key. A key names a module's output, or its input if it ends in
    " input".

    >>> aimed("model.layers.*.mlp"), aimed("lm_head input")
    (('model.layers.*.mlp', 'output'), ('lm_head', 'input'))
    """
    glob, space, at = key.rpartition(" ")
    return (glob, at) if space and at in ("input", "output") else (key, "output")


def plain(placement: Placement, name: str) -> Placement:
    """The placement, if it is one that can be put together here; else PlacementError."""
    if type(placement) in (Shard, Replicate) or (
        type(placement) is Partial and placement.reduce_op == "sum"
    ):
        return placement
    raise PlacementError(
        f"{name} is {placement} over tp: that is no sum, or its parts lie interleaved in the "
        "whole, and is not put "
        "together here; hook the modules around it"
    )


NO_BATCH = "none"


@dataclass(frozen=True)
class Declared:
    """placement: over tp. batch: the dim of the batch's rows, or NO_BATCH. None: not declared."""

    placement: Placement | None = None
    batch: int | str | None = None


def parse(text: str) -> Declared:
    """A declared placement.

    >>> parse("shard:-1"), parse("batch:1 replicate"), parse("batch:none").batch
    (Declared(placement=Shard(dim=-1), batch=None), Declared(placement=Replicate(), batch=1),
    'none')
    """
    found = Declared()
    for word in text.split() if isinstance(text, str) else ():
        shard, batch = (
            re.fullmatch(r"shard:(-?\d+)", word),
            re.fullmatch(r"batch:(-?\d+|none)", word),
        )
        if batch and found.batch is None:
            found = replace(found, batch=NO_BATCH if batch[1] == NO_BATCH else int(batch[1]))
        elif (shard or word in PLACEMENTS) and found.placement is None:
            found = replace(found, placement=Shard(int(shard[1])) if shard else PLACEMENTS[word])
        else:
            break
    else:
        if found != Declared():
            return found
    raise PlacementError(
        "a placement is 'shard:DIM', 'replicate' or 'partial' over tp, and 'batch:DIM' or "
        "'batch:none' for the rows "
        f"of a batch, like 'batch:1 shard:0'; not {text!r}"
    )


PLACEMENTS: dict[str, Placement] = {"replicate": Replicate(), "partial": Partial()}


def tp_placement(value: DTensor) -> Placement:
    """A DTensor's placement over tp: its only axis, or the one named "tp". PlacementError: it has
    neither."""
    names = value.device_mesh.mesh_dim_names or ()
    if len(value.placements) == 1:
        return value.placements[0]
    if "tp" not in names:
        raise PlacementError(
            f"a DTensor over {names or 'unnamed axes'} has no tp axis: {value.placements}"
        )
    return value.placements[names.index("tp")]


def inferred(local: Sequence[int], expected: Sequence[int], here: Place, name: str) -> Placement:
    """The placement that explains the local shape: equal to the expected one, or different in
    exactly one dim.

    PlacementError: neither."""
    if tuple(local) == tuple(expected):
        return Replicate()
    smaller = [dim for dim, (a, b) in enumerate(zip(local, expected, strict=False)) if a != b]
    if len(local) == len(expected) and len(smaller) == 1 and here.layout.tp > 1:
        return Shard(smaller[0])
    raise PlacementError(
        f"{name}: this rank holds {tuple(local)}, the unsharded model's value is {tuple(expected)} "
        "for its rows; "
        f"no one split over tp={here.layout.tp} explains it: declare it, "
        f"placements={{{name!r}: 'shard:-1'}}"
    )


def checked(
    placement: Placement,
    local: Sequence[int],
    expected: Sequence[int],
    here: Place,
    name: str,
    evidence: str,
) -> Box:
    """This rank's part over tp. PlacementError: the local shape contradicts the placement."""
    want = list(expected)
    part = WHOLE
    if isinstance(placement, Shard):
        if not -len(want) <= placement.dim < len(want):
            raise PlacementError(
                f"{name}: {evidence} says {placement}, but the value has {len(want)} dims: {want}"
            )
        dim = placement.dim % len(want)
        start, stop = chunk(want[dim], here.layout.tp, here.tp)
        want[dim] = stop - start
        part = WHOLE.plus(dim, start, stop)
    if tuple(local) != tuple(want):
        raise PlacementError(
            f"{name}: {evidence} says {placement} over tp={here.layout.tp}, so rank {here.rank} "
            "should hold "
            f"{tuple(want)}; it holds {tuple(local)}: declare it, "
            f"placements={{{name!r}: 'shard:-1'}}"
        )
    return part


def for_rows(
    whole: tuple[int, ...], rows: tuple[int, ...], formula: ShapeFormula, said: int | str | None
) -> tuple[int, ...]:
    """The whole's shape with this rank's rows only. rows: the shape with them in every dim of the
    batch.

    said: as in local_shard()."""
    if not isinstance(said, int) or len(formula.batched) < 2:
        return rows
    return tuple(
        a if dim == said % len(rows) else b
        for dim, (a, b) in enumerate(zip(rows, whole, strict=True))
    )


def local_shard(
    whole: Sequence[int],
    formula: ShapeFormula,
    part: Box,
    here: Place,
    name: str,
    said: int | str | None = None,
) -> Box:
    """The part of the whole that this rank holds: its rows of the batch, its part over tp.

    said: the dim of the rows by declaration or class; without it the formula decides.
    PlacementError: the dim of the rows, or their order, is unknown."""
    dims = formula.batched
    if here.layout.batch_groups == 1 or not dims:
        return part
    if isinstance(said, int):
        said %= len(whole)
        if said not in dims:
            raise PlacementError(
                f"{name}: its rows are said to be along dim {said}, but it is {formula}"
            )
        return with_rows(part, said, whole[said], here, name)
    if len(dims) > 1:
        raise PlacementError(
            f"{name} is {formula}: dims {' and '.join(map(str, dims))} could both be the batch, "
            "which is split "
            f"{here.layout.batch_groups} ways; say which it is, "
            f"placements={{{name!r}: 'batch:{dims[0]}'}}"
        )
    factor, term = (formula.dims or ())[dims[0]]
    if term == "B" and factor > 1:
        raise PlacementError(
            f"{name}: dim {dims[0]} has {factor} entries for each row of the batch, in an order "
            "that is not known, and "
            f"the batch is split {here.layout.batch_groups} ways; hook the modules around it"
        )
    return with_rows(part, dims[0], whole[dims[0]], here, name)


def with_rows(part: Box, dim: int, size: int, here: Place, name: str) -> Box:
    """The part, restricted to this rank's rows along `dim`. PlacementError: that dim is also split
    over tp."""
    if dim in part.dims:
        raise PlacementError(
            f"{name}: dim {dim} is split over the batch and over tp; its order is not known"
        )
    unit = size // here.B
    return part.plus(dim, here.rows[0] * unit, here.rows[1] * unit)


def rows_held(part: Box, dim: int, local: Sequence[int], here: Place, name: str) -> Box:
    """As with_rows(), for a value without a formula whose rows are declared to lie along `dim`."""
    if not -len(local) <= dim < len(local) or local[dim] % here.local_rows:
        raise PlacementError(
            f"{name}: its {here.local_rows} rows are said to lie along dim {dim}, but rank "
            f"{here.rank} holds "
            f"{tuple(local)}"
        )
    return with_rows(part, dim % len(local), local[dim] // here.local_rows * here.B, here, name)
