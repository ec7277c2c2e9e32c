"""Trainable modules beside the model, and one step of an optimizer after a run's backward.

Every rank has a copy of each module. A module runs where its edit or the loss runs; the sum of its
gradients over all ranks is what every copy then steps by, so that the copies stay equal.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load as tensors_of
from safetensors.torch import save as bytes_of
from torch.distributed.tensor import DTensor

from flexkernel.engine.place.staging import digest
from flexkernel.engine.ranks.gather import header, wait
from flexkernel.engine.runtime import Runtime
from flexkernel.errors import HookError, LossError
from flexkernel.wire import RunPlan, Training

from .autograd import trainable
from .gradients import parameter_of

__all__ = [
    "add",
    "forget_steps",
    "gradients",
    "held",
    "remove",
    "set_state",
    "state",
    "step",
    "sum_modules",
]


def add(runtime: Runtime, name: str, code: bytes) -> None:
    """Have this module (cloudpickled) under that name, instead of one that had it. All ranks."""
    runtime.trainables.modules[name] = pickle.loads(code).to(runtime.device)
    runtime.trainables.codes[name] = code
    runtime.trainables.optimizers.clear()  # they hold the parameters of what was there


def remove(runtime: Runtime, name: str) -> None:
    runtime.trainables.modules.pop(name, None)
    runtime.trainables.codes.pop(name, None)
    runtime.trainables.optimizers.clear()


def held(runtime: Runtime) -> dict[str, tuple[bytes, bytes]]:
    """Name → (the module as it came, its weights now as safetensors)."""
    return {
        name: (code, state(runtime, name)[0]) for name, code in runtime.trainables.codes.items()
    }


def state(runtime: Runtime, name: str) -> tuple[bytes, int]:
    """(its weights as safetensors, their digest: copies must have equal ones)."""
    tensors = {
        key: value.detach().cpu().contiguous()
        for key, value in runtime.trainables.modules[name].state_dict().items()
    }
    return bytes_of(tensors), sum(digest(value) for value in tensors.values())


def set_state(runtime: Runtime, name: str, data: bytes) -> None:
    runtime.trainables.modules[name].load_state_dict(tensors_of(data))


def gradients(runtime: Runtime, name: str) -> tuple[bytes, int]:
    """(the gradients of the last run with a loss, as safetensors; their digest)."""
    found = {
        key: p.grad.cpu().contiguous()
        for key, p in runtime.trainables.modules[name].named_parameters()
        if p.grad is not None
    }
    return bytes_of(found), sum(digest(value) for value in found.values())


def forget_steps(runtime: Runtime) -> None:
    """Begin every optimizer anew: a rank that came back remembers nothing of its steps. All
    ranks."""
    runtime.trainables.optimizers.clear()


# --- in a run -------------------------------------------------------------------------


def sum_modules(runtime: Runtime, timeout_s: float) -> None:
    """Give every copy the sum of its gradients over all ranks, zeros where it did not run. All
    ranks."""
    for parameter in trainable(runtime.trainables.modules):
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if runtime.world > 1:
            wait(
                dist.all_reduce(parameter.grad, async_op=True),
                timeout_s,
                "the gradients of modules",
            )


def step(runtime: Runtime, plan: RunPlan) -> None:
    """Step the plan's optimizer, after every rank has its gradients. All ranks."""
    assert plan.training is not None
    if runtime.world > 1:
        # a rank that failed is not here, and then no copy steps
        header([plan.run, 1], plan.timeout_s)
    for optimizer in optimizers(runtime, plan.training):
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def optimizers(runtime: Runtime, training: Training) -> Sequence[torch.optim.Optimizer]:
    """The optimizers of this training, with what they remember of its steps. Sharded parameters
    have one of their own: torch does not mix them with plain ones in one update."""
    key = hashlib.sha256(
        repr((training.optimizer, training.parameters, training.modules)).encode()
    ).hexdigest()
    if key not in runtime.trainables.optimizers:
        wanted = {name: runtime.trainables.modules[name] for name in training.modules}
        owned = {
            id(p): p for n in training.parameters if (p := parameter_of(runtime, n)) is not None
        }
        every = [*trainable(wanted), *owned.values()]
        kinds = [
            [p for p in every if isinstance(p, DTensor) is sharded] for sharded in (False, True)
        ]
        make = pickle.loads(training.optimizer) if training.optimizer is not None else adamw
        runtime.trainables.optimizers[key] = [
            made(make, parameters) for parameters in kinds if parameters
        ]
    return runtime.trainables.optimizers[key]


def adamw(parameters: list[torch.Tensor]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3)


def made(make: Any, parameters: list[torch.Tensor]) -> torch.optim.Optimizer:
    try:
        found = make(parameters)
    except Exception as error:
        raise LossError(
            f"the optimizer could not be made: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(found, torch.optim.Optimizer):
        raise HookError(
            f"optimizer= is a function (parameters) that returns a torch optimizer, not {type(found).__name__}"
        )
    return found
