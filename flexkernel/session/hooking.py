"""The half of a session that says what is done with activations: its hooks, their groups, and
edits."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from flexkernel.cluster.cluster import Cluster
from flexkernel.cluster.interrupts import SignalMask
from flexkernel.cluster.packing import pack
from flexkernel.errors import LoadError
from flexkernel.memory.plan import Planner, check_index
from flexkernel.wire import EditSpec, HookSet, HookSpec, ModelInfo

from . import edits, hookfile
from .hooks import Hooked, Hooks, called, regrouped, spec_of
from .run import Store

__all__ = ["Hooking"]


class Hooking:
    """Keeps the engines' hooks and edits as the user asks for them."""

    cluster: Cluster
    info: ModelInfo | None
    planner: Planner
    store: Store | None

    def __init__(self) -> None:
        self.hook_set = HookSet()
        self._hooks_sent = True  # and every engine has these
        self.edits: dict[str, EditSpec] = {}
        self._held = edits.Held()

    def _loaded(self) -> ModelInfo:
        if self.info is None:
            raise LoadError(
                "no model is loaded: session.load(path, tp=, pp=, dp=, fsdp=), or %flex_load PATH"
            )
        if not self._hooks_sent:
            self.cluster.call("set_hooks", self.hook_set)
            self._hooks_sent = True
        return self.info

    @property
    def hooks(self) -> Hooks:
        """The hooks there are, as a table."""
        return Hooks(self.hook_set, self.planner.names if self.info else lambda _hook: ())

    def edit(self, name: str, per: str = "whole") -> Callable[[Callable], Callable]:
        """A decorator: `@session.edit("name")` defines an edit, a function (x, ctx) that returns a
        tensor like x.

        per: "whole" sees the whole activation and runs once, "row" each group's rows of the batch
        by themselves, "element" the shards where they lie. ctx.module, .tokens, .mask, .positions;
        .save, a dict that lives on."""

        def define(function: Callable) -> Callable:
            spec = edits.defined(name, per, function, pack)
            self.cluster.call("define", spec)
            self.edits[name] = spec
            return function

        return define

    def saved(self, name: str) -> dict[str, Any]:
        """What the edit of that name has put into ctx.save, from the ranks where it ran."""
        return {
            key: value
            for found in self.cluster.call("saved_by", name)
            for key, value in found.items()
        }

    def hook(
        self,
        glob: str,
        at: str = "output",
        index: str | int | None = None,
        edit: str | None = None,
        groups: Sequence[str] | str = (),
        capture: str = "after",
        positions: Sequence[int] | int | None = None,
        name: str = "",
        value: Any = None,
        heads: Sequence[int] | int | None = None,
        neurons: Sequence[int] | int | None = None,
        reduce: str | None = None,
    ) -> Hooked:
        """Capture what the modules of this glob put out (at="output") or take in ("input") in
        every run from here on.

        at="grad_output", "grad_input": the gradient of that value, in runs with a loss: of what
        the module itself put out, before its edits. at="param_grad": of the parameters that the
        glob names. Reads change no other number, but for "grad_input": it adds up a value's uses
        in another order, as torch's own full backward hooks do.

        index: path of a tensor in the value ("0", "logits", "0.1"); by default its first.
        positions: keep only these. A hook is its name, else (glob, at, index): hooking again
        replaces it. HookError: no such module. Positions are those of the padded batch, and in a
        generation of all the text; -1 is each forward's last one. edit: change it, by a preset
        (zero mean scale add set project_out clamp noise patch; value: what it takes) or by an edit
        you defined; at these positions, heads (of @q @k @v @pattern @z) and neurons (of the last
        dim) only. capture: what is kept of an edited activation, "after" the edit, "before" it,
        "both", or "none". reduce: keep only this of it: "norm:-1", "mean:0,1", "amax", ... over
        these dims or all, computed where the shards lie, over rows and positions without pads;
        "last" is positions=-1."""
        info = self._loaded()
        assert self.store is not None
        plain = edits.value_of(value, set(self.cluster.hosts) <= {self.store.here})
        spec = spec_of(
            glob, at, index, groups, positions, name, edit, plain, heads, neurons, capture, reduce
        )
        found, firing = self._checked(info, spec, self.edits)
        self._held.take(spec.key, value)
        self._set_hooks(self.hook_set.put(spec))
        silent = [n for n in found if n not in firing] if info.scan else []
        return Hooked(spec, tuple(found), tuple(silent))

    def _checked(
        self, info: ModelInfo, spec: HookSpec, known: dict[str, EditSpec]
    ) -> tuple[tuple[str, ...], list[str]]:
        """(what the hook names, what of that fires in a forward). HookError: the loaded model has
        no place for it."""
        edits.check(spec, known)
        found = self.planner.names(spec)
        firing = [n for n in found if spec.of == "param" or info.scan.get((n, spec.of))]
        check_index(info, firing, spec)
        return found, firing

    def unhook(self, glob_or_name: str | None = None) -> list[str]:
        """Take hooks away, by name or by the glob they were given; all if none is named. Returns
        their names."""
        self._loaded()
        keys = called(self.hook_set, glob_or_name)
        self._set_hooks(self.hook_set.without(keys))
        return keys

    def group(self, action: str, group: str = "", glob: str | None = None) -> dict[str, list[str]]:
        """ "on" or "off" switches a group; "add" or "remove" puts the hooks of a glob into it or
        takes them out; "list" only tells. Returns group → its hooks."""
        self._loaded()
        self._set_hooks(regrouped(self.hook_set, action, group, glob))
        return self.hook_set.groups

    def save_hooks(self, path: str | os.PathLike[str]) -> Path:
        """Write the hooks, their groups and which are off, and your edits to a JSON file.
        HookError: one patches in a capture, which no file can hold; nothing is written."""
        return hookfile.write(path, self.hook_set, self.edits)

    def load_hooks(self, path: str | os.PathLike[str]) -> Hooks:
        """Have the hooks that a file holds, in place of those there are; its edits beside those
        there are.

        The file's edits are code that runs on your engines: load only files you trust. HookError:
        it is no such file, or the loaded model has no such module; nothing is changed."""
        info = self._loaded()
        hook_set, found = hookfile.read(path, pack)
        known = {**self.edits, **found}
        for spec in hook_set.hooks:
            self._checked(info, spec, known)
        for edit in found.values():
            self.cluster.call("define", edit)
        self.edits = known
        self._set_hooks(hook_set)
        return self.hooks

    @contextlib.contextmanager
    def also(self, specs: Sequence[HookSpec]) -> Iterator[None]:
        """While it is entered there are these hooks too, after the user's own."""
        before = self.hook_set
        self._set_hooks(functools.reduce(HookSet.put, specs, before))
        try:
            yield
        finally:
            self._set_hooks(before)

    def _set_hooks(self, hook_set: HookSet) -> None:
        if hook_set != self.hook_set:
            self.cluster.may("set_hooks")
            # until all engines have them: an interrupt may leave some with the old ones
            self._hooks_sent = False
            self.cluster.call("set_hooks", hook_set)
            with SignalMask():
                self.hook_set, self._hooks_sent = hook_set, True
        self._held.keep([hook.key for hook in self.hook_set.hooks])
