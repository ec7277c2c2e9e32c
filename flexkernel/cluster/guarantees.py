"""What is guaranteed for engines, by how a session came to them. The table in
docs/clusters.md is made of this."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

__all__ = ["GUARANTEES", "Origin", "guarantees", "guarantees_table"]

OURS = ("local", "slurm")  # kinds whose launchers make the logs and the environment as we say


@dataclasses.dataclass(frozen=True)
class Origin:
    """How a session came to its engines. All guarantees follow from these facts.

    launcher: "" for this process, "local" for processes of this machine, "slurm" for jobs, or
    "other". owned: this session started them. kept: they were started to outlive their session.
    controller: its process is on this machine, and known. reader: another session has them, this
    one only reads."""

    launcher: str
    owned: bool = True
    kept: bool = False
    controller: bool = True
    reader: bool = False

    @property
    def may_start(self) -> bool:
        """Whether this session can start engines for the cluster."""
        if self.reader or not self.launcher:
            return False
        return self.owned or (self.launcher in OURS and self.controller)


def engines_end(origin: Origin) -> str:
    if not origin.launcher:
        return "They are this process."
    if origin.kept:
        return (
            "They stay until %flex_cluster stop. Without a controller they end after "
            "FLEX_IDLE_TTL hours (24)."
        )
    if not origin.owned:
        return "They stay: this session only detaches from them."
    if origin.launcher == "slurm":
        return (
            "They end with the session, within 30 s of its process (scancel), and at the job's "
            "walltime."
        )
    if origin.launcher == "local":
        return "They end with the session, and within 30 s of its process however that ends."
    return (
        "They end with the session. If its process is killed they end 3 minutes after their "
        "controller."
    )


def a_dead_engine(origin: Origin) -> str:
    if not origin.launcher:
        return "The engine is this process: restart the notebook's kernel."
    if origin.reader:
        return "The session that has the engines replaces it."
    if not origin.may_start:
        return "restart() replaces it once you have started one with `ipcluster engines`."
    if origin.launcher == "slurm":
        return "restart() replaces it by another job, with its part of the model."
    return "restart() replaces it, with its part of the model."


def the_error_of_a_death(origin: Origin) -> str:
    if not origin.launcher:
        return "Jupyter reports it."
    if origin.launcher == "local" and origin.owned:
        return "It shows the signal or exit code and the last lines of the engine's log."
    if origin.launcher == "local":
        return "It shows the last lines of the engine's log."
    if origin.launcher == "slurm":
        return "It shows rank, host and pid, and the last lines of the job's log."
    return "It shows rank, host and pid."


def a_dead_controller(origin: Origin) -> str:
    if not origin.launcher:
        return "There is no controller."
    if origin.owned:
        return "The next call starts it again, and arrives."
    if origin.kept:
        return "Attaching again starts it again, and finds the model."
    return "The cluster ends: its engines leave after 3 minutes."


def private_files(origin: Origin) -> str:
    if not origin.launcher:
        return "Slabs are readable by you only."
    if origin.launcher not in OURS and (origin.owned or origin.kept):
        return "Slabs and keys are readable by you only. Logs are as the launcher makes them."
    if origin.owned or origin.kept:
        return "Slabs, logs and keys are readable by you only."
    return (
        "Slabs are readable by you only. Keys are checked. Logs are as whoever started the cluster "
        "made them."
    )


def environment(origin: Origin) -> str:
    if not origin.launcher:
        return "It is the notebook's."
    if origin.launcher not in OURS or not (origin.owned or origin.kept):
        return "It is what the launcher gives them."
    return (
        "Engines inherit an allow-list of the notebook's environment variables. Add more with "
        "FLEX_ENV."
    )


def an_interrupt(origin: Origin) -> str:
    if origin.reader:
        return "It ends your wait, and nothing on the engines."
    if not origin.launcher:
        return "It ends the run. The model stays."
    return "It reaches every engine. The model stays."


# What → how well, by how the engines came to be.
GUARANTEES: dict[str, Callable[[Origin], str]] = {
    "engines end": engines_end,
    "a dead engine": a_dead_engine,
    "the error of a death": the_error_of_a_death,
    "a dead controller": a_dead_controller,
    "private files": private_files,
    "environment": environment,
    "an interrupt": an_interrupt,
}

EXAMPLES = {
    "`fk.start()`": Origin("local"),
    "`fk.start(keep=True)`, attached again": Origin("local", owned=False, kept=True),
    "`fk.start(engines='slurm')`": Origin("slurm"),
    "`fk.start(engines='ssh')`, or mpi, pbs, ...": Origin("other"),
    "`fk.attach()` to `ipcluster start` here": Origin("local", owned=False),
    "`fk.attach()` to one started elsewhere": Origin("other", owned=False, controller=False),
    "`fk.attach(read_only=True)`": Origin("local", owned=False, reader=True),
}


def guarantees(origin: Origin) -> list[tuple[str, str]]:
    """(what, what is guaranteed) for engines of this origin."""
    return [(what, guarantee(origin)) for what, guarantee in GUARANTEES.items()]


def guarantees_table() -> str:
    """The guarantees for the usual ways to come to engines, as Markdown."""
    rows = [["", *EXAMPLES], ["---"] * (len(EXAMPLES) + 1)]
    for what, guarantee in GUARANTEES.items():
        rows.append([what, *(guarantee(origin) for origin in EXAMPLES.values())])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
