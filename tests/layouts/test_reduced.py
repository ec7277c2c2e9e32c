"""A hook that keeps only a reduction: the unsharded model's, whatever the layout, and no pad
counts in it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flexkernel.errors import HookError, PlacementError
from tests.support import models, reference

ROWS = [[5, 6, 7, 8, 9], [10, 11], [12, 13, 14]]
BATCH = models.ids_and_mask([5, 2, 3])
BATCH["input_ids"] = torch.tensor([[0] * (5 - len(row)) + row for row in ROWS])
MASK = BATCH["attention_mask"].bool()
LAYER, GATE, EMBED = "model.layers.1", "model.layers.2.mlp.gate_proj", "model.embed_tokens"
PATTERN = "model.layers.1.self_attn.@pattern"
CASES = [
    (LAYER, "norm:-1"),
    (LAYER, "mean:1"),
    (LAYER, "std:0,1"),
    (GATE, "mean:-1"),
    (GATE, "amax"),
    (GATE, "var:1,2"),
    (GATE, "amin:0"),
    (GATE, "norm:1"),
    (EMBED, "sum:0,1"),
    (PATTERN, "mean:1"),
    (LAYER, "last"),
]
LAYOUTS = [{"tp": 2}, {"pp": 2}, {"dp": 2}, {"fsdp": 2}]


def wanted(x: torch.Tensor, reduce: str, mask: torch.Tensor) -> torch.Tensor:
    """By numpy's masked arrays: what of x is real, reduced."""
    op, _, dims = reduce.partition(":")
    over = tuple(int(dim) % x.dim() for dim in dims.split(",")) if dims else tuple(range(x.dim()))
    positions = 2 if x.dim() == 4 else 1
    real = mask if {0, positions} & set(over) else torch.ones_like(mask)
    real = real[:, None, :, None] if x.dim() == 4 else real[..., None]
    held = np.ma.array(x.double().numpy(), mask=~real.expand_as(x).numpy())
    found = {
        "mean": lambda: held.mean(over),
        "sum": lambda: held.sum(over),
        "var": lambda: held.var(over, ddof=1),
        "std": lambda: held.std(over, ddof=1),
        "amax": lambda: held.max(over),
        "amin": lambda: held.min(over),
        "norm": lambda: (held**2).sum(over) ** 0.5,
    }[op]()
    return torch.as_tensor(np.ma.filled(found, np.nan)).float()


@pytest.fixture(scope="module")
def unsharded(tiny):
    return reference.reference(tiny("llama"), **BATCH)


def of(unsharded, name: str) -> torch.Tensor:
    if ".@" in name:
        owner, _, point = name.rpartition(".@")
        return unsharded.attention[owner, point]
    return unsharded.outputs[name, 0, ""]


@pytest.mark.engines(2)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: next(iter(layout)))
def test_a_reduction_is_the_unsharded_models(layout, session, tiny, unsharded):
    session.load(tiny("llama"), **layout)
    for i, (name, reduce) in enumerate(CASES):
        session.hook(name, reduce=reduce, name=f"case {i}")
    run = session.run(ROWS)
    for i, (name, reduce) in enumerate(CASES):
        capture, whole = run[f"case {i}"], of(unsharded, name)
        want = whole[:, -1:] if reduce == "last" else wanted(whole, reduce, MASK)
        assert capture.shape == tuple(want.shape) and capture.dtype == torch.float32
        assert want.isfinite().all() and (want.abs().max() > 0)
        error = (capture.tensor() - want).abs().max() / want.abs().max()
        assert error < 1e-5, f"{name} {reduce}: {error}"
    norms = run["case 0"]
    assert norms.name == f"{LAYER} output norm:-1" and norms.evidence in (
        "plan",
        "scan+digest",
        "scan",
    )
    torch.testing.assert_close(norms.amax(), norms.tensor().amax())
    assert torch.equal(norms.mask, MASK) and run["case 1"].mask is None

    for name in ("case 0", "case 1", "case 5"):
        session.unhook(name)
    session.hook(LAYER, name="whole")
    session.hook(LAYER, reduce="norm:-1", name="by position")
    session.hook(LAYER, reduce="norm:-1", positions=[0, -1], name="of two")
    session.hook(LAYER, reduce="mean:1", name="over positions")
    session.hook(GATE, reduce="amax:1,2", name="over all")
    made = session.generate(ROWS, 6, eos_token_id=generated_in(session))
    whole = made[LAYER, "output"].tensor()
    assert made.forwards > 1 and not made.mask[:, 5:].all(), "a row has to end before the others"
    torch.testing.assert_close(
        made["by position"].tensor(), whole.norm(dim=-1), rtol=1e-5, atol=1e-6
    )
    assert made["by position"].shape == tuple(made.mask.shape)
    columns = [0, *range(4, 4 + made.forwards)]
    torch.testing.assert_close(
        made["of two"].tensor(), whole[:, columns].norm(dim=-1), rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(
        made["over positions"].tensor(), wanted(whole, "mean:1", made.mask), rtol=1e-5, atol=1e-6
    )
    assert made["over all"].shape == (3,) and made["over all"].tensor().isfinite().all()


def generated_in(session) -> int:
    """A token that one row makes sooner than the others."""
    new = session.generate(ROWS, 6).new_ids
    firsts = {
        token: [row.index(token) if token in row else 99 for row in new]
        for row in new
        for token in row
    }
    return next(
        token for token, at in firsts.items() if 0 < min(at) < 4 and sorted(at)[1] > min(at)
    )


@pytest.fixture
def loaded(session, tiny):
    session.load(tiny("llama"))
    return session


def test_a_gradient_is_reduced_too_and_losses_see_whole_captures_only(loaded):
    loaded.hook(LAYER, at="grad_output", name="whole")
    loaded.hook(LAYER, at="grad_output", reduce="norm:-1", name="norms")
    run = loaded.run(ROWS, loss="next_token")
    want = run["whole"].tensor().norm(dim=-1)
    assert want.max() > 0
    torch.testing.assert_close(run["norms"].tensor(), want, rtol=1e-5, atol=1e-9)
    loaded.hook(GATE, reduce="norm:-1")
    with pytest.raises(Exception, match="asks for the capture"):
        loaded.run(ROWS, loss=lambda logits, batch: batch.captures[GATE].sum())


def test_only_the_reduction_takes_memory(loaded):
    ids = [[5 + i % 200 for i in range(512)]]
    loaded.hook("model.layers.*.mlp.*_proj")
    whole = loaded.preview(ids).hooks["model.layers.*.mlp.*_proj"][1]
    loaded.hook("model.layers.*.mlp.*_proj", reduce="norm:-1")
    assert loaded.preview(ids).hooks["model.layers.*.mlp.*_proj"][1] < whole / 20
    run = loaded.run(ids)
    assert len(run) == 12 and all(capture.shape == (1, 512) for capture in run)
    assert (
        "norm:-1" in repr(loaded.hooks)
        and "norm:-1" in repr(run)
        and run["model.layers.*.mlp.*_proj"]
    )


def test_a_reduction_and_the_whole_are_told_apart(loaded):
    loaded.hook(LAYER)
    loaded.hook(LAYER, reduce="norm:-1", name="norms")
    run = loaded.run(ROWS)
    with pytest.raises(Exception, match="has 2 captures: say which"):
        run[LAYER]
    assert (
        run[LAYER, "output"].ndim == 3
        and run[LAYER, "output norm:-1"].ndim == run["norms"].ndim == 2
    )


def test_integers_and_booleans_keep_their_dtype_as_extremes(loaded):
    loaded.hook(EMBED, at="input", reduce="amax:1", name="ids")
    ids = loaded.run(ROWS)["ids"]
    assert ids.dtype == torch.int64 and ids.tensor().tolist() == [max(row) for row in ROWS]


def test_hooks_that_reduce_go_into_a_file_and_come_back(loaded, tmp_path):
    loaded.hook(LAYER, reduce="mean:0,1")
    before = loaded.hooks.hook_set
    loaded.hooks.save(tmp_path / "hooks.json")
    loaded.unhook()
    loaded.hooks.load(tmp_path / "hooks.json")
    assert loaded.hooks.hook_set == before and str(before.hooks[0].reduce) == "mean:0,1"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"reduce": "mode:1"}, "reduce='mode:1' is not OP:DIMS"),
        ({"reduce": "norm:x"}, "reduce='norm:x' is not OP:DIMS"),
        (
            {"reduce": "norm:3"},
            r"model\.layers\.1 output is B×S×64: it has no dim 3, which norm:3 would reduce",
        ),
        ({"reduce": "last", "positions": [0]}, "reduce='last' keeps the last position"),
    ],
)
def test_what_cannot_be_reduced_is_refused(options, says, loaded):
    with pytest.raises(HookError, match=says):
        loaded.hook(LAYER, **options)
    with pytest.raises(HookError, match="is kept whole"):
        loaded.hook("model.norm.weight", at="param_grad", reduce="norm")
    assert len(loaded.hooks) == 0


@pytest.mark.engines(2)
def test_addends_are_not_reduced(session, tiny):
    session.load(tiny("llama"), tp=2, placements={LAYER: "partial"})
    session.hook(LAYER, reduce="norm:-1")
    with pytest.raises(PlacementError, match=r"no norm:-1 of addends"):
        session.run(ROWS)[LAYER].tensor()
