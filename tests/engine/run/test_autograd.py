"""Gradients: under every layout those of the unsharded model, of every activation and every
parameter."""

from __future__ import annotations

import functools
import gc
import os

import pytest
import torch

import flexkernel as fk
from tests.support import layouts, models, on_engines, reference, unsharded
from tests.support.edits import CASES, define
from tests.support.gradients import (
    TOLERANCE,
    WEIGHT,
    compare,
    exact_norms,
    hook_all,
    loss,
    relative,
    through_edits,
)
from tests.support.rows import BATCH, MASK, ROWS

FOUR = models.ids_and_mask([5, 7, 6, 3])  # two groups of rows share them evenly


@pytest.mark.parametrize("layout", layouts.ALL)
def test_every_gradient_is_the_unsharded_models(session, tiny, layout, record_property):
    session.load(tiny("llama"), **layout)
    hook_all(session)
    for point in ("q", "k", "v", "z"):
        session.hook(f"model.layers.*.self_attn.@{point}", at="grad_output")
    run = session.run(ROWS, loss=loss)
    want = unsharded.gradients(tiny("llama"), ROWS, loss)
    assert run.loss == pytest.approx(want.loss, rel=1e-5)
    found = compare(run, want)
    record_property("worst", str(found))
    print(layout, found)
    assert (
        found["grad_output"][0] >= 55 + 12
        and found["grad_input"][0] >= 54
        and found["param_grad"][0] == 39
    )
    for name in ("model.embed_tokens input", "model input"):
        with pytest.raises(fk.errors.HookError, match="int64: it has no gradient"):
            run[name.split()[0], "grad_input"].tensor()


@pytest.mark.engines(2)
@pytest.mark.parametrize(
    ("arch", "layout"), [("qwen3", {"tp": 2}), ("mixtral", {"tp": 2}), ("llama_untied", {"pp": 2})]
)
def test_other_architectures(session, tiny, arch, layout):
    session.load(tiny(arch), **layout)
    hook_all(session)
    run = session.run(ROWS, loss=loss)
    want = unsharded.gradients(tiny(arch), ROWS, loss)
    refused = {c.name: c.error for c in run if c.error is not None}
    for capture in [c for c in run if c.error is not None]:
        del run.captures[capture.key]
    found = compare(run, want)
    assert found["grad_output"][0] > 40 and found["param_grad"][0] >= 39, found
    known = ("rotary", "position_embeddings", "input", "experts")
    assert all(any(k in n for k in known) or "no gradient" in str(e) for n, e in refused.items()), (
        refused
    )


@pytest.mark.engines(2)
@pytest.mark.parametrize("layout", [{"tp": 2}, {"pp": 2}, {"fsdp": 2}], ids=lambda d: "x".join(d))
def test_inside_eager_attention(session, tiny, layout):
    session.load(tiny("llama"), attn="eager", **layout)
    for point in ("q", "k", "v", "pattern", "z"):
        session.hook(f"model.layers.*.self_attn.@{point}", at="grad_output")
    found = compare(
        session.run(ROWS, loss=loss), unsharded.gradients(tiny("llama"), ROWS, loss, attn="eager")
    )
    assert found["grad_output"][0] >= 4 * 3


# --- edits ----------------------------------------------------------------------------


@pytest.mark.long("pp2xfsdp2")
@pytest.mark.parametrize("layout", layouts.ALL)
def test_gradients_go_through_edits(session, tiny, layout):
    session.load(tiny("llama"), **layout)
    through_edits(session, tiny("llama"), CASES if layout in ({}, {"tp": 2}) else CASES[::3])


@pytest.mark.engines(2)
@pytest.mark.parametrize(
    "layout", [{"tp": 2}, {"pp": 2}, {"fsdp": 2}, {"dp": 2}], ids=lambda d: "x".join(d)
)
@pytest.mark.parametrize("module", ["model.layers.2.mlp.gate_proj", "model.layers.2"])
@pytest.mark.parametrize("edit", ["scale", "turn"])
def test_a_gradient_is_edited(session, tiny, layout, module, edit):
    """What goes on back is what the edit made of it, as with torch's own full backward pre
    hook."""
    if not session.has_model or session.loaded.info.layout != fk.wire.Layout(**layout):
        session.load(tiny("llama"), **layout)
    session.edit("turn")(lambda g, ctx: g.roll(1, -1) * 0.5)
    how = {"edit": "scale", "value": -3.0} if edit == "scale" else {"edit": "turn"}
    session.hook(module, at="grad_output", name="edited", **how)
    session.hook("model.layers.0", at="grad_output", name="before")
    run = session.run(ROWS, loss=loss)
    model = reference.load(tiny("llama"))
    changed = (lambda g: -3 * g) if edit == "scale" else (lambda g: g.roll(1, -1) * 0.5)
    handle = model.get_submodule(module).register_full_backward_pre_hook(
        lambda _m, g: (changed(g[0]),)
    )
    want = reference.gradients(model, BATCH, loss)
    handle.remove()
    assert (
        relative(run["model.layers.0", "grad_output"].tensor(), want.outputs["model.layers.0", ""])
        < TOLERANCE
    )
    plain = unsharded.gradients(tiny("llama"), ROWS, loss).outputs
    assert (
        relative(run["model.layers.0", "grad_output"].tensor(), plain["model.layers.0", ""])
        > 100 * TOLERANCE
    )
    edited = next(c for c in run if c.key.hook == "edited").tensor()
    assert relative(edited, changed(plain[module, ""])) < TOLERANCE


@pytest.mark.engines(2)
@pytest.mark.parametrize("layout", [{"tp": 2}, {"pp": 2}, {"fsdp": 2}], ids=lambda d: "x".join(d))
def test_a_read_only_hook_leaves_every_gradient_bit_equal(session, tiny, layout):
    session.load(tiny("llama"), **layout)
    session.hook("**", at="param_grad", name="parameters")
    alone = {c.name: c.tensor().clone() for c in session.run(ROWS, loss=loss)}
    assert len(alone) == 39 and all(g.abs().max() > 0 for g in alone.values())
    session.hook("**", name="reads")
    session.hook("**", at="input", name="more reads")
    session.hook("**", at="grad_output", name="gradients")
    run = session.run(ROWS, loss=loss)
    for name, gradient in alone.items():
        assert torch.equal(next(c for c in run if c.name == name).tensor(), gradient), name


# --- losses ---------------------------------------------------------------------------


@pytest.mark.long("pp2xfsdp2", "tp2xfsdp2")
@pytest.mark.parametrize("layout", layouts.ALL)
def test_a_loss_sees_captures_of_any_stage(session, tiny, layout):
    session.load(tiny("llama"), **layout)
    session.hook("model.layers.0.mlp.gate_proj", positions=[-1, 2])
    session.hook("model.layers.3")
    session.hook("model.layers.0.mlp.gate_proj", at="grad_output", name="gradient")
    session.hook("model.embed_tokens.weight", at="param_grad")

    def of_captures(logits, batch):
        first, last = (
            batch.captures["model.layers.0.mlp.gate_proj"],
            batch.captures["model.layers.3", "output"],
        )
        return (
            (first**2).sum()
            + (last * batch.mask[..., None]).abs().mean()
            + logits[:, -1].logsumexp(-1).sum()
        )

    run = session.run(ROWS, loss=of_captures)
    model, kept = reference.load(tiny("llama")), {}
    first_gate = model.model.layers[0].mlp.gate_proj
    first_gate.register_forward_hook(
        lambda _m, _a, out: kept.update(first=out) or out.retain_grad()
    )
    model.model.layers[3].register_forward_hook(lambda _m, _a, out: kept.update(last=out) or None)

    def by_hand(logits):
        first, last = kept["first"][:, [-1, 2]], kept["last"]
        return (
            (first**2).sum()
            + (last * MASK[..., None]).abs().mean()
            + logits[:, -1].logsumexp(-1).sum()
        )

    want = reference.gradients(model, BATCH, by_hand)
    assert run.loss == pytest.approx(want.loss, rel=1e-5)
    # what the loss itself asks of it included
    of_first = run["model.layers.0.mlp.gate_proj", "grad_output"].tensor()
    assert relative(of_first, kept["first"].grad) < TOLERANCE
    name = "model.embed_tokens.weight"
    assert relative(run[name].tensor(), want.parameters[name]) < TOLERANCE


def test_next_token_is_cross_entropy_with_pads_left_out(session, tiny):
    session.load(tiny("llama"))
    run = session.run(ROWS, loss="next_token")
    logits, ids = run.logits.tensor(), BATCH["input_ids"]
    real = MASK[:, 1:] & MASK[:, :-1]
    assert real.sum() == 5 + 7 + 6 - 3
    want = torch.nn.functional.cross_entropy(logits[:, :-1][real], ids[:, 1:][real])
    assert run.loss == pytest.approx(want.item(), rel=1e-6)
    assert session.run(ROWS).loss is None


BAD = {
    "raises": (lambda logits, batch: logits.nope, "loss raised AttributeError.*nope.*line"),
    "exits": (lambda logits, batch: exit(), "loss raised"),
    "not a scalar": (
        lambda logits, batch: logits.mean(-1),
        r"loss returned \(3, 7\) torch.float32; .* one number",
    ),
    "no tensor": (lambda logits, batch: 3.0, "loss returned float"),
    "nothing": (lambda logits, batch: None, "loss returned NoneType"),
    "of nothing": (lambda logits, batch: batch.mask.float().mean(), "depends on neither"),
    "detached": (lambda logits, batch: logits.detach().mean(), "depends on neither"),
    "a capture that is not there": (
        lambda logits, batch: batch.captures["model.layers.9"].sum(),
        "captures",
    ),
}


@pytest.mark.engines(2)
@pytest.mark.parametrize("what", BAD)
@pytest.mark.parametrize("layout", [{"tp": 2}, {"pp": 2}, {"fsdp": 2}], ids=lambda d: "x".join(d))
def test_a_bad_loss_is_one_error_and_the_next_run_is_right(session, tiny, layout, what):
    if not session.has_model or session.loaded.info.layout != fk.wire.Layout(**layout):
        session.load(tiny("llama"), **layout)
    session.hook("model.layers.1", at="grad_output")
    before = session.run(ROWS, loss=loss)["model.layers.1", "grad_output"].tensor()
    function, message = BAD[what]
    with pytest.raises(fk.errors.LossError, match=message) as caught:
        session.run(ROWS, loss=function)
    assert caught.value.rank is not None
    again = session.run(ROWS, loss=loss)["model.layers.1", "grad_output"].tensor()
    assert torch.equal(again, before) and before.abs().max() > 0


def break_copies() -> None:
    """On an engine: what the second layer puts out differs from rank to rank."""
    module = on_engines.runtime().part.hooks.modules["model.layers.1.mlp"]
    module.register_forward_hook(lambda _m, _a, out: out * (1 + on_engines.runtime().rank))


@pytest.mark.engines(2)
def test_a_loss_never_reads_what_is_not_whole(session, tiny):
    """A sum's addend, copies that differ, a value that could not be placed: nothing of it is in
    the slab, but bytes of an earlier run are."""
    folder = str(tiny("llama"))
    build = functools.partial(on_engines.partial_sums, folder)
    whole_model = functools.partial(on_engines.whole_reduced, folder)
    inner = "model.layers.1.mlp.inner"
    for declared, says in [
        ({}, "copies that differ"),
        ({"model.layers.*.mlp.inner": "partial"}, "an addend of"),
    ]:
        session.load(build, tp=2, reference=whole_model, placements=declared)
        session.hook(inner)
        with pytest.raises(fk.errors.LossError, match=says):
            session.run([[5, 6, 7, 8]], loss=lambda logits, batch: batch.captures[inner].sum())
    session.load(tiny("llama"), tp=2)
    session.on_ranks(break_copies)
    session.hook("model.layers.1.mlp")
    with pytest.raises(fk.errors.LossError, match="copies that differ"):
        session.run(ROWS, loss=lambda logits, batch: batch.captures["model.layers.1.mlp"].sum())


@pytest.mark.engines(2)
def test_without_a_loss_gradient_hooks_are_quiet_and_nothing_is_kept(session, tiny):
    session.load(tiny("llama"), fsdp=2)
    hook_all(session)
    assert len(session.run(ROWS)) == 0
    session.run(ROWS, loss=loss)

    def left() -> tuple[int, int]:
        parameters = list(on_engines.runtime().model.parameters())
        return sum(p.grad is not None for p in parameters), sum(p.requires_grad for p in parameters)

    assert session.on_ranks(left) == [(0, 0)] * 2


@pytest.mark.engines(2)
@pytest.mark.parametrize("layout", [{"tp": 2}, {"pp": 2}], ids=lambda d: "x".join(d))
def test_a_backward_counts_as_progress(session, tiny, layout):
    """Else a long one would be broken off as a run in which nothing moves."""
    session.load(tiny("llama"), **layout)
    session.hook("model.embed_tokens", at="grad_output")

    def beats(**how) -> list[int]:
        before = session.on_ranks(counted)
        session.run(ROWS, **how)
        return [b - a for a, b in zip(before, session.on_ranks(counted), strict=True)]

    layers = 4 if "tp" in layout else 2
    forward, both = beats(), beats(loss=loss)
    assert min(forward) >= layers and all(
        b - a >= layers for a, b in zip(forward, both, strict=True)
    )


def counted() -> int:
    return on_engines.runtime().watch.heartbeat.count


def test_a_loss_has_to_say_which_of_several_captures(session, tiny):
    session.load(tiny("llama"))
    session.hook("model.layers.1.mlp")
    session.hook("model.layers.1.mlp", at="input")
    with pytest.raises(fk.errors.LossError, match="has 2 captures: say which"):
        session.run(ROWS, loss=lambda logits, batch: batch.captures["model.layers.1.mlp"].sum())
    run = session.run(
        ROWS, loss=lambda logits, batch: batch.captures["model.layers.1.mlp", "input"].sum()
    )
    assert run.loss == pytest.approx(
        run["model.layers.1.mlp", "input"].tensor().sum().item(), rel=1e-4
    )


def test_what_a_gradient_hook_cannot_have_is_said(session, tiny):
    session.load(tiny("llama"))
    for how, message in [
        ({"at": "grads"}, "is not one of output"),
        ({"at": "param_grad", "edit": "mean"}, "no rows, positions or heads"),
        ({"at": "param_grad", "positions": 0}, "no rows, positions or heads"),
    ]:
        with pytest.raises(fk.errors.HookError, match=message):
            session.hook("model.layers.0.mlp.gate_proj.weight", **how)
    with pytest.raises(fk.errors.HookError, match="weight"):
        session.hook("model.layers.0.mlp.gate_projj.weight", at="param_grad")
    with pytest.raises(fk.errors.HookError, match="whole forward"):
        session.run(ROWS, loss=loss, stop_at="model.layers.0")


@pytest.mark.engines(2)
def test_a_model_whose_gradients_were_taken_is_let_go(session, tiny):
    """A graph that hooks hold and that holds the hooks would keep the model, its groups and their
    threads for ever; so would what DTensor remembers of the meshes that it has seen."""

    def there() -> tuple[int, int, int]:
        gc.collect()
        models = sum(
            type(thing).__name__.endswith("LlamaForCausalLM") for thing in gc.get_objects()
        )
        return models, len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))

    counts = []
    for layout in [{"tp": 2}, {"fsdp": 2}, {"pp": 2}, {"dp": 2}] * 2:
        session.load(tiny("llama"), **layout)
        define(session)
        hook_all(session)
        session.hook("model.layers.1", edit="mix", name="edited")
        session.run(ROWS, loss=loss)
        counts.append(session.on_ranks(there))
    assert all(models == 1 for ranks in counts for models, *_ in ranks), counts
    for first, again in zip(counts[:4], counts[4:], strict=True):
        for rank in range(2):
            assert again[rank][1] <= first[rank][1] + 2 and again[rank][2] <= first[rank][2] + 2, (
                counts
            )
    print(counts)


# --- finite differences ---------------------------------------------------------------


@pytest.mark.engines(2)
@pytest.mark.parametrize("layout", [{"tp": 2}, {"pp": 2}], ids=lambda d: "x".join(d))
def test_finite_differences(session, tiny, layout):
    """Eight random coordinates of an activation, an edited activation and a parameter, in
    float64."""
    session.load(tiny("llama"), dtype="float64", **layout)
    session.on_ranks(exact_norms)
    weight = WEIGHT.double()
    session.edit("bend")(lambda x, ctx: torch.tanh(x.roll(2, -1)) + x)
    generator = torch.Generator().manual_seed(3)
    value = functools.partial(session.run, ROWS, loss=lambda logits, batch: (logits * weight).sum())
    module = "model.layers.1.mlp.gate_proj"
    for edited in (False, True):
        if edited:
            session.hook(module, edit="bend", name="bend", capture="none")
        session.hook(module, at="grad_output", name="gradient")
        gradient = value()[module, "grad_output"].tensor()
        step = 1e-5
        for _ in range(8):
            row = int(torch.randint(3, (), generator=generator))
            column = 6 - int(torch.randint(len(ROWS[row]), (), generator=generator))
            place = row, column, int(torch.randint(176, (), generator=generator))
            losses = []
            for sign in (1, -1):
                push = torch.zeros(3, 7, 176, dtype=torch.float64)
                push[place] = sign * step
                session.unhook("bend") if edited else None
                session.hook(module, edit="add", value=push, name="push", capture="none")
                if edited:
                    session.hook(module, edit="bend", name="bend", capture="none")
                losses.append(value().loss)
            session.unhook("push")
            assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(
                gradient[place].item(), rel=1e-4, abs=1e-7
            )
    session.unhook()
    name = "model.layers.2.mlp.down_proj.weight"
    session.hook(name, at="param_grad")
    gradient = value()[name, "param_grad"].tensor()

    def nudge(place, by) -> None:
        weight = getattr(
            on_engines.runtime().part.hooks.modules.get("model.layers.2.mlp.down_proj"),
            "weight",
            None,
        )
        if weight is None:
            return
        with torch.no_grad():
            if hasattr(weight, "to_local") and layout.get("tp"):
                local, start = weight.to_local(), 88 * on_engines.runtime().rank
                if start <= place[1] < start + 88:
                    local[place[0], place[1] - start] += by
            else:
                weight[place] += by

    for _ in range(8):
        place = (
            int(torch.randint(64, (), generator=generator)),
            int(torch.randint(176, (), generator=generator)),
        )
        losses = []
        for by in (1e-5, -2e-5):
            session.on_ranks(nudge, place, by)
            losses.append(value().loss)
        session.on_ranks(nudge, place, 1e-5)
        assert (losses[0] - losses[1]) / 2e-5 == pytest.approx(
            gradient[place].item(), rel=1e-4, abs=1e-7
        )


# --- the real model -------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("layout", layouts.without(layouts.REAL, "fsdp2"))
def test_gradients_of_the_real_model(session, smollm2, layout, record_property):
    from transformers import AutoTokenizer

    prompt = "The capital of France is Paris, and the capital of Italy is"
    session.load(smollm2, **layout)
    session.hook("model.layers.*", at="grad_output")
    session.hook("model.layers.*.mlp.gate_proj.weight", at="param_grad")
    session.hook("model.embed_tokens.weight", at="param_grad")
    run = session.run(prompt, loss="next_token")
    ids = torch.tensor([AutoTokenizer.from_pretrained(smollm2)(prompt)["input_ids"]])
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "position_ids": torch.arange(ids.shape[1])[None],
    }
    cross_entropy = torch.nn.functional.cross_entropy
    want = reference.gradients(
        reference.load(smollm2), batch, lambda x: cross_entropy(x[0, :-1], ids[0, 1:])
    )
    assert run.loss == pytest.approx(want.loss, rel=1e-5)
    found = compare(run, want, 1e-4)
    record_property("worst", str(found))
    print(layout, found)
    assert found["grad_output"][0] == 30 and found["param_grad"][0] == 31


@pytest.mark.engines(2)
def test_attribution_foretells_what_a_small_patch_changes(session, tiny):
    session.load(tiny("llama"), tp=2)
    layers = [f"model.layers.{i}" for i in range(4)]
    session.hook("model.layers.*", name="values")
    session.hook("model.layers.*", at="grad_output", name="gradients")
    clean = session.run(ROWS, loss=loss)
    session.hook(
        "model.embed_tokens",
        edit="add",
        value=torch.linspace(-1, 1, 64) * 1e-3,
        name="push",
        capture="none",
    )
    pushed = session.run(ROWS, loss=loss)
    found = clean.attribution(pushed)
    assert list(found) == layers and all(value.shape == (3, 7) for value in found.values())
    change = pushed.loss - clean.loss
    assert abs(change) > 1e-3
    for value in found.values():  # a patch of a whole layer's output brings all of the change
        assert value[MASK].sum().item() == pytest.approx(change, rel=0.05)
    with pytest.raises(fk.errors.CaptureError, match="attribution needs"):
        session.run(ROWS).attribution(clean)
    with pytest.raises(ValueError, match="in the other run"):
        clean.attribution(session.run([[5, 6, 7]]))


# --- magics ---------------------------------------------------------------------------


def test_backward_takes_an_expression_with_the_notebooks_own_names(session, tiny):
    from IPython.core.error import UsageError
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell()
    try:
        shell.run_line_magic("load_ext", "flexkernel")
        session.load(tiny("llama"))
        shell.user_ns |= {"session": session, "weight": WEIGHT, "rows": ROWS}
        shell.run_line_magic("flex_hook", "model.layers.1.mlp --at grad_output")
        run = shell.run_line_magic(
            "flex_run", "--backward '(logits * weight).sum() / 100' --var rows"
        )
        want = unsharded.gradients(tiny("llama"), ROWS, loss)
        assert run.loss == pytest.approx(want.loss, rel=1e-5) and f"loss {run.loss:.6g}" in repr(
            run
        )
        gradient = run["model.layers.1.mlp", "grad_output"].tensor()
        assert relative(gradient, want.outputs["model.layers.1.mlp", ""]) < TOLERANCE
        own = shell.run_line_magic("flex_run", "--backward next_token --var rows").loss
        asked = "F.cross_entropy(logits.flatten(0, 1), labels.flatten())"
        assert own == shell.run_line_magic("flex_run", f"--backward '{asked}' --var rows").loss
        with pytest.raises(UsageError, match="no Python expression"):
            shell.run_line_magic("flex_run", "--backward 'logits.(' --var rows")
        with pytest.raises(fk.errors.LossError, match=r"NameError.*nothing_here"):
            shell.run_line_magic("flex_run", "--backward nothing_here.sum() --var rows")
    finally:
        InteractiveShell.clear_instance()
