"""Rows: what is measured, against what, and the goal. `make bench` measures them all, in this
order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from . import control, edits, flatness, generation, moves, pictures, reads, rivals, scale
from .lab import Lab
from .timing import Figure

__all__ = ["ROWS", "Row"]


@dataclass(frozen=True)
class Row:
    """name: how it is asked for. why: what is to be known of its figures, or why a goal cannot be
    reached here."""

    name: str
    what: str
    against: str
    goal: str
    measure: Callable[[Lab], list[Figure]]
    why: str = ""


ROWS = [
    Row(
        "reads",
        "forward with reads on every layer output and every `gate_proj` (TP 2)",
        "the bare sharded forward",
        "≤ 1.05 ×",
        reads.against_bare,
    ),
    Row(
        "reads-flexmodel",
        "the same reads",
        "FlexModel's all-gather hooks on the same sharded model",
        "≥ 4 × less added time; one whole tensor per host",
        reads.against_flexmodel,
    ),
    Row(
        "move",
        "256 MiB activation, from the hook to a tensor in the notebook, same host",
        "ipyparallel pull of the same ndarray",
        "≥ 20 × the MB/s warm; `.tensor()` itself ≤ 2 ms",
        moves.here,
    ),
    Row(
        "edit",
        "gathered edit on a sharded activation, ≥ 16 MB",
        "FlexModel's edit on the same model",
        "≥ 1.5 × less added time",
        edits.gathered,
    ),
    Row(
        "control",
        "`session.run` of a tiny model, 2 engines, one hook",
        "an empty `apply` on the same engines + the bare forward",
        "≤ 1.5 ×",
        control.round_trip,
    ),
    Row(
        "generate",
        "generate 64 tokens with all layer outputs captured (SmolLM2, PP 2)",
        "generate without hooks",
        "≥ 0.85 of the tokens/s",
        generation.with_captures,
    ),
    Row(
        "picture",
        "first picture of a 4096×16384 sharded activation",
        "FigureWidget (1,390 MB, 145 s when the whole was tried)",
        "≤ 0.4 MB sent, ≤ 0.5 s; a zoom ≤ 50 ms beyond the reduction",
        pictures.first,
    ),
    Row(
        "ten-views",
        "ten small views in one notebook",
        "ten FigureWidgets",
        "≤ 1 MB, ≤ 2 s",
        pictures.ten,
    ),
    Row(
        "slice",
        "256 KiB slice, same host · other host while the engine computes",
        "`apply_sync` round trip",
        "≤ 0.1 ms · ≤ 1 ms p50",
        moves.slices,
        "With both engines computing two cores leave none to the notebook, which stands in for "
        "another host: from one "
        "try to the next the median was 0.8 or 8 ms, by which core the kernel wakes the serving "
        "thread on. Idle is "
        "what the channel takes.",
    ),
    Row(
        "move-far",
        "the 256 MiB from another host (loopback TCP stands in)",
        "ipyparallel pull; raw zmq",
        "≥ 3 × pull; ≥ 0.8 of raw zmq",
        moves.from_far,
        "Where raw zmq is not three times as fast as pull, no channel over it is much more: of a "
        "chunk the kernel "
        "copies its bytes into and out of the socket, this process into their place.",
    ),
    Row(
        "one-process",
        "every layer's output of one forward, in one process, as tensors in the notebook",
        "nnsight; torch hooks; `output_hidden_states=True`; the bare forward",
        "no slower than nnsight",
        rivals.one_process,
    ),
    Row(
        "recompute",
        "32 tokens after 96 with every layer kept (SmolLM2, one process)",
        "recomputing without a KV cache, `output_hidden_states=True`",
        "more tokens/s, fewer bytes",
        generation.against_recomputing,
    ),
    Row(
        "flat",
        "1,000 runs of the same cell in a real kernel, the cell ending in `run`",
        "after the first 50",
        "memory ± 20 MB, slabs, descriptors, threads flat",
        flatness.thousand,
    ),
    Row(
        "engines",
        "engines 1 → 16",
        "an empty `apply`",
        "control cost per run grows no faster (SCALE.md)",
        scale.engines,
    ),
]
