"""How a rank says that it does not go on: what the driver reads of an error, and freedom for the
ranks that wait for this one.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterator
from dataclasses import replace

from flexkernel.errors import EditError, EngineError, FlexError, LoadError
from flexkernel.wire import ErrorReport, RunReport

from .ranks.gather import OtherRankFailed
from .ranks.mesh import leave
from .ranks.watch import Stall
from .runtime import Runtime

__all__ = ["ABORTED", "broke_off", "gave_up", "report_not_ready"]

ABORTED = "NCCL communicator was aborted"
# A collective raises a plain RuntimeError with one of these when a peer has broken the groups
CUT_OFF = ("gloo/transport", ABORTED)

# The first type that fits: (what the driver raises, its message). None: a type of the same name.
SHOWN_AS: tuple[tuple[type[BaseException], str | None, str], ...] = (
    (EditError, None, "{error} (rank {rank})"),
    (FlexError, None, "{error}"),
    (KeyboardInterrupt, None, "{error}"),
    (BaseException, "EngineError", "{type} on rank {rank}: {error}"),
)


def reported(error: BaseException) -> ErrorReport | None:
    """The report that the error carries, if whoever caught it first has made one."""
    return vars(error).get("flex_report")


def broke_off(runtime: Runtime, error: BaseException, partial: tuple[RunReport, ...] = ()) -> None:
    """This rank does not go on: put its report into the error, and free the ranks that wait for
    it. partial: what it has captured so far."""
    many = runtime.world > 1
    attach_report(error, replace(report(runtime, error, broken=many), partial=partial))
    if many:
        runtime.breaker.break_groups()


def gave_up(runtime: Runtime, error: BaseException) -> None:
    """This rank has not got its part of a model: break off, and leave the groups, also those that
    the load has made and that no breaker knows of. What is left of the model holds them: it goes
    first."""
    broke_off(runtime, error)
    at: BaseException | None = error
    while at is not None:
        traceback.clear_frames(at.__traceback__)
        at = at.__cause__ or at.__context__
    runtime.unload()
    if runtime.world > 1:
        leave()


def report_not_ready(runtime: Runtime, error: BaseException) -> None:
    """Put a report into the error that says that another rank's is the cause."""
    attach_report(error, replace(report(runtime, error), secondary=True))


def attach_report(error: BaseException, found: ErrorReport) -> None:
    vars(error)["flex_report"] = found


def report(runtime: Runtime, error: BaseException, broken: bool = False) -> ErrorReport:
    """The error as the driver reads it. broken: this rank breaks the groups."""
    name, message = shown_as(error, runtime.rank)
    cut_off = was_cut_off(error)
    shown = ErrorReport(
        rank=runtime.rank,
        type=name,
        message=message,
        traceback="".join(traceback.format_exception(error)),
        time=time.time(),
        broken=broken,
        secondary=cut_off or isinstance(error, OtherRankFailed),
    )
    stall = runtime.watch.stall
    if stall is None or not (cut_off or was_interrupted(error)):
        return shown
    stall.waiting |= cut_off
    return stalled(shown, stall)


def stalled(shown: ErrorReport, stall: Stall) -> ErrorReport:
    """The report of a rank that the watch has freed: it waited for others, or others for it."""
    name = "EngineError" if shown.type == "KeyboardInterrupt" else shown.type
    if stall.waiting:
        message = f"rank {shown.rank} {stall}"
        return replace(shown, type=name, message=message, secondary=True, waited=stall.module)
    edit = f"; {shown.message}" if name == "EditError" else ""
    message = f"rank {shown.rank} did not arrive, {stall}{edit}"
    return replace(shown, type=name, message=message, secondary=False)


def shown_as(error: BaseException, rank: int) -> tuple[str, str]:
    """(the type that the driver raises, its message).

    >>> shown_as(ValueError("no"), 2)
    ('EngineError', 'ValueError on rank 2: no')
    """
    name = type(error).__name__
    if type(error) is EngineError:  # its subclasses say where they come from
        return name, f"{name} on rank {rank}: {error}"
    for kind, other_name, message in SHOWN_AS:
        if isinstance(error, kind):
            return other_name or name, message.format(error=error, rank=rank, type=name)
    raise AssertionError("every error is a BaseException")


def was_cut_off(error: BaseException) -> bool:
    """Whether a peer has broken the groups in which this rank was."""
    if not isinstance(error, RuntimeError | LoadError):
        return False
    messages = [str(each) for each in causes(error) if isinstance(each, RuntimeError)]
    return any(mark in message for message in messages for mark in CUT_OFF)


def was_interrupted(error: BaseException) -> bool:
    """Whether an interrupt has ended what this rank did, a user's function included."""
    return any(isinstance(each, KeyboardInterrupt) for each in causes(error))


def causes(error: BaseException) -> Iterator[BaseException]:
    """The error, and what it was raised from."""
    at: BaseException | None = error
    while at is not None:
        yield at
        at = at.__cause__
