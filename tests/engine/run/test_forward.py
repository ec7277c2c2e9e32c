"""A forward with reads: what it sends, how it is refused, where it stops."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

import flexkernel as fk
from tests.support import on_engines

IDS = [[5, 6, 7, 8, 9]]


def what_is_sent(session) -> list[Counter]:
    session.on_ranks(on_engines.count_in_runs)
    session.run(IDS)
    sent = [Counter(names) for names in session.on_ranks(on_engines.sent_in_run)]
    session.on_ranks(on_engines.stop_counting)
    return sent


@pytest.mark.parametrize("layout", [{"tp": 2}, {"pp": 2}, {"fsdp": 2}], ids=str)
@pytest.mark.engines(2)
def test_a_read_sends_nothing(session, tiny, layout):
    session.load(tiny("llama"), **layout)
    session.run(IDS)
    bare = what_is_sent(session)
    assert all(sum(sent.values()) > 1 for sent in bare), (
        "the bare run sends the header and what the model sends"
    )
    session.hook("**")
    session.hook("**", at="input")
    session.hook("**.@pattern")
    hooked = what_is_sent(session)
    assert len(session.run(IDS)) > 100
    assert hooked == bare


@pytest.mark.engines(2)
def test_a_bare_run_sends_one_header_more_than_the_model(session, tiny):
    session.load(tiny("llama"), tp=2)

    def forward_alone(ids):
        rt = on_engines.runtime()
        with on_engines.counting() as sent, torch.no_grad():
            rt.model(torch.tensor(ids), use_cache=False)
        return list(sent)

    alone = [Counter(names) for names in session.on_ranks(forward_alone, IDS)]
    assert alone[0]["all_reduce"] >= 8, "two reductions a layer"
    run = what_is_sent(session)
    gather = (
        "all_gather_single"
        if hasattr(torch.distributed, "all_gather_single")
        else "all_gather_into_tensor"
    )
    header = Counter({gather: 1, "c10d._allgather_base_": 1})  # one call, seen at both levels
    for a, b in zip(alone, run, strict=True):
        assert b - a == header and not a - b


@pytest.mark.engines(2)
def test_what_is_sent_is_noticed(session, tiny):
    """The counter can fail: a hook that gathers is seen."""
    session.load(tiny("llama"), tp=2)
    bare = what_is_sent(session)

    def gather_in_a_hook():
        import torch.distributed as dist

        rt = on_engines.runtime()

        def hook(_module, _args, out):
            dist.all_gather([torch.empty_like(out) for _ in range(dist.get_world_size())], out)

        rt.handle = rt.model.model.norm.register_forward_hook(hook)

    session.on_ranks(gather_in_a_hook)
    more = what_is_sent(session)
    session.on_ranks(lambda: on_engines.runtime().handle.remove())
    assert all(b["all_gather"] == a["all_gather"] + 1 for a, b in zip(bare, more, strict=True))


@pytest.mark.parametrize("layout", [{"tp": 2}, {"pp": 2}, {"fsdp": 2}], ids=str)
@pytest.mark.engines(2)
def test_a_run_that_stops_early_has_what_came_before(session, tiny, layout):
    session.load(tiny("llama"), **layout)
    session.hook("model.layers.*.mlp")
    whole = session.run(IDS)
    for stop in (0, 1, 2, 3):
        run = session.run(IDS, stop_at=f"model.layers.{stop}.mlp")
        got = run[f"model.layers.{stop}.mlp"].tensor()
        assert torch.equal(got, whole[f"model.layers.{stop}.mlp"].tensor())
        if "fsdp" not in layout:  # its collectives need everyone to the end
            assert run.stopped and f"model.layers.{stop + 1}.mlp" not in run
            with pytest.raises(fk.errors.CaptureError, match="stopped before"):
                run.logits  # noqa: B018
    assert torch.equal(session.run(IDS).logits.tensor(), whole.logits.tensor())


@pytest.mark.engines(2)
def test_stopping_at_no_module_says_which_are_near(session, tiny):
    session.load(tiny("llama"), pp=2)
    with pytest.raises(fk.errors.HookError, match=r"nearest: model\.layers\.0\.mlp"):
        session.run(IDS, stop_at="model.layers.0.mpl")


@pytest.mark.engines(2)
def test_engines_with_other_hooks_refuse_the_run_on_all_ranks(session, tiny):
    session.load(tiny("llama"), tp=2)
    session.hook("model.layers.*.mlp")
    before = session.run(IDS).logits.tensor()

    def lose_hooks():
        rt = on_engines.runtime()
        if rt.rank == 1:
            rt.kept, rt.part.hook_set = rt.part.hook_set, fk.wire.HookSet()

    session.on_ranks(lose_hooks)
    with pytest.raises(fk.errors.HookError, match="rank 1 has other hooks"):
        session.run(IDS)

    def find_hooks():
        rt = on_engines.runtime()
        if rt.rank == 1:
            rt.part.hook_set = rt.kept

    session.on_ranks(find_hooks)
    assert torch.equal(session.run(IDS).logits.tensor(), before)


@pytest.mark.engines(2)
def test_uneven_batches_leave_no_rank_out(session, tiny):
    from tests.support import models, reference

    session.load(tiny("llama"), fsdp=2)
    session.hook("model.layers.*.mlp")
    ref_model = reference.load(tiny("llama"))
    for rows in (1, 3, 5):
        batch = models.ids_and_mask([6] * rows)
        truth = reference.reference(ref_model, **batch)
        run = session.run(batch["input_ids"])
        for layer in range(4):
            name = f"model.layers.{layer}.mlp"
            torch.testing.assert_close(
                run[name].tensor(), truth.outputs[name, 0, ""], atol=1e-5, rtol=1e-5
            )
        assert run.logits.shape[0] == rows
