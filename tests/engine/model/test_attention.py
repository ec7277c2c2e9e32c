"""Inside attention: five points a module, equal to what other means say of them, and free when
nobody looks."""

from __future__ import annotations

import pytest
import torch
import transformers

from flexkernel.engine.model import attention
from flexkernel.engine.model.attention import additive_mask
from flexkernel.errors import CaptureError, HookError
from tests.support import models, reference

LENGTHS = [5, 12, 9]  # longer than the window of the models that have one
ARCHS = [
    *((arch, attn) for arch in ("llama", "qwen3", "gpt2", "mistral") for attn in ("sdpa", "eager")),
    ("gemma2", "eager"),
]


def rows_of(batch: dict[str, torch.Tensor]) -> list[list[int]]:
    return [
        ids[mask.bool()].tolist()
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]


def modules_of(session) -> list[torch.nn.Module]:
    return list(session.engines.runtime.model.modules())


def watched(session) -> int:
    return sum(attention.TAPS in module.__dict__ for module in modules_of(session))


@pytest.mark.parametrize(("arch", "attn"), ARCHS)
def test_every_point_is_what_other_means_say(arch, attn, session, tiny):
    """Queries and keys after rotary, keys as the cache keeps them, patterns as output_attentions
    has them."""
    session.load(tiny(arch), attn=attn)
    session.hook("**.@*")
    batch = models.ids_and_mask(LENGTHS)
    run = session.run(rows_of(batch))
    pads = ~batch["attention_mask"].bool()
    truth = reference.reference(
        reference.load(tiny(arch), attn=attn), **{**batch, "input_ids": torch.tensor(run.plan.ids)}
    ).attention
    assert len(truth) == len(run) == 4 * len(attention.POINTS)
    for (name, point), want in truth.items():
        got = run[f"{name}.@{point}"].tensor()
        if point == "pattern":
            got, want = (x.masked_fill(pads[:, None, :, None], 0.0) for x in (got, want))
        torch.testing.assert_close(
            got, want, atol=1e-5, rtol=1e-4, msg=lambda m, at=(name, point): f"{at}: {m}"
        )


def test_heads_are_those_of_queries_and_those_of_keys(session, tiny):
    session.load(tiny("llama"))
    session.hook("**.@*")
    run = session.run([[5, 6, 7]])
    shapes = {point: run[f"model.layers.0.self_attn.@{point}"].shape for point in attention.POINTS}
    assert shapes == {
        "q": (1, 8, 3, 8),
        "k": (1, 4, 3, 8),
        "v": (1, 4, 3, 8),
        "pattern": (1, 8, 3, 3),
        "z": (1, 3, 8, 8),
    }


def test_a_pattern_is_a_distribution_over_what_a_query_may_see(session, tiny):
    session.load(tiny("mistral"))
    session.hook("**.@pattern")
    pattern = session.run([list(range(3, 23))])["model.layers.2.self_attn.@pattern"].tensor()
    torch.testing.assert_close(pattern.sum(-1), torch.ones(1, 8, 20))
    near = torch.ones(20, 20, dtype=torch.bool).tril() & ~torch.ones(20, 20, dtype=torch.bool).tril(
        -8
    )
    assert (pattern[..., ~near] == 0).all() and (pattern[..., near] > 0).all()


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_reading_changes_no_bit_and_ends_with_the_hook(attn, session, tiny):
    session.load(tiny("llama"), attn=attn)
    bare = session.run([[5, 6, 7], [8]]).logits.tensor()
    session.hook("**.@*")
    assert watched(session) == 4
    assert torch.equal(session.run([[5, 6, 7], [8]]).logits.tensor(), bare)
    session.unhook()
    assert watched(session) == 0
    assert torch.equal(session.run([[5, 6, 7], [8]]).logits.tensor(), bare)


def test_a_model_outside_the_session_is_not_touched(session, tiny):
    """Ours stands in for transformers' attention for the whole process."""
    other = reference.load(tiny("qwen3"))
    batch = models.ids_and_mask([7, 7])
    with torch.no_grad():
        before = other(**batch).logits
        session.load(tiny("llama"))
        session.hook("**.@*")
        assert torch.equal(other(**batch).logits, before)
        other.set_attn_implementation("eager")
        torch.testing.assert_close(other(**batch).logits, before, atol=1e-4, rtol=1e-4)


def test_two_hooks_on_a_point_share_it_and_leave_it_one_by_one(session, tiny):
    session.load(tiny("llama"))
    session.hook("model.layers.0.self_attn.@q")
    session.hook("model.layers.0.self_attn.@*", name="all", groups="g")
    run = session.run([[5, 6]])
    assert len(run.captures) == 1 + 1 + 5
    session.unhook("all")
    assert watched(session) == 1 and session.run([[5, 6]])["model.layers.0.self_attn.@q"].shape == (
        1,
        8,
        2,
        8,
    )
    session.unhook()
    assert watched(session) == 0


def test_hooking_a_point_again_leaves_one(session, tiny):
    session.load(tiny("llama"))
    for _ in range(20):
        session.hook("**.@z")
    assert len(session.run([[5, 6]])) == 4 and watched(session) == 4


@pytest.fixture
def counted(monkeypatch):
    """How often a pattern was computed."""
    calls = []
    real = attention.pattern_of
    monkeypatch.setattr(attention, "pattern_of", lambda *args: calls.append(1) or real(*args))
    return calls


def test_a_pattern_that_nobody_keeps_is_not_computed(counted, session, tiny):
    session.load(tiny("llama"))
    counted.clear()
    session.hook("**.@pattern", groups="g")
    session.hooks.group("off", "g")
    session.run([[5, 6]])
    assert counted == []
    session.run([[5, 6]], groups="g")
    assert len(counted) == 4


def test_a_pattern_that_two_hooks_keep_is_computed_once(counted, session, tiny):
    session.load(tiny("llama"))
    session.hook("**.@pattern")
    session.hook("**.@pattern", name="twice")
    counted.clear()
    session.run([[5, 6]])
    assert len(counted) == 4


def test_a_pattern_that_cannot_be_computed_ends_no_forward(session, tiny, monkeypatch):
    session.load(tiny("llama"))
    bare = session.run([[5, 6]]).logits.tensor()
    session.hook("**.@pattern")
    session.hook("**.@q")

    def fails(*_):
        raise RuntimeError("no pattern today")

    monkeypatch.setattr(attention, "pattern_of", fails)
    run = session.run([[5, 6]])
    assert torch.equal(run.logits.tensor(), bare) and run["model.layers.1.self_attn.@q"].shape == (
        1,
        8,
        2,
        8,
    )
    with pytest.raises(Exception, match="no pattern today"):
        run["model.layers.1.self_attn.@pattern"].tensor()


def test_points_are_matched_only_if_written(session, tiny):
    session.load(tiny("llama"))
    session.hook("**")
    assert not any("@" in capture.name for capture in session.run([[5, 6]]))
    with pytest.raises(HookError, match=r"no module matches '\*\*\.@x'"):
        session.hook("**.@x")


def test_positions_of_a_pattern_are_those_of_the_queries(session, tiny):
    session.load(tiny("llama"))
    name = "model.layers.1.self_attn."
    session.hook("**.@pattern")
    session.hook("**.@*", positions=[-1, 0], name="some")
    run = session.run([[5, 6, 7]])
    by_hook = {
        key: run.captures[key].tensor() for key in run.captures if key.module.startswith(name)
    }
    some = {
        key.module.removeprefix(name): tensor
        for key, tensor in by_hook.items()
        if key.hook == "some"
    }
    (whole,) = (tensor for key, tensor in by_hook.items() if key.hook != "some")
    assert torch.equal(some["@pattern"], whole[:, :, [-1, 0]])
    assert some["@k"].shape == (1, 4, 2, 8) and some["@z"].shape == (1, 2, 8, 8)


def test_an_architecture_without_the_interface_is_refused_by_name(session, tmp_path):
    config = transformers.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=64)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "bloom")
    session.load(tmp_path / "bloom")
    with pytest.raises(
        HookError,
        match="BloomForCausalLM does not compute attention through transformers' interface",
    ):
        session.hook("**.@q")
    assert session.run([[5, 6]]).logits.shape == (1, 2, 64)


def test_a_model_that_is_not_looked_into_says_so(session, tiny):
    session.load(tiny("llama"))
    with pytest.raises(CaptureError, match="captured nothing"):
        session.run([[5, 6]])["model.layers.0.self_attn.@q"]


# --- masks ----------------------------------------------------------------------------

Q = K = 6
SEES = torch.ones(Q, K, dtype=torch.bool).tril()


def as_bool(mask: torch.Tensor) -> torch.Tensor:
    return mask == 0


def q_and_k(length: int = Q, keys: int = K) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(2, 4, length, 8), torch.zeros(2, 2, keys, 8)


def test_no_mask_is_causal():
    assert torch.equal(as_bool(additive_mask(None, *q_and_k(), None))[0, 0], SEES)


def test_a_step_sees_all_of_its_past():
    assert as_bool(additive_mask(None, *q_and_k(1, 6), None)).all()
    assert as_bool(additive_mask(None, *q_and_k(2, 6), None))[0, 0].tolist() == [
        [True] * 5 + [False],
        [True] * 6,
    ]


def test_no_mask_with_a_window_is_a_band():
    got = as_bool(additive_mask(None, *q_and_k(), 3))[0, 0]
    assert torch.equal(got, SEES & ~torch.ones(Q, K, dtype=torch.bool).tril(-3))


def test_a_row_mask_hides_pads_from_every_query():
    rows = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    got = as_bool(additive_mask(rows, *q_and_k(), None))
    assert torch.equal(got[0, 0], SEES & rows[0].bool()) and torch.equal(got[1, 0], SEES)


def test_a_mask_of_bools_and_one_of_floats_mean_what_they_say():
    bools = SEES[None, None].expand(2, 1, Q, K)
    assert torch.equal(as_bool(additive_mask(bools, *q_and_k(), None)), bools)
    floats = torch.zeros(2, 1, Q, K).masked_fill(~bools, float("-inf"))
    assert additive_mask(floats, *q_and_k(), None) is floats


def test_a_mask_has_the_dtype_of_the_queries():
    q, k = (x.bfloat16() for x in q_and_k())
    assert additive_mask(None, q, k, None).dtype == torch.bfloat16
