"""Torch hooks on this rank's modules, and the recorder that a run gives them.

A torch hook stays registered from `attach` to `detach`; while no run records it returns at once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from flexkernel.errors import HookError
from flexkernel.names import split_point
from flexkernel.wire import HookSpec

from . import attention
from .pytree import arguments, inputs

__all__ = ["LOGITS", "ModuleHooks", "Recorder"]

LOGITS = HookSpec("", name="logits")  # every run keeps them


class Recorder(Protocol):
    """What the hooks give their values to while a run lasts."""

    active: frozenset[str]  # the keys of the run's hooks

    def record(self, hook: HookSpec, name: str, value: Callable[[], Any], at: str = "") -> None:
        """Keep the value of module `name`. Never raises."""

    def watch(self, hook: HookSpec, name: str, value: Callable[[], Any]) -> Any:
        """The same value, whose gradient is kept; None if this run has no gradients."""

    def edit(self, hook: HookSpec, name: str, value: Any) -> Any:
        """The value as the hook's edit makes it."""


def same(value: Any) -> Any:
    return value


class ModuleHooks:
    """The torch hooks of this rank. `reads(name, at)`: whether this rank is the stage that reads
    that module."""

    def __init__(self, modules: dict[str, torch.nn.Module], reads: Callable[[str, str], bool]):
        self.modules = modules
        self.reads = reads
        self.recording: Recorder | None = None
        self._handles: dict[str, list[Callable[[], None]]] = {}

    def attach(self, hook: HookSpec, names: tuple[str, ...]) -> list[str]:
        """Register on every one of these modules that this rank reads; returns them. Replaces a
        hook of that key."""
        self.detach(hook.key)
        if hook.of == "param":  # read after the backward, where they lie
            return list(names)
        mine = [name for name in names if self.reads(name, hook.of)]
        self._handles[hook.key] = [self._register(hook, name) for name in mine]
        return mine

    def become(
        self,
        old: Sequence[HookSpec],
        new: Sequence[HookSpec],
        names: Callable[[HookSpec], tuple[str, ...]],
    ) -> None:
        """From these hooks to those, each on the modules that it names; what both begin with
        stays. Gradients first: they are of what a module itself put out. The logits last: they are
        what a run ends with."""
        old, new = (sorted(hooks, key=lambda hook: not hook.gradient) for hooks in (old, new))
        same = next(
            (i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b),
            min(len(old), len(new)),
        )
        for hook in old[same:]:
            self.detach(hook.key)
        for hook in new[same:]:
            self.attach(hook, names(hook))
        self.attach(LOGITS, ("",))

    def detach(self, key: str) -> None:
        for remove in self._handles.pop(key, ()):
            remove()

    def clear(self) -> None:
        for key in list(self._handles):
            self.detach(key)

    def _register(self, hook: HookSpec, name: str) -> Callable[[], None]:
        owner, point = split_point(name)
        if point:
            return self._tap(hook, name, self.modules[owner], point)
        module = self.modules[name]
        if hook.of == "input":

            def before(
                _module: torch.nn.Module, args: tuple, kwargs: dict
            ) -> tuple[tuple, dict] | None:
                new = self.fire(hook, name, lambda: inputs(args, kwargs))
                return None if new is None else arguments(new, len(args))

            return module.register_forward_pre_hook(before, with_kwargs=True).remove
        if hook.of == "output":

            def after(_module: torch.nn.Module, _args: tuple, _kwargs: dict, out: Any) -> Any:
                return self.fire(hook, name, lambda: out)

            return module.register_forward_hook(after, with_kwargs=True).remove
        raise HookError(f"there are no hooks at {hook.at!r}")

    def _tap(
        self, hook: HookSpec, name: str, module: torch.nn.Module, point: str
    ) -> Callable[[], None]:
        """A virtual point has one tap, which all hooks on it share."""
        hooks = module.__dict__.setdefault("_flex_hooks", {}).setdefault(point, {})
        hooks[hook.key] = hook

        def fired(value: Callable[[], torch.Tensor]) -> torch.Tensor | None:
            new = None
            for each in hooks.values():
                edited = self.fire(
                    each, name, value if new is None else functools.partial(same, new)
                )
                new = new if edited is None else edited
            return new

        attention.tap(module, point, fired)

        def remove() -> None:
            hooks.pop(hook.key, None)
            if not hooks:
                attention.untap(module, point)

        return remove

    def fire(self, hook: HookSpec, name: str, value: Callable[[], Any]) -> Any:
        """What takes the value's place; None leaves it as it is, bit for bit."""
        if self.recording is None or hook.key not in self.recording.active:
            return None
        if hook.gradient:
            return self.recording.watch(hook, name, value)
        if hook.edit is None:
            self.recording.record(hook, name, value)
            return None
        if hook.before in hook.kept_at:
            self.recording.record(hook, name, value, hook.before)
        new = self.recording.edit(hook, name, value())
        if hook.at in hook.kept_at:
            self.recording.record(hook, name, lambda: new)
        return new
