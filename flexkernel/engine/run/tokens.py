"""The tokens of a run as they grow: the prompt, then what a generation adds, for all rows of the
batch.

New tokens lie in the run's slab. Each rank writes those of its own rows before it feeds them to
the model: after any exchange every rank of the host can read all of them. The driver reads them
too, while the call is in flight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from flexkernel.wire import Generation, RunPlan

__all__ = ["NewTokens", "TokenBuffer", "TokenStreamer"]

TOKEN_BITS = 32  # of a cell of the table; the bits above them are the run's stamp


@dataclass(frozen=True)
class NewTokens:
    """The tokens that a generation adds.

    table: (B, max_new_tokens) int64 in the slab. A cell holds the run's stamp and the token, so
    that it differs from what an earlier run left there. ends: the tokens that end a row."""

    table: torch.Tensor
    generation: Generation
    ends: frozenset[int]

    def write(self, row: int, column: int, token: int) -> None:
        self.table[row, column] = self.generation.stamp << TOKEN_BITS | token

    def read(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(the ids, (B, max_new_tokens) int64, with the pad's in cells not written yet; which cells
        this run has written, bool of the same shape)."""
        cells = self.table.clone()  # other ranks write into the table meanwhile
        written = cells >> TOKEN_BITS == self.generation.stamp
        ids = cells & ((1 << TOKEN_BITS) - 1)
        return torch.where(written, ids, self.generation.pad_id), written

    def mask(self) -> torch.Tensor:
        """(B, max_new_tokens) bool: False from a row's last token on."""
        ids, written = self.read()
        ended = torch.isin(ids, torch.tensor(sorted(self.ends), dtype=torch.int64))
        return (written & ~ended).cumprod(1).bool()


class TokenBuffer:
    """The tokens of all rows, by columns: the prompt's S columns, then a generation's. Every tensor
    is on the CPU.

    added: None for a run that generates nothing. new: row → its new tokens, for the rows of this
    rank."""

    def __init__(self, plan: RunPlan, added: NewTokens | None = None, rows: range = range(0)):
        self.S = len(plan.ids[0])
        self.added = added
        self.new: dict[int, list[int]] = {row: [] for row in rows}
        self._ids = torch.tensor(plan.ids)
        self._mask = torch.tensor(plan.mask).bool()
        self._positions = torch.tensor(plan.positions)

    def add(self, tokens: Sequence[int]) -> None:
        """Add one token to each of this rank's rows, but to none that has ended."""
        if self.added is None:
            return
        for (row, earlier), token in zip(self.new.items(), tokens, strict=True):
            if not earlier or earlier[-1] not in self.added.ends:
                self.added.write(row, len(earlier), token)
                earlier.append(token)

    def ids(self, columns: range) -> torch.Tensor:
        """(B, n) int64: the token ids of these columns. After a row's end: the pad's."""
        if self.added is None or columns.stop <= self.S:
            return self._ids[:, columns.start : columns.stop]
        return self._join(columns, self._ids, self.added.read()[0])

    def mask(self, columns: range) -> torch.Tensor:
        """(B, n) bool: False on pads, and from a row's last token on, where the row runs only for
        the sake of the others."""
        if self.added is None or columns.stop <= self.S:
            return self._mask[:, columns.start : columns.stop]
        return self._join(columns, self._mask, self.added.mask())

    def positions(self, columns: range) -> torch.Tensor:
        """(B, n) int64: the position of each column in its row."""
        if self.added is None or columns.stop <= self.S:
            return self._positions[:, columns.start : columns.stop]
        later = torch.arange(1, self.added.generation.max_new_tokens + 1)
        return self._join(columns, self._positions, self._positions[:, -1:] + later)

    def _join(self, columns: range, prompt: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """(B, n): these columns of the prompt (B, S) and the new tokens (B, max_new_tokens)."""
        first = max(columns.start - self.S, 0)
        return torch.cat([prompt[:, columns.start :], new[:, first : columns.stop - self.S]], 1)


class TokenStreamer:
    """What transformers' generate() calls a streamer: it gets the prompt, then each step's tokens.

    tick: called after each step, or None."""

    def __init__(self, buffer: TokenBuffer, tick: Callable[[], None] | None):
        self.buffer = buffer
        self.tick = tick
        self.has_prompt = False

    def put(self, value: torch.Tensor) -> None:
        """value: (B,) int64, the next token of each row; at the first call (B, S), the prompt."""
        if not self.has_prompt:
            self.has_prompt = True
            return
        if self.buffer.new:
            self.buffer.add(value.tolist())
        if self.tick is not None:
            self.tick()

    def end(self) -> None:
        """Nothing is held back."""
