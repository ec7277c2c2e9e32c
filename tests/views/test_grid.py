"""A source as a matrix: leading dims become rows, and every row, column and shard has its
words."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from flexkernel.memory import reduce
from flexkernel.views.axis import ticks_in
from flexkernel.views.grid import Grid, exact, visible
from tests.support.sources import FarSource, Source


def test_batch_and_position_become_rows_with_their_tokens():
    grid = Grid(Source(torch.zeros(2, 3, 8), tokens=[["<s>", " a", "\n"], ["<s>", "b"]]))
    assert (grid.num_rows, grid.num_cols) == (6, 8)
    labels = [grid.row_label(row) for row in range(6)]
    assert labels == ["[0, 0] <s>", "[0, 1] ·a", "[0, 2] ↵", "[1, 0] <s>", "[1, 1] b", "[1, 2]"]
    assert grid.row_name(1) == "[0, 1] ·a, "


@pytest.mark.parametrize(
    ("shape", "labels"),
    [
        ((4,), [""]),
        ((2, 4), ["0", "1"]),
        ((1, 2, 2, 3), ["[0, 0, 0]", "[0, 0, 1]", "[0, 1, 0]", "[0, 1, 1]"]),
    ],
)
def test_rows_of_other_ranks(shape, labels):
    grid = Grid(torch.zeros(shape))
    assert [grid.row_label(row) for row in range(grid.num_rows)] == labels


@pytest.mark.parametrize("far", [False, True])
@pytest.mark.parametrize("shape", [(9,), (5, 9), (2, 3, 9), (2, 2, 3, 9)])
def test_a_part_is_the_elements_themselves(shape, far):
    x = torch.randn(shape)
    grid = Grid((FarSource if far else Source)(x))
    whole = x.reshape(-1, 9)
    for rows in {(0, 1), (0, grid.num_rows), (grid.num_rows // 3, grid.num_rows)}:
        assert torch.equal(grid.part(rows, (2, 7)), whole[slice(*rows), 2:7])


def test_a_source_that_reduces_itself_is_never_gathered():
    grid = Grid(FarSource(torch.randn(2, 30, 50)))
    most, least = grid.bounds((0, 60), (0, 50), 10, 10)
    assert torch.equal(
        most, reduce.tiles(grid.source.held.reshape(60, 50), height=10, width=10, how="max")
    )
    assert (least <= most).all()
    assert grid.count_nan() is None


@pytest.mark.parametrize("cuts", [[3, 6, 8], [0, 3, 6, 8], [3, 6]])  # ends, edges, or inner cuts
def test_shards_of_the_last_dim_are_pieces_of_the_columns(cuts):
    grid = Grid(Source(torch.zeros(2, 8), shards=[(-1, cuts, ["rank 0", "rank 1", 2])]))
    assert grid.col_axis((0, 8), 9).shards == [(0, 3, "rank 0"), (3, 6, "rank 1"), (6, 8, "rank 2")]
    assert grid.col_axis((4, 7), 9).shards == [(4, 6, "rank 1"), (6, 7, "rank 2")]
    assert grid.row_axis((0, 2), 9).shards == []


def test_shards_of_a_leading_dim_repeat_for_each_index_before_it():
    grid = Grid(Source(torch.zeros(2, 4, 8), shards=[(1, [3, 4], ["rank a", 7])]))
    assert grid.row_axis((0, 8), 9).shards == [
        (0, 3, "rank a"),
        (3, 4, "rank 7"),
        (4, 7, "rank a"),
        (7, 8, "rank 7"),
    ]
    batch = Grid(Source(torch.zeros(2, 4, 8), shards=[(0, [1, 2], [0, 1])]))
    assert batch.row_axis((0, 8), 9).shards == [(0, 4, "rank 0"), (4, 8, "rank 1")]


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        ("<s>", "<s>"),
        ("</think>", "</think>"),
        ("<script>alert(1)</script>", "<script>alert(1)</script>"),
        (" the", "·the"),
        ("   ", "···"),
        ("a b ", "a b·"),
        ("\n\n", "↵↵"),
        ("\t", "⇥"),
        ("\x1b[31m", "\\u001b[31m"),
        ("\u202eevil", "\\u202eevil"),
        ("שלום", "שלום"),
        ("👩\u200d👧", "👩\u200d👧"),
        ("\ufffd", "\ufffd"),
        ("&amp;", "&amp;"),
        ("", ""),
    ],
)
def test_every_token_is_one_visible_line(token, shown):
    assert visible(token) == shown


def test_ticks_are_round_and_no_more_than_asked_for():
    for start, stop, most in [
        (0, 5, 5),
        (0, 4096, 20),
        (17, 16384, 9),
        (3, 4, 1),
        (1_000_000, 3_000_000, 7),
    ]:
        ticks = ticks_in(start, stop, most)
        assert len(ticks) <= most
        assert all(start <= t < stop for t in ticks)
        steps = {b - a for a, b in pairwise(ticks)}
        assert len(steps) <= 1
    assert ticks_in(2, 5, 3) == [2, 3, 4]


def test_elements_read_as_their_dtype_has_them():
    assert exact(torch.tensor(0.1)) == "0.1"
    assert exact(torch.tensor(0.1, dtype=torch.float64)) == "0.1"
    assert exact(torch.tensor(3)) == "3"
    assert exact(torch.tensor(True)) == "True"
    assert exact(torch.tensor(float("nan"))) == "nan"


def test_numpy_arrays_are_taken_and_complex_numbers_refused():
    assert Grid(np.ones((2, 3), np.float32)).dtype == "float32"
    with pytest.raises(TypeError, match=r"a map shows real numbers, not complex64; take \.abs\(\)"):
        Grid(torch.zeros(2, 2, dtype=torch.complex64))
