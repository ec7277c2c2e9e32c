"""Copies of values into the slabs. From a CPU each is made at once. From a GPU they travel while
the forward goes on, and are awaited before anybody is told that they are there.

What comes after may write over a value, so that it is cloned by the stream that computed it; a
side stream carries the clone away. Right into the slab where its place lies in one piece: the slab
is page-locked. A strided place gets it through page-locked memory of our own, from which the CPU
puts it there: torch would take pageable memory for that, and would wait, or on some machines not
wait, for each. Clones are bounded: one too many waits until the oldest is there.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from flexkernel.memory.slab import Slab, on_disk
from flexkernel.memory.tensors import as_bytes
from flexkernel.wire import ShardRecord

__all__ = [
    "Copies",
    "Lane",
    "Staged",
    "copies_from",
    "digest",
    "joined_digest",
    "with_landed_digests",
]

MOST_BYTES = 256 << 20  # of clones on a GPU, and of page-locked memory beside the slabs
PORTABLE = 1  # cudaHostRegisterPortable: for every context of this process


def copies_from(device: str) -> Copies:
    """What makes the copies of an engine that computes on that device."""
    return Copies() if device == "cpu" else Staged(Lane())


class Copies:
    """Copies that are there when the call returns. in_flight: whether they are not. note: what
    makes them slow."""

    in_flight = False
    note = ""

    def begin(self, slab: Slab) -> None:
        """A run begins that writes into this slab; nothing of an earlier one is on its way any
        more."""

    def write(self, place: torch.Tensor, value: torch.Tensor) -> None:
        """Copy a value into its place in a slab, of the same shape and dtype. From now on the
        value may change."""
        place.copy_(value)

    def digest(self, value: torch.Tensor) -> Any:
        """The value's digest; from a GPU a tensor of it, until landed() makes it a number."""
        return digest(value)

    def land(self) -> None:
        """Come back when everything that was written is there."""

    def drop(self) -> None:
        """The run failed: nothing of what is on its way is wanted any more. Waits for nothing."""

    def close(self) -> None:
        """Let go of the slabs, before they are unmapped."""


@dataclass
class Flight:
    """One copy on its way. clone: what is read until `done`. place: where the CPU then puts what
    is in `held`; None: it goes there by itself, or is not wanted."""

    clone: torch.Tensor
    held: torch.Tensor
    place: torch.Tensor | None
    done: Any


class Staged(Copies):
    """Copies that travel over a lane. Clones belong to their flight until it is done: no allocator
    gives their memory away before that, on whatever stream."""

    in_flight = True

    def __init__(self, lane: Any, most: int = MOST_BYTES):
        self.lane, self.most, self.num_bytes = lane, most, 0
        self._flights: deque[Flight] = deque()
        self._locked: list[Slab] = []
        self._tried: set[str] = set()

    def begin(self, slab: Slab) -> None:
        self.drop()
        self.land()
        # what is there is to leave the memory
        if slab.path.name not in self._tried and not on_disk(slab.path.name):
            self._tried.add(slab.path.name)
            problem = self.lane.lock(slab.bytes)
            if problem:
                self.note = f"{slab.path.name} cannot be page-locked ({problem}): captures take a second copy"
            else:
                self._locked.append(slab)

    def write(self, place: torch.Tensor, value: torch.Tensor) -> None:
        if not self.lane.carries(value) or not value.numel():
            place.copy_(value)
            return
        size = value.numel() * place.element_size()
        if size > self.most:
            self._write_in_pieces(place, value, size)
            return
        while self._flights and self.num_bytes + size > self.most:
            self._land_oldest()
        direct = place.is_contiguous() and self._is_locked(place)
        try:
            held = place if direct else self.lane.locked(value.shape, place.dtype)
        except RuntimeError as error:
            self.note = f"no page-locked memory was to be had ({error}): captures are copied one after another"
            self.land()  # this copy must not come before an earlier one
            place.copy_(value)
            return
        clone = self.lane.clone(value, place.dtype)
        done = self.lane.send(clone, held)
        self.num_bytes += size
        self._flights.append(Flight(clone, held, None if direct else place, done))

    def digest(self, value: torch.Tensor) -> Any:
        return digest_in_flight(value)

    def land(self) -> None:
        while self._flights:
            self._land_oldest()
        self.lane.synchronize()  # whatever else the forward has left to do, its failure included

    def drop(self) -> None:
        for flight in self._flights:
            flight.place = None

    def close(self) -> None:
        self.drop()
        try:
            self.land()
        finally:
            for slab in self._locked:
                self.lane.unlock(slab.bytes)
            self._locked, self._tried = [], set()

    def _write_in_pieces(self, place: torch.Tensor, value: torch.Tensor, size: int) -> None:
        """Along the first dim that there is something to split of: pieces of one that lies in one
        piece do so too."""
        dim = next(d for d, length in enumerate(value.shape) if length > 1)
        num_pieces = math.ceil(size / self.most)
        for part, piece in zip(
            place.chunk(num_pieces, dim), value.chunk(num_pieces, dim), strict=True
        ):
            self.write(part, piece)

    def _land_oldest(self) -> None:
        """Wait for the oldest flight, and have what it brought in its place."""
        flight = self._flights[0]
        flight.done.synchronize()
        if flight.place is not None:
            flight.place.copy_(flight.held)
        self._flights.popleft()
        self.num_bytes -= flight.clone.numel() * flight.clone.element_size()

    def _is_locked(self, place: torch.Tensor) -> bool:
        at = place.data_ptr()
        return any(0 <= at - slab.bytes.data_ptr() < slab.num_bytes for slab in self._locked)


class Lane:
    """A side stream of this process's GPU, and what CUDA has to be asked for."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()

    def carries(self, value: torch.Tensor) -> bool:
        return value.is_cuda

    def clone(self, value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """In one piece, made by the stream that computes the value. torch.OutOfMemoryError."""
        return torch.empty(value.shape, dtype=dtype, device=value.device).copy_(value)

    def locked(self, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """Page-locked memory on the host. torch keeps it for the next, once what is sent to it is
        there."""
        return torch.empty(shape, dtype=dtype, pin_memory=True)

    def send(self, clone: torch.Tensor, held: torch.Tensor) -> torch.cuda.Event:
        """Carry it away once it is computed; an event that says when it is there."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            held.copy_(clone, non_blocking=True)
            return self.stream.record_event()

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def lock(self, memory: torch.Tensor) -> str:
        """Page-lock memory that is mapped already; why that cannot be, "" if it is done."""
        error = int(
            torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), PORTABLE)
        )
        if error:
            self._take_error()
        return f"CUDA error {error}" if error else ""

    def unlock(self, memory: torch.Tensor) -> None:
        """Where that fails the GPU is lost, and the memory goes back with the process."""
        if int(torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())):
            self._take_error()

    def _take_error(self) -> None:
        """CUDA keeps the error of a call that failed, and torch would raise it from the next
        kernel."""
        try:
            torch.zeros((), device="cuda").add_(1)
        except RuntimeError:  # it is the one that is known already
            return


# --- digests --------------------------------------------------------------------------
#
# What ranks that hold copies of a value compare, instead of the values. A digest is exact on GPUs
# too: an all-reduce of NCCL gives every rank the same bits, and a tolerance wide enough for kernels
# that add in any order would let addends of a sum pass as copies of one value.


def digest(value: torch.Tensor) -> int:
    """The wrapping sum of the value's bytes as int64 words, each row times an odd number of its
    own, so that the order of rows counts. 2 ms per 64 MiB.

    value: any shape, dtype and device."""
    return int(digest_in_flight(value))


def digest_in_flight(value: torch.Tensor) -> torch.Tensor | int:
    """The same as an int64 scalar tensor on the value's device, which nobody waits for; 0 for an
    empty value. value: any shape and dtype."""
    if value.numel() == 0:
        return 0
    raw = as_bytes(value)
    if raw.storage_offset() % 8:
        raw = raw.clone()
    even = raw.numel() // 8 * 8
    words = raw[:even].view(torch.int64)
    tail = raw[even:]
    total = sum_of_words(words, row_words(value))
    return total + tail.sum(dtype=torch.int64) if len(tail) else total


def row_words(value: torch.Tensor) -> int:
    """How many words count as one row of the value, of any shape."""
    if value.dim() == 0:
        return 1
    return max(value.shape[-1] * value.element_size() // 8, 32)


def sum_of_words(words: torch.Tensor, width: int) -> torch.Tensor:
    """words: 1-D int64 -> int64 scalar on the same device: the sum of rows of `width` words, each
    times its odd number."""
    num_rows = words.numel() // width
    if num_rows < 2:
        return words.sum()
    rows = words[: num_rows * width].view(num_rows, width).sum(1)
    rest = words[num_rows * width :]
    return rows.mul_(odd_numbers(num_rows, rows.device)).sum() + rest.sum()


def with_landed_digests(records: Mapping[Any, ShardRecord]) -> dict[Any, ShardRecord]:
    """The same records with every digest a number. All that lie on a GPU come by one transfer."""
    flying = {
        key: record.digest
        for key, record in records.items()
        if isinstance(record.digest, torch.Tensor)
    }
    if not flying:
        return dict(records)
    numbers = torch.stack(list(flying.values())).tolist()
    landed = {
        key: dataclasses.replace(records[key], digest=number)
        for key, number in zip(flying, numbers, strict=True)
    }
    return {**records, **landed}


def joined_digest(first: Any, second: Any) -> Any:
    """The digest of two values one after the other, from their digests: int64, wrapping.

    Each is an int, or an int64 scalar tensor where the value lies; so is the result."""
    joined = first * 0x100000001B3 + second
    if isinstance(joined, torch.Tensor):
        return joined  # it wraps by itself
    return (joined + (1 << 63)) % (1 << 64) - (1 << 63)


@functools.lru_cache(maxsize=32)
def odd_numbers(count: int, device: torch.device) -> torch.Tensor:
    """(count,) int64 on the device: 1, 3, 5, ..."""
    return torch.arange(1, 2 * count, 2, device=device)
