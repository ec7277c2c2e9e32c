"""Reads: what hooks that only look cost a forward; beside FlexModel's, and torch's own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from flexkernel.names import select

from . import opponents, ranks
from .lab import Lab
from .timing import Figure, Spread, in_turns, of, spread

__all__ = ["against_bare", "against_flexmodel"]

GLOBS = ("model.layers.*", "model.layers.*.mlp.gate_proj")
MB = 1e6
TURNS = 3  # times as many as of other rows: what is measured are some percent of a forward


def against_bare(lab: Lab) -> list[Figure]:
    """A forward with every layer's output and every gate_proj read, and without."""
    session, rows, names = prepared(lab)
    times = in_turns(
        {
            "bare": lambda: slowest(session.on_ranks(ranks.bare, rows)),
            "ours": lambda: ours(session, rows),
            "raw": lambda: slowest(session.on_ranks(ranks.raw_hooks, rows, names)),
        },
        TURNS * lab.repeats,
    )
    return [
        Figure("reads / bare", of(times, ratio, "ours", "bare"), at_most=1.05),
        Figure("raw hooks that keep the shards / bare", of(times, ratio, "raw", "bare")),
        Figure("bare", milliseconds(times["bare"]), "ms"),
    ]


def against_flexmodel(lab: Lab) -> list[Figure]:
    """The time that the same reads add, ours and FlexModel's; and the memory."""
    session, rows, names = prepared(lab)
    where, wide = (
        str(opponents.folder()),
        session.loaded.info.scan[names[-1], "output"][0][0].shape(1, 1)[-1],
    )
    hooks = [(name, wide if name.endswith("gate_proj") else None) for name in names]
    kept: list[int] = []

    def theirs() -> float:
        found = session.on_ranks(ranks.flexmodel, rows, hooks, False, where)
        kept[:] = [num_bytes for _, num_bytes, _ in found]
        check_alike(session, rows, found[0][2])
        return slowest([seconds for seconds, _, _ in found])

    times = in_turns(
        {
            "bare": lambda: slowest(session.on_ranks(ranks.bare, rows)),
            "ours": lambda: ours(session, rows),
            "FlexModel": theirs,
        },
        TURNS * lab.repeats,
    )
    session.on_ranks(ranks.forget)
    whole, booked = memory(session, rows)
    return [
        Figure(
            "FlexModel adds / ours adds", of(times, added, "bare", "ours", "FlexModel"), at_least=4
        ),
        Figure("FlexModel / bare", of(times, ratio, "FlexModel", "bare")),
        Figure("ours / bare", of(times, ratio, "ours", "bare")),
        Figure("kept by FlexModel on all ranks", constant(sum(kept) / MB), "MB"),
        Figure("by ours on the host", constant(booked / MB), "MB", at_most=1.1 * whole / MB),
    ]


def prepared(lab: Lab) -> tuple[Any, list[list[int]], list[str]]:
    """(session, rows, the modules that are read: the layers first)."""
    session = lab.session(lab.tiny("llama_deep"), tp=2)
    B, S = (1, 16) if lab.quick else (4, 128)
    rows = [[3 + (7 * b + s) % 250 for s in range(S)] for b in range(B)]
    names = [name for glob in GLOBS for name in select(glob, session.loaded.info.names)]
    assert len(names) > 2
    return session, rows, names


def ours(session: Any, rows: Sequence[Sequence[int]]) -> float:
    """Seconds of the forward on the slowest rank, with our reads in it. The session is without
    hooks again."""
    for glob in GLOBS:
        session.hook(glob)
    run = session.run(rows)
    assert all(capture.error is None for capture in run) and len(run) > 2, "everything was captured"
    seconds = of_forward(session, run)
    run.free()
    session.unhook()
    return seconds


def of_forward(session: Any, run: Any) -> float:
    """Seconds that the slowest rank's forward took with its hooks. run.seconds has the most of
    each part over all ranks: what one spends in hooks, another waits for."""
    return slowest(
        [s["forward"] + s["copy"] for s in session.on_ranks(ranks.seconds_of, run.number)]
    )


def check_alike(session: Any, rows: Sequence[Sequence[int]], sums: dict[str, float]) -> None:
    """That FlexModel kept what ours keeps: else the comparison means nothing. Once a session."""
    if getattr(session, "_alike", None) == sums.keys():
        return
    for glob in GLOBS:
        session.hook(glob)
    run = session.run(rows)
    for name, theirs in sums.items():
        own = float(run[name].tensor().double().sum())
        assert math.isclose(own, theirs, rel_tol=1e-3, abs_tol=1e-2), (
            f"{name}: {own} here, {theirs} by FlexModel"
        )
    run.free()
    session.unhook()
    session._alike = sums.keys()


def memory(session: Any, rows: Sequence[Sequence[int]]) -> tuple[int, int]:
    """(bytes of all whole tensors that are read, bytes of the host's memory that a run of ours
    books for them)."""
    for glob in GLOBS:
        session.hook(glob)
    run = session.run(rows)
    found = run.num_bytes, run.plan.num_bytes
    run.free()
    session.unhook()
    return found


def ratio(a: float, b: float) -> float:
    return a / b


def added(bare: float, ours: float, theirs: float) -> float:
    """How many times more theirs adds. Where ours adds nothing that can be measured, it is what a
    tenth of a percent would be."""
    return (theirs - bare) / max(ours - bare, 1e-3 * bare)


def slowest(seconds: Sequence[float]) -> float:
    return float(max(seconds))


def milliseconds(seconds: Sequence[float]) -> Spread:
    return spread([s * 1e3 for s in seconds])


def constant(value: float) -> Spread:
    return Spread(value, value, value)
