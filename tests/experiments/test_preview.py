"""A preview says before a run what the run will keep, rank by rank, and refuses what would not fit
with its reasons."""

from __future__ import annotations

import re

import pytest

from flexkernel.errors import HookError, MemoryBudgetError, PromptError

MLP, GATE, UP = "model.layers.*.mlp", "model.layers.*.mlp.gate_proj", "model.layers.*.mlp.up_proj"
ROWS = [[5, 6, 7, 8, 9], [10, 11], [12, 13, 14]]
LAYOUTS = [{"tp": 2}, {"pp": 2}, {"dp": 2}]


def written(run, world: int) -> list[int]:
    """Bytes that each rank copied of a run."""
    total = [0] * world
    for capture in run.captures.values():
        assert capture.error is None
        for rank, seen in capture.records.items():
            if seen.written is not None:
                total[rank] += seen.written.volume(capture.shape) * capture.dtype.itemsize
    return total


@pytest.mark.engines(2)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: next(iter(layout)))
def test_a_preview_is_what_the_run_then_keeps(layout, session, tiny):
    session.load(tiny("llama"), **layout)
    session.hook(MLP)
    session.hook(GATE, positions=[-1])
    session.hook("model.embed_tokens")
    seen = session.preview(ROWS)
    run = session.run(ROWS)
    assert (
        seen.fits
        and seen.by_rank == pytest.approx(written(run, 2), rel=0.02)
        and min(seen.by_rank) > 0
    )
    assert (
        seen.num_bytes
        == run.plan.num_bytes
        == sum(num_bytes for _, num_bytes in seen.hooks.values())
    )
    assert {hook: count for hook, (count, _) in seen.hooks.items()} == {
        MLP: 4,
        GATE: 4,
        "model.embed_tokens": 1,
        "logits": 1,
    }
    assert list(seen.free) == [session.store.here] and min(map(min, seen.free.values())) > 0
    assert len(session.runs) == 1, "a preview runs nothing"


@pytest.fixture
def loaded(session, tiny):
    session.load(tiny("llama"))
    session.hook(MLP)
    session.hook(UP, groups="wide")
    return session


def test_what_would_not_fit_says_what_costs_most(loaded):
    loaded.store.budget = loaded.preview(ROWS).num_bytes
    kept = loaded.run(ROWS).keep()
    seen = loaded.preview(ROWS)
    assert not seen.fits and seen.room == 0
    with pytest.raises(MemoryBudgetError, match=r"hold [\d,]+ of the session's budget") as caught:
        loaded.run(ROWS)
    assert str(caught.value) == seen.problem and f"what costs most: {UP} " in seen.problem
    kept.free()
    assert loaded.preview(ROWS).fits and not loaded.preview([[5] * 400]).fits
    assert "the session's budget is" in repr(loaded.preview([[5] * 400]))


def test_a_folder_that_is_too_small_is_said_to_be(loaded, monkeypatch):
    monkeypatch.setattr("flexkernel.engine.place.slabs.Memory.free", lambda memory: (4096, 1 << 30))
    assert re.search(
        r"a slab of [\d,]+ bytes is needed and 4,096 are free for it", loaded.preview(ROWS).problem
    )
    loaded.run(ROWS)  # from here on there is a slab with room in it
    assert loaded.preview(ROWS).fits


def test_a_preview_is_of_the_groups_and_tokens_that_are_asked_for(loaded):
    everything, narrow = loaded.preview(ROWS), loaded.preview(ROWS, groups="wide", complement=True)
    assert set(everything.hooks) - set(narrow.hooks) == {UP}
    grown = loaded.preview(ROWS, max_new_tokens=2000)
    assert grown.num_bytes > 50 * everything.num_bytes and "+ 2000 new" in repr(grown)
    loaded.hook(MLP, at="grad_output")
    assert loaded.preview(ROWS).num_bytes < loaded.preview(ROWS, loss=True).num_bytes
    with pytest.raises(PromptError, match="empty"):
        loaded.preview([[]])
    with pytest.raises(HookError, match="no hook is in group"):
        loaded.preview(ROWS, groups="narrow")


def test_time_to_copy_is_measured_or_stated(loaded):
    assert not loaded.preview(ROWS).measured
    long = [[5 + i % 200 for i in range(1500)]] * 2
    loaded.run(long)
    seen = loaded.preview(long)
    assert seen.measured and seen.seconds == pytest.approx(seen.num_bytes / loaded.store.bandwidth)
    assert loaded.preview(long, bandwidth=1e6).seconds == pytest.approx(seen.num_bytes / 1e6)
    assert "<table" in seen._repr_html_() and "as in the last run" in repr(seen)
