"""The watch: which module this rank is in, and freedom for all ranks when nothing moves any more.

Each layer that begins is noted in memory that the driver can read too; in which of its modules a
rank is, its stack says when it is asked. When no layer has begun for the run's timeout, a thread
of this engine breaks the groups, which frees whoever waits for another rank, and interrupts the
main thread if it does not come back by that.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import linecache
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch

from flexkernel.memory.heartbeat import Heartbeat
from flexkernel.names import display_name

__all__ = ["Stall", "Watch"]

AGAIN_S = 0.7  # how long the main thread has to come back before it is interrupted (again)
TIMES = 3
NOTE_S = 0.3  # by how much ranks may be apart in seeing that nothing moves
LIBRARIES = ("/site-packages/", "/flexkernel/", "/lib/python")
# In the last of them a rank waits for its GPU, which waits for the others'
COLLECTIVES = (
    "/torch/distributed/",
    "/transformers/distributed/",
    "/flexkernel/engine/ranks/gather.py",
    "/flexkernel/engine/place/staging.py",
)


class Stall:
    """What this rank was at when nothing moved. waiting: for other ranks; line: of the user's own
    code, if any."""

    def __init__(self, module: str, frame: FrameType | None, timeout_s: float):
        self.module, self.timeout_s = module, timeout_s
        self.waiting, self.line = waits(frame), users_line(frame)

    def __str__(self) -> str:
        where = self.module or "no module yet"
        if self.waiting:
            return f"waited in {where}"
        return f"no progress for {self.timeout_s:g} s: it is in {where}" + (
            f", at {self.line}" if self.line else ""
        )


class Watch:
    """Of one engine. heartbeat: where the driver reads what this rank is at; none before it has a
    seat."""

    def __init__(self, breaker: Any, clock: Any = time) -> None:
        self.breaker = breaker
        self.clock = clock  # the module time, or what tells the time and sleeps as it does
        self.heartbeat: Heartbeat | None = None
        self.stall: Stall | None = None
        self._names: list[str] = []
        self._layers: dict[int, str] = {}  # the modules that are noted
        self._of: dict[torch.nn.Module, str] = {}
        self._handles: list[Any] = []
        self._turns = itertools.count(1)
        # the number of the run that is watched; 0: none is, and there is nobody to free
        self._turn = 0
        self._timeout_s = 0.0
        self._begun = threading.Event()
        self._done = threading.Event()  # the thread frees nobody
        self._done.set()
        self._thread: threading.Thread | None = None
        self._main = 0

    def know(self, names: list[str], modules: dict[str, torch.nn.Module]) -> None:
        """The model's modules in the order by which the heartbeat counts them; those that this rank
        has. Its layers are noted from here on: to note every module would cost some percent of a
        small model's forward."""
        self._names, self._of = (
            names,
            {modules[name]: name for name in reversed(names) if name in modules},
        )
        at = {name: i for i, name in enumerate(names)}
        for handle in self._handles:
            handle.remove()
        noted = layers(names, modules)
        self._handles = [
            modules[name].register_forward_pre_hook(functools.partial(self._note, at[name]))
            for name in noted
        ]
        self._layers = {at[name]: display_name(name) for name in noted}
        if self.heartbeat is not None:
            self.heartbeat.name_modules(self._layers)

    def beat_into(self, heartbeat: Heartbeat) -> None:
        """Note modules in this heartbeat from here on."""
        heartbeat.name_modules(self._layers)
        self.heartbeat = heartbeat

    def _note(self, at: int, _module: torch.nn.Module, args: Any) -> None:
        if self.heartbeat is not None:
            self.heartbeat.beat(at)
            entered = args[0] if args else None
            if (
                torch.is_grad_enabled()
                and isinstance(entered, torch.Tensor)
                and entered.requires_grad
            ):
                entered.register_hook(functools.partial(self._back, at))  # a backward moves too

    def _back(self, at: int, _gradient: torch.Tensor) -> None:
        if self.heartbeat is not None:
            self.heartbeat.beat(at)

    @property
    def module(self) -> str:
        """The one that the thread which runs the model is in; the layer that began last where its
        stack shows none."""
        frame = sys._current_frames().get(self._main)
        while frame is not None:
            owner = frame.f_locals.get("self") if frame.f_code.co_argcount else None
            if isinstance(owner, torch.nn.Module) and owner in self._of:
                return display_name(self._of[owner])
            frame = frame.f_back
        at = self.heartbeat.module if self.heartbeat is not None else -1
        return display_name(self._names[at]) if 0 <= at < len(self._names) else ""

    @contextlib.contextmanager
    def over(self, timeout_s: float) -> Iterator[None]:
        """Watch what runs within; it may be as long as it likes if modules begin. timeout_s: with
        none beginning."""
        if self.heartbeat is None:
            yield
            return
        self.stall, self._timeout_s, self._main = None, timeout_s, threading.get_ident()
        self.heartbeat.running = True
        self._ensure_thread()
        self._turn = next(self._turns)
        self._begun.set()
        try:
            yield
        finally:
            self._turn = 0
            try:
                # an interrupt that is on its way comes here, not into what this engine does next
                self._done.wait()
            finally:
                self._begun.clear()
                self.heartbeat.running = False

    def _ensure_thread(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._watch, name="flex-watch", daemon=True)
            self._thread.start()

    def _watch(self) -> None:
        while True:
            self._begun.wait()
            turn, last, since = self._turn, -1, self.clock.monotonic()
            while turn and self._turn == turn:
                self.clock.sleep(min(self._timeout_s / 10, 0.5))
                count = self.heartbeat.count if self.heartbeat is not None else 0
                if count != last:
                    last, since = count, self.clock.monotonic()
                elif self.clock.monotonic() - since > self._timeout_s:
                    self._free(turn)
                    break

    def _free(self, turn: int) -> None:
        """Break the groups; interrupt the main thread if it does not come back by itself."""
        self._done.clear()
        try:
            # it came back before it could know that it has to wait for this
            if self._turn != turn:
                return
            self.stall = Stall(self.module, sys._current_frames().get(self._main), self._timeout_s)
            # the others note where they wait: once they are free nobody can tell any more
            self.clock.sleep(NOTE_S)
            if self._turn != turn:
                return
            self.breaker.break_groups()
            for _ in range(TIMES):
                end = self.clock.monotonic() + AGAIN_S
                while self._turn == turn and self.clock.monotonic() < end:
                    self.clock.sleep(0.02)
                if self._turn != turn:
                    return
                self.breaker.signals -= 1  # this one is not from outside
                signal.pthread_kill(self._main, signal.SIGINT)
        finally:
            self._done.set()
        while self._turn == turn:
            self.clock.sleep(0.1)


def layers(names: list[str], modules: dict[str, torch.nn.Module]) -> list[str]:
    """Whose beginnings are progress: the root, and the members of lists; its own children where it
    has no list."""
    mine = [name for name in names if name in modules]
    lists = {
        name
        for name in mine
        if isinstance(modules[name], torch.nn.ModuleList | torch.nn.Sequential)
    }
    members = [name for name in mine if name.rpartition(".")[0] in lists]
    return (
        ["", *(members or [name for name in mine if name and "." not in name])]
        if "" in mine
        else members
    )


def waits(frame: FrameType | None) -> bool:
    """Whether a thread seems to be in a collective. One that comes free when the groups are broken
    was, in any case."""
    while frame is not None:
        file = frame.f_code.co_filename
        if any(place in file for place in COLLECTIVES):
            return True
        if "/torch/" not in file:
            return False
        frame = frame.f_back
    return False


def users_line(frame: FrameType | None) -> str:
    """Where a thread is in code that is neither ours nor a library's."""
    while frame is not None:
        file = frame.f_code.co_filename
        if (
            not file.startswith(("<string>", "<frozen"))
            and "site-packages" not in file
            and "/flexkernel/" not in file
            and "/lib/python" not in file
        ):
            return (
                f"{file}:{frame.f_lineno} {linecache.getline(file, frame.f_lineno).strip()}".strip()
            )
        frame = frame.f_back
    return ""
