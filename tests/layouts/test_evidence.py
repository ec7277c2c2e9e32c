"""Each kind of evidence for a placement occurs on real engines, and decides: without it there is
no value."""

from __future__ import annotations

import functools
import os

import pytest
import torch

import flexkernel as fk
from tests.support import on_engines, unsharded

IDS = [[5, 6, 7, 8, 9, 10]]


def close(capture, whole: torch.Tensor) -> None:
    torch.testing.assert_close(capture.tensor(), whole, atol=1e-5, rtol=1e-5)


@pytest.mark.engines(2)
def test_the_plan_decides(session, tiny):
    session.load(tiny("llama"), tp=2)
    session.hook("model.layers.0.mlp.gate_proj")
    capture = session.run(IDS)["model.layers.0.mlp.gate_proj"]
    assert (capture.evidence, capture.placement) == ("plan", "Shard(dim=-1)")
    assert capture.shards == [(2, [88, 176], ["rank 0", "rank 1"])]
    close(
        capture,
        unsharded.activations(tiny("llama"), IDS).outputs["model.layers.0.mlp.gate_proj", 0, ""],
    )


@pytest.mark.engines(2)
def test_a_plan_that_the_scan_contradicts_is_refused(session, tiny):
    """A wrong plan is not believed: the value is refused, not handed over in the wrong shape."""
    session.load(tiny("llama"), tp=2)

    def lie():
        on_engines.runtime().part.placer.styles["model.layers.0.mlp"] = "colwise"

    session.on_ranks(lie)
    session.hook("model.layers.0.mlp")
    run = session.run(IDS)
    with pytest.raises(
        fk.errors.PlacementError,
        match=r"plan says .* should hold \(1, 6, 32\); it holds \(1, 6, 64\)",
    ):
        run["model.layers.0.mlp"].tensor()


@pytest.mark.engines(2)
def test_the_scan_decides_where_no_plan_names_the_module(session, tiny):
    session.load(tiny("llama"), tp=2)
    session.hook("model.layers.0.mlp.act_fn")
    capture = session.run(IDS)["model.layers.0.mlp.act_fn"]
    assert (capture.evidence, capture.placement) == ("scan+digest", "Shard(dim=2)")
    close(
        capture,
        unsharded.activations(tiny("llama"), IDS).outputs["model.layers.0.mlp.act_fn", 0, ""],
    )


@pytest.mark.engines(2)
def test_the_digest_decides_between_copies_and_addends(session, tiny):
    """A partial sum has the whole shape: only the digests tell it from a copy, and declaring it
    mends it."""
    folder = str(tiny("llama_untied"))
    build = functools.partial(on_engines.partial_sums, folder)
    whole_model = functools.partial(on_engines.whole_reduced, folder)
    whole = unsharded.activations(folder, IDS).outputs["model.layers.1.mlp", 0, ""]
    session.load(build, tp=2, reference=whole_model)
    session.hook("model.layers.1.mlp.inner")
    session.hook("model.layers.1.mlp")
    run = session.run(IDS)
    close(run["model.layers.1.mlp"], whole)
    with pytest.raises(
        fk.errors.PlacementError, match=r"ranks 0 and 1 hold the same part .* partial sum"
    ):
        run["model.layers.1.mlp.inner"].tensor()
    session.load(
        build, tp=2, reference=whole_model, placements={"model.layers.*.mlp.inner": "partial"}
    )
    session.hook("model.layers.1.mlp.inner")
    capture = session.run(IDS)["model.layers.1.mlp.inner"]
    assert (capture.evidence, capture.placement) == ("declared", "Partial(sum)")
    close(capture, whole)
    close_slice = capture[0, -1, :7]
    torch.testing.assert_close(close_slice, whole[0, -1, :7], atol=1e-5, rtol=1e-5)


@pytest.mark.engines(2)
def test_a_dtensor_decides(session, tiny):
    """Sequence parallel norms put out DTensors, split along the sequence: what nothing but the
    value itself says."""
    folder = str(tiny("llama"))
    build = functools.partial(on_engines.parallelized, folder, sequence=True)
    session.load(build, tp=2, reference=functools.partial(on_engines.whole, folder))
    session.hook("model.layers.*.input_layernorm")
    session.hook("model.layers.*.mlp.down_proj")
    run = session.run(IDS)
    truth = unsharded.activations(folder, IDS)
    for layer in range(4):
        name = f"model.layers.{layer}.input_layernorm"
        assert (run[name].evidence, run[name].placement) == ("dtensor", "Shard(dim=1)")
        close(run[name], truth.outputs[name, 0, ""])
        name = f"model.layers.{layer}.mlp.down_proj"
        assert run[name].placement == "Shard(dim=1)"
        close(run[name], truth.outputs[name, 0, ""])


@pytest.mark.engines(2)
def test_a_builders_model_without_a_reference_has_what_its_values_say(session, tiny):
    folder = str(tiny("llama"))
    build = functools.partial(on_engines.parallelized, folder, sequence=True)
    session.load(build, tp=2, placements={"model.layers.*.mlp.up_proj": "shard:-1"})
    session.hook("model.layers.0.input_layernorm")
    session.hook("model.layers.0.mlp.up_proj")
    session.hook("model.layers.0.mlp.act_fn")
    run = session.run(IDS)
    truth = unsharded.activations(folder, IDS)
    for name, kind in (("input_layernorm", "dtensor"), ("mlp.up_proj", "declared")):
        capture = run[f"model.layers.0.{name}"]
        assert capture.evidence == kind
        close(capture, truth.outputs[f"model.layers.0.{name}", 0, ""])
    with pytest.raises(fk.errors.PlacementError, match="cannot be put together"):
        run["model.layers.0.mlp.act_fn"].tensor()


@pytest.mark.engines(2)
def test_a_known_parallel_layer_decides(session, tiny):
    """fairscale's layers say by class and flags what they put out: no reference, no declaration is
    needed."""
    if os.environ.get("CI") != "true":
        pytest.importorskip(
            "fairscale", reason="pip install --no-build-isolation --no-deps fairscale"
        )
    folder = str(tiny("llama"))
    session.load(functools.partial(on_engines.fairscale_mlps, folder), tp=2)
    session.hook("model.layers.*.mlp.gate_proj")
    session.hook("model.layers.*.mlp.down_proj", at="input")
    session.hook("model.layers.*.mlp.down_proj")
    run, truth = session.run(IDS), unsharded.activations(folder, IDS)
    for layer in range(4):
        gate, down = (f"model.layers.{layer}.mlp.{name}_proj" for name in ("gate", "down"))
        assert (run[gate].evidence, run[gate].placement) == ("class", "Shard(dim=-1)")
        close(run[gate], truth.outputs[gate, 0, ""])
        assert run[down, "input"].evidence == "class"
        close(run[down, "input"], truth.inputs[down, 0, "0"])
        assert run[down, "output"].placement == "Replicate()"
        close(run[down, "output"], truth.outputs[down, 0, ""])


@pytest.mark.parametrize("wrong", ["shard:0", "replicate"])
@pytest.mark.engines(2)
def test_a_wrong_declaration_is_refused(session, tiny, wrong):
    session.load(tiny("llama"), tp=2, placements={"model.layers.*.mlp.act_fn": wrong})
    session.hook("model.layers.0.mlp.act_fn")
    with pytest.raises(fk.errors.PlacementError, match="declared says"):
        session.run(IDS)["model.layers.0.mlp.act_fn"].tensor()


@pytest.mark.engines(2)
def test_a_read_that_fails_leaves_the_forward_and_the_other_captures_alone(session, tiny):
    session.load(tiny("llama"), tp=2, placements={"model.layers.1.mlp": "shard:0"})
    before = session.run(IDS).logits.tensor()
    session.hook("model.layers.*.mlp")
    run = session.run(IDS)
    assert torch.equal(run.logits.tensor(), before)
    assert isinstance(run["model.layers.1.mlp"].error, fk.errors.PlacementError)
    assert run["model.layers.2.mlp"].error is None
    assert "PlacementError" in repr(run)
