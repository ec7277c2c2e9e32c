"""The gradients of parameters: summed so that they are the unsharded model's, read, edited, and
let go.

A parameter's gradient lies as the parameter does. Every rank must come to each of these functions
that says so, also one that does not hold the parameter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from flexkernel.boxes import Box
from flexkernel.engine.place.staging import digest
from flexkernel.engine.ranks.gather import receive, send, wait
from flexkernel.engine.runtime import Runtime
from flexkernel.errors import CaptureError, PlacementError
from flexkernel.wire import CaptureKey, HookSpec, ShardRecord

from .parameters import owner_of, placed

__all__ = [
    "edit_gradients",
    "forget_gradients",
    "parameter_of",
    "sum_parameters",
    "tied",
    "write_gradient",
]


def parameter_of(runtime: Runtime, name: str) -> torch.nn.Parameter | None:
    """The parameter itself, sharded as it is; None where this rank has none of that name."""
    module = owner_of(runtime, name)
    return None if module is None else module._parameters.get(name.rpartition(".")[2])


def tied(names: Sequence[str], groups: Sequence[Sequence[str]]) -> list[str]:
    """These names, and every other name of a parameter that one of them is."""
    found = dict.fromkeys(names)
    for group in groups:
        if set(group) & set(names):
            found.update(dict.fromkeys(group))
    return list(found)


def sum_parameters(runtime: Runtime, names: Sequence[str], timeout_s: float) -> None:
    """Make the gradients of these parameters lie as the parameters do, and whole sums: over the
    groups of rows where nothing else has summed them, over the first and the last stage where they
    share one. All ranks must call."""
    owned = list(
        {id(p): p for name in names if (p := parameter_of(runtime, name)) is not None}.values()
    )
    for parameter in owned:
        gradient = parameter.grad
        if isinstance(gradient, DTensor) and gradient.placements != parameter.placements:
            parameter.grad = gradient.redistribute(placements=parameter.placements)
        elif runtime.part.info.layout.batch_groups > 1 and not isinstance(parameter, DTensor):
            parameter.grad = torch.zeros_like(parameter) if gradient is None else gradient
            work = dist.all_reduce(
                parameter.grad, group=runtime.part.groups["batch"], async_op=True
            )
            wait(work, timeout_s, "a gradient")
    last = runtime.part.info.layout.pp - 1
    stage = runtime.part.info.layout.coordinate(runtime.rank).pp
    if (
        last
        and stage in (0, last)
        and any(set(group) & set(names) for group in runtime.part.info.tied)
    ):
        weight = runtime.part.model.get_input_embeddings().weight
        if any(weight is parameter for parameter in owned):
            both_ends(runtime, weight, last if stage == 0 else -last, timeout_s)


def both_ends(runtime: Runtime, weight: torch.nn.Parameter, step: int, timeout_s: float) -> None:
    """Tied embeddings are two copies of one parameter, on the first stage and on the last: both
    get the sum."""
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    mine = weight.grad.to_local() if isinstance(weight.grad, DTensor) else weight.grad
    if step > 0:
        send(runtime.part.model, mine, step, timeout_s)
    other = receive(runtime.part.model, torch.empty_like(mine), step, timeout_s)
    if step < 0:
        send(runtime.part.model, mine, step, timeout_s)
    mine.copy_(mine + other if step > 0 else other + mine)


def edit_gradients(runtime: Runtime, recording: Any) -> None:
    """Make the edits of parameters' gradients, each on the whole of one, in the order of their
    hooks. All ranks.

    A parameter of several names is edited once a hook. EditError: no gradient reached it, or as an
    edit raises."""
    for hook, names in recording.of_parameters(runtime):
        done: set[str] = set()
        for name in names if hook.edit is not None else ():
            if name not in done:
                same = tied([name], runtime.part.info.tied)
                done.update(same)
                edit_gradient(runtime, recording.editor, hook, name, same)


def edit_gradient(
    runtime: Runtime, editor: Any, hook: HookSpec, name: str, same: Sequence[str]
) -> None:
    """One parameter's, which this rank may hold under another of its names, or not at all."""
    mine = next((n for n in same if parameter_of(runtime, n) is not None), None)
    if mine is None:
        shape = tuple(runtime.part.info.parameters[name])
        nothing = Box.nothing(len(shape))
        empty = torch.empty(
            [0] * len(shape), dtype=getattr(torch, runtime.part.info.dtype), device=runtime.device
        )
        editor.edit_parameter(hook, name, empty, ShardRecord("none", "none", shard=nothing))
        return
    gradient, seen = lying(runtime, mine)
    new = editor.edit_parameter(hook, name, gradient, seen)
    made_nan = bool(new.isnan().any()) and not bool(gradient.isnan().any())
    editor.note(CaptureKey(hook.key, mine, hook.at, "", 0), seen, made_nan)
    with torch.no_grad():
        gradient.copy_(new)


def lying(runtime: Runtime, name: str) -> tuple[torch.Tensor, ShardRecord]:
    """What this rank holds of a parameter's gradient, in its own memory, and which part of the
    whole that is.

    CaptureError: the loss does not depend on it."""
    module, parameter = owner_of(runtime, name), parameter_of(runtime, name)
    assert module is not None and parameter is not None
    found, _ = placed(runtime, name, module, parameter.detach())
    gradient = parameter.grad
    if gradient is None:
        raise CaptureError(f"{name}: no gradient reached it, the loss does not depend on it")
    local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
    return local, ShardRecord(
        found.evidence, found.placement, digest(local), found.shard, found.shard
    )


def forget_gradients(runtime: Runtime, names: Sequence[str]) -> None:
    """Give the memory of these parameters' gradients back."""
    for name in names:
        parameter = parameter_of(runtime, name)
        if parameter is not None:
            parameter.grad = None


def write_gradient(runtime: Runtime, name: str, whole: torch.Tensor) -> ShardRecord | None:
    """Copy what this rank holds of a parameter's gradient into its place; None where it does not
    hold the parameter.

    CaptureError: the loss does not depend on it."""
    if parameter_of(runtime, name) is None:
        return None
    gradient, seen = lying(runtime, name)
    if gradient.dtype != whole.dtype:
        raise PlacementError(
            f"{name}: its gradient is {gradient.dtype}, where {whole.dtype} was planned"
        )
    # copies write the same numbers, as their digests show
    seen.shard.put(gradient, whole)
    return seen
