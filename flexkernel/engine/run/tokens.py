"""The text of a run as it grows: the prompt, then what a generation adds, for all rows of the
batch.

New tokens lie in the run's slab. Each rank writes those of its own rows before it feeds them:
after any exchange every rank of the host can read all. The driver reads them too, while the call
is in flight.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from flexkernel.wire import RunPlan

__all__ = ["Text"]


class Text:
    """ids, mask, positions: of any columns, (B, n), as a forward over them takes them.

    table: (B, max_new_tokens) int64 in the slab; a cell is the run's stamp and the token, so that
    what lay there before is told from it. ends: tokens after which a row has ended."""

    def __init__(self, plan: RunPlan, table: torch.Tensor | None = None, ends: Sequence[int] = ()):
        self.S, self.generation = len(plan.ids[0]), plan.generation
        self._ids, self._mask = torch.tensor(plan.ids), torch.tensor(plan.mask).bool()
        self._positions = torch.tensor(plan.positions)
        self._table, self.ends = table, frozenset(ends)
        self.new: dict[int, list[int]] = {}  # row → its tokens, of the rows that this rank runs

    def begin(self, rows: range) -> None:
        """These rows are this rank's."""
        self.new = {row: [] for row in rows}

    def add(self, tokens: Sequence[int]) -> None:
        """One more token for each of this rank's rows; those that have ended take none."""
        for (row, before), token in zip(self.new.items(), tokens, strict=True):
            if not before or before[-1] not in self.ends:
                self._table[row, len(before)] = self.generation.stamp << 32 | token  # type: ignore[index,union-attr]
                before.append(token)

    def ids(self, columns: range) -> torch.Tensor:
        """(B, n) int64; after a row's end its pad."""
        return self._of(columns, self._ids, self._new()[0] if self.generation is not None else None)

    def mask(self, columns: range) -> torch.Tensor:
        """(B, n) bool: False on pads and, from a row's last token on, on what is run for the sake
        of other rows."""
        return self._of(
            columns, self._mask, self._new()[1] if self.generation is not None else None
        )

    def positions(self, columns: range) -> torch.Tensor:
        """(B, n) int64: each column's position in its row."""
        more = None
        if self.generation is not None:
            more = self._positions[:, -1:] + torch.arange(1, self.generation.max_new_tokens + 1)
        return self._of(columns, self._positions, more)

    def _of(self, columns: range, prompt: torch.Tensor, new: torch.Tensor | None) -> torch.Tensor:
        if columns.stop <= self.S:
            return prompt[:, columns.start : columns.stop]
        assert new is not None, "only a generation goes on after its prompt"
        return torch.cat(
            [
                prompt[:, columns.start :],
                new[:, max(columns.start - self.S, 0) : columns.stop - self.S],
            ],
            1,
        )

    def _new(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(ids, which of them their row goes on after)."""
        assert self._table is not None and self.generation is not None
        cells = self._table.clone()
        there = cells >> 32 == self.generation.stamp
        ids = torch.where(there, cells & 0xFFFFFFFF, self.generation.pad_id)
        ended = torch.isin(ids, torch.tensor(sorted(self.ends), dtype=torch.int64))
        return ids, (there & ~ended).cumprod(1).bool()
