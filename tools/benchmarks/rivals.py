"""Rivals: other ways to look inside a model that is in one process, beside ours there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import opponents, ranks
from .lab import Lab
from .reads import TURNS, milliseconds, ratio
from .timing import Figure, in_turns, of

__all__ = ["one_process"]

LAYERS = "model.layers.*"


def one_process(lab: Lab) -> list[Figure]:
    """Every layer's output of one forward, in one process: ours, torch's hooks,
    output_hidden_states=True, nnsight."""
    session = lab.session(lab.tiny("llama_deep"), n=1)
    runtime = session.engines.runtime
    B, S = (1, 16) if lab.quick else (4, 128)
    rows = [[3 + (7 * b + s) % 250 for s in range(S)] for b in range(B)]
    num_layers = runtime.model.config.num_hidden_layers
    batch, seen = ranks.batch_of(rows), {}

    def ours() -> None:
        run = session.run(rows)
        seen["ours"] = [capture.tensor() for capture in run]
        run.free()

    def hooked() -> None:
        kept: list[torch.Tensor] = []
        handles = [
            layer.register_forward_hook(
                lambda _m, _a, out: kept.append(ranks.leaf(out).detach().clone())
            )
            for layer in runtime.model.model.layers
        ]
        try:
            forward()
        finally:
            for handle in handles:
                handle.remove()
        seen["torch hooks"] = kept

    @torch.no_grad()
    def forward(**more: Any) -> Any:
        return runtime.model(**batch, use_cache=False, **more)

    def hidden_states() -> None:
        seen["output_hidden_states"] = list(forward(output_hidden_states=True).hidden_states[1:])

    session.hook(LAYERS)
    traced = nnsight_of(runtime.model, batch, num_layers, seen)
    ways = {"bare": forward, "ours": ours, "torch hooks": hooked}
    times = in_turns(
        {**ways, "output_hidden_states": hidden_states, "nnsight": traced}, TURNS * lab.repeats
    )
    check(seen, num_layers)
    names = ("ours", "torch hooks", "output_hidden_states", "nnsight")
    return [
        Figure("nnsight / ours", of(times, ratio, "nnsight", "ours"), at_least=1),
        *(Figure(f"{name} / bare", of(times, ratio, name, "bare")) for name in names),
        Figure("bare", milliseconds(times["bare"]), "ms"),
    ]


def nnsight_of(
    model: Any, batch: dict[str, torch.Tensor], num_layers: int, seen: dict
) -> Callable[[], None]:
    """A trace of nnsight's that saves every layer's output."""
    opponents.folder()
    import nnsight

    wrapped = nnsight.NNsight(model)

    @torch.no_grad()
    def traced() -> None:
        with wrapped.trace(**batch, use_cache=False):
            outs = nnsight.save([wrapped.model.layers[i].output for i in range(num_layers)])
        seen["nnsight"] = [ranks.leaf(out) for out in outs]

    return traced


def check(seen: dict[str, list[torch.Tensor]], num_layers: int) -> None:
    """All have seen the same, but for output_hidden_states, whose last one is after the final
    norm."""
    assert len(seen) == 4
    for name, found in seen.items():
        assert len(found) == num_layers, f"{name} kept {len(found)} of {num_layers} layers"
        for mine, other in zip(seen["ours"][:-1], found[:-1], strict=True):
            torch.testing.assert_close(other, mine, atol=1e-4, rtol=1e-4)
