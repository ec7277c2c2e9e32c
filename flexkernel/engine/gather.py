"""Our own collectives. Each can be waited for with an end: it is asynchronous and polled, never blocking."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
import torch.distributed as dist

from ..errors import EngineError
from .compat import all_gather_single

__all__ = ["HEADER", "header"]

HEADER = 16  # numbers in a header
POLL_S = 2e-4  # a third of the CPU that polling without a pause takes, and faster with more ranks than cores


def header(numbers: Sequence[int], timeout_s: float) -> torch.Tensor:
    """What every rank says before it goes on: (world, 16) int64. Every rank must call it.

    EngineError when some rank has not come within timeout_s."""
    mine = torch.zeros(HEADER, dtype=torch.int64)
    mine[: len(numbers)] = torch.tensor(list(numbers), dtype=torch.int64)
    all_ranks = torch.empty(dist.get_world_size(), HEADER, dtype=torch.int64)
    work = all_gather_single(all_ranks.view(-1), mine)
    wait(work, timeout_s, "the run header")
    return all_ranks


def wait(work: dist.Work, timeout_s: float, what: str) -> None:
    """Until the work is done; EngineError after timeout_s."""
    end = time.monotonic() + timeout_s
    while not work.is_completed():
        if time.monotonic() > end:
            raise EngineError(f"waited {timeout_s:g} s for {what}: some rank did not come")
        time.sleep(POLL_S)
    work.wait()  # done; this only raises what it failed with
