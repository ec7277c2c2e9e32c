"""This rank among the others: which GPU is its own."""

from __future__ import annotations

import os

import pytest
import torch

from flexkernel.engine.ranks.mesh import gpu_of, set_device
from flexkernel.errors import LoadError
from flexkernel.wire import RankInfo


def test_an_engines_gpu_is_that_of_its_number_on_its_host():
    assert [gpu_of(local_rank, 4) for local_rank in range(4)] == [0, 1, 2, 3]


def test_where_each_engine_sees_its_own_gpu_only_it_takes_that():
    assert [gpu_of(local_rank, 1) for local_rank in range(4)] == [0, 0, 0, 0]


@pytest.mark.parametrize(("local_rank", "count"), [(0, 0), (2, 2)])
def test_an_engine_without_a_gpu_is_told_what_it_sees(local_rank, count):
    with pytest.raises(
        LoadError,
        match=rf"engine {local_rank} of its host.* sees {count} GPUs.*CUDA_VISIBLE_DEVICES",
    ):
        gpu_of(local_rank, count)


def test_alone_the_process_keeps_its_threads_and_is_no_rank(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(
        torch, "set_num_threads", lambda _: pytest.fail("the threads are the user's")
    )
    set_device(RankInfo(), "cpu")
    assert "LOCAL_RANK" not in os.environ


def test_an_engine_says_which_rank_it_is_and_has_the_threads_it_was_given(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, "?")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    given: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    set_device(RankInfo(rank=5, world=8, local_rank=1), "cpu")
    assert [os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")] == [
        "5",
        "8",
        "1",
    ] and given == [3]
