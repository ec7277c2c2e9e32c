"""The door to an engine: one function that the driver calls by name. Imports no torch until it is
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

__all__ = ["READS", "answer", "call", "open_runtime", "perform"]

# What a driver may call that has not got the engines and only looks: it changes nothing
READS = ("look", "memory.has", "regroup.describe", "saved_by")
SETTLE_S = 0.5
_owner: Owner | None = None  # the driver that said hello last
_let_go = False  # it has said goodbye
_last: tuple[str, int, Any] | None = None  # (driver, turn, answer) of the last call
_runtime: Runtime | None = (
    None  # one Runtime per engine process; it outlives the drivers that talk to it
)


def open_runtime() -> Runtime:
    """A Runtime of this process, for a driver that is its own engine."""
    from .runtime import Runtime

    return Runtime()


def call(driver: str, turn: int, method: str, *args: Any) -> Any:
    """Run a method of this engine's Runtime; what ipyparallel applies on an engine.

    turn: numbers a driver's calls. One that comes twice, because its driver cannot know whether it
    had arrived, is made once and answered twice; one that others have overtaken is not made any
    more, its driver has gone on."""
    global _last
    if method in READS:  # made as often as it comes; the owner's last answer stays what it is
        return called(driver, method, *args)
    if _last is not None and _last[0] == driver and turn < _last[1]:
        return None
    if _last is None or _last[:2] != (driver, turn):
        _last = None  # nothing is kept of it while the next one runs
        _last = driver, turn, called(driver, method, *args)
    return _last[2]


def settled(signals: int) -> None:
    """Come back when so many interrupts have come to this engine, or when the last of them must
    have met it idle, which leaves no trace. It takes whatever comes meanwhile; the driver does not
    ask what it says."""
    end = time.monotonic() + SETTLE_S
    while _runtime is not None and _runtime.breaker.signals < signals and time.monotonic() < end:
        time.sleep(0.005)


def called(driver: str, method: str, *args: Any) -> Any:
    """The answer to a driver's call.

    driver: who asks. Whoever has said hello has the engine: two that take turns would read each
    other's slabs. Another is refused while that one lives, unless it asks to take the engine over;
    `goodbye` lets go of it. `look` is the hello of one who changes nothing, and is told whose the
    engine is."""
    global _runtime, _owner, _let_go
    if _runtime is None:
        report_crashes()
        _runtime = open_runtime()
    if method == "goodbye":
        _let_go |= _owner is not None and _owner.driver == driver
        return None
    if method == "hello":
        who, take = args
        if (
            _owner is not None
            and _owner.driver != driver
            and not (take or _let_go)
            and lives(_owner)
        ):
            return refusal(
                f"another notebook has these engines: pid {_owner.pid} on {_owner.host}, since "
                f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(_owner.since))}. To take them over: "
                "%flex_cluster attach --take, or fk.attach(take=True)"
            )
        _owner, _let_go, args = who, False, ()
    if _owner is not None and _owner.driver != driver and method not in READS:
        return refusal(
            f"another notebook (pid {_owner.pid} on {_owner.host}) has attached to these engines since; to take them "
            "back: %flex_cluster attach --take"
        )
    found = answer(_runtime, "hello" if method == "look" else method, *args)
    if method == "look" and isinstance(found, dict):
        found |= {"owner": _owner if _owner is not None and not _let_go and lives(_owner) else None}
    if method in ("hello", "look") and isinstance(found, dict):
        found |= {"signals": _runtime.breaker.signals, "job": os.environ.get("SLURM_JOB_ID", "")}
    return found


def refusal(message: str) -> ErrorReport:
    rank = 0 if _runtime is None else _runtime.rank
    return ErrorReport(rank, "ClusterError", message, "", time.time())


def lives(owner: Owner) -> bool:
    """Whether that driver is there; one on another host is taken to be."""
    if owner.host != socket.gethostname():
        return True
    try:
        return abs(start_time(owner.pid) - owner.start_time) < 1
    except psutil.NoSuchProcess:
        return False


def report_crashes() -> None:
    """Have a crash of this engine write where it was into its log; its stderr is a pipe that would
    die with it."""
    # ipykernel's, of the descriptor it began with
    log = getattr(sys.stderr, "_original_stdstream_copy", None)
    faulthandler.enable(2 if log is None else log, all_threads=False)


def perform(runtime: Runtime, method: str, *args: Any) -> Any:
    """Make one of the calls that a driver may make, and raise what it raises."""
    from .calls import CALLS

    if method not in CALLS:
        raise AttributeError(f"an engine has no call {method!r}")
    return CALLS[method](runtime, *args)


def answer(runtime: Runtime, method: str, *args: Any) -> Any:
    """The method's result, or an ErrorReport: nothing is ever raised through the control plane."""
    pid = os.getpid()
    try:
        return perform(runtime, method, *args)
    except (
        BaseException
    ) as error:  # KeyboardInterrupt and SystemExit too: the engine must survive them
        return report(runtime, error)
    finally:
        # a user's function has forked: what it left here would answer in the engine's name
        if os.getpid() != pid:
            os._exit(0)


def report(runtime: Runtime, error: BaseException) -> ErrorReport:
    told = getattr(error, "flex_report", None)
    if told is not None:
        return told
    text = "".join(traceback.format_exception(error))
    return ErrorReport(
        rank=runtime.rank,
        type=type(error).__name__,
        message=str(error),
        traceback=text,
        time=time.time(),
    )
