"""Which hook a new one replaces, and which edits it is made beside."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from flexkernel.wire import HookSet, HookSpec

from .edits import where_text

__all__ = ["Placing", "placing"]


@dataclass(frozen=True)
class Placing:
    """What a new hook means beside those there are.

    spec: with a name of its own where it is an edit beside another. replaces: the hooks that go.
    beside: the edits of the same values that stay."""

    spec: HookSpec
    replaces: tuple[HookSpec, ...]
    beside: tuple[HookSpec, ...]

    def put(self, hook_set: HookSet) -> HookSet:
        """The hooks with the new one."""
        others = [hook.key for hook in self.replaces if hook.key != self.spec.key]
        return hook_set.put(self.spec).without(others)


def placing(spec: HookSpec, hooks: Sequence[HookSpec], replace: bool) -> Placing:
    """A hook replaces the one of its name. One without a name replaces the one of its values, but
    edits of the same values add up.

    The same edit of the same heads, neurons and positions is one edit: running a cell again, also
    with another value, makes it once. replace: no edit of the same values stays."""
    if spec.name:
        return Placing(spec, tuple(hook for hook in hooks if hook.key == spec.key), ())
    same = [hook for hook in hooks if values_of(hook) == values_of(spec) and is_ours(hook)]
    if spec.edit is None or replace:
        return Placing(spec, tuple(same), ())
    edits = [hook for hook in same if hook.edit is not None]
    replaced = [hook for hook in same if hook.edit is None]
    beside = []
    for hook in edits:
        if parts_of(hook) == parts_of(spec):
            spec = dataclasses.replace(spec, name=hook.name)
            replaced.append(hook)
        else:
            beside.append(hook)
    if any(hook.key == spec.key for hook in beside):
        spec = dataclasses.replace(spec, name=own_name(spec))
    return Placing(spec, tuple(replaced), tuple(beside))


def values_of(hook: HookSpec) -> tuple[str, str, str | None]:
    return hook.glob, hook.at, hook.index


def parts_of(hook: HookSpec) -> tuple[object, ...]:
    """What tells an edit from others of the same values."""
    return hook.edit, hook.heads, hook.neurons, hook.positions


def is_ours(hook: HookSpec) -> bool:
    """Whether the user gave it no name."""
    return hook.name in ("", own_name(dataclasses.replace(hook, name="")))


def own_name(hook: HookSpec) -> str:
    """The name of an edit beside another of the same values.

    >>> own_name(HookSpec("layers.3.@z", edit="zero", heads=(5,)))
    'layers.3.@z zero heads 5'
    """
    return " ".join(filter(None, [hook.key, hook.edit, where_text(hook)]))
