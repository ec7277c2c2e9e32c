"""The reaper: ends a cluster whose driver has gone without ending it, however it went.

A process of its own beside the driver. It waits on a pipe: a last word means that all is well, its end without one
that the driver was killed; then the cluster's processes go, and the memory their slabs hold.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import psutil

__all__ = ["Reaper", "end"]

GRACE_S = 3.0


class Reaper:
    """Watches these processes on the driver's behalf, until `leave()` or the driver's end."""

    def __init__(self, processes: Iterable[psutil.Process], folder: Path):
        known = [(p.pid, p.create_time()) for p in processes]
        self._child = subprocess.Popen(
            [sys.executable, "-m", "flexkernel.reaper", json.dumps(known), str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # a Ctrl-C in the driver's terminal is not for it
        )

    def leave(self) -> None:
        """The cluster has been ended, or is meant to stay."""
        if self._child.stdin is not None and not self._child.stdin.closed:
            try:
                self._child.stdin.write(b"leave")
                self._child.stdin.close()
            except BrokenPipeError:  # it has gone already
                pass
            self._child.wait(GRACE_S)


def end(known: Iterable[tuple[int, float]], grace_s: float = GRACE_S) -> list[int]:
    """End these processes and their children, by force after grace_s; a pid that was given to another is left alone.
    Returns the pids that were still alive."""
    alive: dict[int, psutil.Process] = {}
    for pid, created in known:
        try:
            process = psutil.Process(pid)
            if abs(process.create_time() - created) < 0.01:
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


def main() -> None:
    known, folder = json.loads(sys.argv[1]), Path(sys.argv[2])
    if sys.stdin.buffer.read() != b"leave":
        end([(pid, created) for pid, created in known])
        for path in folder.parent.glob(folder.name + "*"):
            shutil.rmtree(path, ignore_errors=True)


if __name__ == "__main__":
    main()
