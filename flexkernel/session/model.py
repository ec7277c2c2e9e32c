"""The loaded model as the driver knows it, and how it is loaded: from what each rank says of its
part."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

from flexkernel.errors import HookError, LayoutError, LoadError
from flexkernel.memory.plan import Planner
from flexkernel.names import nearest, select, split_point
from flexkernel.wire import AXES, Layout, ModelInfo, ModuleInfo, Source, either

from . import prompts

__all__ = [
    "NONE_LOADED",
    "Loaded",
    "check_degrees",
    "check_stop",
    "fitted",
    "inspect",
    "load",
    "merged",
]
__all__ += ["source", "trainable"]

NONE_LOADED = "no model is loaded: session.load(path, tp=, pp=, dp=, fsdp=), or %flex_load PATH"


@dataclasses.dataclass(frozen=True)
class Loaded:
    """The loaded model. A load replaces all of it at once.

    info: modules, shapes, layout. source: where it came from. planner: where captures will lie.
    tokenizer: transformers', None if its folder has none."""

    info: ModelInfo
    source: Source
    planner: Planner
    tokenizer: Any

    @classmethod
    def of(cls, info: ModelInfo, source: Source) -> Loaded:
        """The model that the engines have. LoadError: its tokenizer cannot be read."""
        tokenizer = None if info.built else prompts.tokenizer(info.path)
        return cls(info, source, Planner(info), tokenizer)

    def __repr__(self) -> str:
        return f"<Loaded {self.info.cls} from {self.info.path}, {self.info.layout}>"


def check_degrees(layout: Layout) -> None:
    """LayoutError unless each degree is a whole number from 1."""
    for axis in AXES:
        degree = getattr(layout, axis)
        if not isinstance(degree, int) or degree < 1:
            raise LayoutError(f"{axis}={degree!r} is not a degree; it is a whole number from 1")


def fitted(cluster: Any, source: Source, layout: Layout) -> Layout:
    """The layout for all engines: the one asked for, or the first that the model can have where no
    degree was given. LayoutError: the degrees do not multiply to the number of engines."""
    world = cluster.size
    if layout.world == world:
        return layout
    fits: tuple[Layout, ...] = ()
    if world > 1 and source.builder is None:
        fits = cluster.call("possible_layouts", source.path, world)[0]
    if layout.world == 1 and fits:
        return fits[0]
    raise LayoutError(f"{mismatch(layout, world)}, {instead(world, fits)}")


def mismatch(layout: Layout, world: int) -> str:
    """That the degrees make another number of ranks than there are engines, in words."""
    degrees = str(layout) if layout.world > 1 else "no degree"
    ranks = counted(layout.world, "rank")
    engines = counted(world, "engine")
    return (
        f"{degrees} makes {ranks}, the cluster has {engines}: the degrees must multiply to {world}"
    )


def counted(number: int, noun: str) -> str:
    """A number of things: "1 rank", "2 ranks"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def instead(world: int, fits: Sequence[Layout]) -> str:
    """What to ask for instead, as the end of a sentence."""
    if world == 1:
        return "so leave them out, or start more engines"
    if fits:
        return f"this model can have {either(fits)}"
    return f"for instance pp={world} or tp={world}"


def source(what: Any, packed: Callable[[Any], bytes], **of_builder: Any) -> Source:
    """What a user gave to load, as engines understand it. of_builder: reference, forward, names,
    None if not given."""
    given = {key: packed(value) for key, value in of_builder.items() if value is not None}
    if callable(what):
        return Source(getattr(what, "__name__", type(what).__name__), packed(what), **given)
    if given:
        raise LoadError(
            f"{', '.join(f'{key}=' for key in given)}: that belongs to a builder, and {what!r} is "
            "none"
        )
    if not isinstance(what, str | os.PathLike):
        raise LoadError(
            "a model is a folder, a hub id or a function that builds it; found "
            f"{type(what).__name__}"
        )
    path = os.fspath(what)
    return Source(os.path.expanduser(path) if path.startswith("~") else path)


def inspect(
    cluster: Any,
    source: Source,
    layout: Layout,
    dtype: str,
    attention: str | None,
    placements: dict[str, str],
    progress: Callable[[str, int, int], None],
) -> ModelInfo:
    """What is known of a model before it is loaded. Refuses what cannot be; nothing on the engines
    changes."""
    progress("inspecting", 0, layout.world)
    return cluster.call("inspect_model", source, layout, dtype, attention, placements)[0]


def load(
    cluster: Any, source: Source, info: ModelInfo, progress: Callable[[str, int, int], None]
) -> ModelInfo:
    """Load a model on all engines, each its part, and tell every rank what all hold."""
    layout = info.layout
    progress("loading", 0, layout.world)
    cluster.fresh = False
    parts = cluster.call(
        "load", info, source, progress=lambda done: progress("loading", done, layout.world)
    )
    info = merged(info, parts, foreign=source.builder is not None)
    if source.builder is None:
        check_sharded(info)
    progress("describing", layout.world, layout.world)
    cluster.call("adopt", info)
    return info


def check_stop(info: ModelInfo, name: str) -> None:
    """HookError unless a forward can end at that module: it is one, and it fires."""
    modules = [m.name for m in info.modules]
    if name not in modules:
        near = nearest(name, modules)
        raise HookError(
            f"no module matches {name!r}, to stop at"
            + (f"; nearest: {', '.join(near)}" if near else "")
        )
    if info.scan and not info.scan.get((name, "output")):
        raise HookError(
            f"stop_at={name!r} never fires in a forward, so that nothing can end there; name one "
            "that does"
        )


def trainable(info: ModelInfo, globs: str | Sequence[str]) -> tuple[str, ...]:
    """The model's parameters that these names or globs mean, each once. HookError: there are
    none."""
    names = [name for name in info.parameters if name not in info.buffers]
    each = (globs,) if isinstance(globs, str) else globs
    return tuple(dict.fromkeys(name for glob in each for name in select(glob, names)))


def merged(
    info: ModelInfo, parts: Sequence[tuple[list[ModuleInfo], int, int]], foreign: bool = False
) -> ModelInfo:
    """The model with the stages that hold each module, from each rank's (modules, parameters,
    bytes).

    foreign: it was built by the user, and may have modules of its own beside those of the
    unsharded one."""
    stages: dict[str, set[int]] = {}
    held: dict[str, ModuleInfo] = {}
    for rank, (modules, _, _) in enumerate(parts):
        stage = info.layout.coordinate(rank).pp
        for module in modules:
            held.setdefault(module.name, module)
            stages.setdefault(module.name, set()).add(stage)
    lost = [m.name for m in info.modules if m.name not in stages]
    known = {m.name for m in info.modules}
    strange = {name: m for name, m in held.items() if name not in known}
    if foreign:
        info = as_built(info, lost, strange)
    elif lost or strange:
        raise LoadError(
            f"the loaded model has other modules than the unsharded one: "
            f"{len(lost)} missing {lost[:3]}, {len(strange)} unknown {sorted(strange)[:3]}"
        )
    spans = spanning(info.modules, stages)
    return dataclasses.replace(
        info,
        modules=tuple(
            dataclasses.replace(m, stages=tuple(sorted(stages[m.name])), spans=m.name in spans)
            for m in info.modules
        ),
        rank_parameters=tuple(part[1] for part in parts),
        rank_bytes=tuple(part[2] for part in parts),
    )


def as_built(info: ModelInfo, lost: Sequence[str], strange: dict[str, ModuleInfo]) -> ModelInfo:
    """The unsharded model's modules as a builder's ranks have them: with those of its own, without
    containers that it leaves out. LoadError where a module is lost that has parameters: those must
    be somewhere, under another name."""
    owners = {name.rpartition(".")[0] for name in info.parameters}
    missing = [name for name in lost if name in owners]
    if missing:
        near = nearest(missing[0], list(strange)) or sorted(strange)[:3]
        raise LoadError(
            f"no rank of the builder's model has {missing[0]}"
            + (f" and {len(missing) - 1} more of the reference's modules" if missing[1:] else "")
            + (f"; what it has and the reference has not: {', '.join(near)}" if near else "")
            + ". If they are called otherwise there, say so: names={'their prefix': 'the prefix in the reference'}"
        )
    there = tuple(m for m in info.modules if m.name not in lost)
    scan = {key: calls for key, calls in info.scan.items() if split_point(key[0])[0] not in lost}
    return dataclasses.replace(info, modules=(*there, *strange.values()), scan=scan)


def spanning(modules: Sequence[ModuleInfo], stages: dict[str, set[int]]) -> set[str]:
    """The modules beneath which something lies on other stages than they do themselves."""
    found = set()
    for module in modules:
        name = module.name
        while name:
            name = name.rpartition(".")[0]
            if stages.get(name, stages[module.name]) != stages[module.name]:
                found.add(name)
    return found


def check_sharded(info: ModelInfo) -> None:
    """LoadError if a model that should be split lies whole on every rank."""
    layout = info.layout
    if layout.tp * layout.pp * layout.fsdp > 1 and min(info.rank_parameters) >= info.num_parameters:
        raise LoadError(
            f"{info.path} was loaded as {layout}, but every rank holds all {info.num_parameters:,} "
            "parameters: "
            f"transformers has no plan that splits {info.cls}"
        )
