"""Dataset: the activations of many prompts, on disk. Each rank writes its own shard; nothing is
gathered.

A folder of safetensors files and an index. A value that has positions is kept by token, pads left
out, in the order of the prompts; one that has none, or of which they were reduced, by prompt.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from flexkernel.boxes import WHOLE, Box
from flexkernel.errors import CaptureError, HookError
from flexkernel.memory.plan import Entry, Rows, row_dims
from flexkernel.names import nearest
from flexkernel.session.capture import Capture
from flexkernel.session.progress import Progress, reporting
from flexkernel.session.prompts import Batch
from flexkernel.session.run import Run
from flexkernel.session.spec import spec_of
from flexkernel.views.table import Table, page
from flexkernel.wire import HookSpec, dtype_name

if TYPE_CHECKING:
    from flexkernel.session.session import Session

__all__ = ["Dataset", "collect", "open_dataset"]

SCHEMA = 1
GROUP = "(collect)"  # of the hooks that are there for the collection only
FLUSH_S = 1.0  # an index is written no more often: of a killed collection so much is done again


def open_dataset(path: str | os.PathLike[str]) -> Dataset:
    """What session.collect() wrote into this folder. CaptureError: nothing, or by a later
    flexkernel."""
    return Dataset(path)


class Dataset:
    """Activations of many prompts. dataset[name]: a whole tensor, (tokens, ...) or (prompts, ...).

    names: of the captures. lengths: tokens of each prompt. complete: all prompts are in it."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self._index = read_index(self.path)

    @property
    def complete(self) -> bool:
        return bool(self._index["complete"])

    @property
    def names(self) -> list[str]:
        return list(self._index["captures"])

    @property
    def lengths(self) -> list[int]:
        return [length for batch in self._index["batches"] for length in batch["lengths"]]

    def __len__(self) -> int:
        """How many prompts there are."""
        return len(self.lengths)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    @property
    def tokens(self) -> list[list[int]]:
        """Each prompt's token ids."""
        found: list[list[int]] = []
        for batch in self._index["batches"]:
            with self._open(batch["tokens"]) as file:
                found += [row.tolist() for row in file.get_tensor("tokens").split(batch["lengths"])]
        return found

    def __getitem__(self, name: str) -> torch.Tensor:
        """All of it, in memory. CaptureError: there is no such capture."""
        parts = list(self._counts(name))
        _, shape, dtype = self._kind(name)
        whole = torch.empty((sum(parts), *shape), dtype=dtype)
        for number, rows in enumerate(whole.split(parts) if parts else ()):
            self._fill(name, number, rows)
        return whole

    def batches(self, name: str) -> Iterator[torch.Tensor]:
        """The same in pieces, one a batch that was run, for what does not fit into memory."""
        _, shape, dtype = self._kind(name)
        for number, count in enumerate(self._counts(name)):
            rows = torch.empty((count, *shape), dtype=dtype)
            self._fill(name, number, rows)
            yield rows

    def prompt(self, name: str, number: int) -> torch.Tensor:
        """What there is of one prompt: (its tokens, ...), or (...) where positions were
        reduced."""
        before = 0
        for i, batch in enumerate(self._index["batches"]):
            inside = number - before
            if 0 <= inside < len(batch["lengths"]):
                counts = self._rows(name, i)[0].sum(1).tolist()
                part = next(itertools.islice(self.batches(name), i, None))
                by_token, _, _ = self._kind(name)
                return part.split(counts)[inside] if by_token else part[inside]
            before += len(batch["lengths"])
        raise CaptureError(f"there is no prompt {number} in {self.path}; it has {before}")

    def _kind(self, name: str) -> tuple[bool, tuple[int, ...], torch.dtype]:
        """(is it by token, the shape of one, its dtype)."""
        if name not in self._index["captures"]:
            near = nearest(name, self.names) or self.names[:6]
            raise CaptureError(
                f"{self.path} has no capture {name!r}; it has {', '.join(near) or 'none'}"
            )
        found = self._index["captures"][name]
        rows, positions, folded = found["dims"]
        each = tuple(s for d, s in enumerate(found["shape"]) if d not in (rows, positions, folded))
        return positions is not None or folded is not None, each, getattr(torch, found["dtype"])

    def _counts(self, name: str) -> Iterator[int]:
        by_token, _, _ = self._kind(name)
        for number, batch in enumerate(self._index["batches"]):
            yield int(self._rows(name, number)[0].sum()) if by_token else len(batch["lengths"])

    def _rows(self, name: str, number: int) -> tuple[torch.Tensor, tuple[int, ...]]:
        """((rows, positions) bool, which are real; the shape of the whole value in that batch)."""
        lengths, found = self._index["batches"][number]["lengths"], self._index["captures"][name]
        mask = mask_of(lengths)
        if found["positions"] is not None:
            mask = mask[:, [p % mask.shape[1] for p in found["positions"]]]
        rows, positions, folded = found["dims"]
        sizes = {rows: mask.shape[0], positions: mask.shape[1], folded: mask.numel()}
        return mask, tuple(sizes.get(d, s) for d, s in enumerate(found["shape"]))

    def _fill(self, name: str, number: int, into: torch.Tensor) -> None:
        batch, found = self._index["batches"][number], self._index["captures"][name]
        mask, shape = self._rows(name, number)
        dims = tuple(found["dims"])
        for file_name, parts in batch["files"].items():
            if name in parts:
                with self._open(file_name) as file:
                    Rows(dims, shape, Box.of(parts[name])).put(file.get_tensor(name), mask, into)

    @contextlib.contextmanager
    def _open(self, name: str) -> Iterator[Any]:
        try:
            with safe_open(self.path / name, framework="pt") as file:
                yield file
        except FileNotFoundError:
            raise CaptureError(
                f"{self.path / name} is gone, and the index names it: collect again"
            ) from None

    def rows(self) -> list[tuple[str, str]]:
        state = (
            "" if self.complete else "; not all of it: collect again with the same prompts goes on"
        )
        what = (
            f"{len(self):,} prompts, {sum(self.lengths):,} tokens of {self._index['model']}{state}"
        )
        return [(str(self.path), what), *((name, self._says(name)) for name in self.names)]

    def _says(self, name: str) -> str:
        by_token, shape, dtype = self._kind(name)
        text = "×".join(map(str, (sum(self._counts(name)), *shape)))
        return f"{text} {str(dtype).removeprefix('torch.')}, by {'token' if by_token else 'prompt'}"

    def __repr__(self) -> str:
        (path, what), *rows = self.rows()
        return f"Dataset {path}: {what}\n{Table(rows).text('  ')}".rstrip()

    def _repr_html_(self) -> str:
        (path, what), *rows = self.rows()
        return page(f"Dataset {path}: {what}", Table(rows, code=(0,)).html())


# --- collecting -----------------------------------------------------------------------


def collect(
    session: Session,
    prompts: Iterable[Any],
    hooks: str | Sequence[str] | None = None,
    path: str | os.PathLike[str] = "dataset",
    *,
    at: str | None = None,
    positions: Sequence[int] | int | None = None,
    reduce: str | None = None,
    batch_size: int = 16,
    chat: bool = False,
    progress: Progress | None = None,
) -> Dataset:
    """The activations of many prompts, into a folder; see Session.collect."""
    specs = specs_of(session, hooks, {"at": at, "positions": positions, "reduce": reduce})
    groups = (GROUP,) if specs else ()
    active = specs or session.hooks.active()
    check(session, active)
    if batch_size < 1:
        raise HookError(f"batch_size={batch_size}: give 1 or more prompts per batch")
    total = len(prompts) if isinstance(prompts, Sized) else 0
    writer = Writer(Path(path), header(session, active, batch_size), total)
    with (
        reporting(session.bar, progress, "collect", "prompt") as report,
        session.hooked(*specs),
        writer,
        contextlib.suppress(KeyboardInterrupt),
    ):
        for rows in batched(prompts, batch_size):
            batch = session.batch(rows, chat)
            if not writer.has(batch):
                run = session.run(batch, groups=groups)
                try:
                    writer.add(session, run)
                finally:
                    run.free()
            speed = f"collecting ({writer.speed():,.0f} tokens/s)"
            report(speed, writer.done, max(total, writer.done))
        writer.index["complete"] = True
    return Dataset(path)


def batched(prompts: Iterable[Any], size: int) -> Iterator[list[Any]]:
    if isinstance(prompts, str):
        raise HookError(
            "a dataset is of many prompts: give a list of them, or anything that yields them"
        )
    rows = iter(prompts)
    while batch := list(itertools.islice(rows, size)):
        yield batch


def specs_of(
    session: Session, hooks: str | Sequence[str] | None, options: dict[str, Any]
) -> list[HookSpec]:
    """The hooks of these globs, for the collection only; none where the session's own are
    meant."""
    if hooks is None:
        if any(value is not None for value in options.values()):
            raise HookError(
                "at=, positions= and reduce= say what hooks=GLOB keeps; your own hooks have theirs"
            )
        return []
    found = []
    for glob in (hooks,) if isinstance(hooks, str) else hooks:
        at = options["at"] or "output"
        spec = spec_of(
            glob,
            at,
            groups=GROUP,
            positions=options["positions"],
            name=f"{GROUP} {glob}",
            reduce=options["reduce"],
        )
        session.hooks.check(spec)
        found.append(spec)
    return found


def check(session: Session, hooks: Sequence[HookSpec]) -> None:
    """HookError: nothing would be kept, or something that cannot be told by prompts."""
    entries = [
        entry
        for entry in session.loaded.planner.plan(hooks, 2, 3).entries
        if entry.hook.name != "logits"
    ]
    if not entries:
        raise HookError(
            "no hook would keep anything: name modules, hooks='model.layers.*.mlp', or hook some first"
        )
    for entry in entries:
        row_dims(entry)


def header(session: Session, hooks: Sequence[HookSpec], batch_size: int) -> dict[str, Any]:
    """What has to be the same for a collection to go on."""
    info = session.loaded.info
    return {
        "flexkernel dataset": SCHEMA,
        "model": f"{info.cls} from {info.path}",
        "dtype": info.dtype,
        "hooks": [repr(hook) for hook in hooks],
        "batch_size": batch_size,
    }


class Writer:
    """Adds batches to a folder; goes on where an earlier one ended, if it was of the same."""

    def __init__(self, path: Path, header: dict[str, Any], total: int):
        self.path, self.total = path.resolve(), total
        self.path.mkdir(parents=True, exist_ok=True)
        self.index: dict[str, Any] = {**header, "complete": False, "captures": {}, "batches": []}
        if (self.path / "index.json").exists():
            self.index = read_index(self.path)
            differs = [key for key, value in header.items() if self.index.get(key) != value]
            if differs:
                raise CaptureError(
                    f"{path} holds a dataset of other {differs[0]}: {self.index.get(differs[0])!r}, now "
                    f"{header[differs[0]]!r}; name another folder"
                )
        elif any(self.path.iterdir()):
            raise CaptureError(f"{path} is not empty and holds no dataset: name another folder")
        self._number, self.done, self._tokens = 0, 0, 0
        self._began = self._flushed = time.monotonic()

    def __enter__(self) -> Writer:
        self.index["complete"] = False
        return self

    def __exit__(self, *_error: Any) -> None:
        self.flush()

    def speed(self) -> float:
        return self._tokens / max(time.monotonic() - self._began, 1e-9)

    def has(self, batch: Batch) -> bool:
        """Whether the next batch is there already. CaptureError: another is."""
        there = self.index["batches"]
        if self._number == len(there):
            return False
        if there[self._number]["digest"] != digest(batch):
            raise CaptureError(
                f"{self.path} holds other prompts: batch {self._number} differs; name another folder, or give the same "
                "prompts again to go on"
            )
        self._number += 1
        self.done += len(batch.ids)
        return True

    def add(self, session: Session, run: Run) -> None:
        """What a run kept, as the next batch."""
        entries = planned(session, run)
        for (_, entry), capture in entries.items():
            if capture.error is not None:
                raise capture.error
            self._describe(capture, entry)
        file = f"{self._number:06d}"
        files = self._by_ranks(session, run, entries, file)
        lengths = [sum(row) for row in run.plan.mask]
        own = {"tokens": torch.tensor(run.plan.ids)[torch.tensor(run.plan.mask).bool()]}
        boxes: dict[str, Box] = {}
        mask = mask_of(lengths)
        for (_, entry), capture in entries.items():
            if not by_ranks(capture, entry):
                name, positions = capture.name, entry.hook.kept_positions
                real = (
                    mask if positions is None else mask[:, [p % mask.shape[1] for p in positions]]
                )
                own[name] = Rows(row_dims(entry), entry.kept, WHOLE).of(capture.tensor(), real)
                boxes[name] = WHOLE
        save(own, self.path / f"{file}-driver.safetensors")
        files[f"{file}-driver.safetensors"] = boxes
        batch = {
            "lengths": lengths,
            "digest": digest(run.plan),
            "tokens": f"{file}-driver.safetensors",
            "files": files,
        }
        self.index["batches"].append(batch)
        self._number += 1
        self.done += len(lengths)
        self._tokens += sum(lengths)
        if time.monotonic() - self._flushed > FLUSH_S:
            self.flush()

    def _by_ranks(
        self, session: Session, run: Run, entries: dict, file: str
    ) -> dict[str, dict[str, Box]]:
        """Have each rank write what it holds: file → name → which part."""
        names = {
            i: capture.name for (i, entry), capture in entries.items() if by_ranks(capture, entry)
        }
        paths = [f"{file}-{rank}.safetensors" for rank in range(session.engines.size)]
        each = [(run.number, str(self.path / path), names) for path in paths]
        answers = session.call("dataset.write", each=each) if names else [{}] * len(paths)
        found = {path: boxes for path, boxes in zip(paths, answers, strict=True) if boxes}
        for rank, path in enumerate(paths):
            if path in found and not (self.path / path).exists():
                host = session.engines.hosts[rank]
                raise CaptureError(
                    f"rank {rank} on {host} has written {self.path / path}, and it is not there: a dataset needs a "
                    "folder that all hosts share"
                )
        return found

    def _describe(self, capture: Capture, entry: Entry) -> None:
        said = {
            "dtype": dtype_name(capture.dtype),
            "shape": list(entry.kept),
            "dims": list(row_dims(entry)),
            "positions": entry.hook.kept_positions,
        }
        self.index["captures"].setdefault(capture.name, said)

    def flush(self) -> None:
        """Write the index: it appears whole or not at all."""
        part = self.path / "index.json.part"
        part.write_text(json.dumps(self.index))
        os.replace(part, self.path / "index.json")
        self._flushed = time.monotonic()


def planned(session: Session, run: Run) -> dict[tuple[int, Entry], Capture]:
    """(index in the plan, entry) → its capture, each value once. CaptureError: one has no planned
    place."""
    where = session.loaded.planner.plan(
        session.hooks.hook_set.active(run.plan.groups), len(run.plan.ids), len(run.plan.ids[0])
    )
    by_name: dict[str, tuple[tuple[int, Entry], Capture]] = {}
    for i, entry in enumerate(where.entries):
        if entry.hook.name != "logits":
            by_name.setdefault(run.captures[entry.key].name, ((i, entry), run.captures[entry.key]))
    others = [
        key
        for key in run.captures
        if key.hook != "logits" and key not in {e.key for e in where.entries}
    ]
    if others:
        raise CaptureError(
            f"{others[0]}: its shape depends on the data, it cannot be put together over many prompts"
        )
    return dict(by_name.values())


def by_ranks(capture: Capture, entry: Entry) -> bool:
    """Whether the ranks' parts in the slab are the value itself: not if they are addends, or parts
    of a reduction."""
    return entry.hook.reduce is None and not capture.is_partial


def digest(batch: Any) -> str:
    return hashlib.sha256(repr((batch.ids, batch.mask)).encode()).hexdigest()[:16]


def mask_of(lengths: Sequence[int]) -> torch.Tensor:
    """(rows, positions) bool, of rows padded on the left."""
    width = max(lengths)
    return torch.arange(width) >= width - torch.tensor(lengths)[:, None]


def save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    part = path.with_suffix(".part")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part)
    os.replace(part, path)


def read_index(path: Path) -> dict[str, Any]:
    try:
        index = json.loads((path / "index.json").read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CaptureError(
            f"{path} cannot be read as a dataset: {error}; session.collect(...) writes one"
        ) from None
    if not isinstance(index, dict) or index.get("flexkernel dataset") != SCHEMA:
        raise CaptureError(f"{path} is no dataset, or of another version of flexkernel")
    return index
