"""This rank's share of a dataset: it writes its parts of a run's captures from the slab to a file
of its own."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from safetensors.torch import save_file

from flexkernel.boxes import Box
from flexkernel.engine.runtime import Runtime
from flexkernel.memory.rows import Rows, row_dims

__all__ = ["write"]


def write(runtime: Runtime, number: int, path: str, names: Mapping[int, str]) -> dict[str, Box]:
    """Write this rank's parts of a stored run's planned captures to a file, without pads.

    The file appears complete or not at all. names: index in the plan → the name in the file.
    Returns name → the part's box in the whole. Captures of which this rank wrote nothing are left
    out. If none is left, no file is made."""
    plan, hooks, report = runtime.memory.runs[number]
    where = runtime.part.planner.plan(hooks, len(plan.ids), len(plan.ids[0]))
    mask = torch.tensor(plan.mask).bool()
    parts: dict[str, torch.Tensor] = {}
    boxes: dict[str, Box] = {}
    for i, name in names.items():
        seen = report.planned.get(i)
        entry = where.entries[i]
        if seen is not None and seen.error is None and seen.written is not None:
            slab = runtime.memory.slab(plan.slab, plan.slab_bytes)
            local = seen.written.cut(slab.tensor(where.region(entry, plan.slab, plan.base)))
            parts[name] = Rows(row_dims(entry), entry.shape, seen.written).of(
                local, at_positions(mask, entry.hook.kept_positions)
            )
            boxes[name] = seen.written
    if parts:
        save_file(parts, f"{path}.part")
        os.replace(f"{path}.part", path)
    return boxes


def at_positions(mask: torch.Tensor, positions: tuple[int, ...] | None) -> torch.Tensor:
    """The mask's columns at these positions, which may count from the end; None: all columns.

    mask: (B, S) bool -> (B, positions) bool."""
    if positions is None:
        return mask
    return mask[:, [p % mask.shape[1] for p in positions]]
