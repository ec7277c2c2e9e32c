"""This rank's part of a loaded model, with everything made for it. A load replaces all of it at
once."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from flexkernel.engine.compat import own_modules, sum_gradients
from flexkernel.engine.place.placements import Placer
from flexkernel.engine.place.staging import copies_from
from flexkernel.errors import LoadError
from flexkernel.memory.plan import Planner
from flexkernel.names import split_point
from flexkernel.wire import HookSet, ModelInfo, Source

from .caller import Caller
from .hooks import LOGITS, ModuleHooks

__all__ = ["Part", "Pending", "RankModel", "Trainables", "modules_of", "renamed"]


class RankModel:
    """A model on this rank, with the caller and the module names that its source asks for.

    named: this rank's modules by the unsharded model's names, shared ones under each of theirs.
    made: the process groups that a builder made. LoadError: forward= or names= does not fit the
    model."""

    def __init__(self, model: torch.nn.Module, source: Source):
        sum_gradients(model)
        self.model = model
        self.caller = Caller(model, source.forward)
        self.named = modules_of(model, source.names, twice=True)
        self.made: list[Any] = []


@dataclass
class Pending:
    """A model that is not yet loaded on all ranks.

    mine: this rank's part, once it is there. info: known already only on a rank that replaces a
    dead one."""

    source: Source
    info: ModelInfo | None = None
    mine: RankModel | None = None


class Part:
    """This rank's part of the model that all ranks have loaded.

    hook_set: the registered hooks. groups: this rank's groups for exchanges. changed: parameters
    with a temporary edit, as (whose edit, what was there before)."""

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
        """A function (module or point, at) → whether this rank's stage reads that value."""
        stage = self.info.layout.coordinate(rank).pp
        modules = {module.name: module for module in self.info.modules}

        def reads(name: str, at: str) -> bool:
            owner = split_point(name)[0]
            return stage == modules[owner].read_on(at)

        return reads

    def set_hooks(self, hook_set: HookSet) -> None:
        """Register exactly these hooks, in this order. Edits of one module run in this order."""
        self.hooks.become(self.hook_set.hooks, hook_set.hooks, self.planner.names)
        self.hook_set = hook_set


@dataclass
class Trainables:
    """Modules that a user trains beside the model.

    codes: their code as it was sent. optimizers: by what they train, with their state."""

    modules: dict[str, torch.nn.Module] = field(default_factory=dict)
    codes: dict[str, bytes] = field(default_factory=dict)
    optimizers: dict[str, Any] = field(default_factory=dict)


# --- what its modules are called ------------------------------------------------------

Rename = Callable[[str], str | None]


def modules_of(
    model: torch.nn.Module, names: bytes | None = None, twice: bool = False
) -> dict[str, torch.nn.Module]:
    """This rank's modules by the unsharded model's names. Placeholders of other stages are
    included, wrappers are not.

    twice: put a module with several names under each of them, else only under the first. names:
    the user's mapping or function. A name that it gives replaces the same name of another module
    that keeps its own. The root stays "" unless another module is given that name. LoadError: two
    modules are given one name."""
    own = own_modules(model, twice)
    if names is None:
        return own
    rename = renamed(names)
    found = {"": own[""]}
    asked: dict[str, str] = {}
    for name, module in own.items():
        new = rename(name) if name else ""
        if new is None:
            continue  # a module that the unsharded model lacks
        if new != name:
            if new in asked:
                raise LoadError(f"names= calls both {asked[new]!r} and {name!r} {new!r}")
            asked[new] = name
        elif new in asked:
            continue
        found[new] = module
    return found


def renamed(names: bytes) -> Rename:
    """The user's names as a function of one module's name. A mapping replaces the longest prefix
    that matches.

    LoadError: it is neither a function nor such a mapping."""
    given = pickle.loads(names)
    if callable(given):
        return checked(given)
    if not isinstance(given, Mapping) or not all(
        isinstance(part, str) for pair in given.items() for part in pair
    ):
        raise LoadError(
            "names= is a function of a module's name, or a mapping of prefixes like "
            "{'stage.layers': 'model.layers'}, "
            f"not {type(given).__name__}"
        )

    def replaced(name: str) -> str:
        for prefix in sorted(given, key=len, reverse=True):
            if prefix == "" or name == prefix or name.startswith(f"{prefix}."):
                rest = name[len(prefix) :].removeprefix(".")
                return ".".join(filter(None, (given[prefix], rest)))
        return name

    return replaced


def checked(function: Callable[[str], str | None]) -> Rename:
    """The user's function, with a LoadError if it returns neither a name nor None."""

    def rename(name: str) -> str | None:
        new = function(name)
        if new is not None and not isinstance(new, str):
            raise LoadError(
                f"names= gave {new!r} for {name!r}; it gives a name, or None for what the model "
                "has not"
            )
        return new

    return rename
