"""The driver's view of hooks: what may be asked for, what the tables show, what groups do."""

from __future__ import annotations

import pytest

from flexkernel.errors import HookError
from flexkernel.session.groups import regrouped
from flexkernel.session.hooks import Hook, HookTable, some
from flexkernel.session.spec import indices, spec_of
from flexkernel.wire import HookSet, HookSpec

MLP, ATTN, HEAD = (
    HookSpec("model.layers.*.mlp", groups=("early",)),
    HookSpec("model.layers.*.self_attn", at="input", groups=("early", "attn")),
    HookSpec("lm_head", name="head"),
)
THREE = HookSet().put(MLP).put(ATTN).put(HEAD)


def asked(glob="m", at="output", index=None, groups=(), positions=None, name="") -> HookSpec:
    return spec_of(glob, at, index, groups, positions, name)


# --- what may be asked for ------------------------------------------------------------


def test_a_hook_is_kept_as_asked():
    assert asked("m.*", "input", 1, ["a", "b", "a"], [0, -1], "n") == HookSpec(
        "m.*", "input", "1", "n", ("a", "b"), (0, -1)
    )
    assert asked(groups="one") == asked(groups=["one"])


@pytest.mark.parametrize(
    ("positions", "want"),
    [(None, None), (-1, (-1,)), (0, (0,)), ([2, 0], (2, 0)), (range(2), (0, 1))],
)
def test_positions_are_one_or_several_whole_numbers(positions, want):
    assert indices(positions, "positions") == want


@pytest.mark.parametrize("positions", [[], (), "0", 1.5, [0.5], ["a"], [None], {}])
def test_other_positions_are_refused(positions):
    with pytest.raises(HookError, match="are no positions; they are whole numbers, -1 is the last"):
        indices(positions, "positions")


@pytest.mark.parametrize("at", ["outputs", "", "grad", None])
def test_an_unknown_side_is_refused(at):
    with pytest.raises(HookError, match=f"at={at!r} is not one of output, input, grad_output"):
        asked(at=at)


def test_a_point_inside_attention_has_no_input():
    with pytest.raises(HookError, match=r"'\*\*\.@q' is a point inside attention, it has no input"):
        asked("**.@q", at="input")
    assert asked("**.@q").glob == "**.@q"


@pytest.mark.parametrize("where", [{"name": "logits"}, {"glob": "logits"}])
def test_the_runs_own_hook_cannot_be_taken(where):
    with pytest.raises(HookError, match="'logits' is taken"):
        asked(**where)
    assert asked("logits", name="mine").key == "mine"


# --- tables ---------------------------------------------------------------------------


def test_a_hook_tells_where_it_is_and_what_never_fires():
    names = tuple(f"model.layers.{i}.mlp" for i in range(9))
    text = repr(Hook(MLP, names, silent=("model.layers",)))
    assert text == (
        "Hook 'model.layers.*.mlp' on 9 modules: model.layers.0.mlp, model.layers.1.mlp, ..., "
        "model.layers.8.mlp; "
        "groups early; 1 of them never fire in a forward: model.layers"
    )
    assert repr(Hook(HookSpec(""), ("",))) == "Hook '(root)' on 1 module: (root)"


@pytest.mark.parametrize(
    ("count", "want"), [(0, ""), (1, "m0"), (3, "m0, m1, m2"), (5, "m0, m1, ..., m4")]
)
def test_some_names_stand_for_many(count, want):
    assert some([f"m{i}" for i in range(count)]) == want


def test_the_table_lists_hooks_in_order_with_groups_that_are_off():
    off = regrouped(THREE, "off", "attn", None)
    table = HookTable(off, lambda hook: (hook.glob.replace("*", "0"),))
    assert [row[0] for row in table.rows()] == [MLP.key, ATTN.key, "head"]
    assert table.rows()[1] == (
        ATTN.key,
        "model.layers.0.self_attn",
        "1",
        "input",
        "",
        "",
        "",
        "early, attn (off)",
    )
    assert repr(table).splitlines()[0].split() == [
        "hook",
        "modules",
        "n",
        "at",
        "edit",
        "value",
        "on",
        "groups",
    ]


def test_an_empty_table_says_so():
    table = HookTable(HookSet(), lambda hook: ())
    assert repr(table) == "no hooks" and "no hooks" in table._repr_html_()


def test_names_and_groups_are_text_in_html():
    evil = HookSpec("<script>", name="<img src=x>", groups=("<b>",))
    page = HookTable(HookSet().put(evil), lambda hook: (hook.glob,))._repr_html_()
    assert (
        "<script" not in page and "<img" not in page and "<b>" not in page and "&lt;b&gt;" in page
    )


# --- groups ---------------------------------------------------------------------------


def keys(hook_set: HookSet) -> list[str]:
    return [hook.key for hook in hook_set.active()]


def test_a_group_goes_off_and_on():
    off = regrouped(THREE, "off", "early", None)
    assert keys(off) == ["head"]
    assert regrouped(off, "off", "early", None) == off
    assert regrouped(off, "on", "early", None) == THREE


def test_a_hook_in_two_groups_is_off_while_either_is():
    off = regrouped(regrouped(THREE, "off", "early", None), "off", "attn", None)
    assert keys(regrouped(off, "on", "early", None)) == [MLP.key, "head"]


def test_a_group_is_made_by_adding_to_it():
    added = regrouped(THREE, "add", "new", "head")
    assert added.groups["new"] == ["head"]
    assert regrouped(added, "add", "new", "head") == added


@pytest.mark.parametrize("means", [MLP.key, "model.layers.*.mlp", "model.**"])
def test_hooks_are_meant_by_key_by_glob_or_by_a_wider_glob(means):
    assert MLP.key in regrouped(THREE, "add", "new", means).groups["new"]


def test_taking_hooks_out_leaves_the_hooks():
    out = regrouped(THREE, "remove", "early", ATTN.key)
    assert out.groups == {"early": [MLP.key], "attn": [ATTN.key]} and len(out.hooks) == 3


def test_removing_a_group_leaves_its_hooks_and_they_fire():
    gone = regrouped(regrouped(THREE, "off", "early", None), "remove", "early", None)
    assert (
        gone.groups == {"attn": [ATTN.key]}
        and keys(gone) == keys(THREE)
        and gone.off == frozenset()
    )


def test_listing_changes_nothing():
    assert regrouped(THREE, "list", "", None) == THREE


@pytest.mark.parametrize(
    ("action", "group", "glob", "says"),
    [
        ("enable", "early", None, "not 'enable'"),
        ("off", "", None, r"which group\?.*\['early', 'attn'\]"),
        ("off", "eraly", None, "there is no group 'eraly'; there are early"),
        ("on", "none", None, "there is no group 'none'"),
        ("remove", "none", None, "there is no group 'none'"),
        ("add", "new", None, r"which hooks\?"),
        (
            "add",
            "new",
            "model.layers.0.nothing",
            r"no hook is meant by 'model\.layers\.0\.nothing'; there are",
        ),
        ("remove", "early", "nothing", "no hook is meant by 'nothing'"),
    ],
)
def test_a_group_operation_that_means_nothing_is_refused(action, group, glob, says):
    with pytest.raises(HookError, match=says):
        regrouped(THREE, action, group, glob)


def test_without_hooks_the_refusals_still_read_well():
    with pytest.raises(HookError, match="there are none"):
        regrouped(HookSet(), "off", "", None)
    with pytest.raises(HookError, match=r"there is no group 'g'$"):
        regrouped(HookSet(), "off", "g", None)
