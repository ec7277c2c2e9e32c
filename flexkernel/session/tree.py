"""Tree: the modules of the loaded model, where each lies, and the hooks on it."""

from __future__ import annotations

from flexkernel.errors import HookError
from flexkernel.names import match, nearest, split_point
from flexkernel.views.tree import ModelTree, ModuleRow
from flexkernel.wire import STYLES, HookSet, HookSpec, ModelInfo, ModuleInfo

from .edits import edit_text

__all__ = ["Tree"]


class Tree:
    """The modules a glob names, as rows. Draws itself in a notebook; prints as text elsewhere."""

    def __init__(self, info: ModelInfo, hook_set: HookSet, glob: str = "**"):
        self.info, self.glob = info, glob
        self.rows = [
            row(info, hook_set, m) for m in info.modules if m.name == "" or match(glob, m.name)
        ]
        if glob not in ("**", "") and not any(r.name for r in self.rows):
            near = nearest(glob, info.names)
            raise HookError(
                f"no module matches {glob!r}" + (f"; nearest: {', '.join(near)}" if near else "")
            )

    def __repr__(self) -> str:
        return str(self._drawn())

    def _repr_html_(self) -> str:
        return self._drawn()._repr_html_()

    def _drawn(self) -> ModelTree:
        info = self.info
        title = f"{info.cls}: {info.num_parameters:,} parameters, {info.layout}"
        return ModelTree(self.rows, title)


def row(info: ModelInfo, hook_set: HookSet, module: ModuleInfo) -> ModuleRow:
    name = module.name
    calls = info.scan.get((name, "output"), ())
    first = next((leaf for leaves in calls for leaf in leaves), None)
    held = [r for r in range(info.layout.world) if info.layout.coordinate(r).pp in module.stages]
    on_it = [h for h in hook_set.hooks if match(h.glob, name) or on_point(h.glob, name)]
    hooks = tuple((hook_text(hook), hook.groups) for hook in on_it)
    return ModuleRow(
        name,
        module.cls,
        module.num_parameters,
        str(first) if first else "–",
        placement(info, name),
        tuple(held),
        hooks,
    )


def hook_text(hook: HookSpec) -> str:
    """A hook by its key; an edit by what it does."""
    return hook.key if hook.edit is None else f"✎ {edit_text(hook)}"


def on_point(glob: str, name: str) -> bool:
    """Whether the glob names a virtual point of this module."""
    owner, point = split_point(glob)
    return bool(point) and match(owner, name)


def placement(info: ModelInfo, name: str) -> str:
    """What is known of the output's placement over tp before a run: what the plan says."""
    if info.layout.tp == 1:
        return "whole"
    style = info.styles.get(name, "by scan")
    return STYLES.get(style, {}).get("output", style)
