"""Generation: under every layout the tokens of the unsharded model's own generate, and at each
step its activations."""

from __future__ import annotations

import functools
import itertools
import shutil
import signal
import time

import pytest
import torch
from IPython.core.error import UsageError
from IPython.core.interactiveshell import InteractiveShell
from jupyter_client.manager import start_new_kernel
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as token_models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import flexkernel as fk
from flexkernel.errors import (
    CaptureError,
    EditError,
    EngineError,
    GenerationError,
    HookError,
    MemoryBudgetError,
    PlacementError,
    PromptError,
)
from flexkernel.memory import plan
from flexkernel.session.generation import Detokenizer, generated
from flexkernel.session.store import Store
from flexkernel.wire import RunReport
from tests.support import layouts, models, on_engines, reference, unsharded

TOLERANCE = 2e-5
BATCH = models.ids_and_mask([5, 9, 7])
ROWS = models.rows(BATCH)
S, N = 9, 32
POINTS = ("q", "k", "v", "pattern", "z")
LAYOUTS = layouts.without(layouts.ALL, "tp2xfsdp2", "pp2xfsdp2")
EAGER = ("one", "pp2")
LAYOUTS_AND_ATTENTIONS = [
    pytest.param(p.values[0], attn, id=f"{p.id}-{attn}", marks=p.marks)
    for p in LAYOUTS
    for attn in ("sdpa", "eager")
    if attn == "sdpa" or p.id in EAGER
]
two = pytest.mark.engines(2)


def over_the_text(folder, run, attn: str = "sdpa") -> reference.Reference:
    """One forward of the unsharded model, without a cache, over all that the run fed."""
    ids = tuple(tuple(row[: run.mask.shape[1]]) for row in run.ids)
    return forward_over(folder, attn, ids, tuple(map(tuple, run.mask.tolist())))


@functools.cache
def forward_over(folder, attn: str, ids: tuple, mask: tuple) -> reference.Reference:
    real = torch.tensor(mask).long()
    return reference.reference(
        unsharded.model(folder, attn), torch.tensor(ids), real, (real.cumsum(-1) - 1).clamp(min=0)
    )


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
        assert error <= TOLERANCE * max(1.0, want.abs().max().item()), (
            f"{capture.name}: off by {error:.1e}"
        )
        compared += 1
    return compared


def hook_everything(session) -> None:
    session.hook("**")
    session.hook("model.layers.*.mlp.**", at="input")
    for point in POINTS:
        session.hook(f"**.@{point}")


# --- equal to the unsharded model -----------------------------------------------------


@pytest.mark.parametrize(("layout", "attn"), LAYOUTS_AND_ATTENTIONS)
def test_tokens_and_every_activation_are_the_unsharded_models(session, tiny, layout, attn):
    """Three left-padded rows over up to two groups of ranks: rows are uneven, too."""
    folder = tiny("llama")
    session.load(folder, attn=attn, **layout)
    hook_everything(session)
    run = session.generate(ROWS, max_new_tokens=N, eos_token_id=None)
    assert run.new_ids == unsharded.generated(folder, ROWS, N, attn=attn) and all(
        len(row) == N for row in run.new_ids
    )
    assert run.forwards == N and run.mask.shape == (3, S + N - 1)
    assert compare(run, over_the_text(folder, run, attn)) > 80
    pattern = run["model.layers.2.self_attn.@pattern"].tensor()
    assert pattern.shape == (3, 8, S + N - 1, S + N - 1)
    assert pattern.triu(1).transpose(1, 2)[run.mask].abs().max() == 0, (
        "zeros where a query does not see"
    )
    assert run.logits.shape == (3, N, 256)
    torch.testing.assert_close(run.logits[1], run["lm_head"][1, S - 1 :])
    assert run.logits.tensor().argmax(-1).tolist() == run.new_ids


ENDS = 11  # row 1 comes to it in its fourth token, the others never or later


@pytest.mark.parametrize("layout", layouts.only(LAYOUTS, "one", "pp2", "fsdp2", "dp2"))
def test_a_row_that_ends_early_ends_and_the_run_ends_with_the_last(session, tiny, layout):
    folder = tiny("llama")
    session.load(folder, **layout)
    hook_everything(session)
    for ends in ((176, ENDS), (176, ENDS, 242)):
        run, want = (
            session.generate(ROWS, max_new_tokens=N, eos_token_id=list(ends)),
            unsharded.generated(folder, ROWS, N, ends),
        )
        assert run.new_ids == want and len({len(row) for row in want}) > 1, (
            "rows end at different steps"
        )
        assert run.forwards == max(map(len, want))
        assert run.mask[:, S:].sum(1).tolist() == [len(row) - 1 for row in want]
        assert compare(run, over_the_text(folder, run)) > 80
        assert {len(row) for row in run.tokens} == {S + run.forwards}
    assert run.forwards < N and run["model.layers.1.mlp", "output"].shape == (
        3,
        S + run.forwards - 1,
        64,
    )
    assert run["model.layers.1.mlp", "output"].norm(dim=-1).shape == (3, S + run.forwards - 1)
    assert torch.equal(
        run["model.layers.1.mlp", "output"][1], run["model.layers.1.mlp", "output"].tensor()[1]
    )
    with pytest.raises(CaptureError, match="one piece"):
        run["model.layers.1.mlp", "output"].as_value()


@pytest.mark.parametrize(("layout", "rows"), [({"pp": 2}, 3), ({"fsdp": 2}, 1)], ids=str)
@two
def test_one_token_is_the_plain_run_with_its_next_token(session, tiny, layout, rows):
    session.load(tiny("llama"), **layout)
    hook_everything(session)
    plain = session.run(ROWS[:rows])
    run = session.generate(ROWS[:rows], max_new_tokens=1)
    assert run.forwards == 1 and run.mask.tolist() == plain.mask.tolist()
    assert [ids[0] for ids in run.new_ids] == plain.logits[:, -1].argmax(-1).tolist()
    assert len(plain) == len(run) > 80
    for a, b in zip(plain, run, strict=True):
        torch.testing.assert_close(a.tensor(), b.tensor(), atol=TOLERANCE, rtol=TOLERANCE)


# --- edits at each step ---------------------------------------------------------------

VECTOR = torch.linspace(-1, 1, 64)
REAL = BATCH["attention_mask"].bool()


def mix(x, ctx=None):
    return x.roll(3, -1) * 0.5 + x.mean(1, keepdim=True)


def told(x, step, columns, text):
    """Depends on all that an edit is told beside x."""
    return x + step + (text[:, columns] / 256 + columns * 0.1)[..., None]


def at(x, columns, position, new):
    """new at a position of the whole text, if this forward has it; -1 is its last one."""
    where = columns == (columns[-1] if position == -1 else position)
    return torch.where(where[None, :, None], new, x)


def mean(x, step, columns, text):
    weight = torch.cat([REAL, torch.ones(3, 100)], 1)[:, columns][..., None]
    return ((x * weight).sum((0, 1), keepdim=True) / weight.sum()).expand_as(x)


LAYER, GATE = "model.layers.1", "model.layers.1.mlp.gate_proj"
HEADS, KEYS = "model.layers.1.self_attn.@z", "model.layers.1.self_attn.@k"
OUT, K_PROJ = "model.layers.1.self_attn.o_proj input", "model.layers.1.self_attn.k_proj"


def newest(x, _step, columns, _text):
    return at(x, columns, -1, x + VECTOR)


def without(x):
    return x.index_fill(-1, torch.arange(24, 40), 0.0)  # heads 3 and 4, 8 wide


def zero_at(position):
    return lambda x, _step, columns, _text: at(x, columns, position, 0 * x)


# name → (module, what the hook does there), (the module of a plain hook that does the same, what
# it makes of x)
EDITS = {
    "whole": ((LAYER, {"edit": "mix"}), (LAYER, lambda x, *_: mix(x))),
    "whole, sharded": ((GATE, {"edit": "mix"}), (GATE, lambda x, *_: mix(x))),
    "row": ((GATE, {"edit": "mix_row"}), (GATE, lambda x, *_: mix(x))),
    "element": ((GATE, {"edit": "scale", "value": -1.5}), (GATE, lambda x, *_: -1.5 * x)),
    "newest": ((LAYER, {"edit": "add", "value": VECTOR, "positions": [-1]}), (LAYER, newest)),
    "of the prompt": ((LAYER, {"edit": "zero", "positions": [7]}), (LAYER, zero_at(7))),
    "generated": ((LAYER, {"edit": "zero", "positions": [S + 1]}), (LAYER, zero_at(S + 1))),
    "mean": ((LAYER, {"edit": "mean"}), (LAYER, mean)),
    "told": ((LAYER, {"edit": "told"}), (LAYER, told)),
    "heads": ((HEADS, {"edit": "zero", "heads": [3, 4]}), (OUT, lambda x, *_: without(x))),
    "keys": ((KEYS, {"edit": "scale", "value": 0.3}), (K_PROJ, lambda x, *_: 0.3 * x)),
}  # fmt: skip
MOVED = 7  # tokens: enough that one edit's effect is fed back


def edited_truth(folder, module: str = "", function=None) -> tuple[list[list[int]], torch.Tensor]:
    """Tokens, and the logits they were taken from, of the unsharded model with a plain torch
    hook."""
    model, steps, done = reference.load(folder), [], [0]

    def count(_module, _args, kwargs):
        steps.append(range(done[0], done[0] + kwargs["input_ids"].shape[1]))
        done[0] = steps[-1].stop
        texts.append(kwargs["input_ids"])

    def edited(x):
        return function(x, len(steps) - 1, torch.tensor(list(steps[-1])), torch.cat(texts, 1))

    texts: list[torch.Tensor] = []
    model.register_forward_pre_hook(count, with_kwargs=True)
    if function is not None and module.endswith(" input"):
        inner = model.get_submodule(module.removesuffix(" input"))
        inner.register_forward_pre_hook(lambda _m, args: (edited(args[0]),))
    elif function is not None:
        model.get_submodule(module).register_forward_hook(lambda _m, _a, out: edited(out))
    ids, mask = BATCH["input_ids"], BATCH["attention_mask"]
    out = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=MOVED,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return out.sequences[:, S:].tolist(), torch.stack(out.logits, 1)


@pytest.fixture(scope="module")
def edit_truths(tiny):
    plain = edited_truth(tiny("llama"))
    return {"plain": plain} | {
        name: edited_truth(tiny("llama"), m, f) for name, (_, (m, f)) in EDITS.items()
    }


@pytest.mark.long("tp2xpp2")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_edit_is_made_at_every_step(session, tiny, layout, edit_truths):
    session.load(tiny("llama"), **layout)
    session.edit("mix")(lambda x, ctx: x.roll(3, -1) * 0.5 + x.mean(1, keepdim=True))
    session.edit("mix_row", per="row")(lambda x, ctx: x.roll(3, -1) * 0.5 + x.mean(1, keepdim=True))

    @session.edit("told")
    def told(x, ctx):
        columns = ctx.positions[1]  # of the longest row, which has no pads
        assert (
            ctx.mask[1].all()
            and ctx.tokens.shape == ctx.mask.shape == ctx.positions.shape == x.shape[:2]
        )
        return x + ctx.step + (ctx.tokens / 256 + columns * 0.1)[..., None]

    for name, ((module, how), _) in EDITS.items():
        tokens, logits = edit_truths[name]
        assert (logits - edit_truths["plain"][1]).abs().max() > 1e-2, f"{name} has to do something"
        session.hook(module, name="edited", capture="both", **how)
        run = session.generate(ROWS, max_new_tokens=MOVED, eos_token_id=None)
        assert run.new_ids == tokens, name
        torch.testing.assert_close(run.logits.tensor(), logits, atol=1e-4, rtol=1e-4, msg=name)
        before, after = run[module, "output before"], run[module, "output"]
        assert before.shape == after.shape and not torch.equal(before.tensor(), after.tensor())
        session.unhook()


@pytest.mark.parametrize("layout", [{"tp": 2}, {"fsdp": 2}], ids=str)
@two
def test_noise_of_a_generation_does_not_depend_on_the_layout(session, tiny, layout):
    module = "model.layers.1.self_attn.@k"
    with fk.local() as here:
        here.load(tiny("llama"))
        here.hook(module, edit="noise", value=0.5)
        alone = here.generate(ROWS, max_new_tokens=4)
        want = alone.logits.tensor()
    session.load(tiny("llama"), **layout)
    plain = session.generate(ROWS, max_new_tokens=4)
    session.hook(module, edit="noise", value=0.5)
    run = session.generate(ROWS, max_new_tokens=4)
    assert run.new_ids == alone.new_ids
    torch.testing.assert_close(run.logits.tensor(), want, atol=1e-4, rtol=1e-4)
    assert (run.logits.tensor() - plain.logits.tensor()).abs().max() > 1e-2


@pytest.mark.parametrize("layout", [{"tp": 2}, {"pp": 2}], ids=str)
@two
def test_a_prompts_activation_is_patched_in_and_the_text_goes_on_from_it(session, tiny, layout):
    session.load(tiny("llama"), **layout)
    session.hook("model.layers.3", name="residual")
    other = session.run([ROWS[1][::-1]])
    session.unhook()
    want = session.generate([ROWS[1][::-1]], max_new_tokens=1).new_ids
    plain = session.generate([ROWS[1]], max_new_tokens=5)
    session.hook("model.layers.3", edit="patch", value=other["model.layers.3"])
    run = session.generate([ROWS[1]], max_new_tokens=5)
    assert [row[:1] for row in run.new_ids] == want != [row[:1] for row in plain.new_ids]
    assert torch.equal(run["model.layers.3"][:, :S], other["model.layers.3"].tensor())


@two
def test_an_edit_that_raises_at_a_later_step_is_one_error_and_the_next_run_is_right(session, tiny):
    session.load(tiny("llama"), tp=2)
    before = session.generate(ROWS, max_new_tokens=5).new_ids

    @session.edit("late")
    def late(x, ctx):
        return x / (3 - ctx.step) if ctx.step < 3 else 1 // 0

    session.hook("model.layers.1.mlp.gate_proj", edit="late")
    with pytest.raises(EditError, match=r"raised ZeroDivisionError") as caught:
        session.generate(ROWS, max_new_tokens=5)
    assert "generated before that" in caught.value.__notes__[0]
    session.unhook()
    assert session.generate(ROWS, max_new_tokens=5).new_ids == before


@pytest.mark.parametrize("layout", [{"fsdp": 2}, {"dp": 2}], ids=str)
@two
def test_ranks_whose_rows_have_ended_still_take_part_in_edits(session, tiny, layout):
    """The edit sees all rows on one rank: each rank must come to it as often as the others, and a
    row's end shows."""
    found = []
    with fk.local() as here:
        for one, where in ((here, {}), (session, layout)):
            one.load(tiny("llama"), **where)

            @one.edit("told")
            def told(x, ctx):
                ctx.save[ctx.step] = (
                    ctx.tokens.tolist(),
                    ctx.mask.tolist(),
                    ctx.positions.tolist(),
                )
                return x + ctx.step + x.mean(1, keepdim=True)

            one.hook(GATE, edit="told")
            run = one.generate(ROWS, max_new_tokens=8, eos_token_id=[204, 233])
            found.append((run.new_ids, run.logits.tensor(), run.mask, one.saved("told")))
    (ids, logits, mask, saved), (got_ids, got_logits, got_mask, got_saved) = found
    assert got_ids == ids and len({len(row) for row in ids}) > 1, "rows end at different steps"
    assert saved.keys() == got_saved.keys() == set(range(max(map(len, ids))))
    real = mask[:, S - 1 :]
    torch.testing.assert_close(got_logits[real], logits[real], atol=1e-4, rtol=1e-4)
    assert got_mask.tolist() == mask.tolist() and got_saved == saved


# --- what is kept ---------------------------------------------------------------------


@two
def test_positions_are_the_whole_texts_and_the_last_is_each_forwards_newest(session, tiny):
    session.load(tiny("llama"), tp=2)
    session.hook("model.layers.1")
    session.hook("model.layers.1.mlp.gate_proj", name="all")
    whole = session.generate(ROWS, max_new_tokens=6)
    session.hook("model.layers.1", positions=[0, -1], name="newest")
    session.hook("model.layers.1.mlp.gate_proj", positions=[2, S + 1], name="two")
    run = session.generate(ROWS, max_new_tokens=6)
    newest = run["newest"]
    assert newest.shape == (3, 7, 64)
    assert torch.equal(
        newest.tensor(), whole["model.layers.1"].tensor()[:, [0, 8, 9, 10, 11, 12, 13]]
    )
    assert (
        newest.mask.tolist() == run.mask[:, [0, 8, 9, 10, 11, 12, 13]].tolist()
        and len(newest.tokens[0]) == 7
    )
    assert torch.equal(run["two"].tensor(), whole["all"].tensor()[:, [2, S + 1]])
    end = whole.new_ids[1][1]
    early = session.generate(ROWS[1:2], max_new_tokens=6, eos_token_id=end)
    assert (
        early.forwards == 2
        and early["newest"].shape == (1, 3, 64)
        and early["two"].shape == (1, 1, 176)
    )
    session.hook("model.layers.1", positions=[S + 5], name="newest")
    with pytest.raises(
        HookError, match=r"keeps position 14, but the run has 14, of which 9 are the prompt's"
    ):
        session.generate(ROWS, max_new_tokens=6)


@two
def test_large_logits_are_kept_of_the_last_forward_only(session, tiny, monkeypatch):
    monkeypatch.setattr(plan, "LOGITS_BYTES", 3 * 4 * 256 * 4 - 1)
    session.on_ranks(on_engines.limit_logits, 3 * 4 * 256 * 4 - 1)
    try:
        session.load(tiny("llama"), tp=2)
        small, large = (
            session.generate(ROWS, max_new_tokens=3),
            session.generate(ROWS, max_new_tokens=4),
        )
    finally:
        session.on_ranks(on_engines.limit_logits, 64 << 20)
    assert small.logits.shape == (3, 3, 256) and not small.plan.logits_last
    assert large.logits.shape == (3, 1, 256) and large.plan.logits_last
    assert large.logits[:, 0].argmax(-1).tolist() == [row[-1] for row in large.new_ids]


@pytest.mark.parametrize("arch", ["gemma2", "mistral", "mixtral"])
@two
def test_sliding_windows_and_folded_rows_are_right_too(session, tiny, arch):
    """Windows of 8 are passed by; Gemma-2's layers take turns; Mixtral's routers have rows and
    positions in one dim."""
    layout = {"gemma2": {"pp": 2}, "mistral": {"tp": 2}, "mixtral": {"fsdp": 2}}[arch]
    attn = "sdpa"  # Gemma-2 has eager only, whichever is asked for
    session.load(tiny(arch), **layout)
    session.hook("model.layers.*.*")
    if arch != "mixtral":
        for point in POINTS:
            session.hook(f"**.@{point}")
    else:
        session.hook("**.gate")
    run = session.generate(ROWS, max_new_tokens=12)
    assert run.new_ids == unsharded.generated(tiny(arch), ROWS, 12, attn=attn)
    assert compare(run, over_the_text(tiny(arch), run, attn)) >= 20
    if arch == "mixtral":
        end = run.new_ids[1][4]
        early = session.generate(
            ROWS, max_new_tokens=12, eos_token_id=[end, *(row[6] for row in run.new_ids)]
        )
        assert early.forwards < 12 and compare(early, over_the_text(tiny(arch), early, attn)) >= 20


def test_what_has_no_formula_is_refused_by_name_and_the_rest_is_there(session, tiny):
    session.load(tiny("mixtral"))
    session.hook("model.layers.*.mlp.experts.act_fn")
    session.hook("model.layers.*.mlp")
    run = session.generate(ROWS, max_new_tokens=3)
    assert run["model.layers.1.mlp"].shape == (3, S + 2, 64)
    refused = [c for c in run if c.key.module.endswith("act_fn")]
    assert refused
    with pytest.raises(PlacementError, match="no formula gives its shape"):
        refused[0].tensor()


# --- asking for it --------------------------------------------------------------------


def test_what_cannot_be_had_is_said_before_anything_runs(session, tiny):
    session.load(tiny("llama"))
    for how, message in [
        ({"max_new_tokens": 0}, "a whole number from 1"),
        ({"num_beams": 4}, "num_beams= cannot be had here"),
        ({"max_length": 9}, "say max_new_tokens="),
        ({"temprature": 0.5}, "nearest: temperature"),
        ({"temperature": 0.5}, "say do_sample=True"),
        ({"do_sample": True, "temperature": 0.0}, "temperature=0.0: it is a number above 0"),
        ({"do_sample": True, "top_p": 1.5}, "top_p=1.5: it is a number above 0"),
        ({"min_new_tokens": "many"}, "min_new_tokens='many': it is a whole number"),
    ]:
        with pytest.raises(GenerationError, match=message):
            session.generate(ROWS, **how)
    with pytest.raises(
        PromptError,
        match=r"a prompt of 9 tokens and 2040 new ones are 2049, and the model has 2048",
    ):
        session.generate(ROWS, max_new_tokens=2040)
    session.hook("**")
    budget, session.store.budget = session.store.budget, 1 << 20
    with pytest.raises(MemoryBudgetError, match="would keep"):
        session.generate(ROWS, max_new_tokens=500)
    session.store.budget = budget
    assert session.generate(ROWS, max_new_tokens=2).forwards == 2


@two
def test_a_module_without_generate_is_refused_on_all_ranks(session, tiny):
    session.load(on_engines.no_language_model, tp=2)
    with pytest.raises(GenerationError, match=r"has no generate\(\)"):
        session.generate(ROWS, max_new_tokens=2)


@pytest.mark.parametrize("layout", [{"tp": 2}, {"pp": 2}, {"fsdp": 2}], ids=str)
@two
def test_sampling_is_the_unsharded_models_where_rows_stay_together(session, tiny, layout):
    model = reference.load(tiny("llama"))
    torch.manual_seed(7)
    want = model.generate(
        BATCH["input_ids"],
        attention_mask=BATCH["attention_mask"],
        max_new_tokens=12,
        do_sample=True,
        temperature=2.0,
        top_k=40,
        pad_token_id=0,
        eos_token_id=None,
    )[:, S:].tolist()
    session.load(tiny("llama"), **layout)
    how = {
        "do_sample": True,
        "temperature": 2.0,
        "top_k": 40,
        "eos_token_id": None,
        "max_new_tokens": 12,
    }
    run = session.generate(ROWS, seed=7, **how)
    if "fsdp" not in layout:
        assert run.new_ids == want
    drawn = session.generate(ROWS, **how)
    assert drawn.new_ids != run.new_ids, "another seed each time"
    assert session.generate(ROWS, seed=drawn.seed, **how).new_ids == drawn.new_ids


# --- as it comes ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def told_model(tiny, tmp_path_factory):
    """The tiny Llama with a tokenizer whose tokens are bytes: most of what it says is no whole
    character."""
    tokenizer = Tokenizer(token_models.BPE(models.byte_letters(), []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    target = shutil.copytree(tiny("llama"), tmp_path_factory.mktemp("told") / "model")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(target)
    return target


HELD = 12  # the step at which engines wait until some text has been told


def check_told(session, folder, layout) -> None:
    """The engines wait in the middle for a file that on_token makes: so what it is told, it is
    told meanwhile."""
    session.load(folder, **layout)
    told = folder / f"told-{time.time_ns()}"

    @session.edit("hold", per="element")
    def hold(x, ctx):
        for _ in range(3000 if ctx.step == HELD else 0):
            if told.exists():
                return x
            time.sleep(0.02)
        if ctx.step == HELD:
            raise TimeoutError("no text was told while the ranks generate")
        return x

    def on_token(row: int, text: str) -> None:
        came.append((row, text))
        if {row for row, _ in came} == {0, 1}:
            told.touch()

    came: list[tuple[int, str]] = []
    session.hook("model.layers.1", edit="hold", capture="none")
    run = session.generate(
        ["ab", "the other"], max_new_tokens=40, eos_token_id=None, on_token=on_token
    )
    assert ["".join(text for row, text in came if row == i) for i in (0, 1)] == run.generated
    assert run.text == [a + b for a, b in zip(["ab", "the other"], run.generated, strict=True)]
    assert run.forwards == 40 and len(came) > 3, "in pieces"
    assert (
        repr(run.generated[0])[1:20] in repr(run)
        and "40 new" in repr(run)
        and "<b>" in run._repr_html_()
    )


def test_text_is_told_as_it_comes_in_this_process(session, told_model):
    check_told(session, told_model, {})


@pytest.mark.parametrize("layout", [{"pp": 2}, {"dp": 2}], ids=str)
@two
def test_text_is_told_as_it_comes_from_engines(session, told_model, layout):
    check_told(session, told_model, layout)


def test_half_a_character_is_held_back():
    class Bytes:
        def decode(self, ids, **_):
            return bytes(ids).decode(errors="replace")

    words, text = Detokenizer(Bytes()), "é 漢 😀 ok".encode()
    pieces = [words.add([byte]) for byte in text] + [words.rest()]
    assert "".join(pieces) == text.decode() and not any("\ufffd" in piece for piece in pieces)
    words = Detokenizer(Bytes())
    assert words.add(list("é".encode()[:1])) == "" and words.rest() == "\ufffd"
    garbage = torch.randint(0, 256, (3000,), generator=torch.Generator().manual_seed(0)).tolist()
    words = Detokenizer(Bytes())
    pieces = [words.add([byte]) for byte in garbage] + [words.rest()]
    assert "".join(pieces) == bytes(garbage).decode(errors="replace")
    assert max(map(len, pieces)) < 5, "what is no character is not held for ever"


def stops(session, layout, tiny, callback, error) -> None:
    session.load(tiny("llama"), **layout)
    session.hook("model.layers.*.mlp")
    before = session.generate(ROWS, max_new_tokens=5)
    with pytest.raises(error) as caught:
        session.generate(ROWS, max_new_tokens=2000, eos_token_id=None, on_token=callback)
    assert "generated before that" in caught.value.__notes__[0]
    assert caught.value.__notes__[0].count(" ") < 3000, "the rest was not waited for"
    after = session.generate(ROWS, max_new_tokens=5)
    assert after.new_ids == before.new_ids and len(after) == 4
    assert torch.equal(after["model.layers.1.mlp"].tensor(), before["model.layers.1.mlp"].tensor())


@pytest.mark.parametrize("layout", [{"tp": 2}, {"fsdp": 2}], ids=str)
@two
def test_ctrl_c_frees_all_ranks_and_the_next_run_is_right(session, tiny, layout):
    stops(
        session,
        layout,
        tiny,
        lambda _row, _text: signal.raise_signal(signal.SIGINT),
        KeyboardInterrupt,
    )


@pytest.mark.parametrize(
    "n", [pytest.param(1, marks=pytest.mark.engines(1)), pytest.param(2, marks=two)]
)
def test_an_error_in_on_token_is_the_users_own(session, tiny, n):
    stops(session, {"pp": n}, tiny, lambda row, _text: [][row], IndexError)


def test_ranks_that_went_on_differently_are_an_error():
    report = lambda rank, ids: RunReport(rank, 1, {}, {}, {}, generated={0: ids})  # noqa: E731
    assert generated([report(0, [5, 6]), report(1, [5, 6])], 1) == [[5, 6]]
    with pytest.raises(EngineError, match="ranks 0 and 1 run the same row and went on differently"):
        generated([report(0, [5, 6]), report(1, [5, 7])], 1)


@two
def test_a_generation_is_found_again_by_a_notebook_that_attaches(session, tiny):
    session.load(tiny("llama"), pp=2)
    session.hook("model.layers.1.mlp")
    end = unsharded.generated(tiny("llama"), ROWS, 6)[0][1]
    run = session.generate(ROWS[:1], max_new_tokens=6, eos_token_id=end)
    described = [answer.runs for answer in session.engines.call("recover.rank_state")]
    store, session._store = session._store, Store(session.engines, session.loaded.info.layout)
    try:
        session.store.recover(described, session.loaded.planner, None)
        again = session.store.runs[run.number]
        assert (
            again.new_ids == run.new_ids
            and again.mask.tolist() == run.mask.tolist()
            and again.text == run.text
        )
        assert again["model.layers.1.mlp"].shape == (1, 5 + 1, 64)
        assert torch.equal(again["model.layers.1.mlp"].tensor(), run["model.layers.1.mlp"].tensor())
    finally:
        session._store = store


# --- the magic ------------------------------------------------------------------------


@pytest.fixture
def shell(session, told_model):
    shell = InteractiveShell()
    shell.run_line_magic("load_ext", "flexkernel")
    session.load(told_model)
    shell.user_ns |= {"session": session}
    yield shell
    InteractiveShell.clear_instance()


def test_the_magic_generates_and_is_its_twin(shell, session):
    session.hook("model.layers.1.mlp")
    run, twin = (
        shell.run_line_magic("flex_run", "--generate 6 abc"),
        session.generate("abc", max_new_tokens=6),
    )
    assert (
        run.new_ids == twin.new_ids and len(run.new_ids[0]) == 6 and run.text[0].startswith("abc")
    )
    assert torch.equal(run["model.layers.1.mlp"].tensor(), twin["model.layers.1.mlp"].tensor())
    drawn = shell.run_line_magic(
        "flex_run", "--generate 6 --sample --temperature 3 --top-k 50 --seed 5 abc"
    )
    twin = session.generate("abc", 6, do_sample=True, temperature=3.0, top_k=50, seed=5)
    assert drawn.new_ids == twin.new_ids != run.new_ids
    batch = shell.run_cell_magic("flex_run", "--generate 3", "abc\nsome more\n")
    assert len(batch.generated) == 2 and batch.forwards == 3
    for line, message in [
        ("--sample abc", "--sample belongs to --generate"),
        ("--top-k 5 abc", "--top-k belongs to --generate"),
        ("--generate 3 --stop-at model.norm abc", "--stop-at is for one forward"),
        ("--generate 3 --backward next_token abc", "--backward is for one forward"),
    ]:
        with pytest.raises(UsageError, match=message):
            shell.run_line_magic("flex_run", line)
    with pytest.raises(GenerationError, match="say do_sample=True too"):
        shell.run_line_magic("flex_run", "--generate 3 --temperature 2 abc")


@pytest.mark.slow
def test_a_cell_shows_the_text_growing_and_keeps_it_as_plain_text(told_model):
    manager, client = start_new_kernel(kernel_name="python3")
    seen: dict[str, list] = {}
    try:
        for code in (
            "%load_ext flexkernel",
            "%flex_cluster local",
            f"%flex_load {told_model}",
            "run = %flex_run --generate 200 abc",
            "print(ascii(run.text[0]))",
        ):
            outputs = seen.setdefault(code.split()[0], [])
            reply = client.execute_interactive(code, output_hook=outputs.append, timeout=240)[
                "content"
            ]
            assert reply["status"] == "ok", reply
    finally:
        client.stop_channels()
        manager.shutdown_kernel()
    shown = [
        m["content"]
        for m in seen["run"]
        if m["msg_type"] in ("display_data", "update_display_data")
    ]
    texts = [content["data"]["text/plain"] for content in shown]
    assert len(texts) > 1 and all(set(content["data"]) == {"text/plain"} for content in shown)
    assert all(b.startswith(a) for a, b in itertools.pairwise(texts)), "it grows"
    assert len({content["transient"]["display_id"] for content in shown}) == 1, "in one place"
    printed = "".join(
        m["content"]["text"] for m in seen["print(ascii(run.text[0]))"] if m["msg_type"] == "stream"
    )
    assert printed.strip() == ascii(texts[-1])


# --- the real model -------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("layout", layouts.only(layouts.REAL, "pp2", "tp3"))
def test_the_real_model_goes_on_as_unsharded(session, smollm2, layout, record_property):
    tokenizer, model = AutoTokenizer.from_pretrained(smollm2), reference.load(smollm2)
    prompts = ["The capital of France is", "Water boils at"]
    want = [unsharded.by_itself(model, tokenizer(text)["input_ids"], 8) for text in prompts]
    session.load(smollm2, **layout)
    session.hook("model.layers.*.mlp")
    run = session.generate(prompts, max_new_tokens=8)
    assert run.new_ids == want and "Paris" in run.generated[0]
    ids, real = torch.tensor(run.ids)[:, : run.mask.shape[1]], run.mask
    whole = reference.reference(model, ids, real.long(), (real.long().cumsum(-1) - 1).clamp(min=0))
    assert len(run) == 30
    worst = 0.0
    for capture in run:
        expected = whole.outputs[capture.key.module, 0, ""][real]
        worst = max(
            worst, ((capture.tensor()[real] - expected).abs().max() / expected.abs().max()).item()
        )
    record_property("worst", worst)
    print(f"{layout}: worst relative error of 30 MLP outputs {worst:.1e}")
    assert worst < 1e-4
