"""The graph that one rank's forward keeps, and what its backward begins from."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from flexkernel.boxes import Box
from flexkernel.engine.compat import stage_edges, without_gradient_sync
from flexkernel.errors import HookError

__all__ = ["Tape", "graph_of", "trainable", "watched"]


@dataclass
class End:
    """One end of this rank's graph: its part of a capture, with its graph. shard: which part of the
    whole that is. counts: whether its gradient counts on this rank."""

    local: torch.Tensor
    shard: Box
    counts: bool


@dataclass
class Tape:
    """What one rank's backward begins from.

    graph: whether the forward keeps a graph at all. ends: by their index in the plan. sent,
    received: what went to the next pipeline stage and what came from the one before."""

    graph: bool
    ends: dict[int, End] = field(default_factory=dict)
    sent: torch.Tensor | None = None
    received: torch.Tensor | None = None

    def forget(self) -> None:
        """Let go of the graph. Its hooks know the recording, which knows this tape: a ring that no
        collector sees through, and that would hold the model and its groups for ever."""
        self.ends.clear()
        self.sent = None
        self.received = None

    def end(self, i: int, local: torch.Tensor, shard: Box, counts: bool) -> None:
        """Note where the gradient of planned capture i comes in.

        local: this rank's part of it, any shape, with its graph. counts: False on a rank whose rows
        nobody wants, and on all but the first of the groups of ranks that hold the same."""
        self.ends[i] = End(local, shard, counts)


@contextlib.contextmanager
def graph_of(
    model: torch.nn.Module, tape: Tape | None, parameters: Sequence[torch.nn.Parameter]
) -> Iterator[None]:
    """Within it a forward keeps its graph on the tape, if the tape says so, and these parameters
    get a gradient. Else it keeps no graph."""
    if tape is None or not tape.graph:
        with torch.no_grad():
            yield
        return
    frozen = [parameter for parameter in parameters if not parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        with torch.enable_grad(), stage_edges(model, tape), without_gradient_sync(model):
            yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def watched(
    tensor: torch.Tensor, arrived: Callable[[torch.Tensor], torch.Tensor | None]
) -> torch.Tensor:
    """A view of the tensor, of the same shape, dtype and device, whose gradient goes to `arrived`.
    What that returns goes on in the gradient's place.

    It is a view since the value may have other uses, whose gradients are not this module's.
    HookError: the tensor can have no gradient."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        raise HookError(f"a value of {tensor.dtype} has no gradient")
    if not tensor.requires_grad:
        tensor = tensor.detach().requires_grad_()
    view = tensor.view_as(tensor)
    view.register_hook(arrived)
    return view


def trainable(modules: Mapping[str, torch.nn.Module]) -> list[torch.nn.Parameter]:
    """The parameters of these modules that are trained, in an order that is the same on every
    rank."""
    return [
        parameter
        for name in sorted(modules)
        for parameter in modules[name].parameters()
        if parameter.requires_grad
    ]
