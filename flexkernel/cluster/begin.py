"""How a driver comes to a cluster: it starts engines, or attaches to running ones."""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import ipyparallel as ipp

from flexkernel.errors import ClusterError, first_line
from flexkernel.memory import slab

from .controller import (
    LOG,
    DegradedController,
    degraded,
    end_controllers,
    engines_live,
    restore_controller,
)
from .ipp import IPyParallel
from .launchers import (
    KEPT,
    FlexEngineSetLauncher,
    end_commands,
    engine_processes,
    heartbeat_options,
    launcher_for,
    preload,
    reading_clusters,
)
from .private import check_encrypted, check_private, private_files
from .process import descendants
from .reaper import Reaper
from .waiting import START_S, Progress, wait_for_engines

__all__ = ["attach", "running_clusters", "start"]

STARTS = 3  # how often a cluster is started whose controller loses a process meanwhile
CONNECT_S = 10.0
ATTACH_POLL_S = 0.05


# --- start ----------------------------------------------------------------------------


def start(
    n: int,
    engines: str | None = None,
    cluster_id: str = "",
    keep: bool = False,
    timeout_s: float = START_S,
    progress: Progress | None = None,
) -> IPyParallel:
    """Start n engines.

    engines: one of ipyparallel's launchers by name (slurm, ssh, mpi, pbs, ...). After slurm come
    options of sbatch: "slurm --partition=gpu --time=04:00:00". keep: engines and model outlive this
    process; attach to them by their id, end them with `%flex_cluster stop`. timeout_s: how long the
    engines may take to register, from the start of their job. progress: called with (what is being
    done, how many engines are there, of how many), at each change.

    ClusterError: n is not a whole number from 1, or the engines did not start."""
    if not isinstance(n, int) or n < 1:
        raise ClusterError(f"n={n!r} engines cannot be started; n is a whole number from 1")
    options = StartOptions(n, engines, cluster_id, keep, timeout_s)
    for _ in range(STARTS - 1):
        with contextlib.suppress(DegradedController):
            return start_once(options, progress or report_to_nobody)
    return start_once(options, progress or report_to_nobody)


@dataclass(frozen=True)
class StartOptions:
    """What start() was asked for."""

    n: int
    engines: str | None
    cluster_id: str
    keep: bool
    timeout_s: float

    def cluster(self) -> ipp.Cluster:
        """ipyparallel's object for it; nothing has been started yet."""
        launcher, config = launcher_for(self.engines)
        cluster_id = self.cluster_id or f"flex-{os.getpid()}-{secrets.token_hex(3)}"
        if self.keep:
            cluster_id = KEPT + cluster_id
        return ipp.Cluster(
            n=self.n,
            engines=launcher,
            cluster_id=cluster_id,
            controller_args=["--nodb", *heartbeat_options(launcher)],
            delay=0,
            log=LOG,
            shutdown_atexit=False,  # ipyparallel would print a line; IPyParallel does it
            config=config,
        )


def start_once(options: StartOptions, progress: Progress) -> IPyParallel:
    """One attempt of start(). DegradedController: another may succeed."""
    cluster = options.cluster()
    reaper = None
    if not options.keep:
        reaper = Reaper(cluster.cluster_id)
    preload(cluster.engine_launcher_class)  # the fork server is not one of the cluster's processes
    before = {process.pid for process in descendants()}
    client = None
    try:
        progress("starting the controller", 0, options.n)
        with private_files():
            cluster.start_controller_sync()
            progress(f"{verb(cluster)} {counted(options.n)}", 0, options.n)
            cluster.start_engines_sync(options.n)
        if reaper is not None:
            reaper.watch(engine_processes(cluster.engine_set))
            reaper.run_at_end(end_commands(list(cluster.engines.values())))
        client = cluster.connect_client_sync()
        wait_for_engines(
            client, cluster, cluster.engine_set, set(), options.n, options.timeout_s, progress
        )
        progress("joining", options.n, options.n)
        joined = IPyParallel(cluster, client, owned=True)
    except BaseException as error:
        kind = ClusterError
        if isinstance(error, DegradedController) or degraded(cluster):
            kind = DegradedController
        undo(cluster, client, reaper)
        if isinstance(error, Exception):
            raise kind(f"{options.n} engines did not start: {error}") from error
        raise
    if reaper is not None:
        reaper.watch(process for process in descendants() if process.pid not in before)
        reaper.sweep_at_end(slab.folder_path(joined.folder))
        joined.reaper = reaper
    return joined


def undo(cluster: ipp.Cluster, client: ipp.Client | None, reaper: Reaper | None) -> None:
    """End what a failed start has started."""
    if client is not None:
        client.close()
    # The error that ended the start matters, none of these.
    with contextlib.suppress(Exception):
        cluster.stop_cluster_sync()
    end_controllers(cluster)  # one that is stopped early leaves its children
    if reaper is not None:
        reaper.leave()


def verb(cluster: ipp.Cluster) -> str:
    if cluster.engine_launcher_class is FlexEngineSetLauncher:
        return "forking"
    return "starting"


def counted(n: int) -> str:
    if n == 1:
        return "1 engine"
    return f"{n} engines"


def report_to_nobody(_stage: str, _done: int, _total: int) -> None:
    """For whoever gives no progress."""


# --- attach ---------------------------------------------------------------------------


def attach(
    profile: str | None = None,
    cluster_id: str | None = None,
    take: bool = False,
    timeout_s: float = 60.0,
    read_only: bool = False,
    progress: Progress | None = None,
) -> IPyParallel:
    """Attach to a running cluster: one of ours, or one that `ipcluster start` began.

    Without profile and cluster_id: the default cluster, or the only one that runs. take: also if
    another notebook has the engines. read_only: only look at what is there. timeout_s: how long the
    engines may take to register. progress: called with (what is being done, how many engines are
    there, of how many), at each change.

    ClusterError: no such cluster runs, its engines do not answer, or another notebook has them."""
    if take and read_only:
        raise ClusterError(
            "take=True takes the engines, read_only=True leaves them to whoever has them: "
            "give one of the two"
        )
    progress = progress or report_to_nobody
    progress("looking for the cluster", 0, 1)
    address = {"profile": profile, "cluster_id": cluster_id}
    where = {key: value for key, value in address.items() if value is not None}
    if not where:
        where = only_running_cluster()
    cluster, client = connect(where, read_only, timeout_s)
    try:
        wait_for_attached(client, cluster.n or 1, timeout_s, progress)
        progress("joining", len(client.ids), len(client.ids))
        return IPyParallel(cluster, client, owned=False, take=take, read_only=read_only)
    except ClusterError:
        client.close()
        raise


def connect(
    where: Mapping[str, str], read_only: bool, timeout_s: float
) -> tuple[ipp.Cluster, ipp.Client]:
    """ipyparallel's cluster and client of a running cluster. ClusterError: there is none there.

    The crashed controller of a kept cluster is started again, unless read_only."""
    try:
        check_files(where)
        with reading_clusters():
            cluster = ipp.Cluster.from_file(**where, log=LOG)
        kept = cluster.cluster_id.startswith(KEPT)
        if kept and not read_only and needs_controller(cluster):
            restore_controller(cluster)
        if cluster.controller is None:
            raise ClusterError("its controller is not running any more")
        return cluster, cluster.connect_client_sync(timeout=min(timeout_s, CONNECT_S))
    except Exception as error:
        place = ", ".join(f"{key}={value!r}" for key, value in where.items())
        running = ", ".join(running_clusters())
        raise ClusterError(
            f"no cluster to attach to at {place or 'the default profile'}: {first_line(error)}. "
            f"Clusters that run: {running or 'none'}. "
            "Start one with %flex_cluster start -n 2, or `ipcluster start -n 2` in a shell"
        ) from None


def needs_controller(cluster: ipp.Cluster) -> bool:
    """Whether a cluster has engines, and no whole controller any more."""
    if cluster.controller is None:
        return engines_live(cluster)
    return degraded(cluster)


def wait_for_attached(client: ipp.Client, n: int, timeout_s: float, progress: Progress) -> None:
    """Wait until n engines have registered. ClusterError: fewer have within timeout_s."""
    deadline = time.monotonic() + timeout_s
    num_reported = -1
    while (num_engines := len(client.ids)) < n:
        if num_engines != num_reported:
            num_reported = num_engines
            progress(f"engines are there: {num_engines} of {n}", num_engines, n)
        if time.monotonic() > deadline:
            raise ClusterError(
                f"the cluster's file is there, but {n} engines did not answer within "
                f"{timeout_s:g} s ({num_engines} did): is it still running?"
            )
        time.sleep(ATTACH_POLL_S)


def check_files(where: Mapping[str, str]) -> None:
    """ClusterError unless the files of the cluster there are this user's alone.

    They are its own, which says what to import, and those with its address and key."""
    file = Path(ipp.Cluster(**{"cluster_id": "", **where}).cluster_file)
    check_private(file)
    for who in ("client", "engine"):
        base = "-".join(filter(None, ["ipcontroller", where.get("cluster_id"), f"{who}.json"]))
        check_private(file.with_name(base), key=True)
        if who == "client":
            check_encrypted(file.with_name(base))


def only_running_cluster() -> dict[str, str]:
    """Where the only cluster is that runs; empty for the default one, or if several run."""
    running = loaded_clusters()
    if len(running) == 1 and running[0].cluster_id:
        return {"profile_dir": running[0].profile_dir, "cluster_id": running[0].cluster_id}
    return {}


def running_clusters() -> list[str]:
    """The ids of the running clusters of this user, in any profile."""
    names = []
    for cluster in loaded_clusters():
        if cluster.cluster_id:
            names.append(repr(cluster.cluster_id))
        else:
            names.append("the default one")
    return names


def loaded_clusters() -> list[ipp.Cluster]:
    """The clusters, in any profile, that have a file and a running controller."""
    with reading_clusters():
        clusters = ipp.ClusterManager(log=LOG).load_clusters().values()
    return [cluster for cluster in clusters if cluster.controller is not None]
