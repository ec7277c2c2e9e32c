"""Trainable modules: under every layout they are trained as beside the unsharded model, and equal
on all ranks."""

from __future__ import annotations

import pytest
import torch

import flexkernel as fk
from tests.support import layouts, on_engines, reference
from tests.support.gradients import WEIGHT, exact_norms, relative
from tests.support.rows import BATCH, MASK, ROWS

TOLERANCE = 2e-5
STEPS = 3


class Translator(torch.nn.Module):
    """A residual map of one layer's output: a tuned lens's translator, with an added bias."""

    def __init__(self, width: int = 64, seed: int = 1):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = torch.nn.Parameter(torch.randn(width, width, generator=generator) * 0.05)
        self.bias = torch.nn.Parameter(torch.zeros(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.nn.functional.layer_norm(x, x.shape[-1:]) @ self.weight + self.bias


class LoRA(torch.nn.Module):
    """A low-rank addition to what a projection puts out, from the projection's own output."""

    def __init__(self, width: int = 176, rank: int = 4):
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.down = torch.nn.Parameter(torch.randn(width, rank, generator=generator) * 0.1)
        self.up = torch.nn.Parameter(torch.randn(rank, width, generator=generator) * 0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + x @ self.down @ self.up


class Probe(torch.nn.Module):
    def __init__(self, width: int = 64, classes: int = 5):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.weight = torch.nn.Parameter(torch.randn(width, classes, generator=generator) * 0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


LABELS = torch.randint(5, (3, 7), generator=torch.Generator().manual_seed(4))


def adam(parameters):
    return torch.optim.Adam(parameters, lr=0.01)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def loss(logits, batch):
    """Over the logits, which pass the translator and the LoRA, and over a capture, by the
    probe."""
    found = batch.modules["probe"](batch.captures["model.layers.2"])
    classes = torch.nn.functional.cross_entropy(found[batch.mask], LABELS[batch.mask.cpu()])
    return (logits * WEIGHT).sum() / 100 + classes


def modules() -> dict[str, torch.nn.Module]:
    return {"lens": Translator(), "lora": LoRA(), "probe": Probe()}


def by_hand(
    folder,
) -> tuple[list[float], dict[str, dict[str, torch.Tensor]], dict[str, dict[str, torch.Tensor]]]:
    """(losses, gradients of the first step, weights after the last) beside the unsharded model."""
    model, own, kept, gradients = reference.load(folder), modules(), {}, {}
    model.requires_grad_(False)
    layers = model.model.layers
    layers[1].register_forward_hook(lambda _m, _a, out: own["lens"](out))
    layers[2].mlp.gate_proj.register_forward_hook(lambda _m, _a, out: own["lora"](out))
    layers[2].register_forward_hook(lambda _m, _a, out: kept.update(layer=out) or None)
    optimizer = adam([p for name in sorted(own) for p in own[name].parameters()])
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        logits = model(**BATCH, use_cache=False).logits
        found = own["probe"](kept["layer"])
        value = (logits * WEIGHT).sum() / 100 + torch.nn.functional.cross_entropy(
            found[MASK], LABELS[MASK]
        )
        value.backward()
        losses.append(value.item())
        gradients = gradients or {
            n: {k: p.grad.clone() for k, p in m.named_parameters()} for n, m in own.items()
        }
        optimizer.step()
    return (
        losses,
        gradients,
        {n: {k: p.detach() for k, p in m.named_parameters()} for n, m in own.items()},
    )


def prepare(session) -> None:
    for name, module in modules().items():
        session.modules[name] = module
    session.edit("translate")(lambda x, ctx: ctx.modules["lens"](x))
    session.edit("adapt")(lambda x, ctx: ctx.modules["lora"](x))
    session.hook("model.layers.1", edit="translate", capture="none")
    session.hook("model.layers.2.mlp.gate_proj", edit="adapt", capture="none")
    session.hook("model.layers.2", name="probed")


@pytest.mark.long("pp2xfsdp2")
@pytest.mark.parametrize("layout", layouts.ALL)
def test_modules_train_as_beside_the_unsharded_model(session, tiny, layout, record_property):
    session.load(tiny("llama"), **layout)
    prepare(session)
    losses, gradients, weights = by_hand(tiny("llama"))
    first = session.run(ROWS, loss=loss)
    assert first.loss == pytest.approx(losses[0], rel=1e-5)
    worst = 0.0
    for name, wanted in gradients.items():
        got = session.modules.gradients(name)  # CaptureError if the copies of any rank differed
        assert set(got) == set(wanted)
        for key, gradient in wanted.items():
            assert gradient.abs().max() > 1e-3, "there is something to compare"
            worst = max(worst, relative(got[key], gradient))
    assert worst < TOLERANCE
    model_before = session.parameter("model.layers.0.mlp.gate_proj.weight").tensor().clone()
    got = [session.train_step(ROWS, loss, adam) for _ in range(STEPS)]
    assert got == pytest.approx(losses, rel=1e-4) and losses[-1] < losses[0] - 0.01
    drift = 0.0
    for name, wanted in weights.items():
        for key, parameter in session.modules[name].named_parameters():
            drift = max(drift, (parameter - wanted[key]).abs().max().item())
            moved = (wanted[key] - dict(modules()[name].named_parameters())[key]).abs().max()
            assert moved > 100 * 2e-4
    # Adam divides by the gradient's own size: what was rounding is magnified where it is small
    assert drift < 2e-4
    assert torch.equal(
        session.parameter("model.layers.0.mlp.gate_proj.weight").tensor(), model_before
    )
    print(layout, f"gradients {worst:.1e}, weights after {STEPS} steps {drift:.1e}")
    record_property("worst", f"gradients {worst:.1e}, weights after {STEPS} steps {drift:.1e}")


@pytest.mark.parametrize("layout", layouts.without(layouts.ALL, "tp2xpp2", "pp2xfsdp2"))
def test_parameters_of_the_model_are_trained_if_asked(session, tiny, layout):
    session.load(tiny("llama"), **layout)
    model = reference.load(tiny("llama"))
    optimizer = sgd(list(model.parameters()))
    for _ in range(2):
        optimizer.zero_grad()
        ((model(**BATCH, use_cache=False).logits * WEIGHT).sum() / 100).backward()
        optimizer.step()
        session.train_step(
            ROWS, lambda logits, batch: (logits * WEIGHT).sum() / 100, sgd, parameters="**"
        )
    original = dict(reference.load(tiny("llama")).named_parameters())
    for name, parameter in model.named_parameters():
        moved = (parameter - original[name]).abs().max().item()
        error = (session.parameter(name).tensor() - parameter).abs().max().item()
        assert moved > 1e-4 and error < TOLERANCE * max(1, moved), (name, moved, error)
    with torch.no_grad():
        want = model(**BATCH, use_cache=False).logits[MASK]
    torch.testing.assert_close(session.run(ROWS).logits.tensor()[MASK], want, atol=5e-4, rtol=0)
    if session.engines.size > 1:
        left = session.on_ranks(touched)
        assert all(left) and not any(map(any, left))


def touched() -> list[bool]:
    return [p.requires_grad or p.grad is not None for p in on_engines.runtime().model.parameters()]


@pytest.mark.engines(2)
@pytest.mark.parametrize("layout", [{"tp": 2}, {"pp": 2}, {"fsdp": 2}], ids=lambda d: "x".join(d))
def test_a_failed_step_changes_nothing(session, tiny, layout):
    session.load(tiny("llama"), **layout)
    prepare(session)
    session.train_step(ROWS, loss, adam)
    before = {
        n: {k: v.clone() for k, v in session.modules[n].state_dict().items()}
        for n in session.modules
    }
    session.edit("translate")(lambda x, ctx: ctx.modules["lens"](x) / 0 if ctx.nothing else x)
    with pytest.raises(fk.errors.EditError, match="AttributeError"):
        session.train_step(ROWS, loss, adam)
    session.edit("translate")(lambda x, ctx: ctx.modules["lens"](x))
    with pytest.raises(fk.errors.LossError):
        session.train_step(ROWS, lambda logits, batch: 3, adam)
    for name, state in before.items():
        for key, value in session.modules[name].state_dict().items():
            assert torch.equal(value, state[key])
    assert session.train_step(ROWS, loss, adam) < session.train_step(ROWS, loss, adam) + 10


@pytest.mark.engines(2)
def test_modules_are_saved_and_read_again(session, tiny, tmp_path):
    session.load(tiny("llama"), tp=2)
    prepare(session)
    session.train_step(ROWS, loss, adam)
    trained = session.run(ROWS).logits.tensor().clone()
    path = session.modules.save(tmp_path / "modules.safetensors")
    session.modules["lens"] = Translator(seed=9)
    assert not torch.allclose(session.run(ROWS).logits.tensor(), trained)
    assert sorted(session.modules.load(path)) == ["lens", "lora", "probe"]
    assert torch.equal(session.run(ROWS).logits.tensor(), trained)
    session.modules["lens"] = Translator(width=32)
    with pytest.raises(fk.errors.LoadError, match="lens has other weights"):
        session.modules.load(path)
    assert session.parameter_shapes("lora.*") == {"lora.down": (176, 4), "lora.up": (4, 176)}
    assert (
        "model.norm.weight" in session.parameter_shapes()
        and "model.rotary_emb.inv_freq" not in session.parameter_shapes()
    )


@pytest.mark.engines(2)
def test_what_cannot_be_trained_is_said(session, tiny):
    session.load(tiny("llama"), tp=2)
    errors = fk.errors
    with pytest.raises(errors.HookError, match="nothing to train"):
        session.train_step(ROWS, "next_token")
    with pytest.raises(errors.HookError, match=r"an nn\.Module"):
        session.modules["probe"] = lambda x: x
    session.modules["probe"] = Probe()
    for name in ("nope",):
        with pytest.raises(
            errors.HookError, match="no trainable module is called 'nope'; there are probe"
        ):
            session.modules[name]
    with pytest.raises(errors.LossError, match="could not be made"):
        session.train_step(
            ROWS, "next_token", lambda parameters: torch.optim.SGD(parameters, lr=-1)
        )
    with pytest.raises(errors.HookError, match="returns a torch optimizer"):
        session.train_step(ROWS, "next_token", lambda parameters: 3)
    session.edit("each", per="element")(lambda x, ctx: ctx.modules["probe"](x))
    session.hook("model.layers.1", edit="each", name="each")
    with pytest.raises(errors.EditError, match="per='element', which sees no modules"):
        session.run(ROWS)
    session.unhook()
    session.edit("unknown")(lambda x, ctx: ctx.modules["lens"](x))
    session.hook("model.layers.1", edit="unknown")
    with pytest.raises(
        errors.EditError, match=r"asks for the module 'lens'; there are \['probe'\]"
    ):
        session.run(ROWS)
    del session.modules["probe"]
    assert list(session.modules) == []


@pytest.mark.engines(2)
@pytest.mark.parametrize("layout", [{"tp": 2}, {"pp": 2}], ids=lambda d: "x".join(d))
def test_finite_differences_of_a_module(session, tiny, layout):
    session.load(tiny("llama"), dtype="float64", **layout)
    session.on_ranks(exact_norms)
    lens = Translator().double()
    session.modules["lens"] = lens
    session.edit("translate")(lambda x, ctx: ctx.modules["lens"](x))
    session.hook("model.layers.1", edit="translate", capture="none")
    weight = WEIGHT.double()

    def value() -> float:
        return session.run(ROWS, loss=lambda logits, batch: (logits * weight).sum()).loss

    value()
    gradient = session.modules.gradients("lens")["weight"]
    generator = torch.Generator().manual_seed(5)
    for _ in range(8):
        place = tuple(torch.randint(64, (2,), generator=generator).tolist())
        losses = []
        for by in (1e-5, -2e-5):
            with torch.no_grad():
                lens.weight[place] += by
            session.modules["lens"] = lens
            losses.append(value())
        with torch.no_grad():
            lens.weight[place] += 1e-5
        assert (losses[0] - losses[1]) / 2e-5 == pytest.approx(
            gradient[place].item(), rel=1e-4, abs=1e-7
        )


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("layout", layouts.without(layouts.REAL, "fsdp2"))
def test_a_lens_on_the_real_model_learns_the_same(session, smollm2, layout):
    """Two steps of a translator on a layer's output of SmolLM2."""
    from transformers import AutoTokenizer

    prompt = "The capital of France is Paris, and the capital of Italy is"
    session.load(smollm2, **layout)
    session.modules["lens"] = Translator(576)
    session.edit("translate")(lambda x, ctx: ctx.modules["lens"](x))
    session.hook("model.layers.20", edit="translate", capture="none")
    got = [session.train_step(prompt, "next_token", adam) for _ in range(3)]
    ids = torch.tensor([AutoTokenizer.from_pretrained(smollm2)(prompt)["input_ids"]])
    model, lens = reference.load(smollm2).requires_grad_(False), Translator(576)
    model.model.layers[20].register_forward_hook(lambda _m, _a, out: lens(out))
    optimizer, want = adam(list(lens.parameters())), []
    for _ in range(3):
        optimizer.zero_grad()
        value = torch.nn.functional.cross_entropy(
            model(ids, use_cache=False).logits[0, :-1], ids[0, 1:]
        )
        value.backward()
        want.append(value.item())
        optimizer.step()
    assert got == pytest.approx(want, rel=1e-3) and want[2] < want[0]
