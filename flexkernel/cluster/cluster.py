"""The engines as one thing to call. A call goes to every rank and returns one answer a rank.

Engines never raise through a call. They answer with an ErrorReport; the earliest one that is not
about another rank is the cause, and is raised here. Before that, process groups that were broken
to free other ranks are made anew.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from flexkernel import engine
from flexkernel.errors import ClusterError, LoadError
from flexkernel.wire import ErrorReport, RankInfo, RankState

from .guarantees import Origin
from .interrupts import SignalMask
from .process import EngineProcess
from .reports import cause, with_partial

__all__ = ["Cluster", "Engine", "InProcess", "ranks_to_replace"]

DEVICES = ("cpu", "cuda")


@dataclasses.dataclass
class Engine:
    """One engine as its driver knows it.

    id: ipyparallel's. process: if it can be seen from here. job: the engine set that is its batch
    job, if it is part of one. num_interrupts: how many it has been sent. ready: False while a new
    one has no part of the model. unanswered: the ping that it has not answered; it is unresponsive
    until it does."""

    id: int = 0
    host: str = ""
    pid: int = 0
    process: EngineProcess | None = None
    job: Any = None
    num_interrupts: int = 0
    ready: bool = True
    unanswered: Any = None

    @property
    def state(self) -> str:
        """ "ready", "not ready" or "unresponsive". Whether it is alive, cluster.alive() says."""
        if not self.ready:
            return "not ready"
        if self.unanswered is not None:
            return "unresponsive"
        return "ready"


class Cluster:
    """Engines by rank.

    owned: this driver started them and ends them. reader: another notebook has them, this session
    only reads. gpus: host → how many GPUs it has. folder: the name of their slab folder.
    generation: counts the process groups that they have had. fresh: nothing has been loaded under
    these groups. loaded: the engines had a model when this driver came to them. broken: the groups
    are broken, and a rank is missing to make new ones. timeout_s: a run in which no module begins
    for so long is broken off. auto_restart: the session replaces dead engines before its next
    call. poll: called again and again while ranks work."""

    owned = True
    device = "cpu"

    def __init__(self) -> None:
        self.engines: list[Engine] = []
        self.gpus: dict[str, int] = {}
        self.folder = secrets.token_hex(8)
        self.generation = 0
        self.fresh = False
        self.loaded = False
        self.timeout_s = 60.0
        self.has_groups = False
        self.broken = False
        self.reader = False
        self.auto_restart = False
        self.closed = False
        self.poll: Callable[[], None] | None = None
        self._replacing = False

    def __getitem__(self, rank: int) -> Engine:
        return self.engines[rank]

    @property
    def size(self) -> int:
        """How many ranks there are."""
        return len(self.engines)

    @property
    def hosts(self) -> list[str]:
        """Rank → host."""
        return [one.host for one in self.engines]

    @property
    def pids(self) -> list[int]:
        """Rank → pid of its engine."""
        return [one.pid for one in self.engines]

    # --- what a backend does ----------------------------------------------------------

    def _exchange(
        self,
        method: str,
        args: Sequence[tuple],
        ranks: Sequence[int],
        progress: Callable[[int], None] | None,
    ) -> list[Any]:
        """Each of these ranks' answer to a call. args[i] are the arguments for ranks[i]."""
        raise NotImplementedError

    def close(self, end: bool | None = None) -> None:
        """Let go of the engines.

        end: whether they stop, and their model with them; by default those that this driver owns
        do."""
        raise NotImplementedError

    @property
    def origin(self) -> Origin:
        """How this session came to its engines. The guarantees for them follow from it."""
        return Origin("")

    def alive(self) -> list[bool]:
        """Rank → whether its engine is there."""
        return [not self.closed] * self.size

    def answering(self) -> list[bool]:
        """Rank → whether its engine is there, ready and responsive."""
        return self.alive()

    def check_allowed(self, method: str) -> None:
        """ClusterError if this session only reads, and the call would change something.

        For all that has an effect here, or on a process, before the engines are called."""

    def replace(self, ranks: Sequence[int], states: Mapping[int, RankState]) -> None:
        """Start new engines for these ranks. The others keep their part of the model."""
        raise ClusterError(
            "the engine is this process: it cannot be replaced, restart the notebook's kernel"
        )

    # --- calling ----------------------------------------------------------------------

    def call(
        self,
        method: str,
        *args: Any,
        ranks: Sequence[int] | None = None,
        each: Sequence[tuple] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[Any]:
        """Each rank's answer to a call of the engine, in order of rank.

        ranks: all by default. each: arguments of its own for each rank. progress: called with how
        many have answered. Raises the cause if any rank raised; the engines are idle and usable
        again when it does."""
        if self.closed:
            raise ClusterError(
                "this session is closed; start another: %flex_cluster start -n 2, or fk.start(n=2)"
            )
        self.check_allowed(method)
        if ranks is None and self.broken and not self._replacing:
            self._repair_groups(())
        if ranks is None:
            ranks = range(self.size)
        answers = self._exchange(method, each or [args] * len(ranks), ranks, progress)
        reports = [answer for answer in answers if isinstance(answer, ErrorReport)]
        if reports:
            self._repair_groups(reports)
            raise with_partial(cause(reports), answers)
        return answers

    @contextlib.contextmanager
    def watched(self, poll: Callable[[], None] | None) -> Iterator[None]:
        """Within it every call calls poll() while the ranks work. If poll() raises they are
        interrupted."""
        self.poll = poll
        try:
            yield
        finally:
            self.poll = None

    # --- process groups ---------------------------------------------------------------

    def best_device(self) -> str:
        """ "cuda" if every host has a GPU for each of its engines, else "cpu"."""
        if all(self.gpus.get(host, 0) >= self.hosts.count(host) for host in self.hosts):
            return "cuda"
        return "cpu"

    def use_device(self, device: str) -> None:
        """Have process groups for this device. LoadError: no such device, or not on every host."""
        if device not in DEVICES:
            raise LoadError(f"device={device!r} is not one of {', '.join(DEVICES)}")
        if device == "cuda":
            self._check_gpus()
        self.check_allowed("init_rank")
        if not self.has_groups or self.device != device:
            self.init_ranks(device)
            self.fresh = True

    def _check_gpus(self) -> None:
        for host in self.hosts:
            if not self.gpus.get(host):
                raise LoadError(
                    f"device='cuda': torch sees no GPU on {host}; load with device='cpu', "
                    "or install a torch for its GPUs there"
                )

    def renew_groups(self) -> None:
        """Make new process groups for a new model.

        Those of the model before would stay for ever, and a regroup would find the meshes' groups
        under other names."""
        if self.fresh:
            return
        self.call("unload")
        self.init_ranks(self.device)
        # Unlike after a regroup, which puts the loaded model's meshes on the new groups.
        self.fresh = True

    def init_ranks(self, device: str, builder: bytes | None = None) -> None:
        """Give every engine its rank, and new process groups, in a new generation.

        builder: some ranks have to build their part of the model, which may take all ranks."""
        self.device = device
        self.broken = False
        self.generation += 1
        try:
            store = self._open_store()
            infos = self.rank_infos()
            self.call(
                "init_rank",
                each=[(info, self.folder, device, builder, *store) for info in infos],
            )
        except BaseException:
            # An interrupt may meet a rank that has its new groups already, and breaks them.
            self.broken = True
            raise
        self.has_groups = True

    def _open_store(self) -> tuple:
        """Where the ranks meet to make groups, and how long they wait there."""
        if self.size == 1:
            return ()
        # One rank opens it, but all are called: they import meanwhile, which takes seconds.
        address = (self.folder, self.generation, "127.0.0.1")
        each = [(rank == 0, *address) for rank in range(self.size)]
        return (*self.call("open_store", each=each)[0], self.timeout_s)

    def rank_infos(self) -> list[RankInfo]:
        """Each rank's place in this generation."""
        hosts = self.hosts
        return [
            RankInfo(rank, self.size, hosts[:rank].count(host), self.generation, tuple(hosts))
            for rank, host in enumerate(hosts)
        ]

    def _repair_groups(self, answers: Iterable[Any]) -> None:
        """Make the groups anew if an answer says that they are broken, once all ranks answer."""
        with SignalMask():  # half of the new groups would be worth nothing
            for answer in answers:
                self.broken |= isinstance(answer, ErrorReport) and answer.broken
            if self.broken and all(self.answering()):
                self.init_ranks(self.device)


class InProcess(Cluster):
    """One engine in this process: the whole model, behind the same interface."""

    def __init__(self) -> None:
        super().__init__()
        host = os.environ.get("FLEX_HOST") or socket.gethostname()
        self.engines = [Engine(host=host, pid=os.getpid())]
        self.runtime = engine.open_runtime()
        self.gpus = {host: engine.perform(self.runtime, "inspect")["gpus"]}

    def _exchange(
        self,
        method: str,
        args: Sequence[tuple],
        ranks: Sequence[int],
        progress: Callable[[int], None] | None,
    ) -> list[Any]:
        answers = [engine.answer(self.runtime, method, *args[0])]
        if progress:
            progress(1)
        return answers

    @contextlib.contextmanager
    def watched(self, poll: Callable[[], None] | None) -> Iterator[None]:
        """The engine works in this thread: it calls poll() itself, at each new token."""
        self.runtime.tick = poll
        try:
            yield
        finally:
            self.runtime.tick = None

    def close(self, end: bool | None = None) -> None:
        if not self.closed:
            self.closed = True
            engine.perform(self.runtime, "close")


def ranks_to_replace(cluster: Cluster, rank: int | Sequence[int] | None) -> list[int]:
    """The given ranks in order, or by default those that do not answer. ClusterError: there are
    none, or one does not exist."""
    if rank is None:
        silent = [r for r, answers in enumerate(cluster.answering()) if not answers]
        if not silent:
            raise ClusterError(
                "all engines answer; name the rank of the one to replace: restart(rank=1)"
            )
        return silent
    if isinstance(rank, int):
        rank = [rank]
    ranks = sorted(set(rank))
    if not ranks:
        raise ClusterError(f"no rank is given; ranks are 0 to {cluster.size - 1}")
    for r in ranks:
        if not isinstance(r, int) or not 0 <= r < cluster.size:
            raise ClusterError(f"rank {r} does not exist; ranks are 0 to {cluster.size - 1}")
    return ranks
