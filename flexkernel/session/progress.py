"""How far something is: who is told, and how a notebook shows it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

__all__ = ["Bar", "Progress", "reporting"]

Progress = Callable[[str, int, int], None]  # (stage, how many, of how many)
Bar = Callable[[str, int, str], AbstractContextManager[Progress]]  # (name, of how many, unit)


@contextlib.contextmanager
def reporting(
    bar: Bar | None, progress: Progress | None, name: str, unit: str, total: int = 1
) -> Iterator[Progress]:
    """Whom to tell how far something is: the given function, else the notebook's bar, else
    nobody."""
    if progress is not None:
        yield progress
    elif bar is None:
        yield nobody
    else:
        with bar(name, total, unit) as shown:
            yield shown


def nobody(_stage: str, _done: int, _total: int) -> None:
    """Report to nobody."""
