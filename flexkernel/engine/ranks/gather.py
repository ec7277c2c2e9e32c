"""Our own collectives. Each has a timeout: it is asynchronous and polled, so it never blocks for
ever.

In an exchange one rank sees a whole tensor. On one host the parts meet in shared memory, and the
ranks send only headers. The first header tells whether all ranks came to the same edit, the second
how the edit went. Between hosts the parts are sent, too."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from flexkernel.boxes import Box
from flexkernel.engine.compat import all_gather_single, stage_peer
from flexkernel.engine.place.slabs import Memory
from flexkernel.errors import EditError, EngineError
from flexkernel.memory.slab import PAGE, pages, size_of
from flexkernel.memory.tensors import as_bytes
from flexkernel.wire import Coordinate, Layout, Region, dtype_name

__all__ = [
    "Exchange",
    "ExchangePlan",
    "Headers",
    "OtherRankFailed",
    "exchange_headers",
    "fetched",
    "gathered",
    "make_groups",
    "post",
    "receive",
    "send",
    "wait",
]

HEADER = 16  # numbers in a header
# Up to this many ranks use an all-gather for a header. More ranks send it through the first one,
# in fewer steps: 9 ms instead of 42 for 16 ranks on two cores
FEW = 2
LATE_S = 15.0  # how much longer our collectives wait than a run may stand still
# takes a third of the CPU of polling without a pause, and is faster with more ranks than cores
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


class Headers:
    """The numbers that every rank of a group has sent: headers["run"] is (ranks,) int64, one for
    each rank.

    numbers: (ranks, names) int64 on the CPU."""

    def __init__(self, names: Sequence[str], numbers: torch.Tensor):
        self._columns = {name: i for i, name in enumerate(names)}
        self._numbers = numbers

    def __getitem__(self, name: str) -> torch.Tensor:
        """(ranks,) int64 on the CPU."""
        return self._numbers[:, self._columns[name]]

    def first(self, name: str) -> int:
        """The number that the group's first rank has sent."""
        return int(self[name][0])

    def alike(self, *names: str) -> bool:
        """Whether all ranks have sent the same numbers under these names; without names, under
        all."""
        columns = [self._columns[name] for name in names] or list(self._columns.values())
        said = self._numbers[:, columns]
        return bool((said == said[0]).all())


def exchange_headers(
    timeout_s: float, group: dist.ProcessGroup | None = None, **numbers: int
) -> Headers:
    """Send a few numbers, at most 16, to all ranks of the group. Every rank of it must call, with
    the same names.

    EngineError: some rank has not called in time."""
    padding = [0] * (HEADER - len(numbers))
    return Headers(list(numbers), gathered([*numbers.values(), *padding], timeout_s, group))


def gathered(
    numbers: Sequence[int] | torch.Tensor, timeout_s: float, group: dist.ProcessGroup | None = None
) -> torch.Tensor:
    """The numbers of every rank of the group: (ranks, *numbers) int64 on the CPU.

    Every rank of the group must call, with numbers of the same shape. EngineError: some rank has
    not called in time."""
    mine = torch.as_tensor(numbers, dtype=torch.int64)
    every = torch.empty(dist.get_world_size(group), *mine.shape, dtype=torch.int64)
    if len(every) > FEW:
        first = dist.get_process_group_ranks(group)[0]
        parts = None
        if dist.get_rank(group) == 0:
            parts = list(every)
        wait(dist.gather(mine, parts, first, group, async_op=True), timeout_s, "a header")
        wait(dist.broadcast(every, first, group, async_op=True), timeout_s, "a header")
    else:
        wait(all_gather_single(every.view(-1), mine.reshape(-1), group), timeout_s, "a header")
    return every


def wait(work: dist.Work, timeout_s: float, what: str) -> None:
    """Wait until the work is done.

    EngineError after timeout_s and some seconds more: the watch, which knows who is missing,
    should report first."""
    end = time.monotonic() + timeout_s + LATE_S
    while not work.is_completed():
        if time.monotonic() > end:
            raise EngineError(f"waited {timeout_s:g} s for {what}: some rank did not come")
        time.sleep(POLL_S)
    work.wait()  # it is done: this only raises its error, if any


def make_groups(layout: Layout, rank: int) -> dict[str, dist.ProcessGroup | None]:
    """This rank's groups for exchanges; None stands for all ranks.

    "tp" shares this rank's rows. "batch" holds the same shards for other rows. "stage" holds the
    same modules. "world" is all ranks. All ranks must call, in every generation, after the model's
    own groups exist."""
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
    """Send a tensor of any shape and device to a rank, which must call fetched(). An empty tensor
    is not sent."""
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
    """The tensor that a rank posts to this one, of that shape and dtype, on the CPU."""
    data = torch.empty(shape, dtype=dtype)
    if data.numel():
        _finish(dist.irecv(as_bytes(data), rank, group=group), timeout_s)
    return data


def send(model: torch.nn.Module, tensor: torch.Tensor, step: int, timeout_s: float) -> None:
    """Send a tensor of any shape to the same rank of the stage `step` stages on. That rank must
    call receive()."""
    group, peer, on_cpu = stage_peer(model, step)
    data = tensor.detach().contiguous()
    _finish(dist.isend(data.cpu() if on_cpu else data, peer, group=group), timeout_s)


def receive(
    model: torch.nn.Module, into: torch.Tensor, step: int, timeout_s: float
) -> torch.Tensor:
    """The tensor from the same rank of the stage `step` stages on, of into's shape, dtype and
    device.

    That rank must call send(). `into` may be overwritten."""
    group, peer, on_cpu = stage_peer(model, step)
    data = into.detach().contiguous()
    data = data.cpu() if on_cpu else data
    _finish(dist.irecv(data, peer, group=group), timeout_s)
    return data.to(into.device)


def _finish(work: dist.Work | None, timeout_s: float) -> None:
    """Wait for a message between two ranks. gloo completes it only in wait(), so it cannot be
    polled.

    wait() has a timeout, and raises when the group is broken."""
    assert work is not None, "this rank is in the group"
    work.wait(timedelta(seconds=timeout_s))


@dataclass(frozen=True)
class ExchangePlan:
    """Which ranks share one tensor, and what this rank gives and takes.

    group: one of make_groups(). shape: of the whole. shard: the part that this rank holds. takes:
    the part of the result that it receives. gives: whether its shard is written into the whole; of
    several copies only one rank's is."""

    group: str
    shape: tuple[int, ...]
    shard: Box
    takes: Box
    gives: bool


class Exchange:
    """Brings the parts of a tensor together on one rank of a group, and the result back.

    On one host the parts meet in two slabs that take turns. A rank that is one exchange ahead
    writes to the other slab, and no rank can be two ahead. hosts: rank → host; if a group spans
    several hosts its ranks send their parts. coordinate: this rank's."""

    def __init__(
        self,
        groups: dict[str, dist.ProcessGroup | None],
        memory: Memory,
        hosts: Sequence[str],
        coordinate: Coordinate,
        timeout_s: float,
    ):
        self.groups = groups
        self.memory = memory
        self.hosts = hosts
        self.timeout_s = timeout_s
        self._turns: dict[str, int] = {}
        # distinguishes the slabs of groups of the same kind
        self._slab_names = {
            "world": "world",
            "stage": f"stage-{coordinate.pp}",
            "batch": f"batch-{coordinate.pp}",
            "tp": f"tp-{coordinate.pp}-{coordinate.batch}",
        }

    def once(
        self,
        plan: ExchangePlan,
        title: str,
        call: tuple[int, int],
        local: torch.Tensor,
        function: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """Run function(whole) on the group's first rank; returns this rank's part of the result.

        Every rank of the group must call. title, call: of the edit. local: this rank's part, of
        plan.shard's shape. The result has plan.takes' shape and local's dtype and device, in
        memory of its own.

        EngineError: the ranks came to different edits or shapes. EditError: the function raised it
        on this rank. OtherRankFailed: it raised on another rank."""
        members = self.groups[plan.group]
        meeting = self._meeting(plan, local.dtype)
        meeting.put(local, plan)
        edit = {"edit": zlib.crc32(title.encode()), "call": call[0], "step": call[1]}
        sizes = {f"size_{dim}": size for dim, size in enumerate(plan.shape)}
        headers = exchange_headers(
            self.timeout_s,
            members,
            **edit,
            dtype=DTYPES.index(local.dtype),
            ndim=len(plan.shape),
            **sizes,
        )
        if not headers.alike():
            raise EngineError(
                f"the ranks are at different edits, or see different shapes; this one is at {title}"
            )
        meeting.bring()
        problem: EditError | None = None
        if dist.get_rank(members) == 0:
            try:
                meeting.whole.copy_(function(meeting.whole.to(local.device)))
            except EditError as error:
                problem = error
        try:
            failed = int(problem is not None)
            headers = exchange_headers(self.timeout_s, members, **edit, failed=failed)
        finally:
            if problem is not None:  # raise it even if the groups break meanwhile: it is the cause
                raise problem
        if headers["failed"].any():
            raise OtherRankFailed(f"the edit of {title} failed on another rank")
        return meeting.take().to(local.device)

    def _meeting(self, plan: ExchangePlan, dtype: torch.dtype) -> InSlab | ByMessages:
        """Where the parts of a whole of that dtype meet."""
        members = self.groups[plan.group]
        ranks = dist.get_process_group_ranks(members)
        if len({self.hosts[rank] for rank in ranks}) > 1:
            return ByMessages(members, plan.shape, dtype, self.timeout_s)
        turn = self._turns.get(plan.group, 0)
        self._turns[plan.group] = 1 - turn
        name = dtype_name(dtype)
        num_bytes = pages(size_of(plan.shape, name)) or PAGE
        slab_name = f"exchange-{self._slab_names[plan.group]}-{turn}"
        slab = self.memory.slab_of_size(slab_name, num_bytes)
        return InSlab(slab.tensor(Region("", 0, plan.shape, name)))


class InSlab:
    """Where parts meet on one host: each rank writes its part into the whole, and reads its part
    from it.

    whole: of the whole's shape, in a slab, on the CPU."""

    def __init__(self, whole: torch.Tensor):
        self.whole = whole

    def put(self, local: torch.Tensor, plan: ExchangePlan) -> None:
        """Write this rank's part, of plan.shard's shape, into the whole. Called before the ranks
        agree."""
        self.takes = plan.takes
        if plan.gives:
            plan.shard.put(local, self.whole)

    def bring(self) -> None:
        """Called when the ranks have agreed. The whole is already in the slab."""

    def take(self) -> torch.Tensor:
        """This rank's part of the result, of plan.takes' shape, on the CPU. Called when the first
        rank has written it."""
        return self.takes.take(self.whole)


class ByMessages:
    """Where parts meet if their ranks are on several hosts: each sends its part to the first rank.

    The first rank sends the result's parts back. whole: on the first rank, of that shape and
    dtype, on the CPU."""

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        timeout_s: float,
    ):
        self.group = group
        self.ranks = dist.get_process_group_ranks(group)
        self.shape = shape
        self.dtype = dtype
        self.timeout_s = timeout_s
        self.is_first = dist.get_rank(group) == 0
        self.whole = torch.empty((0,), dtype=dtype)
        if self.is_first:
            self.whole = torch.empty(shape, dtype=dtype)

    def put(self, local: torch.Tensor, plan: ExchangePlan) -> None:
        """Keep this rank's part, of plan.shard's shape. Called before the ranks agree."""
        self.local = local
        self.plan = plan

    def bring(self) -> None:
        """Called when the ranks have agreed: send all parts to the first rank. Every rank of the
        group must call."""
        plan = self.plan
        own = [int(plan.gives), *plan.shard.numbers(), *plan.takes.numbers()]
        rows = gathered(own, self.timeout_s, self.group).tolist()
        end = 1 + Box.NUMBERS
        self.all_takes = [Box.from_numbers(row[end:]) for row in rows]
        if not self.is_first:
            if plan.gives:
                post(self.local, self.ranks[0], self.group, self.timeout_s)
            return
        for i, row in enumerate(rows):
            if row[0]:
                shard = Box.from_numbers(row[1:end])
                shard.put(self.local if i == 0 else self._from(i, shard), self.whole)

    def take(self) -> torch.Tensor:
        """This rank's part of the result, of plan.takes' shape, on the CPU. Every rank of the
        group must call."""
        if not self.is_first:
            return self._from(0, self.plan.takes)
        for rank, takes in zip(self.ranks[1:], self.all_takes[1:], strict=True):
            post(takes.take(self.whole), rank, self.group, self.timeout_s)
        return self.plan.takes.take(self.whole)

    def _from(self, i: int, box: Box) -> torch.Tensor:
        """The part of the whole that rank i of the group posts: of the box's shape, on the CPU."""
        shape = box.shape_in(self.shape)
        return fetched(shape, self.dtype, self.ranks[i], self.group, self.timeout_s)


class OtherRankFailed(EngineError):
    """This rank's edit succeeded. It failed on another rank, whose error says why."""
