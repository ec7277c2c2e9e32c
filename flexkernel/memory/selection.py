"""What a hook selects of a value: which of its tensors, which positions, which dims remain after a
reduction."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from flexkernel.errors import HookError
from flexkernel.names import display_name, nearest
from flexkernel.wire import HookSpec, ModelInfo, ShapeFormula

__all__ = [
    "check_index",
    "check_positions",
    "first_positions",
    "kept_columns",
    "kept_shape",
    "leaf_of",
    "reduced_dims",
    "reduced_shape",
]

# --- which tensor ---------------------------------------------------------------------


def leaf_of(leaves: Sequence[ShapeFormula], hook: HookSpec, name: str) -> ShapeFormula | None:
    """The tensor of a value that a hook reads. None: the value holds no tensor.

    HookError: it has no tensor at the hook's index."""
    if hook.index is None:
        return leaves[0] if leaves else None
    for leaf in leaves:
        if leaf.path == hook.index:
            return leaf
    paths = [leaf.path for leaf in leaves]
    near = nearest(hook.index, paths) or paths[:6]
    raise HookError(
        f"{display_name(name)} {hook.at} has no tensor at index {hook.index!r}; there are {near}"
    )


def check_index(info: ModelInfo, names: Sequence[str], hook: HookSpec) -> None:
    """HookError if the value of one of these modules lacks the hook's index or a dim that it
    reduces."""
    if hook.of == "param":
        return
    for name in names:
        for leaves in info.scan[name, hook.of]:
            formula = leaf_of(leaves, hook, name)
            if formula is not None and formula.dims is not None:
                reduced_dims(hook, formula, name)


# --- reductions -----------------------------------------------------------------------


def reduced_dims(hook: HookSpec, formula: ShapeFormula, name: str) -> tuple[int, ...]:
    """The dims of a value that its hook reduces; () without a reduction. HookError: the value
    lacks such a dim."""
    if hook.reduce is None:
        return ()
    try:
        return hook.reduce.over(len(formula.dims or ()))
    except IndexError as outside:
        raise HookError(
            f"{display_name(name)} {hook.at} is {formula}: it has no dim {outside}, which "
            f"{hook.reduce} would reduce"
        ) from None


def reduced_shape(shape: Sequence[int], dims: Sequence[int]) -> tuple[int, ...]:
    """A shape without the dims that are reduced.

    >>> reduced_shape((2, 5, 8), (0, 2))
    (5,)
    """
    return tuple(size for dim, size in enumerate(shape) if dim not in dims)


# --- positions ------------------------------------------------------------------------


def kept_shape(
    formula: ShapeFormula, hook: HookSpec, B: int, S: int, window: int, forwards: int = 1
) -> tuple[int, ...]:
    """The shape of what a capture keeps: the whole value, or only the positions that the hook
    names.

    A prompt has S positions. Each forward of a generation after the first adds one."""
    shape = list(formula.shape(B, S + forwards - 1, 0, window))
    if hook.kept_positions is not None and formula.positions is not None:
        columns = kept_columns(hook.kept_positions, S, forwards)
        shape[formula.positions] = sum(map(len, columns))
    return tuple(shape)


def kept_columns(
    positions: tuple[int, ...] | None, S: int, forwards: int = 1
) -> list[tuple[int, ...]]:
    """For each forward, which of these positions it runs. None: all positions that it runs.

    Positions count from the start of the text. Negative ones count from the end of the text in
    that forward: -1 is each forward's newest token.

    >>> kept_columns((0, -1), 5, 3)
    [(0, 4), (5,), (6,)]
    """
    found = []
    for forward in range(forwards):
        end = S + forward
        columns = range(end - 1 if forward else 0, end)
        wanted = columns if positions is None else [p + end if p < 0 else p for p in positions]
        found.append(tuple(p for p in wanted if p in columns))
    return found


def check_positions(hook: HookSpec, S: int, forwards: int = 1) -> None:
    """HookError if the hook names a position that no forward of the run has."""
    end = S + forwards - 1
    outside = [p for p in hook.positions or () if not -S <= p < end]
    if not outside:
        return
    verb = "keeps" if hook.edit is None else "edits"
    count = f"{end}, of which {S} are the prompt's" if forwards > 1 else end
    raise HookError(f"hook {hook.key!r} {verb} position {outside[0]}, but the run has {count}")


def first_positions(
    whole: torch.Tensor, shape: Sequence[int], folded: int | None, B: int
) -> torch.Tensor:
    """A view of the first positions of a planned whole, for a generation that ended early.

    whole: of the planned shape -> `shape`, which differs only in the dims of positions. folded:
    the dim in which rows and positions lie together, if any. B: rows of the batch."""
    for dim, size in enumerate(shape):
        if size == whole.shape[dim]:
            continue
        if dim == folded:
            by_row = whole.unflatten(dim, (B, -1))
            whole = by_row.narrow(dim + 1, 0, size // B).flatten(dim, dim + 1)
        else:
            whole = whole.narrow(dim, 0, size)
    return whole
