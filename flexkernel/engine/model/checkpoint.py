"""A checkpoint's files: they are checked before a load, and not needed after it.

The check comes first so that a load that must fail does so while the earlier model is still there.
It reads only headers. It finds files that are shorter than their header says, which would kill an
engine that has mapped them.

On the CPU, and if the dtype is the file's, transformers leaves parameters in the mapped file.
Writing that file anew would silently change a loaded model. Truncating it would kill the engine
(SIGBUS) at its next forward. So parameters are copied out of the files."""

from __future__ import annotations

import bisect
import json
import os
import stat
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from flexkernel.engine.compat import inner
from flexkernel.errors import LoadError

__all__ = ["check_files", "copied_out", "files_in_memory"]

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
HEADER_BYTES = 100_000_000  # safetensors' own limit
OTHERS = {b"\x80": "a pickle", b"PK": "a zip archive, as torch.save writes", b"GGUF": "a GGUF file"}


def check_files(folder: Path) -> None:
    """LoadError unless the folder's weights are complete safetensors files inside the folder.

    A folder without any passes: the load itself reports that."""
    for path in weights(folder):
        check_file(path)


def weights(folder: Path) -> Iterable[Path]:
    """The files that hold the weights of a model folder."""
    if os.path.lexists(folder / WHOLE):
        return [folder / WHOLE]
    if os.path.lexists(folder / INDEX):
        return [folder / name for name in named(folder / INDEX)]
    return []


def named(index: Path) -> list[str]:
    """The files that an index names, each once. LoadError: it cannot be read, or names files
    outside its folder."""
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        outside = [
            name
            for name in names
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts
        ]
    except OSError as error:
        raise LoadError(f"{index} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise LoadError(
            f"{index} is no index of a checkpoint: {type(error).__name__}: {error}"
        ) from None
    if outside:
        raise LoadError(
            f"{index} names {outside[0]!r}, which is outside of its folder: do not trust this "
            "checkpoint"
        )
    return names


def check_file(path: Path) -> None:
    """LoadError unless this is a safetensors file of the length that its header says."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise LoadError(f"the checkpoint's {path} cannot be opened: {error.strerror}") from None
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode):
        os.close(fd)
        raise LoadError(f"the checkpoint's {path} is no regular file")
    with open(fd, "rb") as file:
        try:
            start = file.read(8)
            there = 8 + whole_bytes(header(start, found.st_size, file))
        except (
            ValueError,
            TypeError,
            AttributeError,
            LookupError,
            OverflowError,
            RecursionError,
            OSError,
        ) as error:
            looks = next(
                (
                    f"; it begins as {what} does"
                    for mark, what in OTHERS.items()
                    if start.startswith(mark)
                ),
                "",
            )
            raise LoadError(
                f"{path} is no safetensors file: {error}{looks}. Nothing else is read"
            ) from None
        there += int.from_bytes(start, "little")
        if there != found.st_size:
            raise LoadError(
                f"{path} has {found.st_size:,} bytes and its header says {there:,}: it was cut "
                "off, or is still being "
                "written; copy or fetch it again"
            )


def header(start: bytes, num_bytes: int, file: Any) -> dict[str, Any]:
    """The parsed header of a file of that many bytes. start: its first eight bytes, which are
    already read."""
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > min(num_bytes - 8, HEADER_BYTES):
        raise ValueError(f"it has {num_bytes:,} bytes, and a header of {length:,} would begin it")
    parsed = json.loads(file.read(length))
    if not isinstance(parsed, dict):
        raise ValueError("its header is no JSON object")
    return parsed


def whole_bytes(header: dict[str, Any]) -> int:
    """How many bytes of tensors a header describes."""
    ends = [
        int(entry["data_offsets"][1]) for name, entry in header.items() if name != "__metadata__"
    ]
    return max(ends, default=0)


# --- loaded ---------------------------------------------------------------------------


def copied_out(parameters: Iterable[torch.Tensor]) -> int:
    """Move each parameter that lies in a mapped file to memory of its own. Returns how many copies
    were made.

    parameters: of any shape; shapes, dtypes and devices stay. Tied parameters stay tied and share
    one copy."""
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

    Libraries are left out. The slabs need not be: they are private to this user and never hold a
    parameter."""
    found = []
    try:
        with open("/proc/self/maps") as lines:
            for line in lines:
                where, mode, *_, path = [*line.split(maxsplit=5), ""][:6]
                if path.startswith("/") and "x" not in mode and ".so" not in path:
                    start, end = (int(number, 16) for number in where.split("-"))
                    found.append((start, end))
    except OSError:  # not Linux
        return []
    return sorted(found)
