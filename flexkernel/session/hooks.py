"""The driver's view of the hooks: what registering one returns, the table of all, and what groups
do to them."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from flexkernel.errors import HookError
from flexkernel.names import display_name, match, nearest
from flexkernel.views.table import Table
from flexkernel.wire import REDUCTIONS, HookSet, HookSpec, Reduction

__all__ = ["AT", "Hooked", "Hooks", "reduction", "regrouped", "spec_of"]

AT = ("output", "input", "grad_output", "grad_input", "param_grad")


@dataclasses.dataclass(frozen=True)
class Hooked:
    """A hook as registered: where it is, and which of its modules never fire in a forward."""

    spec: HookSpec
    modules: tuple[str, ...]
    silent: tuple[str, ...] = ()

    def __repr__(self) -> str:
        text = (
            f"Hook {self.spec.key!r} on {len(self.modules)} module{'s' * (len(self.modules) != 1)}"
        )
        text += f": {some(self.modules)}"
        if self.spec.groups:
            text += f"; groups {', '.join(self.spec.groups)}"
        if self.silent:
            text += f"; {len(self.silent)} of them never fire in a forward: {some(self.silent)}"
        return text


def spec_of(
    glob: str,
    at: str,
    index: str | int | None,
    groups: Sequence[str] | str,
    positions: Sequence[int] | int | None,
    name: str,
    edit: str | None = None,
    value: Any = None,
    heads: Sequence[int] | int | None = None,
    neurons: Sequence[int] | int | None = None,
    capture: str = "after",
    reduce: str | None = None,
) -> HookSpec:
    """A hook as a user asks for it; value is plain data already. HookError: what no model could
    have."""
    check_place(glob, at, name)
    if reduce == "last":
        if positions is not None:
            raise HookError(
                f"reduce='last' keeps the last position, and positions={positions!r} others: say one"
            )
        positions, reduce = -1, None
    spec = HookSpec(
        glob=glob,
        at=at,
        index=None if index is None else str(index),
        name=name,
        groups=(groups,) if isinstance(groups, str) else tuple(dict.fromkeys(groups)),
        positions=indices(positions, "positions"),
        edit=edit,
        value=value,
        heads=indices(heads, "heads"),
        neurons=indices(neurons, "neurons"),
        capture=capture,
        reduce=None if reduce is None else reduction(reduce),
    )
    check_parts(spec)
    return spec


def check_place(glob: Any, at: str, name: Any) -> None:
    """HookError: there is no such place in any model."""
    if not isinstance(glob, str) or not isinstance(name, str):
        raise HookError(
            f"a hook's glob and name are text; found {type(glob).__name__} and {type(name).__name__}"
        )
    if at not in AT:
        raise HookError(f"at={at!r} is not there; a hook is at {', '.join(AT[:-1])} or {AT[-1]}")
    if at not in ("output", "grad_output") and glob.rpartition(".")[2].startswith("@"):
        raise HookError(f"{glob!r} is a point inside attention, it has no {at}; hook its output")


def check_parts(spec: HookSpec) -> None:
    """HookError: no value there has the parts that are asked for, or every run has a hook of that
    name."""
    if spec.key == "logits":
        raise HookError(
            "the name 'logits' is taken: every run captures them; give the hook another name"
        )
    if spec.at != "param_grad":
        return
    if spec.edit == "mean" or spec.positions is not None or spec.heads is not None:
        raise HookError(
            "the gradient of a parameter has no rows, positions or heads: edit all of it, or its neurons"
        )
    if spec.reduce is not None:
        raise HookError("the gradient of a parameter is kept whole: reduce it when it is there")


def reduction(text: str) -> Reduction:
    """What a hook keeps instead of a value, as a user writes it. HookError.

    >>> reduction("norm:-1"), reduction("amax")
    (Reduction(op='norm', dims=(-1,)), Reduction(op='amax', dims=()))
    """
    op, colon, dims = str(text).partition(":")
    try:
        found = tuple(int(dim) for dim in dims.split(",")) if colon else ()
    except ValueError:
        found, op = (), ""
    if op not in REDUCTIONS:
        raise HookError(
            f"reduce={text!r} is not there; it is OP:DIMS, as norm:-1 or mean:0,1, OP alone for all dims, or last; "
            f"OP is one of {', '.join(REDUCTIONS)}"
        )
    return Reduction(op, found)


def indices(given: Sequence[int] | int | None, what: str) -> tuple[int, ...] | None:
    """Positions, heads or neurons as a hook has them; None is all."""
    if given is None:
        return None
    try:
        found = tuple(map(operator.index, given if isinstance(given, Iterable) else (given,)))
    except TypeError:
        found = ()
    if not found:
        raise HookError(f"{what}={given!r} are no {what}; they are whole numbers, -1 is the last")
    return found


def called(hook_set: HookSet, glob_or_name: str | None) -> list[str]:
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


def some(names: Sequence[str], limit: int = 3) -> str:
    """A few of the names, and how many more there are."""
    shown = [display_name(name) for name in names]
    return ", ".join(shown if len(shown) <= limit else [*shown[: limit - 1], "...", shown[-1]])


class Hooks:
    """The table of hooks. Iterates over HookSpecs."""

    def __init__(self, hook_set: HookSet, targets: Callable[[HookSpec], Sequence[str]]):
        self.specs, self.off = hook_set.hooks, hook_set.off
        self._targets = targets

    def __iter__(self):
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)

    def rows(self) -> list[tuple[str, ...]]:
        return [
            (
                spec.key,
                some(self._targets(spec)),
                str(len(self._targets(spec))),
                " ".join(filter(None, [indexed(spec), str(spec.reduce or "")])),
                ", ".join(g + (" (off)" if g in self.off else "") for g in spec.groups),
            )
            for spec in self.specs
        ]

    def __repr__(self) -> str:
        if not self.specs:
            return "no hooks"
        return self._table().text()

    def _repr_html_(self) -> str:
        if not self.specs:
            return "<p>no hooks</p>"
        return self._table().html()

    def _table(self) -> Table:
        return Table(self.rows(), ("hook", "modules", "n", "at", "groups"), right=(2,))


def indexed(spec: HookSpec) -> str:
    return spec.at + (f"[{spec.index}]" if spec.index is not None else "")


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


def _known(hook_set: HookSet, group: str) -> None:
    if group not in hook_set.groups:
        near = nearest(group, list(hook_set.groups)) or list(hook_set.groups)
        raise HookError(
            f"there is no group {group!r}" + (f"; there are {', '.join(near)}" if near else "")
        )


def _on(hook_set: HookSet, group: str, _glob: str | None) -> HookSet:
    _known(hook_set, group)
    return dataclasses.replace(hook_set, off=hook_set.off - {group})


def _off(hook_set: HookSet, group: str, _glob: str | None) -> HookSet:
    _known(hook_set, group)
    return dataclasses.replace(hook_set, off=hook_set.off | {group})


def _add(hook_set: HookSet, group: str, glob: str | None) -> HookSet:
    keys = _chosen(hook_set, glob)
    return _with_groups(
        hook_set, keys, lambda groups: groups if group in groups else (*groups, group)
    )


def _remove(hook_set: HookSet, group: str, glob: str | None) -> HookSet:
    """Take hooks out of the group; with no glob the group itself goes, and its hooks stay."""
    _known(hook_set, group)
    keys = hook_set.groups[group] if glob is None else _chosen(hook_set, glob)
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


def _chosen(hook_set: HookSet, glob: str | None) -> list[str]:
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
