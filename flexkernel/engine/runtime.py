"""What an engine is: this rank's one object. It outlives the drivers that talk to it."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from flexkernel.errors import EngineError, LoadError
from flexkernel.wire import EditSpec, ModelInfo, RankInfo, Source

from .compat import forget_meshes
from .model.part import Part, Pending, Trainables
from .place.slabs import Memory
from .ranks.breaker import Breaker
from .ranks.mesh import set_device
from .ranks.watch import Watch

__all__ = ["Runtime"]


class Runtime:
    """This rank: who it is, its part of the model, its memory, and what ends a run that is stuck.

    store_port: where the rendezvous store listens, 0 for one that is a file. edits: as they came,
    and as functions. saved: edit → what it keeps between runs. tick: called at each new token, by a
    driver in this process."""

    def __init__(self) -> None:
        self.rank_info = RankInfo()
        self.device = "cpu"
        self.folder = ""  # the name that all hosts' run folders share
        self.store: dist.Store | None = None
        self.store_port = 0
        self.hosted_store: dist.Store | None = None  # which other ranks come to
        self.breaker = Breaker()
        self.watch = Watch(self.breaker)
        self.memory = Memory()
        self.loaded: Part | None = None
        self.pending: Pending | None = None
        self.trainables = Trainables()
        self.edits: dict[str, tuple[EditSpec, Callable[..., Any]]] = {}
        self.saved: dict[str, dict[str, Any]] = {}
        self.tick: Callable[[], None] | None = None

    @property
    def rank(self) -> int:
        return self.rank_info.rank

    @property
    def world(self) -> int:
        return self.rank_info.world

    @property
    def part(self) -> Part:
        """This rank's part of the loaded model. EngineError: none is loaded."""
        if self.loaded is None:
            raise EngineError("no model is loaded on this rank", self.rank)
        return self.loaded

    @property
    def model(self) -> torch.nn.Module | None:
        """This rank's model, also where the other ranks have not got theirs yet."""
        if self.loaded is not None:
            return self.loaded.model
        if self.pending is not None and self.pending.mine is not None:
            return self.pending.mine.model
        return None

    @property
    def info(self) -> ModelInfo | None:
        """What is known of the model, also on a rank that has yet to build its part."""
        if self.loaded is not None:
            return self.loaded.info
        return None if self.pending is None else self.pending.info

    @property
    def source(self) -> Source | None:
        """Where the model comes from, also while it is being loaded."""
        if self.loaded is not None:
            return self.loaded.source
        return None if self.pending is None else self.pending.source

    def init_rank(self, rank_info: RankInfo, device: str) -> None:
        """Become this rank, on its own device. LoadError: there is no GPU for it."""
        self.rank_info = rank_info
        self.memory.rank_info = rank_info
        self.device = device
        set_device(rank_info, device)

    def adopt(self, info: ModelInfo) -> Part:
        """Make the pending model this rank's part of the one that all ranks have."""
        pending = self.pending
        if pending is None or pending.mine is None:
            raise LoadError(f"rank {self.rank} has no model")
        self.loaded = Part(pending.mine, pending.source, info, self.rank, self.device)
        self.pending = None
        self.watch.follow([module.name for module in info.modules], self.loaded.named)
        return self.loaded

    def unload(self) -> None:
        """Forget the model, and one that was to be loaded, so that its memory is free; and all
        that was made of it: hooks, runs, trainable modules."""
        forgets = self.loaded is not None or self.pending is not None
        if self.loaded is not None:
            self.loaded.hooks.clear()
        self.watch.follow([], {})
        self.trainables = Trainables()
        if self.loaded is not None:
            self.loaded.copies.close()  # lets go of the slabs before they are unmapped
        self.memory.drop_all()
        if forgets:
            forget_meshes()
            self.loaded = None
            self.pending = None
            gc.collect()  # a sharded model is full of cycles: it would lie beside the next one
            torch.cuda.empty_cache()  # nothing where there is no GPU
