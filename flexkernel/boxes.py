"""The part of a whole tensor: which rows, columns, heads a rank holds, writes or reads.

No torch here. Methods that take a tensor use its `narrow`, `copy_` and `new_empty` only.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

from .errors import EngineError

__all__ = ["WHOLE", "Box", "Run", "chunk", "share", "share_of"]

Run = tuple[int, int, int]  # (dim, start, stop)


class Box(tuple[Run, ...]):
    """A part of a whole tensor: (dim, start, stop) for each dim of which it has a part.

    A dim that it does not name belongs to it entirely, so that the empty box is the whole tensor.
    In a parameter's box a dim occurs once for each run of it: a rank's part of packed weights
    (gate and up in one matrix) lies in several. Only `parts`, `pieces`, `put`, `take`, `shape_in`
    and `volume` accept such a box; `parts` splits it into boxes of one run a dim.

    >>> Box(((0, 2, 4),)).shape_in((8, 5)), Box(((1, 0, 2), (1, 4, 6))).shape_in((8, 9))
    ((2, 5), (8, 4))
    """

    __slots__ = ()

    # --- making one -----------------------------------------------------------------------

    @classmethod
    def of(cls, runs: Iterable[Iterable[int]]) -> Box:
        """The box of these runs; also of what JSON made of one.

        >>> Box.of([[0, 2, 4]])
        ((0, 2, 4),)
        """
        return cls((dim, start, stop) for dim, start, stop in runs)

    @classmethod
    def nothing(cls, ndim: int) -> Box:
        """The box of a rank that has no element of a tensor of so many dims."""
        return cls((dim, 0, 0) for dim in range(ndim))

    @classmethod
    def of_indices(cls, shape: Sequence[int], indices: Sequence[Any]) -> Box:
        """The elements at these indices: one ascending int64 tensor a dim.

        A dim whose indices are all of it is left out; one in several runs occurs several times."""
        return cls(
            (dim, start, stop)
            for dim, index in enumerate(indices)
            for start, stop in _consecutive(index)
            if (start, stop) != (0, shape[dim])
        )

    def plus(self, dim: int, start: int, stop: int) -> Box:
        """The same with a part of one more dim.

        >>> Box(((1, 0, 2),)).plus(0, 4, 8)
        ((0, 4, 8), (1, 0, 2))
        """
        return interned(Box(sorted((*self, (dim, start, stop)))))

    def within(self, piece: Box) -> Box:
        """A piece of what this box holds, as a part of the whole.

        >>> Box(((0, 4, 8),)).within(Box(((0, 1, 3),))), Box(((0, 4, 8),)).within(Box(((1, 0, 2),)))
        (((0, 5, 7),), ((0, 4, 8), (1, 0, 2)))
        """
        return _within(self, piece)

    def without(self, dims: Sequence[int]) -> Box:
        """The same part of the tensor from which these dims are reduced away.

        >>> Box(((0, 2, 4), (2, 0, 8))).without((1,)), Box(((0, 2, 4), (2, 0, 8))).without((2,))
        (((0, 2, 4), (1, 0, 8)), ((0, 2, 4),))
        """
        return Box((d - sum(r < d for r in dims), a, b) for d, a, b in self if d not in dims)

    def only(self, dims: Collection[int]) -> Box:
        """What it has of these dims, and all of every other one.

        >>> Box(((0, 2, 4), (2, 0, 8))).only({2})
        ((2, 0, 8),)
        """
        return Box(run for run in self if run[0] in dims)

    # --- what it is -----------------------------------------------------------------------

    @property
    def dims(self) -> set[int]:
        """The dims of which it has a part only."""
        return {dim for dim, _, _ in self}

    @property
    def is_empty(self) -> bool:
        """Whether a run of it has no element.

        >>> Box(((0, 3, 3),)).is_empty, Box().is_empty
        (True, False)
        """
        return any(stop <= start for _, start, stop in self)

    def span(self, dim: int, size: int) -> tuple[int, int]:
        """(start, stop) along a dim of that size.

        >>> Box(((0, 2, 4),)).span(0, 8), Box(((0, 2, 4),)).span(1, 5)
        ((2, 4), (0, 5))
        """
        return next(((start, stop) for d, start, stop in self if d == dim), (0, size))

    def slices(self, ndim: int) -> tuple[slice, ...]:
        """What indexes the part in a tensor of so many dims.

        >>> Box(((1, 2, 4),)).slices(2)
        (slice(None, None, None), slice(2, 4, None))
        """
        found = [slice(None)] * ndim
        for dim, start, stop in self:
            found[dim] = slice(start, stop)
        return tuple(found)

    def shape_in(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The part's shape, within a whole of that shape."""
        sizes: dict[int, int] = {}
        for dim, start, stop in self:
            sizes[dim] = sizes.get(dim, 0) + stop - start
        return tuple(sizes.get(dim, size) for dim, size in enumerate(shape))

    def volume(self, shape: Sequence[int]) -> int:
        """How many elements the part has, within a whole of that shape.

        >>> Box(((0, 0, 2), (0, 6, 7))).volume((8, 5))
        15
        """
        return math.prod(self.shape_in(shape))

    def overlaps(self, other: Box) -> bool:
        """Whether two parts that are not empty have an element in common.

        >>> Box(((0, 0, 2),)).overlaps(Box(((0, 2, 4),))), Box(((0, 0, 2),)).overlaps(Box(((1, 0, 9),)))
        (False, True)
        """
        mine = {dim: (start, stop) for dim, start, stop in self}
        return all(a < mine[d][1] and mine[d][0] < b for d, a, b in other if d in mine)

    # --- several runs of a dim ------------------------------------------------------------

    def parts(self) -> list[Box]:
        """The same elements as boxes of one run a dim.

        >>> Box(((0, 0, 2), (0, 4, 6), (1, 0, 3))).parts()
        [((0, 0, 2), (1, 0, 3)), ((0, 4, 6), (1, 0, 3))]
        """
        if len(self.dims) == len(self):
            return [self]
        runs: dict[int, list[Run]] = {}
        for run in self:
            runs.setdefault(run[0], []).append(run)
        return [Box(part) for part in itertools.product(*runs.values())]

    def pieces(self) -> Iterator[tuple[Box, Box]]:
        """(its place in the whole, its place in the local tensor) for each of parts().

        >>> list(Box(((0, 0, 2), (0, 4, 6))).pieces())
        [(((0, 0, 2),), ((0, 0, 2),)), (((0, 4, 6),), ((0, 2, 4),))]
        """
        sizes: dict[int, int] = {}
        begins: dict[tuple[int, int], int] = {}
        for dim, start, stop in self:
            begins[dim, start] = sizes.get(dim, 0)
            sizes[dim] = begins[dim, start] + stop - start
        for part in self.parts():
            yield part, Box((d, begins[d, a], begins[d, a] + b - a) for d, a, b in part)

    # --- tensors --------------------------------------------------------------------------

    def cut(self, whole: Any) -> Any:
        """The view of a whole tensor that this box names: no copy."""
        for dim, start, stop in self:
            whole = whole.narrow(dim, start, stop - start)
        return whole

    def put(self, local: Any, whole: Any) -> None:
        """Copy the part, a tensor of shape_in(whole.shape), into its place in the whole."""
        for part, piece in self.pieces():
            part.cut(whole).copy_(piece.cut(local))

    def take(self, whole: Any) -> Any:
        """A copy of the part: shape_in(whole.shape), the whole's dtype and device."""
        local = whole.new_empty(self.shape_in(whole.shape))
        for part, piece in self.pieces():
            piece.cut(local).copy_(part.cut(whole))
        return local

    # --- as numbers of a header -----------------------------------------------------------

    NUMBERS = 24  # how many numbers stand for a box: up to eight runs of three

    def numbers(self) -> list[int]:
        """The box as NUMBERS ints. EngineError: it has more runs than that.

        >>> Box.from_numbers(Box(((0, 2, 4),)).numbers())
        ((0, 2, 4),)
        """
        free = self.NUMBERS - 3 * len(self)
        if free < 0:
            raise EngineError(f"a part of a tensor in {len(self)} runs cannot be sent: at most 8")
        return [*itertools.chain(*self), *[-1] * free]

    @classmethod
    def from_numbers(cls, numbers: Sequence[int]) -> Box:
        """The box that numbers() wrote."""
        triples = zip(numbers[::3], numbers[1::3], numbers[2::3], strict=True)
        return cls.of(run for run in triples if run[0] >= 0)


WHOLE = Box()


@functools.lru_cache(maxsize=4096)
def interned(box: Box) -> Box:
    """The same object for equal boxes: a report that names one box a thousand times is pickled
    three times as fast."""
    return box


@functools.lru_cache(maxsize=4096)
def _within(box: Box, piece: Box) -> Box:
    found = {dim: (start, stop) for dim, start, stop in box}
    for dim, start, stop in piece:
        offset = found[dim][0] if dim in found else 0
        found[dim] = (offset + start, offset + stop)
    return interned(Box((dim, *found[dim]) for dim in sorted(found)))


def _consecutive(index: Any) -> list[tuple[int, int]]:
    """Where an ascending int64 tensor is consecutive, as (start, stop)."""
    if len(index) == 0:
        return [(0, 0)]
    ends = (index.diff() != 1).nonzero().flatten() + 1
    return [(int(run[0]), int(run[-1]) + 1) for run in index.tensor_split(ends)]


# --- who has which part ---------------------------------------------------------------------


def share(total: int, parts: int, index: int) -> tuple[int, int]:
    """(start, stop) of the rows that part `index` has of `total`: as even as can be, the first
    parts larger.

    >>> [share(5, 4, i) for i in range(4)]
    [(0, 2), (2, 3), (3, 4), (4, 5)]
    """
    size, more = divmod(total, parts)
    start = index * size + min(index, more)
    return start, start + size + (index < more)


def chunk(size: int, parts: int, index: int) -> tuple[int, int]:
    """(start, stop) of one of torch.chunk's pieces: so DTensor and transformers split.

    >>> [chunk(257, 2, i) for i in range(2)]
    [(0, 129), (129, 257)]
    """
    step = -(-size // parts)
    return min(index * step, size), min((index + 1) * step, size)


def share_of(shape: Sequence[int], copies: int, index: int) -> Box | None:
    """Which piece of a tensor that `copies` ranks hold rank `index` of them writes: a share of the
    largest dim, within what they hold. None: nothing is left for it.

    >>> share_of((4, 8), 2, 1), share_of((), 2, 0), share_of((), 2, 1)
    (((1, 4, 8),), (), None)
    """
    if math.prod(shape) == 0:
        return None
    if not shape:
        return WHOLE if index == 0 else None
    dim = max(range(len(shape)), key=lambda d: shape[d])
    start, stop = share(shape[dim], copies, index)
    return Box(((dim, start, stop),)) if stop > start else None
