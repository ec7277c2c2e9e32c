"""Gradients of parameters: edited whole, once, and what a step is then made of, under every
layout."""

from __future__ import annotations

import pytest
import torch

import flexkernel as fk
from tests.support import layouts, reference, unsharded
from tests.support.gradients import TOLERANCE, WEIGHT, loss, relative
from tests.support.rows import BATCH, ROWS

WEIGHTS = "model.layers.*.mlp.gate_proj.weight"
GATE, EMBEDDING = "model.layers.1.mlp.gate_proj.weight", "model.embed_tokens.weight"
VALUE = torch.randn(64, generator=torch.Generator().manual_seed(2))
UNIT = VALUE / VALUE.norm()


def clipped(x: torch.Tensor, ctx=None) -> torch.Tensor:
    """Needs the whole: a shard's norm is another one."""
    return x / x.norm() * 0.25


def neurons(x: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    x[..., [0, -1]] = 0
    return x


# (what the hook is given, the same in plain torch)
EDITS = [
    ({"edit": "clipped"}, clipped),
    ({"edit": "scale", "value": -2.0}, lambda x: x * -2),
    ({"edit": "add", "value": VALUE}, lambda x: x + VALUE),
    ({"edit": "clamp", "value": (-1e-3, 2e-3)}, lambda x: x.clamp(-1e-3, 2e-3)),
    ({"edit": "project_out", "value": VALUE}, lambda x: x - (x @ UNIT)[..., None] * UNIT),
    ({"edit": "zero", "neurons": [0, -1]}, neurons),
]


@pytest.mark.long("pp2xfsdp2", "tp2xfsdp2")
@pytest.mark.parametrize("layout", layouts.ALL)
def test_an_edit_sees_the_whole_gradient(session, tiny, layout):
    session.load(tiny("llama"), **layout)
    session.edit("clipped")(clipped)
    want = unsharded.gradients(tiny("llama"), ROWS, loss)
    for how, function in EDITS:
        session.hook(WEIGHTS, at="param_grad", capture="both", name="edited", **how)
        run = session.run(ROWS, loss=loss)
        assert run.loss == pytest.approx(want.loss, rel=1e-5)
        count = 0
        for name in (n for n in want.parameters if n.endswith("gate_proj.weight")):
            before, gradient = run[name, "param_grad before"].tensor(), want.parameters[name]
            after, edited = run[name, "param_grad"].tensor(), function(want.parameters[name])
            assert relative(before, gradient) < TOLERANCE
            error = (after - edited).abs().max() / max(edited.abs().max(), gradient.abs().max())
            assert error < 2 * TOLERANCE, (how, name)
            assert relative(edited, gradient) > 1000 * TOLERANCE  # there is something to compare
            count += 1
        assert count == 4


@pytest.mark.long("pp2xfsdp2", "tp2xpp2")
@pytest.mark.parametrize("layout", layouts.ALL)
def test_a_step_is_made_of_the_edited_gradients(session, tiny, layout):
    """Two edits of one gradient are made in their order; a parameter of two names, on two stages,
    has one gradient."""
    session.load(tiny("llama"), **layout)
    session.edit("clipped")(clipped)
    session.hook(WEIGHTS, at="param_grad", edit="clipped", name="first", capture="none")
    session.hook(GATE, at="param_grad", edit="scale", value=3.0, name="second", capture="none")
    session.hook(EMBEDDING, at="param_grad", edit="clipped", name="embedding", capture="none")
    model, gradients = (
        reference.load(tiny("llama")),
        unsharded.gradients(tiny("llama"), ROWS, loss).parameters,
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            gradient = gradients[name]
            gradient = (
                clipped(gradient)
                if name.endswith("gate_proj.weight") or name == EMBEDDING
                else gradient
            )
            parameter -= gradient * (3 if name == GATE else 1)
        want = model(**BATCH, use_cache=False).logits
    session.train_step(
        ROWS, loss, lambda parameters: torch.optim.SGD(parameters, lr=1.0), parameters="**"
    )
    real = WEIGHT.abs().sum(-1) > 0
    torch.testing.assert_close(
        session.run(ROWS).logits.tensor()[real], want[real], atol=1e-3, rtol=1e-4
    )
    for name in (GATE, EMBEDDING, "model.layers.0.mlp.up_proj.weight"):
        assert (
            relative(session.parameter(name).tensor(), dict(model.named_parameters())[name]) < 2e-5
        ), name


@pytest.mark.engines(2)
def test_an_edit_that_cannot_be_made_is_said_on_all_ranks(session, tiny):
    session.load(tiny("llama"), pp=2)
    for function, message in [
        (lambda x, ctx: x[:1], r"returned \(1, "),
        (lambda x, ctx: None, "returned NoneType"),
        (lambda x, ctx: 1 / 0, "ZeroDivisionError"),
    ]:
        session.edit("mine")(function)
        session.hook(GATE, at="param_grad", edit="mine")
        with pytest.raises(fk.errors.EditError, match=message):
            session.run(ROWS, loss=loss)
    session.edit("mine")(lambda x, ctx: x * float("nan"))
    run = session.run(ROWS, loss=loss)
    assert run[GATE, "param_grad"].tensor().isnan().all()
    session.unhook()
    session.hook("model.layers.3.mlp.gate_proj.weight", at="param_grad", edit="zero", name="late")
    with pytest.raises(fk.errors.FlexError, match="no gradient reached it"):
        session.hook("model.layers.0.mlp", name="early")
        session.run(ROWS, loss=lambda logits, batch: batch.captures["model.layers.0.mlp"].sum())
    session.unhook()
    session.hook(GATE, at="param_grad")
    gradient = session.run(ROWS, loss=loss)[GATE, "param_grad"].tensor()
    assert (
        relative(gradient, unsharded.gradients(tiny("llama"), ROWS, loss).parameters[GATE])
        < TOLERANCE
    )
