"""How a cluster begins for this driver: engines are started, or found running."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Mapping
from pathlib import Path

import ipyparallel as ipp
import psutil

from flexkernel.errors import ClusterError, first_line
from flexkernel.memory.slab import folder_path

from .controller import Lame, end_controllers, lame, living, quiet, restore_controller
from .ipp import IPyParallel
from .launchers import KEPT, beats, engines_of, how_to_end, launcher_for, preload, read_back
from .private import check_encrypted, check_private, private_files
from .reaper import Reaper
from .waiting import START_S, arrived

__all__ = ["attach", "running_clusters", "start"]

STARTS = 3  # how often one is begun whose controller does not get all its parts


def start(
    n: int,
    engines: str | None = None,
    cluster_id: str = "",
    keep: bool = False,
    timeout_s: float = START_S,
) -> IPyParallel:
    """Start n engines. engines: one of ipyparallel's launchers by name (slurm, ssh, mpi, pbs,
    ...); after slurm options of sbatch, "slurm --partition=gpu --time=04:00:00". timeout_s: from
    when a job has begun.

    keep: they stay, with their model, when this process ends; attach by their id, `%flex_cluster
    stop` ends them."""
    if not isinstance(n, int) or n < 1:
        raise ClusterError(f"n={n!r} engines cannot be started; n is a whole number from 1")
    for _ in range(STARTS - 1):
        with contextlib.suppress(Lame):
            return begin(n, engines, cluster_id, keep, timeout_s)
    return begin(n, engines, cluster_id, keep, timeout_s)


def begin(
    n: int, engines: str | None, cluster_id: str, keep: bool, timeout_s: float
) -> IPyParallel:
    """One try of start(). Lame: another may do."""
    launcher, config = launcher_for(engines)
    cluster = ipp.Cluster(
        n=n,
        engines=launcher,
        cluster_id=(KEPT if keep else "")
        + (cluster_id or f"flex-{os.getpid()}-{secrets.token_hex(3)}"),
        controller_args=["--nodb", *beats(launcher)],
        delay=0,
        log_level=40,
        shutdown_atexit=not keep,
        config=config,
    )
    reaper = None if keep else Reaper(cluster.cluster_id)
    preload(launcher)  # which is none of the cluster's own
    before, client = {p.pid for p in psutil.Process().children(recursive=True)}, None
    try:
        with private_files():
            cluster.start_cluster_sync()
        if reaper is not None:
            reaper.watch(engines_of(cluster.engine_set))
            reaper.runs(how_to_end(list(cluster.engines.values())))
        client = cluster.connect_client_sync()
        arrived(client, cluster, cluster.engine_set, set(), n, timeout_s)
        found = IPyParallel(cluster, client, owned=True)
    except BaseException as error:
        kind = Lame if isinstance(error, Lame) or lame(cluster) else ClusterError
        if client is not None:
            client.close()
        # what did start is ended; the error below is what matters
        with quiet(), contextlib.suppress(Exception):
            cluster.stop_cluster_sync()
        end_controllers(cluster)  # one that is ended before it is up leaves what it has begun
        if reaper is not None:
            reaper.leave()
        if isinstance(error, Exception):
            raise kind(f"{n} engines did not start: {error}") from error
        raise
    if reaper is not None:
        reaper.watch(p for p in psutil.Process().children(recursive=True) if p.pid not in before)
        reaper.sweeps(folder_path(found.folder))
        found.reaper = reaper
    return found


def attach(
    profile: str | None = None,
    cluster_id: str | None = None,
    take: bool = False,
    timeout_s: float = 60.0,
    read_only: bool = False,
) -> IPyParallel:
    """Attach to a cluster that runs already, ours or one that `ipcluster start` began. read_only:
    only to look at it.

    ClusterError: there is none, or another notebook has its engines and is not to be parted from
    them (take)."""
    if take and read_only:
        raise ClusterError(
            "take=True has the engines, read_only=True leaves them to whoever has them: say one of them"
        )
    where = {
        key: value
        for key, value in (("profile", profile), ("cluster_id", cluster_id))
        if value is not None
    }
    if not where:
        where = only_one()
    try:
        check_files(where)
        with quiet(), read_back():
            cluster = ipp.Cluster.from_file(**where)
        gone = lame(cluster) if cluster.controller is not None else living(cluster)
        if gone and cluster.cluster_id.startswith(KEPT) and not read_only:
            restore_controller(cluster)
        if cluster.controller is None:
            raise ClusterError("its controller is not running any more")
        client = cluster.connect_client_sync(timeout=min(timeout_s, 10.0))
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
    try:
        return IPyParallel(cluster, client, owned=False, take=take, read_only=read_only)
    except ClusterError:
        client.close()
        raise


def check_files(where: Mapping[str, str]) -> None:
    """ClusterError unless the files of the cluster there are this user's alone: its own, which
    says what to import, and those with its address and key."""
    file = Path(ipp.Cluster(**{"cluster_id": "", **where}).cluster_file)
    check_private(file)
    for who in ("client", "engine"):
        base = "-".join(filter(None, ["ipcontroller", where.get("cluster_id"), f"{who}.json"]))
        check_private(file.with_name(base), key=True)
        if who == "client":
            check_encrypted(file.with_name(base))


def only_one() -> dict[str, str]:
    """Where the cluster is that is meant when none is named: the only one that runs, if the
    default one does not."""
    with quiet(), read_back():
        running = [
            c for c in ipp.ClusterManager().load_clusters().values() if c.controller is not None
        ]
    if len(running) == 1 and running[0].cluster_id:
        return {"profile_dir": running[0].profile_dir, "cluster_id": running[0].cluster_id}
    return {}


def running_clusters() -> list[str]:
    """The ids of the clusters that have a file, in any profile, and a controller that runs."""
    with quiet(), read_back():
        found = ipp.ClusterManager().load_clusters().values()
    return [
        repr(c.cluster_id) if c.cluster_id else "the default one"
        for c in found
        if c.controller is not None
    ]
