"""This rank's slabs: which it has mapped, the files of its own for values that had no planned
place, and what has been moved to disk.
"""

from __future__ import annotations

import dataclasses
import gc
import shutil
from pathlib import Path
from typing import Any

import psutil
import torch

from flexkernel.memory.slab import PAGE, Slab, claim_folder, on_disk, pages, write_out
from flexkernel.wire import RunPlan

__all__ = [
    "drop_all",
    "extra_slab",
    "forget",
    "free",
    "freeze_imports",
    "let_go",
    "open_slab",
    "power",
    "spill",
    "spill_to",
]


def free(runtime: Any) -> tuple[int, int]:
    """Bytes that are free on this host: (where its slabs lie, of memory)."""
    return shutil.disk_usage(runtime.run_folder).free, psutil.virtual_memory().available


def open_slab(runtime: Any, name: str, num_bytes: int) -> Slab:
    """The slab of that name on this host, mapped once and kept."""
    if name not in runtime.slabs:
        runtime.slabs[name] = Slab(path_of(runtime, name), num_bytes)
    return runtime.slabs[name]


def path_of(runtime: Any, name: str) -> Path:
    return (runtime.spill_folder if on_disk(name) else runtime.run_folder) / name


# --- on disk --------------------------------------------------------------------------


def spill_to(runtime: Any, root: Path | None) -> tuple[Path | None, int]:
    """Have a folder on disk for what the driver moves there: (its root, bytes that are free in
    it). root=None: that which there is. The runs that lie in another one stay there no longer than
    the next load."""
    if root is not None and root != runtime.spill_root:
        found, held = claim_folder(runtime.run_folder.name, root)
        drop_spilled(runtime)
        runtime.spill_root, runtime.spill_folder, runtime.spill_claim = root, found, held
        if runtime.server is not None:
            runtime.server.also(found)
    if runtime.spill_folder is None:
        return None, 0
    return runtime.spill_root, shutil.disk_usage(runtime.spill_folder).free


def spill(
    runtime: Any, number: int, name: str, slab: str, slab_bytes: int, base: int, num_bytes: int
) -> None:
    """Move what a run keeps from a slab to a file of its own on disk; the first rank of each host
    does it."""
    if runtime.seat.local_rank == 0:
        source = open_slab(runtime, slab, slab_bytes).bytes[base : base + num_bytes]
        write_out(source, path_of(runtime, name))
    if number in runtime.runs:  # an engine that took a dead one's place may not know it
        plan, hooks, report = runtime.runs[number]
        plan = dataclasses.replace(plan, slab=name, slab_bytes=num_bytes, base=0)
        runtime.runs[number] = plan, hooks, report


def drop_spilled(runtime: Any, ending: str = ".slab") -> None:
    """Remove the files on disk whose names end so."""
    for name in [n for n in runtime.slabs if on_disk(n) and n.endswith(ending)]:
        runtime.slabs.pop(name)
    if runtime.spill_folder is not None and runtime.seat.local_rank == 0:
        for path in runtime.spill_folder.glob(f"spill-*{ending}"):
            path.unlink(missing_ok=True)


def drop_all(runtime: Any) -> None:
    """Remove all runs and what they lie in; who looks into it still may."""
    if runtime.copies is not None:
        runtime.copies.close()
    drop_spilled(runtime)
    for slab in runtime.slabs.values():
        slab.path.unlink(missing_ok=True)
    runtime.slabs, runtime.runs, runtime.copies = {}, {}, None


def let_go(runtime: Any) -> None:
    """Forget the model, if there is one or was to be one, so that its memory is free."""
    if runtime.source is not None:
        from flexkernel.engine.compat import forget_meshes

        forget_meshes()
        runtime.model = runtime.info = runtime.hooks = runtime.caller = runtime.source = None
        gc.collect()  # a sharded model is full of cycles: it would lie beside the next one
        torch.cuda.empty_cache()  # nothing where there is no GPU


def freeze_imports(runtime: Any) -> None:
    """Have the garbage collector leave alone what an engine has imported before it has its first
    seat: a few hundred thousand objects that never go, a fifth of a second each time that it looks
    through them."""
    if runtime.seat.world == 1 and runtime.model is None:
        gc.collect()
        gc.freeze()


def power(num_bytes: int) -> int:
    """The next power of two: few sizes, so that few files are made."""
    return 1 << max(num_bytes - 1, 1).bit_length()


def extra_slab(runtime: Any, plan: RunPlan, num_bytes: int) -> tuple[Slab, str]:
    """A file of this rank's own for a value that has no planned place."""
    taken = [
        name for name in runtime.slabs if name.startswith(extra_prefix(runtime.rank, plan.run))
    ]
    name = f"{extra_prefix(runtime.rank, plan.run)}{len(taken)}.slab"
    return open_slab(runtime, name, max(pages(num_bytes), PAGE)), name


def extra_prefix(rank: int, run: int) -> str:
    return f"extra-{rank}-{run}-"


def has(runtime: Any, run: int, slab: str, base: int) -> bool:
    """Whether what this run keeps lies there still: until its number is freed, nothing else is
    written there."""
    plan = runtime.runs[run][0] if run in runtime.runs else None
    return plan is not None and (plan.slab, plan.base) == (slab, base)


def forget(runtime: Any, runs: tuple[int, ...]) -> None:
    """Let go of runs that the driver's store has freed."""
    for number in runs:
        runtime.runs.pop(number, None)
        for name in [n for n in runtime.slabs if n.startswith(extra_prefix(runtime.rank, number))]:
            runtime.slabs.pop(name).path.unlink(missing_ok=True)
        if runtime.spill_folder is not None:
            drop_spilled(runtime, f"-{number}.slab")
