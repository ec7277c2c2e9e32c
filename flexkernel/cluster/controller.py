"""The processes of a cluster's controller: whether they run, their restart, their end.

A controller consists of several processes. Each is a way to the engines."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path

import ipyparallel as ipp
import psutil

from flexkernel.errors import ClusterError

from .launchers import ended_logs, engine_launchers, heartbeat_options
from .private import private_files
from .process import wait_until_ended

__all__ = [
    "LOG",
    "PARTS_S",
    "DegradedController",
    "check_parts",
    "controllers",
    "degraded",
    "end_controllers",
    "engines_live",
    "remove_keys",
    "restore_controller",
]

PARTS_S = 5.0  # between two looks at a controller's parts
KILLED_S = 5.0  # how long killed processes may take to end

# ipyparallel prints its log into the notebook unless a cluster has a log of its own. An engine's
# or controller's end is no news here: whatever matters is raised as an error.
LOG = logging.getLogger("flexkernel.ipyparallel")
LOG.setLevel(logging.WARNING)
LOG.propagate = False
LOG.addHandler(logging.NullHandler())


class DegradedController(ClusterError):
    """A controller has lost a process, and with it a way to the engines, before it was used."""


def restore_controller(cluster: ipp.Cluster) -> None:
    """Start a controller in the place of one that crashed, on the same ports.

    Engines and clients find it by themselves. Answers that engines have sent meanwhile arrive."""
    end_controllers(cluster)  # the crashed one's children outlive it, and hold the ports
    cluster.controller = None
    cluster.controller_args = [
        "--nodb",
        "--restore",
        *heartbeat_options(cluster.engine_launcher_class),
    ]
    with private_files():
        cluster.start_controller_sync()


def degraded(cluster: ipp.Cluster) -> bool:
    """Whether a child process of the controller has ended, on this machine.

    It was killed, or another program had taken the port that it should have had. What is sent
    through it never arrives."""
    process = getattr(cluster.controller, "process", None)
    if process is None:
        return False
    with contextlib.suppress(psutil.Error):
        return any(part.status() == psutil.STATUS_ZOMBIE for part in process.children())
    return False


def check_parts(cluster: ipp.Cluster) -> None:
    """DegradedController if the controller is degraded."""
    if degraded(cluster):
        log = cluster.controller.output_file
        raise DegradedController(f"a process of the controller has ended; its log: {log}")


def end_controllers(cluster: ipp.Cluster) -> None:
    """Kill what is left of a cluster's controller on this machine."""
    left = controllers(cluster)
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    wait_until_ended(left, KILLED_S)


def controllers(cluster: ipp.Cluster) -> list[psutil.Process]:
    """The processes of a cluster's controller on this machine, by command and environment."""
    marks = {"IPP_CLUSTER_ID": cluster.cluster_id, "IPP_PROFILE_DIR": cluster.profile_dir}
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            is_controller = "ipyparallel.controller" in process.cmdline()
            if is_controller and marks.items() <= process.environ().items():
                found.append(process)
    return found


def remove_keys(cluster: ipp.Cluster) -> None:
    """Remove the files with a cluster's address and key. A restored controller leaves them."""
    for who in ("client", "engine"):
        name = "-".join(filter(None, ["ipcontroller", cluster.cluster_id, f"{who}.json"]))
        (Path(cluster.profile_dir) / "security" / name).unlink(missing_ok=True)


def engines_live(cluster: ipp.Cluster) -> bool:
    """Whether engines of the cluster run, as far as this can be known without its controller."""
    for group in cluster.engines.values():
        logs = ended_logs(group)
        if not logs or len(logs) < len(engine_launchers(group)):
            return True
    return False
