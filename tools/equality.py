"""What a sharded model does, beside the unsharded one, under every layout: `python -m
tools.equality [engines ...]`.

Rows: edits, gradients, a generation, parameters, a step of training; columns: layouts. A cell is
the largest error, relative to the scale of what is compared; before it, each edit must have moved
the result by 100 × the tolerance."""

from __future__ import annotations

import functools
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.support import models, reference

ARCH = "llama_six"
TOLERANCE = 2e-5
HIDDEN, WIDE, VOCAB = 96, 192, 256
BATCH = models.ids_and_mask([5, 7, 6])  # three rows: uneven over two groups of ranks
ROWS = models.rows(BATCH)
MASK = BATCH["attention_mask"].bool()
LAYOUTS: dict[int, list[dict[str, int]]] = {
    2: [{"tp": 2}, {"pp": 2}, {"fsdp": 2}, {"dp": 2}],
    3: [{"tp": 3}],
    4: [{"tp": 2, "pp": 2}, {"tp": 2, "fsdp": 2}, {"pp": 2, "fsdp": 2}],
    8: [{"tp": 2, "pp": 2, "dp": 2}],
}
VECTOR, LONG = torch.linspace(-1, 1, HIDDEN), torch.linspace(-1, 1, WIDE)
WEIGHT = torch.randn(3, 7, VOCAB, generator=torch.Generator().manual_seed(1)) * MASK[..., None]
NEW = 32


def weighed(logits, batch=None):
    return (logits * WEIGHT).sum() / 100


# --- edits: name → (module, how it is hooked, what it does to the unsharded module's te

REAL = MASK[..., None].float()


def mix(x, ctx=None):
    return x.roll(3, -1) * 0.5 + x.mean(1, keepdim=True)


def without(x, unit):
    unit = unit / unit.norm()
    return x - (x @ unit)[..., None] * unit


def at_last(x):
    x = x.clone()
    x[:, -1] = 0
    return x


GATE, UP, ACT, DOWN = (
    f"model.layers.1.mlp.{n}" for n in ("gate_proj", "up_proj", "act_fn", "down_proj")
)
MLP, LAYER = "model.layers.1.mlp", "model.layers.2"
EDITS: dict[str, tuple[str, dict[str, Any], Callable[[torch.Tensor], torch.Tensor]]] = {
    "zero": (GATE, {"edit": "zero"}, torch.zeros_like),
    "mean": (
        MLP,
        {"edit": "mean"},
        lambda x: ((x * REAL).sum((0, 1), keepdim=True) / REAL.sum()).expand_as(x),
    ),
    "scale": (MLP, {"edit": "scale", "value": -2.0}, lambda x: -2 * x),
    "add": (LAYER, {"edit": "add", "value": VECTOR}, lambda x: x + VECTOR),
    "add to shards": (ACT, {"edit": "add", "value": LONG}, lambda x: x + LONG),
    "set": (MLP, {"edit": "set", "value": 0.25}, lambda x: torch.full_like(x, 0.25)),
    "project_out": (GATE, {"edit": "project_out", "value": LONG}, lambda x: without(x, LONG)),
    "clamp": (UP, {"edit": "clamp", "value": (-0.1, 0.1)}, lambda x: x.clamp(-0.1, 0.1)),
    "last position": (LAYER, {"edit": "zero", "positions": [-1]}, at_last),
    "neurons": (
        ACT,
        {"edit": "zero", "neurons": [0, 100]},
        lambda x: x.index_fill(-1, torch.tensor([0, 100]), 0.0),
    ),
    "yours, whole": (LAYER, {"edit": "mix"}, mix),
    "yours, of shards": (GATE, {"edit": "mix"}, mix),
    "yours, by row": (UP, {"edit": "mix_row"}, mix),
}


def hooked(model: torch.nn.Module, module: str, function: Callable) -> Any:
    return model.get_submodule(module).register_forward_hook(lambda _m, _a, out: function(out))


@functools.cache
def edited(folder: Path, name: str | None) -> torch.Tensor:
    """The unsharded model's logits under that edit, at real positions."""
    model = reference.load(folder)
    if name is not None:
        module, _, function = EDITS[name]
        hooked(model, module, function)
    with torch.no_grad():
        return model(**BATCH, use_cache=False).logits[MASK]


def edit_error(session: Any, folder: Path, name: str) -> float:
    module, how, _ = EDITS[name]
    session.edit("mix")(lambda x, ctx: x.roll(3, -1) * 0.5 + x.mean(1, keepdim=True))
    session.edit("mix_row", per="row")(lambda x, ctx: x.roll(3, -1) * 0.5 + x.mean(1, keepdim=True))
    base, want = edited(folder, None), edited(folder, name)
    assert (want - base).abs().max() > 100 * TOLERANCE, f"{name} has to do something"
    session.hook(module, name="edit", **how)
    return relative(session.run(ROWS).logits.tensor()[MASK], want)


def head_error(session: Any, folder: Path) -> float:
    """One head zeroed: of what goes into the output projection."""
    model = reference.load(folder)
    projection = model.get_submodule("model.layers.1.self_attn.o_proj")
    zeroed = torch.arange(5 * 8, 6 * 8)
    projection.register_forward_pre_hook(lambda _m, args: (args[0].index_fill(-1, zeroed, 0.0),))
    with torch.no_grad():
        want = model(**BATCH, use_cache=False).logits[MASK]
    assert (want - edited(folder, None)).abs().max() > 100 * TOLERANCE
    session.hook("model.layers.1.self_attn.@z", edit="zero", heads=[5])
    return relative(session.run(ROWS).logits.tensor()[MASK], want)


def patch_error(session: Any, folder: Path) -> float:
    """A residual of one batch patched into a run of another."""
    other = [[(i * 7 + 11) % 250 + 3 for i in row] for row in ROWS]
    ids = BATCH["input_ids"].clone()
    for r, row in enumerate(other):
        ids[r, -len(row) :] = torch.tensor(row)
    model, kept = reference.load(folder), []
    handle = hooked(model, LAYER, lambda out: kept.append(out.clone()) or None)
    with torch.no_grad():
        model(**(BATCH | {"input_ids": ids}), use_cache=False)
        handle.remove()
        hooked(model, LAYER, lambda _out: kept[0])
        want = model(**BATCH, use_cache=False).logits[MASK]
    assert (want - edited(folder, None)).abs().max() > 100 * TOLERANCE
    session.hook(LAYER, name="source")
    source = session.run(other)[LAYER]
    session.unhook()
    session.hook(LAYER, edit="patch", value=source)
    return relative(session.run(ROWS).logits.tensor()[MASK], want)


# --- gradients, generation, parameters, training --------------------------------------


@functools.cache
def gradients(folder: Path) -> reference.Gradients:
    return reference.gradients(reference.load(folder), BATCH, weighed)


def activation_gradients(session: Any, folder: Path) -> float:
    session.hook("**", at="grad_output", name="outputs")
    run, want, errors = session.run(ROWS, loss=weighed), gradients(folder), []
    for capture in run:
        expected = want.outputs.get((capture.key.module, capture.key.index))
        expected = want.outputs.get((capture.key.module, "")) if expected is None else expected
        if expected is not None and "rotary" not in capture.key.module:
            errors.append(relative(capture.tensor(), expected))
    assert len(errors) > 50, "there is something to compare"
    return max(errors)


def parameter_gradients(session: Any, folder: Path) -> float:
    session.hook("**", at="param_grad")
    run, want = session.run(ROWS, loss=weighed), gradients(folder)
    assert len(run) == len(want.parameters) > 30
    return max(relative(c.tensor(), want.parameters[c.key.module]) for c in run)


def edited_parameter_gradients(session: Any, folder: Path) -> float:
    """Divided by the norm of the whole, which no shard knows."""
    session.edit("unit")(lambda x, ctx: x / x.norm())
    session.hook("model.layers.*.*.*.weight", at="param_grad", edit="unit")
    run, want = session.run(ROWS, loss=weighed), gradients(folder)
    edited = {c.key.module: c.tensor() for c in run if c.key.at == "param_grad"}
    assert len(edited) == 28 and all(
        (want.parameters[n].norm() - 1).abs() > 100 * TOLERANCE for n in edited
    )
    return max(
        relative(got, want.parameters[n] / want.parameters[n].norm()) for n, got in edited.items()
    )


def generation(session: Any, folder: Path) -> float:
    """32 greedy tokens, equal to the unsharded model's for each row alone; the error is of the
    layers at each step."""
    model, want = reference.load(folder), []
    for row in ROWS:
        ids = torch.tensor([row])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW,
            do_sample=False,
            pad_token_id=0,
        )
        want.append(out[0, len(row) :].tolist())
    session.hook("model.layers.*")
    run = session.generate(ROWS, max_new_tokens=NEW)
    assert run.new_ids == want, "the tokens are not those of the unsharded model"
    ids, mask = torch.tensor(run.ids)[:, : run.mask.shape[1]], run.mask.long()
    truth = reference.reference(model, ids, mask, (mask.cumsum(-1) - 1).clamp(min=0)).outputs
    captures = list(run)
    assert len(captures) == 4
    return max(
        relative(c.tensor()[run.mask], truth[c.key.module, 0, ""][run.mask]) for c in captures
    )


def parameters(session: Any, folder: Path) -> float:
    named = dict(reference.load(folder).named_parameters(remove_duplicate=False))
    return max(relative(session.parameter(name).tensor(), p.detach()) for name, p in named.items())


class Lens(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.eye(HIDDEN) * 0.1)

    def forward(self, x):
        return x + x @ self.weight


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def trainable_step(session: Any, folder: Path) -> float:
    """The weight of a module in an edit, after one step."""
    model, lens = reference.load(folder).requires_grad_(False), Lens()
    hooked(model, LAYER, lens)
    optimizer = sgd(list(lens.parameters()))
    weighed(model(**BATCH, use_cache=False).logits).backward()
    optimizer.step()
    session.modules["lens"] = Lens()
    session.edit("translate")(lambda x, ctx: ctx.modules["lens"](x))
    session.hook(LAYER, edit="translate", capture="none")
    session.train_step(ROWS, weighed, sgd)
    assert (lens.weight - Lens().weight).abs().max() > 100 * TOLERANCE
    return relative(session.modules["lens"].weight.detach(), lens.weight.detach())


def parameters_step(session: Any, folder: Path) -> float:
    """All of the model's own parameters, after one step. Last: it changes the loaded model."""
    model = reference.load(folder)
    optimizer = sgd(list(model.parameters()))
    weighed(model(**BATCH, use_cache=False).logits).backward()
    optimizer.step()
    session.train_step(ROWS, weighed, sgd, parameters="**")
    return max(
        relative(session.parameter(n).tensor(), p.detach()) for n, p in model.named_parameters()
    )


ROWS_OF_TABLE: dict[str, Callable[[Any, Path], float]] = {
    **{f"edit: {name}": functools.partial(edit_error, name=name) for name in EDITS},
    "edit: one head": head_error,
    "edit: patch": patch_error,
    "gradients of activations": activation_gradients,
    "gradients of parameters": parameter_gradients,
    "edited gradients of parameters": edited_parameter_gradients,
    f"{NEW} generated tokens": generation,
    "parameters read": parameters,
    "a trainable module's step": trainable_step,
    "the model's own step": parameters_step,
}


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    assert got.shape == want.shape and want.abs().max() > 0
    error = (got - want).abs().max() / want.abs().max()
    assert error == error, "NaN"
    return error.item()


def column(session: Any, folder: Path, layout: dict[str, int]) -> dict[str, float | str]:
    """row → largest error, or what was refused and why."""
    session.load(folder, **layout)
    found: dict[str, float | str] = {}
    for row, measure in ROWS_OF_TABLE.items():
        if session.hooks.hook_set.hooks:
            session.unhook()
        try:
            found[row] = measure(session, folder)
        except Exception as error:
            found[row] = f"{type(error).__name__}: {error}"
    return found


def title(layout: dict[str, int]) -> str:
    return " × ".join(f"{k.upper()} {v}" for k, v in layout.items())


def table(columns: dict[str, dict[str, float | str]]) -> str:
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for row in ROWS_OF_TABLE:
        cells = [c[row] for c in columns.values()]
        lines.append(
            f"| {row} | "
            + " | ".join(f"{c:.1e}" if isinstance(c, float) else c for c in cells)
            + " |"
        )
    return "\n".join(lines)


def main() -> None:
    import flexkernel as fk

    folder = models.tiny(ARCH, Path(tempfile.gettempdir()) / "flexkernel-tiny")
    columns: dict[str, dict[str, float | str]] = {}
    for world in [int(a) for a in sys.argv[1:]] or list(LAYOUTS):
        with fk.start(world) as session:
            for layout in LAYOUTS[world]:
                columns[title(layout)] = column(session, folder, layout)
                print(title(layout), "done", file=sys.stderr, flush=True)
    print(table(columns))


if __name__ == "__main__":
    main()
