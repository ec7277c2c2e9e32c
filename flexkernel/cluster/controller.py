"""The controller's processes: whether they run, another in the place of one that crashed, their end."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from flexkernel.errors import ClusterError

from .launchers import beats, ended, launchers
from .private import private_files

__all__ = [
    "PARTS_S",
    "Lame",
    "check_parts",
    "controllers",
    "end_controllers",
    "lame",
    "living",
    "quiet",
    "remove_keys",
    "restore_controller",
]

PARTS_S = 5.0  # how often a call that lasts looks whether the controller has all its parts


class Lame(ClusterError):
    """A controller has lost a part, and with it a way to the engines, before anything was done
    through it."""


def restore_controller(cluster: Any) -> None:
    """Start a controller in the place of one that crashed, on the same ports: engines and clients
    find it there by themselves, and what engines answered meanwhile arrives."""
    end_controllers(cluster)  # what it had begun outlives it, and holds the ports
    cluster.controller = None
    cluster.controller_args = ["--nodb", "--restore", *beats(cluster.engine_launcher_class)]
    with private_files(), quiet():
        cluster.start_controller_sync()


def lame(cluster: Any) -> bool:
    """Whether one of the processes of a cluster's controller has ended on this machine: it was
    killed, or another program had taken the port that it was to have. What goes through it would
    never arrive."""
    process = getattr(cluster.controller, "process", None)
    with contextlib.suppress(psutil.Error):
        return process is not None and any(
            part.status() == psutil.STATUS_ZOMBIE for part in process.children()
        )
    return False


def check_parts(cluster: Any) -> None:
    """Lame if the controller is."""
    if lame(cluster):
        raise Lame(f"a part of the controller has ended: its log, {cluster.controller.output_file}")


def end_controllers(cluster: Any) -> None:
    """End by force what is left of a cluster's controller on this machine."""
    left = controllers(cluster)
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, 5)


def controllers(cluster: Any) -> list[psutil.Process]:
    """The processes of a cluster's controller on this machine, by what they were told when they
    began."""
    mine = {"IPP_CLUSTER_ID": cluster.cluster_id, "IPP_PROFILE_DIR": cluster.profile_dir}
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if (
                "ipyparallel.controller" in process.cmdline()
                and mine.items() <= process.environ().items()
            ):
                found.append(process)
    return found


def remove_keys(cluster: Any) -> None:
    """The files with its address and key, which a controller that was started again leaves when it
    ends."""
    for who in ("client", "engine"):
        name = "-".join(filter(None, ["ipcontroller", cluster.cluster_id, f"{who}.json"]))
        (Path(cluster.profile_dir) / "security" / name).unlink(missing_ok=True)


def living(cluster: Any) -> bool:
    """Whether engines of the cluster are there, as far as can be known without its controller."""
    return any(
        not ended(group) or len(ended(group)) < len(launchers(group))
        for group in cluster.engines.values()
    )


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
