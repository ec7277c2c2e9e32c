"""Verification: what a comparison with the unsharded model came to."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from flexkernel.views.table import Table
from flexkernel.wire import CaptureKey, ModelInfo

__all__ = ["Compared", "Verification"]

SHOWN = 12  # rows of the table in a repr
MOST_REASONS = 3  # in a sentence about what was left out


@dataclass(frozen=True)
class Compared:
    """One value: its drift from the unsharded model's, how much would be too much, and how its
    placement is known.

    yardstick: in half precision, the unsharded model's own drift from float32."""

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

    def __str__(self) -> str:
        return f"{self.drift:.1e} at {self.name}"


class Verification:
    """What a comparison with the unsharded model came to.

    rows: in the order of the forward. refused: capture → why it has no value. skipped: what was
    not compared → why. ok: everything that was compared is equal. first: the first that is not;
    worst: the one that drifts most. streamed: the unsharded model ran one layer at a time.
    shapes_only: it has other weights."""

    def __init__(
        self,
        info: ModelInfo,
        rows: Sequence[Compared],
        refused: dict[str, str],
        skipped: dict[str, str],
    ):
        self.info = info
        self.rows = tuple(rows)
        self.refused = refused
        self.skipped = skipped
        self.streamed = False
        self.shapes_only = False

    @property
    def ok(self) -> bool:
        return bool(self.rows) and not self.diverging and not self.shapes_only

    @property
    def diverging(self) -> list[Compared]:
        """The rows that differ, in the order of the forward."""
        if self.shapes_only:
            return []
        return [row for row in self.rows if not row.ok]

    @property
    def first(self) -> Compared | None:
        return next(iter(self.diverging), None)

    @property
    def worst(self) -> Compared | None:
        return max(self.rows, key=lambda row: (math.isnan(row.drift), row.drift), default=None)

    @property
    def ratio(self) -> float | None:
        """In half precision: the largest drift as a multiple of the unsharded model's own drift
        from float32."""
        ratios = [row.drift / row.yardstick for row in self.rows if row.yardstick]
        return max(ratios, default=None)

    def __len__(self) -> int:
        return len(self.rows)

    # --- in sentences -----------------------------------------------------------------

    def sentences(self) -> list[str]:
        """What was compared, what differs, what could not be compared."""
        sentences = [self._result()]
        if self.ratio is not None and not self.shapes_only:
            sentences.append(
                f"at most {self.ratio:.2f} × what the unsharded model in {self.info.dtype} drifts "
                "from float32"
            )
        for kind, reasons in (("refused", self.refused), ("not compared", self.skipped)):
            if reasons:
                sentences.append(f"{len(reasons)} {kind}: {few(reasons)}")
        return sentences

    def _result(self) -> str:
        model = f"{self.info.cls} ({self.info.layout}, {self.info.dtype})"
        how = ", which ran one layer at a time" if self.streamed else ""
        if self.shapes_only:
            return (
                f"{model}: {len(self)} values have the unsharded model's shapes. reference() "
                "builds a model with other weights than the loaded one, so that only shapes could "
                "be compared: let it load the weights"
            )
        if not self.rows:
            return f"{model}: nothing could be compared with the unsharded model"
        if self.first is None:
            return (
                f"{model}: {len(self)} values equal the unsharded model's{how}; worst drift "
                f"{self.worst}"
            )
        return (
            f"{model} DIVERGES from the unsharded model{how}, first at {self.first.name}: drift "
            f"{self.first.drift:.1e}, tolerance {self.first.tolerance:.1e}; "
            f"{len(self.diverging)} of {len(self)} values do; worst {self.worst}"
        )

    # --- as a table -------------------------------------------------------------------

    def table(self) -> list[tuple[str, ...]]:
        """Values alike but for a number in their name are one row, with the largest of their
        drifts. What diverges comes first."""
        kinds: dict[tuple, list[Compared]] = {}
        for row in self.rows:
            kind = re.sub(r"\d+", "#", row.name), row.ok, row.evidence
            kinds.setdefault(kind, []).append(row)
        cells = [self._line(name, rows) for (name, _, _), rows in kinds.items()]
        return sorted(cells, key=lambda cell: "DIVERGES" not in cell[2])

    def _line(self, kind: str, rows: Sequence[Compared]) -> tuple[str, ...]:
        worst = max(rows, key=lambda row: row.drift)
        yardstick = max(row.yardstick or 0.0 for row in rows)
        drift = f"{worst.drift:.1e}"
        if not worst.ok and not self.shapes_only:
            drift += " DIVERGES"
        return (
            kind if len(rows) > 1 else worst.name,
            str(len(rows)),
            drift,
            f"{yardstick:.1e}" if yardstick else "",
            f"{worst.placement} by {worst.evidence}",
        )

    def __repr__(self) -> str:
        rows = self.table()
        lines = self.sentences()
        if rows:
            lines.append(Table(rows[:SHOWN], right=(1,)).text("  "))
        if len(rows) > SHOWN:
            lines.append(f"  ... and {len(rows) - SHOWN} more kinds of values")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        title, *rest = (html.escape(sentence) for sentence in self.sentences())
        color = opened = ""
        if not self.ok:
            color = "color:#c22"
            opened = " open"
        yardstick = f"{self.info.dtype} from float32" if self.ratio else ""
        head = ("value", "n", "worst drift", yardstick, "placement")
        table = Table(self.table(), head, right=(1,)).html()
        paragraphs = "".join(f"<p>{text}</p>" for text in rest)
        return (
            f'<div><b style="{color}">{title}</b>{paragraphs}'
            f"<details{opened}><summary>{len(self)} values</summary>"
            f"{table}</details></div>"
        )


def few(reasons: dict[str, str]) -> str:
    """Some of what was left out, each reason once. reasons: name → why."""
    names: dict[str, list[str]] = {}
    for name, why in reasons.items():
        names.setdefault(why.removeprefix(f"{name}: "), []).append(name)
    texts = []
    for why, (first, *others) in names.items():
        if others:
            first += f" and {len(others)} more"
        texts.append(f"{first} ({why})")
    if len(texts) > MOST_REASONS:
        texts[MOST_REASONS:] = ["..."]
    return "; ".join(texts)
