"""What both sides of the other-host data plane agree on: keys, limits, dtypes, regions, indexes.

A request is one JSON frame; an answer is a JSON frame and one raw buffer for each tensor. Nothing
is ever unpickled. server.py checks each request against the file before it touches a byte, and
does not answer one without the token; client.py asks. Only these three files use zmq.
"""

from __future__ import annotations

import math
import re
from typing import Any

import torch
import zmq

from flexkernel.wire import Region, dtype_name

__all__ = ["new_keys"]

# what lies in a processor's cache until it is put in its place; half and twice of it is slower
CHUNK_BYTES = 4 << 20
REQUEST_BYTES = 64 << 10  # a longer frame is not one of ours: zmq hangs up on it
MAX_DIMS = 64
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}")
FLOATS = (
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)
RARE = (
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
    torch.complex32,
    torch.complex64,
    torch.complex128,
    torch.bool,
)
SIGNED = (torch.int8, torch.int16, torch.int32, torch.int64)
UNSIGNED = (torch.uint8, torch.uint16, torch.uint32, torch.uint64)
DTYPES = {dtype_name(dtype): dtype for dtype in (*FLOATS, *RARE, *SIGNED, *UNSIGNED)}
Tensors = tuple[torch.Tensor, ...]


def new_keys() -> tuple[bytes, bytes]:
    """(public, secret) CURVE keys for a Server that is to be reached from other hosts."""
    return zmq.curve_keypair()


def whole_number(value: Any, name: str, least: int = 0) -> int:
    if type(value) is not int or not least <= value < 2**63:
        raise ValueError(f"{name} must be a whole number from {least} on, not {str(value)[:40]!r}")
    return value


def checked_bytes(region: Region) -> int:
    """Bytes of a region that someone else described; ValueError where it describes none."""
    if not isinstance(region.slab, str) or not NAME.fullmatch(region.slab):
        raise ValueError(f"{str(region.slab)[:40]!r} is no name of a slab")
    if not isinstance(region.dtype, str) or region.dtype not in DTYPES:
        raise ValueError(f"{str(region.dtype)[:40]!r} is no dtype; there are {', '.join(DTYPES)}")
    if len(region.shape) > MAX_DIMS:
        raise ValueError(f"a shape has at most {MAX_DIMS} dims, not {len(region.shape)}")
    for dim in region.shape:
        whole_number(dim, "each dim of a shape")
    whole_number(region.offset, "the offset")
    return math.prod(region.shape) * DTYPES[region.dtype].itemsize


def typed(raw: torch.Tensor, region: Region) -> torch.Tensor:
    """Bytes as the region's tensor: of its shape and dtype, over the same memory.

    raw: (num_bytes,) uint8 on the CPU, contiguous, as many as the region has (checked_bytes) and
    aligned for its dtype. No bytes: a new empty tensor, since the strides of an empty array are
    such that torch will not view it as another dtype."""
    dtype = DTYPES[region.dtype]
    return (
        raw.view(dtype).view(region.shape) if len(raw) else torch.empty(region.shape, dtype=dtype)
    )


def pack_index(index: Any) -> list:
    """An index as JSON: whole numbers, [start, stop, step], null for a new dim, "..."."""
    packed: list = []
    for part in index if isinstance(index, tuple) else (index,):
        if isinstance(part, slice):
            packed.append(
                [None if p is None else int(p) for p in (part.start, part.stop, part.step)]
            )
        elif part is None or (
            hasattr(part, "__index__")
            and not isinstance(part, bool)
            and not getattr(part, "ndim", 0)
        ):
            packed.append(part if part is None else int(part))
        elif part is Ellipsis:
            packed.append("...")
        else:
            raise TypeError(
                "from another host, index with whole numbers and slices, or .tensor() first; "
                f"not {part!r}"
            )
    return packed


def unpack_index(packed: Any) -> tuple:
    if not isinstance(packed, list) or len(packed) > 2 * MAX_DIMS:
        raise ValueError("an index is a list of whole numbers, [start, stop, step], null and '...'")
    parts: list = []
    for part in packed:
        if (
            isinstance(part, list)
            and len(part) == 3
            and all(p is None or type(p) is int for p in part)
        ):
            parts.append(slice(*part))
        elif part is None or type(part) is int:
            parts.append(part)
        elif part == "...":
            parts.append(Ellipsis)
        else:
            raise ValueError(f"{str(part)[:40]!r} cannot be part of an index")
    return tuple(parts)
