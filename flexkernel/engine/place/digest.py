"""The digest of a value: what ranks that hold copies compare, instead of the values.

It is exact on GPUs too. An all-reduce of NCCL gives every rank the same bits, and a tolerance wide
enough for kernels that add in any order would let addends of a sum pass as copies of one value.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import torch

from flexkernel.wire import ShardRecord

__all__ = ["digest", "digest_in_flight", "joined_digest", "landed"]


def digest(value: torch.Tensor) -> int:
    """Wrapping sum of the value's bytes as int64 words, each row times its number: equal values
    have equal digests, and so have not the same rows in another order. 2 ms per 64 MiB."""
    return int(digest_in_flight(value))


def digest_in_flight(value: torch.Tensor) -> torch.Tensor | int:
    """The same as a tensor where the value lies: on a GPU nobody waits for it."""
    if value.numel() == 0:
        return 0
    raw = value.contiguous().view(-1).view(torch.uint8)
    even = raw.numel() // 8 * 8
    if raw.storage_offset() % 8:
        raw = raw.clone()
    words, tail = raw[:even].view(torch.int64), raw[even:]
    width = max(value.shape[-1] * value.element_size() // 8, 32) if value.dim() else 1
    num_rows = words.numel() // width
    if num_rows < 2:
        total = words.sum()
    else:
        rows = words[: num_rows * width].view(num_rows, width).sum(1)
        total = (
            rows.mul_(odd_numbers(num_rows, rows.device)).sum() + words[num_rows * width :].sum()
        )
    return total + tail.sum(dtype=torch.int64) if len(tail) else total


def landed(seen: Mapping[Any, ShardRecord]) -> dict[Any, ShardRecord]:
    """The same with every digest a number, by one transfer."""
    flying = {key: one.digest for key, one in seen.items() if isinstance(one.digest, torch.Tensor)}
    numbers = torch.stack(list(flying.values())).tolist() if flying else []
    there = {
        key: dataclasses.replace(seen[key], digest=n)
        for key, n in zip(flying, numbers, strict=True)
    }
    return {**seen, **there}


def joined_digest(before: Any, after: Any) -> Any:
    """Of two values one after the other, in 64 bits."""
    # whose numbers wrap by themselves
    if isinstance(after, torch.Tensor) or isinstance(before, torch.Tensor):
        return before * 0x100000001B3 + after
    return (before * 0x100000001B3 + after + (1 << 63)) % (1 << 64) - (1 << 63)


@functools.lru_cache(maxsize=32)
def odd_numbers(count: int, device: torch.device) -> torch.Tensor:
    return torch.arange(1, 2 * count, 2, device=device)
