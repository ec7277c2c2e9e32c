"""This rank's slabs: which it has mapped, and the files of its own for values that had no planned place."""

from __future__ import annotations

import shutil
from typing import Any

import psutil

from ..slabs import PAGE, Slab, pages
from ..wire import RunPlan

__all__ = ["extra_slab", "forget", "free", "open_slab", "power"]


def free(runtime: Any) -> tuple[int, int]:
    """Bytes that are free on this host: (where its slabs lie, of memory)."""
    return shutil.disk_usage(runtime.run_folder).free, psutil.virtual_memory().available


def open_slab(runtime: Any, name: str, num_bytes: int) -> Slab:
    """The slab of that name on this host, mapped once and kept."""
    if name not in runtime.slabs:
        runtime.slabs[name] = Slab(runtime.run_folder / name, num_bytes)
    return runtime.slabs[name]


def power(num_bytes: int) -> int:
    """The next power of two: few sizes, so that few files are made."""
    return 1 << max(num_bytes - 1, 1).bit_length()


def extra_slab(runtime: Any, plan: RunPlan, num_bytes: int) -> tuple[Slab, str]:
    """A file of this rank's own for a value that has no planned place."""
    taken = [name for name in runtime.slabs if name.startswith(extra_prefix(runtime.rank, plan.run))]
    name = f"{extra_prefix(runtime.rank, plan.run)}{len(taken)}.slab"
    return open_slab(runtime, name, max(pages(num_bytes), PAGE)), name


def extra_prefix(rank: int, run: int) -> str:
    return f"extra-{rank}-{run}-"


def forget(runtime: Any, runs: tuple[int, ...]) -> None:
    """Let go of runs that the driver's store has freed."""
    for number in runs:
        runtime.runs.pop(number, None)
        for name in [n for n in runtime.slabs if n.startswith(extra_prefix(runtime.rank, number))]:
            runtime.slabs.pop(name).path.unlink(missing_ok=True)
