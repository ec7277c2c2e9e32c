"""What an edit sees of an activation, and the edits that need no definition."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from flexkernel.boxes import Box
from flexkernel.errors import EditError
from flexkernel.wire import ShapeFormula

__all__ = ["PRESETS", "Context", "EditModules", "EditPart"]

GOLDEN = 0x9E3779B97F4A7C15  # spreads the seeds of neighbouring columns


@dataclass
class Context:
    """What an edit gets beside the activation.

    module: its name. save: a dict that lives on between runs, on the rank where the edit runs.
    step: of the generation. tokens: ids (B, S) of the positions that x has: in a generation the
    prompt's, then at each step the newest token's; at @k and @v all so far. mask: (B, S) bool,
    False on pads and after a row's end. positions: (B, S), of each token in its row. All tensors
    are on the activation's device."""

    module: str
    # without a default: nnsight gives every object a `save`, which would be it
    save: dict[str, Any] = field()
    tokens: torch.Tensor
    mask: torch.Tensor
    positions: torch.Tensor
    step: int = 0
    modules: Mapping[str, torch.nn.Module] = field(default_factory=dict)


class EditModules(dict[str, torch.nn.Module]):
    """The trainable modules as an edit sees them. An edit of shards sees none: each rank would
    count the module's gradient."""

    def __init__(self, modules: Mapping[str, torch.nn.Module], edit: str, per: str):
        super().__init__()
        if per != "element":
            self.update(modules)
        self.edit = edit
        self.names = list(modules)

    def __missing__(self, name: str) -> torch.nn.Module:
        if name in self.names:
            raise EditError(
                f"edit {self.edit!r} is per='element', which sees no modules: make it 'whole' or "
                "'row'"
            )
        raise EditError(
            f"edit {self.edit!r} asks for the module {name!r}; there are {self.names or 'none'}"
        )


@dataclass(frozen=True)
class EditPart:
    """The part of an activation that an edit sees.

    whole: the shape of all of it. box: the part. columns: which positions of the text it has.
    seed: of what a preset draws."""

    whole: tuple[int, ...]
    box: Box
    formula: ShapeFormula
    context: Context
    seed: int
    columns: range
    generating: bool

    def noise(self) -> torch.Tensor:
        """Normal noise for the whole activation: float32 of shape `whole`, on the CPU.

        In a generation each position of the text has a seed of its own, so that it gets the same
        noise at every step that sees it."""
        shape = list(self.whole)
        dim = self.formula.positions
        folded = self.formula.folded
        if folded is not None:
            dim = folded + 1
            rows = shape[folded] // len(self.columns)
            shape[folded:dim] = [rows, len(self.columns)]
        if not self.generating or dim is None:
            return normal(self.whole, self.seed)
        of_one_column = [*shape[:dim], *shape[dim + 1 :]]
        columns = [
            normal(of_one_column, (self.seed + column * GOLDEN) & (2**63 - 1))
            for column in self.columns
        ]
        return torch.stack(columns, dim).reshape(self.whole)


def normal(shape: tuple[int, ...] | list[int], seed: int) -> torch.Tensor:
    """Normal noise of this shape, float32 on the CPU."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- presets --------------------------------------------------------------------------
#
# x: what a rank holds, or the whole, of any shape. value: what the hook gives the preset: a number,
# or a tensor that is already cut to x's part. Each returns a tensor of x's shape, dtype and device.


def zero(x: torch.Tensor, _value: Any, _part: EditPart) -> torch.Tensor:
    """Zeros of x's shape."""
    return torch.zeros_like(x)


def scale(x: torch.Tensor, value: Any, _part: EditPart) -> torch.Tensor:
    """x of any shape, times the value."""
    return x * value


def add(x: torch.Tensor, value: Any, _part: EditPart) -> torch.Tensor:
    """x of any shape, plus the value."""
    return x + value


def replace(x: torch.Tensor, value: Any, _part: EditPart) -> torch.Tensor:
    """The value in every place of x's shape."""
    return torch.zeros_like(x) + value


def clamp(x: torch.Tensor, value: Any, _part: EditPart) -> torch.Tensor:
    """x of any shape, between value's two numbers."""
    return x.clamp(*value)


def noise(x: torch.Tensor, value: Any, part: EditPart) -> torch.Tensor:
    """x of any shape, plus normal noise of this standard deviation. It is drawn for the whole, so
    that it does not depend on the layout."""
    return x + (part.box.cut(part.noise()) * value).to(x)


def patch(x: torch.Tensor, value: Any, _part: EditPart) -> torch.Tensor:
    """The value, a tensor of x's shape; x itself where a generation goes on after the source's
    end."""
    if value is None:
        return x
    return value.to(x)


def mean(x: torch.Tensor, _value: Any, part: EditPart) -> torch.Tensor:
    """The mean over rows and positions, pads left out, in every place of x's shape: (B, S, ...) or
    (B*S, ...), or with these dims elsewhere."""
    formula = part.formula
    weight = formula.broadcast(part.context.mask)
    if weight is None:
        raise EditError(f"mean at {part.context.module}: {formula} has no positions")
    weight = weight.to(x)
    dims = [d for d in (formula.rows, formula.positions, formula.folded) if d is not None]
    total = (x * weight).sum(dims, keepdim=True)
    return (total / weight.sum()).expand_as(x)


def project_out(x: torch.Tensor, value: torch.Tensor, _part: EditPart) -> torch.Tensor:
    """x (..., D) without its part along the direction `value` (D,)."""
    unit = value / value.norm()
    return x - (x @ unit)[..., None] * unit


# name → (what it sees, function)
PRESETS: dict[str, tuple[str, Callable[[torch.Tensor, Any, EditPart], torch.Tensor]]] = {
    "zero": ("element", zero),
    "scale": ("element", scale),
    "add": ("element", add),
    "set": ("element", replace),
    "clamp": ("element", clamp),
    "noise": ("element", noise),
    "patch": ("element", patch),
    "mean": ("whole", mean),
    "project_out": ("row", project_out),
}
