"""Run and the store of runs: a capture is found by what names it alone, and memory is bounded
without surprises."""

from __future__ import annotations

import gc
import html
import re

import pytest
import torch
from torch import nn

from flexkernel.boxes import WHOLE, Box
from flexkernel.errors import (
    CaptureError,
    CaptureExpired,
    EngineError,
    MemoryBudgetError,
    PlacementError,
)
from flexkernel.memory.slab import PAGE
from flexkernel.session.reports import described
from flexkernel.session.run import Run
from flexkernel.session.store import Store
from flexkernel.wire import CaptureKey, Region, RunPlan, ShardRecord

IDS = [[5, 6, 7, 8]]
MLP = "model.layers.1.mlp"


class Found:
    """As much of a capture as finding it needs."""

    def __init__(self, key: CaptureKey):
        self.key, self.name, self.error, self.num_bytes = key, str(key), None, 0
        self.shape, self.placement, self.evidence = (1,), "Replicate()", "scan"


def run_of(*keys: CaptureKey, silent: tuple[str, ...] = ()) -> Run:
    run = Run(7, RunPlan(7, IDS, IDS, IDS, 0, "", 0, 0, 0), [["a", "b"]], None)
    run.captures, run.silent = {key: Found(key) for key in keys}, silent
    return run


LOGITS = CaptureKey("logits", "", "output", "logits")
OUT, IN = CaptureKey("h", "m"), CaptureKey("h input", "m", "input", "0")
SECOND, FIRST_LEAF = CaptureKey("h", "m", call=1), CaptureKey("t", "t", index="0")
SECOND_LEAF = CaptureKey("t1", "t", index="1")


# --- which capture --------------------------------------------------------------------


def test_a_module_means_its_only_capture():
    assert run_of(LOGITS, IN)["m"].key == IN


def test_several_captures_of_a_module_have_to_be_told_apart():
    run = run_of(OUT, IN)
    with pytest.raises(
        CaptureError,
        match=r"'m' has 2 captures.*\('m', 'output', '', 0\), \('m', 'input', '0', 0\)",
    ):
        run["m"]
    assert run["m", "output"].key == OUT and run["m", "input"].key == IN


def test_a_call_and_an_index_are_told_apart_last():
    run = run_of(OUT, SECOND, FIRST_LEAF, SECOND_LEAF)
    assert run["m", "output", "", 1].key == SECOND and run["m", "output", "", 0].key == OUT
    assert run["t", "output", "1"].key == SECOND_LEAF
    with pytest.raises(CaptureError, match="'m' has 2 captures"):
        run["m", "output", ""]


def test_an_index_may_be_a_number():
    assert run_of(FIRST_LEAF, SECOND_LEAF)["t", "output", 1].key == SECOND_LEAF


def test_two_hooks_on_the_same_value_are_one_capture():
    twin = CaptureKey("named", "m")
    run = run_of(OUT, twin)
    assert run["m"].key in (OUT, twin) and len(run) == 2


def test_the_logits_are_no_capture_of_the_root_unless_it_is_hooked():
    with pytest.raises(CaptureError, match="captured nothing at"):
        run_of(LOGITS)[""]
    root = CaptureKey("(root)", "", "output", "logits")
    assert run_of(LOGITS, root)[""].key == root and run_of(LOGITS).logits.key == LOGITS


def test_a_capture_is_found_by_its_key():
    run = run_of(OUT, SECOND)
    assert all(run[key].key == key for key in run.captures)


def test_nothing_there_names_what_is_near():
    run = run_of(CaptureKey("h", "model.layers.0.mlp"), CaptureKey("h", "lm_head"))
    with pytest.raises(
        CaptureError,
        match=r"run 7 captured nothing at .*'model\.layers\.0\.mpl'.*it has model\.layers\.0\.mlp",
    ):
        run["model.layers.0.mpl"]
    with pytest.raises(CaptureError, match="captured nothing") as caught:
        run_of(FIRST_LEAF)["t", "input"]
    assert "('t', 'output', '0', 0)" in str(caught.value)


def test_a_glob_is_the_list_of_those_it_matches():
    first, second = CaptureKey("h", "model.0.mlp"), CaptureKey("h", "model.1.mlp")
    other = CaptureKey("i", "model.1.mlp", "input", "0")
    run = run_of(LOGITS, first, second, other)
    assert [c.key for c in run["model.*.mlp", "output"]] == [first, second]
    assert [c.key for c in run["model.*.mlp"]] == [first, second, other]
    assert [c.key for c in run["model.0.*"]] == [first], "a list of one too"
    assert "model.*.mlp" in run and "model.*.attn" not in run
    with pytest.raises(CaptureError, match="captured nothing at"):
        run["model.*.attn"]


def test_a_hooks_name_is_what_it_captured():
    one, two = CaptureKey("mine", "a"), CaptureKey("all", "a.0")
    run = run_of(LOGITS, one, two)
    run.globs = {"mine": "a", "all": "a.*"}
    assert run["mine"].key == one
    assert [c.key for c in run["all"]] == [two], (
        "a list where the hook's glob has a star, however many it matched"
    )
    run.captures |= {CaptureKey("mine", "a", call=1): Found(CaptureKey("mine", "a", call=1))}
    with pytest.raises(CaptureError, match="'mine' has 2 captures: say which, one of"):
        run["mine"]


def test_a_modules_name_goes_before_a_hooks():
    run = run_of(CaptureKey("b", "a"), CaptureKey("x", "b"))
    assert run["b"].key.module == "b"


def test_what_was_there_before_an_edit_is_found_by_saying_so_or_alone():
    before, after = CaptureKey("h", "m", "output before"), CaptureKey("h", "m")
    run = run_of(before, after)
    assert (
        run["m"].key == run["m", "output"].key == after and run["m", "output before"].key == before
    )
    assert str(before) == "m output before"
    assert run_of(before)["m"].key == run_of(before)["m", "output"].key == before
    assert [c.key for c in run["*"]] == [after]


def test_a_module_that_never_fires_is_said_to():
    with pytest.raises(CaptureError, match=r"'model\.layers' never fires in a forward"):
        run_of(OUT, silent=("model.layers",))["model.layers"]


@pytest.mark.parametrize("key", [3, None, (), (1, 2), ("m", "output", "", 0, 1), 1.5, slice(None)])
def test_a_key_that_means_nothing_is_refused(key):
    with pytest.raises(CaptureError, match=r"a capture is run\[module\]"):
        run_of(OUT)[key]


def test_membership_is_as_finding():
    run = run_of(LOGITS, OUT, IN)
    assert "m" in run and ("m", "input") in run and ("m", "input", 0) in run
    assert "n" not in run and "" not in run and ("m", "input", 1) not in run


def test_iterating_and_counting_leave_the_logits_out():
    run = run_of(LOGITS, OUT, IN)
    assert [c.key for c in run] == [OUT, IN] and len(run) == 2 and len(run.captures) == 3


# --- what it shows --------------------------------------------------------------------

EVIL = "<script>alert(1)</script>&\"'"


def test_tokens_and_names_are_text_in_html(session, tiny):
    session.load(tiny("llama"))
    session.hook(MLP)
    run = session.run(IDS)
    run.tokens = [[EVIL, "<img src=x onerror=y>", "\u202e", "a\nb"]]
    captures = run.captures
    run.captures = {**captures, CaptureKey("x", EVIL): Found(CaptureKey("x", EVIL))}
    page = run._repr_html_()
    run.captures = captures
    assert not re.search(r"<(script|img)", page) and html.escape(EVIL) in page
    assert "&lt;img src=x" in page


def test_next_tokens_are_the_softmax_of_the_last_logits(session, tiny):
    session.load(tiny("llama"))
    run = session.run([[5, 6, 7], [8]])
    rows = run.next_tokens(4)
    want = run.logits.tensor()[:, -1].softmax(-1).topk(4)
    assert len(rows) == 2
    for row, values, ids in zip(rows, want.values.tolist(), want.indices.tolist(), strict=True):
        assert [p for _, p in row] == pytest.approx(values, rel=1e-6)
        # without a tokenizer a token is its number
        assert [word for word, _ in row] == [str(i) for i in ids]
    assert len(run.next_tokens(10_000)[0]) == 256


def test_a_run_shows_its_tokens_its_table_and_its_captures(session, tiny):
    session.load(tiny("llama"))
    session.hook("model.layers.*.mlp")
    run = session.run(IDS)
    text = repr(run)
    assert (
        "1 × 4 tokens, 4 captures" in text and "next: " in text and "model.layers.0–3.mlp" in text
    )
    assert "1×4×64" in text and "<table" in run._repr_html_()


def test_a_freed_run_still_shows_itself(session, tiny):
    session.load(tiny("llama"))
    session.hook(MLP)
    run = session.run(IDS)
    run.free()
    run.free()
    assert "freed" in repr(run) and "freed" in run._repr_html_() and "next: " not in repr(run)
    with pytest.raises(CaptureExpired, match=r"its run was freed \(run\.free\(\)\)"):
        run[MLP].tensor()
    assert session.runs == []


class Classifier(nn.Module):
    """A model whose output is no (B, S, V)."""

    def __init__(self, flat: bool = True):
        super().__init__()
        self.embed, self.head, self.flat = nn.Embedding(32, 8), nn.Linear(8, 3), flat

    def forward(self, input_ids, attention_mask=None, position_ids=None, use_cache=None):
        out = self.head(self.embed(input_ids))
        return out.mean(1) if self.flat else {"last_hidden_state": out}


def test_a_model_without_next_tokens_shows_none(session):
    session.load(Classifier, reference=Classifier)
    session.hook("head")
    run = session.run(IDS)
    assert (
        run.logits.shape == (1, 3) and "1 × 4 tokens, 1 captures" in repr(run) and run._repr_html_()
    )
    with pytest.raises(
        CaptureError, match=r"read from \(B, S, V\) logits; the model puts out \(1, 3\)"
    ):
        run.next_tokens()


@pytest.mark.parametrize(
    "reference", [None, lambda: Classifier(False)], ids=["alone", "with a reference"]
)
def test_hidden_states_are_not_called_logits(reference, session):
    session.load(lambda: Classifier(False), reference=reference)
    session.hook("head")
    run = session.run(IDS)
    assert run["head"].shape == (1, 4, 3) and repr(run)
    with pytest.raises(CaptureError, match="has no logits"):
        _ = run.logits


def test_text_is_the_prompt(session, tiny):
    session.load(tiny("llama"))
    assert session.run(IDS).text == [" ".join(session.run(IDS).tokens[0])]
    assert len(session.run([[5, 6], [7]]).text) == 2


# --- the budget -----------------------------------------------------------------------


@pytest.fixture
def small(session, tiny):
    """A session whose budget holds three runs."""
    session.load(tiny("llama"))
    session.hook("model.layers.*.mlp")
    first = session.run(IDS)
    session.store.budget, session.store.spill.budget = 3 * session.store.pool.num_bytes, 0
    first.free()
    return session


def numbers(session) -> list[int]:
    return [run.number for run in session.runs]


def test_above_the_budget_the_oldest_runs_expire(small):
    runs = [small.run(IDS) for _ in range(5)]
    assert numbers(small) == [run.number for run in runs[2:]]
    with pytest.raises(
        CaptureExpired, match=r"expired to make room for newer runs; run\.keep\(\) keeps one"
    ):
        runs[0][MLP].tensor()
    assert runs[4][MLP].tensor().shape == (1, 4, 64)


def test_a_kept_run_does_not_expire(small):
    kept = small.run(IDS).keep()
    later = [small.run(IDS) for _ in range(4)]
    assert kept[MLP].tensor().shape == (1, 4, 64) and numbers(small) == [
        kept.number,
        *(r.number for r in later[2:]),
    ]


def test_a_run_somebody_looks_into_does_not_expire_until_they_look_away(small):
    run = small.run(IDS)
    held = run[MLP].tensor()
    before = held.clone()
    for _ in range(4):
        small.run([[9, 10, 11, 12]])
    assert run.number in numbers(small) and torch.equal(held, before)
    del held
    gc.collect()
    for _ in range(3):
        small.run(IDS)
    assert run.number not in numbers(small)


def test_a_tensor_that_has_died_holds_no_memory_back(small):
    """Also when it died since the last run, and when nothing else can expire."""
    small.store.budget //= 3
    held = small.run(IDS)[MLP].tensor()
    with pytest.raises(MemoryBudgetError, match="kept or looked into hold"):
        small.run(IDS)
    del held
    gc.collect()
    assert small.run(IDS)[MLP].tensor().shape == (1, 4, 64)


def test_a_freed_tensor_keeps_its_numbers_whatever_runs_later(small):
    run = small.run(IDS)
    held = run[MLP].tensor()
    before = held.clone()
    run.free()
    for i in range(12):
        small.run([[20 + i, 30 + i, 40 + i, 50 + i]]).free()
    assert torch.equal(held, before)


def test_too_much_is_refused_before_the_forward(small):
    forwards = []
    handle = small.engines.runtime.model.register_forward_pre_hook(lambda *_: forwards.append(1))
    try:
        small.run(IDS)
        with pytest.raises(
            MemoryBudgetError,
            match=r"this run would keep [\d,]+ bytes and the session's budget is [\d,]+: hook",
        ):
            small.run([[5] * 400])
        small.store.budget = 2 * small.store.pool.num_bytes
        for _ in range(2):
            small.run(IDS).keep()
        with pytest.raises(
            MemoryBudgetError, match=r"kept or looked into hold [\d,]+ of the session's budget"
        ):
            small.run(IDS)
        assert len(forwards) == 3
    finally:
        handle.remove()


def test_forty_runs_take_no_more_slabs_than_the_budget_holds(small):
    for i in range(40):
        small.run([[5 + i] * (1 + i % 4)])
    assert len(small.store.pool.slabs) == 1 and small.store.pool.num_bytes <= small.store.budget
    # the engines hear with the next run
    assert len(small.engines.runtime.memory.runs) <= len(small.runs) + 3


def test_the_extent_of_a_run_that_failed_comes_back(session, tiny):
    session.load(tiny("llama"))
    session.hook(MLP)
    taken = session.store.pool.num_bytes

    def fails(*_):
        raise ValueError("broken on purpose")

    handle = session.engines.runtime.model.model.layers[2].register_forward_pre_hook(fails)
    with pytest.raises(EngineError, match="ValueError on rank 0: broken on purpose"):
        session.run(IDS)
    handle.remove()
    assert (
        session.last.partial.startswith("ValueError on rank 0: broken on purpose")
        and len(session.last) == 1
    )
    session.last.free()
    assert session.store.pool.num_bytes == taken and session.runs == []
    assert session.run(IDS)[MLP].tensor().shape == (1, 4, 64)


def test_files_of_a_runs_own_go_with_it(session):
    # without a reference nothing is planned: each value has a file of its own
    session.load(Classifier)
    session.hook("**")
    folder = session.store.folder

    def files():
        return [path.name for path in folder.iterdir() if path.name.startswith("extra")]

    for _ in range(3):
        session.run(IDS).free()
    session.run(IDS)
    assert len(files()) == 3, "embed, head and the output, of the last run"
    handle = session.engines.runtime.model.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(EngineError, match="ZeroDivisionError"):
        session.run(IDS)
    handle.remove()
    session.runs[0].free()
    session.run(IDS)
    assert len(files()) == 3


def test_loading_again_leaves_no_slab_behind(session, tiny):
    for _ in range(3):
        session.load(tiny("llama"))
        run = session.run(IDS)
    assert len(list(session.store.folder.glob("*.slab"))) == 1
    held = run.logits.tensor()
    before = held.clone()
    session.load(tiny("llama"))
    assert torch.equal(held, before), "what was read stays"
    with pytest.raises(CaptureExpired, match="has ended, or has loaded another model"):
        run.logits.tensor()


def test_a_slab_that_does_not_fit_does_not_end_the_session(session, tiny, monkeypatch):
    """The pool must not offer it again."""
    from flexkernel.memory import slab
    from flexkernel.memory.pool import SLAB_BYTES

    session.load(tiny("llama"))
    allocate = slab.allocate

    def full(fd, num_bytes, path):
        if num_bytes > SLAB_BYTES:
            raise MemoryBudgetError("a slab does not fit")
        allocate(fd, num_bytes, path)

    monkeypatch.setattr(slab, "allocate", full)
    session.hook("**")
    with pytest.raises(MemoryBudgetError, match="a slab does not fit"):
        session.run([[5] * 500] * 16)
    assert session.run(IDS)[MLP].tensor().shape == (1, 4, 64)


def test_where_memory_is_small_slabs_are(session, tiny, monkeypatch):
    """A container's /dev/shm of 64 MB holds no slab of 64 MB beside anything else."""
    import psutil

    class Usage:
        free = 64 << 20

    session.load(tiny("llama"))
    monkeypatch.setattr(psutil, "disk_usage", lambda path: Usage)
    store = Store(session.engines, session.loaded.info.layout)
    assert store.pool.lease(1).slab_bytes == 8 << 20 and store.budget <= 64 << 20


# --- values nobody planned ------------------------------------------------------------


def kept(shape, holds=()) -> ShardRecord:
    return ShardRecord("dtensor", "x", 0, Box(holds), None, Region("e", 0, shape, "bfloat16"))


def test_the_whole_of_described_parts_spans_them():
    parts = {0: kept((3, 4), ((1, 0, 4),)), 1: kept((3, 2), ((1, 4, 6),))}
    assert described(parts) == ((3, 6), torch.bfloat16)
    assert described({0: kept((3, 4)), 1: ShardRecord("x", "x", 0, WHOLE, None)}) == (
        (3, 4),
        torch.bfloat16,
    )


def test_a_value_that_failed_everywhere_has_no_shape():
    assert described(
        {0: ShardRecord("none", "unknown", written=None, error=("PlacementError", "so"))}
    ) == (
        (),
        torch.float32,
    )


def test_a_failed_capture_is_in_the_table_and_raises_when_looked_at(session):
    session.load(Classifier)
    session.hook("head", positions=-1)
    run = session.run(IDS)
    assert "PlacementError" in repr(run)
    with pytest.raises(PlacementError, match="positions are not known"):
        run["head"].tensor()


def test_pages_are_what_the_budget_counts(small):
    run = small.run(IDS)
    assert small.store.pool.num_bytes == len(run.captures) * PAGE


def test_the_oldest_runs_go_when_there_are_too_many(session, tiny):
    session.load(tiny("llama"))
    session.hook("model.layers.1.mlp")
    session.store.most_runs = 5
    kept = session.run([[1, 2, 3]]).keep()
    for _ in range(8):
        session.run([[1, 2, 3]])
    assert len(session.runs) == 5 and session.runs[0] is kept
    assert kept["model.layers.1.mlp"].tensor().shape == (1, 3, 64)
    kept.free()
