"""What went wrong in FlexModel does not here: a test for each of its defects, by the number of our
list of them."""

from __future__ import annotations

import functools

import pytest
import torch

from flexkernel.errors import PlacementError
from tests.support import foreign, models, on_engines, reference, unsharded

IDS = [[5, 6, 7, 8, 9], [9, 10, 11, 12, 13], [3, 4, 5, 6, 7]]
GATE, DOWN, MLP = (f"model.layers.1.mlp{part}" for part in (".gate_proj", ".down_proj", ""))
WEIGHT = torch.randn(3, 5, 256, generator=torch.Generator().manual_seed(1))


def weighed(logits, batch=None):
    return (logits * WEIGHT).sum() / 100


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    assert want.abs().max() > 1e-3, "there is something to compare"
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def check(session, folder, *names: str) -> None:
    for name in names:
        session.hook(name)
    run = session.run(IDS)
    for name in names:
        close(run[name].tensor(), unsharded.activations(folder, IDS).outputs[name, 0, ""])


@pytest.mark.numbers(1)
@pytest.mark.engines(2)
def test_a_read_only_hook_leaves_gradients_alone(session, tiny):
    session.load(tiny("llama"), tp=2)
    session.hook("model.layers.*", at="grad_output", name="gradients")
    alone = {c.name: c.tensor().clone() for c in session.run(IDS, loss=weighed)}
    session.hook("**.gate_proj", name="read")
    run = session.run(IDS, loss=weighed)
    assert len(alone) == 4 and all(
        torch.equal(run["gradients"][i].tensor(), g) for i, g in enumerate(alone.values())
    )
    close(
        alone["model.layers.0 grad_output"],
        unsharded.gradients(tiny("llama"), IDS, weighed).outputs["model.layers.0", ""],
    )


@pytest.mark.numbers(2)
@pytest.mark.engines(2)
def test_a_partial_sum_is_not_handed_over_as_the_activation(session, tiny):
    session.load(tiny("llama"), tp=2)
    check(session, tiny("llama"), DOWN, MLP)
    session.load(functools.partial(on_engines.partial_sums, str(tiny("llama"))), tp=2)
    session.hook(f"{MLP}.inner")
    with pytest.raises(PlacementError):
        session.run(IDS)[f"{MLP}.inner"].tensor()


@pytest.mark.numbers(3)
@pytest.mark.engines(2)
def test_a_local_shard_is_not_handed_over_and_a_wrong_hint_not_accepted(session, tiny):
    session.load(tiny("llama"), tp=2)
    check(session, tiny("llama"), GATE, f"{MLP}.act_fn")
    session.load(tiny("llama"), tp=2, placements={GATE: "shard:1"})
    session.hook(GATE)
    with pytest.raises(PlacementError, match="declared says"):
        session.run(IDS)[GATE].tensor()


def probe(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return ((x @ weight) ** 2).sum() / 100


@pytest.mark.numbers(4)
@pytest.mark.engines(2)
def test_a_probes_gradients_are_whole_and_an_optimizer_trains_it(session, tiny):
    module = torch.nn.Linear(176, 3, bias=False)
    weight = module.weight.detach().clone().T.requires_grad_()
    probe(unsharded.activations(tiny("llama"), IDS).outputs[GATE, 0, ""], weight).backward()
    session.load(tiny("llama"), tp=2)
    session.modules["probe"] = module
    session.hook(GATE)

    def loss(logits, batch):
        return (batch.modules["probe"](batch.captures[GATE]) ** 2).sum() / 100

    session.run(IDS, loss=loss)
    close(session.modules.gradients("probe")["weight"], weight.grad.T)
    before = session.modules["probe"].weight.detach().clone()
    session.train_step(IDS, loss, lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    close(session.modules["probe"].weight.detach(), before - 0.1 * weight.grad.T)


@pytest.mark.numbers(5)
@pytest.mark.engines(2)
def test_what_is_passed_by_keyword_or_put_out_by_name_is_captured(session, tiny):
    session.load(tiny("llama"), tp=2)
    attention = "model.layers.1.self_attn"
    session.hook(attention, at="input")
    session.hook("", index="logits")
    run, want = session.run(IDS), unsharded.activations(tiny("llama"), IDS)
    close(run[attention, "input"].tensor(), want.inputs[attention, 0, "hidden_states"])
    close(run["", "output", "logits"].tensor(), want.outputs["", 0, "logits"])


@pytest.mark.numbers(6)
@pytest.mark.engines(2)
def test_a_gradient_that_did_not_come_once_comes_the_next_time(session, tiny):
    session.load(tiny("llama"), tp=2)
    session.hook("model.layers.0")
    session.hook("model.layers.3", at="grad_output")
    session.run(IDS, loss=lambda logits, batch: batch.captures["model.layers.0"].sum())
    run = session.run(IDS, loss=weighed)
    close(
        run["model.layers.3", "grad_output"].tensor(),
        unsharded.gradients(tiny("llama"), IDS, weighed).outputs["model.layers.3", ""],
    )


@pytest.mark.numbers(7)
@pytest.mark.engines(2)
def test_forward_and_backward_captures_are_apart_and_do_not_grow(session, tiny):
    session.load(tiny("llama"), tp=2)
    session.hook(MLP)
    session.hook(MLP, at="grad_output")
    for _ in range(3):
        run = session.run(IDS, loss=weighed)
        assert len(run) == 2
        close(
            run[MLP, "output"].tensor(),
            unsharded.activations(tiny("llama"), IDS).outputs[MLP, 0, ""],
        )
        close(
            run[MLP, "grad_output"].tensor(),
            unsharded.gradients(tiny("llama"), IDS, weighed).outputs[MLP, ""],
        )


@pytest.mark.numbers(8)
@pytest.mark.engines(2)
def test_what_a_run_says_is_there_is_there_when_it_is_read_at_once(session, tiny):
    """Ten runs into the same reused memory, each read the moment it is back."""
    session.load(tiny("llama"), fsdp=2)
    session.hook("model.layers.*.mlp")
    for shift in range(10):
        ids = [[(token + 17 * shift) % 256 for token in row] for row in IDS]
        run = session.run(ids)
        got = [capture.tensor().clone() for capture in run]
        run.free()
        want = unsharded.activations(tiny("llama"), ids).outputs
        for layer, value in enumerate(got):
            close(value, want[f"model.layers.{layer}.mlp", 0, ""])


@pytest.mark.numbers(9)
@pytest.mark.parametrize("layout", [{"dp": 2}, {"fsdp": 2}], ids=str)
@pytest.mark.engines(2)
def test_gradients_are_not_scaled_as_if_the_loss_were_averaged_over_dp(session, tiny, layout):
    session.load(tiny("llama"), **layout)
    session.hook(MLP, at="grad_output")
    session.hook(f"{GATE}.weight", at="param_grad")
    run, want = session.run(IDS, loss=weighed), unsharded.gradients(tiny("llama"), IDS, weighed)
    close(run[MLP, "grad_output"].tensor(), want.outputs[MLP, ""])
    close(run[f"{GATE}.weight", "param_grad"].tensor(), want.parameters[f"{GATE}.weight"])


@pytest.mark.numbers(10)
@pytest.mark.engines(2)
def test_every_stage_of_a_pipeline_comes_to_the_end_of_a_run(session, tiny):
    session.load(tiny("llama"), pp=2)
    for _ in range(2):
        check(session, tiny("llama"), "model.layers.0", "model.layers.3", "model.norm")


@pytest.mark.numbers(11)
@pytest.mark.slow
@pytest.mark.parametrize("layout", [{"tp": 2, "dp": 2}, {"pp": 2, "dp": 2}], ids=str)
@pytest.mark.engines(4)
def test_two_axes_at_once_know_their_ranks(session, tiny, layout):
    session.load(tiny("llama"), **layout)
    check(session, tiny("llama"), GATE, "model.layers.3")


@pytest.mark.numbers(12)
@pytest.mark.engines(2)
def test_groups_hook_something_and_go_off_and_on_and_away(session, tiny):
    session.load(tiny("llama"), tp=2)
    session.hook("model.layers.*.mlp", groups="mlps")
    session.hook("model.norm")

    def fired(**which) -> int:
        return len(session.run(IDS, **which))

    assert fired() == 5
    session.hooks.group("off", "mlps")
    assert fired() == 1
    session.hooks.group("on", "mlps")
    assert (fired(), fired(groups="mlps"), fired(groups="mlps", complement=True)) == (5, 4, 1)
    assert session.hooks.group("remove", "mlps", "model.layers.*.mlp") == {} and fired() == 5
    session.unhook()
    assert fired() == 0


@pytest.mark.numbers(13)
@pytest.mark.parametrize("build", [foreign.in_fsdp1, foreign.in_fsdp2])
@pytest.mark.engines(2)
def test_parameters_are_read_and_hooked_under_fsdp(session, tiny, build):
    folder = str(tiny("llama"))
    session.load(
        functools.partial(build, folder),
        fsdp=2,
        reference=functools.partial(on_engines.whole, folder),
    )
    want = dict(models.build("llama").named_parameters())
    assert torch.equal(session.parameter(f"{GATE}.weight").tensor(), want[f"{GATE}.weight"])
    check(session, tiny("llama"), GATE, MLP)


@pytest.mark.numbers(14)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.engines(2)
def test_a_batch_that_does_not_divide_is_run(session, tiny, rows):
    session.load(tiny("llama"), dp=2)
    session.hook(MLP)
    close(
        session.run(IDS[:rows])[MLP].tensor(),
        unsharded.activations(tiny("llama"), IDS).outputs[MLP, 0, ""][:rows],
    )


@pytest.mark.numbers(15)
def test_it_runs_in_one_process_on_a_cpu(session, tiny):
    session.load(tiny("llama"))
    assert session.engines.size == 1
    check(session, tiny("llama"), GATE, MLP)


@pytest.mark.numbers(16)
@pytest.mark.engines(2)
def test_a_cell_can_be_run_again_and_its_hook_taken_away(session, tiny):
    session.load(tiny("llama"), tp=2)
    for _ in range(3):
        check(session, tiny("llama"), MLP)
    assert len(session.run(IDS)) == 1
    session.unhook(MLP)
    assert len(session.run(IDS)) == 0


@pytest.mark.numbers(17)
@pytest.mark.engines(2)
def test_it_generates_and_names_carry_no_wrapper(session, tiny):
    session.load(tiny("llama"), tp=2)
    new = session.generate([IDS[0]], max_new_tokens=4)
    ids = torch.tensor(IDS[:1])
    want = reference.load(tiny("llama")).generate(
        ids, max_new_tokens=4, do_sample=False, pad_token_id=0
    )
    assert [list(row) for row in new.new_ids] == want[:, 5:].tolist()
    for build, layout in ((foreign.in_ddp, {"dp": 2}), (foreign.in_fsdp1, {"fsdp": 2})):
        session.load(functools.partial(build, str(tiny("llama"))), **layout)
        assert set(dict(models.build("llama").named_modules())) == {
            m.name for m in session.loaded.info.modules
        }
