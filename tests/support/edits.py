"""Edits, and what each does to the unsharded module's tensor by plain torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from tests.support.rows import MASK

__all__ = ["CASES", "TOLERANCE", "VECTOR", "Case", "at_last", "by_hand", "define", "mix"]

TOLERANCE = 2e-5
REAL = MASK[..., None].float()


def mix(x, ctx=None):
    """Mixes columns and positions: it needs the whole."""
    return x.roll(3, -1) * 0.5 + x.mean(1, keepdim=True)


@dataclasses.dataclass(eq=False)  # one is itself alone: a key of what is kept
class Case:
    """A hook with an edit, and what it does to the unsharded module's tensor."""

    name: str
    module: str
    how: dict[str, Any]
    truth: Callable[[torch.Tensor], torch.Tensor]
    at: str = "output"


def by_hand(model: torch.nn.Module, case: Case) -> None:
    """The case's edit as a torch hook on the unsharded model."""
    module = model.get_submodule(case.module)
    if case.at == "input":
        module.register_forward_pre_hook(lambda _m, args: (case.truth(args[0]), *args[1:]))
        return

    def hook(_module, _args, out):
        return (case.truth(out[0]), *out[1:]) if isinstance(out, tuple) else case.truth(out)

    module.register_forward_hook(hook)


def define(session) -> None:
    session.edit("mix")(lambda x, ctx: x.roll(3, -1) * 0.5 + x.mean(1, keepdim=True))
    session.edit("mix_row", per="row")(lambda x, ctx: x.roll(3, -1) * 0.5 + x.mean(1, keepdim=True))


VECTOR = torch.linspace(-1, 1, 64)
WIDE = torch.linspace(-1, 1, 176)


def at_last(x: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    x[:, -1] = 0
    return x


def without(x: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    unit = unit / unit.norm()
    return x - (x @ unit)[..., None] * unit


CASES = [
    Case("zero sharded", "model.layers.1.mlp.gate_proj", {"edit": "zero"}, torch.zeros_like),
    Case("scale whole", "model.layers.1.mlp", {"edit": "scale", "value": -2.0}, lambda x: -2 * x),
    Case(
        "add sharded",
        "model.layers.2.mlp.act_fn",
        {"edit": "add", "value": WIDE},
        lambda x: x + WIDE,
    ),
    Case("add residual", "model.layers.1", {"edit": "add", "value": VECTOR}, lambda x: x + VECTOR),
    Case(
        "set",
        "model.layers.0.mlp",
        {"edit": "set", "value": 0.25},
        lambda x: torch.full_like(x, 0.25),
    ),
    Case(
        "clamp",
        "model.layers.1.mlp.up_proj",
        {"edit": "clamp", "value": (-0.1, 0.1)},
        lambda x: x.clamp(-0.1, 0.1),
    ),
    Case(
        "project_out",
        "model.layers.2",
        {"edit": "project_out", "value": VECTOR},
        lambda x: without(x, VECTOR),
    ),
    Case(
        "project_out sharded",
        "model.layers.2.mlp.gate_proj",
        {"edit": "project_out", "value": WIDE},
        lambda x: without(x, WIDE),
    ),
    Case(
        "mean",
        "model.layers.1.mlp",
        {"edit": "mean"},
        lambda x: ((x * REAL).sum((0, 1), keepdim=True) / REAL.sum()).expand_as(x),
    ),
    Case("user's, sharded", "model.layers.1.mlp.gate_proj", {"edit": "mix"}, mix),
    Case("user's, whole", "model.layers.1", {"edit": "mix"}, mix),
    Case("user's, a tuple", "model.layers.2.self_attn", {"edit": "mix"}, mix),
    Case(
        "user's, of an input",
        "model.layers.2.mlp.down_proj",
        {"edit": "mix", "at": "input"},
        mix,
        at="input",
    ),
    Case("user's, per row", "model.layers.1.mlp.up_proj", {"edit": "mix_row"}, mix),
    Case("last position", "model.layers.2", {"edit": "zero", "positions": [-1]}, at_last),
    Case(
        "neurons",
        "model.layers.1.mlp.act_fn",
        {"edit": "zero", "neurons": [0, 100, 175]},
        lambda x: x.index_fill(-1, torch.tensor([0, 100, 175]), 0.0),
    ),
]
