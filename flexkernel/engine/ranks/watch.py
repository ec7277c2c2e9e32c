"""The watch: knows which module this rank is in, and frees all ranks when nothing moves any more.

Each layer that begins counts in the heartbeat, which the driver can read. The stack tells in which
module a rank is. When no layer has begun for the run's timeout, a thread of this engine breaks the
groups, which frees the ranks that wait for another one. If the main thread does not return then,
it is interrupted."""

from __future__ import annotations

import contextlib
import functools
import itertools
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any, Protocol

import torch

from flexkernel.engine.usercode import users_line_in
from flexkernel.memory.heartbeat import Heartbeat
from flexkernel.names import display_name

from .breaker import Breaker

__all__ = ["Stall", "Watch"]

AGAIN_S = 0.7  # how long the main thread may take to return before it is interrupted (again)
TIMES = 3
NOTE_S = 0.3  # how far apart ranks may notice that nothing moves
# In staging.py a rank waits for its GPU, which waits for the other ranks' GPUs
COLLECTIVES = (
    "/torch/distributed/",
    "/transformers/distributed/",
    "/flexkernel/engine/ranks/gather.py",
    "/flexkernel/engine/place/staging.py",
)


class Stall:
    """Where this rank was when nothing moved.

    waiting: whether it waited for other ranks. line: of the user's own code, "" if it was in none.
    """

    def __init__(self, module: str, frame: FrameType | None, timeout_s: float):
        self.module = module
        self.timeout_s = timeout_s
        self.waiting = waits(frame)
        self.line = users_line_in(frame)

    def __str__(self) -> str:
        where = self.module or "no module yet"
        if self.waiting:
            return f"waited in {where}"
        at = f", at {self.line}" if self.line else ""
        return f"no progress for {self.timeout_s:g} s: it is in {where}{at}"


class Clock(Protocol):
    """The module `time`, or its replacement in a test."""

    def monotonic(self) -> float:
        """Seconds."""

    def sleep(self, seconds: float, /) -> None: ...


class Watch:
    """The watch of one engine.

    heartbeat: where the driver reads which layer this rank is in; None until this process is a
    rank. stall: where this rank was when nothing moved in the last run."""

    def __init__(self, breaker: Breaker, clock: Clock = time) -> None:
        self.breaker = breaker
        self.clock = clock
        self.heartbeat: Heartbeat | None = None
        self.stall: Stall | None = None
        self._names: list[str] = []
        self._layers: dict[int, str] = {}  # the layers that beat, by number
        self._of: dict[torch.nn.Module, str] = {}
        self._handles: list[Any] = []
        self._turns = itertools.count(1)
        # the number of the run that is watched; 0 if none is
        self._turn = 0
        self._timeout_s = 0.0
        self._begun = threading.Event()
        self._done = threading.Event()  # cleared while the thread frees ranks
        self._done.set()
        self._thread: threading.Thread | None = None
        self._main = 0

    def follow(self, names: list[str], modules: dict[str, torch.nn.Module]) -> None:
        """Make the layers of this model beat from now on. All modules would cost some percent of a
        small model's forward.

        names: of all the model's modules, in the order of the heartbeat's numbers. modules: those
        of this rank."""
        self._names = names
        self._of = {modules[name]: name for name in reversed(names) if name in modules}
        at = {name: i for i, name in enumerate(names)}
        for handle in self._handles:
            handle.remove()
        beating = layers(names, modules)
        self._handles = [
            modules[name].register_forward_pre_hook(functools.partial(self._beat, at[name]))
            for name in beating
        ]
        self._layers = {at[name]: display_name(name) for name in beating}
        if self.heartbeat is not None:
            self.heartbeat.name_modules(self._layers)

    def beat_into(self, heartbeat: Heartbeat) -> None:
        """Make the layers beat in this heartbeat from now on."""
        heartbeat.name_modules(self._layers)
        self.heartbeat = heartbeat

    def _beat(self, at: int, _module: torch.nn.Module, args: Any) -> None:
        """A torch pre-hook: the module of that number begins."""
        if self.heartbeat is None:
            return
        self.heartbeat.beat(at)
        if args and torch.is_grad_enabled():
            entered = args[0]
            if isinstance(entered, torch.Tensor) and entered.requires_grad:
                entered.register_hook(functools.partial(self._beat_back, at))

    def _beat_back(self, at: int, _gradient: torch.Tensor) -> None:
        """A hook on a tensor of any shape: the backward reaches the module of that number."""
        if self.heartbeat is not None:
            self.heartbeat.beat(at)

    @property
    def module(self) -> str:
        """The module that the thread with the model is in, by its stack.

        If the stack shows none, it is the layer that began last; "" before any."""
        frame = sys._current_frames().get(self._main)
        while frame is not None:
            if frame.f_code.co_argcount:
                owner = frame.f_locals.get("self")
                if isinstance(owner, torch.nn.Module) and owner in self._of:
                    return display_name(self._of[owner])
            frame = frame.f_back
        at = -1 if self.heartbeat is None else self.heartbeat.module
        if not 0 <= at < len(self._names):
            return ""
        return display_name(self._names[at])

    @contextlib.contextmanager
    def over(self, timeout_s: float) -> Iterator[None]:
        """Watch what runs inside the context. timeout_s: how long no module may begin. The whole
        may take any time."""
        if self.heartbeat is None:
            yield
            return
        self.stall = None
        self._timeout_s = timeout_s
        self._main = threading.get_ident()
        self.heartbeat.running = True
        self._ensure_thread()
        self._turn = next(self._turns)
        self._begun.set()
        try:
            yield
        finally:
            self._turn = 0
            try:
                # a pending interrupt must arrive here, not in what this engine does next
                self._done.wait()
            finally:
                self._begun.clear()
                self.heartbeat.running = False

    def _ensure_thread(self) -> None:
        """Start the watching thread if there is none."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._watch, name="flex-watch", daemon=True)
            self._thread.start()

    def _watch(self) -> None:
        """The thread: free the ranks when no module has begun for a run's timeout."""
        while True:
            self._begun.wait()
            turn = self._turn
            last = -1
            since = self.clock.monotonic()
            while turn and self._turn == turn:
                self.clock.sleep(min(self._timeout_s / 10, 0.5))
                count = 0 if self.heartbeat is None else self.heartbeat.count
                if count != last:
                    last = count
                    since = self.clock.monotonic()
                elif self.clock.monotonic() - since > self._timeout_s:
                    self._free(turn)
                    break

    def _free(self, turn: int) -> None:
        """Break the groups. Interrupt the main thread if it does not return by itself."""
        self._done.clear()
        try:
            # the run ended before it could see that it must wait for this thread
            if self._turn != turn:
                return
            self.stall = Stall(self.module, sys._current_frames().get(self._main), self._timeout_s)
            # let the other ranks' watches note where they wait: once free, nobody can tell
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
                self.breaker.signals -= 1  # this interrupt is not from outside
                signal.pthread_kill(self._main, signal.SIGINT)
        finally:
            self._done.set()
        while self._turn == turn:
            self.clock.sleep(0.1)


def layers(names: list[str], modules: dict[str, torch.nn.Module]) -> list[str]:
    """The modules whose begin counts as progress: the root and the members of lists.

    Without a list they are the root and its children."""
    here = [name for name in names if name in modules]
    kinds = torch.nn.ModuleList | torch.nn.Sequential
    lists = {name for name in here if isinstance(modules[name], kinds)}
    members = [name for name in here if name.rpartition(".")[0] in lists]
    if "" not in here:
        return members
    children = [name for name in here if name and "." not in name]
    return ["", *(members or children)]


def waits(frame: FrameType | None) -> bool:
    """Whether a thread seems to be in a collective. A thread that breaking the groups frees was in
    one in any case."""
    while frame is not None:
        file = frame.f_code.co_filename
        if any(place in file for place in COLLECTIVES):
            return True
        if "/torch/" not in file:
            return False
        frame = frame.f_back
    return False
