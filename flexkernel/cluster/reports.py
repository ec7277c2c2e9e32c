"""What the ranks' reports of a failed call come to: one error, the cause."""

from __future__ import annotations

import dataclasses
import linecache
import re
from collections.abc import Iterable, Sequence
from typing import Any

from flexkernel import errors
from flexkernel.errors import EngineDied, EngineError
from flexkernel.wire import ErrorReport, RunReport

__all__ = ["cause", "with_partial"]


def cause(reports: Sequence[ErrorReport]) -> BaseException:
    """The error that began it: a death, else the earliest that is not merely about another rank."""
    first = min(reports, key=lambda r: (r.type != "EngineDied", r.secondary, r.time))
    if first.secondary and all(r.broken and not r.waited for r in reports):
        lost = (
            "the ranks lost the connections between them in a run, and none says why; "
            "the next run makes new ones: "
        )
        first = dataclasses.replace(first, message=lost + first.message)
    if first.type == "KeyboardInterrupt":
        return KeyboardInterrupt()
    kind = errors.named(first.type)
    waited = others_waited(reports, first)
    if kind is EngineDied:
        return EngineDied(first.message + waited, first.rank)
    if kind is EngineError and first.type != "EngineError":  # not one of ours
        message = f"{first.type} on rank {first.rank}: {first.message}"
        return EngineError(message, first.rank, first.traceback)
    if issubclass(kind, EngineError):
        message = with_users_line(first.message, first.traceback) + waited
        return kind(message, first.rank, first.traceback)
    return kind(first.message)


def with_users_line(message: str, remote_traceback: str) -> str:
    """The message with the text of the user's line, where it has only the line's number.

    An engine does not have the source of a notebook's cell. This process does."""
    bare = re.search(r"\(line (\d+): ([\w<>]+)\)", message)
    if bare is None:
        return message
    number, function = bare.groups()
    frame = rf'File "([^"]+)", line {number}, in {re.escape(function)}$'
    files = re.findall(frame, remote_traceback, re.MULTILINE)
    if not files:
        return message
    line = linecache.getline(files[-1], int(number)).strip()
    if not line:
        return message
    return message.replace(bare[0], f"(line {number}: {line})")


def with_partial(error: BaseException, answers: Iterable[Any]) -> BaseException:
    """The error, with what each rank had captured of a run before it: error.flex_partial."""
    partial: list[tuple[RunReport, ...]] = []
    for answer in answers:
        if isinstance(answer, RunReport):
            partial.append((answer,))
        elif isinstance(answer, ErrorReport) and answer.partial:
            partial.append(answer.partial)
    error.flex_partial = partial  # type: ignore[attr-defined]
    return error


def others_waited(reports: Sequence[ErrorReport], first: ErrorReport) -> str:
    return "".join(
        f"; rank {report.rank} waited in {report.waited}"
        for report in reports
        if report.waited and report is not first
    )
