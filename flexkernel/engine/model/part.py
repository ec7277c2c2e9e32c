"""This rank's part of a loaded model, with everything that is made for it. A load replaces it as
one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from flexkernel.engine.compat import sum_gradients
from flexkernel.engine.place.placements import Placer
from flexkernel.engine.place.staging import copies_from
from flexkernel.memory.plan import Planner
from flexkernel.names import split_point
from flexkernel.wire import HookSet, ModelInfo, Source

from .caller import Caller
from .hooks import LOGITS, ModuleHooks
from .naming import modules_of

__all__ = ["Part", "Pending", "RankModel", "Trainables"]


class RankModel:
    """A model on this rank, called and named as its source says.

    named: this rank's modules by the unsharded model's names, shared ones under each. made: the
    process groups that a builder made. LoadError: forward= or names= does not fit the model."""

    def __init__(self, model: torch.nn.Module, source: Source):
        sum_gradients(model)
        self.model = model
        self.caller = Caller(model, source.forward)
        self.named = modules_of(model, source.names, twice=True)
        self.made: list[Any] = []


@dataclass
class Pending:
    """A model that not all ranks have. mine: this rank's share, once it is there. info: only a
    rank that takes a dead one's place knows it before."""

    source: Source
    info: ModelInfo | None = None
    mine: RankModel | None = None


class Part:
    """This rank's part of the model that all ranks have.

    hook_set: the hooks that are registered. groups: this rank's groups for exchanges. changed:
    parameters edited for now, as (whose edit, what was there before)."""

    def __init__(self, mine: RankModel, source: Source, info: ModelInfo, rank: int, device: str):
        self.source = source
        self.info = info
        self.model = mine.model
        self.caller = mine.caller
        self.named = mine.named
        self.made = mine.made
        self.planner = Planner(info)
        self.placer = Placer(info.layout, info.styles, info.placements, self.named)
        self.copies = copies_from(device)
        self.hooks = ModuleHooks(self.named, self._reads_on(rank))
        self.hooks.attach(LOGITS, ("",))
        self.hook_set = HookSet()
        self.groups: dict[str, dist.ProcessGroup | None] = {}
        self.changed: list[tuple[str, list]] = []

    def _reads_on(self, rank: int) -> Any:
        stage = self.info.layout.coordinate(rank).pp
        modules = {module.name: module for module in self.info.modules}

        def reads(name: str, at: str) -> bool:
            owner = split_point(name)[0]
            return stage == modules[owner].read_on(at)

        return reads

    def set_hooks(self, hook_set: HookSet) -> None:
        """Make the hooks exactly these, in this order: edits on one module are made in it."""
        self.hooks.become(self.hook_set.hooks, hook_set.hooks, self.planner.names)
        self.hook_set = hook_set


@dataclass
class Trainables:
    """Modules that a user trains beside the model. codes: as they came. optimizers: with what they
    remember, by what they train."""

    modules: dict[str, torch.nn.Module] = field(default_factory=dict)
    codes: dict[str, bytes] = field(default_factory=dict)
    optimizers: dict[str, Any] = field(default_factory=dict)
