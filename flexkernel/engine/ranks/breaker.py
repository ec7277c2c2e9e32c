"""The breaker: frees ranks that wait in a collective for one that will not come. And faults made
on purpose.

gloo has no abort. What always works is to shut down this process's established pair sockets: every
peer raises within a tenth of a second. Only those sockets: touching gloo's listening socket kills
the process, and zmq's or the store's would cost the engine its cluster.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import psutil
import torch
import torch.distributed as dist

from flexkernel.errors import HookError

__all__ = ["FAULT", "KINDS", "Breaker", "fault"]


class Breaker:
    """Knows the ports of the process groups; breaks them on request, or at an interrupt while the
    engine is busy."""

    def __init__(self) -> None:
        self.busy = False
        self.broken = False
        self.signals = 0  # interrupts that came from outside
        self._ports: frozenset[int] = frozenset()
        self._before: frozenset[int] = frozenset()
        self._watching = False

    def before_groups(self) -> None:
        """Note the ports that listen before the groups exist: those are not ours to break."""
        self._before, self._ports, self.broken = frozenset(listening()), frozenset(), False

    def after_groups(self, not_ours: Iterable[int] = ()) -> None:
        """Learn the groups' ports from all ranks. Every rank must call it, outside any other
        collective."""
        mine = sorted(set(listening()) - self._before - set(not_ours))
        everyone: list[list[int]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(everyone, mine)
        self._ports = frozenset(port for ports in everyone for port in ports)

    def break_groups(self) -> int:
        """Shut the groups' connections down; returns how many. From any thread. What NCCL does is
        aborted: its peers are freed when they are told, by the driver."""
        self.broken = True
        count = 0
        for connection in psutil.Process().net_connections(kind="tcp"):
            if connection.status == psutil.CONN_ESTABLISHED and self._is_pair(connection):
                count += shut(connection.fd)
        if dist.is_initialized():
            from flexkernel.engine.compat import abort_nccl

            abort_nccl()
        return count

    def _is_pair(self, connection) -> bool:
        return connection.laddr.port in self._ports or connection.raddr.port in self._ports

    def watch_interrupts(self) -> None:
        """Break the groups when SIGINT comes while busy. A handler in Python would not run while
        the main thread waits in a collective; the byte that the C level writes into this pipe does
        arrive. Main thread only."""
        if self._watching or threading.current_thread() is not threading.main_thread():
            return
        read, write = os.pipe()
        os.set_blocking(write, False)
        previous = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        # somebody else reads signals here, an event loop for instance: leave it to them
        if previous != -1:
            signal.set_wakeup_fd(previous)
            os.close(read)
            os.close(write)
            return
        self._watching = True
        threading.Thread(target=self._watch, args=(read,), name="flex-breaker", daemon=True).start()

    def _watch(self, pipe: int) -> None:
        while os.read(pipe, 1):
            self.signals += 1
            if self.busy:
                self.break_groups()


def listening() -> list[int]:
    return [
        c.laddr.port
        for c in psutil.Process().net_connections(kind="tcp")
        if c.status == psutil.CONN_LISTEN
    ]


def shut(fd: int) -> int:
    """Shut a connection down without closing its descriptor, which belongs to gloo."""
    try:
        with socket.socket(fileno=os.dup(fd)) as copy:
            copy.shutdown(socket.SHUT_RDWR)
    except OSError:  # it went down by itself meanwhile
        return 0
    return 1


# --- faults made on purpose -----------------------------------------------------------

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
def fault(rank: int, modules: dict[str, torch.nn.Module]) -> Iterator[None]:
    """Within it the fault happens that FLEX_FAULT asks for, once: when that module has run on that
    rank. Off unless the variable is set. HookError: it says what means nothing."""
    text = os.environ.get(FAULT)
    if not text:
        yield
        return
    asked = dict(part.split("=", 1) for part in text.split(",") if "=" in part)
    if (
        set(asked) != {"rank", "at", "kind"}
        or asked["kind"] not in KINDS
        or not asked["rank"].isdecimal()
    ):
        raise HookError(f"{FAULT}={text!r} is not rank=R,at=MODULE,kind={'|'.join(KINDS)}")
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


def blank(value: Any) -> Any:
    return (
        torch.full_like(value, torch.nan)
        if isinstance(value, torch.Tensor) and value.is_floating_point()
        else value
    )
