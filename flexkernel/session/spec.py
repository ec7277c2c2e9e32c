"""A hook as a user asks for it, as the HookSpec that every engine gets, and the checks of it."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

from flexkernel.errors import HookError
from flexkernel.memory.plan import Planner
from flexkernel.memory.selection import check_index, leaf_of
from flexkernel.names import display_name, nearest, split_point
from flexkernel.wire import AT, REDUCTIONS, Blob, HookSpec, ModelInfo, Reduction, SlabValue

from .edits import PRESETS

__all__ = ["check", "reduction", "spec_of"]

CAPTURES = ("after", "before", "both", "none")


def spec_of(  # noqa: PLR0913 - a user's keywords
    glob: str,
    at: str = "output",
    index: str | int | None = None,
    groups: Sequence[str] | str = (),
    positions: Sequence[int] | int | None = None,
    name: str = "",
    edit: str | None = None,
    value: Any = None,
    heads: Sequence[int] | int | None = None,
    neurons: Sequence[int] | int | None = None,
    capture: str = "after",
    reduce: str | None = None,
) -> HookSpec:
    """A hook as a user asks for it. value: plain data already. HookError: what no model has."""
    check_place(glob, at, name)
    if reduce == "last":
        if positions is not None:
            raise HookError(
                f"reduce='last' keeps the last position, and positions={positions!r} others: say "
                "one"
            )
        positions = -1
        reduce = None
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


def indices(given: Sequence[int] | int | None, kind: str) -> tuple[int, ...] | None:
    """Positions, heads or neurons as a hook has them; None is all."""
    if given is None:
        return None
    try:
        found = tuple(map(operator.index, given if isinstance(given, Iterable) else (given,)))
    except TypeError:
        found = ()
    if not found:
        raise HookError(f"{kind}={given!r} are no {kind}; they are whole numbers, -1 is the last")
    return found


def reduction(text: str) -> Reduction:
    """What a hook keeps instead of a value, as a user writes it. HookError.

    >>> reduction("norm:-1"), reduction("amax")
    (Reduction(op='norm', dims=(-1,)), Reduction(op='amax', dims=()))
    """
    op, colon, rest = str(text).partition(":")
    dims: tuple[int, ...] = ()
    try:
        if colon:
            dims = tuple(int(dim) for dim in rest.split(","))
    except ValueError:
        op = ""
    if op not in REDUCTIONS:
        raise HookError(
            f"reduce={text!r} is not OP:DIMS, as in norm:-1 or mean:0,1; OP alone is over all "
            "dims, "
            f"'last' keeps the last position. OP is one of {', '.join(REDUCTIONS)}"
        )
    return Reduction(op, dims)


# --- the checks -----------------------------------------------------------------------


def check(
    spec: HookSpec, planner: Planner, edits: Collection[str]
) -> tuple[tuple[str, ...], list[str]]:
    """HookError unless the loaded model has a place for this hook, and its edit is one of these or
    a preset. Checks all fields, in their order.

    Returns (what its glob names, which of that fires in a forward)."""
    check_place(spec.glob, spec.at, spec.name)
    check_parts(spec)
    check_edit(spec, edits)
    scan = planner.info.scan
    names = planner.names(spec)
    firing = [name for name in names if spec.of == "param" or scan.get((name, spec.of))]
    check_index(planner.info, firing, spec)
    check_indices(spec, planner.info, names)
    return names, firing


def check_place(glob: Any, at: str, name: Any) -> None:
    """HookError: no model has such a place."""
    if not isinstance(glob, str) or not isinstance(name, str):
        raise HookError(
            f"a hook's glob and name are text; found {type(glob).__name__} and "
            f"{type(name).__name__}"
        )
    if at not in AT:
        raise HookError(f"at={at!r} is not one of {', '.join(AT)}")
    if at not in ("output", "grad_output") and glob.rpartition(".")[2].startswith("@"):
        raise HookError(f"{glob!r} is a point inside attention, it has no {at}; hook its output")


def check_parts(spec: HookSpec) -> None:
    """HookError: no value at that place has the parts that the hook names, or every run has a hook
    of its name."""
    if spec.key == "logits":
        raise HookError(
            "the name 'logits' is taken: every run captures them; give the hook another name"
        )
    if spec.at != "param_grad":
        return
    if spec.edit == "mean" or spec.positions is not None or spec.heads is not None:
        raise HookError(
            "the gradient of a parameter has no rows, positions or heads: edit all of it, or its "
            "neurons"
        )
    if spec.reduce is not None:
        raise HookError("the gradient of a parameter is kept whole: reduce it when it is there")


def check_indices(spec: HookSpec, info: ModelInfo, names: Sequence[str]) -> None:
    """HookError: heads, neurons or positions that the values at these names have not."""
    if spec.positions is not None and info.max_positions is not None:
        check_range("model", "position", spec.positions, info.max_positions)
    for name in names:
        if spec.heads is not None:
            check_heads(spec, spec.heads, name, info)
        if spec.neurons is not None:
            for shape in shapes_at(spec, name, info):
                check_range(
                    display_name(name), "neuron", spec.neurons, shape[-1] if shape else None
                )


def check_heads(spec: HookSpec, heads: Sequence[int], name: str, info: ModelInfo) -> None:
    """HookError: there are no heads at that name, or fewer."""
    point = split_point(name)[1]
    if not point:
        raise HookError(
            f"{spec.key}: there are heads at @q, @k, @v, @pattern and @z, not at "
            f"{display_name(name)}"
        )
    for shape in shapes_at(spec, name, info):
        check_range(name, "head", heads, shape[2 if point == "z" else 1])


def shapes_at(spec: HookSpec, name: str, info: ModelInfo) -> Iterator[Sequence[int | None]]:
    """The shape of the hook's value at a name, for each call in a forward; None for a dim that
    depends on the batch."""
    if spec.of == "param":
        yield info.parameters[name]
        return
    for leaves in info.scan.get((name, spec.of), ()):
        formula = leaf_of(leaves, spec, name)
        if formula is not None and formula.dims is not None:
            yield [factor if term == "" else None for factor, term in formula.dims]


def check_range(owner: str, kind: str, indices: Sequence[int], size: int | None) -> None:
    """HookError: one of the indices is outside of so many; None: how many is not known."""
    outside = [] if size is None else [i for i in indices if not -size <= i < size]
    if size is not None and outside:
        raise HookError(f"{owner} has no {kind} {outside[0]}: {kind}s are 0 to {size - 1}")


def check_edit(spec: HookSpec, edits: Collection[str]) -> None:
    """HookError unless the hook's edit exists and takes its value."""
    if spec.capture not in CAPTURES:
        raise HookError(f"capture={spec.capture!r} is not one of {', '.join(CAPTURES)}")
    if spec.edit is None:
        for option in ("value", "heads", "neurons"):
            if getattr(spec, option) is not None:
                raise HookError(f"{option}= belongs to an edit, and {spec.key!r} has none: edit=")
        if spec.capture != "after":
            raise HookError(
                f"capture={spec.capture!r} belongs to an edit, and {spec.key!r} has none: edit="
            )
        return
    if spec.edit not in PRESETS and spec.edit not in edits:
        names = [*PRESETS, *edits]
        near = ", ".join(nearest(spec.edit, names)) or "none"
        raise HookError(
            f"no edit is called {spec.edit!r}; nearest: {near}; there are {', '.join(names)}"
        )
    check_value(spec, PRESETS.get(spec.edit, "nothing"))


def check_value(spec: HookSpec, wants: str) -> None:
    """HookError unless the hook's value is what its edit takes."""
    value = spec.value
    a_number = isinstance(value, float)
    a_direction = spec.edit == "project_out"
    fits = {
        "nothing": value is None,
        "number": a_number,
        "tensor": isinstance(value, Blob) or (a_number and not a_direction),
        "two numbers": isinstance(value, tuple) and len(value) == 2,
        "capture": isinstance(value, SlabValue | Blob),
    }
    if not fits[wants]:
        raise HookError(f"edit {spec.edit!r} takes {wants}, not {type(value).__name__}: value=")
