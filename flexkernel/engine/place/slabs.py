"""This rank's slabs: the mapped ones, its own files for values without a planned place, and those
on disk."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any

import psutil

from flexkernel.memory.server import Server
from flexkernel.memory.slab import (
    PAGE,
    Slab,
    claim_folder,
    on_disk,
    pages,
    remove_folder,
    write_out,
)
from flexkernel.wire import HookSpec, RankInfo, RunPlan, RunReport

__all__ = ["Memory", "StoredRun"]

StoredRun = tuple[RunPlan, tuple[HookSpec, ...], RunReport]


@dataclasses.dataclass(frozen=True)
class ClaimedFolder:
    """A folder of slabs. claim: an open file; while it is open nobody removes the folder as
    unclaimed."""

    path: Path
    claim: Any


class Memory:
    """This rank's slabs, and the runs whose captures lie in them."""

    def __init__(self) -> None:
        self.rank_info = RankInfo()
        self.slabs: dict[str, Slab] = {}
        self.runs: dict[int, StoredRun] = {}
        self._folder: ClaimedFolder | None = None  # this host's
        self._spill: ClaimedFolder | None = None  # on disk
        self._spill_root: Path | None = None
        self._server: Server | None = None
        self._token = ""

    # --- where slabs lie ------------------------------------------------------------

    @property
    def folder(self) -> Path:
        """This host's folder of slabs. Call it after claim()."""
        assert self._folder is not None
        return self._folder.path

    @property
    def spill_folder(self) -> Path | None:
        """The folder on disk to which captures move, or None."""
        return None if self._spill is None else self._spill.path

    def claim(self, name: str) -> Path:
        """Claim this host's folder of slabs, so that nobody removes it while this process lives.

        name: the same on all hosts. FLEX_HOST distinguishes hosts that share one machine."""
        host = os.environ.get("FLEX_HOST")
        self._folder = ClaimedFolder(*claim_folder(f"{name}-{host}" if host else name))
        return self.folder

    def free(self) -> tuple[int, int]:
        """(bytes free in the folder of slabs, bytes of memory available), on this host."""
        return shutil.disk_usage(self.folder).free, psutil.virtual_memory().available

    def path_of(self, name: str) -> Path:
        """The path of the slab of that name, in memory or on disk."""
        if not on_disk(name):
            return self.folder / name
        assert self.spill_folder is not None
        return self.spill_folder / name

    # --- slabs ----------------------------------------------------------------------

    def slab(self, name: str, num_bytes: int) -> Slab:
        """The slab of that name on this host. It is mapped once and then reused."""
        if name not in self.slabs:
            self.slabs[name] = Slab(self.path_of(name), num_bytes)
        return self.slabs[name]

    def slab_of_size(self, name: str, num_bytes: int) -> Slab:
        """A slab of at least that many bytes. Its size is part of its name."""
        size = power(num_bytes)
        return self.slab(f"{name}-{size}.slab", size)

    def extra(self, run: int, num_bytes: int) -> tuple[Slab, str]:
        """(slab, name) of a new file of this rank's own, for a value without a planned place."""
        prefix = self._extra_prefix(run)
        taken = [name for name in self.slabs if name.startswith(prefix)]
        name = f"{prefix}{len(taken)}.slab"
        return self.slab(name, max(pages(num_bytes), PAGE)), name

    def _extra_prefix(self, run: int) -> str:
        return f"extra-{self.rank_info.rank}-{run}-"

    # --- runs -----------------------------------------------------------------------

    def has(self, run: int, slab: str, base: int) -> bool:
        """Whether the run's captures still lie at that place. No other run writes there until this
        one is freed."""
        if run not in self.runs:
            return False
        plan = self.runs[run][0]
        return (plan.slab, plan.base) == (slab, base)

    def forget(self, runs: tuple[int, ...]) -> None:
        """Drop the runs that the driver has freed, and their own files."""
        for number in runs:
            self.runs.pop(number, None)
            prefix = self._extra_prefix(number)
            for name in [name for name in self.slabs if name.startswith(prefix)]:
                self.slabs.pop(name).path.unlink(missing_ok=True)
            if self.spill_folder is not None:
                self._drop_spilled(f"-{number}.slab")

    def drop_all(self) -> None:
        """Remove all runs and their files. Tensors that look into one stay valid."""
        self._drop_spilled()
        for slab in self.slabs.values():
            slab.path.unlink(missing_ok=True)
        self.slabs = {}
        self.runs = {}

    def close(self) -> None:
        """Stop serving and drop all runs. The first rank of each host also removes the host's
        folders."""
        if self._server is not None:
            self._server.close()
            self._server = None
        if self._folder is not None and self.rank_info.local_rank == 0:
            remove_folder(self.folder)
            if self.spill_folder is not None:
                remove_folder(self.spill_folder)
        self.slabs = {}
        self.runs = {}
        self._folder = None
        self._spill = None
        self._spill_root = None

    # --- on disk --------------------------------------------------------------------

    def spill_to(self, root: Path | None) -> tuple[Path | None, int]:
        """Claim a folder on disk below `root` and return (its root, bytes free in it).

        root=None only returns them, or (None, 0) if there is no folder. If the root changes, the
        files in the earlier folder are removed."""
        if root is not None and root != self._spill_root:
            claimed = ClaimedFolder(*claim_folder(self.folder.name, root))
            self._drop_spilled()
            self._spill_root = root
            self._spill = claimed
            if self._server is not None:
                self._server.also(claimed.path)
        if self.spill_folder is None:
            return None, 0
        return self._spill_root, shutil.disk_usage(self.spill_folder).free

    def spill(
        self, number: int, name: str, slab: str, slab_bytes: int, base: int, num_bytes: int
    ) -> None:
        """Move a run's captures from a slab to their own file on disk. The first rank of each host
        writes the file."""
        if self.rank_info.local_rank == 0:
            source = self.slab(slab, slab_bytes).bytes[base : base + num_bytes]
            write_out(source, self.path_of(name))
        if number in self.runs:  # an engine that replaced a dead one may not have the run
            plan, hooks, report = self.runs[number]
            plan = dataclasses.replace(plan, slab=name, slab_bytes=num_bytes, base=0)
            self.runs[number] = plan, hooks, report

    def _drop_spilled(self, ending: str = ".slab") -> None:
        """Remove the files on disk whose names end with `ending`."""
        for name in [n for n in self.slabs if on_disk(n) and n.endswith(ending)]:
            self.slabs.pop(name)
        if self.spill_folder is not None and self.rank_info.local_rank == 0:
            for path in self.spill_folder.glob(f"spill-*{ending}"):
                path.unlink(missing_ok=True)

    # --- for another host -----------------------------------------------------------

    def serve(self, token: str, interface: str) -> tuple[str, str]:
        """Serve this host's slabs to a driver on another host; returns (address, token).

        The first rank of each host calls it."""
        if self._server is None:
            self._server = Server(self.folder, token, interface)
            self._token = token
            if self.spill_folder is not None:
                self._server.also(self.spill_folder)
        return self._server.address, self._token


def power(num_bytes: int) -> int:
    """The next power of two. With few different sizes, few files are made."""
    return 1 << max(num_bytes - 1, 1).bit_length()
