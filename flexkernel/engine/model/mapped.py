"""What of a loaded model still lies in its checkpoint's file: it is copied out.

On the CPU, and where the dtype is the file's, transformers leaves parameters where safetensors has
mapped them. A file that is written anew under a loaded model would change its numbers without a
word; one that is cut off would kill the engine (SIGBUS) at its next forward.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable

import torch

from flexkernel.engine.compat import inner

__all__ = ["copied_out", "files_in_memory"]


def copied_out(parameters: Iterable[torch.Tensor]) -> int:
    """Give each of these that lies in a file memory of its own, tied ones the same; returns how
    many did."""
    regions = files_in_memory()
    starts = [start for start, _ in regions]
    copies: dict[tuple, torch.Tensor] = {}
    with torch.no_grad():
        for tensor in map(inner, parameters):
            at = tensor.data_ptr() if tensor.device.type == "cpu" else 0
            place = bisect.bisect_right(starts, at) - 1
            if at and place >= 0 and at < regions[place][1]:
                key = at, tensor.shape, tensor.stride(), tensor.dtype
                if key not in copies:
                    copies[key] = tensor.detach().clone()
                tensor.set_(copies[key])
    return len(copies)


def files_in_memory() -> list[tuple[int, int]]:
    """Where this process has files mapped that others can change: (first byte, end), in order.
    Libraries are left out; so are the slabs, which are private to this user and never hold a
    parameter."""
    found = []
    try:
        with open("/proc/self/maps") as lines:
            for line in lines:
                where, mode, *_, path = [*line.split(maxsplit=5), ""][:6]
                if path.startswith("/") and "x" not in mode and ".so" not in path:
                    start, end = (int(number, 16) for number in where.split("-"))
                    found.append((start, end))
    except OSError:  # no Linux
        return []
    return sorted(found)
