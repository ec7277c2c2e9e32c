"""The benchmarks have a row for each number to reach, and measure; `make bench` measures in
earnest."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest

from flexkernel.errors import ClusterError
from tools.benchmarks import __main__ as bench
from tools.benchmarks import scale, table
from tools.benchmarks.rows import ROWS
from tools.benchmarks.timing import Figure, Spread, in_turns, of, spread

DESIGN = {
    "reads", "reads-flexmodel", "move", "move-far", "slice", "control", "generate", "edit", "picture", "ten-views",
    "flat", "engines",
}  # fmt: skip


def one(value: float) -> Spread:
    return Spread(value, value, value)


def test_each_number_to_reach_has_a_row():
    names = [row.name for row in ROWS]
    assert len(names) == len(set(names)) and set(names) >= DESIGN
    assert all(row.what and row.against and row.goal and callable(row.measure) for row in ROWS)


@pytest.mark.slow
def test_a_row_is_measured_and_printed(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "RESULTS", tmp_path / "RESULTS.md")
    assert bench.main(["--quick", "ten-views"]) == 0
    printed = capsys.readouterr().out
    assert (
        "| ten-views |" in printed
        and "sent by ours" in printed
        and "could not be run" not in printed
    )
    assert not list(tmp_path.iterdir()), "a quick run writes nothing"


def test_a_row_that_cannot_be_run_says_so_and_is_the_only_reason_to_fail(
    capsys, monkeypatch, tmp_path
):
    def broken(_lab):
        raise ValueError("no such | thing")

    def missed(_lab):
        return [Figure("slow", one(3.0), at_most=1)]

    rows = [table.Row("broken", "a", "b", "c", broken), table.Row("missed", "a", "b", "c", missed)]
    monkeypatch.setattr(bench, "ROWS", rows)
    monkeypatch.setattr(bench, "RESULTS", tmp_path / "RESULTS.md")
    assert bench.main(["broken", "missed"]) == 1
    page = (tmp_path / "RESULTS.md").read_text()
    assert "| could not be run |" in page and "ValueError: no such / thing" in page
    assert "| **no** |" in page and "load average" in page and "torch" in page
    assert bench.main(["missed"]) == 0
    assert "| could not be run |" in (tmp_path / "RESULTS.md").read_text(), (
        "other rows stay as they were"
    )


def test_ways_take_turns_and_the_first_is_not_counted():
    turns: list[str] = []

    def way(name):
        return lambda: turns.append(name) or float(len(turns))

    times = in_turns({"a": way("a"), "b": way("b")}, repeats=2)
    assert turns == ["a", "b"] * 3
    assert times == {"a": [3.0, 5.0], "b": [4.0, 6.0]}
    assert of(times, lambda a, b: b / a, "a", "b").median == 5.0 / 4.0
    assert spread([1.0, 2.0, 3.0]) == Spread(1.5, 2.0, 2.5)


def test_a_figure_knows_its_goal():
    assert Figure("x", one(1.0), at_most=1).reached and not Figure("x", one(1.1), at_most=1).reached
    assert (
        Figure("x", one(4.0), at_least=4).reached and not Figure("x", one(3.9), at_least=4).reached
    )
    assert Figure("x", one(1.0)).reached is None
    assert str(Figure("x", Spread(1.0, 2.0, 3.0), "ms")) == "x 2 ms (1–3)"


def test_growth_is_fitted_and_drawn_on():
    sizes = [scale.Size(n, *[float(2 * n)] * 10) for n in (1, 2, 4, 8)]
    assert scale.exponent(sizes, "empty_ms") == pytest.approx(1.0)
    assert scale.foreseen(sizes, "driver_run_ms", 512) == pytest.approx(1024.0)
    assert scale.growth(sizes) == 1.0
    page = scale.page(sizes, (0.0, 0.0))
    assert "| 512 | 1,024 |" in page and "| 8 | 16 |" in page


def test_what_would_take_too_long_or_cannot_be_started_is_said_and_spoils_nothing(monkeypatch):
    def measured(_lab, n, _limit_s):
        if n == 4:
            raise ClusterError("4 engines did not start: no room\nmore")
        clock[0] += 10.0 * n
        return scale.Size(n, *[float(n)] * 10)

    clock = [0.0]
    monkeypatch.setattr(scale, "measured", measured)
    monkeypatch.setattr(
        scale, "time", SimpleNamespace(monotonic=lambda: clock[0], strftime=time.strftime)
    )
    sizes, skipped = scale.within(None, (1, 2, 4, 8), 100.0)
    assert [size.engines for size in sizes] == [1, 2]
    assert skipped == {
        4: "4 engines did not start: no room",
        8: "it would take 80 s as the machine is, of which 70 s were left",
    }
    page = scale.page(sizes, (0.0, 0.0), skipped)
    assert "\n4 engines were not measured: 4 engines did not start: no room.\n" in page
    assert "Up to about 250 engines" in page
