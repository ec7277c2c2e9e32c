"""Edits: what changing a whole sharded activation adds to a forward; beside FlexModel's edit of
the same."""

from __future__ import annotations

from typing import Any

from . import opponents, ranks
from .lab import Lab
from .moves import WIDE, wide
from .reads import added, milliseconds, of_forward, slowest
from .timing import Figure, Times, in_turns, of

__all__ = ["gathered"]

REPLICATED = "model.layers.0"  # 64 wide: as many positions make 1/256 of it
SIZES = {"1 MB": 16, "16 MB": 256, "64 MB": 1024}  # positions of the wide one


def gathered(lab: Lab) -> list[Figure]:
    """x * 0.5 of the whole activation, by an edit that sees all of it: once here, on every rank in
    FlexModel."""
    where, found = str(opponents.folder()), []
    for size, positions in SIZES.items():
        session, rows = wide(lab, positions)
        define(session)
        times = edited(lab, session, rows, WIDE, 16384, where)
        found.append(
            Figure(
                f"sharded {size}: FlexModel adds / ours adds",
                of(times, added, "bare", "ours", "FlexModel"),
                at_least=None if size == "1 MB" else 1.5,
            )
        )
        found += [
            Figure(f"{size}, {way}", milliseconds(times[way]), "ms")
            for way in times
            if size == "16 MB"
        ]
    session, rows = wide(lab, 4096)
    times = edited(lab, session, rows, REPLICATED, None, where)
    session.on_ranks(ranks.forget)
    return [
        *found,
        Figure("replicated 1 MB: FlexModel / ours", of(times, whole_ratio, "FlexModel", "ours")),
    ]


def define(session: Any) -> None:
    if "bench_half" not in session.hooks.edits:

        @session.edit("bench_half")
        def half(x, ctx):
            return x * 0.5


def edited(lab: Lab, session: Any, rows: Any, module: str, size: int | None, where: str) -> Times:
    """Seconds of a forward, bare, with our edit and with FlexModel's."""

    def ours() -> float:
        session.hook(module, edit="bench_half", capture="none")
        run = session.run(rows)
        assert not run.warnings
        seconds = of_forward(session, run)
        run.free()
        session.unhook()
        return seconds

    def theirs() -> float:
        answers = session.on_ranks(ranks.flexmodel, rows, [(module, size)], True, where)
        return slowest([seconds for seconds, _, _ in answers])

    bare = lambda: slowest(session.on_ranks(ranks.bare, rows))  # noqa: E731
    return in_turns({"bare": bare, "ours": ours, "FlexModel": theirs}, lab.repeats, warm=2)


def whole_ratio(theirs: float, ours: float) -> float:
    return theirs / ours
