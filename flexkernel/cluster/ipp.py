"""The engines of an ipyparallel cluster as one thing to call.

Through ipyparallel go an importable function and plain data. Activations go another way."""

from __future__ import annotations

import atexit
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

import ipyparallel
import psutil

from flexkernel import engine, errors
from flexkernel._version import __version__
from flexkernel.errors import ClusterError, EngineDied
from flexkernel.memory.heartbeat import Heartbeat, start_time
from flexkernel.memory.slab import folder_path, remove_folder
from flexkernel.wire import ErrorReport, Owner, RankState

from .cluster import Cluster, Engine
from .controller import PARTS_S, degraded, engines_live, remove_keys, restore_controller
from .guarantees import Origin
from .interrupts import SignalMask
from .launchers import (
    KEPT,
    end_commands,
    engine_launchers,
    engine_processes,
    job_of,
    kind_of,
    preload,
    same_job_options,
)
from .private import private_files
from .process import EngineProcess, descendants, exit_code, is_running
from .reaper import Reaper
from .reports import with_partial
from .waiting import START_S, Call, Send, wait_for_engines

__all__ = ["IPyParallel"]

TURNS = itertools.count(1)  # numbers this process's calls
DRIVER = secrets.token_hex(8)  # this process, as engines know it
SETTLED_S = 2.0  # how long interrupts may take to arrive
DETACH_S = 2.0  # how long engines have to let go of everything before they are ended
END_POLL_S = 0.02
# A result is done() a moment before get() has it: the thread that brings it is between the two.
RESOLVE_S = 10.0
RESTORE_S = 1.0  # how long engines and clients take to find a restored controller
PARTING_S = 1.5  # what the processes of a controller that is stopped may end before it
# Nobody ends a controller by these.
CRASHES = {signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL}


class IPyParallel(Cluster):
    """Engines of an ipyparallel cluster.

    ipcluster: ipyparallel's Cluster, with the controller and the engine sets. client: its Client.
    kept: it was started to outlive its notebook. owner: who has the engines if this session only
    reads. restored_at: when a controller was started in the place of one that crashed."""

    def __init__(
        self,
        ipcluster: ipyparallel.Cluster,
        client: ipyparallel.Client,
        owned: bool,
        take: bool = False,
        read_only: bool = False,
    ):
        super().__init__()
        self.ipcluster = ipcluster
        self.client = client
        self.owned = owned
        self.reader = read_only
        self.kept = ipcluster.cluster_id.startswith(KEPT) and not read_only
        self.owner: Owner | None = None
        self.reaper: Reaper | None = None
        self.restored_at = -math.inf
        self._parts_checked_at = time.monotonic()
        self._views: dict[tuple[int, ...], Any] = {}  # engine ids → what sends to them
        self.engines = [Engine(id=one) for one in sorted(client.ids)]
        self._join(take)
        if owned and not self.kept:
            atexit.register(self._stop_at_exit)

    @property
    def cluster_id(self) -> str:
        return self.ipcluster.cluster_id

    @property
    def origin(self) -> Origin:
        controller = getattr(self.ipcluster.controller, "process", None)
        kind = kind_of(self.ipcluster.engine_launcher_class)
        return Origin(kind, self.owned, self.kept, controller is not None, self.reader)

    @property
    def _groups(self) -> list[Any]:
        """ipyparallel's engine sets."""
        return list(self.ipcluster.engines.values())

    # --- attaching to engines ---------------------------------------------------------

    def _join(self, take: bool) -> None:
        """Attach to every engine and agree on ranks: those that they have, else by host.

        take: also if another driver has them."""
        hellos = self._attach(range(self.size), take)
        infos = [hello["rank_info"] for hello in hellos]
        self.loaded = all(hello["loaded"] for hello in hellos)
        ranked = sorted(info.rank for info in infos) == list(range(self.size))
        ranked = ranked and all(info.world == self.size for info in infos)
        if ranked:
            order = sorted(range(self.size), key=lambda i: infos[i].rank)
        else:
            order = sorted(range(self.size), key=lambda i: (hellos[i]["host"], self.engines[i].id))
        self.engines = [self.engines[i] for i in order]
        for rank, i in enumerate(order):
            self._register(rank, hellos[i])
        self.generation = max(info.generation for info in infos)
        if ranked and self.loaded:
            self.folder = hellos[order[0]]["folder"]
            self.device = hellos[order[0]]["device"]
            self.has_groups = True

    def _attach(self, ranks: Sequence[int], take: bool = False) -> list[dict[str, Any]]:
        """What these engines say of themselves, once they belong to this driver.

        ClusterError: another driver has them, or they run another version of Python or of this
        package."""
        if self.reader:
            hellos = self.call("inspect", ranks=ranks)
        else:
            pid = os.getpid()
            me = Owner(DRIVER, socket.gethostname(), pid, start_time(pid), time.time())
            hellos = self.call("attach", me, take, ranks=ranks)
        self.owner = hellos[0].get("owner")
        check_versions(hellos)
        return hellos

    def _register(self, rank: int, hello: dict[str, Any]) -> None:
        """Note what an engine says of itself."""
        one = self.engines[rank]
        one.host = hello["host"]
        one.pid = hello["pid"]
        one.num_interrupts = hello["signals"]
        one.job = job_of(self._groups, hello["job"])
        one.process = None
        self.gpus[one.host] = hello["gpus"]
        if hello["machine"] == socket.gethostname() and psutil.pid_exists(one.pid):
            one.process = EngineProcess(one.pid, self._launcher_of(one))

    def _launcher_of(self, one: Engine) -> Any:
        for group in self._groups:
            for launcher in engine_launchers(group):
                if launcher.pid == one.pid:
                    return launcher
        return one.job

    # --- who is there -----------------------------------------------------------------

    def alive(self) -> list[bool]:
        if self.closed:
            return [False] * self.size
        ids = set(self.client.ids)
        return [one.id in ids for one in self.engines]

    def answering(self) -> list[bool]:
        for one in self.engines:
            if one.unanswered is not None and one.unanswered.done():  # it has come back after all
                self._forget([one.unanswered])
                one.unanswered = None
        alive = self.alive()
        return [alive[rank] and one.state == "ready" for rank, one in enumerate(self.engines)]

    def check_allowed(self, method: str) -> None:
        if not self.reader or method in engine.READS:
            return
        command = "%flex_cluster attach"
        if self.owner is not None:
            command += " --take"
        raise ClusterError(
            "this session was joined read-only, and what you asked for would change things: "
            f"{self.owner_text()}. Hooks, runs and their captures can be looked at; to have the "
            f"engines yourself: {command}"
        )

    def owner_text(self) -> str:
        """Who has these engines, in words."""
        if self.owner is None:
            return "nobody has these engines"
        return f"pid {self.owner.pid} on {self.owner.host} has these engines"

    # --- replacing --------------------------------------------------------------------

    def replace(self, ranks: Sequence[int], states: Mapping[int, RankState]) -> None:
        """Start new engines for these ranks, each with its rank's part of the model.

        states: rank → what its new engine gets; empty while no model is loaded. The others keep
        their part where it is. All get new process groups.

        ClusterError: another rank does not answer, or no engine can be started."""
        self.check_allowed("init_rank")
        self._check_others(ranks)
        spare = sorted(set(self.client.ids) - {one.id for one in self.engines})
        num_new = len(ranks) - len(spare)
        self._check_may_start(num_new)
        self._replacing = True
        for rank in ranks:
            self.engines[rank].ready = False
        try:
            for rank in ranks:
                self._end(rank)
            new = [*spare, *self._start_engines(num_new)][: len(ranks)]
            for rank, engine_id in zip(ranks, new, strict=True):
                self.engines[rank] = Engine(id=engine_id, ready=False)
            for rank, hello in zip(ranks, self._attach(ranks), strict=True):
                self._register(rank, hello)
            self._restore(ranks, states)
            for rank in ranks:
                self.engines[rank].ready = True
        finally:
            self._replacing = False

    def _check_others(self, ranks: Sequence[int]) -> None:
        """ClusterError if a rank that is not to be replaced does not answer."""
        answering = self.answering()
        left = [rank for rank in range(self.size) if rank not in ranks and not answering[rank]]
        if left:
            raise ClusterError(
                f"rank {left[0]} does not answer either: restart(rank={sorted([*ranks, *left])})"
            )

    def _restore(self, ranks: Sequence[int], states: Mapping[int, RankState]) -> None:
        """Have new engines load their part, and all engines make new groups with them."""
        if not self.has_groups:
            return
        builder = None
        if states:
            infos = self.rank_infos()
            self.call(
                "recover.load_rank_state",
                ranks=ranks,
                each=[(infos[rank], self.device, states[rank]) for rank in ranks],
            )
            builder = states[ranks[0]].source.builder
        self.init_ranks(self.device, builder)
        if states:
            self.call("recover.restore", ranks=ranks, each=[(states[rank],) for rank in ranks])

    def _check_may_start(self, n: int) -> None:
        """ClusterError if n engines are missing that only somebody else can start."""
        if n <= 0 or self.origin.may_start:
            return
        kind = self.ipcluster.engine_launcher_class.__name__
        command = ["ipcluster", "engines", "-n", str(n)]
        command += ["--profile-dir", self.ipcluster.profile_dir]
        if self.cluster_id:
            command += ["--cluster-id", self.cluster_id]
        raise ClusterError(
            f"this cluster was attached, and its engines were started through {kind} by somebody "
            f"else: no engine can be started from here. Start {n} there, "
            f"`{shlex.join(command)}`, and restart the rank again: the new engine is taken"
        )

    def _end(self, rank: int) -> None:
        """End the engine of a rank, also one that hangs."""
        if not self.alive()[rank]:
            return
        one = self.engines[rank]
        if one.process is not None:
            one.process.kill()
        else:
            self.client.send_signal(signal.SIGKILL, [one.id], block=False)
        deadline = time.monotonic() + START_S
        while self.alive()[rank]:
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"rank {rank}'s engine did not end within {START_S:g} s of a SIGKILL"
                )
            time.sleep(END_POLL_S)

    def _start_engines(self, n: int) -> list[int]:
        """Start n more engines of the same kind. Returns their ids."""
        if n <= 0:
            return []
        ids = set(self.client.ids)
        preload(self.ipcluster.engine_launcher_class)  # it is not one of the cluster's processes
        before = {process.pid for process in descendants()}
        with private_files():
            name = self.ipcluster.start_engines_sync(
                n=n, environment={"FLEX_FAULT": ""}, **same_job_options(self._groups)
            )
        group = self.ipcluster.engines[name]
        if self.reaper is not None:
            self.reaper.run_at_end(end_commands([group]))
            self.reaper.watch(engine_processes(group))
        new = wait_for_engines(self.client, self.ipcluster, group, ids, n, START_S)
        self._watch_new(before)
        return new

    def _watch_new(self, before: set[int]) -> None:
        """Have the reaper watch what this process has started since."""
        if self.reaper is not None:
            self.reaper.watch(process for process in descendants() if process.pid not in before)

    # --- calling ----------------------------------------------------------------------

    def _exchange(
        self,
        method: str,
        args: Sequence[tuple],
        ranks: Sequence[int],
        progress: Callable[[int], None] | None,
    ) -> list[Any]:
        if self.reader:
            return self._read(self._sender(method, args, ranks), ranks)
        # If only some ranks had got the call, they would wait for the others.
        with SignalMask() as mask:
            call = Call(self, self._sender(method, args, ranks), ranks, progress, mask)
            for process in self._processes():
                process.sample()
            call.wait()
            self._forget(call.results)
            if call.patience.interrupted_at is not None:
                self._settle(rank for rank in ranks if self.engines[rank].unanswered is None)
            if call.patience.user_interrupted:
                self._repair_groups(call.answers.values())
                raise with_partial(KeyboardInterrupt(), call.answers.values())
            return [call.answers[rank] for rank in ranks]

    def _read(self, send: Send, ranks: Sequence[int]) -> list[Any]:
        """The answers to a call that changes nothing.

        It waits behind what the owner has the engines do, and does not disturb that, however it
        ends. ClusterError: that takes too long."""
        results = send(ranks)
        self._wait_for(results.values(), self.timeout_s)
        self._forget(results.values())
        late = [rank for rank, result in results.items() if not result.done()]
        if late:
            raise ClusterError(
                f"rank {late[0]} did not answer within {self.timeout_s:g} s "
                f"(session.engines.timeout_s): {self.owner_text()} and may have it run something; "
                "try again"
            )
        return [self.answer_of(rank, results[rank]) for rank in ranks]

    def _sender(self, method: str, args: Sequence[tuple], ranks: Sequence[int]) -> Send:
        """What sends these ranks the call, also once more. EngineDied: a rank cannot answer it."""
        self._check_controller()
        self._check_reachable(ranks)
        arguments = dict(zip(ranks, args, strict=True))
        groups: dict[int, list[int]] = {}  # the same arguments → the ranks that get them
        for rank, own in arguments.items():
            groups.setdefault(id(own), []).append(rank)
        turn = next(TURNS)

        def send(to: Collection[int]) -> dict[int, Any]:
            results = {}
            for group in groups.values():
                some = [rank for rank in group if rank in to]
                if some:
                    call = (engine.call, DRIVER, turn, method, *arguments[some[0]])
                    results.update(self._send(some, *call))
            return results

        return send

    def _check_reachable(self, ranks: Sequence[int]) -> None:
        """EngineDied if an engine of these ranks is gone, not ready or unresponsive."""
        alive = self.alive()
        for rank in ranks:
            if not alive[rank]:
                raise EngineDied(
                    f"rank {rank}'s engine is gone, and its part of the model with it; bring it "
                    f"back, with that part only: %flex_cluster restart --rank {rank}, or "
                    "session.restart()",
                    rank,
                )
        for rank in ranks:
            if not self.engines[rank].ready and not self._replacing:
                raise EngineDied(
                    f"rank {rank} was being replaced and its new engine did not get its part of "
                    f"the model: %flex_cluster restart --rank {rank} tries again",
                    rank,
                )
        self.answering()  # takes note of those that have come back
        for rank in ranks:
            one = self.engines[rank]
            if one.unanswered is not None:
                raise EngineDied(
                    f"rank {rank}'s engine (pid {one.pid} on {one.host}) does not answer: it hangs "
                    f"or was stopped. %flex_cluster restart --rank {rank} ends it and puts another "
                    "in its place",
                    rank,
                )

    def _send(self, ranks: Sequence[int], *function_and_args: Any) -> dict[int, Any]:
        """Rank → its result to come. What all get is serialized once."""
        ids = tuple(self.engines[rank].id for rank in ranks)
        if ids not in self._views:
            self._views[ids] = self._view(ids)
        try:
            sent = self._views[ids].apply_async(*function_and_args)
        except (KeyError, IndexError):  # one has left since it was looked at
            alive = self.alive()
            rank = next((rank for rank in ranks if not alive[rank]), ranks[0])
            raise EngineDied(
                f"rank {rank}'s engine left as it was called: session.restart()", rank
            ) from None
        split = type(sent).split  # the client keeps a cached one for ever, with the answers
        return dict(zip(ranks, getattr(split, "__wrapped__", split)(sent), strict=True))

    def _view(self, ids: tuple[int, ...]) -> ipyparallel.DirectView:
        if len(ids) == 1:  # a list of one would answer with a list
            return self.client[ids[0]]
        return self.client[list(ids)]

    def _wait_for(self, results: Collection[Any], timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        for result in results:
            result.wait(max(deadline - time.monotonic(), 0))

    def _forget(self, results: Iterable[Any]) -> None:
        """Have the client forget these results. It would keep what it knows of every call, and
        what engines print after it, for ever."""
        done = [result for result in results if result.done()]
        if done:  # to purge none is an error
            self.client.purge_local_results(done)
        self.client.history.clear()
        for msg_id in set(self.client.metadata) - self.client.outstanding:
            self.client.metadata.pop(msg_id, None)

    # --- what a waiting call needs (waiting.Engines) ----------------------------------

    def answer_of(self, rank: int, result: ipyparallel.AsyncResult) -> Any:
        try:
            return result.get(RESOLVE_S)
        except ipyparallel.error.EngineError:
            return self._died(rank)
        except ipyparallel.error.RemoteError as error:
            if error.ename == "EngineError":  # the same, when the hub is the first to say it
                return self._died(rank)
            trace = "\n".join(error.render_traceback())
            return ErrorReport(rank, "EngineError", str(error), trace, time.time())

    def look_around(self) -> None:
        for process in self._processes():
            process.sample()
        self._check_controller()

    def _processes(self) -> list[EngineProcess]:
        return [one.process for one in self.engines if one.process is not None]

    def modules_entered(self, ranks: Collection[int]) -> int | None:
        # The heartbeat of a rank that is being replaced is that of an engine that has died. It may
        # have died in a run.
        heartbeats = [self.heartbeat(rank) for rank in ranks if self.engines[rank].ready]
        seen = [heartbeat for heartbeat in heartbeats if heartbeat is not None]
        if len(seen) < len(heartbeats) or not any(heartbeat.running for heartbeat in seen):
            return None
        return sum(heartbeat.count for heartbeat in seen)

    def interrupt(self, ranks: Sequence[int]) -> None:
        """Send SIGINT to the engines of these ranks, through their nannies."""
        for rank in ranks:
            self.engines[rank].num_interrupts += 1
        ids = [self.engines[rank].id for rank in ranks]
        if ids:
            self.client.send_signal(signal.SIGINT, ids, block=False)

    def ping(self, ranks: Sequence[int]) -> dict[int, ipyparallel.AsyncResult]:
        if not ranks:
            return {}
        return self._send(ranks, os.getpid)

    def give_up(self, rank: int, ping: ipyparallel.AsyncResult) -> ErrorReport:
        one = self.engines[rank]
        one.unanswered = ping
        what = "hangs"
        if one.process is not None and one.process.is_stopped():
            what = "was stopped by a signal"
        text = f"rank {rank} did not arrive: its engine (pid {one.pid} on {one.host}) {what}"
        text += self._last_in(rank)
        text += f". %flex_cluster restart --rank {rank} ends it and puts another in its place"
        return ErrorReport(rank, "EngineDied", text, "", time.time(), broken=True)

    def _settle(self, ranks: Iterable[int]) -> None:
        """Wait until interrupts that are on their way to these ranks have arrived. They would meet
        the next call, or its answer."""
        alive = self.alive()
        results: list[Any] = []
        for rank in ranks:
            if alive[rank]:
                number = self.engines[rank].num_interrupts
                results += self._send([rank], engine.wait_for_interrupts, number).values()
        self._wait_for(results, SETTLED_S)
        self._forget(results)

    # --- the controller ---------------------------------------------------------------

    def _check_controller(self) -> None:
        """Restore the controller if it crashed. ClusterError: nobody can bring an answer any
        more."""
        launcher = self.ipcluster.controller
        process = getattr(launcher, "process", None)
        if process is None:
            return
        if is_running(process):
            self._check_parts()
            return
        code = exit_code(launcher) if self.owned else None
        if code is not None and -code in CRASHES:
            self._restore_controller()
            return
        self.closed = True
        if self.kept and engines_live(self.ipcluster):
            raise ClusterError(
                "the cluster's controller has crashed; its engines have the model still: "
                f"%flex_cluster attach --cluster-id {self.cluster_id} starts it again and finds "
                "them"
            )
        raise ClusterError(
            "the cluster has ended, its controller is gone: another notebook may have stopped it"
        )

    def _check_parts(self) -> None:
        """The same for the controller's child processes. Each is a way to the engines."""
        now = time.monotonic()
        if now < self._parts_checked_at + PARTS_S:
            return
        self._parts_checked_at = now
        if not degraded(self.ipcluster):
            return
        time.sleep(PARTING_S)
        if not degraded(self.ipcluster):  # it was being stopped
            return
        if not self.owned or now < self.restored_at + 4 * PARTS_S:
            raise ClusterError(
                "a part of the cluster's controller has ended, and with it a way to the engines: "
                f"its log, {self.ipcluster.controller.output_file}"
            )
        self._restore_controller()

    def _restore_controller(self) -> None:
        """Start a controller in the place of one that crashed."""
        before = {process.pid for process in descendants()}
        restore_controller(self.ipcluster)
        time.sleep(RESTORE_S)
        self.restored_at = time.monotonic()
        self._watch_new(before)

    # --- reports ----------------------------------------------------------------------

    def _died(self, rank: int) -> ErrorReport:
        text = self.death_report(rank)
        return ErrorReport(rank, "EngineDied", text, "", time.time(), broken=True)

    def death_report(self, rank: int) -> str:
        """What is known of a rank whose engine died: how, in which module, and its last log
        lines."""
        one = self.engines[rank]
        facts = [f"pid {one.pid} on {one.host}"]
        if one.process is not None:
            facts.append(one.process.end())
        text = f"rank {rank}'s engine died ({', '.join(filter(None, facts))})"
        text += self._last_in(rank)
        text += ". It comes back, with its part of the model only, "
        if self.auto_restart:
            text += "with the next call"
        else:
            text += f"by %flex_cluster restart --rank {rank}"
        lines = (one.process or EngineProcess(one.pid, one.job)).log()
        if lines:
            lines = ["its log ends:", *lines]
        return "\n".join([text, *lines])

    def _last_in(self, rank: int) -> str:
        module = self.last_module(rank)
        if not module:
            return ""
        return f", last in {module}"

    def last_module(self, rank: int) -> str:
        """The layer that a rank entered last; "" if that is not known."""
        heartbeat = self.heartbeat(rank)
        if heartbeat is None:
            return ""
        return heartbeat.module_name

    def heartbeat(self, rank: int) -> Heartbeat | None:
        """The heartbeat of a rank on this host; None before it has a rank, and on other hosts."""
        host = os.environ.get("FLEX_HOST", "")
        folder = self.folder
        if host:
            folder += f"-{host}"
        with contextlib.suppress(OSError):
            return Heartbeat(folder_path(folder), rank)
        return None

    # --- the end ----------------------------------------------------------------------

    def close(self, end: bool | None = None) -> None:
        if self.closed:
            return
        if end:
            self.check_allowed("close")
        self.closed = True
        atexit.unregister(self._stop_at_exit)
        if end is None:
            end = self.owned and not self.kept
        hanging: set[int] = set()
        if not self.reader:  # engines see by themselves that a reader has gone
            hanging = self._detach("close" if end else "detach")
        self.client.close()
        if end:
            self._stop(hanging)
        if self.reaper is not None:
            self.reaper.leave()

    def _detach(self, method: str) -> set[int]:
        """Call this on every engine that answers. Returns the ranks that hang."""
        hanging = {rank for rank, one in enumerate(self.engines) if one.unanswered is not None}
        # The controller may have gone before us, and all that goes through it.
        with contextlib.suppress(Exception):
            ranks = {one.id: rank for rank, one in enumerate(self.engines)}
            able = [i for i in self.client.ids if ranks.get(i) not in hanging]
            call = (engine.call, DRIVER, next(TURNS), method)
            results = {i: self.client[i].apply_async(*call) for i in able}
            self._wait_for(results.values(), DETACH_S)
            late = [i for i, result in results.items() if not result.done()]
            hanging |= {ranks[i] for i in late if i in ranks}
        return hanging

    def _stop(self, hanging: Collection[int]) -> None:
        """End engines and controller, and remove what they leave."""
        for rank in hanging:
            process = self.engines[rank].process
            if process is not None:  # ipyparallel would wait for each
                process.kill()
        self.ipcluster.stop_cluster_sync()
        remove_keys(self.ipcluster)
        with contextlib.suppress(OSError, errors.CaptureError):  # there may be none any more
            path = folder_path(self.folder)
            for folder in path.parent.glob(f"{path.name}*"):  # engines that hung have left theirs
                remove_folder(folder)

    def _stop_at_exit(self) -> None:
        """Stop a cluster that nobody has closed, without ipyparallel's message. The reaper removes
        what is left."""
        with contextlib.suppress(Exception):
            self.ipcluster.stop_cluster_sync()


def check_versions(hellos: Sequence[Mapping[str, Any]]) -> None:
    """ClusterError if an engine runs another Python or another flexkernel than this process."""
    mine = platform.python_version_tuple()[:2]
    pythons = {hello["python"] for hello in hellos}
    if pythons != {mine}:
        theirs = ", ".join(sorted(".".join(python) for python in pythons))
        raise ClusterError(
            f"engines run Python {theirs}, this notebook {'.'.join(mine)}: a function's code means "
            "nothing to another version; start both with the same"
        )
    versions = {hello["version"] for hello in hellos}
    if versions != {__version__}:
        raise ClusterError(
            f"engines run flexkernel {', '.join(sorted(versions))}, this notebook {__version__}"
        )
