"""Control: what a run costs beyond its forward, beside an empty call of the same engines."""

from __future__ import annotations

import time
from typing import Any

from . import ranks
from .lab import Lab
from .reads import milliseconds, slowest
from .timing import Figure, in_turns, of

__all__ = ["empty_call", "round_trip"]

ROWS = [[3, 5, 7, 11, 13, 17, 19, 23]]
HOOK = "model.layers.1.mlp"


def round_trip(lab: Lab) -> list[Figure]:
    """session.run of a tiny model with one hook, an empty call, and the bare forward."""
    session = lab.session(lab.tiny("llama"), tp=2)

    def ours() -> float:
        session.hook(HOOK)
        begin = time.perf_counter()
        run = session.run(ROWS)
        seconds = time.perf_counter() - begin
        assert run[HOOK].error is None
        session.unhook()
        return seconds

    times = in_turns(
        {
            "ours": ours,
            "empty": lambda: empty_call(session),
            "bare": lambda: slowest(session.on_ranks(ranks.bare, ROWS)),
        },
        lab.repeats * 5,
        warm=3,
    )
    return [
        Figure(
            "run / (empty + bare)",
            of(times, lambda a, b, c: a / (b + c), "ours", "empty", "bare"),
            at_most=1.5,
        ),
        Figure("run", milliseconds(times["ours"]), "ms"),
        Figure("empty call", milliseconds(times["empty"]), "ms"),
        Figure("bare forward", milliseconds(times["bare"]), "ms"),
    ]


def empty_call(session: Any) -> float:
    """Seconds of a call that does nothing, of all engines by one view. What the client keeps of it
    is let go of."""
    cluster = session.engines
    begin = time.perf_counter()
    result = cluster.client[[one.id for one in cluster.engines]].apply_async(ranks.nothing)
    result.get(60)
    seconds = time.perf_counter() - begin
    cluster._forget([result])
    return seconds
