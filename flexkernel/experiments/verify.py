"""Verify: a small input through the sharded model and through the unsharded one, compared module
by module.

The sharded model's values are captured as any hook captures them. One engine runs the unsharded
model with plain hooks and writes the same values beside them, layer by layer where it would not
fit.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from flexkernel.errors import HookError, LoadError, PlacementError, PromptError
from flexkernel.memory.drift import drift, real_part
from flexkernel.memory.plan import Entry, Plan
from flexkernel.memory.pool import Extent
from flexkernel.names import display_name
from flexkernel.session.capture import Capture, Location, Value
from flexkernel.session.progress import Progress, reporting
from flexkernel.session.prompts import Prompts
from flexkernel.session.run import Run
from flexkernel.session.store import Store
from flexkernel.wire import CaptureKey, HookSpec, ModelInfo, Region, ShardRecord, Unsharded

from .verification import Compared, Verification

if TYPE_CHECKING:
    from flexkernel.session.session import Session

__all__ = ["verify"]

GROUP = "(verify)"
# of the rows, at least: uneven, so that there are pads; three, which no degree of 2 divides
LENGTHS = (4, 9, 6)
TOLERANCE = {"float64": 1e-10, "float32": 1e-4}
# in half precision: how many times the unsharded model's own drift from float32 is still the same
# model
BEYOND = 4.0
REPORTED = 32  # captures between two reports of progress


def verify(
    session: Session,
    prompt: Prompts | None = None,
    hooks: str | Sequence[str] | None = None,
    stream: bool | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Compare the loaded model with the unsharded one; see Session.verify. LoadError: there is no
    unsharded one to compare with."""
    info = session.loaded.info
    if not info.scan:
        raise LoadError(
            f"{info.path} was loaded without reference=, which builds what it is verified against"
        )
    specs = specs_of(info, session.loaded.planner.targets, hooks)
    with reporting(session.bar, progress, "verify", "value") as report:
        with session.hooked(*specs):
            run = run_sharded(session, prompt, report)
        try:
            verification = compare(session, run, specs, stream, report)
        finally:
            run.free()
    remember(session.store, verification)
    return verification


def run_sharded(session: Session, prompt: Prompts, report: Progress) -> Run:
    """The sharded model's run of the user's rows, or of ours; with rows of one length for a model
    that takes no pads."""
    report("running the sharded model", 0, 1)
    if prompt is not None:
        return session.run(prompt, groups=GROUP)
    rows = sample(session.loaded.info)
    try:
        return session.run(rows, groups=GROUP)
    except PromptError:
        longest = max(rows, key=len)
        return session.run([longest[i:] + longest[:i] for i in range(len(rows))], groups=GROUP)


def sample(info: ModelInfo) -> list[list[int]]:
    """A few short rows, of ids that any vocabulary has. The longest is a multiple of tp: what
    splits the sequence over it needs that, and a rank may die of a length that does not."""
    size = min(info.vocab_size or 32, 32_000)
    generator = torch.Generator().manual_seed(0)
    tp = info.layout.tp
    longest = max(LENGTHS)
    fitting = -(-longest // tp) * tp
    return [
        torch.randint(size // 16, size, (length,), generator=generator).tolist()
        for length in (fitting if length == longest else length for length in LENGTHS)
    ]


def specs_of(
    info: ModelInfo, targets: Callable[[str], Sequence[str]], globs: str | Sequence[str] | None
) -> tuple[HookSpec, ...]:
    """Hooks that read every module's inputs and outputs and every point inside attention, or those
    of these globs.

    HookError: a glob that names no module."""
    if isinstance(globs, str):
        globs = [globs]
    if globs is None:
        globs = ["", "**"]
        if any(".@" in name for name in info.names):
            globs.append("**.@*")
    specs = []
    for glob in globs:
        targets(glob)
        is_point = glob.rpartition(".")[2].startswith("@")
        for at in ("input", "output")[is_point:]:
            specs.append(HookSpec(glob, at, name=f"{GROUP} {glob} {at}", groups=(GROUP,)))
    return tuple(specs)


# --- comparing ------------------------------------------------------------------------


@dataclass(frozen=True)
class Truth:
    """What the unsharded model has in the places of a plan.

    answer: of the engine that ran it. captures: key → what it wrote."""

    where: Plan
    answer: Unsharded
    captures: dict[CaptureKey, Capture]

    def turns(self) -> dict[CaptureKey, int]:
        """Key → when its value came, in the order of the forward."""
        return {self.where.entries[i].key: turn for turn, i in enumerate(self.answer.order)}


def compare(
    session: Session,
    run: Run,
    specs: tuple[HookSpec, ...],
    stream: bool | None,
    report: Progress,
) -> Verification:
    """The captures of a run against those of the unsharded model, run on rank 0."""
    info = session.loaded.info
    store = session.store
    batch = run.plan
    where = session.loaded.planner.plan(specs, len(batch.ids), len(batch.ids[0]))
    report("running the unsharded model", 0, len(where.entries))
    with store.room(where.num_bytes, "verifying") as extent:
        region = Region(extent.slab, extent.base, (), info.dtype)
        answer: Unsharded = session.call(
            "verify.unsharded",
            specs,
            batch.ids,
            batch.mask,
            batch.positions,
            region,
            extent.slab_bytes,
            stream,
            some_parameters(info),
            ranks=[0],
        )[0]
        captures = {entry.key: capture_of(where, entry, extent, store) for entry in where.entries}
        truth = Truth(where, answer, captures)
        verification = compared(info, run, truth, report)
    store.pool.release(extent)
    verification.streamed = answer.streamed
    verification.shapes_only = has_other_weights(session, answer.samples)
    return verification


def capture_of(where: Plan, entry: Entry, extent: Extent, store: Store) -> Capture:
    """What rank 0 has written for an entry of the plan."""
    region = where.region(entry, extent.slab, extent.base)
    of = Value(entry.key, entry.shape, getattr(torch, entry.formula.dtype))
    return Capture(of, Location(store, region, extent), {0: ShardRecord("unsharded", "whole")})


def compared(info: ModelInfo, run: Run, truth: Truth, report: Progress) -> Verification:
    """The captures of a run against the truth, in the order of its forward."""
    turns = truth.turns()
    entries = {entry.key: (i, entry) for i, entry in enumerate(truth.where.entries)}
    mask = torch.tensor(run.plan.mask).bool()
    rows: list[Compared] = []
    refused: dict[str, str] = {}
    skipped = {display_name(name): "it never fires in a forward" for name in truth.where.silent}
    for number, capture in enumerate(sorted(run, key=lambda c: turns.get(c.key, math.inf))):
        if number % REPORTED == 0:
            report("comparing", number, len(run))
        key = capture.key
        capture.verified = False  # here it says how it is known otherwise
        if capture.error is not None:
            refused[str(key)] = str(capture.error)
        elif key not in entries:
            skipped[str(key)] = "its shape or its order of rows depends on the data"
        elif entries[key][0] in truth.answer.failed or key not in turns:
            why = truth.answer.failed.get(entries[key][0])
            skipped[str(key)] = why or "the unsharded model has no such value"
        else:
            i, entry = entries[key]
            real = real_part(entry.formula, mask)
            apart = drift(capture.tensor(), truth.captures[key].tensor(), real)
            yardstick = truth.answer.yardstick.get(i)
            limit = tolerance(info.dtype, yardstick)
            rows.append(Compared(key, apart, limit, capture.evidence, capture.placement, yardstick))
    report("compared", len(run), len(run))
    return Verification(info, rows, refused, skipped)


def tolerance(dtype: str, yardstick: float | None) -> float:
    """How much drift is still the same model. In half precision: some times what the dtype itself
    costs."""
    if dtype in TOLERANCE:
        return TOLERANCE[dtype]
    return max(BEYOND * (yardstick or 0.0), 4 * torch.finfo(getattr(torch, dtype)).eps)


def remember(store: Store, verification: Verification) -> None:
    """Later captures of what is equal have the evidence "verified"; of what is not, no more."""
    for row in verification.rows:
        place = (row.key.module, row.key.at, row.key.index)
        store.verified.discard(place)
        if row.ok and not verification.shapes_only:
            store.verified.add(place)


# --- is it the same model? ------------------------------------------------------------


def some_parameters(info: ModelInfo) -> list[str]:
    """Of a model that the user built, a few weights that tell whether reference() has the same
    ones."""
    if not info.built:
        return []
    names = [name for name, shape in info.parameters.items() if len(shape) > 1]
    return list(dict.fromkeys([*names[:1], *names[len(names) // 2 :][:1], *names[-1:]]))


def has_other_weights(session: Session, samples: dict[str, list[float]]) -> bool:
    """Whether none of these parameters has the numbers of the loaded model's, of those that can be
    read whole."""
    same = []
    for name, numbers in samples.items():
        with contextlib.suppress(PlacementError, HookError):  # it cannot be read: it says nothing
            whole = session.parameter(name)
            flat = whole.tensor().flatten()
            few = flat[:: max(1, flat.numel() // 64)].float()
            same.append(torch.allclose(few, torch.tensor(numbers), rtol=1e-2, atol=1e-6))
            whole.free()
    return bool(same) and not any(same)
