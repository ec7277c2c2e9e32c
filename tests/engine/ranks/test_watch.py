"""The watch: a rank that holds up the others is named, with where they wait; all come back, the
model stays loaded."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch

import flexkernel as fk
from flexkernel.engine.ranks import watch
from flexkernel.memory.heartbeat import Heartbeat
from tests.support import models, on_engines

IDS = [[5, 6, 7, 8, 9]]


@pytest.fixture
def impatient(session):
    """A session that gives up after two seconds."""
    session.engines.timeout_s = 2.0
    yield session
    session.engines.timeout_s = 60.0


@pytest.mark.parametrize(
    ("layout", "waits"),
    [({"tp": 2}, r"model.layers.1.mlp.down_proj"), ({"pp": 2}, r"\(root\)")],
    ids=["tp", "pp"],
)
@pytest.mark.engines(2)
def test_a_rank_that_does_not_arrive_is_named_and_where_the_others_wait(
    impatient, tiny, layout, waits
):
    session = impatient
    session.load(tiny("llama"), **layout)
    logits = session.run(IDS).logits.tensor().clone()
    weights = session.on_ranks(on_engines.weights_at)
    rank = 1 if "tp" in layout else 0
    session.on_ranks(on_engines.sleep_at, "model.layers.1.mlp.act_fn", rank)
    begin = time.monotonic()
    said = (
        rf"rank {rank} did not arrive, no progress for 2 s: "
        r"it is in model.layers.1.mlp.act_fn, at .*on_engines.py:\d+ .*"
    )
    with pytest.raises(
        fk.errors.EngineError, match=rf"{said} .*; rank {1 - rank} waited in {waits}"
    ) as caught:
        session.run(IDS)
    assert caught.value.rank == rank and time.monotonic() - begin < 20
    assert torch.equal(session.run(IDS).logits.tensor(), logits)
    assert session.on_ranks(on_engines.weights_at) == weights


@pytest.mark.long
@pytest.mark.engines(2)
def test_an_engine_that_was_stopped_is_named_and_another_takes_its_rank(impatient, tiny):
    session = impatient
    session.load(tiny("llama"), tp=2)
    logits = session.run(IDS).logits.tensor().clone()
    session.on_ranks(on_engines.die_at, "model.layers.2.mlp.act_fn", 1, signal.SIGSTOP)
    said = r"rank 1 did not arrive: its engine \(pid \d+ on .*\) was stopped by a signal, last in model.layers.2"
    with pytest.raises(
        fk.errors.EngineDied, match=said + r"(.|\n)*; rank 0 waited in model.layers.2.mlp.down_proj"
    ):
        session.run(IDS)
    begin = time.monotonic()
    with pytest.raises(fk.errors.EngineDied, match=r"rank 1's engine .* does not answer"):
        session.run(IDS)
    assert time.monotonic() - begin < 1 and "1 of 2" in repr(session.status())
    assert session.restart() == [1]
    assert torch.equal(session.run(IDS).logits.tensor(), logits)


@pytest.mark.long
@pytest.mark.engines(2)
def test_an_engine_that_wakes_up_again_keeps_its_rank(impatient, tiny):
    session = impatient
    session.load(tiny("llama"), pp=2)
    logits = session.run(IDS).logits.tensor().clone()
    session.on_ranks(on_engines.die_at, "model.layers.3.mlp", 1, signal.SIGSTOP)
    with pytest.raises(fk.errors.EngineDied, match="was stopped by a signal"):
        session.run(IDS)
    os.kill(session.engines.pids[1], signal.SIGCONT)
    end = time.monotonic() + 60
    while not all(session.engines.answering()) and time.monotonic() < end:
        time.sleep(0.1)
    assert torch.equal(session.run(IDS).logits.tensor(), logits)


def test_a_run_whose_modules_begin_is_never_broken_off():
    """Longer than the timeout in all, but never in one module."""
    session = fk.local()
    session.load(lambda: on_engines.Slow(6), reference=lambda: on_engines.Slow(6))
    session.engines.timeout_s = 1.0
    assert session.run([[1, 2, 3]]).logits.tensor().numel() > 0
    session.close()


def test_layers_are_what_is_noted():
    model = models.build("llama")
    names = [name for name, _ in model.named_modules()]
    assert watch.layers(names, dict(model.named_modules())) == [
        "",
        *(f"model.layers.{i}" for i in range(4)),
    ]
    plain = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2), "b": torch.nn.Linear(2, 2)})
    assert watch.layers(["", "a", "b"], dict(plain.named_modules())) == ["", "a", "b"]


def test_a_thread_that_waits_for_others_is_told_from_one_that_works():
    import sys

    def here():
        return sys._getframe()

    frame = here()
    assert not watch.waits(frame) and "test_watch.py" in watch.users_line(frame)
    assert not watch.waits(None) and watch.users_line(None) == ""


def test_a_heartbeat_is_read_by_whoever_looks(tmp_path):
    mine, theirs = Heartbeat(tmp_path, 3, write=True), Heartbeat(tmp_path, 3)
    assert (theirs.count, theirs.module, theirs.running) == (0, -1, False)
    mine.beat(7)
    mine.beat(2)
    mine.running = True
    assert (theirs.count, theirs.module, theirs.running) == (2, 2, True)
    with pytest.raises(FileNotFoundError):
        Heartbeat(tmp_path, 4)
    assert (tmp_path / "heartbeat-3").stat().st_mode & 0o777 == 0o600


def test_nobody_is_freed_who_is_in_no_run(tmp_path):
    """A run that is over before the watch's thread has looked leaves it nothing to watch."""
    freed = []

    class Breaker:
        signals = 0

        def break_groups(self):
            freed.append(looking.module)

    looking = watch.Watch(Breaker())
    looking.heartbeat = Heartbeat(tmp_path, 0, write=True)
    for _ in range(20):
        with looking.over(0.03):
            pass
        time.sleep(0.1)  # more than the patience of a thread that looks
    assert freed == [] and not looking.heartbeat.running
    with pytest.raises(KeyboardInterrupt), looking.over(0.2):
        time.sleep(30)
    assert len(freed) == 1 and looking.stall is not None


def test_an_interrupt_from_the_watch_never_leaves_the_run_that_it_was_for(tmp_path, monkeypatch):
    """Whenever a run ends while it is being freed, what comes after it is left alone."""

    class Breaker:
        signals = 0

        def break_groups(self):
            pass

    monkeypatch.setattr(watch, "AGAIN_S", 0.05)
    monkeypatch.setattr(watch, "NOTE_S", 0.0)
    looking = watch.Watch(Breaker())
    looking.heartbeat = Heartbeat(tmp_path, 0, write=True)
    heard = []
    for i in range(20):
        try:
            with looking.over(0.02):
                time.sleep(0.04 + i * 0.005)
        except KeyboardInterrupt:
            heard.append(i)
        time.sleep(0.05)  # one that came here would end the test
    assert heard and heard[-1] == 19
