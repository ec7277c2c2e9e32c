"""The engines of an ipyparallel cluster as one thing to call."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import platform
import secrets
import shlex
import signal
import socket
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import ipyparallel as ipp
import psutil

from flexkernel import engine, errors
from flexkernel._version import __version__
from flexkernel.errors import ClusterError, EngineDied
from flexkernel.memory.heartbeat import Heartbeat, start_time
from flexkernel.memory.slab import folder_path, remove_folder
from flexkernel.names import display_name
from flexkernel.wire import ErrorReport, Owner, RankState

from .cluster import Cluster, with_partial
from .controller import PARTS_S, lame, living, quiet, remove_keys, restore_controller
from .guarantees import Origin
from .interrupts import SignalMask
from .launchers import KEPT, again, engines_of, how_to_end, job_of, kind_of, launchers, preload
from .private import private_files
from .process import EngineProcess, exit_code
from .reaper import Reaper
from .waiting import START_S, WATCH_S, Patience, arrived

__all__ = ["IPyParallel"]

Send = Callable[[Collection[int]], dict[int, Any]]  # to these ranks → rank: its answer to come
TURNS = itertools.count(1)  # number this process's calls
DRIVER = secrets.token_hex(8)  # this process, as engines know it
POLL_S = 0.03  # how often a call that is watched looks at what the ranks have made so far
SETTLED_S = 2.0  # how long interrupts may take to arrive
FAREWELL_S = 2.0  # how long engines have to let go of everything before they are ended
# a result is done() a moment before get() has it: the thread that brings it is between the two
RESOLVE_S = 10.0
RESTORE_S = 1.0  # what engines and clients take to find a controller that was started again
# after that calls are sent again, whose first sending it may have lost
AGAIN_S = (0.0, 2.0, 5.0, 10.0, 20.0)
# calls without an answer, too: no message is sure to arrive
UNHEARD_S = tuple(30.0 * 2**i for i in range(12))
# nobody ends one by these
CRASHES = {signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL}
PARTING_S = 1.5  # what the parts of one that is stopped may end before it


class IPyParallel(Cluster):
    """Engines of an ipyparallel cluster: control only, an importable function and plain data."""

    def __init__(
        self, cluster: Any, client: Any, owned: bool, take: bool = False, read_only: bool = False
    ):
        super().__init__()
        self._cluster, self._client, self.owned, self.reader = cluster, client, owned, read_only
        self.owner: Owner | None = None  # who has the engines that this session only looks at
        self.engines: list[int] = sorted(client.ids)  # rank → ipyparallel's engine id
        self.size = len(self.engines)
        self.hosts = [""] * self.size
        self.pids = [0] * self.size
        self.vitals: dict[int, EngineProcess] = {}  # of the engines on this host, by rank
        self._jobs: dict[int, Any] = {}  # rank → the batch system's job that its engine is part of
        self._views: dict[tuple[int, ...], Any] = {}  # engines → what sends to them
        self._deaf: dict[int, Any] = {}  # rank → what it answers once it is free
        self._signals: dict[int, int] = {}  # rank → how many interrupts its engine has been sent
        self._unfit: set[int] = set()  # ranks whose new engine has not got its part of the model
        self.reaper: Reaper | None = None
        # it was started to outlive its notebook
        self.kept = cluster.cluster_id.startswith(KEPT) and not read_only
        # when a controller was started in the place of one that crashed
        self._restored = -math.inf
        # when it was last looked whether the controller is all there
        self._inspected = time.monotonic()
        self._greet(take)

    @property
    def cluster_id(self) -> str:
        return self._cluster.cluster_id

    @property
    def origin(self) -> Origin:
        controller = getattr(self._cluster.controller, "process", None)
        kind = kind_of(self._cluster.engine_launcher_class)
        return Origin(kind, self.owned, self.kept, controller is not None, self.reader)

    def _greet(self, take: bool) -> None:
        """Ask every engine who it is; agree on ranks: those they have, else by host. take: whoever
        has them now."""
        hellos = self._attach(range(self.size), take)
        seats = [hello["rank_info"] for hello in hellos]
        self.loaded = all(hello["loaded"] for hello in hellos)
        kept = sorted(seat.rank for seat in seats) == list(range(self.size)) and all(
            s.world == self.size for s in seats
        )
        key = (
            (lambda i: seats[i].rank) if kept else (lambda i: (hellos[i]["host"], self.engines[i]))
        )
        order = sorted(range(self.size), key=key)
        self.engines = [self.engines[i] for i in order]
        for rank, i in enumerate(order):
            self._meet(rank, hellos[i])
        self.generation = max(seat.generation for seat in seats)
        if kept and self.loaded:
            self.folder, self.device = hellos[order[0]]["folder"], hellos[order[0]]["device"]
            self.seated = True

    def _attach(self, ranks: Sequence[int], take: bool = False) -> list[dict[str, Any]]:
        """Who these engines are. ClusterError: another driver has them, or they run another
        version of this package."""
        me = Owner(DRIVER, socket.gethostname(), os.getpid(), start_time(os.getpid()), time.time())
        hellos = (
            self.call("inspect", ranks=ranks)
            if self.reader
            else self.call("attach", me, take, ranks=ranks)
        )
        self.owner = hellos[0].get("owner")
        mine = platform.python_version_tuple()[:2]
        pythons = {hello["python"] for hello in hellos}
        if pythons != {mine}:
            raise ClusterError(
                f"engines run Python {', '.join(sorted('.'.join(python) for python in pythons))}, this notebook "
                f"{'.'.join(mine)}: a function's code means nothing to another version; start both with the same"
            )
        versions = {hello["version"] for hello in hellos}
        if versions != {__version__}:
            raise ClusterError(
                f"engines run flexkernel {', '.join(sorted(versions))}, this notebook {__version__}"
            )
        return hellos

    def _meet(self, rank: int, hello: dict[str, Any]) -> None:
        """Know the engine that has this rank from here on."""
        self.hosts[rank], self.pids[rank] = hello["host"], hello["pid"]
        self.gpus[hello["host"]], self._signals[rank] = hello["gpus"], hello["signals"]
        self.vitals.pop(rank, None)
        self._jobs[rank] = job_of(self._groups, hello["job"])
        if hello["machine"] == socket.gethostname() and psutil.pid_exists(hello["pid"]):
            started = [one for group in self._groups for one in launchers(group)]
            mine = next((one for one in started if one.pid == hello["pid"]), self._jobs[rank])
            self.vitals[rank] = EngineProcess(hello["pid"], mine)

    @property
    def _groups(self) -> list[Any]:
        """The engine sets."""
        return list(self._cluster.engines.values())

    def alive(self) -> list[bool]:
        ids = set() if self.closed else set(self._client.ids)
        return [engine_id in ids for engine_id in self.engines]

    def answering(self) -> list[bool]:
        # it has come back after all
        for rank in [rank for rank, call in self._deaf.items() if call.done()]:
            self._forget([self._deaf.pop(rank)])
        out = self._unfit.union(self._deaf)
        return [alive and rank not in out for rank, alive in enumerate(self.alive())]

    # --- replacing --------------------------------------------------------------------

    def replace(self, ranks: Sequence[int], heritage: Mapping[int, RankState]) -> None:
        """Start new engines for these ranks, each with its rank's part of the model. heritage: by
        rank; empty while no model is loaded. The others keep their part where it is; all get new
        groups."""
        self.may("init_rank")
        left = [r for r, answers in enumerate(self.answering()) if r not in ranks and not answers]
        if left:
            raise ClusterError(
                f"rank {left[0]} does not answer either: restart(rank={sorted([*ranks, *left])})"
            )
        spare = sorted(set(self._client.ids) - set(self.engines))
        num_new = len(ranks) - len(spare)
        self._may_start(num_new)
        self.replacing = True
        self._unfit.update(ranks)
        try:
            for rank in ranks:
                self._end(rank)
            new = [*spare, *self._start_engines(num_new)][: len(ranks)]
            for rank, engine_id in zip(ranks, new, strict=True):
                self.engines[rank] = engine_id
                self._deaf.pop(rank, None)
            for rank, hello in zip(ranks, self._attach(ranks), strict=True):
                self._meet(rank, hello)
            self._endow(ranks, heritage)
            self._unfit.difference_update(ranks)
        finally:
            self.replacing = False

    def _endow(self, ranks: Sequence[int], heritage: Mapping[int, RankState]) -> None:
        """Have new engines load their part and take their seats, with all others."""
        if not self.seated:
            return
        builder = None
        if heritage:
            seats = self.seats()
            self.call(
                "recover.load_rank_state",
                ranks=ranks,
                each=[(seats[r], self.device, heritage[r]) for r in ranks],
            )
            builder = heritage[ranks[0]].source.builder
        self.seat(self.device, builder)
        if heritage:
            self.call("recover.restore", ranks=ranks, each=[(heritage[r],) for r in ranks])

    def _may_start(self, n: int) -> None:
        """ClusterError if engines are to be started that only somebody else can start."""
        if n <= 0 or self.origin.may_start:
            return
        kind = self._cluster.engine_launcher_class.__name__
        command = ["ipcluster", "engines", "-n", str(n), "--profile-dir", self._cluster.profile_dir]
        command += ["--cluster-id", self.cluster_id] if self.cluster_id else []
        raise ClusterError(
            f"this cluster was attached, and its engines were started through {kind} by somebody else: no "
            f"engine can be started from here. Start {n} there, `{shlex.join(command)}`, and restart the rank again: "
            "the new engine is taken"
        )

    def _end(self, rank: int) -> None:
        """End the engine that has this rank, if it is not gone: also one that hangs."""
        if not self.alive()[rank]:
            return
        if rank in self.vitals:
            self.vitals[rank].kill()
        else:
            self._client.send_signal(signal.SIGKILL, [self.engines[rank]], block=False)
        end = time.monotonic() + START_S
        while self.alive()[rank]:
            if time.monotonic() > end:
                raise ClusterError(
                    f"rank {rank}'s engine did not end within {START_S:g} s of a SIGKILL"
                )
            time.sleep(0.02)

    def _start_engines(self, n: int) -> list[int]:
        """n more engines of the kind there are; their ids."""
        if n <= 0:
            return []
        known = set(self._client.ids)
        preload(self._cluster.engine_launcher_class)  # which is none of the cluster's own
        before = {p.pid for p in psutil.Process().children(recursive=True)}
        with private_files():
            name = self._cluster.start_engines_sync(
                n=n, environment={"FLEX_FAULT": ""}, **again(self._groups)
            )
        if self.reaper is not None:
            self.reaper.runs(how_to_end([self._cluster.engines[name]]))
            self.reaper.watch(engines_of(self._cluster.engines[name]))
        new = arrived(self._client, self._cluster, self._cluster.engines[name], known, n, START_S)
        if self.reaper is not None:
            self.reaper.watch(
                p for p in psutil.Process().children(recursive=True) if p.pid not in before
            )
        return new

    # --- calling ----------------------------------------------------------------------

    def _send(self, ranks: Sequence[int], *function_and_args: Any) -> dict[int, Any]:
        """Rank → its answer to come. What all are told is written once."""
        ids = tuple(self.engines[rank] for rank in ranks)
        if ids not in self._views:
            # a list of one answers with a list
            self._views[ids] = self._client[list(ids) if len(ids) > 1 else ids[0]]
        try:
            sent = self._views[ids].apply_async(*function_and_args)
        except (KeyError, IndexError):  # one has left since it was looked at
            rank = next(
                (rank for rank, alive in zip(ranks, self.alive(), strict=False) if not alive),
                ranks[0],
            )
            raise EngineDied(
                f"rank {rank}'s engine left as it was called: session.restart()", rank
            ) from None
        split = type(sent).split  # which the client keeps for ever, with the answers, if it may
        return dict(zip(ranks, getattr(split, "__wrapped__", split)(sent), strict=True))

    def _caller(self, method: str, args: Sequence[tuple], ranks: Sequence[int]) -> Send:
        """What sends these ranks the call, or some of them once more. EngineDied: some rank could
        not answer it."""
        self._check_controller()
        alive = self.alive()
        gone = [rank for rank in ranks if not alive[rank]]
        if gone:
            raise EngineDied(
                f"rank {gone[0]}'s engine is gone, and its part of the model with it; bring it back, with that part "
                f"only: %flex_cluster restart --rank {gone[0]}, or session.restart()",
                gone[0],
            )
        unfit = [rank for rank in ranks if rank in self._unfit and not self.replacing]
        if unfit:
            raise EngineDied(
                f"rank {unfit[0]} was being replaced and its new engine did not get its part of the model: "
                f"%flex_cluster restart --rank {unfit[0]} tries again",
                unfit[0],
            )
        self.answering()  # those that have come back meanwhile are not deaf any more
        deaf = [rank for rank in ranks if rank in self._deaf]
        if deaf:
            raise EngineDied(
                f"rank {deaf[0]}'s engine (pid {self.pids[deaf[0]]} on {self.hosts[deaf[0]]}) does not answer: it "
                f"hangs or was stopped. %flex_cluster restart --rank {deaf[0]} ends it and puts another in its place",
                deaf[0],
            )
        alike: dict[int, list[int]] = {}  # arguments → the ranks that get them
        for rank, rest in zip(ranks, args, strict=True):
            alike.setdefault(id(rest), []).append(rank)
        told, turn = dict(zip(ranks, args, strict=True)), next(TURNS)

        def send(to: Collection[int]) -> dict[int, Any]:
            some = [[rank for rank in group if rank in to] for group in alike.values()]
            sent = [
                self._send(g, engine.call, DRIVER, turn, method, *told[g[0]]) for g in some if g
            ]
            return {rank: one for group in sent for rank, one in group.items()}

        return send

    def _exchange(
        self,
        method: str,
        args: Sequence[tuple],
        ranks: Sequence[int],
        progress: Callable[[int], None] | None,
    ) -> list[Any]:
        if self.reader:
            return self._look(self._caller(method, args, ranks), ranks)
        # a call that only some ranks have got would leave these waiting for the others
        with SignalMask() as mask:
            return self._collect(self._caller(method, args, ranks), ranks, progress, mask)

    def _look(self, send: Send, ranks: Sequence[int]) -> list[Any]:
        """The answers to a call that changes nothing. It waits behind what the owner has the
        engines do, and does not disturb that, however it ends. ClusterError: that takes too
        long."""
        calls, end = send(ranks), time.monotonic() + self.timeout_s
        for call in calls.values():
            call.wait(max(end - time.monotonic(), 0))
        self._forget(list(calls.values()))
        late = [rank for rank, call in calls.items() if not call.done()]
        if late:
            raise ClusterError(
                f"rank {late[0]} did not answer within {self.timeout_s:g} s (session.engines.timeout_s): "
                f"{self.owner_text()} "
                "and may have it run something; try again"
            )
        return [self._answer(calls[rank], rank) for rank in ranks]

    def may(self, method: str) -> None:
        if self.reader and method not in engine.READS:
            raise ClusterError(
                f"this session was joined read-only, and what you asked for would change things: {self.owner_text()}. "
                "Hooks, runs and their captures can be looked at; to have the engines yourself: %flex_cluster attach"
                + (" --take" if self.owner is not None else "")
            )

    def owner_text(self) -> str:
        """Who has these engines, in words."""
        who = self.owner
        return (
            f"pid {who.pid} on {who.host} has these engines"
            if who is not None
            else "nobody has these engines"
        )

    def _collect(
        self,
        send: Send,
        ranks: Sequence[int],
        progress: Callable[[int], None] | None,
        mask: SignalMask,
    ) -> list[Any]:
        calls, answers = send(ranks), dict[int, Any]()
        pending, sent = list(calls.values()), time.monotonic()
        patience, looked = Patience(), sent
        for vitals in self.vitals.values():
            vitals.sample()
        while calls:
            try:
                with mask.unmasked():
                    next(iter(calls.values())).wait(WATCH_S if self.poll is None else POLL_S)
                for rank in [rank for rank, call in calls.items() if call.done()]:
                    answers[rank] = self._answer(calls.pop(rank), rank)
                    patience.heard(answers[rank])
                    if progress and not patience.interrupted:
                        progress(len(answers))
                if calls:
                    self._poll(mask)
                    for vitals in self.vitals.values():
                        vitals.sample()
                    self._check_controller()
                    if self._may_be_lost(sent, looked):
                        calls.update(send(calls))
                        pending += calls.values()
                    looked = time.monotonic()
                    self._press(calls, answers, patience)
            except KeyboardInterrupt:
                patience.interrupted = True
        self._forget([*pending, *patience.pings.values()])
        if patience.told:
            self._settle(set(ranks) - set(self._deaf))
        if patience.interrupted:
            self._mend(answers.values())
            raise with_partial(KeyboardInterrupt(), answers.values())
        return [answers[rank] for rank in ranks]

    def _may_be_lost(self, sent: float, looked: float) -> bool:
        """Whether it is time to send calls once more that are on their way: engines that had not
        found a new controller yet have not got them, and who knows why others have no answer. An
        engine makes a call once, however often it comes. sent: when they were first sent; looked:
        when this was asked last."""
        times = [
            *(self._restored + after for after in AGAIN_S),
            *(sent + after for after in UNHEARD_S),
        ]
        return any(looked < at <= time.monotonic() for at in times)

    def _settle(self, ranks: Iterable[int]) -> None:
        """Wait for interrupts that are on their way to these ranks: they would meet the next call,
        or its answer."""
        alive = self.alive()
        calls = [
            call
            for rank in ranks
            if alive[rank]
            for call in self._send(
                [rank], engine.wait_for_interrupts, self._signals.get(rank, 0)
            ).values()
        ]
        end = time.monotonic() + SETTLED_S
        for call in calls:
            call.wait(max(end - time.monotonic(), 0))
        self._forget(calls)

    def _poll(self, mask: SignalMask) -> None:
        """Call whoever watches this call."""
        try:
            if self.poll is not None:
                with mask.unmasked():
                    self.poll()
        except BaseException:  # it keeps what it raised; here it is one more way to be interrupted
            self.poll = None
            raise KeyboardInterrupt from None

    def _press(self, calls: dict[int, Any], answers: dict[int, Any], patience: Patience) -> None:
        """See that ranks come back which nobody needs to wait for any more."""
        if patience.stalled(lambda: self._count(calls), self.timeout_s):
            patience.give_back()
        for rank in [
            r
            for r, ping in patience.pings.items()
            if r in calls and ping.done() and not calls[r].done()
        ]:
            calls.pop(rank)  # it has come back, and the signal met it as it was about to say so
            lost = f"rank {rank} was interrupted before it could answer"
            answers[rank] = ErrorReport(
                rank, "KeyboardInterrupt", lost, "", time.time(), broken=True
            )
        step = patience.step()
        if step == "interrupt":
            self.interrupt(list(calls))
        elif step == "ping":
            patience.pings = self._ping(list(calls))
        elif step == "give up":
            self._deaf |= self._ping(list(calls))
            for rank in list(calls):
                calls.pop(rank)
                answers[rank] = self._silent(rank)

    def _ping(self, ranks: Sequence[int]) -> dict[int, Any]:
        """Rank → a call that an engine answers once it is done with those before."""
        return self._send(ranks, os.getpid) if ranks else {}

    def _count(self, ranks: Iterable[int]) -> int | None:
        """How many modules these ranks have begun; None if none is in a run, or some are not on
        this host. What says so of a rank that is being replaced is of an engine that has died: it
        may have been in one."""
        heartbeats = [self.heartbeat(rank) for rank in ranks if rank not in self._unfit]
        there = [heartbeat for heartbeat in heartbeats if heartbeat is not None]
        if len(there) < len(heartbeats) or not any(heartbeat.running for heartbeat in there):
            return None
        return sum(heartbeat.count for heartbeat in there)

    def _forget(self, done: list[Any]) -> None:
        """The client keeps what it knows of every call, and of what engines print after it, for
        ever."""
        over = [result for result in done if result.done()]
        if over:  # purging none is an error to the client
            self._client.purge_local_results(over)
        self._client.history.clear()
        for msg_id in set(self._client.metadata) - self._client.outstanding:
            self._client.metadata.pop(msg_id, None)

    def _check_controller(self) -> None:
        """Start the controller again if it crashed. ClusterError when nobody is left who could
        bring an answer."""
        launcher = self._cluster.controller
        process = getattr(launcher, "process", None)
        if process is None:
            return
        if psutil.pid_exists(process.pid):
            self._check_its_parts()
            return
        code = exit_code(launcher) if self.owned else None
        if code is not None and -code in CRASHES:
            self._restore_controller()
            return
        self.closed = True
        if self.kept and living(self._cluster):
            raise ClusterError(
                "the cluster's controller has crashed; its engines have the model still: "
                f"%flex_cluster attach --cluster-id {self.cluster_id} starts it again and finds them"
            )
        raise ClusterError(
            "the cluster has ended, its controller is gone: another notebook may have stopped it"
        )

    def _check_its_parts(self) -> None:
        """The same for the processes that a controller consists of, each of which is a way to the
        engines."""
        now = time.monotonic()
        if now < self._inspected + PARTS_S:
            return
        self._inspected = now
        if not lame(self._cluster):
            return
        time.sleep(PARTING_S)
        if not lame(self._cluster):  # it was being stopped
            return
        if not self.owned or now < self._restored + 4 * PARTS_S:
            raise ClusterError(
                "a part of the cluster's controller has ended, and with it a way to the engines: its log, "
                f"{self._cluster.controller.output_file}"
            )
        self._restore_controller()

    def _restore_controller(self) -> None:
        """A controller in the place of one that crashed."""
        before = {p.pid for p in psutil.Process().children(recursive=True)}
        restore_controller(self._cluster)
        time.sleep(RESTORE_S)
        self._restored = time.monotonic()
        if self.reaper is not None:
            self.reaper.watch(
                p for p in psutil.Process().children(recursive=True) if p.pid not in before
            )

    def _answer(self, result: Any, rank: int) -> Any:
        try:
            return result.get(RESOLVE_S)
        except ipp.error.EngineError:
            return self._died(rank)
        except ipp.error.RemoteError as error:
            if error.ename == "EngineError":  # the same, when the hub is the first to say it
                return self._died(rank)
            return ErrorReport(
                rank, "EngineError", str(error), "\n".join(error.render_traceback()), time.time()
            )

    def _silent(self, rank: int) -> ErrorReport:
        """Of a rank that was interrupted and did not come back."""
        vitals, module = self.vitals.get(rank), self.last_module(rank)
        what = "was stopped by a signal" if vitals is not None and vitals.stopped() else "hangs"
        text = f"rank {rank} did not arrive: its engine (pid {self.pids[rank]} on {self.hosts[rank]}) {what}"
        text += f", last in {module}" if module else ""
        text += f". %flex_cluster restart --rank {rank} ends it and puts another in its place"
        return ErrorReport(rank, "EngineDied", text, "", time.time(), broken=True)

    def _died(self, rank: int) -> ErrorReport:
        return ErrorReport(
            rank, "EngineDied", self.death_report(rank), "", time.time(), broken=True
        )

    def death_report(self, rank: int) -> str:
        """What is known of a rank whose engine died: how, where, what it wrote last."""
        vitals = self.vitals.get(rank)
        how = vitals.end() if vitals is not None else ""
        said = f"rank {rank}'s engine died (pid {self.pids[rank]} on {self.hosts[rank]}"
        said += f", {how})" if how else ")"
        module = self.last_module(rank)
        said += f", last in {module}" if module else ""
        said += ". It comes back, with its part of the model only, "
        said += (
            "with the next call" if self.auto_restart else f"by %flex_cluster restart --rank {rank}"
        )
        lines = (vitals or EngineProcess(self.pids[rank], self._jobs.get(rank))).log()
        return "\n".join([said, *(["its log ends:"] if lines else []), *lines])

    def heartbeat(self, rank: int) -> Heartbeat | None:
        """What a rank on this host is at; None before it has a seat, and for other hosts."""
        host = os.environ.get("FLEX_HOST", "")
        with contextlib.suppress(OSError):
            return Heartbeat(folder_path(self.folder + (f"-{host}" if host else "")), rank)
        return None

    def last_module(self, rank: int) -> str:
        """The module that a rank began last; "" where that is not known."""
        heartbeat = self.heartbeat(rank)
        at = heartbeat.module if heartbeat is not None else -1
        return display_name(self.module_names[at]) if 0 <= at < len(self.module_names) else ""

    def interrupt(self, ranks: Sequence[int]) -> None:
        """Send SIGINT to these engines, through their nannies."""
        ids = [self.engines[rank] for rank in ranks]
        for rank in ranks:
            self._signals[rank] = self._signals.get(rank, 0) + 1
        if ids:
            self._client.send_signal(signal.SIGINT, ids, block=False)

    def close(self, end: bool | None = None) -> None:
        if self.closed:
            return
        if end:
            self.may("close")
        self.closed = True
        end = self.owned and not self.kept if end is None else end
        hang: set[int] = set()
        if not self.reader:  # one that is left alone looks for its owner by itself
            hang = self._detach("close" if end else "detach")
        with quiet():
            self._client.close()
            if end:
                # the cluster would wait for each that it may end by itself
                for rank in hang & set(self.vitals):
                    self.vitals[rank].kill()
                self._cluster.stop_cluster_sync()
                remove_keys(self._cluster)
                # where they were, nothing is any more
                with contextlib.suppress(OSError, errors.CaptureError):
                    place = folder_path(self.folder)
                    # engines that hung have left theirs
                    for folder in place.parent.glob(f"{place.name}*"):
                        remove_folder(folder)
        if self.reaper is not None:
            self.reaper.leave()

    def _detach(self, word: str) -> set[int]:
        """Tell it to every engine that can hear; the ranks that hang."""
        hang = set(self._deaf)
        # the controller may have gone before us, with all that it carried
        with contextlib.suppress(Exception):
            ids = {i: rank for rank, i in enumerate(self.engines)}
            able = [i for i in self._client.ids if ids.get(i) not in hang]
            calls = {
                i: self._client[i].apply_async(engine.call, DRIVER, next(TURNS), word) for i in able
            }
            end = time.monotonic() + FAREWELL_S
            for call in calls.values():
                call.wait(max(end - time.monotonic(), 0))
            hang |= {ids[i] for i, call in calls.items() if i in ids and not call.done()}
        return hang
