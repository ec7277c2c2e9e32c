"""Verify: a right model is said to be right, and a planted fault is found where it was planted."""

from __future__ import annotations

import functools
import os
from types import SimpleNamespace

import pytest
import torch

import flexkernel as fk
from flexkernel.experiments.verify import sample
from flexkernel.wire import Layout
from tests.support import foreign, layouts, models, on_engines

IDS = [[5, 6, 7, 8, 9]]
LAYOUTS = layouts.only(layouts.ALL, "one", "tp2", "pp2", "fsdp2", "tp2xpp2")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_right_model_is_right_and_its_captures_are_verified(
    session, tiny, layout, record_property
):
    """Whatever the user's own hooks and edits do: they stay out of it, and come back."""
    session.load(tiny("llama"), **layout)
    session.hook("model.layers.1", edit="zero", name="mine")
    hooks = session.hooks.hook_set
    stages = []
    found = session.verify(progress=lambda stage, done, total: stages.append((stage, done, total)))
    record_property("verify", repr(found.worst))
    assert (
        found.ok
        and len(found) == 136
        and found.refused == {}
        and list(found.skipped) == ["model.layers"]
    )
    assert found.worst.drift < 1e-5 and (found.worst.drift > 0) == ("tp" in layout), (
        "something was compared"
    )
    assert found.rows[0].name.startswith("(root) input") and found.rows[-1].name.startswith(
        "(root) [logits]"
    )
    assert [s for s, *_ in stages][:2] == [
        "running the sharded model",
        "running the unsharded model",
    ]
    assert stages[-1] == ("compared", 136, 136)
    assert session.hooks.hook_set == hooks and session.runs == []
    session.unhook()
    session.hook("model.layers.*.mlp")
    assert {c.evidence for c in session.run(IDS)} == {"verified"}
    session.load(tiny("llama"), **layout)
    session.hook("model.layers.*.mlp")
    assert "verified" not in {c.evidence for c in session.run(IDS)}, (
        "another load has not been verified"
    )


@pytest.mark.engines(2)
def test_the_unsharded_model_one_layer_at_a_time_says_the_same(session, tiny):
    """It is taken by itself where the whole model does not fit."""
    session.load(tiny("llama_untied"), tp=2)
    whole = session.verify()

    def full():
        import flexkernel.engine.verify as engine

        engine.kept, engine.fits = engine.fits, lambda runtime, itemsize: False

    def enough():
        import flexkernel.engine.verify as engine

        engine.fits = engine.kept

    session.on_ranks(full)
    try:
        streamed = session.verify()
    finally:
        session.on_ranks(enough)
    assert streamed.streamed and not whole.streamed and streamed.ok
    assert [(r.key, r.drift) for r in streamed.rows] == [(r.key, r.drift) for r in whole.rows]
    assert "one layer at a time" in repr(streamed)


def perturb(name: str, rank: int) -> None:
    """Change one number of one rank's shard."""
    runtime = on_engines.runtime()
    if runtime.rank == rank:
        weight = runtime.part.hooks.modules[name].weight
        getattr(weight, "_local_tensor", weight)[0, 0] += 0.5


@pytest.mark.parametrize("layout", [{"tp": 2}, {"pp": 2}], ids=["tp", "pp"])
@pytest.mark.engines(2)
def test_a_changed_weight_on_one_rank_is_found_where_it_is(session, tiny, layout):
    session.load(tiny("llama"), **layout)
    name = "model.layers.2.mlp.up_proj"
    session.on_ranks(perturb, name, 1)
    found = session.verify()
    assert not found.ok and found.first.name == name, (
        "the first that differs is the module with the weight"
    )
    later = {r.key.module for r in found.diverging}
    assert {"model.layers.2.mlp", "model.layers.3", "lm_head", ""} <= later
    assert not any(n.startswith(("model.layers.0", "model.layers.1", "model.embed")) for n in later)
    assert f"DIVERGES from the unsharded model, first at {name}" in repr(found)
    assert "color:#c22" in found._repr_html_() and name in found._repr_html_()
    session.hook("model.layers.*.mlp")
    evidence = {c.key.module: c.evidence == "verified" for c in session.run(IDS)}
    assert evidence == {f"model.layers.{i}.mlp": i < 2 for i in range(4)}, (
        "what differs is not verified"
    )


@pytest.mark.engines(2)
def test_a_wrong_placement_is_found_and_nothing_else(session, tiny):
    """Copies declared to be addends: the shapes agree, every digest may differ, only the numbers
    tell."""
    session.load(tiny("llama"), tp=2, placements={"model.layers.1.mlp": "partial"})
    found = session.verify()
    assert [r.name for r in found.diverging] == [
        "model.layers.1.mlp"
    ] and found.first.drift == pytest.approx(1.0)


@pytest.mark.engines(2)
def test_what_has_no_value_is_refused_with_its_reason(session, tiny):
    session.load(tiny("mixtral"), tp=2, placements={"model.layers.2": "shard:0"})
    found = session.verify()
    assert found.ok and len(found) > 100
    assert "declared says" in found.refused["model.layers.2"]
    experts = [name for name in found.refused if "experts.act_fn" in name]
    assert len(experts) == 8 and "9 refused" in repr(found)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.engines(2)
def test_half_precision_is_measured_by_its_own_drift_from_float32(session, tiny, dtype):
    session.load(tiny("llama"), tp=2, dtype=dtype)
    found = session.verify()
    assert found.ok and 0 < found.ratio < 4 and 1e-3 < found.worst.drift < 0.5
    logits = found.rows[-1]
    assert 1e-4 < logits.yardstick < 0.1 and logits.drift > 0
    assert f"× what the unsharded model in {dtype} drifts from float32" in repr(found)
    session.on_ranks(perturb, "model.layers.2.mlp.up_proj", 0)
    assert session.verify().first.key.module == "model.layers.2.mlp.up_proj"


@pytest.mark.engines(2)
def test_globs_and_rows_of_your_own(session, tiny):
    session.load(tiny("llama"), tp=2)
    found = session.verify(IDS, ["model.layers.*.mlp", "**.@pattern"])
    modules = [
        f"model.layers.{i}.{what}"
        for i in range(4)
        for what in ("self_attn.@pattern", "mlp", "mlp")
    ]
    assert found.ok and [row.key.module for row in found.rows] == modules
    with pytest.raises(fk.errors.HookError, match=r"no module matches 'model\.layers\.\*\.mpl'"):
        session.verify(hooks="model.layers.*.mpl")
    assert session.hooks.hook_set.hooks == ()


@pytest.mark.parametrize("tp", [1, 2, 3, 8])
def test_its_own_rows_are_uneven_and_fit_what_splits_the_sequence(tp):
    rows = sample(SimpleNamespace(vocab_size=49152, layout=Layout(tp=tp)))
    lengths = [len(row) for row in rows]
    assert len(set(lengths)) == 3 and max(lengths) % tp == 0 and max(lengths) >= 9
    assert all(0 <= i < 49152 for row in rows for i in row)


# --- models that a user shards --------------------------------------------------------


def loaded_llama(folder: str) -> torch.nn.Module:
    """The unsharded model with its weights; only its shapes where the scan asks for it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if torch.empty(0).is_meta:
        return AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(folder), dtype=torch.float32
        )
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def random_llama() -> torch.nn.Module:
    """The tiny Llama's architecture with other weights."""
    model = models.build("llama")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-0.5).add_(0.01)
    return model


@pytest.mark.engines(2)
def test_a_builders_model_is_verified_against_its_reference(session, tiny):
    folder = str(tiny("llama"))
    build = functools.partial(on_engines.parallelized, folder, sequence=True)
    session.load(build, tp=2, reference=functools.partial(loaded_llama, folder))
    found = session.verify()
    assert found.ok and len(found) > 100 and not found.shapes_only
    session.on_ranks(perturb, "model.layers.2.mlp.up_proj", 1)
    assert session.verify().first.name == "model.layers.2.mlp.up_proj"


@pytest.mark.engines(2)
def test_a_model_that_takes_no_mask_is_verified_on_rows_of_one_length(session):
    """A forward(tokens) of the user's own, with rows along the second dim."""
    own = functools.partial(foreign.seeded, foreign.Own)
    session.load(own, dp=2, reference=own)
    found = session.verify()
    assert found.ok and len(found) > 40 and found.worst.drift < 1e-5
    with pytest.raises(fk.errors.PromptError, match="different lengths"):
        session.verify([[1, 2], [3]])


@pytest.mark.engines(2)
def test_a_reference_with_other_weights_verifies_shapes_only(session, tiny):
    folder = str(tiny("llama"))
    session.load(functools.partial(on_engines.parallelized, folder), tp=2, reference=random_llama)
    found = session.verify()
    assert found.shapes_only and not found.ok and found.first is None and len(found) > 100
    assert "only shapes could be compared: let it load the weights" in repr(found)
    session.hook("model.layers.*.mlp")
    assert "verified" not in {c.evidence for c in session.run(IDS)}


@pytest.mark.engines(2)
def test_without_a_reference_there_is_nothing_to_verify_against(session, tiny):
    session.load(functools.partial(on_engines.parallelized, str(tiny("llama"))), tp=2)
    with pytest.raises(fk.errors.LoadError, match="was loaded without reference="):
        session.verify()


@pytest.mark.engines(1)
def test_before_a_load_it_says_so():
    with fk.local() as session, pytest.raises(fk.errors.LoadError, match="no model is loaded"):
        session.verify()


@pytest.mark.engines(2)
def test_it_leaves_no_memory_behind(session, tiny):
    """Neither the run's nor the unsharded model's values stay; a failure gives them back too."""
    session.load(tiny("llama"), tp=2)
    session.verify()
    session.store.pool.drain()
    before = session.store.pool.num_bytes

    def boom():
        import flexkernel.engine.verify as engine

        def observe(*_):
            raise ZeroDivisionError("a test raised this")

        engine.kept, engine.observe = engine.observe, observe

    def mend():
        import flexkernel.engine.verify as engine

        engine.observe = engine.kept

    session.on_ranks(boom)
    try:
        with pytest.raises(fk.errors.EngineError, match="a test raised this"):
            session.verify()
    finally:
        session.on_ranks(mend)
    assert session.verify().ok and session.hooks.hook_set.hooks == ()
    session.store.pool.drain()
    assert session.store.pool.num_bytes == before == 0
    assert os.listdir(session.store.folder)
