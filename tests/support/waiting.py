"""Waiting for what comes sooner or later, and not longer."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

__all__ = ["until"]


def until(true: Callable[[], Any], timeout_s: float = 30.0) -> None:
    """Returns as soon as it is; fails if that takes longer than timeout_s seconds."""
    end = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < end, f"not in {timeout_s:g} s"
        time.sleep(0.01)
