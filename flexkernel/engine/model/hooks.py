"""Torch hooks on this rank's modules, and the recorder that a run gives them.

A torch hook stays registered from `attach` to `detach`. While no run records, it returns at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from flexkernel.errors import HookError
from flexkernel.names import split_point
from flexkernel.wire import HookSpec

from . import attention
from .pytree import arguments, inputs

__all__ = ["LOGITS", "ModuleHooks", "Recorder", "Tap"]

LOGITS = HookSpec("", name="logits")  # every run keeps them
POINTS = "_flex_hooks"  # in a module's __dict__: virtual point → key → tap


@dataclass(frozen=True, slots=True)
class Tap:
    """A hook on one module or virtual point, with all that a call of it needs.

    at, before: the names of the captured value, and of the value before the hook's edit.
    keeps_after, keeps_before: which of the two are kept."""

    hook: HookSpec
    name: str
    key: str
    at: str
    before: str
    gradient: bool
    keeps_after: bool
    keeps_before: bool

    @classmethod
    def of(cls, hook: HookSpec, name: str) -> Tap:
        """The hook on the module or virtual point of that name."""
        before = hook.before
        kept = hook.kept_at
        return cls(
            hook, name, hook.key, hook.at, before, hook.gradient, hook.at in kept, before in kept
        )


class Recorder(Protocol):
    """What the hooks give their values to during a run."""

    active: frozenset[str]  # the keys of the run's hooks
    seconds: float  # how long recording took so far
    keeps_graph: bool  # whether this run computes gradients

    def record(self, tap: Tap, at: str, value: Any) -> None:
        """Keep a value. Never raises."""

    def record_failure(self, tap: Tap, at: str, error: Exception) -> None:
        """Note that a value could not be computed."""

    def watch(self, tap: Tap, value: Any) -> Any:
        """The same value, with its gradient recorded later; None if this run computes no
        gradients."""

    def edit(self, tap: Tap, value: Any) -> Any:
        """The value after the hook's edit."""


def in_order(hooks: Sequence[HookSpec]) -> list[HookSpec]:
    """The hooks in the order in which they fire. Hooks of gradients come first.

    A gradient is that of what the module itself puts out, before any edit."""
    return sorted(hooks, key=lambda hook: not hook.gradient)


class ModuleHooks:
    """The torch hooks of this rank.

    modules: this rank's, by name. reads(name, at): whether this rank's pipeline stage is the one
    that reads that value."""

    def __init__(self, modules: dict[str, torch.nn.Module], reads: Callable[[str, str], bool]):
        self.modules = modules
        self.reads = reads
        self.recording: Recorder | None = None
        self._handles: dict[str, list[Callable[[], None]]] = {}

    def attach(self, hook: HookSpec, names: tuple[str, ...]) -> list[str]:
        """Register a hook on those of these modules that this rank reads; returns their names.

        It replaces a hook of the same key."""
        self.detach(hook.key)
        if hook.of == "param":  # parameters are read after the backward, without a hook
            return list(names)
        read_here = [name for name in names if self.reads(name, hook.of)]
        self._handles[hook.key] = [self._register(hook, name) for name in read_here]
        return read_here

    def become(
        self,
        old: Sequence[HookSpec],
        new: Sequence[HookSpec],
        names: Callable[[HookSpec], tuple[str, ...]],
    ) -> None:
        """Replace the hooks `old` by `new`, each on the modules that names(hook) gives.

        The hooks with which both lists begin stay registered."""
        before = in_order(old)
        after = in_order(new)
        num_same = 0
        for one, other in zip(before, after, strict=False):
            if one != other:
                break
            num_same += 1
        for hook in before[num_same:]:
            self.detach(hook.key)
        for hook in after[num_same:]:
            self.attach(hook, names(hook))
        self.attach(LOGITS, ("",))  # last, because a run ends with the logits

    def detach(self, key: str) -> None:
        """Remove the hook of that key, if there is one."""
        for remove in self._handles.pop(key, ()):
            remove()

    def clear(self) -> None:
        """Remove all hooks."""
        for key in list(self._handles):
            self.detach(key)

    def _register(self, hook: HookSpec, name: str) -> Callable[[], None]:
        """Register the hook on one module or virtual point. Returns a function that removes it."""
        tap = Tap.of(hook, name)
        owner, point = split_point(name)
        if point:
            return self._register_at_point(tap, self.modules[owner], point)
        module = self.modules[name]
        if hook.of == "input":

            def before(
                _module: torch.nn.Module, args: tuple, kwargs: dict
            ) -> tuple[tuple, dict] | None:
                if self.recording is None:
                    return None
                new = self.fire(tap, inputs(args, kwargs))
                if new is None:
                    return None
                return arguments(new, len(args))

            return module.register_forward_pre_hook(before, with_kwargs=True).remove
        if hook.of == "output":

            def after(_module: torch.nn.Module, _args: tuple, out: Any) -> Any:
                return self.fire(tap, out)

            return module.register_forward_hook(after).remove
        raise HookError(f"there are no hooks at {hook.at!r}")

    def _register_at_point(
        self, tap: Tap, module: torch.nn.Module, point: str
    ) -> Callable[[], None]:
        """As _register(), on a virtual point. All hooks on one point share one function there."""
        taps: dict[str, Tap] = module.__dict__.setdefault(POINTS, {}).setdefault(point, {})
        taps[tap.key] = tap

        def fired(compute: Callable[[], torch.Tensor]) -> torch.Tensor | None:
            """compute: computes the point's value, if a run wants it."""
            edited = None
            for each in taps.values():
                if edited is None:
                    edited = self._fire_at_point(each, compute)
                    continue
                new = self.fire(each, edited)
                if new is not None:
                    edited = new
            return edited

        attention.tap(module, point, fired)

        def remove() -> None:
            taps.pop(tap.key, None)
            if not taps:
                attention.untap(module, point)

        return remove

    def _fire_at_point(self, tap: Tap, compute: Callable[[], torch.Tensor]) -> Any:
        """As fire(), for a virtual point. If its value cannot be computed, only this read fails.

        compute: returns the point's value, of the shape that attention.py says."""
        recording = self.recording
        if recording is None or tap.key not in recording.active:
            return None
        if tap.gradient and not recording.keeps_graph:
            return None
        if tap.gradient or tap.hook.edit is not None:
            return self.fire(tap, compute())
        start = time.perf_counter()
        try:
            value = compute()
        except Exception as error:
            recording.record_failure(tap, tap.at, error)
            return None
        recording.seconds += time.perf_counter() - start
        return self.fire(tap, value)

    def fire(self, tap: Tap, value: Any) -> Any:
        """What replaces the value; None leaves it unchanged."""
        recording = self.recording
        if recording is None or tap.key not in recording.active:
            return None
        if tap.gradient:
            return recording.watch(tap, value)
        if tap.hook.edit is None:
            recording.record(tap, tap.at, value)
            return None
        if tap.keeps_before:
            recording.record(tap, tap.before, value)
        new = recording.edit(tap, value)
        if tap.keeps_after:
            recording.record(tap, tap.at, new)
        return new
