"""The tokens of a run as they grow: the prompt, then what a generation adds, for all rows of the
batch.

New tokens lie in the run's slab. Each rank writes those of its own rows before it feeds them to
the model: after any exchange every rank of the host can read all of them. The driver reads them
too, while the call is in flight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from flexkernel.wire import RunPlan

__all__ = ["TokenBuffer", "TokenStreamer"]

TOKEN_BITS = 32  # of a cell of the table; the bits above them are the run's stamp


class TokenBuffer:
    """The tokens of all rows, by columns: the prompt's S columns, then a generation's.

    table: (B, max_new_tokens) int64 in the slab, for a generation. A cell holds the run's stamp
    and the token, so that it differs from what an earlier run left there. ends: the tokens that
    end a row. Every tensor is on the CPU."""

    def __init__(self, plan: RunPlan, table: torch.Tensor | None = None, ends: Sequence[int] = ()):
        self.S = len(plan.ids[0])
        self.generation = plan.generation
        self.ends = frozenset(ends)
        self.new: dict[int, list[int]] = {}  # row → its new tokens, for the rows of this rank
        self._ids = torch.tensor(plan.ids)
        self._mask = torch.tensor(plan.mask).bool()
        self._positions = torch.tensor(plan.positions)
        self._table = table

    def begin(self, rows: range) -> None:
        """Start with no new tokens; this rank adds those of these rows."""
        self.new = {row: [] for row in rows}

    def add(self, tokens: Sequence[int]) -> None:
        """Add one token to each of this rank's rows, but to none that has ended."""
        assert self._table is not None and self.generation is not None
        for (row, earlier), token in zip(self.new.items(), tokens, strict=True):
            if not earlier or earlier[-1] not in self.ends:
                self._table[row, len(earlier)] = self.generation.stamp << TOKEN_BITS | token
                earlier.append(token)

    def ids(self, columns: range) -> torch.Tensor:
        """(B, n) int64: the token ids of these columns. After a row's end: the pad's."""
        if columns.stop <= self.S:
            return self._ids[:, columns.start : columns.stop]
        return self._join(columns, self._ids, self._new()[0])

    def mask(self, columns: range) -> torch.Tensor:
        """(B, n) bool: False on pads, and from a row's last token on, where the row runs only for
        the sake of the others."""
        if columns.stop <= self.S:
            return self._mask[:, columns.start : columns.stop]
        ids, written = self._new()
        ended = torch.isin(ids, torch.tensor(sorted(self.ends), dtype=torch.int64))
        return self._join(columns, self._mask, (written & ~ended).cumprod(1).bool())

    def positions(self, columns: range) -> torch.Tensor:
        """(B, n) int64: the position of each column in its row."""
        if columns.stop <= self.S:
            return self._positions[:, columns.start : columns.stop]
        assert self.generation is not None
        later = torch.arange(1, self.generation.max_new_tokens + 1)
        return self._join(columns, self._positions, self._positions[:, -1:] + later)

    def _join(self, columns: range, prompt: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """(B, n): these columns of the prompt (B, S) and the new tokens (B, max_new_tokens)."""
        first = max(columns.start - self.S, 0)
        return torch.cat([prompt[:, columns.start :], new[:, first : columns.stop - self.S]], 1)

    def _new(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(the new tokens, (B, max_new_tokens) int64, with the pad's id in cells not written yet;
        which cells this run has written, bool of the same shape)."""
        assert self._table is not None, "only a generation goes on after its prompt"
        assert self.generation is not None
        cells = self._table.clone()  # other ranks write into the table meanwhile
        written = cells >> TOKEN_BITS == self.generation.stamp
        ids = cells & ((1 << TOKEN_BITS) - 1)
        return torch.where(written, ids, self.generation.pad_id), written


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
