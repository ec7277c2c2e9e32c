"""New groups under old weights, and a new engine in a dead one's place: nothing is loaded that was
not lost."""

from __future__ import annotations

import os
import signal
import time

import psutil
import pytest
import torch

import flexkernel as fk
from flexkernel.cluster import begin, waiting
from tests.support import on_engines

IDS = [[5, 6, 7, 8, 9], [10, 11, 12, 13, 14]]


SAID = {
    signal.SIGKILL: r"signal 9 \(SIGKILL\), probably out of memory if nobody killed it: last RSS \d\.\d\d GB",
    signal.SIGABRT: r"signal 6 \(SIGABRT\)(.|\n)*Fatal Python error: Aborted(.|\n)*on_engines.py",
}


def end(session, rank: int, name: str, of: int) -> None:
    """Kill that rank's engine in a forward."""
    session.on_ranks(on_engines.die_at, name, rank, of)
    begin = time.monotonic()
    with pytest.raises(
        fk.errors.EngineDied, match=rf"rank {rank}'s engine died .*{SAID[of]}"
    ) as caught:
        session.run(IDS)
    assert caught.value.rank == rank
    assert time.monotonic() - begin < 10, "five times the bound of 2 s"


def lost_and_found(session, rank: int, name: str, bring_back, of: int = signal.SIGKILL) -> None:
    """Kill a rank in a forward and bring it back: the others kept what they had, and the next run
    is bit-equal."""

    def double(x, _ctx):
        return x * 2

    session.edit("double")(double)
    session.hook("model.layers.*.mlp", groups=["mlps"])
    session.hook("model.layers.1", edit="double")
    before = session.run(IDS)
    logits, values = before.logits.tensor().clone(), before["model.layers.2.mlp"].tensor().clone()
    weights, pids = session.on_ranks(on_engines.weights_at), session.on_ranks(os.getpid)
    assert len(weights[rank]) > 3 and values.abs().sum() > 0
    end(session, rank, name, of)
    bring_back()
    after = session.run(IDS)
    assert torch.equal(after.logits.tensor(), logits)
    assert torch.equal(after["model.layers.2.mlp"].tensor(), values)
    assert torch.equal(before["model.layers.2.mlp"].tensor(), values), "the stored run is readable"
    again, now = session.on_ranks(on_engines.weights_at), session.on_ranks(os.getpid)
    for other in range(session.engines.size):
        assert (now[other] == pids[other]) is (other != rank)
        assert other == rank or again[other] == weights[other], "what is left is where it was"
    assert session.hooks.group("list") == {"mlps": ["model.layers.*.mlp"]}
    assert session.engines.pids == now and session.engines.alive() == [True] * session.engines.size


@pytest.mark.long("{'fsdp': 2}-1", "{'pp': 2}-1")
@pytest.mark.parametrize(
    ("layout", "rank"), [({"tp": 2}, 0), ({"pp": 2}, 1), ({"fsdp": 2}, 1)], ids=str
)
@pytest.mark.engines(2)
def test_a_dead_rank_comes_back_alone(session, tiny, layout, rank, monkeypatch):
    info = session.load(tiny("llama"), **layout)
    # whoever reads the cluster's file beside its owner does not take from it how an engine ended
    for _ in range(4):
        assert repr(session.engines.cluster_id) in begin.running_clusters()

    def bring_back():
        # what the dead one was in does not count as its heir's
        with monkeypatch.context() as patch:
            patch.setattr(waiting, "LATE_S", 0.1 - session.engines.timeout_s)
            patch.setattr(waiting, "FREED_S", 0.3)
            assert session.restart(rank) == [rank]

    lost_and_found(session, rank, f"model.layers.{3 * rank}.mlp", bring_back, signal.SIGABRT)
    loaded = session.on_ranks(lambda: sum(p.numel() for p in on_engines.local_parameters()))
    assert loaded == list(info.rank_parameters), "its part only"


@pytest.mark.engines(2)
def test_a_dead_rank_comes_back_by_itself_when_asked_to(session, tiny):
    session.load(tiny("llama"), tp=2)
    session.engines.auto_restart = True
    try:
        lost_and_found(session, 1, "model.layers.1.mlp", lambda: None)
    finally:
        session.engines.auto_restart = False


@pytest.mark.long
@pytest.mark.engines(2)
def test_a_builders_model_comes_back_too(session, tiny):
    folder = str(tiny("llama"))
    session.load(
        lambda: on_engines.parallelized(folder), tp=2, reference=lambda: on_engines.whole(folder)
    )
    lost_and_found(session, 1, "model.layers.2.mlp", session.restart)


@pytest.mark.engines(2)
def test_a_builders_own_groups_are_made_again_after_a_break(session, tiny):
    pytest.importorskip("fairscale")
    folder = str(tiny("llama"))
    session.load(
        lambda: on_engines.fairscale_mlps(folder), tp=2, reference=lambda: on_engines.whole(folder)
    )
    logits = session.run(IDS).logits.tensor().clone()
    session.on_ranks(on_engines.raise_at, "model.layers.3.mlp", 1)
    with pytest.raises(fk.errors.EngineError, match="ZeroDivisionError"):
        session.run(IDS)
    assert torch.equal(session.run(IDS).logits.tensor(), logits)


@pytest.mark.long
@pytest.mark.engines(2)
def test_an_engine_that_was_stopped_is_ended_before_its_rank_is_given_to_another(
    session, tiny, tmp_path
):
    session.load(tiny("llama"), pp=2)
    session.store.spill_to(tmp_path)
    logits = session.run(IDS).logits.tensor().clone()
    pid = session.engines.pids[1]
    os.kill(pid, signal.SIGSTOP)
    session.restart(rank=1)
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    assert torch.equal(session.run(IDS).logits.tensor(), logits)
    session.store.budget = 4096  # the new engine knows where captures lie on disk, too
    run = session.run(IDS)
    assert run.plan.slab.startswith("spill-") and torch.equal(run.logits.tensor(), logits)


@pytest.mark.engines(2)
def test_what_cannot_be_replaced_is_refused(session):
    with pytest.raises(fk.errors.ClusterError, match=r"all engines answer; name the rank"):
        session.restart()
    with pytest.raises(fk.errors.ClusterError, match="rank 2 does not exist; ranks are 0 to 1"):
        session.restart(2)
    with (
        fk.local() as here,
        pytest.raises(fk.errors.ClusterError, match="the engine is this process"),
    ):
        here.restart(0)


@pytest.mark.engines(3)
def test_a_dead_rank_of_the_real_model_comes_back_alone(session, smollm2):
    info = session.load(smollm2, tp=3)
    lost_and_found(session, 1, "model.layers.10.mlp", session.restart)
    loaded = session.on_ranks(lambda: sum(p.numel() for p in on_engines.local_parameters()))
    assert loaded == list(info.rank_parameters)


@pytest.mark.engines(4)
def test_a_dead_rank_of_a_grid_comes_back_alone(session, tiny):
    session.load(tiny("llama"), tp=2, pp=2)
    lost_and_found(session, 2, "model.layers.3.mlp", session.restart)
