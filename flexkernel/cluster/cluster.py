"""The engines as one thing to call. A call goes to every rank and comes back with one answer a rank.

Engines never raise through a call: an error is an ErrorReport, the earliest is the cause, and groups
that were broken to free the others are made anew before it is raised.
"""

from __future__ import annotations

import contextlib
import dataclasses
import linecache
import os
import re
import secrets
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from flexkernel import engine, errors
from flexkernel.errors import ClusterError, EngineDied, EngineError, LoadError
from flexkernel.wire import ErrorReport, RankInfo, RankState, RunReport

from .guarantees import Origin
from .interrupts import SignalMask

__all__ = ["Cluster", "InProcess", "cause", "chosen", "with_partial"]

DEVICES = ("cpu", "cuda")


class Cluster:
    """Engines by rank. hosts: rank → host. owned: this driver started them and ends them."""

    owned = True
    size = 1
    device = "cpu"

    def __init__(self) -> None:
        self.hosts: list[str] = []
        self.gpus: dict[str, int] = {}  # host → how many it has
        self.folder = secrets.token_hex(8)
        self.generation = 0
        self.fresh = False  # nothing has been loaded under these groups
        self.timeout_s = 60.0  # a run in which no module begins for so long is broken off
        # of the loaded model, in the order by which engines count modules
        self.module_names: list[str] = []
        self.seated = False
        self.broken = False  # the groups were broken and could not be made anew: a rank is missing
        self.replacing = False
        self.reader = False  # another notebook has the engines, this session only looks
        self.auto_restart = False  # the session replaces dead engines before its next call
        self.closed = False
        self.poll: Callable[[], None] | None = None  # called again and again while ranks work

    # --- what a backend does ----------------------------------------------------------

    def _exchange(
        self,
        method: str,
        args: Sequence[tuple],
        ranks: Sequence[int],
        progress: Callable[[int], None] | None,
    ) -> list[Any]:
        """Each of these ranks' answer to a call, args[i] for ranks[i]."""
        raise NotImplementedError

    def close(self, end: bool | None = None) -> None:
        """Let go of the engines. end: whether they stop, with their model; by default those that
        this driver owns."""
        raise NotImplementedError

    @property
    def origin(self) -> Origin:
        """How this session came to its engines, from which it follows what can be promised for
        them."""
        return Origin("")

    def best_device(self) -> str:
        """ "cuda" where every host has a GPU for each of its engines, else "cpu"."""
        enough = all(self.gpus.get(host, 0) >= self.hosts.count(host) for host in self.hosts)
        return "cuda" if enough else "cpu"

    # --- calling ----------------------------------------------------------------------

    def call(
        self,
        method: str,
        *args: Any,
        ranks: Sequence[int] | None = None,
        each: Sequence[tuple] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[Any]:
        """Each rank's answer to one of Runtime's methods, in order of rank. each: arguments of
        their own for each rank.

        Raises the cause if any rank raised; the engines are idle and usable again when it does."""
        if self.closed:
            raise ClusterError(
                "this session is closed; start another: %flex_cluster start -n 2, or fk.start(n=2)"
            )
        self.may(method)
        if ranks is None and self.broken and not self.replacing:
            self._mend(())
        ranks = list(range(self.size)) if ranks is None else list(ranks)
        answers = self._exchange(method, each or [args] * len(ranks), ranks, progress)
        reports = [a for a in answers if isinstance(a, ErrorReport)]
        if reports:
            self._mend(reports)
            raise with_partial(cause(reports), answers)
        return answers

    def may(self, method: str) -> None:
        """ClusterError if this session only reads, and the call would change something. For all
        that has an effect here, or on a process, before the engines are called."""

    @contextlib.contextmanager
    def watched(self, poll: Callable[[], None] | None) -> Iterator[None]:
        """Within it every call calls this while the ranks work; where it raises they are
        interrupted."""
        self.poll = poll
        try:
            yield
        finally:
            self.poll = None

    def _mend(self, answers: Iterable[Any]) -> None:
        """Make the groups anew if one of these answers says that they were broken, once all ranks
        can be reached."""
        with SignalMask():  # half of new groups would be worth nothing
            self.broken |= any(
                isinstance(answer, ErrorReport) and answer.broken for answer in answers
            )
            if self.broken and all(self.answering()):
                self.seat(self.device)

    def alive(self) -> list[bool]:
        """Rank → whether its engine is there."""
        return [not self.closed] * self.size

    def answering(self) -> list[bool]:
        """Rank → whether its engine is there and answers; one that hangs does not."""
        return self.alive()

    def replace(self, ranks: Sequence[int], heritage: Mapping[int, RankState]) -> None:
        """Start new engines for these ranks; those that are left keep their part of the model
        where it is."""
        raise ClusterError(
            "the engine is this process: it cannot be replaced, restart the notebook's kernel"
        )

    def ready(self, device: str) -> None:
        """Have the ranks seated for this device. LoadError: there is none of that name, or none on
        some host."""
        if device not in DEVICES:
            raise LoadError(f"device={device!r} is not there; it is {' or '.join(DEVICES)}")
        without = (
            [host for host in self.hosts if not self.gpus.get(host)] if device == "cuda" else []
        )
        if without:
            raise LoadError(
                f"device='cuda': torch sees no GPU on {without[0]}; load with device='cpu', or install a torch for its "
                "GPUs there"
            )
        self.may("init_rank")
        if not self.seated or self.device != device:
            self.seat(device)
            self.fresh = True

    def renew(self) -> None:
        """New process groups for a new model: those of the one before would stay for ever, and a
        regroup would find the meshes' groups under other names than theirs."""
        if not self.fresh:
            self.call("unload")
            self.seat(self.device)
            # unlike after a regroup, which puts the loaded model's meshes on the new groups
            self.fresh = True

    def seat(self, device: str, builder: bytes | None = None) -> None:
        """Give every engine its rank and (again) its process groups, in a new generation. builder:
        some have to build their part of the model, and it may take all ranks to do that."""
        self.device, self.broken = device, False
        self.generation += 1
        where: tuple = ()
        try:
            if self.size > 1:
                # on all ranks, though one opens it: they import what takes seconds at the same
                # time
                at = (self.folder, self.generation, "127.0.0.1")
                store = self.call(
                    "open_store", each=[(rank == 0, *at) for rank in range(self.size)]
                )[0]
                where = (*store, self.timeout_s)
            self.call(
                "init_rank",
                each=[(seat, self.folder, device, builder, *where) for seat in self.seats()],
            )
        except (
            BaseException
        ):  # an interrupt may meet a rank that has its new groups already, and break those
            self.broken = True
            raise
        self.seated = True

    def seats(self) -> list[RankInfo]:
        """Each rank's, in this generation."""
        local = [self.hosts[:rank].count(host) for rank, host in enumerate(self.hosts)]
        return [
            RankInfo(rank, self.size, local[rank], self.generation, tuple(self.hosts))
            for rank in range(self.size)
        ]


def chosen(cluster: Cluster, rank: int | Sequence[int] | None) -> list[int]:
    """The ranks that are meant: those named, else those whose engines have died. ClusterError:
    there are none."""
    if rank is None:
        found = [r for r, answers in enumerate(cluster.answering()) if not answers]
        if not found:
            raise ClusterError(
                "all engines answer; name the rank of the one to replace: restart(rank=1)"
            )
        return found
    ranks = sorted({rank} if isinstance(rank, int) else set(rank))
    wrong = [r for r in ranks if not isinstance(r, int) or not 0 <= r < cluster.size]
    if wrong or not ranks:
        raise ClusterError(
            f"rank {wrong[0] if wrong else rank!r} is none of 0 to {cluster.size - 1}"
        )
    return ranks


def cause(reports: Sequence[ErrorReport]) -> BaseException:
    """The error that began it: a death, else the earliest that is not merely about another
    rank's."""
    first = min(reports, key=lambda r: (r.type != "EngineDied", r.secondary, r.time))
    if first.secondary and all(r.broken and not r.waited for r in reports):
        lost = "the ranks lost the connections between them in a run, and none says why; the next run makes new ones: "
        first = dataclasses.replace(first, message=lost + first.message)
    if first.type == "KeyboardInterrupt":
        return KeyboardInterrupt()
    kind = errors.named(first.type)
    if kind is EngineDied:
        return EngineDied(first.message + others_waited(reports, first), first.rank)
    if issubclass(kind, EngineError) and kind is not EngineError:
        message = with_users_line(first.message, first.traceback)
        return kind(message + others_waited(reports, first), first.rank, first.traceback)
    if kind is EngineError:
        message = first.message + others_waited(reports, first)
        if first.type not in ("EngineError",):
            message = f"{first.type} on rank {first.rank}: {first.message}"
        return EngineError(message, first.rank, first.traceback)
    return kind(first.message)


def with_users_line(message: str, remote_traceback: str) -> str:
    """The message with the text of the user's line, where the engine has only its number: the
    source of a notebook's cell is in this process."""
    bare = re.search(r"\(line (\d+): ([\w<>]+)\)", message)
    if bare is None:
        return message
    number, function = bare.groups()
    frame = rf'File "([^"]+)", line {number}, in {re.escape(function)}$'
    files = re.findall(frame, remote_traceback, re.MULTILINE)
    line = linecache.getline(files[-1], int(number)).strip() if files else ""
    return message.replace(bare[0], f"(line {number}: {line})") if line else message


def with_partial(error: BaseException, answers: Iterable[Any]) -> BaseException:
    """The error, with what each rank that can say so had captured of a run before it:
    error.flex_partial."""
    said = [
        (a,) if isinstance(a, RunReport) else a.partial
        for a in answers
        if isinstance(a, RunReport | ErrorReport)
    ]
    error.flex_partial = [reports for reports in said if reports]  # type: ignore[attr-defined]
    return error


def others_waited(reports: Sequence[ErrorReport], first: ErrorReport) -> str:
    return "".join(
        f"; rank {r.rank} waited in {r.waited}" for r in reports if r.waited and r is not first
    )


class InProcess(Cluster):
    """One engine in this process: the whole model, behind the same interface."""

    def __init__(self) -> None:
        super().__init__()
        self.hosts = [os.environ.get("FLEX_HOST") or socket.gethostname()]
        self._runtime = engine.open_runtime()
        self.gpus = {self.hosts[0]: engine.perform(self._runtime, "inspect")["gpus"]}

    def _exchange(
        self,
        method: str,
        args: Sequence[tuple],
        ranks: Sequence[int],
        progress: Callable[[int], None] | None,
    ) -> list[Any]:
        answers = [engine.answer(self._runtime, method, *args[0])]
        if progress:
            progress(1)
        return answers

    @contextlib.contextmanager
    def watched(self, poll: Callable[[], None] | None) -> Iterator[None]:
        """The engine works in this thread: it calls it itself, at each new token."""
        self._runtime.tick = poll
        try:
            yield
        finally:
            self._runtime.tick = None

    def close(self, end: bool | None = None) -> None:
        if not self.closed:
            self.closed = True
            engine.perform(self._runtime, "close")
