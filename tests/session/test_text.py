"""Short forms say what they stand for."""

from __future__ import annotations

import pytest

from flexkernel.session.text import ranged, spans


@pytest.mark.parametrize(
    ("numbers", "text"),
    [([3, 9], "3, 9"), ([9, 3], "3, 9"), (range(30), "0–29"), ([0, 1, 5], "0, 1, 5"), ([4], "4")],
)
def test_a_span_holds_every_number_in_it(numbers, text):
    assert spans(list(numbers)) == text


def test_names_are_one_with_the_numbers_there_are():
    assert ranged(["layers.9.mlp", "layers.3.mlp"]) == "layers.3, 9.mlp"
    assert ranged(["head"]) == "head"


def test_two_numbers_that_go_together_are_not_said_to_be_all_pairs():
    assert ranged(["layers.0.experts.5", "layers.3.experts.1"]) == (
        "layers.0.experts.5, layers.3.experts.1"
    )
