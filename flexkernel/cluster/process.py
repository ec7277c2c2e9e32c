"""EngineProcess: what can be known of an engine's process from outside: how it ended, its memory, its
log, where it was."""

from __future__ import annotations

import contextlib
import re
import signal
import time
from collections import deque
from pathlib import Path
from typing import Any

import psutil

__all__ = ["EngineProcess", "exit_code", "log_tail"]

LOG_LINES = 20
# what an engine writes in good health
ROUTINE = re.compile(r"\[(IPEngine|KernelNanny)\S*\] (?!(ERROR|CRITICAL))")


class EngineProcess:
    """Of one engine on this host. launcher: what started it, where this process or the cluster's
    file knows it."""

    def __init__(self, pid: int, launcher: Any = None):
        self.pid = pid
        self.launcher = launcher
        self.rss = 0  # bytes, when last seen
        self._process: psutil.Process | None = None
        with contextlib.suppress(psutil.Error):
            self._process = psutil.Process(pid)
        self._killed_before = out_of_memory_kills()
        self._sampled = 0.0
        self.sample()

    def sample(self) -> None:
        """Note how much memory it has; often enough is four times a second."""
        if self._process is not None and time.monotonic() > self._sampled + 0.25:
            self._sampled = time.monotonic()
            with contextlib.suppress(psutil.Error):
                self.rss = self._process.memory_info().rss

    def stopped(self) -> bool:
        """Whether it was halted by a signal and can do nothing until it gets another."""
        with contextlib.suppress(psutil.Error):
            return self._process is not None and self._process.status() == psutil.STATUS_STOPPED
        return False

    def kill(self) -> None:
        """End it by force; whether it hangs, is stopped, or has gone. A pid that was given to
        another is left alone."""
        if self._process is not None:
            with contextlib.suppress(psutil.NoSuchProcess):
                self._process.kill()
                # the one who is told how it ended: told once
                waits = getattr(self.launcher, "_wait_thread", None)
                waits.join(10) if waits is not None else self._process.wait(10)

    def end(self) -> str:
        """How it ended: its exit code or signal, in words; "" where nobody here can know."""
        code = exit_code(self.launcher)
        if code is None:
            return ""
        if code >= 0:
            return f"exit code {code}"
        name = signal.Signals(-code).name if -code in set(signal.Signals) else "unknown"
        said = f"signal {-code} ({name})"
        if code == -signal.SIGKILL:
            sure = out_of_memory_kills() > self._killed_before
            why = "out of memory" if sure else "probably out of memory if nobody killed it"
            said += f", {why}: last RSS {self.rss / 1e9:.2f} GB"
        return said

    def log(self) -> list[str]:
        """The last lines that it wrote; of a crash the first lines of what it says, which name the
        place."""
        path = getattr(self.launcher, "output_file", "")
        lines = (
            [line for line in log_tail(Path(path), 50 * LOG_LINES) if not ROUTINE.search(line)]
            if path
            else []
        )
        crashes = [i for i, line in enumerate(lines) if line.startswith("Fatal Python error")]
        return lines[crashes[-1] :][:LOG_LINES] if crashes else lines[-LOG_LINES:]


def exit_code(launcher: Any) -> int | None:
    """What its process ended with: minus a signal's number, as Python has it. None: it is nobody's
    child here."""
    thread, process = getattr(launcher, "_wait_thread", None), getattr(launcher, "process", None)
    if thread is None or process is None:
        return None
    # it waits for the process, and keeps the code: at once, but on a machine that is very busy
    thread.join(5.0)
    if thread.is_alive():
        return None
    if getattr(launcher, "code", None) is not None:  # whose child it was has told
        return launcher.code
    with contextlib.suppress(psutil.Error):
        return process.wait(0)
    return None


def log_tail(path: Path, num_lines: int) -> list[str]:
    """The last lines of a text file; none if it is not there."""
    with contextlib.suppress(OSError), path.open(errors="replace") as file:
        return [line.rstrip("\n") for line in deque(file, num_lines)]
    return []


def out_of_memory_kills() -> int:
    """How many processes the system has killed for want of memory, as far as it says."""
    with contextlib.suppress(OSError), open("/proc/vmstat") as file:
        return sum(int(line.split()[1]) for line in file if line.startswith("oom_kill "))
    return 0
