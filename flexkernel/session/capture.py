"""Capture: one activation of a run, whole. It lies in slabs; looking at it on the same host moves
nothing."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import torch

from flexkernel import errors
from flexkernel.boxes import Box
from flexkernel.errors import CaptureError, CaptureExpired, PlacementError
from flexkernel.memory import reduce
from flexkernel.memory.plan import Entry
from flexkernel.memory.slab import Slab, pages, size_of
from flexkernel.wire import CaptureKey, Layout, Region, ShardRecord, SlabValue, dtype_name

from .files import whole_file

__all__ = ["Capture", "Home", "Reduced", "draw"]


NOTHING_SEEN: Mapping[int, ShardRecord] = MappingProxyType({})


class Home(Protocol):
    """Where a capture's bytes are: what the session's store of runs gives it."""

    here: str
    hosts: list[str]  # rank → host

    def slab(self, name: str, num_bytes: int) -> Slab: ...
    def client(self, host: str) -> Any: ...


class Capture:
    """One activation, behaving as if the model were on one device.

    key: which module, where, which leaf and call. shape, dtype: of the whole. evidence: how its
    placement is known. seen: rank → what that rank saw. region: its planned place, None where it
    has none. tokens: each row's, as text. mask: (B, positions) bool, which of a run's positions
    are real: False on pads, and in a generation after the token before a row's last one; None
    where the value has no positions. cut: what of the planned whole there is. covers: the shape
    that the ranks' parts make together, where it is not its own.
    """

    def __init__(
        self,
        key: CaptureKey,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        seen: Mapping[int, ShardRecord],
        region: Region | None,
        home: Home,
        slab_bytes: int = 0,
        looked_into: Callable[[], Callable[[], None]] | None = None,
        tokens: list[list[str]] | None = None,
        mask: torch.Tensor | None = None,
        cut: Callable[[torch.Tensor], torch.Tensor] | None = None,
        covers: tuple[int, ...] | None = None,
    ):
        self.key, self.shape, self.dtype = key, tuple(shape), dtype
        self.seen: Mapping[int, ShardRecord] = dict(seen)
        self.tokens, self.mask, self._cut = tokens, mask, cut
        self._region, self._home, self._slab_bytes = region, home, slab_bytes
        self._looked_into = looked_into or not_counted
        self._expired = ""
        self._said: tuple[str, str] | None = None  # (placement, evidence), once it has expired
        self.verified = False
        self.give_back: Callable[[], None] | None = None  # of a capture that belongs to no run
        self.error = _failure(key, self.seen, self.shape if covers is None else covers)

    # --- what it is -------------------------------------------------------------------

    @property
    def name(self) -> str:
        return str(self.key)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def num_bytes(self) -> int:
        return size_of(self.shape, dtype_name(self.dtype))

    @property
    def evidence(self) -> str:
        """How the placement is known: dtensor, plan, class, scan+digest or declared; described:
        one rank had it all.

        verified: this value of this model was compared with the unsharded one's, and equal
        (session.verify())."""
        kinds = sorted({seen.evidence for seen in self.seen.values() if seen.error is None})
        if self._said is not None:
            return self._said[1]
        if self.verified and kinds:
            return "verified"
        return "/".join("scan+digest" if kind == "scan" else kind for kind in kinds) or "none"

    @property
    def placement(self) -> str:
        """Over the tp axis, in torch's words."""
        if self._said is not None:
            return self._said[0]
        return (
            "/".join(sorted({seen.placement for seen in self.seen.values() if seen.error is None}))
            or "unknown"
        )

    @property
    def shards(self) -> list[tuple[int, list[int], list[str]]]:
        """For each dim that is split over ranks: (dim, where the parts end, which ranks hold
        each)."""
        found: dict[int, dict[tuple[int, int], list[int]]] = {}
        for rank, seen in sorted(self.seen.items()):
            for dim, start, stop in seen.shard if seen.error is None else ():
                if stop > start:
                    found.setdefault(dim, {}).setdefault((start, stop), []).append(rank)
        return [
            (
                dim,
                [stop for _, stop in sorted(parts)],
                [ranks_text(parts[part]) for part in sorted(parts)],
            )
            for dim, parts in sorted(found.items())
            if len(parts) > 1
        ]

    def __repr__(self) -> str:
        if self.error is not None:
            return f"<Capture {self.name}: {type(self.error).__name__}>"
        kind = dtype_name(self.dtype)
        return (
            f"<Capture {self.name} {tuple(self.shape)} {kind}, {self.placement} by {self.evidence}>"
        )

    # --- looking ----------------------------------------------------------------------

    def tensor(self) -> torch.Tensor:
        """The whole activation on the CPU, yours to change: on the same host a copy-on-write view,
        at once.

        CaptureExpired: the run was freed. PlacementError: where the shards lie is not known."""
        self._check()
        if self._is_view():
            region, slab = self._place()
            return self._there(slab.private(region, self._looked_into()))
        return self._assemble()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        """For numpy and what draws with it; bfloat16, which numpy has not, as float32."""
        whole = self.tensor()
        array = (whole.float() if whole.dtype == torch.bfloat16 else whole).numpy()
        return array if dtype is None else array.astype(dtype)

    def __getitem__(self, index: Any) -> torch.Tensor:
        """A slice, in memory of its own."""
        self._check()
        if self._is_view():
            return self._shared()[index].clone()
        host = self._one_host()
        if host is not None and self._region is not None:
            return self._home.client(host).slice(self._region, index)
        return self._assemble()[index].clone()

    def mean(self, dim: int | Sequence[int] | None = None, keepdim: bool = False) -> torch.Tensor:
        return self._reduced("mean", dim, keepdim)

    def norm(self, dim: int | Sequence[int] | None = None, keepdim: bool = False) -> torch.Tensor:
        """The 2-norm over `dim` (all dims by default), in float32 or the tensor's float64."""
        return self._reduced("norm", dim, keepdim)

    def var(self, dim: int | Sequence[int] | None = None, keepdim: bool = False) -> torch.Tensor:
        return self._reduced("var", dim, keepdim)

    def amax(self, dim: int | Sequence[int] | None = None, keepdim: bool = False) -> torch.Tensor:
        return self._reduced("amax", dim, keepdim)

    def amin(self, dim: int | Sequence[int] | None = None, keepdim: bool = False) -> torch.Tensor:
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
        """The activation as rows of its last dim, reduced to at most height × width: what a
        picture needs."""
        return self._tiled("tiles", rows=rows, cols=cols, height=height, width=width, how=how)

    def bounds(
        self, rows=None, cols=None, height: int = 256, width: int = 512
    ) -> tuple[torch.Tensor, ...]:
        """(largest, smallest) of each tile, in one pass: (h, w) each, as `tiles`."""
        return self._tiled("bounds", rows=rows, cols=cols, height=height, width=width)

    def count_nan(self, rows=None, cols=None) -> int:
        return self._tiled("count_nan", rows=rows, cols=cols)

    def _tiled(self, op: str, **options: Any) -> Any:
        """One of the reductions for pictures, made where the bytes are."""
        self._check()
        host = None if self._is_view() else self._one_host()
        if host is not None and self._region is not None:
            return getattr(self._home.client(host), op)(self._region, **options)
        return getattr(reduce, op)(self._matrix(), **options)

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
        if not self._is_view() or self._cut is not None:
            raise CaptureError(
                f"{self.name} does not lie in one piece of a slab of this host; give its .tensor()"
            )
        region, _ = self._place()
        return SlabValue(
            region, self._slab_bytes or max(pages(size_of(region.shape, region.dtype)), pages(1))
        )

    def hold(self) -> Callable[[], None]:
        """Keep its memory from being used again; call the result to let go."""
        return self._looked_into()

    def move(
        self, slab: str, slab_bytes: int, base: int, looked_into: Callable[[], Callable[[], None]]
    ) -> None:
        """Its bytes lie elsewhere from now on, `base` bytes before where they lay; what was read
        before stays."""
        if self._region is not None:
            self._region = dataclasses.replace(
                self._region, slab=slab, offset=self._region.offset - base
            )
            self._slab_bytes, self._looked_into = slab_bytes, looked_into

    def expire(self, why: str) -> None:
        """The store takes the memory back; what was read before stays readable. A notebook's Out[]
        keeps it for ever: it keeps what its repr says, and nothing of what each rank saw."""
        self._expired, self._said = why, (self.placement, self.evidence)
        self.seen, self.mask, self._region, self._cut = NOTHING_SEEN, None, None, None
        self._looked_into = not_counted

    # --- inside -----------------------------------------------------------------------

    def _check(self) -> None:
        if self.error is not None:
            raise self.error.with_traceback(None)
        if self._expired:
            raise CaptureExpired(f"{self.name}: {self._expired}")

    def _reduced(self, op: str, dim: Any, keepdim: bool, **more: Any) -> Any:
        self._check()
        host = None if self._is_view() else self._one_host()
        if host is not None and self._region is not None:
            return self._home.client(host).reduce(self._region, op, dim, keepdim, **more)
        return reduce.partial(op, self._whole(), dim, keepdim, **more).value()

    def _hosts(self) -> set[str]:
        """The hosts whose ranks wrote a part of it."""
        return {
            self._home.hosts[r]
            for r, s in self.seen.items()
            if s.written is not None or s.region is not None
        }

    def _one_host(self) -> str | None:
        hosts = self._hosts()
        return (
            hosts.pop()
            if len(hosts) == 1 and not self._is_partial() and self._cut is None
            else None
        )

    def _is_partial(self) -> bool:
        return any(seen.partial for seen in self.seen.values())

    def _is_view(self) -> bool:
        """Whether all of it lies in one region of a slab that this process can map."""
        pieces = sum(seen.region is not None for seen in self.seen.values())
        return not self._is_partial() and self._hosts() <= {self._home.here} and pieces <= 1

    def _place(self) -> tuple[Region, Slab]:
        if self._region is not None:
            return self._region, self._home.slab(self._region.slab, self._slab_bytes)
        region = next(s.region for s in self.seen.values() if s.region is not None)
        return region, self._own_slab(region)

    def _own_slab(self, region: Region) -> Slab:
        """The file a rank keeps a value in that had no planned place."""
        return self._home.slab(
            region.slab, max(pages(size_of(region.shape, region.dtype)), pages(1))
        )

    def _shared(self) -> torch.Tensor:
        """The shared map: to be read here, never handed out."""
        return self._there(self._planned())

    def _planned(self) -> torch.Tensor:
        """All that was planned, of which a generation that ended early has not run the last
        positions."""
        region, slab = self._place()
        return slab.tensor(region)

    def _there(self, whole: torch.Tensor) -> torch.Tensor:
        return whole if self._cut is None else self._cut(whole)

    def _whole(self) -> torch.Tensor:
        return self._shared() if self._is_view() else self._assemble()

    def _matrix(self) -> torch.Tensor:
        whole = self._whole()
        return whole.reshape(-1, whole.shape[-1]) if whole.dim() else whole.reshape(1, 1)

    def _assemble(self) -> torch.Tensor:
        """The whole in memory of its own, from each host's part, or as the sum of its addends."""
        if self._is_partial():
            return self._sum()
        host = self._one_host()
        if host not in (None, self._home.here) and self._region is not None:
            return self._home.client(host).read(self._region)  # the parts lie there side by side
        planned = self.shape if self._cut is None or self._region is None else self._region.shape
        whole = torch.empty(planned, dtype=self.dtype)
        for rank, seen in self.seen.items():
            if seen.written is not None:
                for part in seen.written.parts():
                    index = part.slices(self.ndim)
                    whole[index] = self._part(rank, index)
            elif seen.region is not None:
                whole[seen.shard.slices(self.ndim)] = self._own_part(rank, seen.region)
        return self._there(whole)

    def _own_part(self, rank: int, region: Region) -> torch.Tensor:
        """What a rank keeps in a region of its own."""
        host = self._home.hosts[rank]
        if host == self._home.here:
            return self._own_slab(region).tensor(region)
        return self._home.client(host).read(region)

    def _part(self, rank: int, index: tuple) -> torch.Tensor:
        assert self._region is not None
        host = self._home.hosts[rank]
        if host == self._home.here:
            return self._planned()[index]
        return self._home.client(host).slice(self._region, index)

    def _sum(self) -> torch.Tensor:
        """Addends are kept apart by the ranks and summed here in float32."""
        exact = torch.float64 if self.dtype == torch.float64 else torch.float32
        whole = torch.zeros(self.shape, dtype=exact)
        for rank, seen in self.seen.items():
            if seen.region is not None:
                addend = self._own_part(rank, seen.region)
                whole[seen.shard.slices(self.ndim)] += addend.to(exact)
        return whole.to(self.dtype)


class Reduced(Capture):
    """What was kept instead of an activation. In its place lies what each rank's part said of it,
    (statistics, slots, what is kept), of which every look makes the whole.

    entry: the planned capture. layout: whose ranks they are. Its shape and dtype are the reduced
    value's."""

    def __init__(self, entry: Entry, layout: Layout, *args: Any):
        self.entry, self.layout = entry, layout
        super().__init__(*args)

    def _is_view(self) -> bool:
        return False

    def _one_host(self) -> None:
        return None

    def _assemble(self) -> torch.Tensor:
        assert self.entry.hook.reduce is not None and self._region is not None
        op, dtype = self.entry.hook.reduce.op, getattr(torch, self.entry.formula.dtype)
        whole = torch.stack(reduce.nothing(op, self.entry.kept, dtype).parts)
        for rank, seen in sorted(self.seen.items()):
            if seen.written is not None:
                into = whole[(slice(None), *self._kept_index(seen.written))]
                both = [
                    reduce.Partial(op, tuple(parts), dtype)
                    for parts in (into, self._said_by(rank, seen.written))
                ]
                into.copy_(torch.stack(reduce.combine(both).parts))
        value = reduce.Partial(op, tuple(whole), dtype).value()
        assert isinstance(value, torch.Tensor)
        return self._there(value)

    def _said_by(self, rank: int, box: Box) -> torch.Tensor:
        """A rank's statistics of its part."""
        slot = self.entry.slot(self.layout, rank)
        return self._part(rank, (slice(None), slot, *self._kept_index(box)))

    def _kept_index(self, box: Box) -> tuple[slice, ...]:
        """What indexes a part of the whole in what is left of it."""
        return box.without(self.entry.over).slices(len(self.entry.kept))


def draw(source: Any, as_: str = "map", **options: Any) -> Any:
    """The view of a capture, or of anything that a view can draw."""
    from flexkernel.views import show

    return show(source, as_, **options)


def not_counted() -> Callable[[], None]:
    """What is counted where nobody counts the tensors that look into a capture, and called when
    one has died."""
    return nothing


def nothing() -> None:
    """There is nothing to do."""


def ranks_text(ranks: Sequence[int]) -> str:
    in_a_row = list(ranks) == list(range(ranks[0], ranks[0] + len(ranks)))
    return (
        f"ranks {ranks[0]} to {ranks[-1]}"
        if in_a_row and len(ranks) > 4
        else "rank " + ", ".join(map(str, ranks))
    )


def _failure(
    key: CaptureKey, seen: Mapping[int, ShardRecord], shape: tuple[int, ...]
) -> Exception | None:
    """Why this capture is not to be read: a rank failed, copies differ, or a part is missing."""
    for rank, one in sorted(seen.items()):
        if one.error is not None:
            kind, message = one.error
            message = message if key.module in message else f"{key}: {message}"
            return errors.named(kind)(
                f"{message} (rank {rank})" if "rank" not in message else message
            )
    return differing(key, seen) or _missing(key, seen, shape)


def differing(key: CaptureKey, seen: Mapping[int, ShardRecord]) -> Exception | None:
    """Ranks that hold the same part must hold the same numbers."""
    first: dict[Box, tuple[int, int]] = {}
    for rank, one in sorted(seen.items()):
        if one.partial or one.shard.is_empty:
            continue
        other, digest = first.setdefault(one.shard, (rank, one.digest))
        if digest != one.digest:
            declared = key.module + (" input" if key.site.kind == "input" else "")
            return PlacementError(
                f"{key}: ranks {other} and {rank} hold the same part of it with different numbers: it is a partial "
                f"sum, or these ranks have diverged. If it is a sum, declare it, "
                f"placements={{{declared!r}: 'partial'}}"
            )
    return None


def _missing(
    key: CaptureKey, seen: Mapping[int, ShardRecord], shape: tuple[int, ...]
) -> Exception | None:
    """The parts that were written must be the whole: counted, since no two ranks write the same
    element."""
    total = math.prod(shape)
    addends = max((one.partial for one in seen.values()), default=0)
    parts = [one.written for one in seen.values() if one.written is not None]
    kept = [one.shard for one in seen.values() if one.region is not None]
    if not addends:
        parts = list(dict.fromkeys(parts))
    written = sum(part.volume(shape) for part in (*parts, *kept))
    if written == total * (addends or 1):
        return None
    if addends:
        return CaptureError(
            f"{key}: a sum of {addends} addends, of which {written:,} of {total * addends:,} elements came"
        )
    silent = (
        "no gradient reached it, the loss does not depend on it"
        if key.site.gradient
        else "it did not fire in this run"
    )
    what = silent if not seen else f"{written:,} of {total:,} elements were written"
    return CaptureError(f"{key}: {what}")
