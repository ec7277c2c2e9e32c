"""The engines as one thing to call: through ipyparallel, or in this process. Only this file knows ipyparallel.

A call goes to every rank and comes back with one answer a rank. Engines never raise through ipyparallel: an error is
an ErrorReport, the earliest is the cause, and groups that were broken to free the others are made anew before it is
raised.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any

import ipyparallel as ipp
import psutil
from ipyparallel.cluster.launcher import LocalEngineLauncher, LocalEngineSetLauncher

from . import engine, errors, slabs
from .errors import ClusterError, EngineDied, EngineError
from .reaper import Reaper
from .wire import ErrorReport, Seat

__all__ = ["Cluster", "FlexEngineSetLauncher", "IPyParallel", "InProcess", "attach", "packed", "start"]

DRIVER = secrets.token_hex(8)  # this process, as engines know it
KEPT = "kept-"  # what the ids of clusters begin with that outlive their notebook
POLL_S = 0.03  # how often a call that is watched looks at what the ranks have made so far
INTERRUPT_S = 10.0  # how long interrupted ranks have to come back before the prompt does


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
        self.timeout_s = 60.0
        self.seated = False
        self.closed = False
        self.poll: Callable[[], None] | None = None  # called again and again while ranks work

    # --- what a backend does -----------------------------------------------------------------------

    def _send(self, method: str, args: Sequence[tuple], ranks: Sequence[int]) -> list[Any]:
        raise NotImplementedError

    def _collect(self, pending: list[Any], ranks: Sequence[int], progress: Callable[[int], None] | None) -> list[Any]:
        raise NotImplementedError

    def close(self, end: bool | None = None) -> None:
        """Let go of the engines. end: whether they stop, with their model; by default those that this driver owns."""
        raise NotImplementedError

    def best_device(self) -> str:
        """ "cuda" where every host has a GPU for each of its engines, else "cpu"."""
        enough = all(self.gpus.get(host, 0) >= self.hosts.count(host) for host in self.hosts)
        return "cuda" if enough else "cpu"

    # --- calling -----------------------------------------------------------------------------------

    def call(
        self,
        method: str,
        *args: Any,
        ranks: Sequence[int] | None = None,
        each: Sequence[tuple] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[Any]:
        """Each rank's answer to one of Runtime's methods, in order of rank. each: arguments of their own for each rank.

        Raises the cause if any rank raised; the engines are idle and usable again when it does."""
        if self.closed:
            raise ClusterError("this session is closed; start another: %flex_cluster start -n 2, or fk.start(n=2)")
        ranks = list(range(self.size)) if ranks is None else list(ranks)
        answers = self._collect(self._send(method, each or [args] * len(ranks), ranks), ranks, progress)
        reports = [a for a in answers if isinstance(a, ErrorReport)]
        if reports:
            if any(report.broken for report in reports):
                self.seat(self.device)
            raise cause(reports)
        return answers

    @contextlib.contextmanager
    def watched(self, poll: Callable[[], None] | None) -> Iterator[None]:
        """Within it every call calls this while the ranks work; where it raises they are interrupted."""
        self.poll = poll
        try:
            yield
        finally:
            self.poll = None

    def ready(self, device: str) -> None:
        """Have the ranks seated for this device."""
        if not self.seated or self.device != device:
            self.seat(device)
            self.fresh = True

    def renew(self) -> None:
        """New process groups for a new model: those of the one before would stay for ever, and a regroup would find
        the meshes' groups under other names than theirs."""
        if not self.fresh:
            self.call("unload")
            self.seat(self.device)
            self.fresh = True  # unlike after a regroup, which puts the loaded model's meshes on the new groups

    def seat(self, device: str) -> None:
        """Give every engine its rank and (again) its process groups, in a new generation."""
        self.device = device
        self.generation += 1
        local = [self.hosts[:rank].count(host) for rank, host in enumerate(self.hosts)]
        seats = [
            Seat(rank, self.size, local[rank], self.hosts.count(self.hosts[rank]), self.generation)
            for rank in range(self.size)
        ]
        where: tuple = ()
        if self.size > 1:
            where = self.call("open_store", "127.0.0.1", ranks=[0])[0]
        rest = (*where, self.timeout_s) if where else ()
        self.call("sit", each=[(seat, self.folder, device, *rest) for seat in seats])
        self.seated = True


def packed(function: Callable) -> bytes:
    """A user's function as it travels to engines: with its code, so that one typed into a notebook works."""
    import cloudpickle

    try:
        return cloudpickle.dumps(function)
    except Exception as error:
        name = getattr(function, "__name__", function)
        raise ClusterError(f"{name} cannot be sent to engines, it holds something that stays here: {error}") from None


def cause(reports: Sequence[ErrorReport]) -> BaseException:
    """The error that began it: the earliest that is not merely about another rank's."""
    first = min(reports, key=lambda r: (r.secondary, r.time))
    if first.type == "KeyboardInterrupt":
        return KeyboardInterrupt()
    kind = errors.named(first.type)
    if issubclass(kind, EngineError) and kind is not EngineError:
        return kind(first.message, first.rank, first.traceback)
    if kind is EngineError:
        message = first.message
        if first.type not in ("EngineError",):
            message = f"{first.type} on rank {first.rank}: {first.message}"
        return EngineError(message, first.rank, first.traceback)
    return kind(first.message)


class InProcess(Cluster):
    """One engine in this process: the whole model, behind the same interface."""

    def __init__(self) -> None:
        super().__init__()
        self.hosts = [os.environ.get("FLEX_HOST") or socket.gethostname()]
        self._runtime = engine.open_runtime()
        self.gpus = {self.hosts[0]: self._runtime.hello()["gpus"]}

    def _send(self, method: str, args: Sequence[tuple], ranks: Sequence[int]) -> list[Any]:
        return [engine.answer(self._runtime, method, *args[0])]

    def _collect(self, pending: list[Any], ranks: Sequence[int], progress: Callable[[int], None] | None) -> list[Any]:
        if progress:
            progress(1)
        return pending

    @contextlib.contextmanager
    def watched(self, poll: Callable[[], None] | None) -> Iterator[None]:
        """The engine works in this thread: it calls it itself, at each new token."""
        self._runtime.tick = poll
        try:
            yield
        finally:
            self._runtime.tick = None

    def alive(self) -> list[bool]:
        return [not self.closed]

    def close(self, end: bool | None = None) -> None:
        if not self.closed:
            self.closed = True
            self._runtime.close()


class IPyParallel(Cluster):
    """Engines of an ipyparallel cluster: control only, an importable function and plain data."""

    def __init__(self, cluster: Any, client: Any, owned: bool):
        super().__init__()
        self._cluster, self._client, self.owned = cluster, client, owned
        self.engines: list[int] = sorted(client.ids)  # rank → ipyparallel's engine id
        self.size = len(self.engines)
        self.hosts = [""] * self.size
        self._views: dict[int, Any] = {}
        self.reaper: Reaper | None = None
        self.kept = cluster.cluster_id.startswith(KEPT)  # it was started to outlive its notebook
        self._greet()

    @property
    def cluster_id(self) -> str:
        return self._cluster.cluster_id

    def _greet(self) -> None:
        """Ask every engine who it is; agree on ranks: those they have, else by host."""
        from . import __version__

        hellos = self.call("hello")
        versions = {hello["version"] for hello in hellos}
        if versions != {__version__}:
            raise ClusterError(f"engines run flexkernel {', '.join(sorted(versions))}, this notebook {__version__}")
        seats = [hello["seat"] for hello in hellos]
        self.loaded = all(hello["loaded"] for hello in hellos)
        kept = sorted(seat.rank for seat in seats) == list(range(self.size)) and all(
            s.world == self.size for s in seats
        )
        key = (lambda i: seats[i].rank) if kept else (lambda i: (hellos[i]["host"], self.engines[i]))
        order = sorted(range(self.size), key=key)
        self.engines = [self.engines[i] for i in order]
        self.hosts = [hellos[i]["host"] for i in order]
        self.gpus = {hello["host"]: hello["gpus"] for hello in hellos}
        self.pids = [hellos[i]["pid"] for i in order]
        self.generation = max(seat.generation for seat in seats)
        if kept and self.loaded:
            self.folder, self.device = hellos[order[0]]["folder"], hellos[order[0]]["device"]
            self.seated = True

    def alive(self) -> list[bool]:
        ids = set() if self.closed else set(self._client.ids)
        return [engine_id in ids for engine_id in self.engines]

    def _view(self, engine_id: int) -> Any:
        if engine_id not in self._views:
            self._views[engine_id] = self._client[engine_id]
        return self._views[engine_id]

    def _send(self, method: str, args: Sequence[tuple], ranks: Sequence[int]) -> list[Any]:
        gone = [rank for rank, alive in enumerate(self.alive()) if not alive]
        if gone:
            raise EngineDied(
                f"rank {gone[0]}'s engine is gone, and its part of the model with it; "
                "restart the cluster (%flex_cluster restart) and load again"
            )
        return [
            self._view(self.engines[rank]).apply_async(engine.call, DRIVER, method, *rest)
            for rank, rest in zip(ranks, args, strict=True)
        ]

    def _collect(self, pending: list[Any], ranks: Sequence[int], progress: Callable[[int], None] | None) -> list[Any]:
        answers: list[Any] = []
        interrupted = False
        deadline = float("inf")
        for done, result in enumerate(pending):
            while True:
                try:
                    answers.append(self._awaited(result, ranks[done], 1.0))
                    break
                except (FutureTimeout, TimeoutError):
                    self._check_controller()
                    if time.monotonic() > deadline:
                        answers.append(silent(ranks[done]))
                        break
                except KeyboardInterrupt:
                    if not interrupted:  # a second one changes nothing: the ranks are on their way
                        interrupted, deadline = True, time.monotonic() + INTERRUPT_S
                        self.interrupt([r for r, p in zip(ranks, pending, strict=True) if not p.done()])
            if progress and not interrupted:
                progress(done + 1)
        self._forget(pending)
        if interrupted:
            if any(isinstance(a, ErrorReport) and a.broken for a in answers):
                self.seat(self.device)
            raise KeyboardInterrupt
        return answers

    def _forget(self, done: list[Any]) -> None:
        """The client keeps what it knows of every call, and of what engines print after it, for ever."""
        self._client.purge_local_results([result for result in done if result.done()])
        self._client.history.clear()
        for msg_id in set(self._client.metadata) - self._client.outstanding:
            self._client.metadata.pop(msg_id, None)

    def _check_controller(self) -> None:
        """ClusterError when there is nobody left who could bring an answer."""
        process = getattr(self._cluster.controller, "process", None)
        pid = getattr(process, "pid", None)
        if pid is not None and not psutil.pid_exists(pid):
            self.closed = True
            raise ClusterError("the cluster has ended, its controller is gone: another notebook may have stopped it")

    def _awaited(self, result: Any, rank: int, timeout_s: float) -> Any:
        """Its answer, as _get; meanwhile whoever watches is called."""
        end = time.monotonic() + timeout_s
        while self.poll is not None and time.monotonic() < end:
            with contextlib.suppress(FutureTimeout, TimeoutError):
                return self._get(result, rank, POLL_S)
            try:
                self.poll()
            except BaseException:  # it keeps what it raised; here it is one more way to be interrupted
                self.poll = None
                raise KeyboardInterrupt from None
        return self._get(result, rank, 0.0 if self.poll is not None else timeout_s)

    def _get(self, result: Any, rank: int, timeout_s: float) -> Any:
        try:
            return result.get(timeout_s)
        except ipp.error.EngineError as error:
            raise EngineDied(f"rank {rank}'s engine died while it worked: {first_line(error)}") from None
        except ipp.error.RemoteError as error:
            return ErrorReport(rank, "EngineError", str(error), "\n".join(error.render_traceback()), time.time())

    def interrupt(self, ranks: Sequence[int]) -> None:
        """Send SIGINT to these engines, through their nannies."""
        ids = [self.engines[rank] for rank in ranks]
        if ids:
            self._client.send_signal(signal.SIGINT, ids, block=False)

    def close(self, end: bool | None = None) -> None:
        if self.closed:
            return
        self.closed = True
        end = self.owned and not self.kept if end is None else end
        if end:
            with contextlib.suppress(Exception):  # engines that do not answer are ended below all the same
                for result in [self._view(i).apply_async(engine.call, DRIVER, "close") for i in self._client.ids]:
                    result.get(3.0)
        with quiet():
            self._client.close()
            if end:
                self._cluster.stop_cluster_sync()
        if self.reaper is not None:
            self.reaper.leave()


def silent(rank: int) -> ErrorReport:
    return ErrorReport(rank, "EngineError", f"rank {rank} did not answer the interrupt", "", time.time(), broken=True)


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Stopping prints that engines ended with 1, which they always do."""
    import logging

    logger = logging.getLogger("traitlets")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


# --- beginnings ------------------------------------------------------------------------------------


class FlexEngineLauncher(LocalEngineLauncher):
    """A local engine with one thread for torch and this rank's number in its environment."""

    def get_env(self) -> dict[str, str]:
        env = super().get_env()
        env.setdefault("OMP_NUM_THREADS", "1")
        env.update(TOKENIZERS_PARALLELISM="false", HF_HUB_DISABLE_PROGRESS_BARS="1", PYDEVD_DISABLE_FILE_VALIDATION="1")
        return env


class FlexEngineSetLauncher(LocalEngineSetLauncher):
    """The engines of this machine; found by name through the entry point, so that a cluster file can be read back."""

    launcher_class = FlexEngineLauncher


def start(
    n: int, engines: str | None = None, cluster_id: str = "", keep: bool = False, timeout_s: float = 120.0
) -> IPyParallel:
    """Start n engines. engines: one of ipyparallel's launchers by name (slurm, ssh, mpi, pbs, ...).

    keep: they stay, with their model, when this process ends; attach by their id, `%flex_cluster stop` ends them."""
    if not isinstance(n, int) or n < 1:
        raise ClusterError(f"n={n!r} engines cannot be started; n is a whole number from 1")
    cluster = ipp.Cluster(
        n=n,
        engines=engines or "flexkernel",
        cluster_id=(KEPT if keep else "") + (cluster_id or f"flex-{os.getpid()}-{secrets.token_hex(3)}"),
        controller_args=["--nodb"],
        delay=0,
        log_level=40,
        shutdown_atexit=not keep,
    )
    before = {p.pid for p in psutil.Process().children(recursive=True)}
    previous = os.umask(0o077)
    try:
        cluster.start_cluster_sync()
        client = cluster.connect_client_sync()
        client.wait_for_engines(n, timeout=timeout_s, block=True, interactive=False)
    except BaseException as error:
        with quiet(), contextlib.suppress(Exception):  # what did start is ended; the error below is what matters
            cluster.stop_cluster_sync()
        if isinstance(error, Exception):
            raise ClusterError(f"{n} engines did not start: {first_line(error)}") from error
        raise
    finally:
        os.umask(previous)
    mine = [p for p in psutil.Process().children(recursive=True) if p.pid not in before]
    found = IPyParallel(cluster, client, owned=True)
    if not keep:
        found.reaper = Reaper(mine, slabs.place(found.folder))
    return found


def attach(profile: str | None = None, cluster_id: str | None = None, timeout_s: float = 60.0) -> IPyParallel:
    """Attach to a cluster that runs already, ours or one that `ipcluster start` began."""
    where = {key: value for key, value in (("profile", profile), ("cluster_id", cluster_id)) if value is not None}
    if not where:
        where = only_one()
    try:
        with quiet():
            cluster = ipp.Cluster.from_file(**where)
        if cluster.controller is None:
            raise ClusterError("its controller is not running any more")
        client = cluster.connect_client_sync()
    except Exception as error:
        asked = ", ".join(f"{k}={v!r}" for k, v in where.items()) or "the default profile"
        raise ClusterError(
            f"no cluster to attach to at {asked}: {first_line(error)}. Clusters that run: "
            f"{', '.join(running_clusters()) or 'none'}. "
            "Start one with %flex_cluster start -n 2, or `ipcluster start -n 2` in a shell"
        ) from None
    expected = cluster.n or 1
    try:
        client.wait_for_engines(expected, timeout=timeout_s, block=True, interactive=False)
    except Exception as error:
        client.close()
        raise ClusterError(
            f"the cluster's file is there, but {expected} engines did not answer within {timeout_s:g} s "
            f"({len(client.ids)} did): is it still running? {first_line(error)}"
        ) from None
    return IPyParallel(cluster, client, owned=False)


def only_one() -> dict[str, str]:
    """Where the cluster is that is meant when none is named: the only one that runs, if the default one does not."""
    with quiet():
        running = [c for c in ipp.ClusterManager().load_clusters().values() if c.controller is not None]
    if len(running) == 1 and running[0].cluster_id:
        return {"profile_dir": running[0].profile_dir, "cluster_id": running[0].cluster_id}
    return {}


def running_clusters() -> list[str]:
    """The ids of the clusters that have a file, in any profile, and a controller that runs."""
    with quiet():
        found = ipp.ClusterManager().load_clusters().values()
    return [repr(c.cluster_id) if c.cluster_id else "the default one" for c in found if c.controller is not None]
