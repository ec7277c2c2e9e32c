"""The table that tools/faults.py prints: the faults that are quick to make here, the others with
`make long`."""

from __future__ import annotations

import dataclasses

import pytest

from flexkernel.errors import EngineError
from tools import faults

QUICK = ("4", "5", "7", "9", "10", "13", "16", "21", "24", "25", "27b", "28")
BENCHES: list[faults.Bench] = []


def parameters(of: list[faults.Fault]) -> list:
    """Each by its number; what is not quick to make is long."""
    return [
        pytest.param(f, id=f.number, marks=() if f.number in QUICK else pytest.mark.long)
        for f in of
    ]


@pytest.fixture
def bench(session, tiny):
    """One for all faults, made again where another test has loaded a model since."""
    if not BENCHES or not session.has_model or BENCHES[-1].info is not session.loaded.info:
        BENCHES[:] = [faults.Bench(session, tiny("llama"))]
    session.engines.timeout_s, session.engines.auto_restart = faults.TIMEOUT_S, True
    yield BENCHES[-1]
    session.engines.timeout_s, session.engines.auto_restart = 60.0, False


@pytest.mark.parametrize("fault", parameters([f for f in faults.FAULTS if f.make]))
@pytest.mark.engines(2)
def test_a_fault_on_the_bench_is_told_in_time_and_leaves_everything_as_it_was(bench, fault):
    try:
        outcomes = [bench.strike(fault)]
    except faults.Skipped as why:
        pytest.skip(str(why))
    assert faults.broken(fault, outcomes) == [], outcomes


@pytest.mark.parametrize("fault", parameters([f for f in faults.FAULTS if f.alone]))
def test_a_fault_of_a_cluster_of_its_own_too(tiny, fault):
    try:
        outcomes = [fault.alone(tiny("llama"))]
    except faults.Skipped as why:
        pytest.skip(str(why))
    assert faults.broken(fault, outcomes) == [], outcomes


def test_every_fault_of_the_list_is_made():
    assert {f.number.rstrip("abc") for f in faults.FAULTS} == {str(i) for i in range(1, 31)}
    assert set(QUICK) <= {f.number for f in faults.FAULTS}


def test_what_is_broken_is_said():
    """The table can fail: by each of its bounds and invariants."""
    fault = faults.Fault("0", "nothing", make=lambda bench: None, says="this")
    good = faults.Outcome("this", 0.1, 0.1, [], True, [])
    assert faults.broken(fault, [good]) == []
    for change, said in (
        ({"error_s": 11.0}, "until the error"),
        ({"usable_s": 11.0}, "until usable"),
        ({"equal": False}, "differs"),
        ({"reloaded": [1]}, "loaded again"),
        ({"left": ["2 processes"]}, "left behind: 2 processes"),
        ({"wrong": "no"}, "no"),
    ):
        found = faults.broken(fault, [dataclasses.replace(good, **change)])
        assert len(found) == 1 and said in found[0]
    assert "was to be raised" in faults.misread(fault, None)
    assert "'this' is not in" in faults.misread(fault, EngineError("that"))
    assert faults.misread(fault, EngineError("this")) == ""
    assert "DIFFERS" in faults.row(
        fault, [dataclasses.replace(good, equal=False)], ["next run differs"]
    )
