"""The hooks of a session: the book that keeps them and their edits, what hooking returns, the table
of all."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexkernel.cluster.interrupts import SignalMask
from flexkernel.cluster.packing import pack
from flexkernel.errors import EngineDied, HookError, LoadError
from flexkernel.views.table import Table
from flexkernel.wire import EditSpec, HookSet, HookSpec

from . import hookfile
from .edits import (
    PRESETS,
    Edit,
    Pins,
    defined,
    edit_text,
    made_text,
    value_of,
    value_text,
    where_text,
)
from .groups import check_groups, regrouped, selected
from .model import NONE_LOADED, Loaded
from .placing import placing
from .spec import check, spec_of
from .text import some

__all__ = ["Hook", "HookBook", "HookTable"]


@dataclass(frozen=True)
class Hook:
    """A hook as registered.

    modules: the names it is on; silent: which of these never fire in a forward. replaces: the hooks
    that it took the place of; beside: the other edits of the same values. late: a rank is dead, and
    gets the hook when it is back."""

    spec: HookSpec
    modules: tuple[str, ...]
    silent: tuple[str, ...] = ()
    replaces: tuple[HookSpec, ...] = ()
    beside: tuple[HookSpec, ...] = ()
    late: bool = False

    @property
    def key(self) -> str:
        """Its name, or what it is on: what session.unhook() takes."""
        return self.spec.key

    def __repr__(self) -> str:
        count = len(self.modules)
        parts = [
            f"Hook {self.spec.key!r} on {count} module{'s' * (count != 1)}: {some(self.modules)}"
        ]
        if self.spec.edit is not None:
            parts.append(edit_text(self.spec))
        elif self.spec.positions is not None:
            parts.append(where_text(self.spec))
        if self.spec.reduce is not None:
            parts.append(f"keeps {self.spec.reduce}")
        if self.spec.capture != "after":
            parts.append(f"captures {CAPTURED[self.spec.capture]}")
        if self.spec.groups:
            parts.append(f"groups {', '.join(self.spec.groups)}")
        if self.silent:
            silent = f"{len(self.silent)} of them never fire in a forward: {some(self.silent)}"
            parts.append(silent)
        changed = [hook for hook in self.replaces if hook != self.spec]
        if changed:
            parts.append(f"replaces {', '.join(map(hook_text, changed))}")
        if self.beside:
            texts = ", ".join(map(hook_text, self.beside))
            parts.append(f"together with {texts} (--replace or replace=True replaces that)")
        if self.late:
            parts.append("a rank is dead: it gets the hook when it is back")
        return "; ".join(parts)


# capture= → what of an edited value is captured
CAPTURED = {"before": "what was there before", "both": "before and after", "none": "nothing"}


def hook_text(spec: HookSpec) -> str:
    """What a hook does, in a few words."""
    return f"'{edit_text(spec)}'" if spec.edit is not None else "a capture"


class HookBook:
    """The hooks and edits of a session. Iterates over its hooks; draws itself as their table.

    call: calls a method on every engine. hook_set: the hooks and the groups that are off. edits:
    name → the user's edit. sent: every engine has these hooks.

    A change while a rank is dead is kept here; send() sends it once the rank is back."""

    def __init__(self, call: Callable[..., list[Any]]):
        self.hook_set = HookSet()
        self.edits: dict[str, EditSpec] = {}
        self.sent = True
        self._call = call
        self._loaded: Loaded | None = None
        self._pins = Pins()
        self._late: dict[str, EditSpec] = {}  # edits that some engine has not got
        self._words: dict[str, tuple[HookSpec, str]] = {}  # the edits of the last run, in words
        self._functions: dict[str, Edit] = {}  # of the edits that were defined by name

    # --- a model comes and goes -------------------------------------------------------

    def begin(self, loaded: Loaded) -> None:
        """Hook this model from here on; there are no hooks yet."""
        self.end()
        self._loaded = loaded

    def adopt(self, hook_set: HookSet, edits: dict[str, EditSpec]) -> None:
        """Take over what the engines have."""
        self.hook_set = hook_set
        self.edits = dict(edits)

    def end(self) -> None:
        """Forget the model and its hooks. The edits stay."""
        self._loaded = None
        self.hook_set = HookSet()
        self.sent = True
        self._pins.keep([])

    def _model(self) -> Loaded:
        if self._loaded is None:
            raise LoadError(NONE_LOADED)
        return self._loaded

    # --- hooks ------------------------------------------------------------------------

    def hook(
        self,
        glob: str,
        edit: str | Edit | None,
        value: Any,
        near: bool,
        replace: bool,
        options: dict[str, Any],
    ) -> Hook:
        """Register a hook; see placing(). options: of spec_of().

        near: every engine is on this host, where captures lie. HookError: the model has no place
        for it."""
        self._model()
        name, new = self._edit_of(edit, glob)
        spec = spec_of(glob, edit=name, value=value_of(value, near), **options)
        registered = self._checked(spec, self.edits if new is None else [*self.edits, new.name])
        if new is not None:
            self._define(new)
        place = placing(spec, self.hook_set.hooks, replace)
        self._pins.take(place.spec.key, value)
        self._become(place.put(self.hook_set))
        return dataclasses.replace(
            registered,
            spec=place.spec,
            replaces=place.replaces,
            beside=place.beside,
            late=not self.sent,
        )

    def put(self, specs: Sequence[HookSpec]) -> list[Hook]:
        """Register hooks that are made already, in one call to the engines."""
        hooks = [self._checked(spec, self.edits) for spec in specs]
        hook_set = self.hook_set
        for spec in specs:
            hook_set = hook_set.put(spec)
        self._become(hook_set)
        return hooks

    def check(self, spec: HookSpec) -> None:
        """HookError unless the loaded model has a place for this hook."""
        check(spec, self._model().planner, self.edits)

    def _checked(self, spec: HookSpec, edits: Collection[str]) -> Hook:
        loaded = self._model()
        names, firing = check(spec, loaded.planner, edits)
        silent = [name for name in names if name not in firing] if loaded.info.scan else []
        return Hook(spec, tuple(names), tuple(silent))

    def remove(self, glob_or_name: str | None = None) -> list[str]:
        """Remove hooks, by name or by the glob they were given; all if none is named. Returns
        their keys."""
        self._model()
        keys = selected(self.hook_set, glob_or_name)
        self._become(self.hook_set.without(keys))
        return keys

    @contextlib.contextmanager
    def restored(self, change: Callable[[], Any]) -> Iterator[Any]:
        """Make a change for the block. After it the hooks are what they were."""
        loaded = self._loaded
        before = self.hook_set
        try:
            yield change()
        finally:
            if self._loaded is loaded:  # else they went with their model
                self._become(before)

    def group(self, action: str, group: str = "", glob: str | None = None) -> dict[str, list[str]]:
        """ "on" or "off" switches a group; "add" or "remove" puts the hooks of a glob into it or
        takes them out; "list" changes nothing. Returns group → keys of its hooks."""
        self._model()
        self._become(regrouped(self.hook_set, action, group, glob))
        return self.hook_set.groups

    def active(self, groups: Sequence[str] | str = (), complement: bool = False) -> list[HookSpec]:
        """The hooks that a run of these groups fires. HookError: there is no such group."""
        names = (groups,) if isinstance(groups, str) else tuple(groups)
        check_groups(self.hook_set, names)
        return self.hook_set.active(names, complement)

    def active_edits(self, groups: Sequence[str] | str, complement: bool) -> tuple[str, ...]:
        """The edits that a run of these groups makes, in words."""
        edits = [hook for hook in self.active(groups, complement) if hook.edit is not None]
        before = self._words
        self._words = {}
        for hook in edits:
            known, text = before.get(hook.key, (None, ""))
            self._words[hook.key] = (hook, text if known is hook else made_text(hook))
        return tuple(text for _, text in self._words.values())

    # --- edits ------------------------------------------------------------------------

    def defining(self, name: str, per: str) -> Callable[[Edit], Edit]:
        """A decorator that defines an edit of that name."""

        def define(function: Edit) -> Edit:
            self._define(defined(name, per, function, pack))
            self._functions[name] = function
            return function

        return define

    def _edit_of(self, edit: str | Edit | None, glob: str) -> tuple[str | None, EditSpec | None]:
        """(the name of an edit, the EditSpec that has to be defined first: of a function that is
        new). HookError: it is neither a name nor a function."""
        if edit is None or isinstance(edit, str):
            return edit, None
        if not callable(edit):
            raise HookError(
                f"edit={edit!r} is not an edit: give a preset, the name of one of yours, or a "
                "function (x, ctx)"
            )
        for name, function in self._functions.items():
            if function is edit:
                return name, None
        code = pack(edit)
        for name in names_for(edit):
            users = [hook for hook in self.hook_set.hooks if hook.edit == name]
            same = name in self.edits and self.edits[name].code == code
            if same or (name not in self._functions and all(hook.glob == glob for hook in users)):
                break
        return name, defined(name, "whole", edit, pack)

    def _define(self, edit: EditSpec) -> None:
        try:
            self._call("define", edit)
        except EngineDied:
            self._late[edit.name] = edit
        self.edits[edit.name] = edit

    def saved(self, name: str) -> dict[str, Any]:
        """What the edit of that name has put into ctx.save, from the ranks where it ran."""
        by_rank = self._call("saved_by", name)
        return {key: value for saved in by_rank for key, value in saved.items()}

    # --- a file -----------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the hooks, their groups and which are off, and your edits to a JSON file.
        HookError: a hook patches in a capture, which no file can hold; nothing is written."""
        return hookfile.write(path, self.hook_set, self.edits)

    def load(self, path: str | os.PathLike[str]) -> HookBook:
        """Have the hooks that a file holds instead of these; its edits beside these.

        The file's edits are code that runs on your engines: load only files you trust. HookError:
        it is no such file, or the loaded model has no such module; nothing is changed."""
        planner = self._model().planner
        hook_set, new = hookfile.read(path, pack)
        for spec in hook_set.hooks:
            check(spec, planner, {**self.edits, **new})
        for edit in new.values():
            self._define(edit)
        self._become(hook_set)
        return self

    # --- the engines ------------------------------------------------------------------

    def _become(self, hook_set: HookSet) -> None:
        """Have these hooks here and on every engine."""
        if hook_set != self.hook_set:
            self.sent = False  # an interrupt may leave some engines with the old ones
            try:
                self._call("set_hooks", hook_set)
            except EngineDied:
                self.hook_set = hook_set
            else:
                with SignalMask():
                    self.hook_set = hook_set
                    self.sent = True
        self._pins.keep([hook.key for hook in self.hook_set.hooks])

    def send(self) -> None:
        """Send what some engine has not got, if there is anything."""
        for name, edit in list(self._late.items()):
            self._call("define", edit)
            del self._late[name]
        if not self.sent:
            self._call("set_hooks", self.hook_set)
            self.sent = True

    # --- the table --------------------------------------------------------------------

    def __iter__(self) -> Iterator[HookSpec]:
        return iter(self.hook_set.hooks)

    def __len__(self) -> int:
        return len(self.hook_set.hooks)

    def table(self) -> HookTable:
        """The hooks as a table."""
        loaded = self._loaded
        return HookTable(self.hook_set, loaded.planner.names if loaded else lambda _hook: ())

    def __repr__(self) -> str:
        return repr(self.table())

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


class HookTable:
    """The table of a set of hooks. names_of: hook → the names it is on."""

    HEAD = ("hook", "modules", "n", "at", "edit", "value", "on", "groups")

    def __init__(self, hook_set: HookSet, names_of: Callable[[HookSpec], Sequence[str]]):
        self._hook_set = hook_set
        self._names_of = names_of

    def rows(self) -> list[tuple[str, ...]]:
        return [self._row(spec) for spec in self._hook_set.hooks]

    def _row(self, spec: HookSpec) -> tuple[str, ...]:
        names = self._names_of(spec)
        place = spec.at if spec.index is None else f"{spec.at}[{spec.index}]"
        if spec.reduce is not None:
            place += f" {spec.reduce}"
        off = self._hook_set.off
        groups = [f"{group} (off)" if group in off else group for group in spec.groups]
        return (
            spec.key,
            some(names),
            str(len(names)),
            place,
            spec.edit or "",
            value_text(spec),
            where_text(spec),
            ", ".join(groups),
        )

    def _table(self) -> Table:
        return Table(self.rows(), self.HEAD, right=(2,))

    def __repr__(self) -> str:
        return self._table().text() if self._hook_set.hooks else "no hooks"

    def _repr_html_(self) -> str:
        return self._table().html() if self._hook_set.hooks else "<p>no hooks</p>"


def names_for(edit: Edit) -> Iterator[str]:
    """The names that a function passed as an edit can have: its own, then numbered ones."""
    name = getattr(edit, "__name__", type(edit).__name__).strip("<>")
    if name not in PRESETS:
        yield name
    for number in itertools.count(2):
        yield f"{name}_{number}"
