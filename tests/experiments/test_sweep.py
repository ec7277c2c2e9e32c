"""Sweep: each cell is what a plain hook does to the unsharded model, and an interrupted one goes
on."""

from __future__ import annotations

import html
import math

import numpy as np
import pytest
import torch

import flexkernel as fk
from tests.support import models

CLEAN, OTHER = [[5, 6, 7, 8, 9, 10]], [[5, 99, 7, 120, 9, 10]]
LAYERS = [f"model.layers.{i}" for i in range(4)]
LAYOUTS = [
    pytest.param({}, id="one"),
    pytest.param({"tp": 2}, id="tp", marks=pytest.mark.engines(2)),
]
LAYOUTS += [pytest.param({"pp": 2}, id="pp", marks=pytest.mark.engines(2))]


def metric(run) -> torch.Tensor:
    return run.logits[0, -1, 3] - run.logits[0, -1, 77]


def patched_by_hand() -> tuple[float, np.ndarray]:
    """(baseline, values) of the unsharded model, the residual after each layer patched by plain
    hooks."""
    model = models.build("llama")
    clean, other = torch.tensor(CLEAN), torch.tensor(OTHER)
    said = lambda out: (out.logits[0, -1, 3] - out.logits[0, -1, 77]).item()  # noqa: E731
    values = np.empty((4, 6))
    with torch.no_grad():
        kept = {}
        for i, layer in enumerate(model.model.layers):
            handle = layer.register_forward_hook(
                lambda _m, _a, out, i=i: kept.__setitem__(i, out.clone())
            )
            model(other)
            handle.remove()
        for i, layer in enumerate(model.model.layers):
            for position in range(6):

                def patch(_module, _args, out, i=i, position=position):
                    out = out.clone()
                    out[:, position] = kept[i][:, position]
                    return out

                handle = layer.register_forward_hook(patch)
                values[i, position] = said(model(clean))
                handle.remove()
        return said(model(clean)), values


@pytest.mark.parametrize("layout", LAYOUTS)
def test_residual_patching_equals_plain_hooks_on_the_unsharded_model(session, tiny, layout):
    session.load(tiny("llama"), **layout)
    session.hook("model.layers.*")
    source = session.run(OTHER)
    hooks = session.hooks.hook_set
    told = []
    swept = session.sweep(
        CLEAN,
        "model.layers.*",
        metric=metric,
        edit="patch",
        value=source,
        progress=lambda stage, done, total: told.append((done, total)),
    )
    baseline, truth = patched_by_hand()
    assert np.abs(truth - baseline).max() > 1e-2, "patching does something"
    np.testing.assert_allclose(swept.values, truth, atol=2e-5)
    assert swept.baseline == pytest.approx(baseline, abs=2e-5)
    assert swept.modules == tuple(LAYERS) and swept.positions == tuple(range(6)) and swept.left == 0
    assert told[0] == (0, 24) and told[-1] == (23, 24)
    assert session.hooks.hook_set == hooks and [run.number for run in session.runs] == [
        source.number
    ]


def test_any_edit_at_some_positions_of_a_padded_batch(session, tiny):
    """Positions are the batch's columns; a module that never fires is left out."""
    session.load(tiny("llama"))
    rows = [[5, 6, 7, 8], [9, 10]]
    swept = session.sweep(
        rows,
        ["model.layers.1.mlp", "model.layers"],
        [0, -1],
        metric=lambda r: r.logits.norm(),
        edit="zero",
    )
    assert swept.modules == ("model.layers.1.mlp",) and swept.labels == ["0", "-1"]
    session.hook("model.layers.1.mlp", edit="zero", positions=[-1])
    assert swept.values[0, 1] == pytest.approx(session.run(rows).logits.norm().item())
    assert swept.values[0, 1] != pytest.approx(swept.baseline)


def test_an_interrupted_sweep_has_what_was_done_and_goes_on(session, tiny, capsys):
    session.load(tiny("llama"))
    calls = []

    def stops(run):
        calls.append(run)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return metric(run)

    swept = session.sweep(
        CLEAN, "model.layers.*.mlp", [1, 2], metric=stops, edit="scale", value=3.0
    )
    assert (
        swept.left == 4
        and np.isnan(swept.values).sum() == 4
        and not np.isnan(swept.values[:2]).any()
    )
    assert "4 left: sweep.resume()" in repr(swept) and ">–</td>" in swept._repr_html_()
    assert "4 of 8 done: sweep.resume()" in capsys.readouterr().err
    assert session.hooks.hook_set.hooks == () and session.runs == []
    swept.resume()
    whole = session.sweep(
        CLEAN, "model.layers.*.mlp", [1, 2], metric=metric, edit="scale", value=3.0
    )
    assert swept.left == 0 and len(calls) == 10, "nothing is done twice"
    assert np.array_equal(swept.values, whole.values) and swept.baseline == whole.baseline


def test_a_metric_may_say_nan(session, tiny):
    session.load(tiny("llama"))
    swept = session.sweep(
        CLEAN, "model.layers.0.mlp", [0], metric=lambda run: math.nan, edit="zero"
    )
    assert swept.left == 0 and np.isnan(swept.values).all()


def test_it_is_shown_with_its_modules_and_tokens(session, tiny):
    session.load(tiny("llama"))
    swept = session.sweep(CLEAN, "model.layers.*", [1, -1], metric=metric, edit="zero")
    page = html.unescape(swept._repr_html_())
    assert all(layer in page for layer in LAYERS) and "1 '6'" in page and "-1 '10'" in page
    assert "furthest from the baseline" in repr(
        swept
    ) and "Sweep of 'zero' over 4 modules × 2 positions" in repr(swept)
    view = swept.show()
    data, _ = view._repr_mimebundle_()
    assert "image/png" in data and "sweep of zero  (4, 2)" in data["text/plain"]
    assert view._grid.row_label(1) == "1 model.layers.1"
    assert [text for _, text in view._grid.col_axis((0, 2), 10).ticks] == ["1 '6'", "-1 '10'"]
    content = view._draw_still()["text/plain"]
    assert f"farthest from {swept.baseline:.3g}: " in content and "at row" in content
    assert "10'" in content and "column" not in content.partition("farthest")[2]
    view.close()


def test_its_map_is_white_where_nothing_changes(session, tiny):
    session.load(tiny("llama"))
    swept = session.sweep(CLEAN, "model.layers.*", metric=metric, edit="scale", value=1.0)
    assert np.allclose(swept.values, swept.baseline) and swept.baseline != 0
    view = swept.show()
    overview = view._overview()
    assert overview.middle == swept.baseline and overview.range(view._grid, "extreme") is not None
    lo, hi = overview.range(view._grid, "extreme")
    assert (lo + hi) / 2 == pytest.approx(swept.baseline)
    view.close()


def test_what_is_wrong_is_said_before_anything_runs(session, tiny):
    session.load(tiny("llama"))
    session.hook("model.layers.0")
    source, longer = session.run(OTHER), session.run([[1, 2, 3, 4, 5, 6, 7]])

    def never(run):
        raise AssertionError("nothing runs")

    def refused(kind, says, modules="model.layers.*", positions=None, **how):
        with pytest.raises(kind, match=says):
            session.sweep(CLEAN, modules, positions, metric=never, **how)

    refused(
        fk.errors.CaptureError,
        r"captured nothing at 'model\.layers\.1', output",
        edit="patch",
        value=source,
    )
    refused(
        fk.errors.CaptureError,
        "has 6 tokens and that of run",
        "model.layers.0",
        edit="patch",
        value=longer,
    )
    refused(
        fk.errors.HookError,
        "position 6 is outside the prompt, which has 6",
        positions=[6],
        edit="zero",
    )
    refused(fk.errors.HookError, r"no module matches 'model\.layer'", "model.layer", edit="zero")
    refused(fk.errors.HookError, "none of model.layers fires", "model.layers", edit="zero")
    assert len(session.hooks.hook_set.hooks) == 1


def test_a_bad_edit_or_metric_ends_it_and_leaves_the_hooks(session, tiny):
    session.load(tiny("llama"))
    with pytest.raises(fk.errors.HookError, match="no edit is called 'zeero'"):
        session.sweep(CLEAN, "model.layers.*", metric=metric, edit="zeero")
    with pytest.raises(fk.errors.HookError, match="returns one number; it returned Tensor"):
        session.sweep(CLEAN, "model.layers.*", metric=lambda run: run.logits.tensor(), edit="zero")
    with pytest.raises(ZeroDivisionError):
        session.sweep(CLEAN, "model.layers.*", metric=lambda run: 1 / 0, edit="zero")
    assert session.hooks.hook_set.hooks == () and session.runs == []


def test_it_does_not_go_on_with_another_model(session, tiny):
    session.load(tiny("llama"))
    swept = session.sweep(CLEAN, "model.layers.0", [0], metric=metric, edit="zero")
    session.load(tiny("llama"))
    with pytest.raises(fk.errors.HookError, match="another model has been loaded"):
        swept.resume()
