"""A loss whose gradients tell every logit from every other, and their comparison with the unsharded
model's. Importable on engines."""

from __future__ import annotations

import functools

import torch

from tests.support import on_engines, reference, unsharded
from tests.support.edits import Case, define
from tests.support.rows import MASK, ROWS

__all__ = [
    "TOLERANCE",
    "WEIGHT",
    "compare",
    "exact_norms",
    "hook_all",
    "loss",
    "relative",
    "through_edits",
]

TOLERANCE = 5e-6  # of a gradient's own scale
WEIGHT = torch.randn(3, 7, 256, generator=torch.Generator().manual_seed(1)) * MASK[..., None]


def loss(logits, batch=None):
    """Weighs every logit at every real position differently: no gradient is zero, or like its
    neighbour's."""
    return (logits * WEIGHT).sum() / 100


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got - want).abs().max() / want.abs().max().clamp(min=1e-30)).item()


def compare(
    run, want: reference.Gradients, tolerance: float = TOLERANCE
) -> dict[str, tuple[int, float]]:
    """at → (how many gradients were compared, the worst error); asserts each of them."""
    found: dict[str, tuple[int, float]] = {}
    for c in run:
        key = c.key
        if key.at == "param_grad":
            expected = want.parameters[key.module]
        elif ".@" in key.module:
            expected = want.attention.get(tuple(key.module.split(".@")))
        else:
            of = want.outputs if key.at == "grad_output" else want.inputs
            expected = of.get((key.module, key.index))
            expected = (
                of.get((key.module, "")) if expected is None and key.index == "0" else expected
            )
        if expected is None or "rotary_emb" in key.module or "position_embeddings" in key.index:
            continue
        error = relative(c.tensor(), expected)
        assert error < tolerance, (str(key), error)
        count, worst = found.get(key.at, (0, 0.0))
        found[key.at] = count + 1, max(worst, error)
    return found


def hook_all(session) -> None:
    session.hook("**", at="grad_output", name="outputs")
    session.hook("**", at="grad_input", name="inputs")
    session.hook("**", at="param_grad", name="parameters")


def through_edits(session, folder, cases: list[Case]) -> None:
    """Gradients of the loaded model, with each of these edits, are those of the unsharded one with
    it."""
    define(session)
    plain = unsharded.gradients(folder, ROWS, loss)
    for case in cases:
        want = unsharded.gradients(folder, ROWS, loss, case=case)
        session.unhook() if session.hooks.hook_set.hooks else None
        session.hook(case.module, name="edited", **case.how)
        session.hook("model.layers.*", at="grad_output", name="layers")
        session.hook("model.layers.*.mlp.gate_proj", at="grad_output", name="gates")
        session.hook("model.layers.*.mlp.*.weight", at="param_grad", name="weights")
        session.hook("model.embed_tokens.weight", at="param_grad", name="embedding")
        run = session.run(ROWS, loss=loss)
        # behind what sets the value
        gone = [c.key for c in run if "grad" in c.key.at and c.error is not None]
        for key in gone:
            assert "no gradient reached it" in str(run.captures.pop(key).error)
        for key in [k for k in run.captures if k.hook == "edited" or k.module == case.module]:
            del run.captures[key]  # the reference has the gradient behind the edit there
        assert case.name in ("set", "zero sharded") or not gone, (case.name, gone)
        found = compare(run, want, 2e-5)
        assert found["grad_output"][0] >= 3 and found["param_grad"][0] >= 10, (case.name, found)
        first = "model.embed_tokens.weight"
        moved = relative(want.parameters[first], plain.parameters[first])
        assert moved > 100 * 2e-5, (case.name, "has to change the gradient")


def exact_norms() -> None:
    """transformers' norm goes through float32, whose rounding would drown a difference of
    losses."""
    for module in on_engines.runtime().model.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            norm = functools.partial(
                torch.nn.functional.rms_norm, normalized_shape=(64,), eps=module.variance_epsilon
            )
            module.forward = functools.partial(
                lambda m, norm, x: norm(x, weight=m.weight), module, norm
            )
