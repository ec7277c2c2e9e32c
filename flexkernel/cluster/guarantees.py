"""Promises: what can be counted on for engines that came to be in this way. README's table is made
of these, too."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

__all__ = ["GUARANTEES", "Origin", "guarantees", "guarantees_table"]


@dataclasses.dataclass(frozen=True)
class Origin:
    """How a session came to its engines: the facts from which the guarantees follow.

    launcher: "" they are this process; "local" processes of this machine, "slurm" jobs, or
    "other". owned: this session started them; kept: to outlive it. controller: its process is
    known, and on this machine. reader: another session has them, this one looks."""

    launcher: str
    owned: bool = True
    kept: bool = False
    controller: bool = True
    reader: bool = False

    @property
    def may_start(self) -> bool:
        """Whether engines can be started from here."""
        if self.reader or not self.launcher:
            return False
        return self.owned or (self.launcher in ("local", "slurm") and self.controller)


def engines_end(origin: Origin) -> str:
    if not origin.launcher:
        return "with the session: they are this process"
    if origin.kept:
        return "with %flex_cluster stop; by themselves FLEX_IDLE_TTL hours (24) after their controller's end"
    if not origin.owned:
        return "where they were started: this session only leaves them"
    if origin.launcher in ("local", "slurm"):
        jobs = " (scancel), and at its walltime" if origin.launcher == "slurm" else ""
        return "with the session; within 30 s of its process, however that ends" + jobs
    return "with the session; when its process is killed, 3 minutes after their controller's end"


def a_dead_engine(origin: Origin) -> str:
    if not origin.launcher:
        return "is this process: restart the notebook's kernel"
    if origin.reader:
        return "is replaced by the session that has them"
    if not origin.may_start:
        return "is replaced by restart() once you have started one by `ipcluster engines`"
    by = ", by another job," if origin.launcher == "slurm" else ""
    return f"is replaced{by} by restart(), with its part of the model"


def its_death_is_told(origin: Origin) -> str:
    if not origin.launcher:
        return "by Jupyter"
    if origin.launcher == "local":
        return (
            "with signal or exit code, and the end of its log"
            if origin.owned
            else "with the end of its log"
        )
    return "by rank, host and pid" + (
        ", and the end of its job's log" if origin.launcher == "slurm" else ""
    )


def a_dead_controller(origin: Origin) -> str:
    if not origin.launcher:
        return "there is none"
    if origin.owned:
        return "is started again with the next call, which arrives"
    if origin.kept:
        return "is started again by attaching again, which finds the model"
    return "ends the cluster: its engines leave after 3 minutes"


def private_files(origin: Origin) -> str:
    if not origin.launcher:
        return "slabs"
    if origin.launcher == "other" and (origin.owned or origin.kept):
        return "slabs and keys: readable by you only; logs as their launcher makes them"
    if origin.owned or origin.kept:
        return "slabs, logs and keys: readable by you only"
    return "slabs; keys were looked at, logs are as whoever started the cluster made them"


def environment(origin: Origin) -> str:
    if not origin.launcher:
        return "the notebook's"
    if origin.launcher == "other" or not (origin.owned or origin.kept):
        return "as their launcher has it"
    return "of the notebook's what engines need; FLEX_ENV names more"


def an_interrupt(origin: Origin) -> str:
    if origin.reader:
        return "ends what you wait for, and nothing on the engines"
    return (
        "reaches every engine, the model stays"
        if origin.launcher
        else "ends the run, the model stays"
    )


# What is promised → how well, by how the engines came to be
GUARANTEES: dict[str, Callable[[Origin], str]] = {
    "engines end": engines_end,
    "a dead engine": a_dead_engine,
    "its death is told": its_death_is_told,
    "a dead controller": a_dead_controller,
    "private files": private_files,
    "their environment": environment,
    "an interrupt": an_interrupt,
}

EXAMPLES = {
    "`fk.start()`": Origin("local"),
    "`fk.start(keep=True)`, attached again": Origin("local", owned=False, kept=True),
    "`fk.start(engines='slurm')`": Origin("slurm"),
    "`fk.start(engines='ssh')`, or mpi, pbs, ...": Origin("other"),
    "`fk.attach()` to `ipcluster start` here": Origin("local", owned=False),
    "`fk.attach()` to one begun elsewhere": Origin("other", owned=False, controller=False),
    "`fk.attach(read_only=True)`": Origin("local", owned=False, reader=True),
}


def guarantees(origin: Origin) -> list[tuple[str, str]]:
    """(what, how well) for each promise."""
    return [(what, said(origin)) for what, said in GUARANTEES.items()]


def guarantees_table() -> str:
    """The guarantees for the usual ways to come to engines, as Markdown."""
    rows = [["", *EXAMPLES], ["---"] * (len(EXAMPLES) + 1)]
    rows += [
        [what, *(said(origin) for origin in EXAMPLES.values())] for what, said in GUARANTEES.items()
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
