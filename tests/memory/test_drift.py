"""Drift: one number that no large neighbour hides, and that pads do not reach."""

from __future__ import annotations

import math

import pytest
import torch

from flexkernel.memory.drift import drift, real_part
from flexkernel.wire import ShapeFormula

MASK = torch.tensor([[0, 1, 1], [1, 1, 1]]).bool()


def test_equal_is_zero_whatever_is_in_it():
    whole = torch.tensor([[1.0, math.inf], [math.nan, -math.inf], [0.0, 0.0]])
    assert drift(whole, whole.clone()) == 0.0


def test_it_is_relative_to_the_vector_not_to_the_largest():
    truth = torch.tensor([[1000.0, 0.0], [3.0, 4.0]])
    got = truth.clone()
    got[1, 0] += 0.5
    assert drift(got, truth) == pytest.approx(0.1)


def test_a_vector_of_zeros_is_measured_against_the_others():
    truth = torch.tensor([[10.0, 0.0], [0.0, 0.0]])
    assert drift(truth + 1e-6, truth) == pytest.approx(math.sqrt(2) * 1e-4, rel=1e-2)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_or_infinity_on_one_side_only_is_infinitely_far(bad):
    truth = torch.ones(2, 2)
    got = truth.clone()
    got[0, 0] = bad
    assert drift(got, truth) == math.inf and drift(truth, got) == math.inf


def test_integers_are_equal_or_not():
    ids = torch.tensor([[1, 2]])
    assert drift(ids, ids.clone()) == 0.0 and drift(ids, ids + 1) == math.inf


def test_what_is_not_real_does_not_count():
    truth = torch.ones(2, 3, 4)
    got = truth.clone()
    got[0, 0] = 99.0
    real = real_part(ShapeFormula("", ((1, "B"), (1, "S"), (4, "")), "float32"), MASK)
    assert drift(got, truth) > 1 and drift(got, truth, real) == 0.0
    got[0, 1, 0] = 1.5
    assert drift(got, truth, real) == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("dims", "shape"),
    [
        (((1, "B"), (1, "S"), (4, "")), (2, 3, 1)),
        (((1, "B"), (8, ""), (1, "S"), (1, "P+S")), (2, 1, 3, 1)),  # a pattern: the queries
        (((1, "B"), (2, ""), (1, "P+S"), (4, "")), (2, 1, 3, 1)),  # keys
        (((1, "S"), (1, "B"), (4, "")), (3, 2, 1)),
        (((1, ""), (1, "S"), (4, "")), (1, 3, 1)),
        (((1, "B*S"), (4, "")), (6, 1)),
    ],
)
def test_the_mask_lies_along_the_positions(dims, shape):
    real = real_part(ShapeFormula("", dims, "float32"), MASK)
    assert real is not None and tuple(real.shape) == shape
    assert int((~real).sum()) == (0 if 2 not in shape and 6 not in shape else 1)


@pytest.mark.parametrize(
    "dims", [((4, ""),), ((1, "B"), (4, "")), ((2, "B"), (1, "S")), ((1, "B"), (2, "S")), None]
)
def test_a_value_without_positions_of_its_own_has_no_mask(dims):
    assert real_part(ShapeFormula("", dims, "float32"), MASK) is None
