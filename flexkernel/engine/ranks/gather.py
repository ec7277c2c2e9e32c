"""Our own collectives. Each can be waited for with an end: it is asynchronous and polled, never
blocking.

An exchange lets one rank see a whole tensor: on one host the parts meet in shared memory, and what
is sent is a header before, which says whether every rank came to the same place, and one after,
which says how it went. Between hosts the parts are sent, too.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from flexkernel.boxes import WHOLE, Box
from flexkernel.engine.compat import all_gather_single, stage_peer
from flexkernel.errors import EditError, EngineError
from flexkernel.memory.slab import PAGE, Slab, pages, size_of
from flexkernel.memory.tensors import as_bytes
from flexkernel.wire import Layout, Region, dtype_name

__all__ = [
    "HEADER",
    "Exchange",
    "fetched",
    "gathered",
    "header",
    "make_groups",
    "post",
    "receive",
    "send",
    "wait",
]

HEADER = 16  # numbers in a header
# Up to so many ranks a header goes around their ring. Through the first of more it takes the more
# a fraction of the steps: 9 ms and not 42 for 16 on two cores
FEW = 2
LATE_S = 15.0  # what our collectives wait longer than a run may stand still
# a third of the CPU that polling without a pause takes, and faster with more ranks than cores
POLL_S = 2e-4
DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.bool,
]


def header(
    numbers: Sequence[int], timeout_s: float, group: dist.ProcessGroup | None = None
) -> torch.Tensor:
    """What every rank of the group says before it goes on: (ranks, 16) int64. Every one of them
    must call it.

    EngineError when some rank has not come within timeout_s."""
    return gathered([*numbers, *[0] * (HEADER - len(numbers))], timeout_s, group)


def gathered(
    numbers: Sequence[int] | torch.Tensor, timeout_s: float, group: dist.ProcessGroup | None = None
) -> torch.Tensor:
    """What every rank of the group says: (ranks, *numbers) int64. Every one must call, with as
    many numbers."""
    mine = torch.as_tensor(numbers, dtype=torch.int64)
    every = torch.empty(dist.get_world_size(group), *mine.shape, dtype=torch.int64)
    if len(every) > FEW:
        first, parts = dist.get_process_group_ranks(group)[0], None
        if dist.get_rank(group) == 0:
            parts = list(every)
        wait(dist.gather(mine, parts, first, group, async_op=True), timeout_s, "a header")
        wait(dist.broadcast(every, first, group, async_op=True), timeout_s, "a header")
    else:
        wait(all_gather_single(every.view(-1), mine.reshape(-1), group), timeout_s, "a header")
    return every


def wait(work: dist.Work, timeout_s: float, what: str) -> None:
    """Until the work is done. EngineError long after timeout_s: the watch, which knows who is
    missing, comes first."""
    end = time.monotonic() + timeout_s + LATE_S
    while not work.is_completed():
        if time.monotonic() > end:
            raise EngineError(f"waited {timeout_s:g} s for {what}: some rank did not come")
        time.sleep(POLL_S)
    work.wait()  # done; this only raises what it failed with


def make_groups(layout: Layout, rank: int) -> dict[str, dist.ProcessGroup | None]:
    """This rank's groups for exchanges: "tp", which shares its rows, "batch", which holds the same
    shards for other rows, "stage", which holds the same modules, and "world"; None where that is
    all ranks. All ranks must call, in every generation, after the model's own groups are there."""
    found: dict[str, dist.ProcessGroup | None] = {"world": None}
    for name, axes in (("stage", ("pp",)), ("tp", ("pp", "batch")), ("batch", ("pp", "tp"))):
        members: dict[tuple[int, ...], list[int]] = {}
        for other in range(layout.world):
            where = layout.coordinate(other)
            members.setdefault(tuple(getattr(where, axis) for axis in axes), []).append(other)
        for ranks in members.values():
            if len(ranks) == layout.world:
                found[name] = None
            elif len(ranks) > 1:
                group = dist.new_group(ranks, backend="gloo")
                if rank in ranks:
                    found[name] = group
    return found


def post(
    tensor: torch.Tensor, rank: int, group: dist.ProcessGroup | None, timeout_s: float
) -> None:
    """Send to a rank, which must fetch it; nothing is sent of an empty tensor."""
    if tensor.numel():
        data = as_bytes(tensor.cpu())
        _finish(dist.isend(data, rank, group=group), timeout_s)


def fetched(
    shape: Sequence[int],
    dtype: torch.dtype,
    rank: int,
    group: dist.ProcessGroup | None,
    timeout_s: float,
) -> torch.Tensor:
    """What a rank posts, of that shape and dtype."""
    data = torch.empty(shape, dtype=dtype)
    if data.numel():
        _finish(dist.irecv(as_bytes(data), rank, group=group), timeout_s)
    return data


def send(model: torch.nn.Module, tensor: torch.Tensor, step: int, timeout_s: float) -> None:
    """Send to the rank that sits alike, so many pipeline stages on. It must receive."""
    group, peer, on_cpu = stage_peer(model, step)
    data = tensor.detach().contiguous()
    _finish(dist.isend(data.cpu() if on_cpu else data, peer, group=group), timeout_s)


def receive(
    model: torch.nn.Module, into: torch.Tensor, step: int, timeout_s: float
) -> torch.Tensor:
    """What the rank so many stages on sends: of the shape and dtype of `into`, which may be
    overwritten."""
    group, peer, on_cpu = stage_peer(model, step)
    data = into.detach().contiguous()
    data = data.cpu() if on_cpu else data
    _finish(dist.irecv(data, peer, group=group), timeout_s)
    return data.to(into.device)


def _finish(work: dist.Work | None, timeout_s: float) -> None:
    """gloo ends a message between two ranks only in wait(): it cannot be polled, but it has an
    end, and breaks."""
    assert work is not None, "this rank is in the group"
    work.wait(timedelta(seconds=timeout_s))


class Exchange:
    """Meets the other ranks of a group over one tensor. slab_of: (group, turn, bytes) → a slab
    that they share.

    On one host the parts meet in two slabs that take turns: a rank that is one exchange ahead
    writes into the other one, and none can be two ahead. hosts: rank → host; a group that is on
    several sends its parts."""

    def __init__(
        self,
        groups: dict[str, dist.ProcessGroup | None],
        slab_of: Callable[[str, int, int], Slab],
        hosts: Sequence[str],
        timeout_s: float,
    ):
        self.groups, self.slab_of, self.hosts, self.timeout_s = groups, slab_of, hosts, timeout_s
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
        """function(whole), run on the group's first rank; this rank's part of the result, in
        memory of its own.

        local: this rank's part, `holds` of the whole of that shape; it gives it if `writes`, and
        takes `reads` of the result. Every rank of the group must call. EditError on all of them if
        the function raises on one."""
        members = self.groups[group]
        meeting = self._meeting(group, shape, local.dtype)
        meeting.put(local, holds if writes else None, reads)
        numbers = [
            zlib.crc32(what.encode()),
            call,
            0,
            DTYPES.index(local.dtype),
            len(shape),
            *shape,
        ]
        self._agree(header(numbers, self.timeout_s, members), what)
        meeting.bring()
        problem: EditError | None = None
        if dist.get_rank(members) == 0:
            try:
                meeting.whole.copy_(function(meeting.whole.to(local.device)))
            except EditError as error:
                problem = error
        try:
            end = [zlib.crc32(what.encode()), call, int(problem is not None)]
            said = header(end, self.timeout_s, members)
        finally:
            if problem is not None:  # also if the groups are broken meanwhile: it is the cause
                raise problem
        if said[:, 2].any():
            raise OtherRankFailed(f"the edit of {what} failed on another rank")
        return meeting.take().to(local.device)

    def _meeting(
        self, group: str, shape: tuple[int, ...], dtype: torch.dtype
    ) -> InSlab | ByMessages:
        members = self.groups[group]
        ranks = dist.get_process_group_ranks(members)
        if len({self.hosts[rank] for rank in ranks}) > 1:
            return ByMessages(members, ranks, shape, dtype, self.timeout_s)
        turn = self.turn.get(group, 0)
        self.turn[group] = 1 - turn
        name = dtype_name(dtype)
        slab = self.slab_of(group, turn, pages(size_of(shape, name)) or PAGE)
        return InSlab(slab.tensor(Region("", 0, shape, name)))

    def _agree(self, said: torch.Tensor, what: str) -> None:
        """Every rank must be at the same edit with the same shape and dtype."""
        if not (said == said[0]).all():
            raise EngineError(
                f"the ranks are at different edits, or see different shapes; this one is at {what}"
            )


class InSlab:
    """Where parts meet on one host: each rank writes its own into the whole, and reads its own of
    it."""

    def __init__(self, whole: torch.Tensor):
        self.whole = whole

    def put(self, local: torch.Tensor, holds: Box | None, reads: Box) -> None:
        """Before the ranks agree. holds: None to give nothing."""
        self.reads = reads
        if holds is not None:
            holds.put(local, self.whole)

    def bring(self) -> None:
        """After the ranks have agreed: on the first one the whole is there."""

    def take(self) -> torch.Tensor:
        """After the first one has changed the whole: this rank's part of it."""
        return self.reads.take(self.whole)


class ByMessages:
    """Where parts meet if their ranks are on several hosts: each sends its own to the first rank,
    and gets it back."""

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        ranks: Sequence[int],
        shape: tuple[int, ...],
        dtype: torch.dtype,
        timeout_s: float,
    ):
        self.group, self.ranks, self.shape, self.dtype, self.timeout_s = (
            group,
            ranks,
            shape,
            dtype,
            timeout_s,
        )
        self.first = dist.get_rank(group) == 0
        self.whole = torch.empty(shape if self.first else (0,), dtype=dtype)

    def put(self, local: torch.Tensor, holds: Box | None, reads: Box) -> None:
        self.local, self.shard, self.reads = local, holds, reads

    def bring(self) -> None:
        gives = self.shard is not None
        mine = [int(gives), *(self.shard or WHOLE).numbers(), *self.reads.numbers()]
        said = gathered(mine, self.timeout_s, self.group).tolist()
        end = 1 + Box.NUMBERS
        self.given = [Box.from_numbers(row[1:end]) if row[0] else None for row in said]
        self.taken = [Box.from_numbers(row[end:]) for row in said]
        if not self.first:
            if gives:
                post(self.local, self.ranks[0], self.group, self.timeout_s)
            return
        for i, holds in enumerate(self.given):
            if holds is not None:
                holds.put(self.local if i == 0 else self._from(i, holds), self.whole)

    def take(self) -> torch.Tensor:
        if not self.first:
            return self._from(0, self.reads)
        for rank, reads in zip(self.ranks[1:], self.taken[1:], strict=True):
            post(reads.take(self.whole), rank, self.group, self.timeout_s)
        return self.reads.take(self.whole)

    def _from(self, i: int, box: Box) -> torch.Tensor:
        shape = box.shape_in(self.shape)
        return fetched(shape, self.dtype, self.ranks[i], self.group, self.timeout_s)


class OtherRankFailed(EngineError):
    """This rank's edit did not fail; another's did, and says why."""
