"""How a model is called: by the names its forward takes, or as its user says; what is not known is
refused."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import nn

import flexkernel as fk
from flexkernel.cluster.packing import pack
from flexkernel.engine.model.caller import Caller
from flexkernel.errors import LoadError, PromptError
from tests.support import models

IDS, MASK, PLACES = (
    torch.tensor([[5, 6, 7]]),
    torch.ones(1, 3, dtype=torch.long),
    torch.tensor([[0, 1, 2]]),
)
BATCH = {"input_ids": IDS, "attention_mask": MASK, "position_ids": PLACES}


def given(forward, **more) -> dict:
    """What a model with this forward is given, by the name of its own parameter."""
    kind = type("Model", (nn.Module,), {"forward": forward})
    return Caller(kind())(BATCH, **more)


def same(got: dict, want: dict) -> None:
    assert set(got) == set(want)
    assert all(got[name] is want[name] or got[name] == want[name] for name in want)


def test_a_forward_gets_by_name_what_it_asks_for_by_name():
    def forward(
        self, input_ids, attention_mask=None, position_ids=None, use_cache=None, labels=None
    ):
        return locals()

    got = given(forward, use_cache=False)
    assert got.pop("self") is not None
    same(got, {**BATCH, "use_cache": False, "labels": None})


def test_the_ids_go_to_the_first_parameter_where_none_is_called_so():
    def forward(self, x, targets=None):
        return {"x": x, "targets": targets}

    same(given(forward, use_cache=False), {"x": IDS, "targets": None})
    assert (
        Caller(type("Model", (nn.Module,), {"forward": forward})()).takes("attention_mask") is False
    )


def test_the_order_of_the_parameters_does_not_matter():
    def forward(self, attention_mask, *, input_ids):
        return {"mask": attention_mask, "ids": input_ids}

    same(given(forward), {"mask": MASK, "ids": IDS})


@pytest.mark.parametrize("named", [True, False])
def test_one_that_takes_any_name_gets_all(named):
    if named:

        def forward(self, tokens, **kwargs):
            return {"input_ids": tokens, **kwargs}
    else:

        def forward(self, *args, **kwargs):
            assert not args
            return kwargs

    same(given(forward, use_cache=False), {**BATCH, "use_cache": False})


@pytest.mark.parametrize(
    ("forward", "says"),
    [
        (
            lambda self, tokens, start_pos, cache=None: 0,
            r"Model.forward\(tokens, start_pos, cache\) needs start_pos",
        ),
        (lambda self: 0, r"Model.forward\(\) takes no token ids"),
        (lambda self, attention_mask: 0, r"Model.forward\(attention_mask\) takes no token ids"),
        (lambda self, *, tokens: 0, "needs tokens"),
    ],
)
def test_what_else_it_needs_is_refused_with_what_to_write(forward, says):
    with pytest.raises(
        LoadError,
        match=says + r": say how it is called, .*forward=lambda model, batch: model\(batch",
    ):
        given(forward)


def test_the_users_own_way_is_given_the_model_and_the_batch():
    def forward(self, tokens, start_pos):
        return {"tokens": tokens, "start_pos": start_pos}

    model = type("Model", (nn.Module,), {"forward": forward})()
    call = Caller(model, pickle.dumps(_started))
    same(call(BATCH, use_cache=False), {"tokens": IDS, "start_pos": 3})
    assert not call.caches
    call.check_pads(True)


def _started(model, batch):
    assert set(batch) == set(BATCH)
    return model(batch["input_ids"], start_pos=3)


def test_wrappers_do_not_hide_the_signature():
    def forward(self, tokens):
        return tokens

    model = torch.compile(type("Model", (nn.Module,), {"forward": forward})(), backend="eager")
    assert Caller(model)(BATCH, use_cache=False) is IDS


def test_a_forward_without_a_mask_refuses_pads():
    class Model(nn.Module):
        def forward(self, tokens):
            return tokens

    call = Caller(Model())
    call.check_pads(False)
    with pytest.raises(
        PromptError, match=r"Model.forward takes no attention_mask, so that it would read the pads"
    ):
        call.check_pads(True)


def test_megatrons_mask_means_something_else():
    """True is where attention must not look: transformers' mask would hide every token but the
    pads."""

    def forward(self, input_ids, position_ids, attention_mask, labels=None):
        return {
            "input_ids": input_ids,
            "position_ids": position_ids,
            "attention_mask": attention_mask,
        }

    model = type(
        "GPTModel", (nn.Module,), {"forward": forward, "__module__": "megatron.core.models.gpt"}
    )()
    got = Caller(model)(BATCH)
    assert got["attention_mask"].tolist() == [
        [[[False, True, True], [False, False, True], [False, False, False]]]
    ]
    same({**got, "attention_mask": None}, {**BATCH, "attention_mask": None})
    with pytest.raises(PromptError, match="has a mask of another meaning"):
        Caller(model).check_pads(True)


def test_models_of_transformers_are_called_as_before():
    for arch in ("llama", "gpt2"):
        call = Caller(models.build(arch))
        assert (
            all(call.takes(name) for name in (*BATCH, "use_cache", "past_key_values"))
            and call.caches
        )
        call.check_pads(True)


class Doubling(nn.Module):
    """forward(ids, twice): what has to be told something."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(32, 4)

    def forward(self, ids, twice):
        return self.embed(ids) * (2 if twice else 1)


def test_a_session_says_it_before_anything_is_loaded(session, tiny):
    session.load(tiny("llama"))
    with pytest.raises(LoadError, match=r"Doubling.forward\(ids, twice\) needs twice"):
        session.load(Doubling, reference=Doubling)
    assert session.run([[5, 6]]).logits.shape == (1, 2, 256)
    session.load(
        Doubling,
        reference=Doubling,
        forward=lambda model, batch: model(batch["input_ids"], twice=True),
    )
    run = session.run([[5, 6]])
    assert torch.equal(run.logits.tensor(), 2 * session.parameter("embed.weight")[[5, 6]][None])


def test_what_belongs_to_a_builder_is_refused_for_a_folder(session, tiny):
    with pytest.raises(LoadError, match="forward=, names=: that belongs to a builder"):
        session.load(str(tiny("llama")), forward=lambda model, batch: None, names={"a": "b"})


def test_a_model_without_a_forward_has_parameters_all_the_same(session):
    session.load(Bare)
    assert torch.equal(session.parameter("weight").tensor(), torch.ones(3))
    with pytest.raises(fk.errors.EngineError, match='missing the required "forward" function'):
        session.run([[5, 6]])


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))


def test_what_is_no_function_is_said():
    with pytest.raises(
        LoadError, match="forward= is a function of the model and a batch; found int"
    ):
        Caller(nn.Linear(1, 1), pack(3))
