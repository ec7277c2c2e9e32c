"""An engine's process seen from outside: whether it runs, its memory, its log, how it ended."""

from __future__ import annotations

import contextlib
import re
import signal
import time
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil

__all__ = [
    "EngineProcess",
    "descendants",
    "exit_code",
    "is_running",
    "log_tail",
    "pid_is_running",
    "wait_until_ended",
]

LOG_LINES = 20
SAMPLE_S = 0.25  # between two looks at the memory
POLL_S = 0.05
KILLED_S = 10.0  # how long a killed process may take to end
THREAD_S = 5.0  # how long a very busy machine may take to note an exit code
# What a healthy engine writes.
ROUTINE = re.compile(r"\[(IPEngine|KernelNanny)\S*\] (?!(ERROR|CRITICAL))")
CRASH = "Fatal Python error"


class EngineProcess:
    """The process of one engine on this host.

    launcher: ipyparallel's object that started it, if this process or the cluster's file has it."""

    def __init__(self, pid: int, launcher: Any = None):
        self.pid = pid
        self.launcher = launcher
        self.rss = 0  # bytes, when last sampled
        self._process: psutil.Process | None = None
        with contextlib.suppress(psutil.Error):
            self._process = psutil.Process(pid)
        self._killed_before = out_of_memory_kills()
        self._sampled = 0.0
        self.sample()

    def sample(self) -> None:
        """Read how much memory it uses, at most four times a second."""
        if self._process is None or time.monotonic() < self._sampled + SAMPLE_S:
            return
        self._sampled = time.monotonic()
        with contextlib.suppress(psutil.Error):
            self.rss = self._process.memory_info().rss

    def is_stopped(self) -> bool:
        """Whether a signal has stopped it, so that it does nothing until it is continued."""
        with contextlib.suppress(psutil.Error):
            return self._process is not None and self._process.status() == psutil.STATUS_STOPPED
        return False

    def kill(self) -> None:
        """Kill it, whether it runs, hangs or is stopped, and wait for its end.

        Another process that has got its pid meanwhile is left alone."""
        if self._process is None:
            return
        with contextlib.suppress(psutil.NoSuchProcess):
            self._process.kill()
        thread = getattr(self.launcher, "_wait_thread", None)
        if thread is not None:
            thread.join(KILLED_S)  # it notes the exit code, which can be read once only
        else:
            wait_until_ended([self._process], KILLED_S)

    def end(self) -> str:
        """Its exit code or signal in words; "" if this process cannot know."""
        code = exit_code(self.launcher)
        if code is None:
            return ""
        if code >= 0:
            return f"exit code {code}"
        text = f"signal {-code} ({signal_name(-code)})"
        if code == -signal.SIGKILL:
            text += f", {self._why_killed()}: last RSS {self.rss / 1e9:.2f} GB"
        return text

    def _why_killed(self) -> str:
        if out_of_memory_kills() > self._killed_before:
            return "out of memory"
        return "probably out of memory if nobody killed it"

    def log(self) -> list[str]:
        """The last lines of its log without routine ones. After a crash: the first lines of the
        crash report, which name the place."""
        path = getattr(self.launcher, "output_file", "")
        if not path:
            return []
        lines = [line for line in log_tail(Path(path), 50 * LOG_LINES) if not ROUTINE.search(line)]
        crashes = [i for i, line in enumerate(lines) if line.startswith(CRASH)]
        if crashes:
            return lines[crashes[-1] :][:LOG_LINES]
        return lines[-LOG_LINES:]


def signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "unknown"


def exit_code(launcher: Any) -> int | None:
    """The exit code of a launcher's process, minus the number of the signal that ended it.

    None: it runs, or another process started it."""
    thread = getattr(launcher, "_wait_thread", None)
    process = getattr(launcher, "process", None)
    if thread is None or process is None:
        return None
    thread.join(THREAD_S)  # it waits for the process, and keeps the code
    if thread.is_alive():
        return None
    code = getattr(launcher, "code", None)
    if code is not None:  # the fork server has reported it
        return code
    with contextlib.suppress(psutil.Error):
        return process.wait(0)
    return None


def is_running(process: psutil.Process) -> bool:
    """Whether a process runs; a zombie does not.

    Where a container's init does not reap, the zombie of an orphan stays for ever."""
    with contextlib.suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def pid_is_running(pid: int) -> bool:
    """The same by pid."""
    with contextlib.suppress(psutil.Error):
        return is_running(psutil.Process(pid))
    return False


def wait_until_ended(processes: Iterable[psutil.Process], timeout_s: float) -> bool:
    """Wait for all of them to end. Whether they have."""
    end = time.monotonic() + timeout_s
    left = [process for process in processes if is_running(process)]
    while left and time.monotonic() < end:
        time.sleep(POLL_S)
        left = [process for process in left if is_running(process)]
    return not left


def descendants() -> list[psutil.Process]:
    """The processes that this process has started, and those that they have."""
    return psutil.Process().children(recursive=True)


def log_tail(path: Path, num_lines: int) -> list[str]:
    """The last lines of a text file; none if the file does not exist."""
    with contextlib.suppress(OSError), path.open(errors="replace") as file:
        return [line.rstrip("\n") for line in deque(file, num_lines)]
    return []


def out_of_memory_kills() -> int:
    """How many processes the system has killed for lack of memory since it started."""
    with contextlib.suppress(OSError), open("/proc/vmstat") as file:
        return sum(int(line.split()[1]) for line in file if line.startswith("oom_kill "))
    return 0
