"""How long the driver waits: for the answers to a call, and for new engines."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from flexkernel.errors import ClusterError
from flexkernel.wire import ErrorReport

from .controller import PARTS_S, check_parts
from .launchers import ended, in_queue
from .process import log_tail

__all__ = ["START_S", "WATCH_S", "Patience", "arrived"]

FREED_S = 2.0  # how long ranks have to come back by themselves from groups that are broken
INTERRUPT_S = 10.0  # how long interrupted ranks have to come back before the prompt does
# after the signal, which would meet an earlier ping on its way back as it met the answer
PING_S = 0.5
WATCH_S = 0.25  # how often a waiting call looks around
LATE_S = 15.0  # how much later than the engines' own watches this one acts
START_S = 120.0  # how long a new engine may take to be there
QUEUE_S = 86400.0  # how long a job may wait for its turn before that


class Patience:
    """How long a call waits for ranks that are on their way back: its user has interrupted, or
    another rank's groups are broken. Such ranks come by themselves within a second or so; one that
    does not is interrupted, then given up."""

    def __init__(self) -> None:
        self.interrupted = self._pinged = False
        self.told = 0.0  # when the ranks were interrupted
        # rank → what it answers once it is free, also if its answer was lost
        self.pings: dict[int, Any] = {}
        self._since: float | None = None
        self._count: int | None = None
        self._moved = self._looked = time.monotonic()

    def stalled(self, count: Callable[[], int | None], timeout_s: float) -> bool:
        """Whether nothing has moved for so long that the engines' own watches must have failed.
        count: looks at every rank, and is asked once in WATCH_S only, not after each answer."""
        now = time.monotonic()
        if now < self._looked + WATCH_S:
            return False
        self._looked, found = now, count()
        if found is None or found != self._count:
            self._count, self._moved = found, now
        return now - self._moved > timeout_s + LATE_S

    def give_back(self) -> None:
        """From here on the ranks are to come back."""
        if self._since is None:
            self._since = time.monotonic()

    def heard(self, answer: Any) -> None:
        if isinstance(answer, ErrorReport) and answer.broken:
            self.give_back()

    def step(self) -> str:
        """What to do now: "interrupt", then "ping", then "give up", or ""; the first two once."""
        now = time.monotonic()
        if self.interrupted and not self.told:
            self.told = self._since = now
            return "interrupt"
        waited = now - self._since if self._since is not None else 0.0
        if waited > FREED_S and not self.told:
            self.told = now
            return "interrupt"
        if self.told and not self._pinged and now - self.told > PING_S:
            self._pinged = True
            return "ping"
        return "give up" if waited > INTERRUPT_S else ""


def arrived(
    client: Any, cluster: Any, group: Any, known: set[int], n: int, timeout_s: float
) -> list[int]:
    """The ids of this engine set's n engines, beside those known, once they are there.
    ClusterError: some have ended, or were not there after timeout_s, from the beginning of their
    job if they are one. Lame: they may never come, or could not be called."""
    queued = time.monotonic() + QUEUE_S
    end, look = time.monotonic() + timeout_s, time.monotonic() + PARTS_S
    while len(new := sorted(set(client.ids) - known)) < n:
        if time.monotonic() > look:
            check_parts(cluster)
            look = time.monotonic() + PARTS_S
        if in_queue(group) and time.monotonic() < queued:
            end = time.monotonic() + timeout_s
        logs = ended(group)
        if logs or time.monotonic() > end:
            why = "ended" if logs else f"were not there after {timeout_s:g} s"
            lines = [line for log in logs for line in log_tail(log, 20)]
            raise ClusterError("\n".join([f"{n - len(new)} of {n} new engines {why}", *lines]))
        time.sleep(0.05)
    check_parts(cluster)
    return new
