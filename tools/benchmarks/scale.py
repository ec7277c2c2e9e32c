"""Scale: what more engines cost the driver and the controller, and what that means for as many as
a cluster has.

The row `engines` measures it and writes SCALE.md."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import psutil

import flexkernel as fk
from flexkernel.errors import FlexError

from . import ranks
from .control import empty_call
from .lab import Lab
from .reads import constant
from .timing import Figure, number

__all__ = ["SCALE", "Size", "engines", "page"]

SCALE = Path(__file__).parent / "SCALE.md"
COUNTS = (1, 2, 4, 8, 16)
LIMIT_S = 300.0  # of all of them together
CALL_MS = 250.0  # of the driver's processor time: a call that takes more is felt
FORESEEN = (64, 512)
NOTHING: Mapping[int, str] = MappingProxyType({})
ROWS = [[3, 5, 7, 11, 13, 17, 19, 23]]
HOOK = "model.layers.1.mlp"


@dataclass(frozen=True)
class Size:
    """What a session over this many engines costs. Milliseconds are medians of runs of a tiny
    model with one hook, and of empty calls; the driver's are of its own processor time, whatever
    else the machine does."""

    engines: int
    start_s: float
    load_s: float
    run_ms: float
    control_ms: float  # of a run: all but the slowest engine's forward
    empty_ms: float
    driver_run_ms: float
    driver_empty_ms: float
    controller_mb: float
    driver_mb: float
    engine_mb: float


def engines(lab: Lab) -> list[Figure]:
    """How the control cost of a run grows with the engines, beside how an empty call does. Writes
    SCALE.md."""
    counts = (1, 2) if lab.quick else COUNTS
    lab.end()
    lab.tiny("llama")  # its making is not to be counted
    load = os.getloadavg()[0]
    sizes, skipped = within(lab, counts, LIMIT_S)
    if not lab.quick:
        SCALE.write_text(page(sizes, (load, os.getloadavg()[0]), skipped))
    first, last = sizes[0], sizes[-1]
    assert first is not last, f"only {first.engines} engine was measured: {skipped}"
    return [
        Figure(
            f"growth of control 1 → {last.engines} / growth of an empty call",
            constant((last.control_ms / first.control_ms) / (last.empty_ms / first.empty_ms)),
            at_most=1.1,
        ),
        Figure("the same in the driver's processor time", constant(growth(sizes)), at_most=1.1),
        *(Figure(f"control of {s.engines}", constant(s.control_ms), "ms") for s in (first, last)),
        *(Figure(f"empty call of {s.engines}", constant(s.empty_ms), "ms") for s in (first, last)),
    ]


def within(lab: Lab, counts: Sequence[int], limit_s: float) -> tuple[list[Size], dict[int, str]]:
    """(what each number of engines costs; those of which that is not known → why). One that would
    not be ready within the limit, as the one before it went, is not begun; one that cannot be
    started here does not spoil the others."""
    begin, last, sizes, skipped = time.monotonic(), 0.0, list[Size](), dict[int, str]()
    for n in counts:
        now = time.monotonic()
        left, expected = begin + limit_s - now, last * n / sizes[-1].engines if sizes else 0.0
        if left < expected:
            skipped[n] = (
                f"it would take {expected:.0f} s as the machine is, of which {max(left, 0):.0f} s "
                "were left"
            )
            continue
        try:
            sizes.append(measured(lab, n, left / 2))
        except FlexError as error:
            skipped[n] = str(error).splitlines()[0]
        else:
            last = time.monotonic() - now
    return sizes, skipped


def growth(sizes: Sequence[Size]) -> float:
    first, last = sizes[0], sizes[-1]
    return (last.driver_run_ms / first.driver_run_ms) / (
        last.driver_empty_ms / first.driver_empty_ms
    )


def measured(lab: Lab, n: int, limit_s: float) -> Size:
    """A session over n engines; a batch of one row, so that a run asks the same of the driver
    whatever n is.

    limit_s: how long runs and empty calls may be repeated; three times they are in any case."""
    before = driver_mb()
    begin = time.perf_counter()
    with fk.start(n) as session:
        started = time.perf_counter()
        session.load(lab.tiny("llama"), dp=n)
        loaded = time.perf_counter()
        session.hook(HOOK)
        repeats = lab.repeats * 3
        for _ in range(3):
            session.run(ROWS).free()
            empty_call(session)
        runs, empties = [], []
        until = time.monotonic() + limit_s
        while len(runs) < 3 or (len(runs) < repeats and time.monotonic() < until):
            runs.append(one_run(session))
            empties.append(cost(lambda: empty_call(session)))
        engine_mb = (
            statistics.median(rss for _, rss in session.on_ranks(ranks.pid_and_memory)) / 1e6
        )
        controller = psutil.Process(session.engines.ipcluster.controller.pid)
        family = [controller, *controller.children(recursive=True)]
        controller_mb = sum(process.memory_info().rss for process in family) / 1e6
        grown = driver_mb() - before

    def middle(values: Sequence[tuple[float, ...]], i: int) -> float:
        return statistics.median(value[i] for value in values)

    return Size(
        n,
        started - begin,
        loaded - started,
        middle(runs, 0),
        middle(runs, 2),
        middle(empties, 0),
        middle(runs, 1),
        middle(empties, 1),
        controller_mb,
        grown,
        engine_mb,
    )


def one_run(session: Any) -> tuple[float, float, float]:
    """(milliseconds of a run, of the driver's processor time, of all that is not the slowest
    engine's forward): the header before it is control, too, and in it early ranks wait for those
    that the driver's call reaches last."""
    found: list[Any] = []
    wall, cpu = cost(lambda: found.append(session.run(ROWS)))
    run = found[0]
    assert run[HOOK].error is None
    work = 1e3 * sum(run.seconds[part] for part in ("forward", "copy"))
    run.free()
    return wall, cpu, max(wall - work, 0.0)


def cost(call: Callable[[], Any]) -> tuple[float, float]:
    """(milliseconds, milliseconds of this process's processor time) of a call."""
    begin, cpu = time.perf_counter(), time.process_time()
    call()
    return 1e3 * (time.perf_counter() - begin), 1e3 * (time.process_time() - cpu)


def driver_mb() -> float:
    return psutil.Process().memory_info().rss / 1e6


def line(sizes: Sequence[Size], what: str) -> tuple[float, float]:
    """(at no engine, for each engine more): the straight line through these sizes, without the
    first of several: with it this process imports what all of them need."""
    points = [
        (size.engines, getattr(size, what)) for size in (sizes[1:] if len(sizes) > 2 else sizes)
    ]
    fitted = statistics.linear_regression(*zip(*points, strict=True))
    return fitted.intercept, fitted.slope


def foreseen(sizes: Sequence[Size], what: str, engines: int) -> float:
    base, each = line(sizes, what)
    return max(base + each * engines, 0.0)


COLUMNS = {
    "start_s": "start, s",
    "load_s": "load, s",
    "run_ms": "run, ms",
    "control_ms": "of it control, ms",
    "empty_ms": "empty call, ms",
    "driver_run_ms": "driver's CPU for a run, ms",
    "driver_empty_ms": "for an empty call, ms",
    "controller_mb": "controller, MB",
    "driver_mb": "driver grew by, MB",
    "engine_mb": "an engine, MB",
}
# engines do not share their cores
STRAIGHT = ("driver_run_ms", "driver_empty_ms", "controller_mb", "driver_mb")


def page(
    sizes: Sequence[Size], loads: tuple[float, float], skipped: Mapping[int, str] = NOTHING
) -> str:
    table = [
        f"| engines | {' | '.join(COLUMNS.values())} |",
        "| --- " * (len(COLUMNS) + 1) + "|",
        *(
            f"| {s.engines} | {' | '.join(number(getattr(s, what)) for what in COLUMNS)} |"
            for s in sizes
        ),
        *(f"\n{n} engines were not measured: {why}." for n, why in skipped.items()),
    ]
    ahead = [
        f"| engines | {' | '.join(COLUMNS[what] for what in STRAIGHT)} |",
        "| --- " * (len(STRAIGHT) + 1) + "|",
        *(
            f"| {n} | {' | '.join(number(foreseen(sizes, what, n)) for what in STRAIGHT)} |"
            for n in FORESEEN
        ),
    ]
    exponents = {
        what: exponent(sizes, what)
        for what in ("control_ms", "empty_ms", "driver_run_ms", "driver_empty_ms")
    }
    grown = ", ".join(f"{COLUMNS[what]} n^{value:.2f}" for what, value in exponents.items())
    when = f"{time.strftime('%Y-%m-%d %H:%M')}, {os.cpu_count()} cores, load average {loads[0]:.1f} → {loads[1]:.1f}."
    fitted = f"Growth, fitted over n ≥ 2: {grown}."
    title = f"## {' and '.join(map(str, FORESEEN))} engines"
    drawn = "The straight lines through the figures above, drawn on:"
    meaning = MEANING.format(
        each=number(line(sizes, "driver_run_ms")[1]), most=most(sizes), call=number(CALL_MS)
    )
    return "\n".join(
        [INTRODUCTION, when, "", *table, "", fitted, "", title, "", drawn, "", *ahead, "", meaning]
    )


def most(sizes: Sequence[Size]) -> str:
    """How many engines the driver calls within CALL_MS of its processor time."""
    base, each = line(sizes, "driver_run_ms")
    return f"{max((CALL_MS - base) / each, 1):,.0f}" if each > 0 else "any number of"


def exponent(sizes: Sequence[Size], what: str) -> float:
    """e in n^e, over the sizes from 2 engines on."""
    points = [
        (math.log(s.engines), math.log(max(getattr(s, what), 1e-6))) for s in sizes if s.engines > 1
    ]
    return (
        statistics.linear_regression(*zip(*points, strict=True)).slope
        if len(points) > 1
        else float("nan")
    )


INTRODUCTION = """# More engines

Written by `make bench ROWS=engines`; do not edit. A tiny model, replicated over n engines, one hook, a batch of one
row; all engines of a trial share this machine's cores, so that from as many engines as cores on their own work, not
ours, makes the times longer. The driver's processor time is what it would be elsewhere, too.
"""

MEANING = """On the driver one message to each engine and one answer from each are proportional to the
engines, as in an empty call, and the joining of what the answers say of the captures: {each} ms of its processor for
each engine and run, most of it in ipyparallel's client. On a rank it is the header before a run, 16 numbers a rank, and
what the model itself communicates. The header went around a ring, of n - 1 steps: 42 ms for 16 engines here. It is
gathered by the first rank and broadcast now: 9 ms. Captures take a host's memory once, however many ranks it has; the
driver reads from other hosts only what is looked at.

Up to about {most} engines a run's calls take the driver less than {call} ms. Beyond that they should go down a tree:
from the driver to the first engine of each host, which calls and answers for the ranks of its host. That is not built:
no cluster of that size was there to try it on. Until then the runs that are made should be larger, more prompts each.

Here engines are forked from one process that has imported torch and what else they need, and share its memory: an
engine's, above, counts that part for each. Jobs of a batch system import it themselves; how soon they begin is up to
its scheduler. The controller takes an engine in at its second heartbeat, of which there are two a second for engines
that we start (ipyparallel's own: one in 3 s). It relays each message once, as it does for any use of ipyparallel: its
memory grows by some connections an engine.
"""
