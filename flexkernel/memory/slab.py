"""A slab is a memory-mapped file that holds whole tensors. Also here: slab folders, and who claims
them."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import math
import mmap
import os
import stat
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np
import torch

from flexkernel.errors import CaptureError, CaptureExpired, MemoryBudgetError
from flexkernel.wire import Region

__all__ = [
    "PAGE",
    "SPILLED",
    "Slab",
    "claim_folder",
    "folder_path",
    "make_folder",
    "on_disk",
    "pages",
    "remove_folder",
    "size_of",
    "spill_root",
    "write_out",
]

PAGE = mmap.ALLOCATIONGRANULARITY
SPILLED = "spill-"  # names of slabs on disk start with it
CHUNK = 16 << 20  # bytes per write to disk
LOCK = ".lock"  # in each folder; every process that uses the folder holds a shared lock on it


def pages(num_bytes: int) -> int:
    """The bytes rounded up to whole pages."""
    return -(-num_bytes // PAGE) * PAGE


def size_of(shape: Sequence[int], dtype: str) -> int:
    """Bytes of a contiguous tensor."""
    return math.prod(shape) * getattr(torch, dtype).itemsize


def spill_root() -> Path:
    """The folder under which captures move to disk if the user names none: FLEX_SPILL, /var/tmp or
    the temporary folder."""
    return Path(
        os.environ.get("FLEX_SPILL")
        or ("/var/tmp" if os.path.isdir("/var/tmp") else tempfile.gettempdir())
    )


def on_disk(slab: str) -> bool:
    """Whether a slab of this name lies on disk."""
    return slab.startswith(SPILLED)


def folder_path(name: str, root: Path | None = None) -> Path:
    """The path of this user's slab folder of that name, which need not exist yet.

    It lies under `root`; by default under FLEX_SLABS, /dev/shm or /tmp. CaptureError: that is not
    a folder."""
    if root is None:
        root = Path(
            os.environ.get("FLEX_SLABS") or ("/dev/shm" if os.path.isdir("/dev/shm") else "/tmp")
        )
        if not root.is_dir():
            raise CaptureError(
                f"FLEX_SLABS={root} is not a folder; make it, or set FLEX_SLABS to one that is there"
            )
    if not root.is_dir():
        raise CaptureError(
            f"{root} is not a folder, no capture can be moved there: make it, or name another"
        )
    return root / f"flexkernel-{os.getuid()}" / name


def make_folder(name: str, root: Path | None = None) -> Path:
    """This user's private slab folder of that name, mode 0700. It is created if it does not exist.

    CaptureError: another user owns it, or others can open it."""
    found_at = folder_path(name, root)
    for path in (found_at.parent, found_at):
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
        found = path.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
            raise CaptureError(
                f"{path} is not a private folder of this user; remove it or set FLEX_SLABS"
            )
    return found_at


def claim_folder(name: str, root: Path | None = None) -> tuple[Path, IO[bytes]]:
    """(the folder of that name, an open file that claims it).

    The claim ends when the file is closed or the process ends, however that happens. Folders
    without a claim are removed here, because their slabs would hold memory for ever."""
    while True:
        path = make_folder(name, root)
        # another process removed it before we had the lock: try again
        with contextlib.suppress(FileNotFoundError):
            lock = open(
                os.open(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600),
                "rb",
            )
            fcntl.flock(lock, fcntl.LOCK_SH)
            if os.path.samestat(os.fstat(lock.fileno()), os.stat(path / LOCK)):
                sweep_unclaimed(path.parent)
                return path, lock
            lock.close()


def sweep_unclaimed(home: Path) -> None:
    """Remove the folders in `home` that no process claims."""
    for path in home.iterdir():
        with contextlib.suppress(OSError):  # another process claims, makes or removes it
            lock = os.open(path / LOCK, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                remove_folder(path)
            finally:
                os.close(lock)


def remove_folder(path: Path) -> None:
    """Remove a folder of slabs and what lies in it."""
    if path.is_dir():
        for file in path.iterdir():
            file.unlink(missing_ok=True)
        path.rmdir()


class _Bytes(np.ndarray):
    """An ndarray that supports weak references, to notice when the last tensor made from a mapping
    dies."""


class Slab:
    """One slab file, mapped into this process.

    The first process creates the file with mode 0600 and allocates all of it: a write past a full
    /dev/shm would kill the process. create=False refuses a missing file, so that a reader never
    sees zeros instead of data. populate: bring in all pages at once; None does so unless the slab
    lies on disk. CaptureExpired: the file is gone. MemoryBudgetError: it does not fit."""

    def __init__(
        self, path: Path, num_bytes: int, create: bool = True, populate: bool | None = None
    ):
        self.path, self.num_bytes = path, num_bytes
        fd = opened(path, os.O_RDWR | (os.O_CREAT if create else 0) | os.O_NOFOLLOW)
        try:
            allocate(fd, num_bytes, path)
            there = (
                getattr(mmap, "MAP_POPULATE", 0)
                if populate or (populate is None and not on_disk(path.name))
                else 0
            )
            self.map = mmap.mmap(fd, num_bytes, flags=mmap.MAP_SHARED | there)
        finally:
            os.close(fd)
        self.bytes = torch.from_numpy(np.frombuffer(self.map, dtype=np.uint8))

    def tensor(self, region: Region) -> torch.Tensor:
        """The region as a tensor of its shape and dtype on the CPU, in the memory that all
        processes share.

        A write to it is visible to all of them."""
        return shaped(self.bytes[region.offset :], region)

    def private(self, region: Region, freed) -> torch.Tensor:
        """The region as a tensor of its shape and dtype on the CPU, in a copy-on-write map of its
        own.

        freed() runs when the last tensor made from it dies; for an empty region at once.
        CaptureExpired: the file is gone."""
        num_bytes = size_of(region.shape, region.dtype)
        if num_bytes == 0:  # an empty region cannot be mapped, and cannot outlive the run
            freed()
            return torch.empty(region.shape, dtype=getattr(torch, region.dtype))
        try:
            fd = opened(self.path, os.O_RDONLY)
        except CaptureExpired:
            freed()
            raise
        try:
            start = region.offset // PAGE * PAGE
            inner = region.offset - start
            own = mmap.mmap(
                fd,
                inner + num_bytes,
                flags=mmap.MAP_PRIVATE,
                prot=mmap.PROT_READ | mmap.PROT_WRITE,
                offset=start,
            )
        finally:
            os.close(fd)
        array = np.frombuffer(own, dtype=np.uint8).view(_Bytes)
        weakref.finalize(array, freed).atexit = False
        return shaped(torch.from_numpy(array)[inner:], region)


def opened(path: Path, flags: int) -> int:
    """A file descriptor of the file, mode 0600 if it is created. CaptureExpired: it does not
    exist."""
    try:
        return os.open(path, flags | os.O_CLOEXEC, 0o600)
    except FileNotFoundError:
        raise CaptureExpired(
            f"{path} is gone: the engines have ended, or have loaded another model"
        ) from None


def write_out(source: torch.Tensor, path: Path) -> None:
    """Write bytes to a new file, mode 0600, piece by piece and without mapping it. On an error the
    file is removed.

    source: (n,) uint8 on the CPU. MemoryBudgetError: the disk is full."""
    fd = opened(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW)
    try:
        allocate(fd, source.numel(), path)
        data = memoryview(source.numpy())
        done = 0
        while done < len(data):
            done += os.pwrite(fd, data[done : done + CHUNK], done)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    finally:
        os.close(fd)


def shaped(raw: torch.Tensor, region: Region) -> torch.Tensor:
    """The region's tensor as a view of raw bytes. raw: (n,) uint8, n at least what the region
    needs -> region.shape."""
    return (
        raw[: size_of(region.shape, region.dtype)]
        .view(getattr(torch, region.dtype))
        .view(region.shape)
    )


def allocate(fd: int, num_bytes: int, path: Path) -> None:
    """Make the file at least that long, with memory or disk behind every page. MemoryBudgetError:
    there is none."""
    if os.fstat(fd).st_size >= num_bytes:
        return
    try:
        os.posix_fallocate(fd, 0, num_bytes)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.ENOMEM, errno.EFBIG):
            raise
        os.ftruncate(fd, 0)
        free = os.statvfs(path.parent)
        raise MemoryBudgetError(
            f"a slab of {num_bytes:,} bytes does not fit into {path.parent}, {free.f_bavail * free.f_frsize:,} are "
            "free there: free runs (session.runs), hook less, or set FLEX_SLABS to a larger folder"
        ) from None
