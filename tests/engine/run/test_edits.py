"""Edits: under every layout what they do to a sharded model is what a plain torch hook does to the
unsharded one."""

from __future__ import annotations

import functools

import pytest
import torch

import flexkernel as fk
from tests.support import layouts, on_engines, reference, unsharded
from tests.support.edits import CASES, TOLERANCE, VECTOR, at_last, define, mix
from tests.support.rows import BATCH, MASK, ROWS


def some_of(cases: list, session) -> list:
    """All of them on up to two engines; every third on four, of which equality.py has the rest in
    one table."""
    return cases if session.engines.size <= 2 else cases[::3]


@pytest.mark.long("pp2xfsdp2")
@pytest.mark.parametrize("layout", layouts.ALL)
def test_every_edit_does_what_it_does_to_the_unsharded_model(
    session, tiny, layout, record_property
):
    session.load(tiny("llama"), **layout)
    define(session)
    base = unsharded.logits(tiny("llama"), ROWS)
    torch.testing.assert_close(
        session.run(ROWS).logits.tensor()[MASK], base[MASK], atol=TOLERANCE, rtol=0
    )
    for case in some_of(CASES, session):
        truth = unsharded.logits(tiny("llama"), ROWS, case)
        moved = (truth - base)[MASK].abs().max().item()
        assert moved > 100 * TOLERANCE, f"{case.name} has to do something"
        hooked = session.hook(case.module, name="edited", **case.how)
        assert hooked.spec.edit
        run = session.run(ROWS)
        error = (run.logits.tensor() - truth)[MASK].abs().max().item()
        record_property(f"{case.name}", f"moves {moved:.1e}, error {error:.1e}")
        assert error < TOLERANCE, f"{case.name}: error {error:.1e} of {moved:.1e}"
        session.unhook("edited")
    assert torch.equal(
        session.run(ROWS).logits.tensor()[MASK], session.run(ROWS).logits.tensor()[MASK]
    )


@pytest.mark.long("pp2xfsdp2")
@pytest.mark.parametrize("layout", layouts.ALL)
def test_a_capture_of_an_edited_activation_is_after_or_before_it(session, tiny, layout):
    session.load(tiny("llama"), **layout)
    define(session)
    name = "model.layers.1.mlp.gate_proj"
    session.hook(name)
    plain = session.run(ROWS)[name].tensor()
    session.unhook()
    session.hook(name, edit="mix")
    torch.testing.assert_close(session.run(ROWS)[name].tensor(), mix(plain), atol=1e-5, rtol=1e-5)
    session.hook(name, edit="mix", capture="before")
    assert torch.equal(session.run(ROWS)[name].tensor(), plain)
    session.hook(name, edit="mix", capture="none")
    assert name not in session.run(ROWS)


@pytest.mark.long("pp2xfsdp2")
@pytest.mark.parametrize("layout", layouts.ALL)
def test_both_sides_of_an_edit_are_captured_apart(session, tiny, layout):
    """Of an output and of an input, and of two edits on one module each."""
    session.load(tiny("llama"), **layout)
    define(session)
    name = "model.layers.1.mlp.gate_proj"
    session.hook(name)
    plain = session.run(ROWS)[name].tensor()
    session.unhook()
    session.hook(name, edit="mix", capture="both")
    session.hook(name, at="input", edit="scale", value=1.0, capture="both")
    run = session.run(ROWS)
    assert [c.name for c in run] == [
        f"{name} output before",
        name,
        f"{name} input before [0]",
        f"{name} input [0]",
    ]
    torch.testing.assert_close(run[name, "output before"].tensor(), plain, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(run[name, "output"].tensor(), mix(plain), atol=1e-5, rtol=1e-5)
    assert torch.equal(run[name, "input before"].tensor(), run[name, "input"].tensor())


@pytest.mark.parametrize("per", ["element", "whole"])
@pytest.mark.engines(2)
def test_nan_out_of_an_edit_is_allowed_and_flagged(session, tiny, per):
    session.load(tiny("llama"), tp=2)
    session.edit("bad", per=per)(lambda x, ctx: x / 0 * 0)
    name = "model.layers.1.mlp.gate_proj"
    session.hook(name, edit="bad", name="ratio")
    session.hook("model.layers.2.mlp", edit="scale", value=2.0)  # NaN goes in: it did not make it
    run = session.run(ROWS)
    assert run.warnings == (f"the edit of hook 'ratio' put out NaN at {name}, where none came in",)
    assert run.warnings[0] in repr(run) and "put out NaN at" in run._repr_html_()
    assert run.logits.tensor()[MASK].isnan().all()
    session.unhook("ratio")
    assert session.run(ROWS).warnings == ()


@pytest.mark.parametrize("layout", layouts.ALL)
def test_heads_are_zeroed_inside_attention(session, tiny, layout):
    session.load(tiny("llama"), **layout)
    base = session.run(ROWS).logits.tensor()
    model = reference.load(tiny("llama"))

    def hook(_module, args):
        return (args[0].index_fill(-1, torch.arange(24, 40), 0.0),)  # heads 3 and 4, 8 wide

    model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(hook)
    with torch.no_grad():
        truth = model(**BATCH, use_cache=False).logits
    assert (truth - base)[MASK].abs().max() > 100 * TOLERANCE
    session.hook("model.layers.1.self_attn.@z", edit="zero", heads=[3, 4])
    torch.testing.assert_close(
        session.run(ROWS).logits.tensor()[MASK], truth[MASK], atol=TOLERANCE, rtol=0
    )
    session.unhook()
    session.hook("model.layers.1.self_attn.@pattern", edit="zero", heads=[3, 4])
    torch.testing.assert_close(
        session.run(ROWS).logits.tensor()[MASK], truth[MASK], atol=TOLERANCE, rtol=0
    )


@pytest.mark.long("pp2xfsdp2", "tp2xpp2")
@pytest.mark.parametrize("layout", layouts.ALL)
def test_noise_does_not_depend_on_the_layout(session, tiny, layout):
    session.load(tiny("llama"), **layout)
    session.hook("model.layers.1.mlp.gate_proj")
    plain = session.run(ROWS)["model.layers.1.mlp.gate_proj"].tensor()
    session.hook("model.layers.1.mlp.gate_proj", edit="noise", value=0.5)
    drawn = session.run(ROWS)["model.layers.1.mlp.gate_proj"].tensor() - plain
    again = session.run(ROWS)["model.layers.1.mlp.gate_proj"].tensor() - plain
    assert torch.equal(drawn, again) and 0.4 < drawn.std() < 0.6
    with fk.local() as here:
        here.load(tiny("llama"))
        here.hook("model.layers.1.mlp.gate_proj", edit="noise", value=0.5)
        there = here.run(ROWS)["model.layers.1.mlp.gate_proj"].tensor() - plain
    torch.testing.assert_close(drawn, there, atol=1e-5, rtol=0)


@pytest.mark.long("pp2xfsdp2")
@pytest.mark.parametrize("layout", layouts.ALL)
def test_a_capture_is_patched_into_another_run(session, tiny, layout):
    """Patching the residual of layer 1 with another prompt's makes everything after it that
    prompt's."""
    session.load(tiny("llama"), **layout)
    other = [[9, 8, 7, 6, 5, 4, 3], [3, 4, 5, 6, 7, 8, 9]]
    here = [[3, 3, 4, 4, 5, 5, 6], [7, 7, 8, 8, 9, 9, 3]]
    session.hook("model.layers.1")
    source = session.run(other)
    plain = session.run(here).logits.tensor()
    session.hook("model.layers.1", edit="patch", value=source["model.layers.1"], name="patch")
    assert not torch.allclose(plain, source.logits.tensor(), atol=1e-2)
    torch.testing.assert_close(
        session.run(here).logits.tensor(), source.logits.tensor(), atol=TOLERANCE, rtol=0
    )
    source.free()  # the hook holds what it patches in: other runs do not write over it
    want = session.run(other, groups=()).logits.tensor()
    for _ in range(5):
        session.run(here)
    torch.testing.assert_close(session.run(here).logits.tensor(), want, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("layout", [{"fsdp": 2}, {"dp": 2}], ids=lambda d: "x".join(d))
@pytest.mark.engines(2)
def test_a_rank_without_rows_takes_part_in_every_edit(session, tiny, layout):
    """One row over two ranks: the other runs a copy, which must not count."""
    session.load(tiny("llama"), **layout)
    define(session)
    row = [[5, 6, 7, 8, 9, 10, 11]]
    with fk.local() as here:
        here.load(tiny("llama"))
        define(here)
        for case in CASES:
            for one in (here, session):
                one.hook(case.module, name="edited", **case.how)
            want, got = here.run(row).logits.tensor(), session.run(row).logits.tensor()
            torch.testing.assert_close(got, want, atol=TOLERANCE, rtol=0, msg=case.name)


@pytest.mark.parametrize(
    "edit", [{"edit": "add", "value": 1.0}, {"edit": "project_out", "value": VECTOR}], ids=str
)
@pytest.mark.engines(2)
def test_an_edit_of_a_partial_sum_is_refused(session, tiny, edit):
    """Each rank would edit its addend: added up, that is another edit than the one asked for."""
    folder = str(tiny("llama_untied"))
    whole_model = functools.partial(on_engines.whole_reduced, folder)
    session.load(functools.partial(on_engines.partial_sums, folder), tp=2, reference=whole_model)
    before = session.run(ROWS).logits.tensor()
    session.hook("model.layers.1.mlp.inner", **edit)
    with pytest.raises(fk.errors.PlacementError, match="partial sum"):
        session.run(ROWS)
    session.unhook()
    assert torch.equal(session.run(ROWS).logits.tensor()[MASK], before[MASK])


@pytest.mark.engines(2)
def test_an_edit_runs_once_and_keeps_what_it_saves(session, tiny):
    session.load(tiny("llama"), tp=2)

    @session.edit("count")
    def count(x, ctx):
        ctx.save["calls"] = ctx.save.get("calls", 0) + 1
        ctx.save["seen"] = (
            ctx.module,
            tuple(x.shape),
            tuple(ctx.tokens.shape),
            int(ctx.mask.sum()),
        )
        return x

    session.hook("model.layers.1.mlp.gate_proj", edit="count")
    before = session.run(ROWS)
    session.run(ROWS)
    saved = session.hooks.saved("count")
    assert saved == {"calls": 2, "seen": ("model.layers.1.mlp.gate_proj", (3, 7, 176), (3, 7), 18)}
    assert before["model.layers.1.mlp.gate_proj"].shape == (3, 7, 176)


@pytest.mark.engines(2)
def test_edits_on_one_module_are_made_in_the_order_of_registration(session, tiny):
    session.load(tiny("llama"), tp=2)
    name = "model.layers.1.mlp"
    session.hook(name, name="plain")
    x = session.run(ROWS)[name].tensor()
    session.unhook()
    session.hook(name, edit="add", value=1.0, name="a")
    session.hook(name, edit="scale", value=2.0, name="b")
    session.hook(name, name="after")
    run = session.run(ROWS)
    got = next(c for c in run if c.key.hook == "after").tensor()
    torch.testing.assert_close(got, (x + 1) * 2)
    session.hook(name, edit="add", value=3.0, name="a")  # again, in its own place: still before b
    got = next(c for c in session.run(ROWS) if c.key.hook == "after").tensor()
    torch.testing.assert_close(got, (x + 3) * 2)


BAD = {
    "raises": (
        lambda x, ctx: 1 / 0,
        r"edit 'bad' at model\.layers\.1\.mlp.* raised ZeroDivisionError",
    ),
    "shape": (lambda x, ctx: x[:, :1], r"returned \(3, 1, \d+\).*x is \(3, 7, \d+\)"),
    "dtype": (lambda x, ctx: x.double(), r"returned .* torch.float64"),
    "none": (lambda x, ctx: None, "returned NoneType; it has to return a tensor"),
    "tuple": (lambda x, ctx: (x,), "returned tuple"),
    "exits": (lambda x, ctx: exit(3), "raised SystemExit"),
}


@pytest.mark.parametrize("module", ["model.layers.1.mlp", "model.layers.1.mlp.gate_proj"])
@pytest.mark.parametrize("what", BAD)
@pytest.mark.parametrize("layout", [{"tp": 2}, {"pp": 2}, {"fsdp": 2}], ids=lambda d: "x".join(d))
@pytest.mark.engines(2)
def test_a_bad_edit_is_one_error_and_the_next_run_is_right(session, tiny, layout, what, module):
    if not session.has_model or str(session.loaded.info.layout) != str(fk.wire.Layout(**layout)):
        session.load(tiny("llama"), **layout)
    before = session.run(ROWS).logits.tensor()
    function, message = BAD[what]
    session.edit("bad")(function)
    session.hook(module, edit="bad")
    with pytest.raises(fk.errors.EditError, match=message) as caught:
        session.run(ROWS)
    assert "rank" in str(caught.value) and caught.value.rank is not None
    session.unhook()
    assert torch.equal(session.run(ROWS).logits.tensor()[MASK], before[MASK])


def test_what_an_edit_cannot_have_is_said_before_any_run(session, tiny):
    session.load(tiny("llama"))
    for how, message in [
        ({"edit": "zreo"}, "no edit is called 'zreo'; nearest: zero"),
        ({"edit": "scale"}, "takes number"),
        ({"edit": "zero", "value": 2}, "takes nothing"),
        ({"edit": "clamp", "value": 1}, "takes two numbers"),
        ({"edit": "patch", "value": 3.0}, "takes capture"),
        ({"value": 2.0}, "belongs to an edit"),
        ({"heads": [1]}, "belongs to an edit"),
        ({"capture": "none"}, "belongs to an edit"),
        ({"edit": "zero", "capture": "sometimes"}, "is not one of"),
    ]:
        with pytest.raises(fk.errors.HookError, match=message):
            session.hook("model.layers.1.mlp", **how)
    with pytest.raises(fk.errors.HookError, match="is a preset"):
        session.edit("zero")(lambda x, ctx: x)
    with pytest.raises(fk.errors.HookError, match="per='often'"):
        session.edit("mine", per="often")
        session.edit("mine", per="often")(lambda x, ctx: x)
    assert len(session.hooks) == 0


# --- magics ---------------------------------------------------------------------------


@pytest.fixture
def shell(session, tiny):
    """A real IPython shell with the magics, over the session."""
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell()
    shell.run_line_magic("load_ext", "flexkernel")
    session.load(tiny("llama"))
    shell.user_ns |= {"session": session, "torch": torch}
    yield shell
    InteractiveShell.clear_instance()


def test_an_edit_is_written_in_a_cell_and_used_by_its_name(shell, session):
    session.hook("model.layers.1.mlp", name="plain")
    plain = session.run(ROWS)["model.layers.1.mlp"].tensor()
    shell.user_ns["steering"] = VECTOR
    shell.run_cell_magic("flex_edit", "push --per whole", "shift = 2 * x\nshift + steering\n")
    shell.run_line_magic("flex_hook", "model.layers.1.mlp --edit push --name edited")
    got = next(c for c in session.run(ROWS) if c.key.hook == "edited").tensor()
    torch.testing.assert_close(got, 2 * plain + VECTOR)


def test_a_preset_takes_what_follows_the_colon_as_python(shell, session):
    session.hook("model.layers.1.mlp", name="plain")
    run = session.run(ROWS)
    plain = run["model.layers.1.mlp"].tensor()
    shell.user_ns |= {"v": VECTOR, "run": run}
    for text, truth in [
        ("scale:2", 2 * plain),
        ("add:v", plain + VECTOR),
        ("add:v*2", plain + 2 * VECTOR),
        ("clamp:-0.1,0.1", plain.clamp(-0.1, 0.1)),
        ("zero --positions -1", at_last(plain)),
        ("'patch:run[\"model.layers.1.mlp\"]'", plain),
    ]:
        hooked = shell.run_line_magic(
            "flex_hook", f"model.layers.1.mlp --edit {text} --name edited"
        )
        assert hooked.spec.edit == text.strip("'").partition(":")[0].split()[0]
        got = next(c for c in session.run(ROWS) if c.key.hook == "edited").tensor()
        torch.testing.assert_close(got, truth)


def test_an_error_in_an_edit_names_the_users_line(shell, session):
    shell.run_cell_magic("flex_edit", "broken", "y = x * 2\nz = undefined_thing\ny\n")
    shell.run_line_magic("flex_hook", "model.layers.1.mlp --edit broken")
    with pytest.raises(fk.errors.EditError, match=r"NameError.*undefined_thing"):
        session.run(ROWS)


# --- the real model -------------------------------------------------------------------

PROMPTS = ("The capital of France is", "The capital of Italy is")


def next_token(logits: torch.Tensor) -> torch.Tensor:
    return logits[:, -1].float().softmax(-1)


def unsharded_edits(
    folder, prompts: tuple[str, str], steering: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The next-token distributions of the unsharded model under four edits, by plain torch
    hooks."""
    from transformers import AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), reference.load(folder)
    ids, other = (torch.tensor([tokenizer(text)["input_ids"]]) for text in prompts)
    layers = model.model.layers

    def forward(ids, module=None, hook=None, pre=False):
        register = (
            (module.register_forward_pre_hook if pre else module.register_forward_hook)
            if module
            else None
        )
        handle = register(hook) if register else None
        with torch.no_grad():
            out = next_token(model(ids, use_cache=False).logits)
        if handle is not None:
            handle.remove()
        return out

    kept = []
    forward(other, layers[20], lambda _m, _a, out: kept.append(out.clone()) or None)
    return {
        "none": forward(ids),
        "mean": forward(
            ids, layers[10].mlp, lambda _m, _a, out: out.mean(1, keepdim=True).expand_as(out)
        ),
        "add": forward(ids, layers[12], lambda _m, _a, out: out + steering),
        "head": forward(
            ids,
            layers[5].self_attn.o_proj,
            lambda _m, args: (args[0].index_fill(-1, torch.arange(128, 192), 0.0),),
            pre=True,
        ),
        "patch": forward(ids, layers[20], lambda _m, _a, _out: kept[0]),
    }


@pytest.mark.long("fsdp2")
@pytest.mark.slow
@pytest.mark.parametrize("layout", layouts.REAL)
def test_edits_of_the_real_model_give_the_unsharded_next_token(
    session, smollm2, layout, record_property
):
    steering = torch.randn(576, generator=torch.Generator().manual_seed(0)) * 2
    truth = unsharded_edits(smollm2, PROMPTS, steering)
    session.load(smollm2, **layout)
    session.hook("model.layers.20", name="residual")
    other = session.run(PROMPTS[1])
    session.unhook()
    got = {"none": next_token(session.run(PROMPTS[0]).logits.tensor())}
    for what, module, how in [
        ("mean", "model.layers.10.mlp", {"edit": "mean"}),
        ("add", "model.layers.12", {"edit": "add", "value": steering}),
        ("head", "model.layers.5.self_attn.@z", {"edit": "zero", "heads": [2]}),
        ("patch", "model.layers.20", {"edit": "patch", "value": other["model.layers.20"]}),
    ]:
        session.hook(module, name="edited", **how)
        got[what] = next_token(session.run(PROMPTS[0]).logits.tensor())
        session.unhook("edited")
    for what, want in truth.items():
        moved = (want - truth["none"]).abs().max().item()
        error = (got[what] - want).abs().max().item()
        record_property(what, f"moves {moved:.1e}, error {error:.1e}")
        print(f"{what}: moves {moved:.1e}, error {error:.1e}")
        assert error < 1e-4, what
        assert what == "none" or moved > 1e-3, f"{what} has to do something"
