"""What an edit may not do: send to other ranks, run the model it is in, print without end. Each is
refused when it is tried, before it could leave the other ranks waiting. What it sets for the whole
process is set back when it is done.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Container, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Drawn", "confined", "set_back"]

MOST_PRINTED = 1 << 20  # characters an edit may print each time it runs


class Refused(RuntimeError):
    """An edit has tried what it may not do."""


@contextlib.contextmanager
def confined(modules: Container[torch.nn.Module]) -> Iterator[None]:
    """Within it a user's edit runs. modules: of the model, which it may not call."""

    def refuse(module: torch.nn.Module, _args: Any) -> None:
        if module in modules:
            raise Refused(
                f"an edit cannot run the model that it is in ({type(module).__name__} was called)"
            )

    handle = register_module_forward_pre_hook(refuse)
    alone = contextlib.nullcontext() if not dist.is_initialized() else NoCollectives()
    try:
        with set_back(), contextlib.redirect_stdout(Limited(sys.stdout)), alone:
            yield
    finally:
        handle.remove()


@contextlib.contextmanager
def set_back() -> Iterator[None]:
    """Within it a user's function runs on one rank: afterwards torch's defaults are as they were.
    A process that it has forked ends here: it would go on as this rank, over the same
    connections."""
    pid, dtype, grad = os.getpid(), torch.get_default_dtype(), torch.is_grad_enabled()
    try:
        yield
    finally:
        if os.getpid() != pid:
            os._exit(0)
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(grad)


class Drawn:
    """Random numbers for the edits of one generation, from a seed of their own. An edit runs on
    one rank: if it drew from where tokens are drawn from, the ranks would draw different tokens
    after it."""

    def __init__(self, seed: int):
        self._seed = seed % (1 << 63)
        self._states: list[torch.Tensor] = []

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        """Within it torch's generators go on where they were at the end of the last time."""
        before = states()
        if self._states:
            resume(self._states)
        else:
            torch.manual_seed(self._seed)
        try:
            yield
        finally:
            self._states = states()
            resume(before)


def states() -> list[torch.Tensor]:
    """Of torch's generators: the CPU's, and the current GPU's where one is in use."""
    gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if gpu else [])]


def resume(states: list[torch.Tensor]) -> None:
    for state, put in zip(states, (torch.set_rng_state, torch.cuda.set_rng_state), strict=False):
        put(state)


class NoCollectives(TorchDispatchMode):
    """Other ranks wait for the edit's result, not for a collective of its own."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            raise Refused(
                f"an edit cannot send to other ranks ({func}): it runs on one of them, and the others wait for its "
                "result; it sees the whole activation already"
            )
        return func(*args, **(kwargs or {}))


class Limited(io.TextIOBase):
    """Passes on what is printed, up to a limit: each line crosses the cluster's control plane and
    stays in memory."""

    def __init__(self, out: Any):
        self._out, self._left = out, MOST_PRINTED

    def write(self, text: str) -> int:
        self._left -= len(text)
        if self._left < 0:
            raise Refused(
                f"an edit cannot print more than {MOST_PRINTED:,} characters at a time; ctx.save keeps values"
            )
        return self._out.write(text)

    def flush(self) -> None:
        self._out.flush()
