"""Why a capture cannot be read, from what each rank reported of it."""

from __future__ import annotations

import math
from collections.abc import Mapping

from flexkernel import errors
from flexkernel.boxes import Box
from flexkernel.errors import CaptureError, PlacementError
from flexkernel.wire import CaptureKey, ShardRecord

__all__ = ["differing", "failure"]

Records = Mapping[int, ShardRecord]


def failure(key: CaptureKey, records: Records, shape: tuple[int, ...]) -> Exception | None:
    """The error of whoever reads this capture: a rank failed, copies differ, or a part is missing.
    None: it can be read."""
    for rank, record in sorted(records.items()):
        if record.error is not None:
            return failure_of(key, rank, *record.error)
    return differing(key, records) or missing(key, records, shape)


def failure_of(key: CaptureKey, rank: int, kind: str, message: str) -> Exception:
    """What a rank raised as it captured."""
    if key.module not in message:
        message = f"{key}: {message}"
    if "rank" not in message:
        message += f" (rank {rank})"
    return errors.named(kind)(message)


def differing(key: CaptureKey, records: Records) -> PlacementError | None:
    """PlacementError if ranks that hold the same part hold different numbers."""
    first: dict[Box, tuple[int, int]] = {}
    for rank, record in sorted(records.items()):
        if record.partial or record.shard.is_empty:
            continue
        other, digest = first.setdefault(record.shard, (rank, record.digest))
        if digest != record.digest:
            declared = key.module + (" input" if key.site.kind == "input" else "")
            return PlacementError(
                f"{key}: ranks {other} and {rank} hold the same part of it with different numbers: "
                "it is a partial sum, or these ranks have diverged. If it is a sum, declare it, "
                f"placements={{{declared!r}: 'partial'}}"
            )
    return None


def missing(key: CaptureKey, records: Records, shape: tuple[int, ...]) -> CaptureError | None:
    """CaptureError unless the parts that were written make the whole. They are counted, since no
    two ranks write the same element."""
    total = math.prod(shape)
    addends = max((record.partial for record in records.values()), default=0)
    parts = [record.written for record in records.values() if record.written is not None]
    if not addends:
        parts = list(dict.fromkeys(parts))
    parts += [record.shard for record in records.values() if record.region is not None]
    written = sum(part.volume(shape) for part in parts)
    if written == total * (addends or 1):
        return None
    if addends:
        return CaptureError(
            f"{key}: a sum of {addends} addends, of which {written:,} of {total * addends:,} "
            "elements came"
        )
    if records:
        return CaptureError(f"{key}: {written:,} of {total:,} elements were written")
    if key.site.gradient:
        return CaptureError(f"{key}: no gradient reached it, the loss does not depend on it")
    return CaptureError(f"{key}: it did not fire in this run")
