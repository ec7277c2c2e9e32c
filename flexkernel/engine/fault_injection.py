"""Faults on purpose: what FLEX_FAULT asks for happens once, in a run. Imported only when the
variable is set.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import psutil
import torch

from flexkernel.errors import HookError

from .failure import broke_off
from .runtime import Runtime

__all__ = ["FAULT", "KINDS", "fault", "fault_in_run"]

FAULT = "FLEX_FAULT"  # rank=1,at=model.layers.1.mlp,kind=kill


def exhaust() -> None:
    """Ask for more memory than this process may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + (64 << 20), hard))
    try:
        torch.empty(1 << 30, dtype=torch.uint8)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def spin() -> None:
    while True:
        pass


def crash() -> None:
    ctypes.string_at(0)


def fail() -> None:
    raise RuntimeError(f"{FAULT} says so")


KINDS: dict[str, Callable[[], None]] = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "abort": os.abort,
    "segv": crash,
    "exit": lambda: os._exit(3),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "raise": fail,
    "sleep": lambda: time.sleep(3600),
    "loop": spin,
    "oom": exhaust,
    "nan": lambda: None,  # what the module puts out becomes NaN
}


@contextlib.contextmanager
def fault_in_run(runtime: Runtime) -> Iterator[None]:
    """Within it the fault happens on this rank. A text that means nothing ends the run on all
    ranks."""
    modules = {} if runtime.loaded is None else runtime.loaded.named
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(fault(runtime.rank, modules))
        except HookError as error:
            broke_off(runtime, error)
            raise
        yield


@contextlib.contextmanager
def fault(rank: int, modules: Mapping[str, torch.nn.Module]) -> Iterator[None]:
    """Within it the fault happens that FLEX_FAULT asks for, once: when that module has run on that
    rank. HookError: the text means nothing."""
    asked = parse(os.environ.get(FAULT, ""))
    if int(asked["rank"]) != rank or asked["at"] not in modules:
        yield
        return

    def strike(_module: torch.nn.Module, _args: Any, out: Any) -> Any:
        os.environ.pop(FAULT, None)
        KINDS[asked["kind"]]()
        return torch.utils._pytree.tree_map(blank, out) if asked["kind"] == "nan" else None

    handle = modules[asked["at"]].register_forward_hook(strike)
    try:
        yield
    finally:
        handle.remove()


def parse(text: str) -> dict[str, str]:
    """{"rank": ..., "at": ..., "kind": ...}. HookError: the text says something else.

    >>> parse("rank=1,at=model.layers.1.mlp,kind=kill")
    {'rank': '1', 'at': 'model.layers.1.mlp', 'kind': 'kill'}
    """
    asked = dict(part.split("=", 1) for part in text.split(",") if "=" in part)
    complete = set(asked) == {"rank", "at", "kind"}
    if not complete or asked["kind"] not in KINDS or not asked["rank"].isdecimal():
        raise HookError(f"{FAULT}={text!r} is not rank=R,at=MODULE,kind={'|'.join(KINDS)}")
    return asked


def blank(value: Any) -> Any:
    """NaN in place of every number of a floating point tensor; anything else as it is."""
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return torch.full_like(value, torch.nan)
    return value
