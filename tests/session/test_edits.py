"""Edits from a session: functions, for a block, added up, refused; and seen wherever they are."""

from __future__ import annotations

import pytest
import torch

from flexkernel.errors import HookError
from flexkernel.session.edits import edit_text
from flexkernel.session.spec import spec_of

IDS = [[5, 6, 7, 8]]
MLP = "model.layers.1.mlp"
Z = "model.layers.1.self_attn.@z"


@pytest.fixture
def loaded(session, tiny):
    session.load(tiny("llama"))
    session.hooks.edits = {}
    return session


def negate(x, ctx):
    return -x


# --- a function is an edit ------------------------------------------------------------


def test_a_function_is_an_edit_of_its_name(loaded):
    loaded.hook(MLP)
    plain = loaded.run(IDS)[MLP].tensor()
    hook = loaded.hook(MLP, edit=negate)
    assert hook.spec.edit == "negate" and "negate" in loaded.hooks.edits
    assert torch.equal(loaded.run(IDS)[MLP].tensor(), -plain)


def test_two_functions_of_one_name_are_two_edits(loaded):
    loaded.hook(MLP, edit=lambda x, ctx: x * 2)
    loaded.hook("model.norm", edit=lambda x, ctx: x * 0)
    assert len(loaded.hooks.edits) == 2
    run = loaded.run(IDS)
    assert not run["model.norm"].tensor().any() and run[MLP].tensor().any()


def test_a_function_that_changes_is_the_changed_one_where_it_alone_is_used(loaded):
    for factor in (2, 0):
        loaded.hook(MLP, edit=lambda x, ctx, factor=factor: x * factor)
    assert len(loaded.hooks.edits) == 1 and len(loaded.hooks) == 1
    assert not loaded.run(IDS)[MLP].tensor().any()


def test_a_defined_edit_can_be_given_as_its_function(loaded):
    @loaded.edit("double", per="element")
    def twice(x, ctx):
        return x * 2

    assert loaded.hook(MLP, edit=twice).spec.edit == "double" and list(loaded.hooks.edits) == [
        "double"
    ]


@pytest.mark.parametrize("edit", [5, [negate], torch.ones(3), {"edit": "zero"}])
def test_what_is_no_edit_is_refused(edit, loaded):
    with pytest.raises(HookError, match="is not an edit: give a preset, the name of one"):
        loaded.hook(MLP, edit=edit)
    assert len(loaded.hooks) == 0


def test_a_function_named_like_a_preset_is_not_the_preset(loaded):
    def zero(x, ctx):
        return x + 1

    assert loaded.hook(MLP, edit=zero).spec.edit == "zero_2"
    assert loaded.run(IDS)[MLP].tensor().any()


# --- for a block ----------------------------------------------------------------------


def test_a_hook_for_a_block_is_gone_after_it(loaded):
    loaded.hook("model.norm")
    before = loaded.hooks.hook_set
    with loaded.hooked(MLP, edit="zero") as hook:
        assert hook.modules == (MLP,) and not loaded.run(IDS)[MLP].tensor().any()
    assert loaded.hooks.hook_set == before
    with pytest.raises(RuntimeError, match="mine"), loaded.hooked(MLP, edit=negate):
        raise RuntimeError("mine")
    assert loaded.hooks.hook_set == before and MLP not in loaded.run(IDS)


def test_a_hook_that_was_replaced_for_a_block_is_back(loaded):
    loaded.hook(MLP, edit="scale", value=2)
    with loaded.hooked(MLP, edit="scale", value=3):
        assert [spec.value for spec in loaded.hooks] == [3.0]
    assert [spec.value for spec in loaded.hooks] == [2.0]


def test_specs_are_hooked_for_a_block_too(loaded):
    with loaded.hooked(spec_of(MLP), spec_of("model.norm")) as hooks:
        assert [hook.key for hook in hooks] == [MLP, "model.norm"] and len(loaded.run(IDS)) == 2
    assert len(loaded.hooks) == 0


def test_a_block_within_which_another_model_is_loaded_leaves_that_as_it_is(loaded, tiny):
    with loaded.hooked(MLP):
        loaded.load(tiny("llama"))
        loaded.hook("model.norm")
    assert [spec.key for spec in loaded.hooks] == ["model.norm"]


# --- edits add up ---------------------------------------------------------------------


def test_edits_of_two_heads_are_both_made_and_it_says_so(loaded):
    loaded.hook(Z, edit="zero", heads=1)
    hook = loaded.hook(Z, edit="zero", heads=2)
    assert "together with 'zero heads 1' (--replace or replace=True replaces that)" in repr(hook)
    z = loaded.run(IDS)[Z].tensor()
    assert not z[:, :, 1:3].any() and z[:, :, 0].any()
    assert loaded.unhook(Z) == [Z, f"{Z} zero heads 2"]


def test_an_edit_in_place_of_a_capture_says_so(loaded):
    loaded.hook(MLP)
    assert "replaces a capture" in repr(loaded.hook(MLP, edit="zero"))
    assert "replaces 'zero'" in repr(loaded.hook(MLP))
    assert "replaces" not in repr(loaded.hook(MLP))


# --- refused at once ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("glob", "how", "says"),
    [
        (Z, {"heads": 8}, "has no head 8: heads are 0 to 7"),
        (Z, {"heads": [0, -9]}, "has no head -9: heads are 0 to 7"),
        ("model.layers.1.self_attn.@k", {"heads": 4}, "has no head 4: heads are 0 to 3"),
        (MLP, {"heads": 1}, "there are heads at @q, @k, @v, @pattern and @z, not at model.layers"),
        (MLP, {"neurons": 700}, "has no neuron 700: neurons are 0 to 63"),
        (MLP, {"positions": 2048}, "model has no position 2048: positions are 0 to 2047"),
    ],
)
def test_parts_that_are_not_there_are_refused_when_hooked(glob, how, says, loaded):
    with pytest.raises(HookError, match=says):
        loaded.hook(glob, edit="zero", **how)
    assert len(loaded.hooks) == 0
    loaded.run(IDS)


# --- seen wherever they are -----------------------------------------------------------


def test_an_edit_is_seen_in_the_answer_the_table_the_run_and_the_tree(loaded):
    vector = torch.ones(64)
    hook = loaded.hook(MLP, edit="add", value=vector, positions=-1)
    assert "; add (64,) norm 8 positions -1" in repr(hook)
    (row,) = loaded.hooks.table().rows()
    assert row[4:7] == ("add", "(64,) norm 8", "positions -1")
    run = loaded.run(IDS)
    assert run.edits == (f"add (64,) norm 8 positions -1 at {MLP}",)
    assert run.edits[0] in repr(run) and run.edits[0] in run._repr_html_()
    assert "add (64,) norm 8" in repr(loaded.tree(MLP))
    loaded.unhook()
    assert loaded.run(IDS).edits == () and run.edits, "a run keeps what was active"


def test_only_edits_that_are_active_are_the_runs(loaded):
    loaded.hook(MLP, edit="zero", groups="off")
    loaded.hooks.group("off", "off")
    assert loaded.run(IDS).edits == ()
    assert loaded.run(IDS, groups="off").edits == (f"zero at {MLP}",)


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ({"edit": "zero", "heads": [3, 5]}, "zero heads 3, 5"),
        ({"edit": "scale", "value": 2.0}, "scale 2"),
        ({"edit": "clamp", "value": (-1.0, 1.0)}, "clamp -1, 1"),
        ({"edit": "mine", "neurons": 7, "positions": [0, -1]}, "mine neurons 7; positions 0, -1"),
        ({}, ""),
    ],
)
def test_an_edit_in_words(how, text):
    assert edit_text(spec_of("m", **how)) == text
