"""Captures of engines on another host: fetched over the data plane, the same numbers. FLEX_HOST
names a host."""

from __future__ import annotations

import os

import pytest
import torch

import flexkernel as fk
from flexkernel.memory import reduce
from tests.support import gradients, models, unsharded
from tests.support.edits import CASES, TOLERANCE, define
from tests.support.rows import MASK, ROWS

IDS = [[5, 6, 7, 8, 9], [10, 11, 12, 13, 14]]
NAMES = ["model.layers.0.mlp.gate_proj", "model.layers.3.mlp", "model.layers.1.self_attn.@pattern"]

GATE = "model.layers.1.mlp.gate_proj.weight"


def hook_and_run(session):
    session.hook("**")
    session.hook("**.@pattern")
    return session.run(IDS)


@pytest.fixture(scope="module")
def elsewhere(request):
    """Two engines that say they are on host b; the driver is not."""
    os.environ["FLEX_HOST"] = "b"
    try:
        session = fk.start(2)
    finally:
        del os.environ["FLEX_HOST"]
    yield session
    session.close()


def move(session, rank: int, host: str) -> None:
    """Let one engine be on another host from here on."""

    def become(rank: int, host: str) -> None:
        from flexkernel.engine import DOOR

        if DOOR.runtime.rank == rank:
            os.environ["FLEX_HOST"] = host

    session.on_ranks(become, rank, host)
    session.engines[rank].host = host
    session.engines.init_ranks(session.engines.device)


@pytest.mark.parametrize("layout", [{"tp": 2}, {"pp": 2}, {"fsdp": 2}], ids=str)
@pytest.mark.slow
def test_what_lies_on_another_host_is_the_same(elsewhere, tiny, layout):
    with fk.local() as here:
        here.load(tiny("llama"))
        truth = hook_and_run(here)
        want = {c.key: c.tensor() for c in truth if c.error is None}
    elsewhere.load(tiny("llama"), **layout)
    assert elsewhere.engines.hosts == ["b", "b"]
    run = hook_and_run(elsewhere)
    assert (
        len(want) > 60
        and not (elsewhere.store.folder.parent / elsewhere.engines.folder / "x").exists()
    )
    for key, whole in want.items():
        capture = run[key.module, key.at, key.index, key.call]
        torch.testing.assert_close(capture.tensor(), whole, atol=1e-5, rtol=1e-5)
    for name in NAMES:
        capture, whole = run[name], want[run[name].key]
        torch.testing.assert_close(capture[1, ..., 2:4], whole[1, ..., 2:4], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(capture.norm(dim=-1), whole.norm(dim=-1), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(capture.mean(), whole.mean(), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(capture.topk(2)[0], whole.topk(2)[0], atol=1e-5, rtol=1e-5)
        tiles = reduce.tiles(whole.reshape(-1, whole.shape[-1]), height=4, width=4)
        torch.testing.assert_close(capture.tiles(height=4, width=4), tiles, atol=1e-5, rtol=1e-5)
        assert capture.count_nan() == 0


def check_parameters(elsewhere, folder) -> None:
    """A packed one too, of which a rank holds several runs of rows."""
    elsewhere.load(folder, tp=2)
    want = {
        n: p.detach() for n, p in models.build("mixtral").named_parameters() if "layers.0" not in n
    }
    assert len(want) > 20 and any("gate_up_proj" in n for n in want)
    for name, whole in want.items():
        capture = elsewhere.parameter(name)
        assert torch.equal(capture.tensor(), whole), name
        assert torch.equal(capture[..., 3:7], whole[..., 3:7])
        torch.testing.assert_close(capture.norm(dim=-1), whole.norm(dim=-1))


@pytest.mark.slow
def test_a_parameter_on_another_host_is_the_same(elsewhere, tiny):
    check_parameters(elsewhere, tiny("mixtral"))
    assert elsewhere.engines.hosts == ["b", "b"]


@pytest.mark.slow
def test_a_capture_whose_parts_lie_on_two_hosts_is_put_together(elsewhere, tiny):
    elsewhere.load(tiny("llama"), tp=2)
    truth = {c.key: c.tensor() for c in hook_and_run(elsewhere) if c.error is None}
    move(elsewhere, 1, "c")
    elsewhere.load(tiny("llama"), tp=2)
    assert elsewhere.engines.hosts == ["b", "c"]
    run = hook_and_run(elsewhere)
    elsewhere.hook("model.layers.0.mlp.gate_proj", reduce="norm:-1", name="norms")
    elsewhere.store.budget = (
        3 * elsewhere.store.pool.num_bytes // 2
    )  # so that the run goes to disk, on each host its part
    norms = elsewhere.run(IDS)["norms"].tensor()
    assert run.plan.slab.startswith("spill-") and elsewhere.store.spill.num_bytes > 0
    torch.testing.assert_close(norms, truth[run["model.layers.0.mlp.gate_proj"].key].norm(dim=-1))
    gate = run["model.layers.0.mlp.gate_proj"]
    assert gate._hosts() == {"b", "c"}
    assert len(truth) > 60
    for key, whole in truth.items():
        assert torch.equal(run[key.module, key.at, key.index, key.call].tensor(), whole), key


@pytest.mark.slow
def test_a_parameter_whose_parts_lie_on_two_hosts_is_put_together(elsewhere, tiny):
    if elsewhere.engines.hosts[1] == "b":  # run by itself
        move(elsewhere, 1, "c")
    check_parameters(elsewhere, tiny("mixtral"))
    assert elsewhere.engines.hosts == ["b", "c"]


@pytest.mark.slow
def test_a_parameter_on_other_hosts_is_edited_and_given_back(elsewhere, tiny):
    """Each rank is sent the parts it holds: of a packed parameter several runs of rows."""
    packed, norm = "model.layers.1.mlp.experts.gate_up_proj", "model.norm.weight"
    elsewhere.load(tiny("mixtral"), tp=2)
    before = {name: elsewhere.parameter(name).tensor() for name in (packed, norm)}
    with elsewhere.parameters_edited({packed: lambda whole: whole.flip(1), norm: before[norm] * 3}):
        assert torch.equal(elsewhere.parameter(packed).tensor(), before[packed].flip(1))
        assert torch.equal(elsewhere.parameter(norm).tensor(), before[norm] * 3)
    assert all(
        torch.equal(elsewhere.parameter(name).tensor(), whole) for name, whole in before.items()
    )


@pytest.mark.slow
def test_a_driver_on_one_of_the_hosts_uses_its_own_slab(elsewhere, tiny, monkeypatch):
    monkeypatch.setenv("FLEX_HOST", "b")
    elsewhere.load(tiny("llama"), pp=2)
    elsewhere.hook("model.layers.0.mlp")
    capture = elsewhere.run(IDS)["model.layers.0.mlp"]
    assert capture._is_view()
    assert torch.equal(capture.tensor(), elsewhere.run(IDS)["model.layers.0.mlp"].tensor())


# --- what needs whole activations: their parts are sent -------------------------------


@pytest.fixture
def apart(elsewhere):
    """The two engines, each on a host of its own."""
    if elsewhere.engines.hosts[1] == "b":
        move(elsewhere, 1, "c")
    return elsewhere


@pytest.mark.parametrize("layout", [{"tp": 2}, {"pp": 2}, {"fsdp": 2}], ids=str)
@pytest.mark.slow
def test_edits_and_gradients_over_hosts_are_the_unsharded_models(apart, tiny, layout):
    """Three rows: the groups of rows have unequal shares."""
    apart.load(tiny("llama"), **layout)
    assert apart.engines.hosts == ["b", "c"]
    define(apart)
    base = unsharded.logits(tiny("llama"), ROWS)
    cases = [
        case for case in CASES if case.name.startswith(("user's", "project_out", "mean", "add"))
    ]
    assert len(cases) == 10
    for case in cases:
        apart.hook(case.module, name="edited", **case.how)
        truth = unsharded.logits(tiny("llama"), ROWS, case)
        assert (truth - base)[MASK].abs().max() > 100 * TOLERANCE
        torch.testing.assert_close(
            apart.run(ROWS).logits.tensor()[MASK], truth[MASK], atol=TOLERANCE, rtol=0
        )
    gradients.through_edits(apart, tiny("llama"), cases)
    apart.unhook()
    apart.hook("model.layers.*.mlp.gate_proj.weight", at="param_grad", edit="scale", value=3.0)
    found = apart.run(ROWS, loss=gradients.loss)[GATE, "param_grad"].tensor()
    want = unsharded.gradients(tiny("llama"), ROWS, gradients.loss).parameters[GATE] * 3
    assert gradients.relative(found, want) < gradients.TOLERANCE


@pytest.mark.slow
def test_a_loss_over_hosts_sees_captures_of_all_of_them(apart, tiny):
    apart.load(tiny("llama"), pp=2)
    names = ["model.layers.0.mlp", "model.layers.3.mlp", "model.layers.1.self_attn.o_proj"]
    for name in names:
        apart.hook(name)
    apart.hook("model.layers.*.mlp", reduce="norm:-1", name="reduced")
    run = apart.run(
        IDS,
        loss=lambda logits, batch: sum(
            batch.captures[name].double().square().sum() for name in names
        ),
    )
    want = sum(run[name, "output"].tensor().double().square().sum().item() for name in names)
    assert want > 1e-3 and run.loss == pytest.approx(want, rel=1e-6)


@pytest.mark.slow
def test_a_patch_travels_to_other_hosts(apart, tiny):
    """A slab's name would mean nothing there, or zeros."""
    name, other = "model.layers.2", [[9, 8, 7, 6, 5], [4, 3, 2, 1, 9]]
    apart.load(tiny("llama"), tp=2)
    apart.hook(name)
    source = apart.run(other)
    alone = apart.run(IDS)
    apart.hook(name, edit="patch", value=source[name])
    patched = apart.run(IDS)
    assert not torch.allclose(patched.logits.tensor(), alone.logits.tensor(), atol=1e-2)
    torch.testing.assert_close(
        patched.logits.tensor(), source.logits.tensor(), atol=1e-5, rtol=1e-5
    )


@pytest.mark.slow
def test_a_generation_whose_rows_are_on_several_hosts_is_edited_by_row(apart, tiny):
    apart.load(tiny("llama"), dp=2)
    apart.edit("mine")(lambda x, ctx: x * ctx.mask[..., None])
    apart.hook("model.layers.2", edit="mine")
    with pytest.raises(fk.errors.HookError, match="per='row'"):
        apart.generate(IDS, max_new_tokens=3)
    plain = apart.run(IDS).logits.tensor()
    apart.edit("mine", per="row")(lambda x, ctx: x * ctx.mask[..., None])
    apart.hook("model.layers.2", edit="mine")
    assert apart.generate(IDS, max_new_tokens=3).tokens
    torch.testing.assert_close(apart.run(IDS).logits.tensor(), plain)
