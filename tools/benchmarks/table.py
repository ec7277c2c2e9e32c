"""Table: RESULTS.md, of which a command rewrites the rows that it has measured and leaves the
others as they are."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from . import opponents
from .rows import Row
from .timing import Figure

__all__ = ["RESULTS", "Measured", "load", "written"]

RESULTS = Path(__file__).parent / "RESULTS.md"
HEAD = "| row | what | against | goal | measured: median (quartiles) | reached | when, load |"
INTRODUCTION = """# Benchmarks

Written by `make bench`; do not edit. Ways that are compared take turns in one run; ratios are of medians, the quartiles
are those of the turns drawn again. Each row says when it was measured and under which load average: above the number of
cores the figures are rough.
"""
PACKAGES = ("torch", "transformers", "ipyparallel", "pyzmq", "plotly")


@dataclass(frozen=True)
class Measured:
    """A row's figures, or why there are none. loads: the machine's load average before and
    after."""

    row: Row
    figures: Sequence[Figure]
    loads: tuple[float, float]
    failure: str = ""

    @property
    def reached(self) -> str:
        said = [figure.reached for figure in self.figures if figure.reached is not None]
        if self.failure:
            return "could not be run"
        return "–" if not said else "yes" if all(said) else "**no**"

    def __str__(self) -> str:
        row = self.row
        figures = "<br>".join(marked(figure) for figure in self.figures) or self.failure
        text = figures + (f"<br>*{row.why}*" if row.why else "")
        when = f"{time.strftime('%Y-%m-%d %H:%M')}, {self.loads[0]:.1f} → {self.loads[1]:.1f}"
        cells = (row.name, row.what, row.against, row.goal, text, self.reached, when)
        return "| " + " | ".join(cell.replace("|", "/").replace("\n", " ") for cell in cells) + " |"


def marked(figure: Figure) -> str:
    """A figure with its goal, where it has one."""
    if figure.reached is None:
        return str(figure)
    sign, goal = ("≤", figure.at_most) if figure.at_most is not None else ("≥", figure.at_least)
    return f"**{figure}**, goal {sign} {goal:.3g}"


def load() -> float:
    return os.getloadavg()[0]


def written(
    measured: Sequence[Measured], rows: Sequence[Row], loads: tuple[float, float], before: str = ""
) -> str:
    """The page: rows measured now, and those of the page before that were not."""
    lines = {
        name: line for line in before.splitlines() for name in [line.split(" | ")[0].strip("| ")]
    }
    lines |= {m.row.name: str(m) for m in measured}
    not_run = "| {0.name} | {0.what} | {0.against} | {0.goal} | not run | – | – |"
    table = [lines.get(row.name, not_run.format(row)) for row in rows]
    missing = [f"\nNot installed here: {text}." for text in opponents.tried()]
    named = ", ".join(f"{name} {version}" for name, version in versions().items())
    rule = "| --- " * HEAD.count(" | ") + "| --- |"
    last = f"{time.strftime('%Y-%m-%d %H:%M')}, load average {loads[0]:.1f} at its start, {loads[1]:.1f} at its end"
    about = [f"Last run: {last}.  ", f"Machine: {machine()}.  ", f"Versions: {named}."]
    return "\n".join([INTRODUCTION, *about, *missing, "", HEAD, rule, *table, ""])


def machine() -> str:
    memory = psutil.virtual_memory().total / 2**30
    return f"{platform.system()} {platform.machine()}, {cpu()}, {os.cpu_count()} cores, {memory:.0f} GiB, CPU and gloo"


def cpu() -> str:
    """What the processor calls itself."""
    info = Path("/proc/cpuinfo")
    found = [
        line.split(":", 1)[1].strip()
        for line in info.read_text().splitlines()
        if line.startswith("model name")
    ]
    return found[0] if found else platform.processor()


def versions() -> Mapping[str, str]:
    own = {"Python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in PACKAGES
    }
    return own | opponents.versions()
