"""Models that users shard by themselves: every module's input and output is the unsharded model's,
under its name."""

from __future__ import annotations

import functools
import re

import pytest
import torch
import torch.distributed as dist

from flexkernel.errors import LoadError, PlacementError, PromptError
from tests.support import foreign, gradients, models, on_engines, reference
from tools import parity

IDS = [[5, 6, 7, 8], [9, 10, 11, 12], [13, 14, 15, 16]]
GATE, HEAD = "model.layers.1.mlp.gate_proj.weight", "lm_head.weight"
PREFIXES = re.compile(
    r"(^|\.)(module|_fsdp_wrapped_module|_orig_mod|_checkpoint_wrapped_module|inner)(\.|$)"
)


@functools.cache
def llama() -> torch.nn.Module:
    return models.build("llama")


def check_llama(session, folder, build, lengths=(4, 10, 6), **layout) -> parity.Row:
    """Everything of a sharded tiny Llama against the unsharded one."""
    folder = str(folder)
    session.load(
        functools.partial(build, folder),
        reference=functools.partial(on_engines.whole, folder),
        **layout,
    )
    assert session.loaded.info.names and not [
        name for name in session.loaded.info.names if PREFIXES.search(name)
    ]
    row = parity.Row("llama", str(layout), "sdpa")
    parity.hook_everything(session, points=False)
    parity.compare(session, llama(), row, list(lengths), points=False)
    assert (row.wrong, row.skipped, row.refused) == ([], [], {}) and row.compared > 110
    return row


def check_parameters(session) -> None:
    want = dict(llama().named_parameters(remove_duplicate=False))
    for name in (GATE, HEAD, "model.embed_tokens.weight", "model.norm.weight"):
        assert torch.equal(session.parameter(name).tensor(), want[name]), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "layout"),
    [
        (foreign.in_ddp, {"dp": 2}),
        (foreign.in_fsdp1, {"fsdp": 2}),
        (functools.partial(foreign.in_fsdp1, original=False), {"fsdp": 2}),
        (foreign.in_fsdp2, {"fsdp": 2}),
        (on_engines.parallelized, {"tp": 2}),
        (functools.partial(on_engines.parallelized, sequence=True), {"tp": 2}),
        (foreign.compiled_in_checkpoints, {"dp": 2}),
    ],
    ids=["ddp", "fsdp1", "fsdp1 flat", "fsdp2", "tp", "sequence parallel", "compiled"],
)
@pytest.mark.engines(2)
def test_torchs_own_wrappers(session, tiny, build, layout):
    check_llama(session, tiny("llama"), build, **layout)


@pytest.mark.slow
@pytest.mark.engines(2)
def test_fairscales_layers(session, tiny):
    if not foreign.on_ci():
        pytest.importorskip(
            "fairscale", reason="pip install --no-build-isolation --no-deps fairscale"
        )
    row = check_llama(session, tiny("llama"), on_engines.fairscale_mlps, tp=2)
    assert row.evidence["class"] == 24
    check_parameters(session)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "layout"),
    [
        (foreign.in_ddp, {"dp": 2}),
        (foreign.in_fsdp1, {"fsdp": 2}),
        (foreign.in_fsdp2, {"fsdp": 2}),
        (on_engines.parallelized, {"tp": 2}),
        (functools.partial(on_engines.parallelized, sequence=True), {"tp": 2}),
        (on_engines.fairscale_mlps, {"tp": 2}),
    ],
    ids=["ddp", "fsdp1", "fsdp2", "tp", "sequence parallel", "fairscale"],
)
@pytest.mark.engines(2)
def test_gradients_of_models_that_users_shard(session, tiny, build, layout, request):
    """Twice: nothing is left of the first run in the second."""
    if "fairscale" in request.node.name and not foreign.on_ci():
        pytest.importorskip("fairscale")
    folder = str(tiny("llama"))
    session.load(
        functools.partial(build, folder),
        reference=functools.partial(on_engines.whole, folder),
        **layout,
    )
    batch = models.ids_and_mask([6, 6, 6, 6])
    weight = torch.randn(4, 6, 256, generator=torch.Generator().manual_seed(2))
    want = reference.gradients(
        models.build("llama"), batch, lambda logits: (logits * weight).sum() / 100
    )
    for name in ("model.layers.*", "model.layers.*.mlp.gate_proj", "model.norm", "lm_head"):
        session.hook(name, at="grad_output")
    session.hook("**", at="param_grad", name="parameters")
    if build is foreign.in_fsdp1:
        with pytest.raises(PlacementError, match="FSDP1 flattens parameters"):
            session.run(batch["input_ids"].tolist(), loss="next_token")
        session.unhook("parameters")
    for _ in range(2):
        run = session.run(
            batch["input_ids"].tolist(), loss=lambda logits, batch: (logits * weight).sum() / 100
        )
        assert run.loss == pytest.approx(want.loss, rel=1e-4)
        found = gradients.compare(run, want, 2e-5)
        assert found["grad_output"][0] == 10 and (
            build is foreign.in_fsdp1 or found["param_grad"][0] == 39
        )


@pytest.mark.slow
@pytest.mark.engines(2)
def test_a_wrappers_prefix_can_be_taken_off(session, tiny):
    check_llama(session, tiny("llama"), foreign.around, dp=2, names={"inner": ""})
    check_parameters(session)


@pytest.mark.engines(2)
def test_hooks_of_a_compiled_model_come_and_go(session, tiny):
    """Compiled code knows only the hooks of the moment in which it was made."""
    folder = str(tiny("llama"))
    session.load(functools.partial(foreign.compiled_in_checkpoints, folder), dp=2)
    plain = session.run(IDS).logits.tensor()
    session.hook("model.layers.1.mlp", edit="zero")
    session.unhook()
    with torch.no_grad():
        want = llama()(torch.tensor(IDS)).logits
    torch.testing.assert_close(plain, want, atol=1e-5, rtol=1e-5)
    assert torch.equal(session.run(IDS).logits.tensor(), plain)


# --- Megatron-core --------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpt(tmp_path_factory):
    """(file of weights, (module, at) → first tensor) of the whole GPTModel, run by itself."""
    pytest.importorskip("megatron.core", reason="pip install --no-deps megatron-core")
    from megatron.core import parallel_state

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            model = foreign.megatron()
            for parameter in model.parameters():
                parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
        file = tmp_path_factory.mktemp("megatron") / "weights.pt"
        torch.save(dict(model.state_dict()), file)
        places, mask = (
            torch.arange(4).expand(3, 4),
            torch.ones(1, 1, 4, 4, dtype=torch.bool).triu(1),
        )
        own = model.forward
        model.forward = lambda input_ids, use_cache: own(input_ids, places, mask)
        outputs, inputs = reference.record(model, {"input_ids": torch.tensor(IDS)})
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
    return str(file), outputs, inputs


@pytest.mark.slow
@pytest.mark.parametrize("layout", [{"tp": 2}, {"dp": 2}], ids=str)
@pytest.mark.engines(2)
def test_a_megatron_model_needs_no_reference(session, gpt, layout):
    """Its values are (S, B, D), split as their classes say; only a gated MLP's packed projections
    are refused."""
    file, outputs, inputs = gpt
    session.load(functools.partial(foreign.megatron, file, layout.get("tp", 1)), **layout)
    for at in ("output", "input"):
        session.hook("**", at=at)
        session.hook("", at=at)
    run, compared, refused = session.run(IDS), 0, []
    for at, values in (("output", outputs), ("input", inputs)):
        for (name, _, _), want in parity.first_leaves(values).items():
            capture = run[name, at]
            if capture.error is not None:
                refused.append((name, at))
                continue
            torch.testing.assert_close(capture.tensor(), want, atol=1e-5, rtol=1e-5)
            compared += 1
    packed = [(f"decoder.layers.{i}.mlp.linear_fc1", "output") for i in range(2)]
    assert refused == (packed if "tp" in layout else []) and compared >= 78
    torch.testing.assert_close(run.logits.tensor(), outputs["", 0, ""], atol=1e-5, rtol=1e-5)
    for name, whole in torch.load(file).items():
        if whole is not None:
            assert torch.equal(session.parameter(name).tensor(), whole), name
    with pytest.raises(PromptError, match="has a mask of another meaning"):
        session.run([[1, 2], [1, 2, 3]])


# --- a model of the user's own, in (S, B, D) order ------------------------------------


OWN = functools.partial(foreign.seeded, foreign.Own)


@functools.cache
def own_values(kind: type = foreign.Own) -> dict[tuple[str, str], torch.Tensor]:
    """(module, at) → the first tensor, of the unsharded model."""
    found: dict[tuple[str, str], torch.Tensor] = {}
    model = foreign.seeded(kind)
    for name, module in model.named_modules():

        def before(_module, args, name=name) -> None:
            found[name, "input"] = args[0]

        def after(_module, _args, out, name=name) -> None:
            found[name, "output"] = out[0] if isinstance(out, tuple) else out

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)
    with torch.no_grad():
        model(torch.tensor(IDS))
    return found


def check_own(session, want, refused=()) -> None:
    for at in ("output", "input"):
        session.hook("**", at=at)
        session.hook("", at=at)
    run = session.run(IDS)
    assert len(want) > 40
    for (name, at), truth in want.items():
        if (name, at) not in refused:
            torch.testing.assert_close(run[name, at].tensor(), truth, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(run.logits.tensor(), want["", "output"], atol=1e-6, rtol=1e-5)
    for key in refused:
        with pytest.raises(PlacementError):
            run[key].tensor()


@pytest.mark.engines(2)
def test_rows_may_lie_along_any_dim(session):
    session.load(OWN, dp=2, reference=OWN)
    check_own(session, own_values())
    assert str(session.loaded.info.scan["blocks.0", "output"][0][0]) == "S×B×32"
    assert session.run(IDS).next_tokens(3)[2][0][0]


@pytest.mark.engines(2)
def test_without_a_reference_the_rows_are_where_they_are_declared_or_nowhere(session):
    declared = {
        "blocks.*": "batch:1",
        "blocks.*.* input": "batch:1",
        "": "batch:0",
        "embed.places": "batch:none",
    }
    session.load(OWN, dp=2, placements=declared)
    session.hook("**")
    session.hook("blocks.*.*", at="input")
    run, want = session.run(IDS), own_values()
    found = [("embed.places", "output"), *((f"blocks.{i}", "output") for i in range(4))]
    found += [(f"blocks.{i}.{part}", "input") for i in range(4) for part in ("norm", "up", "down")]
    for key in found:
        torch.testing.assert_close(run[key].tensor(), want[key], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(run.logits.tensor(), want["", "output"], atol=1e-6, rtol=1e-5)
    with pytest.raises(
        PlacementError,
        match=r"head output: .* or no reference says it.*placements={'head': 'batch:0",
    ):
        run["head", "output"].tensor()


@pytest.mark.engines(2)
def test_a_wrong_dim_of_rows_is_refused(session):
    session.load(
        OWN, dp=2, placements={"blocks.0": "batch:2", "blocks.1": "batch:3", "blocks.2": "batch:0"}
    )
    session.hook("blocks.*")
    run = session.run([row[:3] for row in IDS])
    for name, dim in (("blocks.1", 3), ("blocks.2", 0)):  # 3 positions are no 2 rows
        with pytest.raises(
            PlacementError, match=rf"rows are said to lie along dim {dim}, but rank"
        ):
            run[name].tensor()
    session.load(OWN, dp=2, reference=OWN, placements={"blocks.0": "batch:2"})
    session.hook("blocks.0")
    with pytest.raises(PlacementError, match="said to be along dim 2, but it is S×B×32"):
        session.run(IDS)["blocks.0"].tensor()


@pytest.mark.engines(2)
def test_two_dims_that_could_be_the_rows_are_refused_until_one_is_declared(session):
    grid = functools.partial(foreign.seeded, foreign.Grid)
    session.load(grid, dp=2, reference=grid)
    session.hook("pairs")
    with pytest.raises(
        PlacementError,
        match=r"pairs is B×B: dims 0 and 1 could both.*placements={'pairs': 'batch:0'}",
    ):
        session.run(IDS)["pairs"].tensor()
    session.load(grid, dp=2, reference=grid, placements={"pairs": "batch:0"})
    session.hook("pairs")
    with pytest.raises(PlacementError, match=r"holds \(2, 2\), .* is \(2, 3\) for its rows"):
        session.run(IDS)["pairs"].tensor()


@pytest.mark.engines(2)
def test_pads_are_refused_by_a_model_without_a_mask(session):
    session.load(OWN, dp=2, reference=OWN)
    with pytest.raises(PromptError, match=r"Own.forward takes no attention_mask"):
        session.run([[1, 2], [1, 2, 3]])
    assert session.run(IDS).logits.shape == (3, 4, 96)


@pytest.mark.engines(2)
def test_what_a_forward_needs_beside_the_ids_is_the_users_to_say(session):
    started = functools.partial(foreign.seeded, foreign.Started)
    with pytest.raises(
        LoadError, match=r"Started.forward\(tokens, start_pos, flag\) needs start_pos"
    ):
        session.load(started, dp=2, reference=started)
    with pytest.raises(LoadError, match="needs start_pos"):
        session.load(started, dp=2)
    session.load(
        started, dp=2, reference=started, forward=lambda model, batch: model(batch["input_ids"], 0)
    )
    check_own(session, own_values())


# --- a pipeline split by hand ---------------------------------------------------------


@pytest.mark.engines(2)
def test_a_pipeline_split_by_hand_has_the_whole_models_names(session):
    session.load(foreign.by_hand, pp=2, reference=OWN, names=foreign.whole_names)
    stages = {m.name: m.stages for m in session.loaded.info.modules}
    assert stages["blocks.1"] == (0,) and stages["blocks.2.norm"] == (1,) and "part" not in stages
    check_own(session, own_values())
    for name, want in OWN().named_parameters():
        assert torch.equal(session.parameter(name).tensor(), want), name
    run = session.run(IDS, stop_at="blocks.1")
    assert not run.stopped and run.logits.shape == (3, 4, 96)


@pytest.mark.engines(2)
def test_parts_under_other_names_are_refused_with_what_to_write(session):
    with pytest.raises(
        LoadError, match=r"no rank .* has blocks.0.norm.*part.blocks.0.norm.*names="
    ):
        session.load(foreign.by_hand, pp=2, reference=OWN)
