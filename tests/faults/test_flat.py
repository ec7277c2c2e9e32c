"""Sixty runs of one cell in a real kernel take no more memory than twenty; `make flat N=1000`
makes more."""

from __future__ import annotations

import pytest

from tools import flat


@pytest.mark.slow
def test_the_same_cell_again_and_again_takes_nothing_more(tiny):
    samples = flat.repeated(tiny("llama"), 60, 10)
    print(flat.table(samples))
    assert len(samples) == 6 and {"driver", "engine 0", "engine 1", "controller", "slabs"} == set(
        samples[0][1]
    )
    assert all(
        sample["slabs"]["files"] >= 1 and sample["driver"]["MB"] > 50 for _, sample in samples
    )
    assert flat.grown(samples, 20) == []


def test_growth_is_noticed():
    base = {"driver": {"MB": 100.0, "fds": 10, "threads": 5}, "slabs": {"files": 1, "MB": 64.0}}
    more = {"driver": {"MB": 121.0, "fds": 15, "threads": 5}, "slabs": {"files": 2, "MB": 64.0}}
    assert flat.grown([(50, base), (100, base)], 50) == []
    assert [text.split(",")[0] for text in flat.grown([(50, base), (100, more)], 50)] == [
        "driver: 100 MB after 50 runs",
        "driver: 10 fds after 50 runs",
        "slabs: 1 files after 50 runs",
    ]
