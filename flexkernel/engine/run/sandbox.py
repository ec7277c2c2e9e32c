"""The sandbox in which a user's edit runs.

An edit may not send to other ranks, call the model that it is in, or print without end. Each is
refused at once, before it could leave the other ranks waiting. What an edit sets for the whole
process is restored afterwards.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Container, Iterator
from typing import Any, TextIO

import torch
import torch.distributed as dist
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["EditRNG", "restored_defaults", "sandbox"]

MAX_PRINTED = 1 << 20  # characters an edit may print each time it runs


class Refused(RuntimeError):
    """An edit has tried what it may not do."""


@contextlib.contextmanager
def sandbox(modules: Container[torch.nn.Module]) -> Iterator[None]:
    """Run a user's edit within it. modules: the model's, which the edit may not call.

    Raises Refused, from within the edit."""

    def refuse(module: torch.nn.Module, _args: Any) -> None:
        if module in modules:
            raise Refused(
                f"an edit cannot run the model that it is in ({type(module).__name__} was called)"
            )

    alone = NoCollectives() if dist.is_initialized() else contextlib.nullcontext()
    limited = contextlib.redirect_stdout(LimitedOutput(sys.stdout))
    handle = register_module_forward_pre_hook(refuse)
    try:
        with restored_defaults(), limited, alone:
            yield
    finally:
        handle.remove()


@contextlib.contextmanager
def restored_defaults() -> Iterator[None]:
    """Run a user's function within it: afterwards torch's default dtype and grad mode are as they
    were.

    A process that the function has forked ends here. It would go on as this rank, over the same
    connections."""
    pid = os.getpid()
    dtype = torch.get_default_dtype()
    grad = torch.is_grad_enabled()
    try:
        yield
    finally:
        if os.getpid() != pid:
            os._exit(0)
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(grad)


class EditRNG:
    """Random numbers for the edits of one generation, from a seed of their own.

    An edit runs on one rank. If it drew from the generators that draw the tokens, the ranks would
    draw different tokens after it."""

    def __init__(self, seed: int):
        self._seed = seed % (1 << 63)
        self._states: list[torch.Tensor] = []

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Within it torch's generators go on from where they were at the end of the last time."""
        outer = generator_states()
        if self._states:
            set_generator_states(self._states)
        else:
            torch.manual_seed(self._seed)
        try:
            yield
        finally:
            self._states = generator_states()
            set_generator_states(outer)


def generator_states() -> list[torch.Tensor]:
    """The states of torch's generators, 1-D uint8 tensors on the CPU: the CPU generator's, then
    the current GPU's if CUDA is in use."""
    states = [torch.get_rng_state()]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states.append(torch.cuda.get_rng_state())
    return states


def set_generator_states(states: list[torch.Tensor]) -> None:
    """states: as generator_states() returns them, 1-D uint8 tensors on the CPU."""
    setters = (torch.set_rng_state, torch.cuda.set_rng_state)
    for state, set_state in zip(states, setters, strict=False):
        set_state(state)


class NoCollectives(TorchDispatchMode):
    """Refuses collectives: the other ranks wait for the edit's result, not for a collective."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            raise Refused(
                f"an edit cannot send to other ranks ({func}): it runs on one of them, and the "
                "others wait for its result; it sees the whole activation already"
            )
        return func(*args, **(kwargs or {}))


class LimitedOutput(io.TextIOBase):
    """Passes on what is printed, up to MAX_PRINTED characters: each line crosses the cluster's
    control plane and stays in memory."""

    def __init__(self, out: TextIO):
        self._out = out
        self._left = MAX_PRINTED

    def write(self, text: str) -> int:
        self._left -= len(text)
        if self._left < 0:
            raise Refused(
                f"an edit cannot print more than {MAX_PRINTED:,} characters at a time; "
                "ctx.save keeps values"
            )
        return self._out.write(text)

    def flush(self) -> None:
        self._out.flush()
