"""The breaker: frees ranks that wait in a collective for a rank that will not come.

gloo has no abort. But shutting down this process's established pair sockets always works: every
peer raises within a tenth of a second. No other sockets may be shut: gloo's listening socket would
kill the process, and without zmq's or the store's the engine would lose its cluster."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterable

import psutil
import torch.distributed as dist

from flexkernel.engine.compat import abort_nccl

__all__ = ["Breaker"]


class Breaker:
    """Breaks the process groups on request, or at an interrupt while the engine is busy.

    busy: whether this rank is, or may be, in a collective. broken: whether it has broken the
    present groups. signals: how many interrupts came from outside."""

    def __init__(self) -> None:
        self.busy = False
        self.broken = False
        self.signals = 0
        self._ports: frozenset[int] = frozenset()
        self._before: frozenset[int] = frozenset()
        self._watching = False

    def before_groups(self) -> None:
        """Note which ports listen before the groups exist: those must not be broken."""
        self._before = frozenset(listening())
        self._ports = frozenset()
        self.broken = False

    def after_groups(self, not_ours: Iterable[int] = ()) -> None:
        """Learn the groups' ports from all ranks. All ranks must call, outside any other
        collective."""
        mine = sorted(set(listening()) - self._before - set(not_ours))
        everyone: list[list[int]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(everyone, mine)
        self._ports = frozenset(port for ports in everyone for port in ports)

    def break_groups(self) -> int:
        """Shut down the groups' connections; returns how many. Any thread may call it.

        NCCL is aborted on this rank only. Its peers are freed when the driver interrupts them."""
        self.broken = True
        count = 0
        for connection in psutil.Process().net_connections(kind="tcp"):
            if connection.status == psutil.CONN_ESTABLISHED and self._is_pair(connection):
                count += shut(connection.fd)
        if dist.is_initialized():
            abort_nccl()
        return count

    def _is_pair(self, connection) -> bool:
        """Whether a connection belongs to the groups: one of its ends has a port of theirs."""
        return connection.laddr.port in self._ports or connection.raddr.port in self._ports

    def watch_interrupts(self) -> None:
        """Break the groups when SIGINT comes while busy. Call it in the main thread.

        A Python signal handler would not run while that thread waits in a collective. The byte
        that the C handler writes to a pipe does arrive."""
        if self._watching or threading.current_thread() is not threading.main_thread():
            return
        read, write = os.pipe()
        os.set_blocking(write, False)
        previous = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        # something else, such as an event loop, already reads signals here: leave it alone
        if previous != -1:
            signal.set_wakeup_fd(previous)
            os.close(read)
            os.close(write)
            return
        self._watching = True
        threading.Thread(target=self._watch, args=(read,), name="flex-breaker", daemon=True).start()

    def _watch(self, pipe: int) -> None:
        """The thread: count each interrupt, and break the groups if the engine is busy."""
        while os.read(pipe, 1):
            self.signals += 1
            if self.busy:
                self.break_groups()


def listening() -> list[int]:
    """The TCP ports on which this process listens."""
    connections = psutil.Process().net_connections(kind="tcp")
    return [c.laddr.port for c in connections if c.status == psutil.CONN_LISTEN]


def shut(fd: int) -> int:
    """Shut down a connection, but leave its descriptor open, which belongs to gloo. Returns 1, or
    0 if it was down."""
    try:
        with socket.socket(fileno=os.dup(fd)) as copy:
            copy.shutdown(socket.SHUT_RDWR)
    except OSError:  # it went down meanwhile
        return 0
    return 1
