"""The watch: a rank that holds up the others is named, with where they wait; all come back, the
model stays loaded."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
import torch

import flexkernel as fk
from flexkernel.engine.ranks import watch
from flexkernel.engine.usercode import users_line_in
from flexkernel.memory.heartbeat import Heartbeat
from tests.support import models, on_engines
from tests.support.clock import Clock
from tests.support.waiting import until

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
        fk.errors.EngineError, match=rf"{said}; rank {1 - rank} waited in {waits}"
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
    until(lambda: all(session.engines.answering()), 60)
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
    assert not watch.waits(frame) and "test_watch.py" in users_line_in(frame)
    assert not watch.waits(None) and users_line_in(None) == ""


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


class Breaker:
    """Stands for the one that an engine has: counts how often it breaks the groups."""

    signals = 0
    broken = 0

    def break_groups(self) -> None:
        self.broken += 1


@pytest.fixture
def looking(tmp_path):
    """A watch over a heartbeat of its own, on a clock that tests move on in a run; between runs it
    goes by itself."""
    looking = watch.Watch(Breaker(), Clock())
    looking.heartbeat = Heartbeat(tmp_path, 0, write=True)
    over = threading.Event()

    def between_runs() -> None:
        while not over.wait(0.001):
            if not looking._turn:
                looking.clock.advance(0.1)

    thread = threading.Thread(target=between_runs)
    thread.start()
    yield looking
    over.set()
    thread.join()


def stand_still(looking: watch.Watch, ticks: int) -> None:
    """In a run: let the clock move on, and nothing else. What the last tick brings is on its way
    when this is over."""
    for _ in range(ticks):
        looking.clock.settle()
        looking.clock.advance(0.1)


def test_nobody_is_freed_who_is_in_no_run(looking):
    """A run that is over before the watch's thread has looked leaves it nothing to watch."""
    for _ in range(20):
        with looking.over(1.0):
            pass
        looking.clock.advance(10.0)  # more than the patience of a thread that looks
    assert looking.breaker.broken == 0 and not looking.heartbeat.running
    with pytest.raises(KeyboardInterrupt), looking.over(1.0):
        stand_still(looking, 100)
    assert looking.breaker.broken == 1 and looking.stall is not None


def test_a_run_whose_heartbeat_goes_on_is_left_alone(looking):
    with looking.over(1.0):
        for at in range(10):
            looking.heartbeat.beat(at)
            stand_still(looking, 5)
    assert looking.breaker.broken == 0 and looking.stall is None


def test_an_interrupt_from_the_watch_never_leaves_the_run_that_it_was_for(looking):
    """Whenever a run ends while it is being freed, what comes after it is left alone."""
    heard = []
    for ticks in range(40):
        try:
            with looking.over(1.0):
                stand_still(looking, ticks)
        except KeyboardInterrupt:
            heard.append(ticks)
        looking.clock.advance(10.0)  # an interrupt that came here would end the test
    first = heard[0]
    assert (
        1.0 + watch.NOTE_S + watch.AGAIN_S < first / 10 < 1.0 + watch.NOTE_S + watch.AGAIN_S + 0.5
    )
    assert heard == list(range(first, 40))
    assert looking.breaker.broken >= len(heard)


def test_a_run_that_ends_as_it_is_interrupted_waits_for_the_interrupt(looking, monkeypatch):
    """The watch has looked at the run for the last time, and then the run ends."""
    sending = threading.Event()
    send = signal.pthread_kill

    def late(thread: int, number: int) -> None:
        sending.set()
        until(lambda: not looking._turn)
        send(thread, number)

    monkeypatch.setattr(watch.signal, "pthread_kill", late)
    with pytest.raises(KeyboardInterrupt), looking.over(1.0):
        while not sending.is_set():
            looking.clock.advance(0.1)
            time.sleep(0.001)
