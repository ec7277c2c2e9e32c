"""What crosses a process: frozen dataclasses of plain data, nothing that needs torch."""

from __future__ import annotations

import functools
import hashlib
import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .boxes import WHOLE, Box
from .names import split_point
from .sites import BEFORE, Site

__all__ = [
    "AT",
    "AXES",
    "REDUCTIONS",
    "STYLES",
    "Blob",
    "CaptureKey",
    "Coordinate",
    "EditSpec",
    "ErrorReport",
    "Generation",
    "HookSet",
    "HookSpec",
    "Layout",
    "ModelInfo",
    "ModuleInfo",
    "Owner",
    "ParameterShard",
    "RankInfo",
    "RankState",
    "Reduction",
    "Region",
    "RunPlan",
    "RunReport",
    "ShapeFormula",
    "ShardRecord",
    "SlabValue",
    "Source",
    "Training",
    "Unsharded",
    "dtype_name",
]

AXES = ("pp", "dp", "fsdp", "tp")
# The values of a module that a hook can be at
AT = ("output", "input", "grad_output", "grad_input", "param_grad")
# What a hook can keep of a value instead of it → of how many statistics a part of it is known
REDUCTIONS = {"sum": 1, "mean": 2, "var": 3, "std": 3, "norm": 1, "amax": 1, "amin": 1}


class Coordinate(NamedTuple):
    """Where a rank sits: its index along each axis of the mesh. batch: which share of a batch's
    rows it runs, counted over dp and fsdp."""

    pp: int
    dp: int
    fsdp: int
    tp: int
    batch: int


@dataclass(frozen=True)
class Layout:
    """How many ways each axis of the device mesh is split. Ranks count row-major over (pp, dp,
    fsdp, tp)."""

    pp: int = 1
    dp: int = 1
    fsdp: int = 1
    tp: int = 1

    @property
    def world(self) -> int:
        return self.pp * self.dp * self.fsdp * self.tp

    @property
    def batch_groups(self) -> int:
        """Over how many groups of ranks the rows of a batch are split."""
        return self.dp * self.fsdp

    def coordinate(self, rank: int) -> Coordinate:
        """Where a rank sits.

        >>> Layout(pp=2, dp=2, tp=2).coordinate(5)
        Coordinate(pp=1, dp=0, fsdp=0, tp=1, batch=0)
        """
        rest, tp = divmod(rank, self.tp)
        rest, fsdp = divmod(rest, self.fsdp)
        pp, dp = divmod(rest, self.dp)
        return Coordinate(pp, dp, fsdp, tp, batch=dp * self.fsdp + fsdp)

    def __str__(self) -> str:
        used = [f"{axis}={getattr(self, axis)}" for axis in AXES if getattr(self, axis) > 1]
        return " × ".join(used) or "one engine"


def either(layouts: Sequence[Layout]) -> str:
    """Layouts to choose from, in words.

    >>> either([Layout(tp=2), Layout(pp=2), Layout(dp=2)])
    'tp=2, pp=2 or dp=2'
    """
    *most, last = map(str, layouts)
    return f"{', '.join(most)} or {last}" if most else last


@dataclass(frozen=True)
class RankInfo:
    """Which rank this process is. local_rank: its number among the ranks of its host, which is
    also its GPU's. hosts: rank → host."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    generation: int = 0
    hosts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Owner:
    """A driver process that has engines. start_time: when its process began, in seconds since the
    host's boot. since: when it attached, in seconds since 1970."""

    driver: str
    host: str
    pid: int
    start_time: float
    since: float


def dtype_name(dtype: Any) -> str:
    """A torch dtype as text that getattr(torch, ...) takes: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Source:
    """Where a model comes from: a folder or hub id, or a user's functions (cloudpickled) that
    build it.

    builder: returns a rank's module, however it was distributed; reference: returns the unsharded
    one, for the scan. forward: (model, batch) → output, where the signature does not say how it is
    called. names: the rank's module names → the unsharded model's, a mapping of prefixes or a
    function."""

    path: str
    builder: bytes | None = field(default=None, repr=False)
    reference: bytes | None = field(default=None, repr=False)
    forward: bytes | None = field(default=None, repr=False)
    names: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Region:
    """Where a tensor lies: bytes from `offset` of the slab file of that name, contiguous."""

    slab: str
    offset: int
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class SlabValue:
    """A capture that still lies in a slab, as what an edit patches in."""

    region: Region
    slab_bytes: int


@dataclass(frozen=True)
class ShapeFormula:
    """A value's whole shape for any batch: each dim is a coefficient times one of "", B, S, P+S,
    B*S, ..."""

    path: str  # of the leaf within the value
    dims: tuple[tuple[int, str], ...] | None  # None: it depends on the data, no formula gives it
    dtype: str

    def shape(self, B: int, S: int, past: int = 0, window: int = 0) -> tuple[int, ...]:
        assert self.dims is not None
        terms = {
            "": 1,
            "B": B,
            "S": S,
            "P": past,
            "P+S": past + S,
            "B*S": B * S,
            "W+S": min(past, window - 1) + S if window else past + S,
        }
        return tuple(factor * terms[term] for factor, term in self.dims)

    def dims_of(self, *terms: str) -> list[int]:
        """The dims that are a multiple of one of these terms."""
        return [dim for dim, (_, term) in enumerate(self.dims or ()) if term in terms]

    @property
    def rows(self) -> int | None:
        """The dim of the batch's rows alone; None: there is none."""
        return next(iter(self.dims_of("B")), None)

    @property
    def positions(self) -> int | None:
        """The dim of the run's positions alone, that of the queries first; None: there is none."""
        return next(iter(self.dims_of("S") or self.dims_of("P+S", "W+S")), None)

    @property
    def folded(self) -> int | None:
        """The dim in which rows and positions lie together; None: there is none."""
        return next(iter(self.dims_of("B*S")), None)

    @property
    def batched(self) -> list[int]:
        """The dims along which the rows of a batch lie."""
        return self.dims_of("B", "B*S")

    def broadcast(self, mask: Any) -> Any:
        """A (B, S) bool tensor as a view that broadcasts over a value of this formula. Without
        rows a position counts if it does in any row. None: the value has no positions."""
        shape = [1] * len(self.dims or ())
        if self.folded is not None:
            shape[self.folded] = -1
            return mask.reshape(shape)
        if self.positions is None:
            return None
        if self.rows is None:
            mask = mask.any(0)
        else:
            shape[self.rows] = mask.shape[0]
            mask = mask if self.rows < self.positions else mask.T
        shape[self.positions] = -1
        return mask.reshape(shape)

    def __str__(self) -> str:
        if self.dims is None:
            return "depends on the data"
        return (
            "×".join(
                term if f == 1 and term else f"{f}{term}" if term else str(f)
                for f, term in self.dims
            )
            or "scalar"
        )


@dataclass(frozen=True)
class Blob:
    """A small tensor as plain data, for an edit that takes one."""

    shape: tuple[int, ...]
    dtype: str
    data: bytes

    def __repr__(self) -> str:
        """Short, and another for other numbers: the digest of a HookSet is made of it."""
        return f"Blob({self.shape}, {self.dtype}, sha256 {hashlib.sha256(self.data).hexdigest()})"


@dataclass(frozen=True)
class EditSpec:
    """A named function that changes activations: x, ctx → x, as cloudpickled code.

    per: "whole" sees the whole activation, "row" each batch row by itself, "element" the shards as
    they lie."""

    name: str
    per: str
    code: bytes = field(repr=False)


@dataclass(frozen=True)
class Reduction:
    """What is kept of a value instead of it: op over these dims, all of them where none are named.

    >>> str(Reduction("mean", (0, 1))), str(Reduction("amax"))
    ('mean:0,1', 'amax')
    """

    op: str
    dims: tuple[int, ...] = ()

    def over(self, ndim: int) -> tuple[int, ...]:
        """The dims of a value of so many, counted from the first. IndexError: it has no such
        dim."""
        outside = [dim for dim in self.dims if not -ndim <= dim < ndim]
        if outside:
            raise IndexError(outside[0])
        return tuple(sorted({dim % ndim for dim in self.dims})) or tuple(range(ndim))

    def __str__(self) -> str:
        return self.op + (":" + ",".join(map(str, self.dims)) if self.dims else "")


@dataclass(frozen=True)
class HookSpec:
    """One `%flex_hook` line. Its name is its identity; a second hook of that name replaces the
    first.

    edit: the name of an edit that is made there, a preset's or a defined one; value: what a preset
    takes. positions, heads, neurons: without an edit the positions to keep, with one where it is
    made. capture: what is kept of an edited activation, as it is "after" the edit or "before",
    "both", or "none" of it. reduce: only this is kept of it."""

    glob: str
    at: str = "output"
    index: str | None = None  # path of a leaf; None is the first tensor leaf
    name: str = ""
    groups: tuple[str, ...] = ()
    positions: tuple[int, ...] | None = None
    edit: str | None = None
    value: float | tuple[float, ...] | Blob | SlabValue | None = None
    heads: tuple[int, ...] | None = None
    neurons: tuple[int, ...] | None = None
    capture: str = "after"
    reduce: Reduction | None = None

    @property
    def site(self) -> Site:
        return Site.parse(self.glob, self.at)

    @functools.cached_property
    def gradient(self) -> bool:
        """Whether it reads a gradient, which only a run with a loss has."""
        return self.site.gradient

    @functools.cached_property
    def of(self) -> str:
        """The value that it reads, or whose gradient it reads: "output", "input" or "param"."""
        return self.site.of

    @property
    def before(self) -> str:
        """The `at` of the value as it was before this hook's edit."""
        return f"{self.at} {BEFORE}"

    @property
    def kept_positions(self) -> tuple[int, ...] | None:
        """The positions that a capture of it keeps; None: all."""
        return None if self.edit is not None else self.positions

    @property
    def kept_at(self) -> tuple[str, ...]:
        """The `at` of each capture that it makes of a value."""
        both = {"before": (self.before,), "both": (self.before, self.at), "none": ()}
        return both.get(self.capture, (self.at,))

    @functools.cached_property
    def key(self) -> str:
        """Its identity: the name it was given, else what it reads."""
        if self.name:
            return self.name
        return str(self.site) + (f" [{self.index}]" if self.index is not None else "")


@dataclass(frozen=True)
class HookSet:
    """The hooks of a session in order of registration, and the groups that are switched off.

    Driver and engines hold equal ones: a run names the digest, and an engine whose set differs
    refuses.
    """

    hooks: tuple[HookSpec, ...] = ()
    off: frozenset[str] = frozenset()

    def put(self, spec: HookSpec) -> HookSet:
        """With this hook: in the place of the one of its name, else at the end."""
        keys = [hook.key for hook in self.hooks]
        at = keys.index(spec.key) if spec.key in keys else len(keys)
        return self._of((*self.hooks[:at], spec, *self.hooks[at + 1 :]))

    def without(self, keys: Sequence[str]) -> HookSet:
        return self._of(tuple(hook for hook in self.hooks if hook.key not in keys))

    def _of(self, hooks: tuple[HookSpec, ...]) -> HookSet:
        """These hooks instead; a group that has none any more is not off any more either."""
        return HookSet(hooks, self.off & {group for hook in hooks for group in hook.groups})

    @property
    def groups(self) -> dict[str, list[str]]:
        """Group → keys of its hooks."""
        found: dict[str, list[str]] = {}
        for hook in self.hooks:
            for group in dict.fromkeys(hook.groups):
                found.setdefault(group, []).append(hook.key)
        return found

    def active(self, groups: Sequence[str] = (), complement: bool = False) -> list[HookSpec]:
        """The hooks a run fires: those of the groups (or all others), else all that no group
        switches off."""
        if groups:
            return [
                hook for hook in self.hooks if bool(set(hook.groups) & set(groups)) != complement
            ]
        return [hook for hook in self.hooks if not set(hook.groups) & self.off]

    @functools.cached_property
    def digest(self) -> int:
        """63 bits that say which hooks these are, alike in every process."""
        text = repr((self.hooks, sorted(self.off)))
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


@dataclass(frozen=True)
class ModuleInfo:
    """A module of the unsharded model. stages: the pipeline stages that hold it, in order."""

    name: str
    cls: str
    num_parameters: int
    stages: tuple[int, ...] = (0,)
    spans: bool = False  # something beneath it lies on another set of stages

    def read_on(self, at: str) -> int:
        """The stage that reads its "output" or "input"."""
        return self.stages[-1] if self.spans and at == "output" else self.stages[0]


# transformers' tensor-parallel styles → what a module's first input and its output are over tp, as
# torch writes a placement.
STYLES: dict[str, dict[str, str]] = {
    "colwise": {"input": "Replicate()", "output": "Shard(-1)"},
    "colwise_gather_output": {"input": "Replicate()", "output": "Replicate()"},
    "rowwise": {"input": "Shard(-1)", "output": "Replicate()"},
    "embedding_rowwise": {"input": "Replicate()", "output": "Replicate()"},
    "moe_tp_experts": {"input": "Replicate()", "output": "Replicate()"},
    "all_reduce": {"output": "Replicate()"},
}


@dataclass(frozen=True)
class ModelInfo:
    """What the driver knows of a loaded model: all of it plain data, so that a new driver can ask
    for it again."""

    path: str
    cls: str
    layout: Layout
    dtype: str
    attention: str
    modules: tuple[ModuleInfo, ...]
    # (module name or virtual point, "output" | "input") → for each call in a forward, its leaves
    scan: dict[tuple[str, str], tuple[tuple[ShapeFormula, ...], ...]]
    num_parameters: int
    rank_parameters: tuple[int, ...]
    rank_bytes: tuple[int, ...]
    vocab_size: int | None
    max_positions: int | None
    window: int = 0
    # declared by the user: glob → placement
    placements: dict[str, str] = field(default_factory=dict)
    # of the model's own parallel plan: name → style
    styles: dict[str, str] = field(default_factory=dict)
    built: bool = False  # by a user's function; path is its name
    # and buffers: name → whole shape
    parameters: dict[str, tuple[int, ...]] = field(default_factory=dict)
    buffers: frozenset[str] = frozenset()  # which of these are no parameters
    tied: tuple[tuple[str, ...], ...] = ()  # names that are of one parameter

    @property
    def names(self) -> list[str]:
        """Every name a hook can have: modules, then virtual points."""
        return [m.name for m in self.modules] + [
            n for n, at in self.scan if split_point(n)[1] and at == "output"
        ]

    def __repr__(self) -> str:
        lines = [
            f"{self.cls}: {self.num_parameters:,} parameters, {len(self.modules)} modules, "
            f"{self.layout}, {self.dtype}, attention {self.attention}"
        ]
        if self.layout.world > 1:
            ranks = zip(self.rank_parameters, self.rank_bytes, strict=True)
            for rank, (parameters, num_bytes) in enumerate(ranks):
                lines.append(f"  rank {rank}: {parameters:,} parameters, {num_bytes / 1e6:,.1f} MB")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(repr(self))}</pre>"


@dataclass(frozen=True)
class CaptureKey:
    """Which value of a run: a hook's value at one module, one leaf, one call.

    at: a Site's: "output before" is the output as it was before the hook's edit; "output norm:-1"
    is what was kept of it instead."""

    hook: str
    module: str
    at: str = "output"
    index: str = ""
    call: int = 0

    @property
    def site(self) -> Site:
        return Site.parse(self.module, self.at)

    def __str__(self) -> str:
        text = str(self.site) + (f" [{self.index}]" if self.index else "")
        return text + (f" call {self.call}" if self.call else "")


@dataclass(frozen=True)
class Generation:
    """How a run goes on after its prompt: one token a forward, at most max_new_tokens of them.

    options: those of transformers' generate, plain data. seed: of what it draws. pad_id: what
    follows a row's end. stamp: marks the tokens that this run writes into its slab, where whoever
    looks finds them as they come."""

    max_new_tokens: int
    options: tuple[tuple[str, Any], ...] = ()
    seed: int = 0
    pad_id: int = 0
    stamp: int = 1


@dataclass(frozen=True)
class Training:
    """One step after a backward. optimizer: a user's function (cloudpickled) that makes one, None
    is AdamW; parameters: of the model, by name; modules: trainable ones, by name."""

    optimizer: bytes | None
    parameters: tuple[str, ...]
    modules: tuple[str, ...]


@dataclass(frozen=True)
class RunPlan:
    """One run, before it: the whole batch, and where its captures will lie. Every rank gets the
    same."""

    run: int
    ids: list[list[int]]
    mask: list[list[int]]
    positions: list[list[int]]
    hooks: int  # digest of the HookSet
    slab: str
    slab_bytes: int
    base: int
    num_bytes: int
    groups: tuple[str, ...] = ()
    complement: bool = False
    stop_at: str | None = None
    # keep only the last position's logits: all of them would not be small
    logits_last: bool = False
    timeout_s: float = 60.0
    seed: int = 0  # of what edits draw
    freed: tuple[int, ...] = ()  # runs that the driver's store has let go
    generation: Generation | None = None
    training: Training | None = None
    # a user's function (cloudpickled), or the name of one of ours: go back from it
    loss: bytes | str | None = None


@dataclass(frozen=True)
class ShardRecord:
    """What one rank reports of one capture.

    shard: the part of the whole that lies on this rank. written: the part that it copied into the
    slab; ranks that hold the same part share the copying. None: it copied nothing. digest: a
    checksum of its shard, if other ranks hold the same part and must have the same numbers; 0 if
    none does. nan: an edit put a NaN into a value that had none. region: where the value lies, if
    not in its planned place. partial: the value is one of that many addends of a sum over tp.
    """

    evidence: str
    placement: str
    digest: int = 0
    shard: Box = WHOLE
    written: Box | None = WHOLE
    region: Region | None = None
    partial: int = 0
    error: tuple[str, str] | None = None
    nan: bool = False


@dataclass(frozen=True)
class ParameterShard:
    """What one rank holds of a parameter: the whole's shape and dtype, and its part. In `shard` a
    dim occurs once for each run of it."""

    shape: tuple[int, ...]
    dtype: str
    shard: Box
    evidence: str
    placement: str


@dataclass(frozen=True)
class RunReport:
    """One rank's answer to a RunPlan. planned: index in the plan → ShardRecord; others: values
    that had no planned place."""

    rank: int
    run: int
    planned: dict[int, ShardRecord]
    others: dict[CaptureKey, ShardRecord]
    seconds: dict[str, float]
    stopped: bool = False
    edited: dict[CaptureKey, ShardRecord] = field(
        default_factory=dict
    )  # what was there before each edit
    forwards: int = 1
    # row of the batch → its new tokens, up to its end
    generated: dict[int, list[int]] = field(default_factory=dict)
    loss: float | None = None  # of the rank that computed it
    note: str = ""  # what makes this engine's copies slower than they could be


@dataclass(frozen=True)
class RankState:
    """What an engine is given that takes a dead one's rank: the model and where it comes from,
    hooks, edits, and what the dead one had reported of each stored run."""

    info: ModelInfo
    source: Source
    hook_set: HookSet
    edits: dict[str, EditSpec]
    runs: dict[int, tuple[RunPlan, tuple[HookSpec, ...], RunReport]]
    # trainable: code, weights as safetensors
    modules: dict[str, tuple[bytes, bytes]] = field(default_factory=dict)


@dataclass(frozen=True)
class Unsharded:
    """One rank's answer to the driver that verifies: a forward of the unsharded model, written
    into a slab.

    order: indices in the plan, as their values came. failed: index → why there is no value.
    yardstick: index → in half precision, the unsharded model's drift from itself in float32.
    streamed: one layer's weights at a time. samples: parameter → some of its numbers."""

    order: tuple[int, ...]
    failed: dict[int, str]
    yardstick: dict[int, float]
    streamed: bool
    samples: dict[str, list[float]]
    seconds: float


@dataclass(frozen=True)
class ErrorReport:
    """An engine raised. time: when, in seconds since the epoch; the earliest of several is the
    cause.

    broken: the process groups were broken to free the other ranks and must be made anew. waited:
    in which module this rank waited for others when nothing moved any more.
    """

    rank: int
    type: str
    message: str
    traceback: str
    time: float
    broken: bool = False
    secondary: bool = False  # it only says that another rank failed
    waited: str = ""
    # what the rank had done of the run, as it was after one forward or another
    partial: tuple[RunReport, ...] = ()
