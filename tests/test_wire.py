"""What crosses a process: equal everywhere, plain, and counted right."""

from __future__ import annotations

import dataclasses
import os
import pickle
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexkernel.wire import (
    AXES,
    CaptureKey,
    Coordinate,
    HookSet,
    HookSpec,
    Layout,
    ModelInfo,
    ModuleInfo,
    ShapeFormula,
)

A = HookSpec("model.*.mlp", groups=("early", "mlps"))
B = HookSpec("model.*.attn", at="input", groups=("early",))
C = HookSpec("lm_head", name="head")
THREE = HookSet().put(A).put(B).put(C)


def keys(hooks) -> list[str]:
    return [hook.key for hook in hooks]


# --- hook sets ------------------------------------------------------------------------


def test_a_hook_is_its_name_or_where_it_is():
    assert A.key == "model.*.mlp"
    assert B.key == "model.*.attn input"
    assert C.key == "head"
    assert HookSpec("").key == "(root)"
    assert HookSpec("m", index="0.1").key == "m [0.1]"
    assert HookSpec("m", index="").key != HookSpec("m").key  # the value itself, not its first leaf


def test_putting_a_hook_again_keeps_its_turn_and_the_count():
    again = THREE.put(dataclasses.replace(A, groups=("late",)))
    assert keys(again.hooks) == keys(THREE.hooks)
    assert again.hooks[0].groups == ("late",)
    assert THREE.put(A) == THREE


def test_without_takes_only_those_named():
    assert keys(THREE.without([A.key, "nobody"]).hooks) == [B.key, C.key]
    assert THREE.without([]) == THREE


def test_groups_list_their_hooks_in_order():
    assert THREE.groups == {"early": [A.key, B.key], "mlps": [A.key]}


def test_a_hook_that_names_a_group_twice_is_in_it_once():
    assert HookSet().put(HookSpec("m", groups=("g", "g"))).groups == {"g": ["m"]}


def test_all_hooks_are_active_until_a_group_is_off():
    assert keys(THREE.active()) == keys(THREE.hooks)
    assert keys(dataclasses.replace(THREE, off=frozenset({"mlps"})).active()) == [B.key, C.key]


def test_a_run_can_name_groups_or_all_but_those():
    assert keys(THREE.active(["mlps"])) == [A.key]
    assert keys(THREE.active(["mlps"], complement=True)) == [B.key, C.key]
    assert keys(THREE.active(["mlps", "early"])) == [A.key, B.key]


def test_a_group_asked_for_by_name_fires_although_it_is_off():
    off = dataclasses.replace(THREE, off=frozenset({"mlps"}))
    assert keys(off.active(["mlps"])) == [A.key]


def test_a_group_whose_last_hook_went_is_not_off_any_more():
    """Or the next hook of that group would be silent for a reason that nobody sees."""
    off = dataclasses.replace(THREE, off=frozenset({"mlps"})).without([A.key])
    assert A in off.put(A).active()


def test_digests_tell_hook_sets_apart():
    different = [
        HookSet(),
        THREE,
        HookSet().put(B).put(A).put(C),  # edits run in this order
        dataclasses.replace(THREE, off=frozenset({"early"})),
        dataclasses.replace(THREE, off=frozenset({"early", "mlps"})),
        HookSet().put(HookSpec("a", positions=(1,))),
        HookSet().put(HookSpec("a", positions=(-1,))),
    ]
    assert len({each.digest for each in different}) == len(different)
    assert all(0 <= each.digest < 2**63 for each in different)  # it travels as an int64


def test_a_digest_is_the_same_in_every_process():
    hooks = dataclasses.replace(THREE, off=frozenset({"a", "b", "c", "early", "mlps"}))
    code = "import pickle, sys; print(pickle.load(sys.stdin.buffer).digest)"
    found = {hooks.digest}
    for seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": seed}
        run = subprocess.run(
            [sys.executable, "-c", code], input=pickle.dumps(hooks), env=env, stdout=subprocess.PIPE
        )
        found.add(int(run.stdout))
    assert found == {hooks.digest}


# --- layouts --------------------------------------------------------------------------

degrees = st.integers(1, 3)
layouts = st.builds(Layout, degrees, degrees, degrees, degrees)


@given(layouts)
def test_ranks_and_coordinates_are_one_to_one(layout):
    seats = [layout.coordinate(rank) for rank in range(layout.world)]
    assert len({seat[:4] for seat in seats}) == layout.world
    assert all(0 <= getattr(seat, a) < getattr(layout, a) for seat in seats for a in AXES)
    assert seats[0] == Coordinate(0, 0, 0, 0, 0)


def test_tp_ranks_are_neighbours_and_stages_are_far():
    layout = Layout(pp=2, dp=2, fsdp=1, tp=2)
    assert [layout.coordinate(r).tp for r in range(8)] == [0, 1] * 4
    assert [layout.coordinate(r).pp for r in range(8)] == [0] * 4 + [1] * 4


def test_a_share_of_the_batch_is_counted_over_dp_and_fsdp():
    layout = Layout(dp=2, fsdp=3)
    assert [layout.coordinate(r).batch for r in range(6)] == list(
        range(6)
    ) and layout.batch_groups == 6


@pytest.mark.parametrize(
    ("layout", "text"),
    [(Layout(), "one engine"), (Layout(pp=2, tp=3), "pp=2 × tp=3"), (Layout(dp=2), "dp=2")],
)
def test_a_layout_reads_as_its_degrees(layout, text):
    assert str(layout) == text


# --- formulas -------------------------------------------------------------------------


def test_a_formula_gives_the_shape_of_any_batch():
    formula = ShapeFormula("0", ((1, "B"), (8, ""), (1, "S"), (1, "P+S")), "float32")
    assert formula.shape(3, 5) == (3, 8, 5, 5)
    assert formula.shape(3, 1, past=7) == (3, 8, 1, 8)
    assert str(formula) == "B×8×S×P+S"


def test_rows_flattened_over_the_sequence_scale_with_both():
    assert ShapeFormula("", ((1, "B*S"), (4, "")), "int64").shape(3, 5) == (15, 4)


@pytest.mark.parametrize(("past", "want"), [(0, 5), (2, 7), (7, 12), (100, 12)])
def test_a_sliding_window_bounds_what_is_kept(past, want):
    """A layer whose window is 8 keeps 7 of the past and all of the present."""
    assert ShapeFormula("", ((1, "W+S"),), "float32").shape(1, 5, past, window=8) == (want,)
    assert ShapeFormula("", ((1, "W+S"),), "float32").shape(1, 5, past, window=0) == (past + 5,)


def test_dims_are_found_by_their_term():
    formula = ShapeFormula("", ((1, "B"), (1, "S"), (2, "B"), (7, "")), "float32")
    assert (
        formula.dims_of("B") == [0, 2]
        and formula.dims_of("S", "") == [1, 3]
        and formula.dims_of("B*S") == []
    )


def test_a_shape_that_depends_on_the_data_says_so():
    formula = ShapeFormula("", None, "float32")
    assert str(formula) == "depends on the data" and formula.dims_of("B") == []
    assert str(ShapeFormula("", (), "float32")) == "scalar"


# --- models and keys ------------------------------------------------------------------


def test_names_are_modules_then_virtual_points_once():
    scan = {("", "output"): (), ("attn.@q", "output"): (), ("attn", "input"): ()}
    modules = (ModuleInfo("", "M", 1), ModuleInfo("attn", "A", 1))
    info = ModelInfo("p", "M", Layout(), "float32", "sdpa", modules, scan, 1, (1,), (4,), 10, 10)
    assert info.names == ["", "attn", "attn.@q"]
    assert pickle.loads(pickle.dumps(info)) == info


def test_keys_of_different_values_read_differently():
    found = [
        CaptureKey("h", "m", at, index, call)
        for at in ("output", "input")
        for index in "01"
        for call in (0, 1)
    ]
    assert len({str(key) for key in found}) == len(found)
    assert str(CaptureKey("h", "")) == "(root)"


@pytest.mark.parametrize(
    ("dims", "shape"),
    [
        (((1, "B"), (1, "S"), (8, "")), (2, 3, 1)),
        (((1, "S"), (1, "B"), (8, "")), (3, 2, 1)),
        (((1, "B"), (4, ""), (1, "S"), (1, "P+S")), (2, 1, 3, 1)),
        (((1, "B*S"), (8, "")), (6, 1)),
        (((1, ""), (1, "S"), (8, "")), (1, 3, 1)),
    ],
)
def test_a_mask_broadcasts_over_a_value_wherever_rows_and_positions_lie(dims, shape):
    mask = torch.tensor([[False, True, True], [False, False, True]])
    formula = ShapeFormula("", dims, "float32")
    real = formula.broadcast(mask)
    assert real.shape == shape
    if formula.rows is None and formula.folded is None:
        mask = mask.any(0)
    elif formula.rows == 1:
        mask = mask.T
    assert torch.equal(real.flatten(), mask.flatten())


def test_a_value_without_positions_has_no_mask():
    assert ShapeFormula("", ((1, "B"), (8, "")), "float32").broadcast(torch.ones(2, 3)) is None
