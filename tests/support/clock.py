"""A clock that stands still until a test moves it on."""

from __future__ import annotations

import threading

__all__ = ["Clock"]

PATIENCE_S = 30.0  # real seconds until whoever should sleep is missed


class Clock:
    """Takes the place of the module `time` for one thread that sleeps and looks again."""

    def __init__(self) -> None:
        self._now = 0.0
        self._due: float | None = None  # when the sleeper wakes; None: it is awake
        self._changed = threading.Condition()

    def monotonic(self) -> float:
        return self._now

    def sleep(self, seconds: float) -> None:
        with self._changed:
            self._due = self._now + seconds
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._now >= self._due)
            self._due = None

    def advance(self, seconds: float) -> None:
        """Move on; who sleeps no longer than this wakes."""
        with self._changed:
            self._now += seconds
            self._changed.notify_all()

    def settle(self) -> None:
        """Wait until the other thread has done what it was to do by now, and sleeps."""
        with self._changed:
            asleep = self._changed.wait_for(
                lambda: self._due is not None and self._due > self._now, PATIENCE_S
            )
        assert asleep, "nobody sleeps on this clock"
