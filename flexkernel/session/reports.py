"""What the ranks report of a run, put together: its captures, what is whole of it, what to warn
of."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from flexkernel.errors import EditError
from flexkernel.memory.plan import Entry, Plan
from flexkernel.memory.pool import Extent
from flexkernel.memory.reduce import result_dtype
from flexkernel.memory.selection import first_positions, kept_columns, kept_shape, reduced_shape
from flexkernel.sites import EDITED
from flexkernel.wire import CaptureKey, Layout, RunReport, ShardRecord

from .capture import Capture, Home, Location, Value
from .failures import differing
from .reduced import Reduced

if TYPE_CHECKING:
    from .run import Run

__all__ = ["at_one_forward", "captures_of", "check_edited", "made_nan", "whole_everywhere"]


def captures_of(
    run: Run,
    where: Plan,
    extent: Extent,
    reports: Sequence[RunReport],
    home: Home,
    layout: Layout,
) -> dict[CaptureKey, Capture]:
    """Key → Capture, of all that the ranks report."""
    planned: dict[int, dict[int, ShardRecord]] = {}
    others: dict[CaptureKey, dict[int, ShardRecord]] = {}
    for report in reports:
        for i, record in report.planned.items():
            planned.setdefault(i, {})[report.rank] = record
        for key, record in report.others.items():
            others.setdefault(key, {})[report.rank] = record
    positions = Positions(run)
    found: dict[CaptureKey, Capture] = {}
    for i, entry in enumerate(where.entries):
        if i not in planned and (run.stopped or run.partial):
            continue
        of = positions.value(entry)
        region = where.region(entry, extent.slab, extent.base)
        lies = Location(home, region, extent, positions.cut(entry), entry.shape)
        records = planned.get(i, {})
        if entry.hook.reduce is None:
            found[entry.key] = Capture(of, lies, records)
        else:
            found[entry.key] = Reduced(of, lies, records, entry, layout)
    for key, records in others.items():
        shape, dtype = described(records)
        found[key] = Capture(Value(key, shape, dtype, run.tokens), Location(home), records)
    return found


class Positions:
    """Which positions of a run's text its captures have."""

    def __init__(self, run: Run):
        self.run = run
        self.mask = run.mask
        self.B = len(run.plan.ids)
        self.S = len(run.plan.ids[0])
        self._columns: dict[tuple[int, ...] | None, list[int]] = {}

    def value(self, entry: Entry) -> Value:
        """What a planned capture turned out to be."""
        dtype = getattr(torch, entry.formula.dtype)
        if entry.hook.reduce is not None:
            dtype = result_dtype(entry.hook.reduce.op, dtype)
        tokens, mask = self._tokens(entry)
        return Value(entry.key, self._shape(entry), dtype, tokens, mask)

    def cut(self, entry: Entry) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """Takes what there is out of a tensor of the planned shape: a generation may end early.
        None: it is all there."""
        shape = self._shape(entry)
        if shape == entry.kept_shape:
            return None
        return functools.partial(
            first_positions, shape=shape, folded=entry.formula.folded, B=self.B
        )

    def _shape(self, entry: Entry) -> tuple[int, ...]:
        generation = self.run.plan.generation
        forwards = self.run.forwards
        if generation is None or entry.newest or forwards == generation.max_new_tokens:
            return entry.kept_shape
        shape = kept_shape(entry.formula, entry.hook, self.B, self.S, 0, forwards)
        return reduced_shape(shape, entry.over)

    def _tokens(self, entry: Entry) -> tuple[list[list[str]] | None, torch.Tensor | None]:
        """(each row's tokens, (B, positions) bool: which are real). None: rows or positions were
        reduced."""
        formula = entry.formula
        if {formula.positions, *formula.batched} & set(entry.over):
            return None, None
        if formula.positions is None and formula.folded is None:
            return self.run.tokens, None
        width = self.mask.shape[1]
        if entry.newest:
            columns = [width - 1]
        else:
            columns = self._kept_columns(entry.hook.kept_positions)
        if len(columns) == width:
            return self.run.tokens, self.mask
        tokens = [[row[column] for column in columns] for row in self.run.tokens]
        return tokens, self.mask[:, columns]

    def _kept_columns(self, positions: tuple[int, ...] | None) -> list[int]:
        if positions not in self._columns:
            by_forward = kept_columns(positions, self.S, self.run.forwards)
            self._columns[positions] = [column for columns in by_forward for column in columns]
        return self._columns[positions]


def at_one_forward(by_rank: Sequence[Sequence[RunReport]]) -> list[RunReport]:
    """One report of each rank, all of after the same forward, the last that all have; none if
    there is no such one."""
    each = [{report.forwards: report for report in reports} for reports in by_rank]
    common = set.intersection(*map(set, each)) if each else set()
    return [reports[max(common)] for reports in each] if common else []


def whole_everywhere(where: Plan, reports: Sequence[RunReport]) -> set[int]:
    """The planned captures of which every rank that sees them says that it has its part. Nothing
    is kept of others: what lies in their place is partly of this run and partly of one before."""
    by_rank = {report.rank: report.planned for report in reports}
    return {
        i
        for i, entry in enumerate(where.entries)
        if entry.ranks
        and all(
            r in by_rank and i in by_rank[r] and by_rank[r][i].error is None for r in entry.ranks
        )
    }


def check_edited(reports: Sequence[RunReport]) -> None:
    """PlacementError if ranks edited what they held as copies of one value, and these differed.
    EditError: those were equal, and what the edit made of them was not."""
    by_rank: dict[CaptureKey, dict[int, ShardRecord]] = {}
    for report in reports:
        for key, seen in report.edited.items():
            by_rank.setdefault(key, {})[report.rank] = seen
    for key, ranks in by_rank.items():
        problem = differing(key, ranks)
        if problem is not None and key.site.side == EDITED:
            raise EditError(
                f"the edit of hook {key.hook!r} made different values of the copies of "
                f"{key.module} that ranks hold: "
                "draw what is random in an edit that is per='whole', which runs once",
                min(ranks),
            )
        if problem is not None:
            raise problem


def made_nan(reports: Sequence[RunReport]) -> tuple[str, ...]:
    """A sentence for each edit that made NaN of an activation that had none."""
    keys = dict.fromkeys(
        key for report in reports for key, seen in report.edited.items() if seen.nan
    )
    return tuple(
        f"the edit of hook {key.hook!r} put out NaN at {key}, where none came in" for key in keys
    )


def described(by_rank: Mapping[int, ShardRecord]) -> tuple[tuple[int, ...], torch.dtype]:
    """The whole shape and dtype of a value that no plan foresaw, from the parts that ranks
    describe."""
    lies = next((s.region for s in by_rank.values() if s.region is not None), None)
    if lies is None:
        return (), torch.float32
    shape = list(lies.shape)
    for dim in range(len(shape)):
        shape[dim] = max(
            [stop for s in by_rank.values() for d, _, stop in s.shard if d == dim],
            default=shape[dim],
        )
    return tuple(shape), getattr(torch, lies.dtype)
