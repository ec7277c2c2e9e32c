"""A capture behaves like its tensor: arithmetic, comparisons, torch's functions, a tensor's
methods."""

from __future__ import annotations

import operator

import numpy as np
import pytest
import torch

from flexkernel.session.tensorlike import TensorLike


class Held(TensorLike):
    """Gives a copy of its tensor. reads: how often it was asked."""

    def __init__(self, whole: torch.Tensor):
        self.whole = whole
        self.shape = tuple(whole.shape)
        self.dtype = whole.dtype
        self.reads = 0

    def tensor(self) -> torch.Tensor:
        self.reads += 1
        return self.whole.clone()


A = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1))
B = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(2))
OPERATORS = [operator.add, operator.sub, operator.mul, operator.truediv, operator.eq, operator.lt]
OPERATORS += [operator.ge, operator.ne, operator.pow]


@pytest.mark.parametrize("op", OPERATORS, ids=lambda op: op.__name__)
def test_operators_are_those_of_the_tensor_on_either_side(op):
    a, b = Held(A), Held(B)
    for got, want in [
        (op(a, b), op(A, B)),
        (op(a, B), op(A, B)),
        (op(A, b), op(A, B)),
        (op(a, 2.0), op(A, 2.0)),
        (op(2.0, b), op(2.0, B)),
    ]:
        assert type(got) is torch.Tensor and torch.equal(got.nan_to_num(), want.nan_to_num())


def test_functions_of_torch_take_it_alone_in_lists_and_by_keyword():
    a, b = Held(A), Held(B)
    assert torch.equal(torch.softmax(a, -1), torch.softmax(A, -1))
    assert torch.equal(torch.stack([a, b]), torch.stack([A, B]))
    assert torch.equal(torch.where(A > 0, input=a, other=b), torch.where(A > 0, A, B))
    assert torch.equal(torch.nn.functional.linear(A, Held(B[0])), A @ B[0].T)
    assert torch.equal(torch.einsum("abc,abc->a", a, b), torch.einsum("abc,abc->a", A, B))


def test_shapes_are_known_without_reading_it():
    a = Held(A)
    assert (len(a), a.dim(), a.ndim, a.numel()) == (2, 3, 3, 24)
    assert a.size() == torch.Size([2, 3, 4]) and a.size(-1) == 4 and a.reads == 0
    with pytest.raises(TypeError, match="0-d"):
        len(Held(torch.tensor(1.0)))


def test_methods_are_the_tensors():
    a = Held(A)
    assert torch.equal(a.abs(), A.abs()) and torch.equal(-a, -A) and torch.equal(abs(a), A.abs())
    assert a.to(torch.float64).dtype == torch.float64 and torch.equal(a.detach(), A)
    assert torch.equal(a.flatten(1).softmax(-1), A.flatten(1).softmax(-1))
    assert np.array_equal(a.numpy(), A.numpy()) and np.array_equal(np.asarray(a), A.numpy())
    assert Held(A.bfloat16()).numpy().dtype == np.float32
    assert float(Held(torch.tensor(2.5))) == 2.5 and [x.shape for x in a] == [A[0].shape] * 2


@pytest.mark.parametrize("name", ["zero_", "add_", "nothing", "_is_view", "grad"])
def test_what_would_change_it_or_is_not_there_is_not_an_attribute(name):
    with pytest.raises(AttributeError, match=f"'Held' object has no attribute '{name}'"):
        getattr(Held(A), name)


def test_a_dict_tells_two_of_equal_numbers_apart():
    a, b = Held(A), Held(A)
    assert len({a: 1, b: 2}) == 2 and bool((a == b).all())


def test_captures_of_runs_are_compared_and_stacked(session, tiny):
    session.load(tiny("llama"))
    session.hook("model.layers.*.mlp")
    one, two = session.run([[5, 6, 7]]), session.run([[5, 6, 8]])
    a, b = one["model.layers.2.mlp"], two["model.layers.2.mlp"]
    assert torch.equal(a - b, a.tensor() - b.tensor()) and bool((a == a).all())
    torch.testing.assert_close(a.sum(-1), a.tensor().sum(-1))
    torch.testing.assert_close(a.std(dim=0), a.tensor().std(dim=0), equal_nan=True)
    layers = one.matching("model.layers.*.mlp")
    assert [c.name for c in layers] == [f"model.layers.{i}.mlp" for i in range(4)]
    stacked = one.stack("model.layers.*.mlp")
    assert stacked.shape == (4, 1, 3, 64) and torch.equal(stacked[2], a.tensor())
    assert one.matching("nothing.*") == []
    assert "model.layers.2.mlp" in one._ipython_key_completions_()
