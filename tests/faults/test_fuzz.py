"""A few inputs of every kind; `make fuzz SECONDS=600` tries many."""

from __future__ import annotations

import pytest

from tools import fuzz

SEED = 564650907  # the same inputs in each run of the tests; `make fuzz` draws others


@pytest.fixture(scope="module")
def world():
    with fuzz.world() as made:
        yield made


@pytest.mark.slow
@pytest.mark.parametrize("target", fuzz.TARGETS)
def test_whatever_comes_in_is_used_or_refused(target, world):
    fuzz.attempt(world, target, 30, SEED)


def test_what_breaks_is_found(world, monkeypatch):
    """The fuzzer can fail: an error that is not ours comes out of it."""
    monkeypatch.setattr(fuzz, "select", lambda glob, _names: {}[glob])
    with pytest.raises(KeyError):
        fuzz.attempt(world, "globs", 30, 1)
