"""Dataset: the activations of many prompts, read from disk.

A folder of safetensors files and an index. A value that has positions is kept by token, pads left
out, in the order of the prompts; one that has none, or of which they were reduced, by prompt.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from flexkernel.boxes import Box
from flexkernel.errors import CaptureError
from flexkernel.memory.rows import Rows
from flexkernel.names import nearest
from flexkernel.views.table import Table, page
from flexkernel.wire import dtype_name

__all__ = ["SCHEMA", "Dataset", "Format", "open_dataset", "read_index"]

SCHEMA = 1


def open_dataset(path: str | os.PathLike[str]) -> Dataset:
    """What session.collect() wrote into this folder. CaptureError: nothing, or by a later
    flexkernel."""
    return Dataset(path)


@dataclass(frozen=True)
class Format:
    """How a capture lies in a dataset.

    shape: of the first batch's value, which is whole. dims: of its rows, positions, and of both
    folded into one; None where it has none. positions: those that were kept; None: all."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    dims: tuple[int | None, ...]
    positions: tuple[int, ...] | None

    @classmethod
    def of(cls, stored: dict[str, Any]) -> Format:
        """As to_json() wrote it."""
        positions = stored["positions"]
        return cls(
            getattr(torch, stored["dtype"]),
            tuple(stored["shape"]),
            tuple(stored["dims"]),
            None if positions is None else tuple(positions),
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "dtype": dtype_name(self.dtype),
            "shape": self.shape,
            "dims": self.dims,
            "positions": self.positions,
        }

    @property
    def by_token(self) -> bool:
        """Whether it has a row for each token, or for each prompt."""
        _, positions, folded = self.dims
        return positions is not None or folded is not None

    @property
    def row_shape(self) -> tuple[int, ...]:
        """The shape of what it has for one token or prompt."""
        return tuple(size for dim, size in enumerate(self.shape) if dim not in self.dims)

    def mask(self, lengths: Sequence[int]) -> torch.Tensor:
        """(prompts, positions) bool: which of the kept positions are real, in a batch of prompts of
        these lengths."""
        width = max(lengths)
        mask = torch.arange(width) >= width - torch.tensor(lengths)[:, None]
        if self.positions is None:
            return mask
        return mask[:, [position % width for position in self.positions]]

    def count(self, lengths: Sequence[int]) -> int:
        """How many rows it has of such a batch."""
        if self.by_token:
            return int(self.mask(lengths).sum())
        return len(lengths)

    def part(self, lengths: Sequence[int], box: Box) -> Rows:
        """A part of its value in such a batch."""
        mask = self.mask(lengths)
        rows, positions, folded = self.dims
        sizes = {rows: mask.shape[0], positions: mask.shape[1], folded: mask.numel()}
        shape = tuple(sizes.get(dim, size) for dim, size in enumerate(self.shape))
        return Rows(self.dims, shape, box)


class Dataset:
    """Activations of many prompts. dataset[name]: a whole tensor, (tokens, ...) or (prompts, ...).

    names: of the captures. lengths: tokens of each prompt. complete: all prompts are in it."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self._index = read_index(self.path)
        self._batches: list[dict[str, Any]] = self._index["batches"]
        self._formats = {
            name: Format.of(stored) for name, stored in self._index["captures"].items()
        }

    @property
    def complete(self) -> bool:
        return bool(self._index["complete"])

    @property
    def names(self) -> list[str]:
        return list(self._formats)

    @property
    def lengths(self) -> list[int]:
        return [length for batch in self._batches for length in batch["lengths"]]

    def __len__(self) -> int:
        """How many prompts there are."""
        return len(self.lengths)

    def __iter__(self) -> Iterator[str]:
        return iter(self._formats)

    @property
    def tokens(self) -> list[list[int]]:
        """Each prompt's token ids."""
        ids: list[list[int]] = []
        for batch in self._batches:
            with self._open(batch["tokens"]) as file:
                ids += [row.tolist() for row in file.get_tensor("tokens").split(batch["lengths"])]
        return ids

    def __getitem__(self, name: str) -> torch.Tensor:
        """All of it, in memory: (tokens, ...) or (prompts, ...), in its own dtype. CaptureError:
        there is no such capture."""
        form = self._format(name)
        counts = [form.count(batch["lengths"]) for batch in self._batches]
        whole = torch.empty((sum(counts), *form.row_shape), dtype=form.dtype)
        if counts:
            for number, rows in enumerate(whole.split(counts)):
                self._fill(name, number, rows)
        return whole

    def batches(self, name: str) -> Iterator[torch.Tensor]:
        """The same in pieces, (tokens, ...) or (prompts, ...) of one batch that was run, for what
        does not fit into memory."""
        for number in range(len(self._batches)):
            yield self._batch(name, number)

    def prompt(self, name: str, number: int) -> torch.Tensor:
        """What there is of one prompt: (tokens, ...) of it, or (...) where positions were reduced.
        CaptureError: there is no such prompt."""
        form = self._format(name)
        before = 0
        for i, batch in enumerate(self._batches):
            lengths = batch["lengths"]
            inside = number - before
            if 0 <= inside < len(lengths):
                part = self._batch(name, i)
                if not form.by_token:
                    return part[inside]
                return part.split(form.mask(lengths).sum(1).tolist())[inside]
            before += len(lengths)
        raise CaptureError(f"there is no prompt {number} in {self.path}; it has {before}")

    def _format(self, name: str) -> Format:
        if name not in self._formats:
            near = nearest(name, self.names) or self.names[:6]
            raise CaptureError(
                f"{self.path} has no capture {name!r}; it has {', '.join(near) or 'none'}"
            )
        return self._formats[name]

    def _batch(self, name: str, number: int) -> torch.Tensor:
        """What there is of one batch: (tokens, ...) or (prompts, ...)."""
        form = self._format(name)
        count = form.count(self._batches[number]["lengths"])
        rows = torch.empty((count, *form.row_shape), dtype=form.dtype)
        self._fill(name, number, rows)
        return rows

    def _fill(self, name: str, number: int, into: torch.Tensor) -> None:
        """Read one batch into a tensor, (tokens, ...) or (prompts, ...) of that batch."""
        batch = self._batches[number]
        form = self._format(name)
        mask = form.mask(batch["lengths"])
        for file_name, boxes in batch["files"].items():
            if name not in boxes:
                continue
            part = form.part(batch["lengths"], Box.of(boxes[name]))
            with self._open(file_name) as file:
                part.put(file.get_tensor(name), mask, into)

    @contextlib.contextmanager
    def _open(self, name: str) -> Iterator[Any]:
        try:
            with safe_open(self.path / name, framework="pt") as file:
                yield file
        except FileNotFoundError:
            raise CaptureError(
                f"{self.path / name} is gone, and the index names it: collect again"
            ) from None

    # --- repr -------------------------------------------------------------------------

    def _headline(self) -> str:
        text = (
            f"Dataset {self.path}: {len(self):,} prompts, {sum(self.lengths):,} tokens of "
            f"{self._index['model']}"
        )
        if not self.complete:
            text += "; not all of it: collect again with the same prompts goes on"
        return text

    def _table(self) -> Table:
        return Table([(name, self._summary(name)) for name in self.names], code=(0,))

    def _summary(self, name: str) -> str:
        form = self._formats[name]
        count = sum(form.count(batch["lengths"]) for batch in self._batches)
        shape = "×".join(map(str, (count, *form.row_shape)))
        unit = "token" if form.by_token else "prompt"
        return f"{shape} {dtype_name(form.dtype)}, by {unit}"

    def __repr__(self) -> str:
        return f"{self._headline()}\n{self._table().text('  ')}".rstrip()

    def _repr_html_(self) -> str:
        return page(self._headline(), self._table().html())


def read_index(path: Path) -> dict[str, Any]:
    """The index of a dataset's folder. CaptureError: there is none that this version reads."""
    try:
        index = json.loads((path / "index.json").read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CaptureError(
            f"{path} cannot be read as a dataset: {error}; session.collect(...) writes one"
        ) from None
    if not isinstance(index, dict) or index.get("flexkernel dataset") != SCHEMA:
        raise CaptureError(f"{path} is no dataset, or of another version of flexkernel")
    return index
