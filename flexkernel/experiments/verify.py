"""Verify: a small input through the sharded model and through the unsharded one, compared module
by module.

The sharded model's values are captured as any hook captures them. One engine runs the unsharded
model with plain hooks and writes the same values beside them, layer by layer where it would not
fit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import html
import math
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from flexkernel.errors import HookError, LoadError, PlacementError, PromptError
from flexkernel.memory.drift import drift, real_part
from flexkernel.memory.plan import Entry, Plan
from flexkernel.memory.pool import Extent
from flexkernel.names import display_name
from flexkernel.session.capture import Capture, Location, Value
from flexkernel.session.progress import Progress, reporting
from flexkernel.session.run import Run
from flexkernel.session.store import Store
from flexkernel.views.table import Table
from flexkernel.wire import CaptureKey, HookSpec, ModelInfo, Region, ShardRecord, Unsharded

if TYPE_CHECKING:
    from flexkernel.session.session import Session

__all__ = ["Verification", "verify"]

GROUP = "(verify)"
# of the rows, at least: uneven, so that there are pads; three, which no degree of 2 divides
LENGTHS = (4, 9, 6)
TOLERANCE = {"float64": 1e-10, "float32": 1e-4}
# in half precision: how many times the unsharded model's own drift from float32 is still the same
# model
BEYOND = 4.0
SHOWN = 12  # rows of the table in a repr


@dataclasses.dataclass(frozen=True)
class Row:
    """One value: its drift from the unsharded model's, how much would be too much, and how its
    placement is known."""

    key: CaptureKey
    drift: float
    tolerance: float
    evidence: str
    placement: str
    yardstick: float | None = None

    @property
    def name(self) -> str:
        return str(self.key)

    @property
    def ok(self) -> bool:
        return self.drift <= self.tolerance  # False for NaN too


class Verification:
    """What a comparison with the unsharded model came to.

    rows: in the order of the forward. refused: capture → why it has no value. skipped: what was
    not compared → why. ok: everything that was compared is equal. first: the first that is not;
    worst: the one that drifts most."""

    def __init__(
        self, info: ModelInfo, rows: Sequence[Row], refused: dict[str, str], skipped: dict[str, str]
    ):
        self.info, self.rows, self.refused, self.skipped = info, tuple(rows), refused, skipped
        self.streamed = self.shapes_only = False

    @property
    def ok(self) -> bool:
        return bool(self.rows) and not self.diverging and not self.shapes_only

    @property
    def diverging(self) -> list[Row]:
        """The rows that differ, in the order of the forward."""
        return [] if self.shapes_only else [row for row in self.rows if not row.ok]

    @property
    def first(self) -> Row | None:
        return next(iter(self.diverging), None)

    @property
    def worst(self) -> Row | None:
        return max(self.rows, key=lambda row: (math.isnan(row.drift), row.drift), default=None)

    @property
    def ratio(self) -> float | None:
        """In half precision: the largest drift as a multiple of the unsharded model's own drift
        from float32."""
        found = [row.drift / row.yardstick for row in self.rows if row.yardstick]
        return max(found, default=None)

    def __len__(self) -> int:
        return len(self.rows)

    def says(self) -> list[str]:
        """A few sentences: what was compared, what differs, what could not be compared."""
        info, first, worst = self.info, self.first, self.worst
        model = f"{info.cls} ({info.layout}, {info.dtype})"
        how = ", which ran one layer at a time" if self.streamed else ""
        if self.shapes_only:
            said = [
                f"{model}: {len(self)} values have the unsharded model's shapes. reference() builds a model with other "
                "weights than the loaded one, so that only shapes could be compared: let it load the weights"
            ]
        elif not self.rows or worst is None:
            said = [f"{model}: nothing could be compared with the unsharded model"]
        elif first is None:
            said = [
                f"{model}: {len(self)} values equal the unsharded model's{how}; worst drift {shown(worst)}"
            ]
        else:
            said = [
                f"{model} DIVERGES from the unsharded model{how}, first at {first.name}: drift {first.drift:.1e}, "
                f"tolerance {first.tolerance:.1e}; {len(self.diverging)} of {len(self)} values do; worst {shown(worst)}"
            ]
        if self.ratio is not None and not self.shapes_only:
            said.append(
                f"at most {self.ratio:.2f} × what the unsharded model in {info.dtype} drifts from float32"
            )
        said += [f"{len(found)} {what}: {few(found)}" for what, found in self._left_out() if found]
        return said

    def _left_out(self) -> list[tuple[str, dict[str, str]]]:
        return [("refused", self.refused), ("not compared", self.skipped)]

    def table(self) -> list[tuple[str, ...]]:
        """Values alike but for a number in their name are one row, with the largest of their
        drifts."""
        folded: dict[tuple, list[Row]] = {}
        for row in self.rows:
            folded.setdefault((re.sub(r"\d+", "#", row.name), row.ok, row.evidence), []).append(row)
        cells = []
        for (name, ok, evidence), rows in folded.items():
            most = max(rows, key=lambda row: row.drift)
            yard = max((row.yardstick or 0 for row in rows), default=0)
            cells.append(
                (
                    name if len(rows) > 1 else rows[0].name,
                    str(len(rows)),
                    f"{most.drift:.1e}" + ("" if ok or self.shapes_only else " DIVERGES"),
                    f"{yard:.1e}" if yard else "",
                    f"{most.placement} by {evidence}",
                )
            )
        return sorted(cells, key=lambda cell: "DIVERGES" not in cell[2])

    def __repr__(self) -> str:
        rows = self.table()
        more = [f"  ... and {len(rows) - SHOWN} more kinds of values"] if len(rows) > SHOWN else []
        table = [Table(rows[:SHOWN], right=(1,)).text("  ")] if rows else []
        return "\n".join([*self.says(), *table, *more])

    def _repr_html_(self) -> str:
        esc = html.escape
        title, *rest = self.says()
        color = "" if self.ok else "color:#c22"
        head = (
            "value",
            "n",
            "worst drift",
            f"{self.info.dtype} from float32" if self.ratio else "",
            "placement",
        )
        table = Table(self.table(), head, right=(1,)).html()
        return (
            f'<div><b style="{color}">{esc(title)}</b>'
            + "".join(f"<p>{esc(text)}</p>" for text in rest)
            + f"<details{'' if self.ok else ' open'}><summary>{len(self)} values</summary>"
            + f"{table}</details></div>"
        )


def shown(row: Row) -> str:
    return f"{row.drift:.1e} at {row.name}"


def few(found: dict[str, str], limit: int = 3) -> str:
    """Some of what was left out, each reason once."""
    reasons: dict[str, list[str]] = {}
    for name, why in found.items():
        reasons.setdefault(why.removeprefix(f"{name}: "), []).append(name)
    texts = [
        f"{names[0]}{f' and {len(names) - 1} more' * (len(names) > 1)} ({why})"
        for why, names in reasons.items()
    ]
    return "; ".join(texts[:limit]) + ("; ..." if len(texts) > limit else "")


# --- doing it -------------------------------------------------------------------------


def verify(
    session: Session,
    prompt: Any = None,
    hooks: str | Sequence[str] | None = None,
    stream: bool | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Compare the loaded model with the unsharded one; see Session.verify."""
    with reporting(session.bar, progress, "verify", "value") as report:
        return verified(session, prompt, hooks, stream, report)


def verified(
    session: Session,
    prompt: Any,
    hooks: str | Sequence[str] | None,
    stream: bool | None,
    told: Progress,
) -> Verification:
    info = session.loaded.info
    store = session.store
    if not info.scan:
        raise LoadError(
            f"{info.path} was loaded without reference=, which builds what it is verified against"
        )
    specs = specs_of(info, session.loaded.planner.targets, hooks)
    with session.hooked(*specs):
        run = ran(session, prompt, told)
    try:
        batch = run.plan
        where = session.loaded.planner.plan(specs, len(batch.ids), len(batch.ids[0]))
        told("running the unsharded model", 0, len(where.entries))
        with store.room(where.num_bytes, "verifying") as extent:
            region = Region(extent.slab, extent.base, (), info.dtype)
            asked = (
                specs,
                batch.ids,
                batch.mask,
                batch.positions,
                region,
                extent.slab_bytes,
                stream,
            )
            said: Unsharded = session.call(
                "verify.unsharded", *asked, some_parameters(info), ranks=[0]
            )[0]
            truth = {entry.key: truth_of(where, entry, extent, store) for entry in where.entries}
            found = compared(info, run, where, truth, said, told)
        store.pool.release(extent)
    finally:
        run.free()
    found.streamed, found.shapes_only = said.streamed, others(session, said.samples)
    equal = {
        (row.key.module, row.key.at, row.key.index): row.ok and not found.shapes_only
        for row in found.rows
    }
    store.verified -= {where for where, ok in equal.items() if not ok}
    store.verified |= {where for where, ok in equal.items() if ok}
    return found


def ran(session: Session, prompt: Any, told: Progress) -> Run:
    """The sharded model's run of these rows, or of ours; with rows of one length for a model that
    takes no pads."""
    told("running the sharded model", 0, 1)
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
    tp, generator = info.layout.tp, torch.Generator().manual_seed(0)
    lengths = [-(-length // tp) * tp if length == max(LENGTHS) else length for length in LENGTHS]
    return [
        torch.randint(size // 16, size, (length,), generator=generator).tolist()
        for length in lengths
    ]


def specs_of(
    info: ModelInfo, targets: Callable[[str], Sequence[str]], globs: str | Sequence[str] | None
) -> tuple[HookSpec, ...]:
    """Hooks that read every module's inputs and outputs and every point inside attention, or those
    of these globs.

    HookError: a glob that names no module."""
    if globs is None:
        globs = ["", "**", *(["**.@*"] if any(".@" in name for name in info.names) else [])]
    specs = []
    for glob in [globs] if isinstance(globs, str) else globs:
        targets(glob)
        ats = ("output",) if glob.rpartition(".")[2].startswith("@") else ("input", "output")
        specs += [HookSpec(glob, at, name=f"{GROUP} {glob} {at}", groups=(GROUP,)) for at in ats]
    return tuple(specs)


def truth_of(where: Plan, entry: Entry, extent: Extent, store: Store) -> Capture:
    """What rank 0 has written for an entry of the plan."""
    region = where.region(entry, extent.slab, extent.base)
    of = Value(entry.key, entry.shape, getattr(torch, entry.formula.dtype))
    return Capture(of, Location(store, region, extent), {0: ShardRecord("unsharded", "whole")})


def compared(
    info: ModelInfo,
    run: Run,
    where: Plan,
    truth: dict[CaptureKey, Capture],
    said: Unsharded,
    told: Progress,
) -> Verification:
    """The run's captures against what the unsharded model has in their places, in the order of its
    forward."""
    index = {entry.key: i for i, entry in enumerate(where.entries)}
    turn = {where.entries[i].key: number for number, i in enumerate(said.order)}
    mask = torch.tensor(run.plan.mask).bool()
    rows: list[Row] = []
    refused: dict[str, str] = {}
    skipped = {display_name(name): "it never fires in a forward" for name in where.silent}
    for number, capture in enumerate(sorted(run, key=lambda c: turn.get(c.key, math.inf))):
        key, capture.verified = capture.key, False  # here it says how it is known otherwise
        if number % 32 == 0:
            told("comparing", number, len(run))
        if capture.error is not None:
            refused[str(key)] = str(capture.error)
        elif key not in truth:
            skipped[str(key)] = "its shape or its order of rows depends on the data"
        elif index[key] in said.failed or key not in turn:
            skipped[str(key)] = said.failed.get(index[key], "the unsharded model has no such value")
        else:
            real = real_part(where.entries[index[key]].formula, mask)
            apart = drift(capture.tensor(), truth[key].tensor(), real)
            yardstick = said.yardstick.get(index[key])
            rows.append(
                Row(
                    key,
                    apart,
                    allowed(info, yardstick),
                    capture.evidence,
                    capture.placement,
                    yardstick,
                )
            )
    told("compared", len(run), len(run))
    return Verification(info, rows, refused, skipped)


def allowed(info: ModelInfo, yardstick: float | None) -> float:
    """How much drift is still the same model. In half precision: some times what the dtype itself
    costs."""
    if info.dtype in TOLERANCE:
        return TOLERANCE[info.dtype]
    return max(BEYOND * (yardstick or 0.0), 4 * torch.finfo(getattr(torch, info.dtype)).eps)


# --- is it the same model? ------------------------------------------------------------


def some_parameters(info: ModelInfo) -> list[str]:
    """Of a model that the user built, a few weights that tell whether reference() has the same
    ones."""
    names = (
        [name for name, shape in info.parameters.items() if len(shape) > 1] if info.built else []
    )
    return list(dict.fromkeys(names[i] for i in (0, len(names) // 2, -1))) if names else []


def others(session: Session, samples: dict[str, list[float]]) -> bool:
    """Whether none of these parameters has the numbers of the loaded model's, of those that can be
    read whole."""
    same = []
    for name, numbers in samples.items():
        with contextlib.suppress(PlacementError, HookError):  # it cannot be read: it says nothing
            whole = session.parameter(name)
            flat = whole.tensor().flatten()
            mine = flat[:: max(1, flat.numel() // 64)].float()
            same.append(torch.allclose(mine, torch.tensor(numbers), rtol=1e-2, atol=1e-6))
            whole.free()
    return bool(same) and not any(same)
