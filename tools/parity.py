"""Parity: every module's input and output, captured whole from a sharded model, against the
unsharded one.

`python -m tools.parity` prints the table for all layouts; tests/layouts/test_parity.py runs the
same and asserts.
"""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from tests.support import models, reference

TOLERANCE = 1e-4  # of the tensor's scale
# longer than any sliding window here
BATCHES = {"one row": [7], "three left-padded rows": [4, 9, 6], "long": [40]}
POINTS = ("q", "k", "v", "pattern", "z")


@dataclasses.dataclass
class Row:
    """What one architecture under one layout came to. refused: capture → its error. worst:
    (relative error, where)."""

    arch: str
    layout: str
    attn: str
    compared: int = 0
    skipped: list[str] = dataclasses.field(default_factory=list)
    refused: dict[str, str] = dataclasses.field(default_factory=dict)
    wrong: list[str] = dataclasses.field(default_factory=list)
    evidence: Counter = dataclasses.field(default_factory=Counter)
    worst: tuple[float, str] = (0.0, "")

    def __str__(self) -> str:
        kinds = ", ".join(f"{kind} {n}" for kind, n in sorted(self.evidence.items()))
        return (
            f"{self.arch:<14} {self.layout:<16} {self.attn:<6} {self.compared:>6} "
            f"{len(self.refused):>8} "
            f"{len(self.skipped):>8} {len(self.wrong):>6} {self.worst[0]:>9.1e}  {kinds}"
        )


HEAD = (
    "model          layout           attn   compared  refused  skipped  wrong     worst  evidence"
)


def hook_everything(session: Any, points: bool = True) -> None:
    """Every module's output and input, the root's too, and the inside of attention."""
    for at in ("output", "input"):
        session.hook("**", at=at)
        session.hook("", at=at)
    if points:
        for point in POINTS:
            session.hook(f"**.@{point}")


def compare(
    session: Any, ref_model: torch.nn.Module, row: Row, lengths: list[int], points: bool = True
) -> None:
    """One run of everything against the reference of the same batch; the findings go into the
    row."""
    batch = models.ids_and_mask(
        lengths,
        vocab=session.loaded.info.vocab_size if session.loaded.info.vocab_size < 300 else 40000,
    )
    run = session.run(models.rows(batch))
    for name, ours in (("attention_mask", run.plan.mask), ("position_ids", run.plan.positions)):
        assert torch.equal(torch.tensor(ours), batch[name]), f"the same {name}"
    # with our id on pads
    ref = reference.reference(ref_model, **{**batch, "input_ids": torch.tensor(run.plan.ids)})
    pads = ~batch["attention_mask"].bool()
    for at, values in (("output", ref.outputs), ("input", ref.inputs)):
        for (name, call, path), truth in first_leaves(values).items():
            check(run, (name, at, path, call), truth, row, lengths)
    for (name, point), truth in ref.attention.items() if points else ():
        check_point(run, name, point, truth, row, pads)
    run.free()


def first_leaves(values: dict) -> dict:
    """The first tensor of each value, as a hook without an index takes it."""
    found: dict[tuple[str, int], tuple] = {}
    for key in values:
        found.setdefault(key[:2], key)
    return {key: values[key] for key in found.values()}


def check(run: Any, where: tuple, truth: torch.Tensor, row: Row, lengths: list[int]) -> None:
    label = f"{where} {lengths}"
    if where not in run:
        row.skipped.append(label)
        return
    capture = run[where]
    if capture.error is not None:
        row.refused[str(where[:3])] = f"{type(capture.error).__name__}: {capture.error}"
        return
    judge(row, label, capture.tensor(), truth, capture)


def check_point(
    run: Any, name: str, point: str, truth: torch.Tensor, row: Row, pads: torch.Tensor
) -> None:
    where = f"{name}.@{point}"
    if where not in run:
        row.skipped.append(where)
        return
    capture = run[where]
    if capture.error is not None:
        row.refused[where] = f"{type(capture.error).__name__}: {capture.error}"
        return
    got = capture.tensor()
    if point == "pattern":  # rows of pads mean nothing
        got = got.masked_fill(pads[:, None, :, None], 0.0)
        truth = truth.masked_fill(pads[:, None, :, None], 0.0)
    judge(row, where, got, truth, capture)


def judge(row: Row, label: str, got: torch.Tensor, truth: torch.Tensor, capture: Any) -> None:
    row.compared += 1
    row.evidence[capture.evidence] += 1
    if got.shape != truth.shape or got.dtype != truth.dtype:
        row.wrong.append(
            f"{label}: {tuple(got.shape)} {got.dtype} is not {tuple(truth.shape)} {truth.dtype}"
        )
        return
    if not truth.is_floating_point():
        if not torch.equal(got, truth):
            row.wrong.append(f"{label}: integers differ")
        return
    scale = truth.abs().max().item() or 1.0
    error = (got - truth).abs().max().item() / scale
    if not error <= TOLERANCE:  # NaN too
        row.wrong.append(f"{label}: error {error:.1e}")
    row.worst = max(row.worst, (error, label))


def measure(
    session: Any, arch: str, path: Path, attn: str, layout: dict[str, int], batches=BATCHES
) -> Row:
    """Load, hook everything, compare on each batch."""
    session.load(path, attn=attn, **layout)
    row = Row(arch, " × ".join(f"{k} {v}" for k, v in layout.items()) or "one engine", attn)
    hook_everything(session)
    ref_model = reference.load(path, attn=attn)
    for lengths in batches.values():
        compare(session, ref_model, row, lengths)
    return row


def main() -> None:
    import tempfile

    import flexkernel as fk
    from flexkernel.notebook import demo

    folder = Path(tempfile.gettempdir()) / "flexkernel-tiny"
    plans = {
        1: [("llama", {}), ("mixtral", {}), ("gpt2", {}), ("gemma2", {})],
        2: [
            *(
                (a, d)
                for a in ("llama", "qwen3", "mixtral", "mistral")
                for d in ({"tp": 2}, {"pp": 2}, {"fsdp": 2})
            ),
            ("llama", {"dp": 2}),
            ("gpt2", {"fsdp": 2}),
            *(("SmolLM2", {k: 2}) for k in ("pp", "fsdp", "dp")),
        ],
        3: [("SmolLM2", {"tp": 3})],
        4: [
            *((a, {"tp": 2, "fsdp": 2}) for a in ("llama", "qwen3", "mixtral")),
            *(
                ("llama", d)
                for d in (
                    {"tp": 2, "pp": 2},
                    {"pp": 2, "fsdp": 2},
                    {"pp": 2, "dp": 2},
                    {"tp": 2, "dp": 2},
                )
            ),
        ],
        6: [("SmolLM2", {"tp": 3, "pp": 2})],
    }
    sizes = [int(a) for a in sys.argv[1:]] or list(plans)
    print(HEAD, flush=True)
    for world in sizes:
        with fk.local() if world == 1 else fk.start(world) as session:
            for arch, layout in plans[world]:
                path = demo.model() if arch == "SmolLM2" else models.tiny(arch, folder)
                for attn in ("sdpa", "eager") if arch != "gemma2" else ("eager",):
                    row = measure(session, arch, path, attn, layout)
                    print(row, flush=True)
                    for line in [*row.wrong[:5], *row.skipped[:5], *list(row.refused.items())[:6]]:
                        print("   ", line, flush=True)


if __name__ == "__main__":
    main()
