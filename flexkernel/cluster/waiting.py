"""How long the driver waits: for the answers to a call, and for new engines."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol

import ipyparallel as ipp
from ipyparallel.cluster.launcher import BaseLauncher

from flexkernel.errors import ClusterError
from flexkernel.wire import ErrorReport

from .controller import PARTS_S, check_parts
from .interrupts import SignalMask
from .launchers import ended_logs, is_queued
from .process import log_tail

__all__ = ["START_S", "Call", "Patience", "Progress", "Send", "wait_for_engines"]

# Called with (what is being done, how many engines are done, of how many).
Progress = Callable[[str, int, int], None]
# Sends a call to these ranks: rank → its result to come.
Send = Callable[[Collection[int]], dict[int, ipp.AsyncResult]]

START_S = 120.0  # how long a new engine may take to register
QUEUE_S = 86400.0  # how long a job may wait for its turn before that
ARRIVAL_POLL_S = 0.05
LOG_LINES = 20
FREED_S = 2.0  # how long ranks have to come back by themselves from groups that are broken
INTERRUPT_S = 10.0  # how long interrupted ranks have to come back before the prompt does
# After the signal. A ping sent earlier would meet it on its way back, as the answer may have.
PING_S = 0.5
WATCH_S = 0.25  # how often a waiting call looks around
POLL_S = 0.03  # the same for one whose ranks' progress somebody watches
LATE_S = 15.0  # how much later than the engines' own watches this one acts
# When a call is sent again: after a controller was restored, which may have lost it.
AGAIN_S = (0.0, 2.0, 5.0, 10.0, 20.0)
# And after its first sending, since no message is sure to arrive.
UNHEARD_S = tuple(30.0 * 2**i for i in range(12))


class Patience:
    """How long a call waits for ranks that are on their way back.

    Ranks are on their way back once their user has interrupted, or the groups of another rank are
    broken. They come by themselves within a second or so. One that does not is interrupted, then
    pinged, then given up."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.user_interrupted = False
        self.interrupted_at: float | None = None  # when the ranks were interrupted
        self._clock = clock
        self._recalled_at: float | None = None
        self._pinged = False
        self._count: int | None = None
        self._moved_at = clock()
        self._looked_at = clock()

    def stalled(self, count: Callable[[], int | None], timeout_s: float) -> bool:
        """Whether nothing has moved for so long that the engines' own watches must have failed.

        count: how many modules the ranks have entered, None outside of a run. It looks at every
        rank, and so is called once in WATCH_S only."""
        now = self._clock()
        if now < self._looked_at + WATCH_S:
            return False
        self._looked_at = now
        entered = count()
        if entered is None or entered != self._count:
            self._count = entered
            self._moved_at = now
        return now - self._moved_at > timeout_s + LATE_S

    def recall(self) -> None:
        """From here on the ranks are to come back."""
        if self._recalled_at is None:
            self._recalled_at = self._clock()

    def note(self, answer: Any) -> None:
        """Take in an answer: one of a rank with broken groups recalls the others."""
        if isinstance(answer, ErrorReport) and answer.broken:
            self.recall()

    def step(self) -> str:
        """What to do now: "interrupt", then "ping", each once, then "give up"; else ""."""
        now = self._clock()
        if self.user_interrupted and self.interrupted_at is None:
            self.interrupted_at = now
            self._recalled_at = now
            return "interrupt"
        if self._recalled_at is None:
            return ""
        waited = now - self._recalled_at
        if self.interrupted_at is None:
            if waited <= FREED_S:
                return ""
            self.interrupted_at = now
            return "interrupt"
        if not self._pinged and now - self.interrupted_at > PING_S:
            self._pinged = True
            return "ping"
        if waited > INTERRUPT_S:
            return "give up"
        return ""


class Engines(Protocol):
    """What a call needs of the engines while it waits for them."""

    timeout_s: float
    poll: Callable[[], None] | None  # called again and again while ranks work
    restored_at: float  # when a controller was started in the place of one that crashed

    def answer_of(self, rank: int, result: ipp.AsyncResult) -> Any:
        """A result that is done, as an answer or an ErrorReport."""

    def look_around(self) -> None:
        """Note what changes while ranks work. ClusterError: no answer can come any more."""

    def modules_entered(self, ranks: Collection[int]) -> int | None:
        """How many modules these ranks have entered; None outside of a run, or if unknown."""

    def interrupt(self, ranks: Sequence[int]) -> None:
        """Send SIGINT to the engines of these ranks."""

    def ping(self, ranks: Sequence[int]) -> dict[int, ipp.AsyncResult]:
        """Rank → a result that is done once its engine has finished the calls before."""

    def give_up(self, rank: int, ping: ipp.AsyncResult) -> ErrorReport:
        """Count a rank as unresponsive until this ping is done. The report of that."""


class Call:
    """One call, from its sending until every rank has answered or was given up.

    send: sends the call to some of its ranks, rank → the result to come; also a second time. mask:
    Ctrl-C is heard only while the call waits."""

    def __init__(
        self,
        engines: Engines,
        send: Send,
        ranks: Sequence[int],
        progress: Callable[[int], None] | None,
        mask: SignalMask,
    ) -> None:
        self.answers: dict[int, Any] = {}  # rank → its answer
        self.patience = Patience()
        self._engines = engines
        self._send = send
        self._progress = progress
        self._mask = mask
        self._missing = send(ranks)  # rank → its result to come
        self._sendings = list(self._missing.values())
        self._pings: dict[int, Any] = {}
        self._sent_at = time.monotonic()
        self._looked_at = self._sent_at

    @property
    def results(self) -> list[Any]:
        """All results of this call, also of a second sending."""
        return [*self._sendings, *self._pings.values()]

    def wait(self) -> None:
        """Wait until every rank has an answer. A Ctrl-C is noted in patience.user_interrupted."""
        while self._missing:
            try:
                with self._mask.unmasked():
                    self._wait_a_moment()
                self._take_answers()
                if self._missing:
                    self._look_around()
            except KeyboardInterrupt:
                self.patience.user_interrupted = True

    def _wait_a_moment(self) -> None:
        seconds = WATCH_S
        if self._engines.poll is not None:
            seconds = POLL_S
        next(iter(self._missing.values())).wait(seconds)

    def _take_answers(self) -> None:
        for rank in [rank for rank, result in self._missing.items() if result.done()]:
            self.answers[rank] = self._engines.answer_of(rank, self._missing.pop(rank))
            self.patience.note(self.answers[rank])
            if self._progress and not self.patience.user_interrupted:
                self._progress(len(self.answers))

    def _look_around(self) -> None:
        self._poll()
        self._engines.look_around()
        if self._may_be_lost():
            self._missing.update(self._send(self._missing))
            self._sendings += self._missing.values()
        self._looked_at = time.monotonic()
        self._press()

    def _poll(self) -> None:
        """Call whoever watches this call."""
        try:
            if self._engines.poll is not None:
                with self._mask.unmasked():
                    self._engines.poll()
        except BaseException:  # it keeps what it raised; here it is one more interrupt
            self._engines.poll = None
            raise KeyboardInterrupt from None

    def _may_be_lost(self) -> bool:
        """Whether it is time to send the call once more to ranks without an answer.

        Engines that had not found a restored controller yet have not got it, and no message is sure
        to arrive. An engine makes a call once, however often it comes."""
        times = [self._engines.restored_at + after for after in AGAIN_S]
        times += [self._sent_at + after for after in UNHEARD_S]
        return any(self._looked_at < at <= time.monotonic() for at in times)

    def _press(self) -> None:
        """See that ranks come back that nobody needs to wait for any more."""
        engines = self._engines
        if self.patience.stalled(lambda: engines.modules_entered(self._missing), engines.timeout_s):
            self.patience.recall()
        self._take_pings()
        step = self.patience.step()
        if step == "interrupt":
            engines.interrupt(list(self._missing))
        elif step == "ping":
            self._pings = engines.ping(list(self._missing))
        elif step == "give up":
            self._give_up()

    def _take_pings(self) -> None:
        """A rank that answers a ping has come back. If it has not answered the call, the signal met
        it as it was about to."""
        for rank, ping in self._pings.items():
            if rank in self._missing and ping.done() and not self._missing[rank].done():
                self._missing.pop(rank)
                lost = f"rank {rank} was interrupted before it could answer"
                self.answers[rank] = ErrorReport(
                    rank, "KeyboardInterrupt", lost, "", time.time(), broken=True
                )

    def _give_up(self) -> None:
        for rank, ping in self._engines.ping(list(self._missing)).items():
            self._missing.pop(rank)
            self.answers[rank] = self._engines.give_up(rank, ping)


def wait_for_engines(
    client: ipp.Client,
    cluster: ipp.Cluster,
    group: BaseLauncher,
    before: set[int],
    n: int,
    timeout_s: float,
    progress: Progress | None = None,
) -> list[int]:
    """Wait for the n engines of a new engine set to register. Returns their ids.

    before: the ids of the engines that there were. timeout_s: from now, or from the start of their
    job. ClusterError: some have ended, or are not there in time. DegradedController: they may never
    be there, or could not be called."""
    queued_until = time.monotonic() + QUEUE_S
    deadline = time.monotonic() + timeout_s
    next_look = time.monotonic() + PARTS_S
    num_reported = -1
    while True:
        new = sorted(set(client.ids) - before)
        if progress is not None and len(new) != num_reported:
            num_reported = len(new)
            progress(f"engines are there: {len(new)} of {n}", len(new), n)
        if len(new) >= n:
            check_parts(cluster)
            return new
        if time.monotonic() > next_look:
            check_parts(cluster)
            next_look = time.monotonic() + PARTS_S
        if is_queued(group) and time.monotonic() < queued_until:
            deadline = time.monotonic() + timeout_s
        check_arrival(group, n - len(new), n, deadline, timeout_s)
        time.sleep(ARRIVAL_POLL_S)


def check_arrival(
    group: BaseLauncher, num_missing: int, n: int, deadline: float, timeout_s: float
) -> None:
    """ClusterError if engines that are waited for have ended, or are late."""
    logs = ended_logs(group)
    if not logs and time.monotonic() <= deadline:
        return
    why = f"were not there after {timeout_s:g} s"
    if logs:
        why = "ended"
    lines = [line for log in logs for line in log_tail(log, LOG_LINES)]
    raise ClusterError("\n".join([f"{num_missing} of {n} new engines {why}", *lines]))
