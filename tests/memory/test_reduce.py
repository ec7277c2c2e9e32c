"""Reductions over shards equal the reduction of the whole; tiles lose no hot cell and no NaN."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from flexkernel.memory import reduce

SHAPE = (5, 7, 24)


@pytest.fixture
def whole() -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)) * 3 + 100


TORCH = {
    "sum": lambda x, dim, keepdim: x.sum(dim, keepdim=keepdim),
    "mean": lambda x, dim, keepdim: x.mean(dim, keepdim=keepdim),
    "var": lambda x, dim, keepdim: x.var(dim, keepdim=keepdim),
    "std": lambda x, dim, keepdim: x.std(dim, keepdim=keepdim),
    "norm": lambda x, dim, keepdim: torch.linalg.vector_norm(x, dim=dim, keepdim=keepdim),
    "amax": lambda x, dim, keepdim: x.amax(dim, keepdim=keepdim),
    "amin": lambda x, dim, keepdim: x.amin(dim, keepdim=keepdim),
}


@pytest.mark.parametrize("dims", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 2), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("op", list(TORCH))
def test_what_is_masked_has_no_say(op, dims):
    """Not even NaN; and where nothing counts there is nothing."""
    x = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(1)) + 0.5
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 1, 0, 1, 1]]).bool()[..., None]
    real = np.ma.array(x.double().numpy(), mask=~mask.expand_as(x).numpy())
    want = {
        "sum": lambda: real.sum(dims),
        "mean": lambda: real.mean(dims),
        "var": lambda: real.var(dims, ddof=1),
        "std": lambda: real.std(dims, ddof=1),
        "norm": lambda: (real**2).sum(dims) ** 0.5,
        "amax": lambda: real.max(dims),
        "amin": lambda: real.min(dims),
    }[op]()
    have = reduce.masked(op, torch.where(mask, x, math.nan), dims, mask).value()
    known = torch.as_tensor(~np.ma.getmaskarray(want)).broadcast_to(have.shape)
    assert known.sum() > 0 and have.dtype == torch.float32
    torch.testing.assert_close(
        have[known], torch.as_tensor(np.ma.filled(want, 0)).float()[known], rtol=1e-5, atol=1e-6
    )
    nothing = reduce.masked(op, x, dims, torch.zeros_like(mask))
    some = reduce.partial(op, x, dims)
    assert torch.equal(reduce.combine([nothing, some]).value(), reduce.combine([some]).value())


@pytest.mark.parametrize("keepdim", [False, True])
@pytest.mark.parametrize("dim", [-1, (0, 1), (0, 2), 1])
@pytest.mark.parametrize("shard_dim", [-1, 0])
@pytest.mark.parametrize("op", list(TORCH))
def test_over_uneven_shards_every_reduction_equals_the_whole(whole, op, shard_dim, dim, keepdim):
    assert set(TORCH) == set(reduce.OPS)
    shards = whole.split(2 if shard_dim == 0 else 9, dim=shard_dim)
    assert len(shards) == 3 and shards[-1].shape != shards[0].shape
    got = reduce.reduce_shards(op, shards, shard_dim, dim, keepdim)
    torch.testing.assert_close(
        got, TORCH[op](whole.double(), dim, keepdim).float(), rtol=1e-6, atol=0
    )


def test_reducing_all_dims_gives_a_scalar(whole):
    got = reduce.reduce_shards("norm", whole.split(9, dim=-1), -1)
    torch.testing.assert_close(got, whole.norm())


@pytest.mark.parametrize("shard_dim", [-1, 0])
def test_topk_of_shards_names_the_elements_of_the_whole(whole, shard_dim):
    shards = whole.split(2, dim=shard_dim)  # shards smaller than k too
    values, indices = reduce.reduce_shards("topk", shards, shard_dim, -1, k=4)
    want = whole.topk(4, dim=-1)
    assert torch.equal(values, want.values)
    assert torch.equal(indices, want.indices)


def test_an_empty_shard_has_no_say(whole):
    shards = [whole[:0], whole[:3], whole[3:]]
    torch.testing.assert_close(reduce.reduce_shards("amax", shards, 0, 0), whole.amax(0))
    torch.testing.assert_close(reduce.reduce_shards("mean", shards, 0, 0), whole.mean(0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int32])
def test_narrow_types_are_summed_in_float64(dtype):
    x = torch.full((3, 5000), 1.0).to(dtype)
    got = reduce.reduce_shards("mean", x.split(2500, dim=1), 1, 1)
    assert got.dtype == torch.float32
    assert got.tolist() == [1.0] * 3
    assert reduce.partial("amax", x, 1).value().dtype == dtype


def test_an_unknown_reduction_names_those_there_are():
    with pytest.raises(ValueError, match="no reduction 'medain'; there are sum, mean"):
        reduce.partial("medain", torch.ones(2))


# --- tiles


def slow_tile(x: torch.Tensor, height: int, width: int, pick) -> torch.Tensor:
    down, along = -(-x.shape[0] // height), -(-x.shape[1] // width)
    rows = [x[r : r + down] for r in range(0, x.shape[0], down)]
    return torch.tensor(
        [[float(pick(row[:, c : c + along])) for c in range(0, x.shape[1], along)] for row in rows]
    )


PICKS = {
    "extreme": lambda b: b.flatten()[b.abs().argmax()],
    "mean": lambda b: b.mean(),
    "max": lambda b: b.max(),
    "min": lambda b: b.min(),
    "std": lambda b: b.std(correction=0),
}


@pytest.mark.parametrize("shape", [(64, 96), (37, 101), (1, 50), (50, 1), (3, 3)])
@pytest.mark.parametrize("how", list(PICKS))
def test_a_pixel_is_its_block_reduced(shape, how):
    assert set(PICKS) == set(reduce.HOWS)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    got = reduce.tiles(x, height=16, width=24, how=how)
    assert got.dtype == torch.float32
    assert got.shape[0] <= 16 and got.shape[1] <= 24
    torch.testing.assert_close(got, slow_tile(x, 16, 24, PICKS[how]), rtol=1e-5, atol=1e-6)


def test_many_cache_blocks_make_the_same_tile(monkeypatch):
    x = torch.randn(301, 77)
    for how in reduce.HOWS:
        once = reduce.tiles(x, height=40, width=30, how=how)
        with monkeypatch.context() as patch:
            patch.setattr(reduce, "BLOCK_ELEMENTS", 500)
            torch.testing.assert_close(reduce.tiles(x, height=40, width=30, how=how), once)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]
)
@pytest.mark.parametrize("how", list(PICKS))
def test_tiles_of_every_dtype(dtype, how):
    x = (torch.rand(20, 30) * 9).to(dtype)
    want = reduce.tiles(x.float(), height=5, width=7, how=how)
    torch.testing.assert_close(reduce.tiles(x, height=5, width=7, how=how), want)


@pytest.mark.parametrize("cell", [(0, 0), (4095, 16383), (2048, 1), (777, 12345)])
def test_one_hot_cell_survives_any_tile(cell):
    x = torch.zeros(1, dtype=torch.bfloat16).expand(4096, 16384).clone()
    x[cell] = -7
    assert reduce.tiles(x, height=200, width=500).min() == -7
    r, c = min(cell[0], 4000), min(cell[1], 16000)
    near = reduce.tiles(x, (r, 4096), (c, 16384), height=9, width=9)
    assert near.min() == -7


def test_native_cells_are_the_values_themselves():
    x = torch.randn(30, 40).t()  # not contiguous
    assert torch.equal(reduce.tiles(x, (5, 15), (2, 9), height=100, width=100), x[5:15, 2:9])


@pytest.mark.parametrize("how", list(PICKS))
def test_nan_does_not_hide_its_neighbours(how):
    x = torch.arange(64.0).reshape(8, 8)
    x[0, 0] = math.nan  # one cell of a pixel
    x[4:6, 4:6] = math.nan  # all cells of a pixel
    got = reduce.tiles(x, height=4, width=4, how=how)
    block = x[:2, :2][~x[:2, :2].isnan()]
    assert got[0, 0] == pytest.approx(float(PICKS[how](block)))
    assert got[2, 2].isnan()
    assert got.isnan().sum() == 1
    assert reduce.count_nan(x) == 5
    assert reduce.count_nan(x, (0, 2), (0, 2)) == 1


def test_infinities_are_drawn_and_are_no_nan():
    x = torch.tensor([[math.inf, 1.0, -math.inf, -math.inf]])
    assert reduce.tiles(x, height=1, width=2).tolist() == [[math.inf, -math.inf]]
    assert reduce.tiles(x, height=1, width=2, how="max").tolist() == [[math.inf, -math.inf]]
    assert reduce.count_nan(x) == 0


def test_bounds_are_the_max_and_min_tiles():
    x = torch.randn(33, 44)
    most, least = reduce.bounds(x, height=5, width=6)
    assert torch.equal(most, reduce.tiles(x, height=5, width=6, how="max"))
    assert torch.equal(least, reduce.tiles(x, height=5, width=6, how="min"))


def test_a_part_outside_the_matrix_is_refused_with_both_sizes():
    with pytest.raises(ValueError, match=r"rows 0:9, columns 0:4 are no part of a 3 × 4 matrix"):
        reduce.tiles(torch.ones(3, 4), rows=(0, 9))
    with pytest.raises(ValueError, match="no tile 'median'"):
        reduce.tiles(torch.ones(3, 4), how="median")


# --- ranges


def test_histograms_of_shards_add_up_to_that_of_the_whole():
    x = torch.randn(1000)
    x[3], x[700] = math.nan, 9.0
    total = sum(
        (reduce.histogram(s, -3, 3, 32) for s in x[300:].split(200)),
        reduce.histogram(x[:300], -3, 3, 32),
    )
    whole = reduce.histogram(x, -3, 3, 32)
    assert torch.equal(total.counts, whole.counts)
    assert (total.below, total.above, total.nan) == (whole.below, whole.above, whole.nan)
    assert int(whole.counts.sum()) + whole.below + whole.above + whole.nan == 1000
    with pytest.raises(ValueError, match="do not add up"):
        whole + reduce.histogram(x, -3, 3, 16)


def test_one_outlier_does_not_set_the_range():
    x = torch.randn(400, 600, generator=torch.Generator().manual_seed(2))
    x[7, 7] = 4000.0
    lo, hi = reduce.robust_range(x)
    assert lo == -hi
    assert 2 < hi < 4


@pytest.mark.parametrize(
    ("values", "want"),
    [
        ([0.0] * 999 + [5.0], (0.0, 5.0)),  # a single hot cell on nothing
        ([0.0] * 3, (0.0, 1.0)),
        ([math.nan, math.inf], (0.0, 1.0)),
        ([7.0] * 5, (7.0, 14.0)),
        ([-7.0] * 5, (-7.0, 7.0)),
        ([0.0, 1.0], (0.0, 1.0)),
    ],
)
def test_a_range_is_never_empty(values, want):
    assert reduce.robust_range(torch.tensor(values)) == want
