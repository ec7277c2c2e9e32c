"""The tensors inside a value: all of them, each under a path that leads back to it."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.modeling_outputs import BaseModelOutputWithPast

from flexkernel.engine.model.pytree import inputs, leaf, leaves

A, B, C = (torch.full((1,), float(i)) for i in range(3))


@dataclasses.dataclass
class Pair:
    first: Any
    second: Any = None


Named = collections.namedtuple("Named", "x y")


def paths(value: Any) -> list[str]:
    return [path for path, _ in leaves(value)]


@pytest.mark.parametrize(
    ("value", "want"),
    [
        (A, [""]),
        ((A, B), ["0", "1"]),
        ([A, None, B], ["0", "2"]),
        ({"x": A, "y": {"z": B}}, ["x", "y.z"]),
        ({3: A}, ["3"]),
        (Pair(A, (B, C)), ["first", "second.0", "second.1"]),
        (Named(A, B), ["0", "1"]),
        (BaseModelOutputWithPast(last_hidden_state=A), ["last_hidden_state"]),
        ((Pair({"k": [A]}),), ["0.first.k.0"]),
        (None, []),
        ((1, "x", True, 2.5, Pair), []),
        ({}, []),
        (torch.nn.Parameter(A), [""]),
    ],
    ids=lambda value: "" if isinstance(value, list) else type(value).__name__,
)
def test_every_tensor_is_found_in_order(value, want):
    assert paths(value) == want


def test_a_string_is_no_sequence_of_leaves():
    assert paths({"a": "text", "b": A}) == ["b"]


values = st.recursive(
    st.sampled_from([None, 1, "text"]) | st.builds(lambda i: torch.tensor(i), st.integers(0, 99)),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text("ab.", max_size=3), inner, max_size=3)
        | st.builds(Pair, inner, inner)
    ),
    max_leaves=8,
)


@given(values)
def test_a_path_leads_to_its_tensor(value):
    """Keys may hold dots; where two paths read the same the first is meant, always."""
    seen: dict[str, torch.Tensor] = {}
    for path, tensor in leaves(value):
        seen.setdefault(path, tensor)
    assert all(leaf(value, path) is tensor for path, tensor in seen.items())


@pytest.mark.parametrize("path", ["2", "x", "0.0", "", ".", "-1"])
def test_a_path_to_nothing_is_none(path):
    assert leaf((A, B), path) is None


def test_inputs_are_arguments_by_number_then_by_name():
    assert paths(inputs((A, None), {"mask": B, "pair": (C,)})) == ["0", "mask", "pair.0"]
    assert leaf(inputs((A,), {"mask": B}), "mask") is B
