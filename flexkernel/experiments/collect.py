"""Collect: the activations of many prompts, onto disk. Each rank writes its own shard; nothing is
gathered."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from flexkernel.boxes import WHOLE, Box
from flexkernel.errors import CaptureError, HookError
from flexkernel.memory.plan import Entry
from flexkernel.memory.rows import row_dims
from flexkernel.session.capture import Capture
from flexkernel.session.progress import Progress, reporting
from flexkernel.session.prompts import Batch
from flexkernel.session.run import Run
from flexkernel.session.spec import spec_of
from flexkernel.wire import HookSpec, RunPlan

from .dataset import SCHEMA, Dataset, Format, read_index

if TYPE_CHECKING:
    from flexkernel.session.session import Session

__all__ = ["collect"]

GROUP = "(collect)"  # of the hooks that are there for the collection only
FLUSH_S = 1.0  # an index is written no more often: of a killed collection so much is done again


def collect(  # noqa: PLR0913 - a user's keywords
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
    active = specs or session.hooks.active()
    check(session, active)
    if batch_size < 1:
        raise HookError(f"batch_size={batch_size}: give 1 or more prompts per batch")
    groups = [GROUP] if specs else []
    writer = Writer(session, Path(path), header(session, active, batch_size))
    with (
        reporting(session.bar, progress, "collect", "prompt") as report,
        session.hooked(*specs),
        writer,
    ):
        try:
            for rows in batched(prompts, batch_size):
                batch = session.batch(rows, chat)
                if not writer.has(batch):
                    run_and_add(session, batch, groups, writer)
                speed = f"collecting ({writer.speed():,.0f} tokens/s)"
                report(speed, writer.done, max(count_of(prompts), writer.done))
            writer.index["complete"] = True
        except KeyboardInterrupt:
            total = f" of {count_of(prompts)}" if isinstance(prompts, Sized) else ""
            print(f"{writer.done}{total} prompts done: the same call goes on", file=sys.stderr)
    return Dataset(path)


def run_and_add(session: Session, batch: Batch, groups: Sequence[str], writer: Writer) -> None:
    run = session.run(batch, groups=groups)
    try:
        writer.add(run)
    finally:
        run.free()


def count_of(prompts: Iterable[Any]) -> int:
    """How many prompts there are; 0 if nobody knows before they have come."""
    if isinstance(prompts, Sized):
        return len(prompts)
    return 0


def batched(prompts: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Lists of so many prompts, the last one shorter. HookError: it is one prompt."""
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
    globs = [hooks] if isinstance(hooks, str) else hooks
    given = {name: value for name, value in options.items() if value is not None}
    specs = [spec_of(glob, groups=GROUP, name=f"{GROUP} {glob}", **given) for glob in globs]
    for spec in specs:
        session.hooks.check(spec)
    return specs


def check(session: Session, hooks: Sequence[HookSpec]) -> None:
    """HookError: nothing would be kept, or something that cannot be told by prompts."""
    where = session.loaded.planner.plan(hooks, 2, 3)
    entries = [entry for entry in where.entries if entry.hook.name != "logits"]
    if not entries:
        raise HookError(
            "no hook would keep anything: name modules, hooks='model.layers.*.mlp', or hook some "
            "first"
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


@dataclass(frozen=True)
class Kept:
    """A value that a run kept: its capture, its place in the plan, and how the dataset keeps it."""

    number: int
    entry: Entry
    capture: Capture

    @property
    def name(self) -> str:
        return self.capture.name

    @property
    def format(self) -> Format:
        entry = self.entry
        kept = entry.hook.kept_positions
        return Format(self.capture.dtype, tuple(entry.kept_shape), row_dims(entry), kept)

    @property
    def by_ranks(self) -> bool:
        """Whether the ranks' parts in the slab are the value itself: not if they are addends, or
        parts of a reduction."""
        return self.entry.hook.reduce is None and not self.capture.is_partial


class Writer:
    """Adds batches to a folder. It goes on where an earlier one ended, if that was of the same.

    index: as it is written. done: prompts that are in it."""

    def __init__(self, session: Session, path: Path, header: dict[str, Any]):
        self._session = session
        self.path = path.resolve()
        self.index = begun(self.path, path, header)
        self.done = 0
        self._number = 0
        self._tokens = 0
        self._began = time.monotonic()
        self._flushed = self._began

    def __enter__(self) -> Writer:
        self.index["complete"] = False
        return self

    def __exit__(self, *_error: Any) -> None:
        self.flush()

    def speed(self) -> float:
        """Tokens a second."""
        return self._tokens / max(time.monotonic() - self._began, 1e-9)

    def has(self, batch: Batch) -> bool:
        """Whether the next batch is there already. CaptureError: another is."""
        batches = self.index["batches"]
        if self._number == len(batches):
            return False
        if batches[self._number]["digest"] != digest(batch):
            raise CaptureError(
                f"{self.path} holds other prompts: batch {self._number} differs; name another "
                "folder, or give the same prompts again to go on"
            )
        self._number += 1
        self.done += len(batch.ids)
        return True

    def add(self, run: Run) -> None:
        """What a run kept, as the next batch. CaptureError: it has a value that cannot be read."""
        values = values_of(self._session, run)
        for value in values:
            if value.capture.error is not None:
                raise value.capture.error
            self.index["captures"].setdefault(value.name, value.format.to_json())
        lengths = [sum(row) for row in run.plan.mask]
        stem = f"{self._number:06d}"
        own = f"{stem}-driver.safetensors"
        files = self._by_ranks(run, [value for value in values if value.by_ranks], stem)
        files[own] = self._here(run, [value for value in values if not value.by_ranks], own)
        self.index["batches"].append(
            {"lengths": lengths, "digest": digest(run.plan), "tokens": own, "files": files}
        )
        self._number += 1
        self.done += len(lengths)
        self._tokens += sum(lengths)
        if time.monotonic() - self._flushed > FLUSH_S:
            self.flush()

    def _here(self, run: Run, values: Sequence[Kept], name: str) -> dict[str, Box]:
        """Write the tokens, and values that are whole on the driver only: name → which part."""
        lengths = [sum(row) for row in run.plan.mask]
        tensors = {"tokens": torch.tensor(run.plan.ids)[torch.tensor(run.plan.mask).bool()]}
        for value in values:
            part = value.format.part(lengths, WHOLE)
            tensors[value.name] = part.of(value.capture.tensor(), value.format.mask(lengths))
        save(tensors, self.path / name)
        return {value.name: WHOLE for value in values}

    def _by_ranks(self, run: Run, values: Sequence[Kept], stem: str) -> dict[str, dict[str, Box]]:
        """Have each rank write what it holds: file → name → which part. CaptureError: a host wrote
        into a folder of its own."""
        if not values:
            return {}
        names = {value.number: value.name for value in values}
        engines = self._session.engines
        paths = [f"{stem}-{rank}.safetensors" for rank in range(engines.size)]
        each = [(run.number, str(self.path / path), names) for path in paths]
        answers = self._session.call("dataset.write", each=each)
        files = {path: boxes for path, boxes in zip(paths, answers, strict=True) if boxes}
        for rank, path in enumerate(paths):
            if path in files and not (self.path / path).exists():
                raise CaptureError(
                    f"rank {rank} on {engines.hosts[rank]} has written {self.path / path}, and it "
                    "is not there: a dataset needs a folder that all hosts share"
                )
        return files

    def flush(self) -> None:
        """Write the index: it appears whole or not at all."""
        part = self.path / "index.json.part"
        part.write_text(json.dumps(self.index))
        os.replace(part, self.path / "index.json")
        self._flushed = time.monotonic()


def begun(folder: Path, path: Path, header: dict[str, Any]) -> dict[str, Any]:
    """The index of a folder, or a new one. path: the folder as the user gave it.

    CaptureError: the folder holds something else."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "index.json").exists():
        if any(folder.iterdir()):
            raise CaptureError(f"{path} is not empty and holds no dataset: name another folder")
        return {**header, "complete": False, "captures": {}, "batches": []}
    index = read_index(folder)
    for key, value in header.items():
        if index.get(key) != value:
            raise CaptureError(
                f"{path} was collected with {key}={index.get(key)!r}, now {value!r}; name another "
                "folder"
            )
    return index


def values_of(session: Session, run: Run) -> list[Kept]:
    """What a run kept, each value once. CaptureError: one has no planned place."""
    active = session.hooks.hook_set.active(run.plan.groups)
    where = session.loaded.planner.plan(active, len(run.plan.ids), len(run.plan.ids[0]))
    values: dict[str, Kept] = {}
    for number, entry in enumerate(where.entries):
        if entry.hook.name != "logits":
            value = Kept(number, entry, run.captures[entry.key])
            values.setdefault(value.name, value)
    planned = {entry.key for entry in where.entries}
    for key in run.captures:
        if key.hook != "logits" and key not in planned:
            raise CaptureError(
                f"{key}: its shape depends on the data, it cannot be put together over many prompts"
            )
    return list(values.values())


def digest(batch: Batch | RunPlan) -> str:
    """What tells a batch from others, 16 characters."""
    return hashlib.sha256(repr((batch.ids, batch.mask)).encode()).hexdigest()[:16]


def save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write a safetensors file: it appears whole or not at all. tensors: of any shapes, on the
    CPU."""
    part = path.with_suffix(".part")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part)
    os.replace(part, path)
