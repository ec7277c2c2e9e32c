"""The breaker: frees ranks that wait in a collective for one that will not come.

gloo has no abort. What always works is to shut down this process's established pair sockets: every
peer raises within a tenth of a second. Only those sockets: touching gloo's listening socket kills
the process, and zmq's or the store's would cost the engine its cluster.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterable

import psutil
import torch.distributed as dist

__all__ = ["Breaker"]


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
