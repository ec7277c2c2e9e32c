"""A Ctrl-C that would leave something half done is heard once it is done."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

__all__ = ["SignalMask"]

INSISTS = 3  # the third Ctrl-C is heard at once, whatever is left half done


class SignalMask:
    """Within it SIGINT is held back. It is raised as KeyboardInterrupt at the end, or at once
    within `unmasked()`.

    Only the main thread hears signals: elsewhere, and where SIGINT is ignored, this does nothing.
    It may be nested.

    >>> with SignalMask():
    ...     num_engines = 2  # and what has to go with it
    """

    def __init__(self) -> None:
        self.num_held_back = 0
        self._open = False
        self._before: Any = None

    def __enter__(self) -> SignalMask:
        before = signal.getsignal(signal.SIGINT)
        if callable(before) and threading.current_thread() is threading.main_thread():
            self._before = before
            signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(self, *error: Any) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            if self.num_held_back:
                self._before(signal.SIGINT, None)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.num_held_back += 1
        if self._open or self.num_held_back >= INSISTS:
            self._open = False
            self.num_held_back = 0
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def unmasked(self) -> Iterator[None]:
        """Within it SIGINT raises KeyboardInterrupt at once, also one that was held back."""
        if self.num_held_back:
            self.num_held_back = 0
            raise KeyboardInterrupt
        self._open = True
        try:
            yield
        finally:
            self._open = False
