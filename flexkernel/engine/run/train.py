"""Trainable modules beside the model, and one step of an optimizer after a run's backward.

Every rank has a copy of each module. A module runs where its edit or the loss runs; every copy then
steps by the sum of its gradients over all ranks, so that the copies stay equal.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load as tensors_of
from safetensors.torch import save as bytes_of
from torch.distributed.tensor import DTensor

from flexkernel.engine.place.staging import digest
from flexkernel.engine.ranks.gather import exchange_headers, wait
from flexkernel.engine.runtime import Runtime
from flexkernel.errors import HookError, LossError
from flexkernel.wire import RunPlan, Training

from .autograd import trainable
from .parameters import owned

__all__ = [
    "add",
    "gradients",
    "remove",
    "reset_optimizers",
    "save_all",
    "set_state",
    "state",
    "step",
    "sum_modules",
]


def add(runtime: Runtime, name: str, code: bytes) -> None:
    """Put this module (cloudpickled) under that name, also in the place of an earlier one. All
    ranks must call."""
    runtime.trainables.modules[name] = pickle.loads(code).to(runtime.device)
    runtime.trainables.codes[name] = code
    reset_optimizers(runtime)  # they hold the earlier module's parameters


def remove(runtime: Runtime, name: str) -> None:
    """Remove a module, if it is there. All ranks must call."""
    runtime.trainables.modules.pop(name, None)
    runtime.trainables.codes.pop(name, None)
    reset_optimizers(runtime)


def reset_optimizers(runtime: Runtime) -> None:
    """Begin every optimizer anew: a rank that came back remembers nothing of its steps. All ranks
    must call."""
    runtime.trainables.optimizers.clear()


def save_all(runtime: Runtime) -> dict[str, tuple[bytes, bytes]]:
    """Name → (the module as it came, its weights now as safetensors)."""
    codes = runtime.trainables.codes
    return {name: (code, state(runtime, name)[0]) for name, code in codes.items()}


def state(runtime: Runtime, name: str) -> tuple[bytes, int]:
    """(a module's weights as safetensors, their digest: all copies must have the same)."""
    return packed(runtime.trainables.modules[name].state_dict())


def set_state(runtime: Runtime, name: str, data: bytes) -> None:
    """Give a module these weights, safetensors. All ranks must call."""
    runtime.trainables.modules[name].load_state_dict(tensors_of(data))


def gradients(runtime: Runtime, name: str) -> tuple[bytes, int]:
    """(a module's gradients of the last run with a loss, as safetensors; their digest)."""
    parameters = runtime.trainables.modules[name].named_parameters()
    return packed({key: p.grad for key, p in parameters if p.grad is not None})


def packed(tensors: Mapping[str, torch.Tensor]) -> tuple[bytes, int]:
    """(the tensors, of any shapes, dtypes and devices, as safetensors; the sum of their
    digests)."""
    on_cpu = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    return bytes_of(on_cpu), sum(digest(tensor) for tensor in on_cpu.values())


# --- in a run -------------------------------------------------------------------------


def sum_modules(runtime: Runtime, timeout_s: float) -> None:
    """Give every copy of a module the sum of its gradients over all ranks, zeros where it did not
    run. All ranks must call."""
    for parameter in trainable(runtime.trainables.modules):
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if runtime.world > 1:
            work = dist.all_reduce(parameter.grad, async_op=True)
            wait(work, timeout_s, "the gradients of modules")


def step(runtime: Runtime, plan: RunPlan, training: Training) -> None:
    """Step the optimizers of the plan's training, after every rank has its gradients. All ranks
    must call."""
    if runtime.world > 1:
        # a rank that failed does not come here, and then no copy steps
        exchange_headers(plan.timeout_s, run=plan.run, steps=1)
    for optimizer in optimizers_of(runtime, training):
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def optimizers_of(runtime: Runtime, training: Training) -> Sequence[torch.optim.Optimizer]:
    """The optimizers of this training, with what they remember of its steps. Sharded parameters
    have one of their own: torch does not mix them with plain ones in one update.

    LossError: the user's function raised; HookError: it returned no optimizer."""
    text = repr((training.optimizer, training.parameters, training.modules))
    key = hashlib.sha256(text.encode()).hexdigest()
    optimizers = runtime.trainables.optimizers
    if key not in optimizers:
        modules = {name: runtime.trainables.modules[name] for name in training.modules}
        trained = [*trainable(modules), *owned(runtime, training.parameters)]
        plain = [p for p in trained if not isinstance(p, DTensor)]
        sharded = [p for p in trained if isinstance(p, DTensor)]
        make: Callable[..., Any] = adamw
        if training.optimizer is not None:
            make = pickle.loads(training.optimizer)
        optimizers[key] = [
            make_optimizer(make, parameters) for parameters in (plain, sharded) if parameters
        ]
    return optimizers[key]


def adamw(parameters: Sequence[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3)


def make_optimizer(
    make: Callable[[Sequence[torch.nn.Parameter]], Any], parameters: Sequence[torch.nn.Parameter]
) -> torch.optim.Optimizer:
    """What a user's function makes of these parameters. LossError: it raised; HookError: it
    returned no optimizer."""
    try:
        optimizer = make(parameters)
    except Exception as error:
        raise LossError(
            f"the optimizer could not be made: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise HookError(
            "optimizer= is a function (parameters) that returns a torch optimizer, not "
            f"{type(optimizer).__name__}"
        )
    return optimizer
