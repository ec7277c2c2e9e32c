"""Pulse: what a rank is at, in a few bytes of shared memory that others read while it is busy,
hangs or has died."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import psutil

__all__ = ["Pulse", "born"]

NUM_BYTES = 32


class Pulse:
    """count: how many modules this rank has begun since its engine started; module: the last one's
    index in the model, -1 before any; running: whether it is in a forward. write: for the rank
    itself, which makes the file."""

    def __init__(self, folder: Path, rank: int, write: bool = False):
        flags = (os.O_RDWR | os.O_CREAT) if write else os.O_RDONLY
        fd = os.open(folder / f"pulse-{rank}", flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            if write:
                os.posix_fallocate(fd, 0, NUM_BYTES)
            prot = mmap.PROT_READ | (mmap.PROT_WRITE if write else 0)
            self._numbers = memoryview(mmap.mmap(fd, NUM_BYTES, prot=prot)).cast("q")
        finally:
            os.close(fd)
        if write:
            self._numbers[0], self._numbers[1], self._numbers[2] = 0, -1, 0

    def beat(self, module: int) -> None:
        self._numbers[1] = module
        self._numbers[0] += 1

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


def born(pid: int) -> float:
    """When a process began, in seconds after the host's boot: with its pid that says which process
    it was.

    Not by the clock, which can be set while it runs. psutil.NoSuchProcess: there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (FileNotFoundError, ProcessLookupError):
        return psutil.Process(pid).create_time()  # of a system without /proc, or raises
