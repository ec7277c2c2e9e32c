"""Bad inputs by number (bad.CATALOGUE): names, values, edits and prompts. Each is a clear error of
ours or a right answer, and afterwards a run equals the unsharded model's.

Beside them test_bad_loads.py and test_bad_sessions.py; the first test counts that all 76 have a
test.
"""

from __future__ import annotations

import ast
import functools
import re
import time
from pathlib import Path

import pytest
import torch

import flexkernel as fk
from flexkernel import views
from flexkernel.errors import (
    CaptureError,
    ClusterError,
    EditError,
    EngineDied,
    FlexError,
    HookError,
    MemoryBudgetError,
    PlacementError,
    PromptError,
)
from flexkernel.session import prompts
from tests.support import bad, reference

MLP = "model.layers.1.mlp"
TESTS = Path(__file__).parents[1]
FILES = ("faults/test_bad_inputs.py", "faults/test_bad_loads.py", "faults/test_bad_sessions.py")

two = pytest.mark.engines(2)


# --- all of them ----------------------------------------------------------------------


def numbers_in(source: str) -> set[int]:
    """The numbers that a file's tests bear: by `@pytest.mark.numbers(31)`, and "31" or "31-more"
    where ids are."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.numbers":
            found |= {ast.literal_eval(number) for number in node.args}
        if (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and re.fullmatch(r"\d\d(-.+)?", node.value)
        ):
            found.add(int(node.value[:2]))
    return found


def test_every_number_has_a_test():
    assert set(bad.CATALOGUE) == set(range(1, 77))
    here = set().union(*(numbers_in((TESTS / name).read_text()) for name in FILES))
    for where in bad.ELSEWHERE.values():
        name, _, test = where.partition("::")
        assert f"\ndef {test}(" in (TESTS / name).read_text(), where
    assert here | set(bad.ELSEWHERE) == set(bad.CATALOGUE), (
        set(bad.CATALOGUE) - here - set(bad.ELSEWHERE)
    )
    assert 1 not in numbers_in("x = 'not 01'") and numbers_in(
        "@pytest.mark.numbers(4, 5)\ndef test_x(): ...\nx = '07-y'"
    ) == {4, 5, 7}


# --- one call, one sentence -----------------------------------------------------------

LONG_NAME = "model.layers.0.mlp" * 12_000
WORLD_EDIT = lambda x, ctx: x  # noqa: E731
CALLS = {
    "01": (
        lambda s: s.hook("model.layers.99.mlp"),
        HookError,
        r"no module matches .*nearest: model\.layers\.\d\.mlp",
    ),
    "02-edit": (lambda s: s.hook("lm_head", edit=""), HookError, "no edit is called ''"),
    "02-unhook": (lambda s: s.unhook(""), HookError, "no hook is called ''"),
    "02-group": (lambda s: s.hooks.group("off", ""), HookError, "which group"),
    "02-parameter": (lambda s: s.parameter(""), HookError, "''"),
    "03": (
        lambda s: s.hook("model.layers.*.mpl"),
        HookError,
        r"no module matches 'model\.layers\.\*\.mpl'",
    ),
    "03-groups": (
        lambda s: s.run(bad.ROWS, groups="nobody"),
        HookError,
        "no hook is in group 'nobody'",
    ),
    "09": (lambda s: s.unhook("nothing"), HookError, "no hook is called 'nothing'"),
    "11-unicode": (lambda s: s.hook("модель.слой"), HookError, "no module matches 'модель.слой'"),
    "11-newline": (
        lambda s: s.hook("model\n.layers"),
        HookError,
        r"no module matches 'model\\n\.layers'",
    ),
    "11-nul": (lambda s: s.hook("model\0"), HookError, r"no module matches 'model\\x00'"),
    "11-surrogate": (lambda s: s.hook("\ud800"), HookError, r"no module matches '\\ud800'"),
    "11-long": (lambda s: s.hook(LONG_NAME), HookError, "characters left out"),
    "11-long-group": (lambda s: s.hooks.group("off", LONG_NAME), HookError, "characters left out"),
    "11-stars": (lambda s: s.hook("**." * 60 + "x"), HookError, "no module matches"),
    "11-no-text": (
        lambda s: s.hook(None),
        HookError,
        "a hook's glob and name are text; found NoneType",
    ),
    "12": (lambda s: s.hook("model.__class__"), HookError, r"no module matches 'model\.__class__'"),
    "12-index": (
        lambda s: s.hook("lm_head", index="__class__"),
        HookError,
        "no tensor at index '__class__'",
    ),
    "12-parameter": (lambda s: s.parameter("model.__dict__"), HookError, "no parameter or buffer"),
    "33-generator": (
        lambda s: s.edit("bad")(functools.partial(lambda x, ctx, g: x, g=(i for i in "a"))),
        ClusterError,
        "cannot be sent to engines, it holds something that stays here: .*generator",
    ),
    "33-file": (
        lambda s: s.edit("bad")(functools.partial(lambda x, ctx, f: x, f=open("/dev/null", "w"))),
        ClusterError,
        "cannot be sent to engines",
    ),
    "34": (
        lambda s: s.edit("bad")(
            functools.partial(lambda x, ctx, t: x, t=torch.empty(1_300_000_000))
        ),
        ClusterError,
        r"it would be 5,200,\d{3},\d{3} bytes for each engine, and at most 2,147,483,648 travel",
    ),
    "41": (lambda s: s.run([[]]), PromptError, "the prompt is empty: it has no tokens"),
    "41-text": (lambda s: s.run(""), PromptError, "the prompt is empty"),
    "42": (lambda s: s.run([]), PromptError, "the prompt is empty"),
    "42-tensor": (
        lambda s: s.run(torch.zeros(0, 3, dtype=torch.long)),
        PromptError,
        "the prompt is empty",
    ),
    "43": (
        lambda s: s.run([[5] * 2049]),
        PromptError,
        "the prompt has 2049 tokens and the model 2048 positions",
    ),
    "43-new": (lambda s: s.generate([[5] * 2040], 20), FlexError, "2048"),
    "44": (
        lambda s: s.run([[5, 256]]),
        PromptError,
        "token id 256 at position 1 is outside the vocabulary, 0 to 255",
    ),
    "44-negative": (lambda s: s.run([[5, -1]]), PromptError, "token id -1 at position 1"),
    "44-huge": (lambda s: s.run([[2**70]]), PromptError, "outside the vocabulary"),
    "56": (
        lambda s: s.load(s.loaded.info.path, tp=2, pp=2),
        FlexError,
        "tp=2 makes 4 ranks, the cluster has 2 engines",
    ),
}


@two
@pytest.mark.parametrize("case", CALLS)
def test_a_call_that_cannot_be_is_one_sentence_and_changes_nothing(case, session, tiny):
    does, kind, says = CALLS[case]
    bad.fit(session, tiny("llama"), **bad.TP)
    hooks, info, edits = session.hooks.hook_set, session.loaded.info, dict(session.hooks.edits)
    begin = time.monotonic()
    with pytest.raises(FlexError) as caught:
        does(session)
    assert time.monotonic() - begin < 10, "and at once: five times the bound of 2 s"
    assert isinstance(caught.value, kind) and re.search(says, str(caught.value)), caught.value
    assert len(str(caught.value)) < 10_000 and len(caught.value._render_traceback_()) == 1
    assert (session.hooks.hook_set, session.loaded.info, session.hooks.edits) == (
        hooks,
        info,
        edits,
    )
    bad.healthy(session, tiny("llama"), **bad.TP)


# --- names ----------------------------------------------------------------------------


@pytest.mark.numbers(2, 6, 8, 10)
@two
def test_names_that_are_unusual_and_right(session, tiny):
    """The root, a container that never fires, a hook given again."""
    bad.fit(session, tiny("llama"), **bad.TP)
    session.hook("")
    hooked = session.hook("model.layers")
    assert hooked.silent == ("model.layers",) and "never fire" in repr(hooked)
    session.hook("", name="")
    run = session.run(bad.ROWS)
    assert len(session.hooks) == 2 and len(run) == 1
    assert torch.equal(run[""].tensor(), run.logits.tensor())
    with pytest.raises(
        CaptureError, match=r"'model\.layers' never fires in a forward of this model"
    ):
        run["model.layers"]
    bad.healthy(session, tiny("llama"), **bad.TP)


@pytest.mark.numbers(5, 10)
@two
def test_modules_of_another_stage(session, tiny):
    """On each rank one stage's layers are transformers' placeholders: hooks are on the real ones
    only."""
    folder = tiny("llama")
    session.load(folder, pp=2)
    assert {
        m.stages
        for m in session.loaded.info.modules
        if m.name in ("model.layers.0", "model.layers.3")
    } == {(0,), (1,)}
    session.hook("model.layers.*")
    session.hook("model.embed_tokens")
    session.hook("lm_head", at="input")
    run = session.run(bad.ROWS)
    want = reference.reference(str(folder), **bad.BATCH)
    assert len(run) == 6
    for capture in run:
        values = want.outputs if capture.key.at == "output" else want.inputs
        truth = next(v for (name, _, _), v in values.items() if name == capture.key.module)
        torch.testing.assert_close(
            capture.tensor()[bad.MASK], truth[bad.MASK], atol=2e-5, rtol=2e-5
        )
    bad.healthy(session, folder, pp=2)


@pytest.mark.long("04-ten-thousand")
@pytest.mark.parametrize(
    "count", [pytest.param(1_000, id="04-thousand"), pytest.param(10_000, id="04-ten-thousand")]
)
def test_a_glob_that_names_very_many(count):
    model = bad.Many(count)
    with fk.local() as session:
        session.load(lambda: model, reference=lambda: bad.Many(count))
        assert len(session.hook("steps.*").modules) == count
        run = session.run([[5, 6]])
        assert len(run) == count and len(repr(run)) < 20_000
        for at in (0, count - 1):
            assert torch.equal(run[f"steps.{at}"].tensor(), model.embed(torch.tensor([[5, 6]])))
        session.unhook()
        assert len(session.run([[5, 6]])) == 0


# --- values ---------------------------------------------------------------------------


IDS = torch.tensor([[5, 6, 7, 8], [9, 1, 2, 3], [4, 4, 4, 4]])


@pytest.mark.numbers(6, 7, 10, 13, 14, 15, 16, 17, 19, 20)
@two
def test_values_that_are_hard_to_read(session):
    """Under dp, three rows on two groups: each is read bit for bit, whatever it is."""
    session.load(bad.values, dp=2, reference=bad.values)
    session.hook("**")
    run = session.run(IDS)
    want, _ = reference.record(bad.values(), {"input_ids": IDS})
    compared = set()
    for (name, call, path), truth in want.items():
        if name in ("", "embed"):
            continue
        got = run[name, "output", path, call].tensor()
        assert got.dtype == truth.dtype and got.shape == truth.shape, name
        assert (
            torch.equal(got.view(torch.uint8), truth.contiguous().view(torch.uint8))
            if truth.dim()
            else got == truth
        )
        compared.add(name.removeprefix("kinds."))
    assert compared == {*bad.VALUES, "twice", "leaf", "same"} - {"text", "none"}
    for name in ("kinds.text", "kinds.none", "unused"):
        assert name not in run
        with pytest.raises(
            CaptureError, match=f"'{name}' never fires|captured nothing at .*'{name}'"
        ):
            run[name]
    session.unhook()
    session.edit("inplace")(bad.add_in_place)
    session.hook("kinds.inferred", edit="inplace")
    session.hook("same", edit="inplace")
    edited = session.run(IDS)
    assert torch.equal(edited["kinds.inferred"].tensor(), want["kinds.inferred", 0, ""] + 1)
    assert torch.equal(edited["same"].tensor(), want["same", 0, ""] + 1)
    session.unhook()
    assert torch.equal(session.run(IDS).logits.tensor(), want["", 0, ""])


@pytest.mark.numbers(18)
@two
def test_values_that_have_no_plain_memory(session):
    session.load(bad.odd, dp=2, placements={"same": "batch:0 replicate"})
    session.hook("**")
    run = session.run(IDS)
    for name in bad.ODD:
        with pytest.raises(
            PlacementError,
            match=rf"kinds\.{name} output: it is a {name}.* tensor; hook a module that",
        ):
            run[f"kinds.{name}"].tensor()
    assert torch.equal(
        run["same"].tensor(), reference.record(bad.odd(), {"input_ids": IDS})[0]["same", 0, ""]
    )


@pytest.mark.numbers(21)
@two
def test_a_value_that_is_still_on_its_way(session):
    session.load(bad.on_its_way, tp=2, reference=bad.there_already)
    session.hook("gathered")
    run = session.run(IDS)
    want, _ = reference.record(bad.there_already(), {"input_ids": IDS})
    torch.testing.assert_close(run["gathered"].tensor(), want["gathered", 0, ""])
    torch.testing.assert_close(run.logits.tensor(), want["", 0, ""])


@pytest.mark.numbers(23)
@two
def test_shards_of_uneven_size(session, tiny):
    folder = tiny("llama", vocab=257)
    session.load(folder, tp=2)
    session.hook("lm_head")
    session.hook("model.embed_tokens")
    run = session.run(bad.ROWS)
    want = reference.reference(str(folder), **bad.BATCH).outputs
    assert run["lm_head"].shape == (2, 5, 257)
    for name in ("lm_head", "model.embed_tokens"):
        got, truth = run[name].tensor()[bad.MASK], want[name, 0, ""][bad.MASK]
        torch.testing.assert_close(got, truth, atol=2e-5, rtol=2e-5)


@pytest.mark.numbers(24)
@two
def test_what_does_not_fit_is_refused_before_the_forward(session, tiny):
    bad.fit(session, tiny("llama"), **bad.TP)
    session.hook("**.@pattern")  # 4 × (64, 8, 2048, 2048) float32: 34 GB
    with pytest.raises(
        MemoryBudgetError,
        match=r"this run would keep 34,\d{3},\d{3},\d{3} bytes and the session's budget",
    ):
        session.run([[5] * 2048] * 64)
    bad.healthy(session, tiny("llama"), **bad.TP)


@pytest.mark.numbers(24)
@pytest.mark.long
def test_a_tensor_of_more_than_two_gigabytes_is_whole():
    """Its bytes are counted with 64 bits everywhere; the ends and a slice say so."""
    with fk.local() as session:
        session.load(bad.Wide, reference=bad.Wide)
        session.store.budget = 3 << 30
        session.hook("wide")
        capture = session.run([[*range(64)] * 4])["wide"]
        assert capture.num_bytes > 1 << 31
        row = torch.arange(bad.Wide.WIDTH, dtype=torch.float32)
        assert torch.equal(capture[0, -1, -5:], row[-5:] + 63) and torch.equal(
            capture[0, 70, :5], row[:5] + 6
        )
        assert capture.tensor()[0, -1, -1] == row[-1] + 63


@pytest.mark.numbers(25)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_view_of_numbers_that_are_none(dtype):
    tiny_number = torch.finfo(dtype).tiny / 2
    x = torch.tensor(
        [[float("nan"), float("inf")], [float("-inf"), -0.0], [tiny_number, 1.0]], dtype=dtype
    )
    for values in (x, x[:1, :1].expand(4, 4), torch.full((3, 3), float("inf"), dtype=dtype)):
        view = views.tensor_map(values)
        text = str(view._repr_mimebundle_()) if hasattr(view, "_repr_mimebundle_") else repr(view)
        assert text and "Infinity" not in text


# --- edits ----------------------------------------------------------------------------

EDITS = {
    "26": ("whole", lambda x, ctx: x[..., :1], r"returned \(2, 5, 1\)"),
    "27": ("whole", lambda x, ctx: x.to(torch.complex64), "returned .* torch.complex64"),
    "27-device": ("whole", lambda x, ctx: x.to("meta"), "returned .* on meta"),
    "28": ("row", lambda x, ctx: None, "returned NoneType"),
    "29": ("element", bad.raises_on_rank_1, r"raised ZeroDivisionError: .*rank 1"),
    "30-exit": ("whole", bad.exits, "raised SystemExit"),
    "30-interrupt": ("whole", bad.interrupts, "raised KeyboardInterrupt"),
    "38": (
        "whole",
        bad.calls_everything,
        "raised Refused: an edit cannot run the model that it is in",
    ),
}


@two
@pytest.mark.parametrize("case", EDITS)
def test_an_edit_that_cannot_be_is_one_error(case, session, tiny):
    per, function, says = EDITS[case]
    bad.fit(session, tiny("llama"), **bad.TP)
    session.edit("bad", per=per)(function)
    session.hook(MLP, edit="bad")
    with pytest.raises(EditError, match=f"edit 'bad' at {re.escape(MLP)} {says}") as caught:
        session.run(bad.ROWS)
    assert caught.value.rank in (0, 1)
    bad.healthy(session, tiny("llama"), **bad.TP)


RIGHT = {
    "36-threads": bad.starts_threads,
    "36-process": bad.starts_a_process,
    "36-forks": bad.forks,
    "37-hooks": bad.hooks_while_it_fires,
    "37-modules": bad.adds_a_module,
    "39": bad.sets_global_state,
}


@two
@pytest.mark.parametrize("case", RIGHT)
def test_an_edit_that_does_what_it_should_not_disturbs_nothing(case, session, tiny):
    """Each adds 1, and does something to the process beside it."""
    bad.fit(session, tiny("llama"), **bad.TP)
    session.hook(MLP, edit="add", value=1.0)
    want = session.run(bad.ROWS).logits.tensor().clone()
    session.unhook()
    session.edit("bad")(RIGHT[case])
    session.hook(MLP, edit="bad")
    assert torch.equal(session.run(bad.ROWS).logits.tensor(), want)
    assert session.on_ranks(bad.engine_state) == [("torch.float32", False)] * 2
    bad.healthy(session, tiny("llama"), **bad.TP)


@pytest.mark.numbers(39)
@two
def test_an_edit_that_draws_leaves_what_the_ranks_draw_alike(session, tiny):
    """Sampled text under tp: the edit runs on one rank, the tokens are drawn on both."""
    bad.fit(session, tiny("llama"), **bad.TP)
    want = session.generate(bad.ROWS, 8, do_sample=True, seed=3).new_ids
    session.edit("bad")(bad.draws)
    session.hook(MLP, edit="bad")
    assert session.generate(bad.ROWS, 8, do_sample=True, seed=3).new_ids == want
    session.edit("noisy")(bad.adds_noise)
    session.hook(MLP, edit="noisy")
    noisy = session.generate(bad.ROWS, 8, do_sample=True, seed=3).new_ids
    assert noisy != want and session.generate(bad.ROWS, 8, do_sample=True, seed=3).new_ids == noisy
    bad.healthy(session, tiny("llama"), **bad.TP)


@pytest.mark.numbers(30)
@two
def test_an_edit_that_ends_its_process(session, tiny):
    bad.fit(session, tiny("llama"), **bad.TP)
    session.edit("bad")(bad.ends_the_process)
    session.hook(MLP, edit="bad")
    with pytest.raises(EngineDied, match=r"rank 0's engine died \(pid \d+ on .*, exit code 7\)"):
        session.run(bad.ROWS)
    assert session.restart() == [0]
    bad.healthy(session, tiny("llama"), **bad.TP)


@pytest.mark.parametrize(
    ("case", "body", "says"),
    [
        ("40", 'print "x"', r"edit 'mine', line 1: Missing parentheses"),
        ("40-newer", "x = 1\ntype X[T: (int) = int] = list[T]\nx", r"edit 'mine', line 2: "),
        ("40-indent", "    x\n  y", "edit 'mine', line"),
        ("40-nul", "x\0", "edit 'mine'"),
        ("40-ends", "return x\ndef other(): pass", None),
    ],
)
def test_an_edit_in_another_syntax(case, body, says):
    from IPython.core.error import UsageError

    from flexkernel.notebook.lines import compile_edit as written

    if says is None:
        assert written("mine", body, {})(3, None) == 3
        return
    with pytest.raises(UsageError, match=says):
        written("mine", body, {})


@pytest.mark.numbers(40)
def test_engines_of_another_python_are_refused(monkeypatch):
    from flexkernel.cluster.cluster import Cluster
    from flexkernel.cluster.ipp import IPyParallel

    hellos = [{"version": fk.__version__, "python": ("3", "9")}]
    monkeypatch.setattr(Cluster, "call", lambda *_args, **_more: hellos)
    with pytest.raises(
        ClusterError,
        match=r"engines run Python 3\.9, this notebook 3\.\d+: a function's code means nothing",
    ):
        IPyParallel._attach(Cluster(), [0])


# --- prompts --------------------------------------------------------------------------


@pytest.mark.numbers(45, 46)
@two
def test_rows_of_several_lengths_and_an_odd_number_of_them(session, tiny):
    """No pad token, three rows on two groups: the unsharded model's numbers, row by row as
    alone."""
    folder = tiny("llama")
    session.load(folder, dp=2)
    assert session.tokenizer is None
    rows = [[5, 6, 7, 8, 9], [10], [11, 12, 13]]
    run = session.run(rows)
    model = reference.load(folder)
    for row, logits in zip(rows, run.logits.tensor(), strict=True):
        with torch.no_grad():
            alone = model(torch.tensor([row]), use_cache=False).logits[0]
        torch.testing.assert_close(logits[-len(row) :], alone, atol=2e-5, rtol=2e-5)
    bad.healthy(session, folder, dp=2)


TEXTS = {
    "47-emoji": "👩‍👩‍👧‍👦🏳️‍🌈",
    "47-rtl": "שלום \u202eright to left\u202c עולם",
    "47-nul": "a\0b",
    "47-controls": "\x1b[31m\r\n\t\x7f\ufeff\u2028",
    "47-markup": "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "47-combining": "z" + "\u0301" * 500,
}


@pytest.mark.parametrize("case", TEXTS)
def test_text_of_every_kind_comes_back(case, tokenizer):
    batch = prompts.batch(TEXTS[case], tokenizer, vocab_size=49152, max_positions=8192)
    assert prompts.texts(batch, tokenizer) == [TEXTS[case]]
    assert len(batch.tokens[0]) == len(batch.ids[0])


@pytest.mark.numbers(47)
def test_half_a_surrogate_pair_is_refused(tokenizer):
    with pytest.raises(PromptError, match="half a character"):
        prompts.batch("a \ud83d b", tokenizer)


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    return prompts.tokenizer(str(smollm2))


@pytest.mark.long("48-ten")
@pytest.mark.parametrize(
    "num_bytes", [pytest.param(10**6, id="48-megabyte"), pytest.param(10**7, id="48-ten")]
)
def test_a_very_long_prompt_is_refused_with_both_numbers(num_bytes, tokenizer):
    text = "the cat sat "
    with pytest.raises(
        PromptError, match=r"the prompt has \d+ tokens and the model 8192 positions"
    ):
        prompts.batch(text * (num_bytes // len(text)), tokenizer, max_positions=8192)
