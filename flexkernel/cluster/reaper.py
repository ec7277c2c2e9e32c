"""The reaper: ends a cluster whose driver has gone without ending it, however it went.

A process of its own beside the driver. It waits on a pipe, which names the cluster's processes and
how its jobs are ended: a last word means that all is well, its end without one that the driver was
killed; then those processes and jobs go, and the memory of their slabs. It knows the cluster's id
from before anything of it is begun: what bears that in its environment goes, too.
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

import psutil

from flexkernel.memory.heartbeat import start_time

from .forkserver import FORKED

__all__ = ["Reaper", "end"]

GRACE_S = 3.0
LEAVE = "leave"
SWEEP = "sweep\t"
RUN = "run\t"
CLUSTER = "cluster\t"
LATER_S, TIMES = 1.0, 5
COMMAND_S = 60.0  # how long a batch system may take to hear it


class Reaper:
    """Watches a cluster on the driver's behalf, until `leave()` or the driver's end."""

    def __init__(self, cluster_id: str):
        self._child = subprocess.Popen(
            [sys.executable, "-m", "flexkernel.cluster.reaper"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # a Ctrl-C in the driver's terminal is not for it
        )
        self._say(f"{CLUSTER}{cluster_id}")

    def watch(self, processes: Iterable[psutil.Process]) -> None:
        """Watch these too: the cluster has got new ones, whose environment may not say whose they
        are."""
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                self._say(f"{process.pid} {start_time(process.pid)!r}")

    def runs(self, commands: Iterable[Sequence[str]]) -> None:
        """Run these commands too: they end what a batch system has started."""
        for command in commands:
            self._say(f"{RUN}{json.dumps(command)}")

    def sweeps(self, folder: Path) -> None:
        """Remove that folder too."""
        self._say(f"{SWEEP}{folder}")

    def _say(self, word: str) -> None:
        assert self._child.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has gone already
            self._child.stdin.write(f"{word}\n".encode())
            self._child.stdin.flush()

    def leave(self) -> None:
        """The cluster has been ended, or is meant to stay."""
        if self._child.stdin is not None and not self._child.stdin.closed:
            self._say(LEAVE)
            with contextlib.suppress(BrokenPipeError):
                self._child.stdin.close()
            self._child.wait(GRACE_S)


def end(known: Iterable[tuple[int, float]], grace_s: float = GRACE_S) -> list[int]:
    """End these processes and their children, by force after grace_s; a pid that was given to
    another is left alone. Returns the pids that were still alive."""
    alive: dict[int, psutil.Process] = {}
    for pid, created in known:
        try:
            process = psutil.Process(pid)
            if abs(start_time(pid) - created) < 0.01:
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
    """This user's processes that were started for a cluster: pid, and when each began."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if bears(process, cluster_id) and process.status() != psutil.STATUS_ZOMBIE:
                found.append((process.pid, start_time(process.pid)))
    return found


def bears(process: psutil.Process, cluster_id: str) -> bool:
    """Whether it was started for that cluster: its environment says so, or of one that was forked
    its log."""
    if process.environ().get("IPP_CLUSTER_ID") == cluster_id:
        return True
    return process.name() == FORKED and any(
        f"-{cluster_id}-" in Path(file.path).name for file in process.open_files()
    )


def said(words: Iterable[str], kind: str) -> list[str]:
    """What follows the words of that kind."""
    return [word.removeprefix(kind) for word in words if word.startswith(kind)]


def main() -> None:
    words = sys.stdin.read().split("\n")
    if LEAVE in words:
        return
    for command in said(words, RUN):
        # nobody is left who could be told
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            subprocess.run(json.loads(command), timeout=COMMAND_S, check=False)
    known = [word.split() for word in words if "\t" not in word and word.count(" ") == 1]
    end([(int(pid), float(created)) for pid, created in known])
    for cluster_id in said(words, CLUSTER):
        for _ in range(TIMES):  # one that was just begun may bear the id a moment later
            if not end(members(cluster_id)):
                break
            time.sleep(LATER_S)
    for folder in map(Path, said(words, SWEEP)):
        for path in folder.parent.glob(folder.name + "*"):
            shutil.rmtree(path, ignore_errors=True)


if __name__ == "__main__":
    main()
