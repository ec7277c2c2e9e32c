"""The reaper: ends a cluster whose driver has gone without ending it, however it went.

It is a process of its own beside the driver, and reads JSON lines from a pipe: which processes,
jobs and folders belong to the cluster. A last line "leave" means that all is well. When the pipe
ends without it, the driver has been killed: the reaper ends the processes and jobs and removes the
folders with slabs. It knows the cluster's id before anything of the cluster is started, and ends
every process that has this id in its environment too.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import psutil

from flexkernel.memory.heartbeat import start_time

from .forkserver import FORKED

__all__ = ["Reaper", "end"]

GRACE_S = 3.0  # how long a process may take to end by itself
# A process that was just started may get the cluster's id a moment later: it is looked for again.
LOOK_AGAIN_S = 1.0
LOOKS = 5
COMMAND_S = 60.0  # how long a command of a batch system may take
SAME_START_S = 0.01


class Reaper:
    """The driver's end: watches a cluster until `leave()` or the driver's end."""

    def __init__(self, cluster_id: str):
        self._child = subprocess.Popen(
            [sys.executable, "-m", "flexkernel.cluster.reaper"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # a Ctrl-C in the driver's terminal does not reach it
        )
        self._send(cluster=cluster_id)

    def watch(self, processes: Iterable[psutil.Process]) -> None:
        """Watch these processes too: the environment of new ones may not name the cluster."""
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                self._send(pid=process.pid, started=start_time(process.pid))

    def run_at_end(self, commands: Iterable[Sequence[str]]) -> None:
        """Run these commands at the end too: they cancel jobs of a batch system."""
        for command in commands:
            self._send(run=list(command))

    def sweep_at_end(self, folder: Path) -> None:
        """Remove this folder at the end too."""
        self._send(sweep=str(folder))

    def leave(self) -> None:
        """Let the reaper go: the cluster has ended, or is meant to stay."""
        stdin = self._child.stdin
        if stdin is None or stdin.closed:
            return
        self._send(leave=True)
        with contextlib.suppress(BrokenPipeError):
            stdin.close()
        self._child.wait(GRACE_S)

    def _send(self, **message: Any) -> None:
        assert self._child.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has gone already
            self._child.stdin.write(json.dumps(message).encode() + b"\n")
            self._child.stdin.flush()


def end(known: Iterable[tuple[int, float]], grace_s: float = GRACE_S) -> list[int]:
    """End these processes and their children, by force after grace_s seconds.

    known: (pid, start_time). Another process that has got a pid meanwhile is left alone. Returns
    the pids that were still there."""
    alive: dict[int, psutil.Process] = {}
    for pid, started in known:
        try:
            process = psutil.Process(pid)
            if abs(start_time(pid) - started) < SAME_START_S:
                alive.update({p.pid: p for p in [process, *process.children(recursive=True)]})
        except psutil.NoSuchProcess:
            continue
    for signal in ("terminate", "kill"):
        for process in alive.values():
            try:
                getattr(process, signal)()
            except psutil.NoSuchProcess:
                continue
        if not psutil.wait_procs(list(alive.values()), grace_s)[1]:
            break
    return list(alive)


def members(cluster_id: str) -> list[tuple[int, float]]:
    """(pid, start_time) of this user's processes that were started for a cluster."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if is_member(process, cluster_id) and process.status() != psutil.STATUS_ZOMBIE:
                found.append((process.pid, start_time(process.pid)))
    return found


def is_member(process: psutil.Process, cluster_id: str) -> bool:
    """Whether a process was started for a cluster: by its environment, or a forked one by its
    log."""
    if process.environ().get("IPP_CLUSTER_ID") == cluster_id:
        return True
    if process.name() != FORKED:
        return False
    return any(f"-{cluster_id}-" in Path(file.path).name for file in process.open_files())


# --- in the reaper's process ----------------------------------------------------------


def main() -> None:
    messages = [json.loads(line) for line in complete_lines(sys.stdin.read())]
    if not any("leave" in message for message in messages):
        reap(messages)


def complete_lines(text: str) -> list[str]:
    """The lines that end: a driver may be killed while it writes one."""
    return text.split("\n")[:-1]


def reap(messages: Sequence[dict[str, Any]]) -> None:
    """End what these messages name: jobs, processes, then folders."""
    for command in values(messages, "run"):
        # Nobody is left to hear of an error.
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            subprocess.run(command, timeout=COMMAND_S, check=False)
    end([(message["pid"], message["started"]) for message in messages if "pid" in message])
    for cluster_id in values(messages, "cluster"):
        end_members(cluster_id)
    for folder in map(Path, values(messages, "sweep")):
        for path in folder.parent.glob(folder.name + "*"):
            shutil.rmtree(path, ignore_errors=True)


def end_members(cluster_id: str) -> None:
    for _ in range(LOOKS):
        if not end(members(cluster_id)):
            return
        time.sleep(LOOK_AGAIN_S)


def values(messages: Sequence[dict[str, Any]], key: str) -> list[Any]:
    return [message[key] for message in messages if key in message]


if __name__ == "__main__":
    main()
