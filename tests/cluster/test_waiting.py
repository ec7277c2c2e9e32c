"""Waiting: ranks that nobody needs to wait for any more come back, are interrupted, or given up."""

from __future__ import annotations

import pytest

from flexkernel.cluster import waiting
from flexkernel.cluster.interrupts import SignalMask
from flexkernel.cluster.waiting import Call, Patience
from flexkernel.wire import ErrorReport

BROKEN = ErrorReport(0, "RuntimeError", "the connection is closed", "", 1.0, broken=True)


class Clock:
    """Time that passes when a test says so."""

    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


def steps(patience: Patience, clock: Clock, until_s: float) -> list[tuple[float, str]]:
    """(seconds, step) for all that is to be done within so many seconds."""
    begin = clock.now
    found = []
    while clock.now - begin <= until_s:
        step = patience.step()
        if step:
            found.append((round(clock.now - begin, 1), step))
        if step == "give up":
            break
        clock.now += 0.1
    return found


def test_without_a_reason_a_call_waits_for_ever(clock):
    assert steps(Patience(clock), clock, 60) == []


def test_a_user_who_interrupts_interrupts_the_ranks_at_once(clock):
    patience = Patience(clock)
    patience.user_interrupted = True
    found = steps(patience, clock, 60)
    assert [step for _, step in found] == ["interrupt", "ping", "give up"]
    assert found[0][0] == 0
    assert found[1][0] == pytest.approx(waiting.PING_S, abs=0.2)
    assert found[2][0] == pytest.approx(waiting.INTERRUPT_S, abs=0.2)


def test_ranks_whose_groups_are_broken_may_come_back_by_themselves_first(clock):
    patience = Patience(clock)
    patience.note("an answer")
    patience.note(BROKEN)
    found = steps(patience, clock, 60)
    assert [step for _, step in found] == ["interrupt", "ping", "give up"]
    assert found[0][0] == pytest.approx(waiting.FREED_S, abs=0.2)
    assert found[2][0] == pytest.approx(waiting.INTERRUPT_S, abs=0.2)


def stalled_after(patience: Patience, clock: Clock, count, until_s: float) -> float | None:
    begin = clock.now
    while clock.now - begin < until_s:
        clock.now += waiting.WATCH_S
        if patience.stalled(lambda: count(clock.now - begin), timeout_s=5.0):
            return clock.now - begin
    return None


def test_a_run_in_which_nothing_moves_is_stalled_after_the_engines_own_watch(clock):
    found = stalled_after(Patience(clock), clock, lambda seconds: 7, 60)
    assert found == pytest.approx(5.0 + waiting.LATE_S, abs=1)


def test_a_run_that_moves_and_a_call_that_is_no_run_are_never_stalled(clock):
    assert stalled_after(Patience(clock), clock, lambda seconds: int(seconds / 4), 60) is None
    assert stalled_after(Patience(clock), clock, lambda seconds: None, 60) is None


class Result:
    """As ipyparallel's: done after so many waits."""

    def __init__(self, answer, waits: int = 1):
        self.answer = answer
        self.waits = waits

    def wait(self, seconds: float) -> None:
        self.waits -= 1

    def done(self) -> bool:
        return self.waits <= 0


class FakeEngines:
    """Engines of which some never answer."""

    timeout_s = 60.0
    poll = None
    restored_at = float("-inf")

    def __init__(self):
        self.interrupted: list[list[int]] = []
        self.pings: list[list[int]] = []

    def answer_of(self, rank, result):
        return result.answer

    def look_around(self):
        pass

    def modules_entered(self, ranks):
        return None

    def interrupt(self, ranks):
        self.interrupted.append(list(ranks))

    def ping(self, ranks):
        self.pings.append(list(ranks))
        return {rank: Result(None, 10**6) for rank in ranks}

    def give_up(self, rank, ping):
        return ErrorReport(rank, "EngineDied", f"rank {rank} hangs", "", 2.0)


def sender(results):
    def send(ranks):
        return {rank: results[rank] for rank in ranks}

    return send


def test_a_call_collects_an_answer_a_rank_and_counts_them():
    counted = []
    send = sender({0: Result("a"), 1: Result("b", 3)})
    call = Call(FakeEngines(), send, [0, 1], counted.append, SignalMask())
    call.wait()
    assert call.answers == {0: "a", 1: "b"}
    assert counted == [1, 2]
    assert len(call.results) == 2


def test_a_rank_that_does_not_come_back_is_interrupted_then_given_up(monkeypatch):
    monkeypatch.setattr(waiting, "FREED_S", 0.0)
    monkeypatch.setattr(waiting, "PING_S", 0.0)
    monkeypatch.setattr(waiting, "INTERRUPT_S", 0.05)
    engines = FakeEngines()
    send = sender({0: Result(BROKEN), 1: Result(None, 10**6)})
    call = Call(engines, send, [0, 1], None, SignalMask())
    call.wait()
    assert engines.interrupted == [[1]]
    assert engines.pings == [[1], [1]], "one to see it come back, one to know when it has"
    assert call.answers[1].message == "rank 1 hangs"


def test_a_rank_that_answers_a_ping_has_lost_its_answer(monkeypatch):
    monkeypatch.setattr(waiting, "FREED_S", 0.0)
    monkeypatch.setattr(waiting, "PING_S", 0.0)
    engines = FakeEngines()
    monkeypatch.setattr(engines, "ping", lambda ranks: {rank: Result(None, 0) for rank in ranks})
    send = sender({0: Result(BROKEN), 1: Result(None, 10**6)})
    call = Call(engines, send, [0, 1], None, SignalMask())
    call.wait()
    assert call.answers[1].type == "KeyboardInterrupt"


def test_a_call_without_an_answer_is_sent_again(monkeypatch):
    monkeypatch.setattr(waiting, "UNHEARD_S", (1e-7,))
    sent = []

    def send(ranks):
        sent.append(list(ranks))
        return {rank: Result(rank, 1 if rank == 0 else 3) for rank in ranks}

    call = Call(FakeEngines(), send, [0, 1], None, SignalMask())
    call.wait()
    assert sent == [[0, 1], [1]]
    assert call.answers == {0: 0, 1: 1}


def test_a_watcher_that_raises_interrupts_the_call():
    engines = FakeEngines()

    def raises():
        raise ValueError("enough")

    engines.poll = raises
    call = Call(engines, sender({0: Result("a", 3)}), [0], None, SignalMask())
    call.wait()
    assert call.patience.user_interrupted
    assert engines.interrupted == [[0]]
    assert engines.poll is None
