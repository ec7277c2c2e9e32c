"""Copies of values into the slabs.

A copy from a CPU is made at once. Copies from a GPU travel while the forward goes on; land() waits
for them before anyone is told that they are there.

Later kernels may overwrite a value. So the stream that computed it clones it, and a side stream
carries the clone away. If the place in the slab is contiguous, the clone goes straight there,
because the slab is page-locked. If the place is strided, the clone goes to page-locked memory of
ours, and the CPU copies it to its place. torch would use pageable memory for that, and wait for
each copy, or on some machines not wait at all. The bytes of clones are bounded: a copy that would
exceed the bound waits until the oldest has landed."""

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

MOST_BYTES = 256 << 20  # bound of clones on a GPU, and of page-locked memory beside the slabs
PORTABLE = 1  # cudaHostRegisterPortable: valid in every CUDA context of this process


def copies_from(device: str) -> Copies:
    """The object that copies values of an engine that computes on that device."""
    return Copies() if device == "cpu" else Staged(Lane())


class Copies:
    """Copies that are finished when write() returns.

    in_flight: whether copies may still travel after write(). note: why copies are slow, "" if they
    are not."""

    in_flight = False
    note = ""

    def begin(self, slab: Slab) -> None:
        """A run that writes into this slab begins. No copy of an earlier run travels any more."""

    def write(self, place: torch.Tensor, value: torch.Tensor) -> None:
        """Copy a value to its place in a slab, of the same shape and dtype. The value may change
        afterwards.

        value: any shape, on the engine's device. place: on the CPU."""
        place.copy_(value)

    def digest(self, value: torch.Tensor) -> Any:
        """The digest of a value of any shape, dtype and device, as an int.

        Staged gives an int64 scalar tensor instead; with_landed_digests() makes it an int."""
        return digest(value)

    def land(self) -> None:
        """Wait until everything that was written is in its place."""

    def drop(self) -> None:
        """The run failed: discard the copies that still travel. Waits for nothing."""

    def close(self) -> None:
        """Let go of the slabs before they are unmapped."""


@dataclass
class Flight:
    """One copy that travels.

    clone: the source, in use until `done`. held: page-locked memory where it arrives. place: where
    the CPU then copies it; None if `held` is the place itself, or the copy is discarded."""

    clone: torch.Tensor
    held: torch.Tensor
    place: torch.Tensor | None
    done: Any


class Staged(Copies):
    """Copies that travel over a lane.

    A flight keeps its clone until it is done, so that no allocator reuses the clone's memory
    before, on whatever stream."""

    in_flight = True

    def __init__(self, lane: Any, most: int = MOST_BYTES):
        self.lane, self.most, self.num_bytes = lane, most, 0
        self._flights: deque[Flight] = deque()
        self._locked: list[Slab] = []
        self._tried: set[str] = set()

    def begin(self, slab: Slab) -> None:
        self.drop()
        self.land()
        # a slab on disk is not locked: its pages should leave memory
        if slab.path.name not in self._tried and not on_disk(slab.path.name):
            self._tried.add(slab.path.name)
            problem = self.lane.lock(slab.bytes)
            if problem:
                self.note = f"{slab.path.name} cannot be page-locked ({problem}): captures take a second copy"
            else:
                self._locked.append(slab)

    def write(self, place: torch.Tensor, value: torch.Tensor) -> None:
        """As Copies.write. A value on the GPU returns before its copy has landed; any other is
        copied at once.

        A value above the bound, of any shape, travels in pieces. Without page-locked memory the
        copy is made at once."""
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
            self.land()  # an earlier copy must land before this one
            place.copy_(value)
            return
        clone = self.lane.clone(value, place.dtype)
        done = self.lane.send(clone, held)
        self.num_bytes += size
        self._flights.append(Flight(clone, held, None if direct else place, done))

    def digest(self, value: torch.Tensor) -> Any:
        """An int64 scalar tensor on the value's device, without waiting for it; 0 for an empty
        value."""
        return digest_in_flight(value)

    def land(self) -> None:
        while self._flights:
            self._land_oldest()
        self.lane.synchronize()  # wait for the rest of the forward, which may still fail

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
        """Write a value of any shape in pieces along its first dim longer than 1. size: its bytes
        in the slab.

        Along that dim the pieces of a contiguous place are contiguous."""
        dim = next(d for d, length in enumerate(value.shape) if length > 1)
        num_pieces = math.ceil(size / self.most)
        for part, piece in zip(
            place.chunk(num_pieces, dim), value.chunk(num_pieces, dim), strict=True
        ):
            self.write(part, piece)

    def _land_oldest(self) -> None:
        """Wait for the oldest flight and put what it brought into its place."""
        flight = self._flights[0]
        flight.done.synchronize()
        if flight.place is not None:
            flight.place.copy_(flight.held)
        self._flights.popleft()
        self.num_bytes -= flight.clone.numel() * flight.clone.element_size()

    def _is_locked(self, place: torch.Tensor) -> bool:
        """Whether a place, of any shape, lies in a page-locked slab."""
        at = place.data_ptr()
        return any(0 <= at - slab.bytes.data_ptr() < slab.num_bytes for slab in self._locked)


class Lane:
    """A side stream of this process's GPU, and the CUDA calls that copies need."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()

    def carries(self, value: torch.Tensor) -> bool:
        """Whether this lane carries a value, of any shape: whether it is on a GPU."""
        return value.is_cuda

    def clone(self, value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """A contiguous copy of the value, of its shape, on its device, in `dtype`.

        The current stream makes it, which computed the value. torch.OutOfMemoryError: the GPU is
        full."""
        return torch.empty(value.shape, dtype=dtype, device=value.device).copy_(value)

    def locked(self, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """Page-locked memory on the CPU, of that shape and dtype. RuntimeError: there is none.

        torch reuses it once the copy into it is done."""
        return torch.empty(shape, dtype=dtype, pin_memory=True)

    def send(self, clone: torch.Tensor, held: torch.Tensor) -> torch.cuda.Event:
        """Copy the clone to `held`, of the same shape and dtype, on the side stream. Returns an
        event that marks the end.

        The side stream first waits for what the current stream has queued, the clone included."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            held.copy_(clone, non_blocking=True)
            return self.stream.record_event()

    def synchronize(self) -> None:
        """Wait until the GPU has finished all that was queued."""
        torch.cuda.synchronize()

    def lock(self, memory: torch.Tensor) -> str:
        """Page-lock memory that is already mapped. Returns why that failed, "" if it did not.

        memory: (n,) uint8 on the CPU."""
        error = int(
            torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), PORTABLE)
        )
        if error:
            self._take_error()
        return f"CUDA error {error}" if error else ""

    def unlock(self, memory: torch.Tensor) -> None:
        """Undo lock(). memory: (n,) uint8 on the CPU.

        A failure is ignored: it means that the GPU is lost, and the memory is freed when the
        process ends."""
        if int(torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())):
            self._take_error()

    def _take_error(self) -> None:
        """Clear the error of a failed CUDA call. CUDA keeps it, and torch would raise it from the
        next kernel."""
        try:
            torch.zeros((), device="cuda").add_(1)
        except RuntimeError:  # this is the error of the failed call
            return


# --- digests --------------------------------------------------------------------------
#
# Ranks that hold copies of a value compare digests instead of the values. The comparison is exact
# on GPUs too: an all-reduce of NCCL gives every rank the same bits. A tolerance that fits kernels
# that add in any order would let the addends of a sum pass as copies of one value.


def digest(value: torch.Tensor) -> int:
    """The wrapping sum of the value's bytes as int64 words. value: any shape, dtype and device.

    Each row is first multiplied by an odd number of its own, so that the order of rows counts. It
    takes 2 ms per 64 MiB."""
    return int(digest_in_flight(value))


def digest_in_flight(value: torch.Tensor) -> torch.Tensor | int:
    """The same digest as an int64 scalar tensor on the value's device, without waiting for it; 0
    if the value is empty.

    value: any shape and dtype."""
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
    """How many int64 words count as one row of a value of any shape."""
    if value.dim() == 0:
        return 1
    return max(value.shape[-1] * value.element_size() // 8, 32)


def sum_of_words(words: torch.Tensor, width: int) -> torch.Tensor:
    """The sum of the words, each row of `width` words multiplied by its odd number.

    words: 1-D int64 -> int64 scalar on the same device."""
    num_rows = words.numel() // width
    if num_rows < 2:
        return words.sum()
    rows = words[: num_rows * width].view(num_rows, width).sum(1)
    rest = words[num_rows * width :]
    return rows.mul_(odd_numbers(num_rows, rows.device)).sum() + rest.sum()


def with_landed_digests(records: Mapping[Any, ShardRecord]) -> dict[Any, ShardRecord]:
    """The same records with every digest as an int. One transfer brings all digests that are on a
    GPU."""
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
    """The digest of two values in sequence, from their digests, with int64 wrapping.

    Each is an int, or an int64 scalar tensor on the value's device. The result is a tensor if one
    of them is."""
    joined = first * 0x100000001B3 + second
    if isinstance(joined, torch.Tensor):
        return joined  # torch's int64 wraps
    return (joined + (1 << 63)) % (1 << 64) - (1 << 63)


@functools.lru_cache(maxsize=32)
def odd_numbers(count: int, device: torch.device) -> torch.Tensor:
    """(count,) int64 on the device: 1, 3, 5, ..."""
    return torch.arange(1, 2 * count, 2, device=device)
