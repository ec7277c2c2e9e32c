"""Generation: under every layout the tokens of the unsharded model's own generate, and at each step its activations."""

from __future__ import annotations

import models
import pytest
import reference
import torch

from flexkernel.errors import CaptureError

TOLERANCE = 2e-5
BATCH = models.ids_and_mask([5, 9, 7])
ROWS = [r[m.bool()].tolist() for r, m in zip(BATCH["input_ids"], BATCH["attention_mask"], strict=True)]
S, N = 9, 32
POINTS = ("q", "k", "v", "pattern", "z")
LAYOUTS = {
    1: [{}],
    2: [{"tp": 2}, {"pp": 2}, {"fsdp": 2}, {"dp": 2}],
    4: [{"tp": 2, "pp": 2}],
}
layouts = [
    pytest.param(layout, id="x".join(f"{k}{v}" for k, v in layout.items()) or "one", marks=pytest.mark.engines(n))
    for n, group in LAYOUTS.items()
    for layout in group
]
two = pytest.mark.engines(2)


def truth(model, new: int = N, rows=ROWS, **options) -> list[list[int]]:
    """What the unsharded model's own generate adds to each row, run by itself."""
    found = []
    for row in rows:
        ids = torch.tensor([row])
        mask = torch.ones_like(ids)
        out = model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0, **options)
        found.append(out[0, len(row) :].tolist())
    return found


def over_the_text(model, run) -> reference.Reference:
    """One forward of the unsharded model, without a cache, over all that the run fed."""
    ids, mask = torch.tensor(run.ids)[:, : run.mask.shape[1]], run.mask.long()
    return reference.reference(model, ids, mask, (mask.cumsum(-1) - 1).clamp(min=0))


def compare(run, truth: reference.Reference) -> int:
    """Every capture at its real positions; how many were compared."""
    B, T = run.mask.shape
    real, compared = run.mask, 0
    for capture in run:
        module, _, point = capture.key.module.partition(".@")
        got = capture.tensor()
        if point:
            want = truth.attention[module, point]
            if point != "z":
                got, want = got.transpose(1, 2), want.transpose(1, 2)
        else:
            values = truth.outputs if capture.key.at == "output" else truth.inputs
            want = values[module, capture.key.call, capture.key.index]
        if got.shape[0] == B * T:
            got, want = (x.unflatten(0, (B, T)) for x in (got, want))
        assert got.shape == want.shape, capture
        error = (got[real[: len(got)]] - want[real[: len(want)]]).abs().max().item()
        assert error <= TOLERANCE * max(1.0, want.abs().max().item()), f"{capture.name}: off by {error:.1e}"
        compared += 1
    return compared


def hook_everything(session) -> None:
    session.hook("**")
    session.hook("model.layers.*.mlp.**", at="input")
    for point in POINTS:
        session.hook(f"**.@{point}")


# --- equal to the unsharded model ------------------------------------------------------------------


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("layout", layouts)
def test_tokens_and_every_activation_are_the_unsharded_models(session, tiny, layout, attn):
    """Three left-padded rows over up to two groups of ranks: rows are uneven, too."""
    model = reference.load(tiny("llama"), attn=attn)
    session.load(tiny("llama"), attn=attn, **layout)
    hook_everything(session)
    run = session.generate(ROWS, max_new_tokens=N)
    assert run.new_ids == truth(model) and all(len(row) == N for row in run.new_ids)
    assert run.forwards == N and run.mask.shape == (3, S + N - 1)
    assert compare(run, over_the_text(model, run)) > 80
    pattern = run["model.layers.2.self_attn.@pattern"].tensor()
    assert pattern.shape == (3, 8, S + N - 1, S + N - 1)
    assert pattern.triu(1).transpose(1, 2)[run.mask].abs().max() == 0, "zeros where a query does not see"
    assert run.logits.shape == (3, N, 256)
    torch.testing.assert_close(run.logits[1], run["lm_head"][1, S - 1 :])
    assert run.logits.tensor().argmax(-1).tolist() == run.new_ids


ENDS = 11  # row 1 comes to it in its fourth token, the others never or later


@pytest.mark.parametrize("layout", layouts)
def test_a_row_that_ends_early_ends_and_the_run_ends_with_the_last(session, tiny, layout):
    model = reference.load(tiny("llama"))
    session.load(tiny("llama"), **layout)
    hook_everything(session)
    for end in ([176, ENDS], [176, ENDS, 242]):
        run = session.generate(ROWS, max_new_tokens=N, eos_token_id=end)
        want = truth(model, eos_token_id=end)
        assert run.new_ids == want and len({len(row) for row in want}) > 1, "rows end at different steps"
        assert run.forwards == max(map(len, want))
        assert run.mask[:, S:].sum(1).tolist() == [len(row) - 1 for row in want]
        assert compare(run, over_the_text(model, run)) > 80
        assert {len(row) for row in run.tokens} == {S + run.forwards}
    assert run.forwards < N and run["model.layers.1.mlp", "output"].shape == (3, S + run.forwards - 1, 64)
    assert run["model.layers.1.mlp", "output"].norm(dim=-1).shape == (3, S + run.forwards - 1)
    assert torch.equal(run["model.layers.1.mlp", "output"][1], run["model.layers.1.mlp", "output"].tensor()[1])
    with pytest.raises(CaptureError, match="one piece"):
        run["model.layers.1.mlp", "output"].as_value()


@pytest.mark.parametrize("layout", [{}, {"fsdp": 2}], ids=["one", "fsdp2"])
@pytest.mark.parametrize("rows", [1, 3])
@two
def test_one_token_is_the_plain_run_with_its_next_token(session, tiny, layout, rows):
    if not layout:
        layout = {"pp": 2}
    session.load(tiny("llama"), **layout)
    hook_everything(session)
    plain = session.run(ROWS[:rows])
    run = session.generate(ROWS[:rows], max_new_tokens=1)
    assert run.forwards == 1 and run.mask.tolist() == plain.mask.tolist()
    assert [ids[0] for ids in run.new_ids] == plain.logits[:, -1].argmax(-1).tolist()
    assert len(plain) == len(run) > 80
    for a, b in zip(plain, run, strict=True):
        torch.testing.assert_close(a.tensor(), b.tensor(), atol=TOLERANCE, rtol=TOLERANCE)
