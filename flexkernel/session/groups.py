"""Groups of hooks: switched on and off, added to and taken from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from flexkernel.errors import HookError
from flexkernel.names import match, nearest
from flexkernel.wire import HookSet

__all__ = ["check_groups", "regrouped", "selected"]


def selected(hook_set: HookSet, glob_or_name: str | None) -> list[str]:
    """The keys of the hooks that a user names, by name or by the glob they were given; None names
    all."""
    keys = [h.key for h in hook_set.hooks if glob_or_name in (None, h.key, h.name, h.glob)]
    if not keys and glob_or_name is not None:
        there = [h.key for h in hook_set.hooks]
        raise HookError(
            f"no hook is called {glob_or_name!r}; there are {nearest(glob_or_name, there) or there}"
        )
    return keys


def check_groups(hook_set: HookSet, groups: Sequence[str]) -> None:
    unknown = [group for group in groups if group not in hook_set.groups]
    if unknown:
        raise HookError(
            f"no hook is in group {unknown[0]!r}; groups are {list(hook_set.groups) or 'none'}"
        )


def regrouped(hook_set: HookSet, action: str, group: str, glob: str | None) -> HookSet:
    """The hooks after a group operation. HookError: no such action, group or hook."""
    actions = {"on": _on, "off": _off, "add": _add, "remove": _remove}
    if action == "list":
        return hook_set
    if action not in actions:
        raise HookError(
            f"a group is switched on or off, added to, removed from or listed; not {action!r}"
        )
    if not group:
        raise HookError(
            f"which group? %flex_group {action} NAME; there are {list(hook_set.groups) or 'none'}"
        )
    return actions[action](hook_set, group, glob)


def _check_group(hook_set: HookSet, group: str) -> None:
    if group not in hook_set.groups:
        near = nearest(group, list(hook_set.groups)) or list(hook_set.groups)
        raise HookError(
            f"there is no group {group!r}" + (f"; there are {', '.join(near)}" if near else "")
        )


def _on(hook_set: HookSet, group: str, _glob: str | None) -> HookSet:
    _check_group(hook_set, group)
    return dataclasses.replace(hook_set, off=hook_set.off - {group})


def _off(hook_set: HookSet, group: str, _glob: str | None) -> HookSet:
    _check_group(hook_set, group)
    return dataclasses.replace(hook_set, off=hook_set.off | {group})


def _add(hook_set: HookSet, group: str, glob: str | None) -> HookSet:
    keys = _matching(hook_set, glob)
    return _with_groups(
        hook_set, keys, lambda groups: groups if group in groups else (*groups, group)
    )


def _remove(hook_set: HookSet, group: str, glob: str | None) -> HookSet:
    """Take hooks out of the group; with no glob the group itself goes, and its hooks stay."""
    _check_group(hook_set, group)
    keys = hook_set.groups[group] if glob is None else _matching(hook_set, glob)
    left = _with_groups(hook_set, keys, lambda groups: tuple(g for g in groups if g != group))
    return dataclasses.replace(left, off=left.off & set(left.groups))


def _with_groups(
    hook_set: HookSet, keys: Sequence[str], change: Callable[[tuple], tuple]
) -> HookSet:
    hooks = tuple(
        dataclasses.replace(h, groups=change(h.groups)) if h.key in keys else h
        for h in hook_set.hooks
    )
    return dataclasses.replace(hook_set, hooks=hooks)


def _matching(hook_set: HookSet, glob: str | None) -> list[str]:
    """The hooks that a name or glob means: by key, by name, by the glob they were given, or by
    matching it."""
    if glob is None:
        raise HookError("which hooks? give a hook's name or a glob")
    keys = [h.key for h in hook_set.hooks if glob in (h.key, h.name, h.glob) or match(glob, h.glob)]
    if not keys:
        there = [h.key for h in hook_set.hooks]
        raise HookError(
            f"no hook is meant by {glob!r}; there are {nearest(glob, there) or there or 'none'}"
        )
    return keys
