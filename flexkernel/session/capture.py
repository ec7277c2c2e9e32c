"""Capture: one activation of a run, whole. It lies in slabs; looking at it on the same host moves
nothing."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import torch

from flexkernel.errors import CaptureError, CaptureExpired
from flexkernel.memory import reduce
from flexkernel.memory.pool import Extent
from flexkernel.memory.slab import Slab, pages, size_of
from flexkernel.wire import CaptureKey, Region, ShardRecord, SlabValue, dtype_name

from .failures import failure
from .files import whole_file
from .tensorlike import TensorLike

__all__ = ["Capture", "Home", "Location", "Value", "draw", "ranks_text"]

NO_RECORDS: Mapping[int, ShardRecord] = MappingProxyType({})
Dims = int | Sequence[int] | None


class Home(Protocol):
    """Where a capture's bytes are: what the session's store of runs gives it."""

    here: str
    hosts: list[str]  # rank → host

    def slab(self, name: str, num_bytes: int) -> Slab: ...
    def client(self, host: str) -> Any: ...


@dataclasses.dataclass(frozen=True)
class Value:
    """Which value a capture is: its key, and its whole shape and dtype.

    tokens: each row's, as text. mask: (B, positions) bool, which of a run's positions are real:
    False on pads, and in a generation after the token before a row's last one; None where the
    value has no positions."""

    key: CaptureKey
    shape: tuple[int, ...]
    dtype: torch.dtype
    tokens: list[list[str]] | None = None
    mask: torch.Tensor | None = None


@dataclasses.dataclass(frozen=True)
class Location:
    """Where a capture's bytes are.

    region: its planned place; None: each rank keeps its part in a file of its own. extent: the
    run's bytes, which are not used again while a tensor looks into them. cut: takes what there is
    out of what was planned. covers: the shape that the ranks' parts make together, where it is not
    the value's own."""

    home: Home
    region: Region | None = None
    extent: Extent | None = None
    cut: Callable[[torch.Tensor], torch.Tensor] | None = None
    covers: tuple[int, ...] | None = None

    @property
    def planned(self) -> Region:
        """The region, of a capture that has one."""
        assert self.region is not None
        return self.region

    def pin(self) -> Callable[[], None]:
        """Keep the bytes from being used again; call the result to let go."""
        return nothing if self.extent is None else self.extent.pin()

    def slab(self) -> Slab:
        """The slab of this host in which the region lies."""
        num_bytes = own_bytes(self.planned) if self.extent is None else self.extent.slab_bytes
        return self.home.slab(self.planned.slab, num_bytes)

    def shown(self, planned: torch.Tensor) -> torch.Tensor:
        """What there is, of the value's shape, of a tensor of the planned shape."""
        return planned if self.cut is None else self.cut(planned)


class Capture(TensorLike):
    """One activation, behaving as if the model were on one device. It behaves like a tensor, too:
    `a - b`, `torch.softmax(a, -1)`, `a[0, -1]`; what is read of it is a plain tensor of yours.

    key: which module, where, which leaf and call. shape, dtype: of the whole. evidence: how its
    placement is known. records: rank → what that rank reported. tokens, mask: see Value. error:
    why it cannot be read, None if it can.
    """

    def __init__(self, of: Value, lies: Location, records: Mapping[int, ShardRecord]):
        self.key = of.key
        self.shape = tuple(of.shape)
        self.dtype = of.dtype
        self.tokens = of.tokens
        self.mask = of.mask
        self.records: Mapping[int, ShardRecord] = dict(records)
        self.verified = False
        self.give_back: Callable[[], None] | None = None  # of a capture that belongs to no run
        self._lies = lies
        self._expired = ""
        self._summary: tuple[str, str] | None = None  # (placement, evidence), once it has expired
        self.error = failure(of.key, self.records, lies.covers or self.shape)

    # --- what it is -------------------------------------------------------------------

    @property
    def name(self) -> str:
        return str(self.key)

    @property
    def num_bytes(self) -> int:
        """Of the whole tensor."""
        return size_of(self.shape, dtype_name(self.dtype))

    @property
    def evidence(self) -> str:
        """How the placement is known: dtensor, plan, class, scan+digest or declared; described:
        one rank had it all.

        verified: this value of this model was compared with the unsharded one's, and equal
        (session.verify())."""
        if self._summary is not None:
            return self._summary[1]
        kinds = sorted({record.evidence for record in self._good_records()})
        if self.verified and kinds:
            return "verified"
        return "/".join("scan+digest" if kind == "scan" else kind for kind in kinds) or "none"

    @property
    def placement(self) -> str:
        """Over the tp axis, in torch's words."""
        if self._summary is not None:
            return self._summary[0]
        return "/".join(sorted({record.placement for record in self._good_records()})) or "unknown"

    def _good_records(self) -> list[ShardRecord]:
        return [record for record in self.records.values() if record.error is None]

    @property
    def shards(self) -> list[tuple[int, list[int], list[str]]]:
        """For each dim that is split over ranks: (dim, where the parts end, which ranks hold
        each)."""
        by_dim: dict[int, dict[tuple[int, int], list[int]]] = {}
        for rank, record in sorted(self.records.items()):
            if record.error is not None:
                continue
            for dim, start, stop in record.shard:
                if stop > start:
                    by_dim.setdefault(dim, {}).setdefault((start, stop), []).append(rank)
        found = []
        for dim, parts in sorted(by_dim.items()):
            if len(parts) > 1:
                ends = [stop for _, stop in sorted(parts)]
                found.append((dim, ends, [ranks_text(parts[part]) for part in sorted(parts)]))
        return found

    @property
    def is_partial(self) -> bool:
        """Whether the ranks hold addends of it, kept apart and summed when it is read."""
        return any(record.partial for record in self.records.values())

    def __repr__(self) -> str:
        if self.error is not None:
            return f"<Capture {self.name}: {type(self.error).__name__}>"
        kind = dtype_name(self.dtype)
        return f"<Capture {self.name} {self.shape} {kind}, {self.placement} by {self.evidence}>"

    # --- looking ----------------------------------------------------------------------

    def tensor(self) -> torch.Tensor:
        """The whole activation, of shape self.shape and dtype self.dtype, on the CPU, yours to
        change. On the same host it is a copy-on-write view, at once.

        CaptureExpired: the run was freed. PlacementError: where the shards lie is not known."""
        self._check()
        if not self._is_view():
            return self._assemble()
        lies = self._view()
        return lies.shown(lies.slab().private(lies.planned, lies.pin()))

    def __getitem__(self, index: Any) -> torch.Tensor:
        """A slice, in memory of its own."""
        self._check()
        if self._is_view():
            return self._shared()[index].clone()
        client = self._client()
        if client is not None:
            return client.slice(self._lies.region, index)
        return self._assemble()[index].clone()

    def sum(self, dim: Dims = None, keepdim: bool = False) -> torch.Tensor:
        """The sum over `dim` (all dims by default): its shape without these dims, in float32 or
        float64, on the CPU."""
        return self._reduced("sum", dim, keepdim)

    def mean(self, dim: Dims = None, keepdim: bool = False) -> torch.Tensor:
        """The mean over `dim`: its shape without these dims, in float32 or float64, on the CPU."""
        return self._reduced("mean", dim, keepdim)

    def norm(self, dim: Dims = None, keepdim: bool = False) -> torch.Tensor:
        """The 2-norm over `dim` (all dims by default): its shape without these dims, in float32 or
        float64, on the CPU."""
        return self._reduced("norm", dim, keepdim)

    def var(self, dim: Dims = None, keepdim: bool = False) -> torch.Tensor:
        """The variance over `dim`, unbiased: its shape without these dims, in float32 or
        float64."""
        return self._reduced("var", dim, keepdim)

    def std(self, dim: Dims = None, keepdim: bool = False) -> torch.Tensor:
        """The standard deviation over `dim`, unbiased: its shape without these dims, in float32 or
        float64."""
        return self._reduced("std", dim, keepdim)

    def amax(self, dim: Dims = None, keepdim: bool = False) -> torch.Tensor:
        """The largest over `dim`: its shape without these dims, its dtype, on the CPU."""
        return self._reduced("amax", dim, keepdim)

    def amin(self, dim: Dims = None, keepdim: bool = False) -> torch.Tensor:
        """The smallest over `dim`: its shape without these dims, its dtype, on the CPU."""
        return self._reduced("amin", dim, keepdim)

    def topk(
        self, k: int, dim: int = -1, largest: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(values, indices) of the k largest, or smallest, along dim."""
        values, indices = self._reduced("topk", dim, False, k=k, largest=largest)
        return values, indices

    def tiles(
        self, rows=None, cols=None, height: int = 256, width: int = 512, how: str = "extreme"
    ) -> torch.Tensor:
        """The activation as rows of its last dim, reduced to at most (height, width): what a
        picture needs."""
        return self._tiled("tiles", rows=rows, cols=cols, height=height, width=width, how=how)

    def bounds(
        self, rows=None, cols=None, height: int = 256, width: int = 512
    ) -> tuple[torch.Tensor, ...]:
        """(largest, smallest) of each tile, in one pass: (h, w) each, as `tiles`."""
        return self._tiled("bounds", rows=rows, cols=cols, height=height, width=width)

    def count_nan(self, rows=None, cols=None) -> int:
        """How many NaNs there are in these rows and columns, by default in all."""
        return self._tiled("count_nan", rows=rows, cols=cols)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write it as a safetensors file, under its name; the file appears whole or not at all.
        CaptureError: it could not be written."""
        from safetensors.torch import save_file

        tensor = self.tensor().contiguous()
        with whole_file(path, CaptureError) as part:
            save_file({self.name: tensor}, part)
        return Path(path)

    def show(self, as_: str = "map", **options: Any) -> Any:
        """An interactive view, with a static picture beside it."""
        self._check()
        return draw(self, as_, **options)

    # --- its memory -------------------------------------------------------------------

    def free(self) -> None:
        """Give a parameter's memory back now. Tensors that were read stay as they are."""
        if self.give_back is None:
            raise CaptureError(
                f"{self.name} belongs to a run, with all that it captured: run.free() gives it back"
            )
        self.expire("it was freed (free())")
        self.give_back()

    def as_value(self) -> SlabValue:
        """Where it lies, for an edit that patches it in. CaptureError: on another host, or in
        several places."""
        self._check()
        if not self._is_view() or self._lies.cut is not None:
            raise CaptureError(
                f"{self.name} does not lie in one piece of a slab of this host; give its .tensor()"
            )
        lies = self._view()
        extent = lies.extent
        return SlabValue(
            lies.planned, own_bytes(lies.planned) if extent is None else extent.slab_bytes
        )

    def pin(self) -> Callable[[], None]:
        """Keep its memory from being used again; call the result to let go."""
        return self._lies.pin()

    def move(self, extent: Extent, base: int) -> None:
        """Its bytes lie in another slab from now on, `base` bytes before where they lay; what was
        read before stays."""
        region = self._lies.region
        if region is not None:
            region = dataclasses.replace(region, slab=extent.slab, offset=region.offset - base)
            self._lies = dataclasses.replace(self._lies, region=region, extent=extent)

    def expire(self, why: str) -> None:
        """The store takes the memory back; what was read before stays readable.

        A notebook's Out[] keeps a capture for ever: it keeps what its repr says, and nothing of
        what each rank reported."""
        self._summary = self.placement, self.evidence
        self._expired = why
        self.records = NO_RECORDS
        self.mask = None
        self._lies = Location(self._lies.home)

    # --- inside -----------------------------------------------------------------------

    def _check(self) -> None:
        if self.error is not None:
            raise self.error.with_traceback(None)
        if self._expired:
            raise CaptureExpired(f"{self.name}: {self._expired}")

    def _reduced(self, op: str, dim: Any, keepdim: bool, **more: Any) -> Any:
        """One of the reductions of memory/reduce.py, made where the bytes are."""
        self._check()
        client = None if self._is_view() else self._client()
        if client is not None:
            return client.reduce(self._lies.region, op, dim, keepdim, **more)
        return reduce.partial(op, self._whole(), dim, keepdim, **more).value()

    def _tiled(self, op: str, **options: Any) -> Any:
        """One of the reductions for pictures, made where the bytes are."""
        self._check()
        client = None if self._is_view() else self._client()
        if client is not None:
            return getattr(client, op)(self._lies.region, **options)
        return getattr(reduce, op)(self._matrix(), **options)

    def _hosts(self) -> set[str]:
        """The hosts whose ranks wrote a part of it."""
        hosts = self._lies.home.hosts
        return {
            hosts[rank]
            for rank, record in self.records.items()
            if record.written is not None or record.region is not None
        }

    def _client(self) -> Any:
        """Who reads it on the one other host where all of it lies, side by side; None: it does not
        lie so."""
        hosts = self._hosts()
        lies = self._lies
        apart = self.is_partial or lies.cut is not None or lies.region is None
        if apart or len(hosts) != 1 or hosts == {lies.home.here}:
            return None
        return lies.home.client(hosts.pop())

    def _is_view(self) -> bool:
        """Whether all of it lies in one region of a slab that this process can map."""
        pieces = sum(record.region is not None for record in self.records.values())
        here = {self._lies.home.here}
        return not self.is_partial and self._hosts() <= here and pieces <= 1

    def _view(self) -> Location:
        """The one region in which all of it lies."""
        if self._lies.region is not None:
            return self._lies
        regions = (record.region for record in self.records.values())
        region = next(region for region in regions if region is not None)
        return dataclasses.replace(self._lies, region=region, extent=None)

    def _shared(self) -> torch.Tensor:
        """The shared map, of shape self.shape: to be read here, never handed out."""
        lies = self._view()
        return lies.shown(lies.slab().tensor(lies.planned))

    def _whole(self) -> torch.Tensor:
        """All of it, of shape self.shape, on the CPU: to be read here, never handed out."""
        return self._shared() if self._is_view() else self._assemble()

    def _matrix(self) -> torch.Tensor:
        """All of it as rows of its last dim: (rows, width), on the CPU; a scalar as (1, 1)."""
        whole = self._whole()
        return whole.reshape(-1, whole.shape[-1]) if whole.dim() else whole.reshape(1, 1)

    def _assemble(self) -> torch.Tensor:
        """The whole, of shape self.shape, in memory of its own: from each host's part, or as the
        sum of its addends."""
        if self.is_partial:
            return self._sum()
        client = self._client()
        if client is not None:
            return client.read(self._lies.region)
        region = self._lies.region
        planned = self.shape if region is None or self._lies.cut is None else region.shape
        whole = torch.empty(planned, dtype=self.dtype)
        for rank, record in self.records.items():
            if record.written is not None:
                for part in record.written.parts():
                    index = part.slices(self.ndim)
                    whole[index] = self._part(rank, index)
            elif record.region is not None:
                whole[record.shard.slices(self.ndim)] = self._own_part(rank, record.region)
        return self._lies.shown(whole)

    def _own_part(self, rank: int, region: Region) -> torch.Tensor:
        """What a rank keeps in a region of its own, of the region's shape and dtype, on the
        CPU."""
        home = self._lies.home
        host = home.hosts[rank]
        if host == home.here:
            return home.slab(region.slab, own_bytes(region)).tensor(region)
        return home.client(host).read(region)

    def _part(self, rank: int, index: tuple) -> torch.Tensor:
        """What a rank wrote into the planned region: the shape that the index picks, on the
        CPU."""
        lies = self._lies
        host = lies.home.hosts[rank]
        if host == lies.home.here:
            return lies.slab().tensor(lies.planned)[index]
        return lies.home.client(host).slice(lies.planned, index)

    def _sum(self) -> torch.Tensor:
        """The whole, of shape self.shape. Its addends are kept apart by the ranks and summed here
        in float32, or float64."""
        exact = torch.float64 if self.dtype == torch.float64 else torch.float32
        whole = torch.zeros(self.shape, dtype=exact)
        for rank, record in self.records.items():
            if record.region is not None:
                addend = self._own_part(rank, record.region)
                whole[record.shard.slices(self.ndim)] += addend.to(exact)
        return whole.to(self.dtype)


def draw(source: Any, as_: str = "map", **options: Any) -> Any:
    """The view of a capture, or of anything that a view can draw."""
    from flexkernel.views import show

    return show(source, as_, **options)


def own_bytes(region: Region) -> int:
    """The bytes of a file that holds this region alone."""
    return max(pages(size_of(region.shape, region.dtype)), pages(1))


def nothing() -> None:
    """There is nothing to let go of."""


def ranks_text(ranks: Sequence[int]) -> str:
    """Ranks in words.

    >>> ranks_text([0, 2]), ranks_text(range(8))
    ('rank 0, 2', 'ranks 0 to 7')
    """
    in_a_row = list(ranks) == list(range(ranks[0], ranks[0] + len(ranks)))
    if in_a_row and len(ranks) > 4:
        return f"ranks {ranks[0]} to {ranks[-1]}"
    return "rank " + ", ".join(map(str, ranks))
