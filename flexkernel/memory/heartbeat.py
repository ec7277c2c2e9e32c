"""A rank's heartbeat in shared memory: modules entered, the current one, whether it is running.

Other processes can read it while the rank is busy, hangs or has died."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
from collections.abc import Mapping
from pathlib import Path

import psutil

__all__ = ["Heartbeat", "start_time"]

NUM_BYTES = 32


class Heartbeat:
    """Three numbers in a small mapped file.

    count: how many modules this rank has entered since its engine started. module: the index of
    the last one in the model, -1 before any. running: whether the rank is in a forward. write:
    True only on the rank itself, which creates the file."""

    def __init__(self, folder: Path, rank: int, write: bool = False):
        self._names_path = folder / f"heartbeat-{rank}-names"
        flags = os.O_RDONLY
        prot = mmap.PROT_READ
        if write:
            flags = os.O_RDWR | os.O_CREAT
            prot |= mmap.PROT_WRITE
        fd = os.open(folder / f"heartbeat-{rank}", flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            if write:
                os.posix_fallocate(fd, 0, NUM_BYTES)
            self._numbers = memoryview(mmap.mmap(fd, NUM_BYTES, prot=prot)).cast("q")
        finally:
            os.close(fd)
        if write:
            self._numbers[0] = 0
            self._numbers[1] = -1
            self._numbers[2] = 0

    def beat(self, module: int) -> None:
        """The rank enters the module of that index."""
        self._numbers[1] = module
        self._numbers[0] += 1

    def name_modules(self, names: Mapping[int, str]) -> None:
        """Write the modules' names by index to a file beside the numbers.

        With it the driver can name the module of a rank that has died."""
        part = self._names_path.with_name(self._names_path.name + ".part")
        fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        with open(fd, "w") as file:
            json.dump(names, file)
        os.replace(part, self._names_path)

    @property
    def module_name(self) -> str:
        """The name of the last module entered; "" before any, or if the module has no name in the
        file."""
        with contextlib.suppress(OSError, ValueError):
            return json.loads(self._names_path.read_text()).get(str(self.module), "")
        return ""

    @property
    def count(self) -> int:
        return self._numbers[0]

    @property
    def module(self) -> int:
        return self._numbers[1]

    @property
    def running(self) -> bool:
        return bool(self._numbers[2])

    @running.setter
    def running(self, value: bool) -> None:
        self._numbers[2] = int(value)


def start_time(pid: int) -> float:
    """When a process started, in seconds after the host's boot.

    Together with its pid this identifies a process. It does not depend on the clock, which can be
    set meanwhile. psutil.NoSuchProcess: no process has this pid."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (FileNotFoundError, ProcessLookupError):
        return psutil.Process(pid).create_time()  # without /proc; raises if the process is gone
