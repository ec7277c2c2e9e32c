"""Timing: the ways of doing a thing take turns, so that a noisy machine hits them alike."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Figure", "Spread", "Times", "in_turns", "of", "spread", "timed"]

Times = dict[str, list[float]]  # way → seconds, one a turn
RESAMPLED = 200


@dataclass(frozen=True)
class Spread:
    """The median, and the quartiles around it."""

    low: float
    median: float
    high: float


@dataclass(frozen=True)
class Figure:
    """One number of a row. at_most, at_least: its goal; with neither it is only reported."""

    what: str
    value: Spread
    unit: str = "×"
    at_most: float | None = None
    at_least: float | None = None

    @property
    def reached(self) -> bool | None:
        """Whether the median keeps to the goal; None: it has none."""
        if self.at_most is not None:
            return self.value.median <= self.at_most
        return None if self.at_least is None else self.value.median >= self.at_least

    def __str__(self) -> str:
        low, median, high = (
            number(n) for n in (self.value.low, self.value.median, self.value.high)
        )
        around = "" if low == high else f" ({low}–{high})"
        return f"{self.what} {median}{' ' * (self.unit not in ('×', ''))}{self.unit}{around}"


def number(value: float) -> str:
    """Three digits that count.

    >>> number(1.0449), number(1234.5), number(0.01234), number(0)
    ('1.04', '1,234', '0.0123', '0')
    """
    if value != value or abs(value) == float("inf"):
        return "∞"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def timed(way: Callable[[], Any]) -> float:
    """Seconds that it takes: what it says itself if it returns a float, else by the clock."""
    begin = time.perf_counter()
    said = way()
    return said if isinstance(said, float) else time.perf_counter() - begin


def in_turns(ways: Mapping[str, Callable[[], Any]], repeats: int, warm: int = 1) -> Times:
    """Seconds of each way, A B C A B C ...; the first `warm` turns are not counted."""
    times: Times = {name: [] for name in ways}
    # once: after it all caches are cold, and what takes microseconds took ten times as long
    gc.collect()
    for turn in range(warm + repeats):
        for name, way in ways.items():
            seconds = timed(way)
            if turn >= warm:
                times[name].append(seconds)
    return times


def spread(values: Sequence[float]) -> Spread:
    if len(values) < 2:
        return Spread(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(low, median, high)


def of(times: Times, combine: Callable[..., float], *names: str) -> Spread:
    """A number made of the medians of several ways, `combine(median, median, ...)`; around it the
    quartiles of what it is if the turns are drawn again."""
    draw, turns = random.Random(0), len(times[names[0]])

    def once(chosen: Sequence[int]) -> float:
        return combine(*(statistics.median(times[name][i] for i in chosen) for name in names))

    again = [once(draw.choices(range(turns), k=turns)) for _ in range(RESAMPLED)]
    around = spread([value for value in again if value == value] or [float("nan")])
    return Spread(around.low, once(range(turns)), around.high)
