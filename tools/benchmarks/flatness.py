"""Flatness: the same cell again and again in a real kernel takes nothing more."""

from __future__ import annotations

from .lab import Lab
from .reads import constant
from .timing import Figure

__all__ = ["thousand"]

LIMIT_S = 300.0  # then it ends with the runs that it has made


def thousand(lab: Lab) -> list[Figure]:
    """What has grown most between the 50th and the last of 1,000 runs (--runs), in any process;
    and slabs, descriptors and threads."""
    from tools import flat

    lab.end()
    runs, every = (20, 5) if lab.quick else (lab.runs, min(50, max(lab.runs // 4, 1)))
    samples = flat.repeated(lab.tiny("llama"), runs, every, LIMIT_S)
    base, last = next(sample for n, sample in samples if n >= min(50, runs // 2)), samples[-1][1]

    def growth(what: str, names: list[str]) -> float:
        return max(last[name][what] - base[name][what] for name in names)

    processes = [name for name in base if name != "slabs"]
    assert {"driver", "engine 0", "engine 1", "controller"} == set(processes)
    return [
        Figure("runs", constant(samples[-1][0]), ""),
        *(
            Figure(f"{name} grew by", constant(growth("MB", [name])), "MB", at_most=20)
            for name in processes
        ),
        Figure("slabs grew by", constant(growth("files", ["slabs"])), "files", at_most=0),
        Figure(
            "descriptors of any process", constant(growth("fds", processes)), "", at_most=flat.FEW
        ),
        Figure(
            "threads of any process", constant(growth("threads", processes)), "", at_most=flat.FEW
        ),
    ]
