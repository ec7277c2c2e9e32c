"""Reductions of a tensor that is split into shards, and tiles of a matrix to draw.

`partial`, `combine` and `reduce_shards` follow torch: NaN propagates, and the result over shards
equals the result over the whole. `tiles`, `histogram` and `count_nan` are for looking: they count
NaN, and a NaN never hides its neighbours. All of them run on the tensor's device and copy at most
a cache-sized block at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from flexkernel.wire import REDUCTIONS

__all__ = [
    "HOWS",
    "OPS",
    "Histogram",
    "Partial",
    "bounds",
    "combine",
    "count_nan",
    "extreme",
    "histogram",
    "masked",
    "nothing",
    "partial",
    "reduce_shards",
    "result_dtype",
    "robust_range",
    "tiles",
]

Tensors = tuple[torch.Tensor, ...]
Dims = tuple[int, ...]
# 1 MiB of fp32, so that a block is still in the cache for its second reduction
BLOCK_ELEMENTS = 1 << 18


# --- partial results over shards ------------------------------------------------------


class _Op(NamedTuple):
    """One reduction, in three steps.

    first(x, dims, keepdim) -> statistics of one shard. merge(statistics, dims) -> fewer
    statistics. last(statistics) -> the value."""

    first: Callable[[torch.Tensor, Dims, bool], Tensors]
    merge: Callable[[Tensors, Dims], Tensors]
    last: Callable[[Tensors], torch.Tensor]


def _only(parts: Tensors) -> torch.Tensor:
    """The only statistic, of the reduced shape."""
    return parts[0]


def _count(x: torch.Tensor, dims: Dims, like: torch.Tensor) -> torch.Tensor:
    """How many elements of x each result stands for: float64, of the shape and on the device of
    `like`."""
    return torch.full_like(like, math.prod(x.shape[d] for d in dims), dtype=torch.float64)


def _first_mean(x: torch.Tensor, dims: Dims, keepdim: bool) -> Tensors:
    """(sum, count): float64, of the reduced shape, on x's device."""
    total = x.sum(dims, keepdim=keepdim, dtype=torch.float64)
    return total, _count(x, dims, total)


def _merge_sums(parts: Tensors, dims: Dims) -> Tensors:
    """The sums of each statistic over `dims`."""
    return tuple(part.sum(dims) for part in parts)


def _first_var(x: torch.Tensor, dims: Dims, keepdim: bool) -> Tensors:
    """(count, mean, sum of squared distances from the mean): float64, of the reduced shape, on x's
    device."""
    var, mean = torch.var_mean(x.double(), dims, correction=0, keepdim=keepdim)
    num = _count(x, dims, mean)
    return num, mean, var * num


def _merge_var(parts: Tensors, dims: Dims) -> Tensors:
    """Merge (count, mean, squared distances) over `dims` by Chan's rule. Parts with count 0 are
    ignored."""
    num, mean, squares = parts
    total = num.sum(dims, keepdim=True)
    weighted = torch.where(num > 0, mean * num, 0).sum(dims, keepdim=True)
    whole_mean = weighted / total.clamp(min=1)
    between = torch.where(num > 0, num * (mean - whole_mean).square(), 0)
    spread = torch.where(num > 0, squares, 0) + between
    return total.sum(dims), whole_mean.sum(dims), spread.sum(dims)


def _last_var(parts: Tensors) -> torch.Tensor:
    """The variance, of the statistics' shape and dtype. A single element gives NaN."""
    num, _, squares = parts
    return squares / (num - 1)  # correction 1, torch's default


OPS: dict[str, _Op] = {
    "sum": _Op(lambda x, d, k: (x.sum(d, keepdim=k, dtype=torch.float64),), _merge_sums, _only),
    "mean": _Op(_first_mean, _merge_sums, lambda parts: parts[0] / parts[1]),
    "var": _Op(_first_var, _merge_var, _last_var),
    "std": _Op(_first_var, _merge_var, lambda parts: _last_var(parts).sqrt()),
    "norm": _Op(
        lambda x, d, k: (torch.linalg.vector_norm(x.double(), dim=d, keepdim=k),),
        lambda parts, d: (torch.linalg.vector_norm(parts[0], dim=d),),
        _only,
    ),
    "amax": _Op(
        lambda x, d, k: (x.amax(d, keepdim=k),), lambda parts, d: (parts[0].amax(d),), _only
    ),
    "amin": _Op(
        lambda x, d, k: (x.amin(d, keepdim=k),), lambda parts, d: (parts[0].amin(d),), _only
    ),
}
_EXACT = {"amax", "amin"}  # the result is one of the elements, so it keeps the dtype


@dataclass(frozen=True)
class Partial:
    """One shard's contribution to a reduction: statistics of the reduced shape.

    Statistics are float64. The exceptions are amax, amin and topk, where `partial` keeps the dtype
    of the elements.

    op: a name in OPS, or "topk". dtype: that of the tensor that was reduced. k, largest, dim: for
    topk only."""

    op: str
    parts: Tensors
    dtype: torch.dtype
    k: int = 0
    largest: bool = True
    dim: int = 0

    def value(self) -> torch.Tensor | Tensors:
        """The reduced tensor, of the statistics' shape and device, in result_dtype(). topk:
        (values, indices)."""
        if self.op == "topk":
            return self.parts
        return OPS[self.op].last(self.parts).to(result_dtype(self.op, self.dtype))


def result_dtype(op: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of `op` over a tensor of `dtype`: amax and amin keep it, float64 stays, all others
    give float32."""
    if op in _EXACT:
        return dtype
    return torch.float64 if dtype == torch.float64 else torch.float32


def partial(
    op: str,
    x: torch.Tensor,
    dim: int | Sequence[int] | None = None,
    keepdim: bool = False,
    *,
    k: int = 1,
    largest: bool = True,
    offset: int = 0,
) -> Partial:
    """One shard's part of `op` over `dim`; None means all dims. Its statistics are on x's device.

    x: any shape, float, int or bool, any device. ValueError: there is no such op, or topk gets
    several dims.

    topk reduces one dim. `offset` is where this shard starts in that dim, so that indices count in
    the whole. As in torch, it is undefined which of several equal elements is named.

    >>> a, b = torch.tensor([3.0, 0.0]), torch.tensor([4.0])
    >>> combine([partial("norm", a), partial("norm", b)]).value()
    tensor(5.)
    """
    if op == "topk":
        return _partial_topk(x, -1 if dim is None else dim, k, largest, offset)
    if op not in OPS:
        raise ValueError(f"no reduction {op!r}; there are {', '.join([*OPS, 'topk'])}")
    return Partial(op, OPS[op].first(x, _dims(x, dim), keepdim), x.dtype)


def masked(op: str, x: torch.Tensor, dims: Sequence[int], mask: torch.Tensor | None) -> Partial:
    """One shard's part of `op` over `dims`, counting only the elements where the mask is True.

    x: any shape and device. mask: bool, on the CPU, broadcast over x with the same number of dims;
    None counts all. The statistics are float64 on x's device. Where no element counts they equal
    those of `nothing`.

    >>> masked("mean", torch.tensor([9.0, 1.0, 3.0]), (0,), torch.tensor([False, True, True])).value()
    tensor(2.)
    """
    if mask is None or bool(mask.all()):
        return _quick(op, x, tuple(dims))
    long = [dim for dim, size in enumerate(mask.shape) if size > 1]
    if len(long) < 2:
        return _picked(op, x, tuple(dims), long[0] if long else 0, mask.flatten())
    rows = [(x.narrow(long[0], i, 1), mask.narrow(long[0], i, 1)) for i in range(x.shape[long[0]])]
    parts = [masked(op, row, dims, real) for row, real in rows]
    if long[0] in dims:
        return combine(parts)
    at = long[0] - sum(dim < long[0] for dim in dims)
    return Partial(
        op,
        tuple(torch.cat(part, at) for part in zip(*(p.parts for p in parts), strict=True)),
        x.dtype,
    )


def _picked(op: str, x: torch.Tensor, dims: Dims, along: int, real: torch.Tensor) -> Partial:
    """`masked` for a mask that varies along one dim: float64 statistics of the reduced shape, on
    x's device.

    real: (x.shape[along],) bool on the CPU, or (1,) if nothing counts. Pads are on one side, so
    the real elements are mostly adjacent and need no copy."""
    index = real.nonzero().flatten()  # on the CPU, so that a GPU does not have to synchronize
    shape = [size for dim, size in enumerate(x.shape) if dim not in dims]
    none = Partial(
        op, tuple(part.to(x.device) for part in nothing(op, shape, x.dtype).parts), x.dtype
    )
    if not len(index):
        return none
    first, last = int(index[0]), int(index[-1])
    together, index = last - first + 1 == len(index), index.to(x.device)
    found = _quick(
        op, x.narrow(along, first, len(index)) if together else x.index_select(along, index), dims
    )
    if along in dims:
        return found
    for into, part in zip(none.parts, found.parts, strict=True):
        into.index_copy_(along - sum(dim < along for dim in dims), index, part)
    return none


def _quick(op: str, x: torch.Tensor, dims: Dims) -> Partial:
    """`partial` for use during a forward: float64 statistics of the reduced shape, on x's device.

    For float32 and narrower floats torch computes them in float32, which is 20 times as fast. They
    are still combined in float64."""
    if not x.is_floating_point() or x.dtype == torch.float64 or op in _EXACT or not dims:
        exact = partial(op, x, dims)
        return Partial(op, tuple(part.double() for part in exact.parts), x.dtype)
    if op == "norm":
        parts: Tensors = (_quick_norm(x, dims),)
    elif op in ("var", "std"):
        var, mean = torch.var_mean(x.float(), dims, correction=0)
        num = _count(x, dims, mean)
        parts = num, mean, var.double() * num
    elif op in ("sum", "mean"):
        total = x.sum(dims, dtype=torch.float32)
        parts = (total, _count(x, dims, total)) if op == "mean" else (total,)
    else:
        raise ValueError(f"{op!r} has no quick statistics")
    return Partial(op, tuple(part.double() for part in parts), x.dtype)


def _quick_norm(x: torch.Tensor, dims: Dims) -> torch.Tensor:
    """The 2-norm over `dims`: float64, of the reduced shape, on x's device.

    torch computes it along the last dim. Over other dims it runs on cache-sized blocks, whose
    squares are summed in float64: torch would add millions of squares in float32 and stride
    through memory."""
    along = x.dim() - 1
    rest = tuple(d for d in dims if d != along)
    if along in dims:
        rows = torch.linalg.vector_norm(x, dim=along, keepdim=True, dtype=torch.float32).double()
        return (
            torch.linalg.vector_norm(rows, dim=rest, keepdim=True).squeeze(dims)
            if rest
            else rows.squeeze(along)
        )
    blocks = x.split(max(1, BLOCK_ELEMENTS * x.shape[rest[0]] // max(x.numel(), 1)), rest[0])
    squares = [block.float().square().sum(dims, dtype=torch.float32).double() for block in blocks]
    return torch.stack(squares).sum(0).sqrt()


def nothing(op: str, shape: Sequence[int], dtype: torch.dtype) -> Partial:
    """The part of a shard without elements: combined with another part it changes nothing.

    shape: the reduced shape. The statistics are float64 on the CPU.

    >>> combine([nothing("norm", (), torch.float32), partial("norm", torch.tensor([3.0, 4.0]))]).value()
    tensor(5.)
    """
    fill = {"amax": -math.inf, "amin": math.inf}.get(op, 0.0)
    parts = torch.full((REDUCTIONS[op], *shape), fill, dtype=torch.float64)
    return Partial(op, tuple(parts), dtype)


def combine(partials: Sequence[Partial]) -> Partial:
    """The part of all shards together, from each shard's `partial` over the dim that was cut. Same
    shape and device."""
    one = partials[0]
    if one.op == "topk":
        return _combine_topk(partials)
    stacked = tuple(torch.stack(parts) for parts in zip(*(p.parts for p in partials), strict=True))
    return Partial(one.op, OPS[one.op].merge(stacked, (0,)), one.dtype)


def reduce_shards(
    op: str,
    shards: Sequence[torch.Tensor],
    shard_dim: int,
    dim: int | Sequence[int] | None = None,
    keepdim: bool = False,
    *,
    k: int = 1,
    largest: bool = True,
) -> torch.Tensor | Tensors:
    """`op` of a whole tensor from its shards along `shard_dim`, without building the whole.

    shards: equal in shape except along shard_dim, same dtype and device. dim: None means all dims,
    for topk the last one. Returns the reduced shape in result_dtype() on that device; topk gives
    (values, indices). ValueError: as partial().

    >>> x = torch.arange(12.0).reshape(2, 6)
    >>> reduce_shards("mean", x.split(4, dim=1), shard_dim=1, dim=-1)
    tensor([2.5000, 8.5000])
    """
    ndim = shards[0].dim()
    cut = shard_dim % ndim
    over = (-1 if dim is None else dim) if op == "topk" else dim
    starts = [sum(s.shape[cut] for s in shards[:i]) for i in range(len(shards))]
    inside = cut in _dims(shards[0], over)
    parts = [
        partial(op, s, over, keepdim, k=k, largest=largest, offset=start if inside else 0)
        for s, start in zip(shards, starts, strict=True)
        if s.numel()  # an empty shard has no maximum to give
    ]
    if inside:
        return combine(parts).value()
    kept = cut if keepdim or op == "topk" else cut - sum(d < cut for d in _dims(shards[0], over))
    values = [
        value if isinstance(value, tuple) else (value,)
        for value in (part.value() for part in parts)
    ]
    joined = tuple(torch.cat(pieces, kept) for pieces in zip(*values, strict=True))
    return joined if op == "topk" else joined[0]


def _dims(x: torch.Tensor, dim: int | Sequence[int] | None) -> Dims:
    """The dims counted from 0; None gives all dims of x, which has any shape."""
    if dim is None:
        return tuple(range(x.dim()))
    return tuple(d % x.dim() for d in ([dim] if isinstance(dim, int) else dim))


def _partial_topk(
    x: torch.Tensor, dim: int | Sequence[int], k: int, largest: bool, offset: int
) -> Partial:
    """(values, indices): x's shape with at most k entries along `dim`. Indices are int64 and count
    from `offset`. ValueError: several dims."""
    if not isinstance(dim, int):
        raise ValueError(f"topk goes along one dim, not {dim!r}")
    values, indices = x.topk(min(k, x.shape[dim]), dim=dim, largest=largest)
    return Partial("topk", (values, indices + offset), x.dtype, k, largest, dim % x.dim())


def _combine_topk(partials: Sequence[Partial]) -> Partial:
    """The k best of all shards, from each shard's own k best."""
    one = partials[0]
    values, indices = (
        torch.cat(parts, one.dim) for parts in zip(*(p.parts for p in partials), strict=True)
    )
    best, where = values.topk(min(one.k, values.shape[one.dim]), dim=one.dim, largest=one.largest)
    return Partial(
        "topk", (best, indices.gather(one.dim, where)), one.dtype, one.k, one.largest, one.dim
    )


# --- tiles: what is drawn -------------------------------------------------------------


def _peak(x: torch.Tensor, dim: int, largest: bool) -> torch.Tensor:
    """amax or amin along `dim`, skipping NaN: x's shape without `dim`, same dtype and device.

    It is NaN only where all elements are NaN."""
    out = x.amax(dim) if largest else x.amin(dim)
    poisoned = out.isnan()
    if poisoned.any():
        runs = x.movedim(dim, -1)[poisoned]  # repeat only the runs that hold a NaN
        nan = runs.isnan()
        runs = runs.masked_fill_(nan, -math.inf if largest else math.inf)
        again = runs.amax(-1) if largest else runs.amin(-1)
        out[poisoned] = again.masked_fill_(nan.all(-1), math.nan)
    return out


def extreme(most: torch.Tensor, least: torch.Tensor) -> torch.Tensor:
    """The "extreme" tile from the two that `bounds` returns: whichever is farther from zero, with
    its sign.

    most, least: of one shape, which the result has too."""
    return torch.where(most.abs() >= least.abs(), most, least)


def _tile_mean(x: torch.Tensor, dim: int) -> Tensors:
    """(sum, count) along `dim`, skipping NaN: x's shape without `dim`, same dtype and device."""
    total = x.sum(dim)
    if not total.isnan().any():
        return total, torch.full_like(total, x.shape[dim])
    return x.nansum(dim), (~x.isnan()).sum(dim).to(x.dtype)


def _tile_var(x: torch.Tensor, dim: int) -> Tensors:
    """(count, mean, squared distances) along `dim`, skipping NaN: x's shape without `dim`, same
    dtype and device.

    It takes separate steps, because torch.var_mean over a strided dim takes ten times as long."""
    total, num = _tile_mean(x, dim)
    mean = total / num
    squares = (x - mean.unsqueeze(dim)).square_()
    return num, mean, squares.sum(dim) if bool((num == x.shape[dim]).all()) else squares.nansum(dim)


class _How(NamedTuple):
    """One kind of tile, in three steps.

    first(x, dim) -> statistics along one dim. merge(statistics, dim) -> along the other.
    last(statistics) -> the tile."""

    first: Callable[[torch.Tensor, int], Tensors]
    merge: Callable[[Tensors, int], Tensors]
    last: Callable[[Tensors], torch.Tensor]


def _peaks(parts: Tensors, dim: int) -> Tensors:
    """(largest, smallest) along `dim`, skipping NaN."""
    return _peak(parts[0], dim, True), _peak(parts[1], dim, False)


_BOUNDS = _How(lambda x, d: _peaks((x, x), d), _peaks, _only)
HOWS: dict[str, _How] = {
    "extreme": _BOUNDS._replace(last=lambda parts: extreme(*parts)),
    "mean": _How(
        _tile_mean, lambda parts, d: _merge_sums(parts, (d,)), lambda parts: parts[0] / parts[1]
    ),
    "max": _How(
        lambda x, d: (_peak(x, d, True),), lambda parts, d: (_peak(parts[0], d, True),), _only
    ),
    "min": _How(
        lambda x, d: (_peak(x, d, False),), lambda parts, d: (_peak(parts[0], d, False),), _only
    ),
    "std": _How(
        _tile_var,
        lambda parts, d: _merge_var(parts, (d,)),
        lambda parts: torch.where(parts[0] > 0, (parts[2] / parts[0]).sqrt(), math.nan),
    ),
}


def tiles(
    x_2d: torch.Tensor,
    rows: tuple[int, int] | None = None,
    cols: tuple[int, int] | None = None,
    height: int = 256,
    width: int = 512,
    how: str = "extreme",
) -> torch.Tensor:
    """The part `rows` × `cols` of a matrix, drawn in at most height × width pixels.

    x_2d: (R, C), any real dtype, any strides -> (h, w) float32 on the CPU, h <= height, w <=
    width. Each pixel stands for a block of ceil(r / height) × ceil(c / width) cells of the r × c
    part; blocks at the lower and right edge may be smaller.

    how: "extreme" is the element farthest from zero, with its sign, so that no single large cell
    gets lost. The others are "max", "min", "mean" and "std" (correction 0). NaN is skipped; a
    pixel is NaN only if all cells of its block are. ValueError: there is no such `how`, or rows
    and cols lie outside the matrix.

    >>> tiles(torch.tensor([[1.0, -9.0, 2.0], [0.0, 0.0, 3.0]]), height=1, width=2)
    tensor([[-9.,  3.]])
    """
    if how not in HOWS:
        raise ValueError(f"no tile {how!r}; there are {', '.join(HOWS)}")
    return (
        HOWS[how].last(_tile_parts(_crop(x_2d, rows, cols), height, width, HOWS[how])).float().cpu()
    )


def bounds(
    x_2d: torch.Tensor,
    rows: tuple[int, int] | None = None,
    cols: tuple[int, int] | None = None,
    height: int = 256,
    width: int = 512,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The "max" and the "min" tile of the same pixels, in one pass: two (h, w) float32 tensors on
    the CPU.

    The arguments and errors are those of `tiles`."""
    most, least = _tile_parts(_crop(x_2d, rows, cols), height, width, _BOUNDS)
    return most.float().cpu(), least.float().cpu()


def count_nan(
    x_2d: torch.Tensor, rows: tuple[int, int] | None = None, cols: tuple[int, int] | None = None
) -> int:
    """How many NaN are in the part `rows` × `cols` of x_2d, (R, C) of any real dtype.

    One pass sums each block; only blocks whose sum is NaN are counted. ValueError: the part lies
    outside."""
    if not x_2d.dtype.is_floating_point:
        return 0
    part = _crop(x_2d, rows, cols)
    # torch cannot sum float8
    blocks = (
        block if block.element_size() > 1 else block.float() for block in _row_blocks(part, 1)
    )
    return sum(int(block.isnan().sum()) for block in blocks if block.sum().isnan())


def _crop(
    x: torch.Tensor, rows: tuple[int, int] | None, cols: tuple[int, int] | None
) -> torch.Tensor:
    """A view of the part `rows` × `cols` of x, (R, C) -> (r, c), detached. ValueError: it is empty
    or lies outside."""
    (r0, r1), (c0, c1) = rows or (0, x.shape[0]), cols or (0, x.shape[1])
    if not (0 <= r0 < r1 <= x.shape[0] and 0 <= c0 < c1 <= x.shape[1]):
        raise ValueError(
            f"rows {r0}:{r1}, columns {c0}:{c1} are no part of a {x.shape[0]} × {x.shape[1]} matrix"
        )
    return x.detach()[r0:r1, c0:c1]


def _tile_parts(part: torch.Tensor, height: int, width: int, how: _How) -> Tensors:
    """Statistics of the blocks of a (R, C) matrix: each (h, w), on its device, float32 or float64.

    It reduces down the rows first, which follows the memory, and then along the few rows that are
    left."""
    down, along = (
        -(-n // max(size, 1)) for n, size in zip(part.shape, (height, width), strict=True)
    )
    columns = [
        _fold((_workable(block),), 0, down, lambda p, d: how.first(p[0], d))
        for block in _row_blocks(part, down)
    ]
    stacked = tuple(torch.cat(parts) for parts in zip(*columns, strict=True))
    return _fold(stacked, 1, along, how.merge)


def _row_blocks(part: torch.Tensor, multiple: int) -> Sequence[torch.Tensor]:
    """Views of groups of rows that fit the cache: (R, C) -> (r, C) each, r a multiple of
    `multiple`."""
    rows = max(1, BLOCK_ELEMENTS // (multiple * part.shape[1])) * multiple
    return part.split(rows)


def _workable(block: torch.Tensor) -> torch.Tensor:
    """The block in float32, or float64 if it is: same shape and device.

    On the CPU torch reduces half precision more slowly than it converts it."""
    return block if block.dtype in (torch.float32, torch.float64) else block.float()


def _fold(
    parts: Tensors, dim: int, block: int, reduce: Callable[[Tensors, int], Tensors]
) -> Tensors:
    """Reduce each run of `block` entries along `dim` to one entry. The last run may be shorter."""
    full, rest = divmod(parts[0].shape[dim], block)
    folded = []
    if full:
        runs = tuple(p.narrow(dim, 0, full * block).unflatten(dim, (full, block)) for p in parts)
        folded.append(reduce(runs, dim + 1))
    if rest:
        tail = tuple(p.narrow(dim, full * block, rest).unsqueeze(dim) for p in parts)
        folded.append(reduce(tail, dim + 1))
    return tuple(torch.cat(pieces, dim) for pieces in zip(*folded, strict=True))


# --- ranges and histograms ------------------------------------------------------------


@dataclass(frozen=True)
class Histogram:
    """Counts of values in equal bins from lo to hi, where hi belongs to the last bin.

    counts: (bins,) int64 on the CPU. below, above, nan: how many values lie outside, or are NaN.
    """

    lo: float
    hi: float
    counts: torch.Tensor
    below: int = 0
    above: int = 0
    nan: int = 0

    def __add__(self, other: Histogram) -> Histogram:
        """The histogram of both. ValueError: their bins differ."""
        mine, theirs = (self.lo, self.hi, len(self.counts)), (other.lo, other.hi, len(other.counts))
        if mine != theirs:
            raise ValueError(f"bins (lo, hi, number) {mine} and {theirs} do not add up")
        sums = (
            getattr(self, name) + getattr(other, name)
            for name in ("counts", "below", "above", "nan")
        )
        return Histogram(self.lo, self.hi, *sums)


def histogram(x: torch.Tensor, lo: float, hi: float, bins: int = 256) -> Histogram:
    """Counts of x's elements in `bins` equal bins, with those outside and those that are NaN.

    x: any shape and real dtype. ValueError: lo is not less than hi.

    >>> h = histogram(torch.tensor([0.0, 0.6, 1.0, 7.0, math.nan]), 0, 1, bins=2)
    >>> h.counts.tolist(), h.above, h.nan
    ([1, 2], 1, 1)
    """
    if not hi > lo:
        raise ValueError(f"a histogram needs lo < hi, not {lo} and {hi}")
    total = Histogram(lo, hi, torch.zeros(bins, dtype=torch.int64))
    # histc counts in fp32, which is exact up to 2**24 elements a block
    for block in x.detach().reshape(-1).split(BLOCK_ELEMENTS):
        total += _block_histogram(_workable(block), lo, hi, bins)
    return total


def _block_histogram(block: torch.Tensor, lo: float, hi: float, bins: int) -> Histogram:
    """The histogram of a 1-D float32 or float64 block on any device."""
    # histc ignores values outside lo..hi, and NaN
    counts = block.histc(bins, lo, hi).round().to(torch.int64).cpu()
    if int(counts.sum()) == len(block):
        return Histogram(lo, hi, counts)
    below, above, nan = (int(mask.sum()) for mask in (block < lo, block > hi, block.isnan()))
    return Histogram(lo, hi, counts, below, above, nan)


def robust_range(values: torch.Tensor, share: float = 0.995) -> tuple[float, float]:
    """A range (lo, hi) that holds `share` of the finite values; symmetric about 0 if some are
    negative.

    values: any shape, float. Use it as a colour range: outliers do not wash out the picture. lo <
    hi always.

    >>> robust_range(torch.tensor([-1.0, 0.5, 1.0]))
    (-1.0, 1.0)
    """
    finite = values.detach().reshape(-1)
    finite = finite[finite.isfinite()].float()
    if not len(finite):
        return 0.0, 1.0
    signed = bool((finite < 0).any())
    rank = max(1, min(len(finite), math.ceil(share * len(finite))))
    top = float((finite.abs() if signed else finite).kthvalue(rank).values)
    # nearly all are zero: the largest of the others sets the range
    top = top or float(finite.abs().max()) or 1.0
    if signed:
        return -top, top
    low = float(finite.min())
    return (0.0 if low < top / 2 else low), (top if top > low else low + (abs(low) or 1.0))
