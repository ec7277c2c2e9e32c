"""Faults at random: each round one rank fails in one way at one module, and then everything has to
be as it was.

`python -m tools.chaos --rounds 200 [--seed S]` prints each round, and what went wrong with the
seed that repeats it.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import flexkernel as fk
from tests.support import models, on_engines

IDS = [[5, 6, 7, 8, 9], [10, 11, 12, 13, 14]]
LAYOUTS = ({"tp": 2}, {"pp": 2}, {"fsdp": 2})
TIMEOUT_S = 2.0  # of the session while faults are made
PROMPT_S, STALL_S = 10.0, 40.0  # until the error: five times the bound, for machines that are busy
DIES = {"kill": "SIGKILL", "abort": "SIGABRT", "segv": "SIGSEGV", "exit": "exit code 3"}
SAYS = {
    **dict.fromkeys(DIES, "engine died"),
    "stop": "was stopped by a signal",
    "raise": "FLEX_FAULT says so",
    "oom": "memory",
    "sleep": "no progress for",
    "loop": "no progress for",
}
KINDS = (*SAYS, "nan")


@dataclasses.dataclass
class Outcome:
    """What a fault came to. error_s: until the error; usable_s: from then until a run has worked
    again."""

    error: BaseException | None
    error_s: float
    usable_s: float
    kept: list[bool]  # rank → whether its weights are where they were
    equal: bool  # the next run's logits, bit for bit


def ask_for(text: str) -> None:
    """On an engine: have this fault happen."""
    os.environ["FLEX_FAULT"] = text


def strike(session: Any, rank: int, at: str, kind: str) -> Outcome:
    """Have a rank fail at a module in a run, and run again; the session replaces dead engines by
    itself."""
    logits = session.run(IDS).logits.tensor().clone()
    weights = session.on_ranks(on_engines.weights_at)
    session.on_ranks(ask_for, f"rank={rank},at={at},kind={kind}")
    error, begin = None, time.monotonic()
    try:
        struck = session.run(IDS)
        assert kind == "nan", f"{kind} at {at} on rank {rank} went by without an error"
        # not all NaN: torch's sdpa makes 0 of a NaN in q or k
        assert not torch.equal(struck.logits.tensor(), logits)
    except fk.errors.FlexError as caught:
        error = caught
    middle = time.monotonic()
    repr(session.status())
    assert time.monotonic() - middle < 5, "the status is there at once (five times the bound)"
    again = session.run(IDS).logits.tensor()
    usable_s = time.monotonic() - middle
    session.on_ranks(ask_for, "")
    kept = [a == b for a, b in zip(session.on_ranks(on_engines.weights_at), weights, strict=True)]
    return Outcome(error, middle - begin, usable_s, kept, torch.equal(again, logits))


def check(outcome: Outcome, rank: int, kind: str) -> None:
    """The error came in time, names the rank and the cause; nothing was lost but what a dead
    process held."""
    died = kind in DIES or kind == "stop"
    if kind != "nan":
        text = str(outcome.error)
        assert SAYS[kind] in text and DIES.get(kind, "") in text, text
        assert getattr(outcome.error, "rank", None) == rank, (
            f"rank {rank} is to blame: {outcome.error!r}"
        )
        assert isinstance(outcome.error, fk.errors.EngineDied) is died, repr(outcome.error)
    assert outcome.error_s < (STALL_S if kind in ("sleep", "loop", "stop") else PROMPT_S), outcome
    assert outcome.kept == [not (died and other == rank) for other in range(len(outcome.kept))], (
        outcome
    )
    assert outcome.equal, "the next run differs"


def places(session: Any, rank: int) -> list[str]:
    """Where a fault can happen on that rank: the modules that it holds and that fire."""
    info = session.loaded.info
    stage = info.layout.coordinate(rank).pp
    fires = [
        m for m in info.modules if m.name and info.scan.get((m.name, "output")) and not m.spans
    ]
    return [m.name for m in fires if m.stages == (stage,) and "rotary" not in m.name]


def rounds(
    session: Any, folder: Any, seed: int, n: int, say=print, kinds=KINDS
) -> list[tuple[str, Outcome]]:
    """n rounds. AssertionError: what was not as it was, with the round and the seed."""
    dice = random.Random(seed)
    session.engines.timeout_s, session.engines.auto_restart = TIMEOUT_S, True
    done, stored, value = [], None, None
    try:
        for i in range(n):
            if stored is None or dice.random() < 0.2:
                session.load(folder, **dice.choice(LAYOUTS))
                session.hook("model.layers.*.mlp")
                stored = session.run(IDS)
                stored.keep()
                value = stored["model.layers.3.mlp"].tensor().clone()
            rank, kind = dice.randrange(session.engines.size), dice.choice(kinds)
            at = dice.choice(places(session, rank))
            what = f"seed {seed}, round {i}: {kind} on rank {rank} at {at}, {session.loaded.info.layout}"
            try:
                outcome = strike(session, rank, at, kind)
                check(outcome, rank, kind)
                assert torch.equal(stored["model.layers.3.mlp"].tensor(), value), (
                    "a stored capture has changed"
                )
            except Exception as error:
                raise AssertionError(f"{what}: {error}") from error
            say(
                f"{what}: {outcome.error_s:.2f} s to the error, {outcome.usable_s:.2f} s to the "
                "next run"
            )
            done.append((kind, outcome))
    finally:
        session.engines.timeout_s, session.engines.auto_restart = 60.0, False
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, fk.start(2) as session:
        done = rounds(
            session,
            models.tiny("llama", folder),
            args.seed,
            args.rounds,
            lambda text: print(text, flush=True),
        )
        for kind in KINDS:
            mine = [outcome for what, outcome in done if what == kind]
            if mine:
                error, usable = max(o.error_s for o in mine), max(o.usable_s for o in mine)
                print(
                    f"{kind:6} {len(mine):4} times: at most {error:.2f} s to the error, "
                    f"{usable:.2f} s to the next run"
                )


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    )
    main()
