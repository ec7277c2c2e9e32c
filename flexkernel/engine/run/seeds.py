"""What a backward begins from: the loss's gradients of the captures it has looked at.

Rank 0 computes them. They go through a shared slab to the ranks that hold the captures.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from flexkernel.engine.ranks.gather import (
    OtherRankFailed,
    exchange_headers,
    fetched,
    gathered,
    post,
)
from flexkernel.engine.runtime import Runtime
from flexkernel.errors import LossError
from flexkernel.memory.plan import Entry
from flexkernel.memory.slab import PAGE, Slab, pages, size_of
from flexkernel.wire import Region

from .loss import CaptureState, LossCaptures, evaluate, states_of
from .recording import Recording

__all__ = ["loss_and_seeds"]


def loss_and_seeds(
    runtime: Runtime, recording: Recording
) -> tuple[float | None, dict[int, torch.Tensor]]:
    """(the loss, on rank 0; index of a capture → its whole gradient, of the capture's shape and
    dtype, on every rank). All ranks must call. LossError: it failed on this rank; OtherRankFailed:
    on rank 0."""
    plan = recording.context.plan
    modules = runtime.trainables.modules
    if runtime.world == 1:
        captures = LossCaptures(recording, states_of(recording)[None], runtime.device)
        return evaluate(plan, captures, modules)
    # once all have said what they captured, all of it is written
    states = gathered(states_of(recording), plan.timeout_s)
    bring_captures(runtime, recording, states)
    loss = 0.0
    gradients: dict[int, torch.Tensor] = {}
    problem: LossError | None = None
    if runtime.rank == 0:
        try:
            loss, gradients = evaluate(
                plan, LossCaptures(recording, states, runtime.device), modules
            )
        except LossError as error:
            problem = error
    said = exchange_headers(
        plan.timeout_s,
        run=plan.run,
        failed=int(problem is not None),
        count=len(gradients),
        num_bytes=GradientStack.size(recording.entries, gradients),
    )
    if problem is not None:
        raise problem
    if said.first("failed"):
        raise OtherRankFailed("the loss failed on rank 0")
    own_loss: float | None = None
    if runtime.rank == 0:
        own_loss = loss
    if said.first("count") == 0:
        return own_loss, {}
    num_bytes = said.first("num_bytes")
    slab = runtime.memory.slab_of_size("gradients", max(num_bytes, PAGE))
    stack = GradientStack(slab, recording.entries, said.first("count"))
    if runtime.rank == 0:
        stack.write(gradients)
    send_to_hosts(runtime, slab.bytes[:num_bytes], plan.timeout_s)
    exchange_headers(plan.timeout_s, run=plan.run, written=1)
    return own_loss, stack.read()


class GradientStack:
    """Gradients of captures one after another in a slab: first the indices of the captures, then
    each gradient on pages of its own."""

    def __init__(self, slab: Slab, entries: Sequence[Entry], count: int):
        self.slab = slab
        self.entries = entries
        self.keys = slab.tensor(Region("", 0, (count,), "int64"))

    @staticmethod
    def size(entries: Sequence[Entry], keys: Iterable[int]) -> int:
        """Bytes of a stack of these gradients."""
        keys = list(keys)
        sizes = (size_of(entries[i].shape, entries[i].formula.dtype) for i in keys)
        return pages(8 * len(keys)) + sum(map(pages, sizes))

    def write(self, gradients: dict[int, torch.Tensor]) -> None:
        """gradients: index of a capture → its gradient, of the capture's shape, on any device."""
        self.keys.copy_(torch.tensor(list(gradients)))
        for i, place in self.read().items():
            place.copy_(gradients[i])

    def read(self) -> dict[int, torch.Tensor]:
        """Index of a capture → its gradient in the slab: the capture's shape and dtype, on the
        CPU."""
        offset = pages(8 * len(self.keys))
        gradients: dict[int, torch.Tensor] = {}
        for i in self.keys.tolist():
            entry = self.entries[i]
            region = Region("", offset, entry.shape, entry.formula.dtype)
            gradients[i] = self.slab.tensor(region)
            offset += pages(size_of(region.shape, region.dtype))
        return gradients


def bring_captures(runtime: Runtime, recording: Recording, states: torch.Tensor) -> None:
    """Bring to rank 0's host what ranks of other hosts have captured: the loss looks at it there.
    All ranks must call.

    states: int64 of the shape (ranks, entries, NUMBERS)."""
    hosts = runtime.rank_info.hosts
    timeout_s = recording.context.plan.timeout_s
    for rank in [r for r, host in enumerate(hosts) if host != hosts[0]]:
        if runtime.rank not in (0, rank):
            continue
        for i, numbers in enumerate(states[rank].tolist()):
            state = CaptureState.from_numbers(numbers)
            if not state.is_written or recording.entries[i].hook.reduce is not None:
                continue
            part = state.written.cut(recording.place(i))
            if runtime.rank == rank:
                post(part, 0, None, timeout_s)
            else:
                part.copy_(fetched(part.shape, part.dtype, rank, None, timeout_s))


def send_to_hosts(runtime: Runtime, shared: torch.Tensor, timeout_s: float) -> None:
    """Bring what rank 0 has written to the first rank of every other host, into its own slab at
    the same place. All ranks must call. shared: (num_bytes,) uint8 on the CPU."""
    hosts = runtime.rank_info.hosts
    for rank in [r for r, host in enumerate(hosts) if host != hosts[0] and hosts.index(host) == r]:
        if runtime.rank == 0:
            post(shared, rank, None, timeout_s)
        elif runtime.rank == rank:
            shared.copy_(fetched(shared.shape, shared.dtype, 0, None, timeout_s))
