"""The gradients of a run, from the loss to the last edit.

The loss is computed once, on rank 0, and its gradients of the captures go to the ranks that hold
these; each rank makes one backward from what it holds. Over tp, if every rank has all of a value,
every rank gets all of its gradient; over dp and fsdp each rank gets its rows'; the stages of a
pipeline go back one after another. Nothing is averaged and nothing is scaled.

A parameter's gradient lies as the parameter does.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from flexkernel.boxes import Box
from flexkernel.engine.place.staging import digest
from flexkernel.engine.ranks.gather import receive, send, wait
from flexkernel.engine.runtime import Runtime
from flexkernel.errors import CaptureError, PlacementError
from flexkernel.sites import BEFORE
from flexkernel.wire import CaptureKey, HookSpec, ShardRecord

from . import train
from .autograd import Tape, trainable
from .edits import Editor
from .parameters import get, local_shard, owned, parameter_of
from .recording import Recording, failure
from .seeds import loss_and_seeds

__all__ = ["differentiate", "forget_gradients", "parameters_of"]


def differentiate(runtime: Runtime, recording: Recording, tape: Tape, names: Sequence[str]) -> None:
    """The loss of a run, and all gradients that its hooks and its training ask for. All ranks must
    call.

    tape: of the forward. names: the parameters that get a gradient. LossError: the loss failed;
    EditError: an edit of a gradient did."""
    plan = recording.context.plan
    for parameter in trainable(runtime.trainables.modules):
        parameter.grad = None
    recording.loss, seeds = loss_and_seeds(runtime, recording)
    if tape.graph:
        go_back(runtime, tape, seeds, plan.timeout_s)
    sum_parameters(runtime, names, plan.timeout_s)
    train.sum_modules(runtime, plan.timeout_s)
    keep_parameters(runtime, recording, before=True)
    for hook, hooked in parameter_hooks(runtime, recording):
        if hook.edit is not None:
            edit_gradients(runtime, recording.editor, hook, hooked)
    keep_parameters(runtime, recording, before=False)
    if plan.training is not None:
        train.step(runtime, plan, plan.training)


# --- the backward ---------------------------------------------------------------------


def go_back(runtime: Runtime, tape: Tape, seeds: dict[int, torch.Tensor], timeout_s: float) -> None:
    """This rank's backward. All ranks must call.

    seeds: index of a capture → its whole gradient, of the capture's shape. A pipeline stage first
    waits for the gradient of what it sent, then sends that of what it got: zeros where nothing
    depends on it, since the stage before waits."""
    ends: list[torch.Tensor] = []
    gradients: list[torch.Tensor] = []
    for i, end in tape.ends.items():
        if i in seeds and end.local.requires_grad:
            gradient = end.shard.cut(seeds[i]).to(end.local.device)
            gradient = gradient.clone()
            if not end.counts:
                gradient = torch.zeros_like(end.local)
            ends.append(end.local)
            gradients.append(gradient)
    model = runtime.part.model
    if tape.sent is not None:
        gradient = receive(model, torch.empty_like(tape.sent), +1, timeout_s)
        if tape.sent.requires_grad:
            ends.append(tape.sent)
            gradients.append(gradient)
    if ends:
        torch.autograd.backward(ends, gradients)
    if tape.received is not None:
        received = tape.received.grad
        if received is None:
            received = torch.zeros_like(tape.received)
        send(model, received, -1, timeout_s)


# --- parameters -----------------------------------------------------------------------


def parameters_of(runtime: Runtime, recording: Recording) -> list[str]:
    """The parameters of which a run needs the gradients: hooked or trained, and each under all of
    its names."""
    plan = recording.context.plan
    hooked = [name for _, names in parameter_hooks(runtime, recording) for name in names]
    if plan.training is not None:
        hooked.extend(plan.training.parameters)
    return with_tied(hooked, runtime.part.info.tied)


def parameter_hooks(
    runtime: Runtime, recording: Recording
) -> list[tuple[HookSpec, tuple[str, ...]]]:
    """The run's hooks on parameters' gradients, and the parameters that each names."""
    part = runtime.part
    return [
        (hook, part.planner.names(hook))
        for hook in part.hook_set.hooks
        if hook.of == "param" and hook.key in recording.active
    ]


def with_tied(names: Sequence[str], tied: Sequence[Sequence[str]]) -> list[str]:
    """These names, and every other name of a parameter that one of them is.

    >>> with_tied(["a"], [("a", "b"), ("c", "d")])
    ['a', 'b']
    """
    result = dict.fromkeys(names)
    for group in tied:
        if not set(group).isdisjoint(names):
            result.update(dict.fromkeys(group))
    return list(result)


def sum_parameters(runtime: Runtime, names: Sequence[str], timeout_s: float) -> None:
    """Make the gradients of these parameters whole sums, which lie as the parameters do: over the
    groups of rows where nothing else has summed them, over the first and the last stage where they
    share one. All ranks must call."""
    part = runtime.part
    parameters = owned(runtime, names)
    for parameter in parameters:
        gradient = parameter.grad
        if isinstance(gradient, DTensor) and gradient.placements != parameter.placements:
            parameter.grad = gradient.redistribute(placements=parameter.placements)
        elif part.info.layout.batch_groups > 1 and not isinstance(parameter, DTensor):
            if gradient is None:
                parameter.grad = torch.zeros_like(parameter)
            work = dist.all_reduce(parameter.grad, group=part.groups["batch"], async_op=True)
            wait(work, timeout_s, "a gradient")
    last = part.info.layout.pp - 1
    stage = part.info.layout.coordinate(runtime.rank).pp
    if last == 0 or stage not in (0, last):
        return
    if any(not set(group).isdisjoint(names) for group in part.info.tied):
        weight = part.model.get_input_embeddings().weight
        if any(weight is parameter for parameter in parameters):
            sum_over_ends(runtime, weight, last - 2 * stage, timeout_s)


def sum_over_ends(
    runtime: Runtime, weight: torch.nn.Parameter, step: int, timeout_s: float
) -> None:
    """Tied embeddings are two copies of one parameter, on the first stage and on the last: give
    both the sum of their gradients. The two ranks must call.

    weight: this rank's copy. step: how many stages on the other one is."""
    model = runtime.part.model
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    own = local_of(weight.grad)
    if step > 0:
        send(model, own, step, timeout_s)
    other = receive(model, torch.empty_like(own), step, timeout_s)
    if step < 0:
        send(model, own, step, timeout_s)
    own.add_(other)


def keep_parameters(runtime: Runtime, recording: Recording, before: bool) -> None:
    """Write the gradients of the hooked parameters into their places; before: those of which the
    hook keeps what was there before its edit. Nothing is sent, and nothing is raised."""
    for i, entry in enumerate(recording.entries):
        if entry.hook.of != "param" or (entry.key.site.side == BEFORE) is not before:
            continue
        if parameter_of(runtime, entry.key.module) is None:
            continue
        try:
            recording.planned[i] = write_gradient(runtime, entry.key.module, recording.place(i))
        except Exception as error:  # the capture carries it, as that of a read does
            recording.planned[i] = failure(error)


def write_gradient(runtime: Runtime, name: str, whole: torch.Tensor) -> ShardRecord:
    """Copy this rank's part of a parameter's gradient into its place. whole: the place, of the
    parameter's shape, on the CPU.

    CaptureError: the loss does not depend on the parameter."""
    gradient, record = local_gradient(runtime, name)
    if gradient.dtype != whole.dtype:
        raise PlacementError(
            f"{name}: its gradient is {gradient.dtype}, where {whole.dtype} was planned"
        )
    # copies write the same numbers, as their digests show
    record.shard.put(gradient, whole)
    return record


def local_gradient(runtime: Runtime, name: str) -> tuple[torch.Tensor, ShardRecord]:
    """(this rank's part of a parameter's gradient, of the part's shape, in its own memory; which
    part of the whole that is). CaptureError: the loss does not depend on the parameter."""
    owned_here = get(runtime, name)
    held, _ = local_shard(runtime, owned_here)
    gradient = owned_here.tensor.grad
    if gradient is None:
        raise CaptureError(f"{name}: no gradient reached it, the loss does not depend on it")
    local = local_of(gradient)
    record = ShardRecord(held.evidence, held.placement, digest(local), held.shard, held.shard)
    return local, record


def local_of(gradient: torch.Tensor) -> torch.Tensor:
    """This rank's part of a gradient of any shape, in its own memory."""
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


def edit_gradients(runtime: Runtime, editor: Editor, hook: HookSpec, names: Sequence[str]) -> None:
    """Make a hook's edit of the gradients of these parameters, each on the whole of one. A
    parameter of several names is edited once. All ranks must call.

    CaptureError: no gradient reached a parameter; EditError: the edit failed."""
    done: set[str] = set()
    for name in names:
        if name not in done:
            same = with_tied([name], runtime.part.info.tied)
            done.update(same)
            edit_gradient(runtime, editor, hook, name, same)


def edit_gradient(
    runtime: Runtime, editor: Editor, hook: HookSpec, name: str, same: Sequence[str]
) -> None:
    """One parameter's. This rank may hold it under another of its names, or not at all. All ranks
    must call."""
    own = next((other for other in same if parameter_of(runtime, other) is not None), None)
    if own is None:
        give_nothing(runtime, editor, hook, name)
        return
    gradient, record = local_gradient(runtime, own)
    new = editor.edit_parameter(hook, name, gradient, record)
    made_nan = bool(new.isnan().any()) and not bool(gradient.isnan().any())
    editor.note(CaptureKey(hook.key, own, hook.at, "", 0), record, made_nan)
    with torch.no_grad():
        gradient.copy_(new)


def give_nothing(runtime: Runtime, editor: Editor, hook: HookSpec, name: str) -> None:
    """Come to the edit of a parameter that this rank does not hold: the other ranks wait for it."""
    info = runtime.part.info
    ndim = len(info.parameters[name])
    dtype = getattr(torch, info.dtype)
    empty = torch.empty([0] * ndim, dtype=dtype, device=runtime.device)
    record = ShardRecord("none", "none", shard=Box.nothing(ndim))
    editor.edit_parameter(hook, name, empty, record)


def forget_gradients(runtime: Runtime, names: Sequence[str]) -> None:
    """Give the memory of these parameters' gradients back."""
    for parameter in owned(runtime, names):
        parameter.grad = None
