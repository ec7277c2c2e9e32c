"""Our own collectives. Each can be waited for with an end: it is asynchronous and polled, never blocking.

An exchange lets one rank see a whole activation: on one host the parts meet in shared memory, and what is sent is a
header before, which says whether every rank came to the same place, and one after, which says how it went.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from ..errors import EditError, EngineError
from ..slabs import PAGE, Slab, pages, size_of
from ..wire import Box, Layout, Region
from .compat import all_gather_single, stage_peer
from .placements import narrowed

__all__ = ["HEADER", "Exchange", "header", "make_groups", "receive", "send", "wait"]

HEADER = 16  # numbers in a header
LATE_S = 15.0  # what our collectives wait longer than a run may stand still
POLL_S = 2e-4  # a third of the CPU that polling without a pause takes, and faster with more ranks than cores
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.bool]


def header(numbers: Sequence[int], timeout_s: float, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """What every rank of the group says before it goes on: (ranks, 16) int64. Every one of them must call it.

    EngineError when some rank has not come within timeout_s."""
    mine = torch.zeros(HEADER, dtype=torch.int64)
    mine[: len(numbers)] = torch.tensor(list(numbers), dtype=torch.int64)
    all_ranks = torch.empty(dist.get_world_size(group), HEADER, dtype=torch.int64)
    work = all_gather_single(all_ranks.view(-1), mine, group)
    wait(work, timeout_s, "a header")
    return all_ranks


def wait(work: dist.Work, timeout_s: float, what: str) -> None:
    """Until the work is done. EngineError long after timeout_s: the watch, which knows who is missing, comes first."""
    end = time.monotonic() + timeout_s + LATE_S
    while not work.is_completed():
        if time.monotonic() > end:
            raise EngineError(f"waited {timeout_s:g} s for {what}: some rank did not come")
        time.sleep(POLL_S)
    work.wait()  # done; this only raises what it failed with


def make_groups(layout: Layout, rank: int) -> dict[str, dist.ProcessGroup | None]:
    """This rank's groups for exchanges: "tp", which shares its rows, "batch", which holds the same shards for other
    rows, and "stage", which holds the same modules; None where that is all ranks. All ranks must call, in every
    generation, after the model's own groups are there."""
    found: dict[str, dist.ProcessGroup | None] = {}
    for name, axes in (("stage", ("pp",)), ("tp", ("pp", "batch")), ("batch", ("pp", "tp"))):
        members: dict[tuple[int, ...], list[int]] = {}
        for other in range(layout.world):
            where = layout.coordinate(other)
            members.setdefault(tuple(where[axis] for axis in axes), []).append(other)
        for ranks in members.values():
            if len(ranks) == layout.world:
                found[name] = None
            elif len(ranks) > 1:
                group = dist.new_group(ranks, backend="gloo")
                if rank in ranks:
                    found[name] = group
    return found


def send(model: torch.nn.Module, tensor: torch.Tensor, step: int, timeout_s: float) -> None:
    """Send to the rank that sits alike, so many pipeline stages on. It must receive."""
    group, peer, on_cpu = stage_peer(model, step)
    data = tensor.detach().contiguous()
    _finish(dist.isend(data.cpu() if on_cpu else data, peer, group=group), timeout_s)


def receive(model: torch.nn.Module, into: torch.Tensor, step: int, timeout_s: float) -> torch.Tensor:
    """What the rank so many stages on sends: of the shape and dtype of `into`, which may be overwritten."""
    group, peer, on_cpu = stage_peer(model, step)
    data = into.detach().contiguous()
    data = data.cpu() if on_cpu else data
    _finish(dist.irecv(data, peer, group=group), timeout_s)
    return data.to(into.device)


def _finish(work: dist.Work | None, timeout_s: float) -> None:
    """gloo ends a message between two ranks only in wait(): it cannot be polled, but it has an end, and breaks."""
    assert work is not None, "this rank is in the group"
    work.wait(timedelta(seconds=timeout_s))


class Exchange:
    """Meets the other ranks of a group over one activation, in two slabs that take turns: a rank that is one exchange
    ahead writes into the other one, and none can be two ahead. slab_of: (group, turn, bytes) → the slab."""

    def __init__(
        self, groups: dict[str, dist.ProcessGroup | None], slab_of: Callable[[str, int, int], Slab], timeout_s: float
    ):
        self.groups, self.slab_of, self.timeout_s = groups, slab_of, timeout_s
        self.turn: dict[str, int] = {}

    def once(
        self,
        what: str,
        call: int,
        group: str,
        local: torch.Tensor,
        shape: tuple[int, ...],
        holds: Box,
        reads: Box,
        writes: bool,
        function: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """function(whole), run on the group's first rank; this rank's part of the result, in memory of its own.

        local: this rank's part, `holds` of the whole of that shape; it writes it if `writes`, and takes `reads` of the
        result. Every rank of the group must call. EditError on all of them if the function raises on one."""
        dtype = str(local.dtype).removeprefix("torch.")
        turn = self.turn.get(group, 0)
        self.turn[group] = 1 - turn
        slab = self.slab_of(group, turn, pages(size_of(shape, dtype)) or PAGE)
        whole = slab.tensor(Region("", 0, shape, dtype))
        if writes:
            narrowed(whole, holds).copy_(local)
        numbers = [zlib.crc32(what.encode()), call, 0, DTYPES.index(local.dtype), len(shape), *shape]
        self._agree(header(numbers, self.timeout_s, self.groups[group]), what)
        problem: EditError | None = None
        if dist.get_rank(self.groups[group]) == 0:
            try:
                new = function(whole.to(local.device))
                whole.copy_(new)
            except EditError as error:
                problem = error
        try:
            end = [zlib.crc32(what.encode()), call, int(problem is not None)]
            said = header(end, self.timeout_s, self.groups[group])
        finally:
            if problem is not None:  # also if the groups are broken meanwhile: it is the cause
                raise problem
        if said[:, 2].any():
            raise OtherRankFailed(f"the edit of {what} failed on another rank")
        return narrowed(whole, reads).clone().to(local.device)

    def _agree(self, said: torch.Tensor, what: str) -> None:
        """Every rank must be at the same edit with the same shape and dtype."""
        if not (said == said[0]).all():
            raise EngineError(f"the ranks are at different edits, or see different shapes; this one is at {what}")


class OtherRankFailed(EngineError):
    """This rank's edit did not fail; another's did, and says why."""
