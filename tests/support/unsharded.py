"""What the unsharded model gives, by plain torch: what sharded ones are compared with. What is
returned is kept for other tests: leave it as it is."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from tests.support import models, reference
from tests.support.edits import Case, by_hand

__all__ = ["activations", "by_itself", "generated", "gradients", "logits", "model", "parameters"]

Rows = Sequence[Sequence[int]]


def kept(function: Callable) -> Callable:
    """functools.cache for functions whose second argument is rows."""
    cached = functools.cache(function)

    @functools.wraps(function)
    def call(folder: Path, rows: Rows, *args: Any, **kwargs: Any) -> Any:
        return cached(folder, tuple(map(tuple, rows)), *args, **kwargs)

    return call


@functools.cache
def model(folder: Path, attn: str = "sdpa") -> torch.nn.Module:
    """The model itself, for what hooks it no more than for one forward."""
    return reference.load(folder, attn=attn)


@kept
def activations(folder: Path, rows: Rows) -> reference.Reference:
    return reference.reference(folder, **models.padded(rows))


@kept
def logits(folder: Path, rows: Rows, case: Case | None = None) -> torch.Tensor:
    """(B, S, vocabulary), after this edit by a plain torch hook."""
    edited = reference.load(folder)
    if case is not None:
        by_hand(edited, case)
    with torch.no_grad():
        return edited(**models.padded(rows), use_cache=False).logits


@kept
def gradients(
    folder: Path, rows: Rows, loss: Callable, *, attn: str = "sdpa", case: Case | None = None
) -> reference.Gradients:
    edited = reference.load(folder, attn=attn)
    if case is not None:
        by_hand(edited, case)
    return reference.gradients(edited, models.padded(rows), loss)


@functools.cache
def parameters(arch: str, vocab: int = 256) -> dict[str, torch.Tensor]:
    """Every parameter and buffer, tied ones under each name."""
    built = models.build(arch, vocab)
    named = (*built.named_parameters(remove_duplicate=False), *built.named_buffers())
    return {name: tensor.detach() for name, tensor in named}


@kept
def generated(
    folder: Path, rows: Rows, new: int, ends: tuple[int, ...] | None = None, attn: str = "sdpa"
) -> list[list[int]]:
    """What the model's own generate adds to each row, run by itself."""
    ends_at = list(ends or ()) or None
    return [by_itself(model(folder, attn), row, new, eos_token_id=ends_at) for row in rows]


def by_itself(model: torch.nn.Module, row: Sequence[int], new: int, **options: Any) -> list[int]:
    """The tokens that the model's own, greedy generate adds to one row."""
    ids = torch.tensor([list(row)])
    how = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0, **options}
    return model.generate(ids, max_new_tokens=new, **how)[0, len(row) :].tolist()
