"""What an engine is: this rank's one object. Each method is called by the driver by its name and
delegates.

Methods marked "all ranks" contain a collective: the driver calls them on every rank, or on none.
"""

from __future__ import annotations

import os
import pickle
import platform
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from flexkernel._version import __version__
from flexkernel.engine.place.slabs import drop_all, freeze_imports, let_go
from flexkernel.engine.ranks.breaker import Breaker
from flexkernel.engine.ranks.watch import Watch
from flexkernel.memory.heartbeat import Heartbeat
from flexkernel.memory.slab import Slab, claim_folder, remove_folder
from flexkernel.wire import (
    EditSpec,
    HookSet,
    HookSpec,
    Layout,
    ModelInfo,
    ModuleInfo,
    RankInfo,
    RunPlan,
    RunReport,
    Source,
)

__all__ = ["Runtime"]


class Runtime:
    """This rank: its seat, its part of the model, its hooks, the runs whose captures it wrote."""

    def __init__(self) -> None:
        self.seat = RankInfo()
        self.breaker = Breaker()
        self.watch = Watch(self.breaker)
        self.store: Any = None
        self.store_port = 0  # where it is one that listens
        self.model: torch.nn.Module | None = None
        self.caller: Any = None  # how it is called with a batch
        # by the unsharded model's names, shared ones under each
        self.named: dict[str, torch.nn.Module] = {}
        self.info: ModelInfo | None = None
        self.source: Source | None = None
        self.planner: Any = None
        self.hooks: Any = None
        self.copies: Any = None  # what makes those into the slabs
        self.hook_set = HookSet()
        self.device = "cpu"
        self.folder = ""  # the name that all hosts' run folders share
        self.run_folder: Path | None = None  # this host's
        self.claim: Any = None  # on it, or it is swept
        self.spill_root: Path | None = None  # where captures are moved to disk, if they are
        self.spill_folder: Path | None = None
        self.spill_claim: Any = None
        # what lies in the slabs
        self.runs: dict[int, tuple[RunPlan, tuple[HookSpec, ...], RunReport]] = {}
        self.slabs: dict[str, Slab] = {}
        self.edits: dict[str, tuple[EditSpec, Any]] = {}  # as they came, and as functions
        self.saved: dict[str, Any] = {}  # edit → what it keeps between runs
        self.modules: dict[str, torch.nn.Module] = {}  # trainable, beside the model
        # parameters edited for now: whose edit, what was there before
        self.changed: list[tuple[str, list]] = []
        self.module_codes: dict[str, bytes] = {}  # as they came
        self.optimizers: dict[str, Any] = {}  # and what they remember, by what they train
        self.groups: dict[str, Any] = {}
        self.made: list[Any] = []  # the groups that a builder made
        self.server: Any = None
        # called at each new token, by a driver in this process
        self.tick: Callable[[], None] | None = None

    @property
    def rank(self) -> int:
        return self.seat.rank

    # --- life -------------------------------------------------------------------------

    def hello(self) -> dict[str, Any]:
        """Who this engine is, and what it already holds: an attaching driver asks this first."""
        return {
            "version": __version__,
            "python": platform.python_version_tuple()[:2],
            "pid": os.getpid(),
            "host": os.environ.get("FLEX_HOST") or socket.gethostname(),
            "machine": socket.gethostname(),
            "seat": self.seat,
            "folder": self.folder,
            "device": self.device,
            "loaded": self.info is not None,
            "gpus": torch.cuda.device_count(),
        }

    def open_store(
        self, mine: bool, folder: str, generation: int, interface: str
    ) -> tuple[str, int] | None:
        """Begin a generation: a fresh rendezvous store, on the rank whose it is; and whatever
        takes long to import."""
        from flexkernel.engine.ranks.mesh import open_store

        freeze_imports(self)
        if mine:
            address, port, self._master = open_store(self._claimed(folder), generation, interface)
        return (address, port) if mine else None

    def _claimed(self, folder: str) -> Path:
        """This host's run folder of that name, which all hosts share."""
        host = os.environ.get("FLEX_HOST")
        self.run_folder, self.claim = claim_folder(folder + (f"-{host}" if host else ""))
        return self.run_folder

    def sit(
        self,
        seat: RankInfo,
        folder: str,
        device: str,
        builder: bytes | None = None,
        address: str = "",
        port: int = 0,
        timeout_s: float = 60,
    ) -> None:
        """Take a seat among the ranks, and join their groups. builder: see regroup. All ranks."""
        from flexkernel.engine.ranks.mesh import settle_in
        from flexkernel.engine.ranks.recover import regroup

        self.seat, self.device, self.folder = seat, device, folder
        settle_in(seat, device)
        self.watch.heartbeat = Heartbeat(self._claimed(folder), seat.rank, write=True)
        if seat.world > 1:
            regroup(self, seat, address, port, timeout_s, builder)
            self.breaker.watch_interrupts()

    def close(self) -> None:
        """Forget everything: the model, the groups, the slabs."""
        from flexkernel.engine.ranks.mesh import leave

        self.unload()
        if self.server is not None:
            self.server.close()
            self.server = None
        if self.seat.world > 1:
            leave()
        if self.run_folder is not None and self.seat.local_rank == 0:
            remove_folder(self.run_folder)
            if self.spill_folder is not None:
                remove_folder(self.spill_folder)
        self.spill_root = self.spill_folder = self.spill_claim = None
        self.slabs, self.runs, self.run_folder, self.claim = {}, {}, None, None

    def serve(self, token: str, interface: str) -> tuple[str, str]:
        """Serve this host's slabs to a driver on another host: (address, token). On a host's first
        engine."""
        from flexkernel.memory.channel import Server

        assert self.run_folder is not None
        if self.server is None:
            self.server, self.token = Server(self.run_folder, token, interface), token
            if self.spill_folder is not None:
                self.server.also(self.spill_folder)
        return self.server.address, self.token

    def call(self, function: bytes, *args: Any) -> Any:
        """Run a user's function on this rank."""
        return pickle.loads(function)(*args)

    # --- model ------------------------------------------------------------------------

    def inspect(
        self,
        source: Source,
        layout: Layout,
        dtype: str,
        attention: str | None,
        placements: dict[str, str],
    ) -> Any:
        """Everything that can be known before anything is loaded: refusals, and the scan. The
        answer is rank 0's."""
        from flexkernel.engine.model.load import inspect

        return inspect(source, layout, dtype, attention, placements) if self.rank == 0 else None

    def load(self, info: ModelInfo, source: Source) -> tuple[list[ModuleInfo], int, int]:
        """This rank's part of the model: (the modules it holds, its parameters, its bytes). All
        ranks."""
        from flexkernel.engine.model.load import local_bytes, local_parameters, part_of, take
        from flexkernel.engine.model.naming import modules_of

        from .compat import is_placeholder, made_groups
        from .model import attention

        self.unload()
        self.source = source
        self.model = part_of(self, info)
        take(self, source)
        attention.install()
        if self.seat.world > 1:
            self.made = made_groups()
            self.breaker.after_groups({self.store_port})
        held = [
            ModuleInfo(name, type(module).__name__, local_parameters(module))
            for name, module in modules_of(self.model, source.names).items()
            if not is_placeholder(module)
        ]
        return held, local_parameters(self.model), local_bytes(self.model)

    def adopt(self, info: ModelInfo) -> None:
        """The model as all ranks together know it: from here on there can be hooks. All ranks."""
        from flexkernel.engine.model.load import know
        from flexkernel.engine.ranks.gather import make_groups

        know(self, info)
        if self.seat.world > 1:
            self.groups = make_groups(info.layout, self.rank)
            self.breaker.after_groups({self.store_port})

    def unload(self) -> None:
        if self.hooks is not None:
            self.hooks.clear()
        self.named, self.changed, self.groups = {}, [], {}
        self.watch.know([], {})
        self.hook_set = HookSet()
        self.modules, self.module_codes, self.optimizers = {}, {}, {}
        drop_all(self)  # its runs were of this model
        let_go(self)

    # --- hooks ------------------------------------------------------------------------

    def define(self, spec: EditSpec) -> None:
        """Give an edit its name, or a new meaning."""
        self.edits[spec.name] = spec, pickle.loads(spec.code)

    def saved_by(self, name: str) -> dict[str, Any]:
        """What an edit has saved on this rank."""
        return self.saved.get(name, {})

    def set_hooks(self, hook_set: HookSet) -> None:
        """Make the hooks exactly these, in this order: edits on one module are made in it."""
        self.hooks.become(self.hook_set.hooks, hook_set.hooks, self.planner.names)
        self.hook_set = hook_set

    # --- runs -------------------------------------------------------------------------

    def run(self, plan: RunPlan) -> RunReport:
        """One forward. All ranks. Everything that can be refused is refused before it, on all
        ranks alike."""
        from flexkernel.engine.run.forward import run

        report = run(self, plan)
        self.runs[plan.run] = (
            plan,
            tuple(self.hook_set.active(plan.groups, plan.complement)),
            report,
        )
        return report
