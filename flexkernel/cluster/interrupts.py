"""Interrupts: a Ctrl-C that comes where something would be left half done is heard when it is
done."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

__all__ = ["SignalMask"]

INSISTS = 3  # a Ctrl-C that comes so many times is heard at once, whatever is left half done


class SignalMask:
    """Within it SIGINT waits, and is raised as KeyboardInterrupt at the end, or at once within
    `unmasked()`. On the main thread, which alone hears signals; elsewhere, and where SIGINT is
    ignored, it does nothing. May be nested.

    >>> with SignalMask():
    ...     num_engines = 2  # and what has to go with it
    """

    def __init__(self) -> None:
        self.times = 0
        self._open = False
        self._before: Any = None

    def __enter__(self) -> SignalMask:
        before = signal.getsignal(signal.SIGINT)
        if callable(before) and threading.current_thread() is threading.main_thread():
            self._before = before
            signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *error: Any) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            if self.times:
                self._before(signal.SIGINT, None)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.times += 1
        if self._open or self.times >= INSISTS:
            self._open, self.times = False, 0
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def unmasked(self) -> Iterator[None]:
        """Within it SIGINT raises KeyboardInterrupt at once; also one that came before."""
        if self.times:
            self.times = 0
            raise KeyboardInterrupt
        self._open = True
        try:
            yield
        finally:
            self._open = False
