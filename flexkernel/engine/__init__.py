"""The door to an engine: a driver calls a function of it by name. Imports no torch until it is
used."""

from __future__ import annotations

import faulthandler
import os
import socket
import sys
import time
import traceback
from typing import TYPE_CHECKING, Any

import psutil

from flexkernel.memory.heartbeat import start_time
from flexkernel.wire import ErrorReport, Owner

if TYPE_CHECKING:
    from .runtime import Runtime

__all__ = [
    "DOOR",
    "READS",
    "Door",
    "answer",
    "call",
    "open_runtime",
    "perform",
    "wait_for_interrupts",
]

# What a driver may call that does not own the engine: it changes nothing
READS = ("inspect", "memory.has", "recover.rank_state", "saved_by")
INTERRUPTS_S = 0.5


class Door:
    """One engine as drivers reach it: it has one owner, and makes each call once.

    owner: the driver that attached last. detached: it has left. last: (driver, turn, answer) of
    the last call."""

    def __init__(self) -> None:
        self.owner: Owner | None = None
        self.detached = False
        self.last: tuple[str, int, Any] | None = None
        self._runtime: Runtime | None = None

    @property
    def runtime(self) -> Runtime:
        """This rank's one object; it outlives the drivers that talk to it. The first use makes
        it."""
        if self._runtime is None:
            report_crashes()
            self._runtime = open_runtime()
        return self._runtime

    @property
    def signals(self) -> int:
        """How many interrupts have come to this engine. Makes no Runtime."""
        return 0 if self._runtime is None else self._runtime.breaker.signals

    def call(self, driver: str, turn: int, method: str, *args: Any) -> Any:
        """The answer to a driver's call. A call that comes twice, because its driver cannot know
        whether it had arrived, is made once and answered twice. One that later calls have
        overtaken is not made: its driver has gone on.

        turn: numbers a driver's calls."""
        if method in READS:  # made as often as it comes; the owner's last answer stays what it is
            return self.answer(driver, method, *args)
        if self.last is not None:
            last_driver, last_turn, last_answer = self.last
            if last_driver == driver and turn == last_turn:
                return last_answer
            if last_driver == driver and turn < last_turn:
                return None
        self.last = None  # nothing is kept of it while the next one runs
        found = self.answer(driver, method, *args)
        self.last = (driver, turn, found)
        return found

    def answer(self, driver: str, method: str, *args: Any) -> Any:
        """The result of a call, if this driver may make it, else an ErrorReport."""
        runtime = self.runtime
        if method == "detach":
            self.detach(driver)
            return None
        problem = None
        if method == "attach":
            problem = self.attach(*args)
            args = ()
        problem = problem or self.not_yours(driver, method)
        if problem is not None:
            return ErrorReport(runtime.rank, "ClusterError", problem, "", time.time())
        found = answer(runtime, method, *args)
        if method in ("attach", "inspect") and isinstance(found, dict):
            found["owner"] = self.present_owner() if method == "inspect" else None
            found["signals"] = self.signals
            found["job"] = os.environ.get("SLURM_JOB_ID", "")
        return found

    # --- whose it is ------------------------------------------------------------------

    def attach(self, who: Owner, take: bool) -> str | None:
        """Give the engine to this driver, or say why not: two that take turns would read each
        other's slabs. take: also from a driver that lives."""
        present = self.present_owner()
        if present is not None and present.driver != who.driver and not take:
            since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(present.since))
            return (
                f"another notebook has these engines: pid {present.pid} on {present.host}, since "
                f"{since}. "
                "To take them over: %flex_cluster attach --take, or fk.attach(take=True)"
            )
        self.owner = who
        self.detached = False
        return None

    def detach(self, driver: str) -> None:
        """Let another driver have the engine. Nothing if this one has not got it."""
        if self.owner is not None and self.owner.driver == driver:
            self.detached = True

    def not_yours(self, driver: str, method: str) -> str | None:
        """Why this driver may not make that call; None: it may."""
        owner = self.owner
        if owner is None or owner.driver == driver or method in READS:
            return None
        return (
            f"another notebook (pid {owner.pid} on {owner.host}) has attached to these engines "
            "since; "
            "to take them back: %flex_cluster attach --take"
        )

    def present_owner(self) -> Owner | None:
        """The driver that has the engine, unless it has left or died."""
        if self.owner is None or self.detached or not lives(self.owner):
            return None
        return self.owner


DOOR = Door()  # one a process


def call(driver: str, turn: int, method: str, *args: Any) -> Any:
    """What ipyparallel applies on an engine: see Door.call."""
    return DOOR.call(driver, turn, method, *args)


def wait_for_interrupts(signals: int) -> None:
    """Wait until that many interrupts have come to this engine; at most half a second, since one
    that meets it idle leaves no trace. The driver ignores the result."""
    end = time.monotonic() + INTERRUPTS_S
    while DOOR.signals < signals and time.monotonic() < end:
        time.sleep(0.005)


def lives(owner: Owner) -> bool:
    """Whether that driver's process runs. One on another host is taken to run."""
    if owner.host != socket.gethostname():
        return True
    try:
        return abs(start_time(owner.pid) - owner.start_time) < 1
    except psutil.NoSuchProcess:
        return False


def report_crashes() -> None:
    """Have a crash of this engine write its stack into the engine's log. Its stderr is a pipe that
    would die with it."""
    # ipykernel's copy of the descriptor that it began with
    log = getattr(sys.stderr, "_original_stdstream_copy", None)
    faulthandler.enable(2 if log is None else log, all_threads=False)


def open_runtime() -> Runtime:
    """A Runtime of this process, for a driver that is its own engine."""
    from .runtime import Runtime

    return Runtime()


def answer(runtime: Runtime, method: str, *args: Any) -> Any:
    """The call's result, or an ErrorReport: nothing is ever raised through the control plane."""
    pid = os.getpid()
    try:
        return perform(runtime, method, *args)
    except (
        BaseException
    ) as error:  # also KeyboardInterrupt and SystemExit: the engine survives them
        return report(runtime, error)
    finally:
        # a user's function has forked: what it left here would answer in the engine's name
        if os.getpid() != pid:
            os._exit(0)


def perform(runtime: Runtime, method: str, *args: Any) -> Any:
    """Make one of the calls that a driver may make. Raises what it raises."""
    from .calls import CALLS

    if method not in CALLS:
        raise AttributeError(f"an engine has no call {method!r}")
    return CALLS[method](runtime, *args)


def report(runtime: Runtime, error: BaseException) -> ErrorReport:
    """The report that the error carries, if whoever caught it first made one; else one of its own
    words."""
    made = getattr(error, "flex_report", None)
    if made is not None:
        return made
    return ErrorReport(
        rank=runtime.rank,
        type=type(error).__name__,
        message=str(error),
        traceback="".join(traceback.format_exception(error)),
        time=time.time(),
    )
