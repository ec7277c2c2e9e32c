"""What a new hook means beside those there are: replaced and said so, or made together."""

from __future__ import annotations

import pytest

from flexkernel.session.placing import placing
from flexkernel.wire import HookSet, HookSpec

Z = "model.layers.3.self_attn.@z"
ZERO_3 = HookSpec(Z, edit="zero", heads=(3,))
ZERO_5 = HookSpec(Z, edit="zero", heads=(5,))


def hooked(*specs: HookSpec, replace: bool = False) -> HookSet:
    hooks = HookSet()
    for spec in specs:
        hooks = placing(spec, hooks.hooks, replace).put(hooks)
    return hooks


def made(hooks: HookSet) -> list[tuple]:
    return [(hook.edit, hook.value, hook.heads) for hook in hooks.hooks]


def test_edits_of_other_parts_add_up():
    hooks = hooked(ZERO_3, ZERO_5)
    assert made(hooks) == [("zero", None, (3,)), ("zero", None, (5,))]
    assert [hook.key for hook in hooks.hooks] == [Z, f"{Z} zero heads 5"]


def test_a_cell_that_runs_again_makes_its_edit_once():
    hooks = hooked(ZERO_3, ZERO_5)
    for spec in (ZERO_3, ZERO_5, ZERO_5, ZERO_3):
        place = placing(spec, hooks.hooks, False)
        assert len(place.replaces) == len(place.beside) == 1
        assert place.put(hooks) == hooks


def test_the_same_edit_with_another_value_is_one_edit():
    one, two = (HookSpec("m", edit="scale", value=value) for value in (1.0, 2.0))
    assert made(hooked(one, two)) == [("scale", 2.0, None)]
    assert placing(two, hooked(one).hooks, False).replaces == (one,)


def test_other_edits_add_up():
    scale = HookSpec("m", edit="scale", value=2.0)
    noise = HookSpec("m", edit="noise", value=0.1)
    assert made(hooked(scale, noise, scale, noise)) == [
        ("scale", 2.0, None),
        ("noise", 0.1, None),
    ]


def test_replace_leaves_only_the_new_one():
    assert made(hooked(ZERO_3, ZERO_5, replace=True)) == [("zero", None, (5,))]
    place = placing(HookSpec(Z, edit="mean"), hooked(ZERO_3, ZERO_5).hooks, True)
    assert len(place.replaces) == 2 and made(place.put(hooked(ZERO_3, ZERO_5))) == [
        ("mean", None, None)
    ]


@pytest.mark.parametrize(("first", "then"), [(HookSpec(Z), ZERO_3), (ZERO_3, HookSpec(Z))])
def test_a_capture_and_an_edit_replace_each_other_and_say_so(first, then):
    assert placing(then, hooked(first).hooks, False).replaces == (first,)
    assert hooked(first, then).hooks == (then,)


def test_a_name_is_an_identity_of_its_own():
    mine = HookSpec(Z, edit="zero", heads=(5,), name="mine")
    assert [hook.key for hook in hooked(ZERO_3, mine, ZERO_5).hooks] == [
        Z,
        "mine",
        f"{Z} zero heads 5",
    ]
    assert placing(mine, hooked(mine).hooks, False).replaces == (mine,)


def test_other_values_have_nothing_to_do_with_it():
    other = HookSpec(Z, at="grad_output", edit="zero", heads=(3,))
    assert len(hooked(ZERO_3, other).hooks) == 2
