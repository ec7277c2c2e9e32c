"""Generation: new tokens with every layer captured, beside none, and beside recomputing all of it
for each token."""

from __future__ import annotations

import time
from typing import Any

import torch

from .lab import Lab
from .reads import constant
from .timing import Figure, in_turns, of

__all__ = ["against_recomputing", "with_captures"]

LAYERS = "model.layers.*"
NEVER = 10**6  # an id that no model has: no row ends early
PROMPT = [3 + i % 200 for i in range(96)]


def with_captures(lab: Lab) -> list[Figure]:
    """64 tokens of the real model over two stages, with all layer outputs kept, and without
    hooks."""
    session, new = lab.session(lab.real(), pp=2), 8 if lab.quick else 64

    def generate(hooked: bool) -> float:
        if hooked:
            session.hook(LAYERS)
        begin = time.perf_counter()
        run = session.generate([PROMPT[:8]], max_new_tokens=new, eos_token_id=NEVER)
        seconds = time.perf_counter() - begin
        assert run.forwards == new and len(run) == hooked * layers_of(session)
        run.free()
        session.unhook()
        return seconds

    times = in_turns(
        {"captured": lambda: generate(True), "bare": lambda: generate(False)},
        max(lab.repeats // 2, 2),
    )
    return [
        Figure(
            "tokens/s with captures / without",
            of(times, lambda a, b: b / a, "captured", "bare"),
            at_least=0.85,
        ),
        Figure("with", of(times, lambda a: new / a, "captured"), "tokens/s"),
        Figure("without", of(times, lambda a: new / a, "bare"), "tokens/s"),
    ]


def layers_of(session: Any) -> int:
    return sum(
        name.count(".") == 2 and name.startswith("model.layers.")
        for name in session.loaded.info.names
    )


def against_recomputing(lab: Lab) -> list[Figure]:
    """In one process: every layer at every step, by a cached generation with hooks; and as tools
    do that know no cache, by a whole forward for each token with output_hidden_states=True."""
    session, new = lab.session(lab.real(), n=1), 4 if lab.quick else 32
    model = session.engines.runtime.model
    session.hook(LAYERS)
    held: dict[str, int] = {}
    texts: dict[str, list[int]] = {}

    def ours() -> None:
        run = session.generate([PROMPT], max_new_tokens=new, eos_token_id=NEVER)
        held["ours"], texts["ours"] = sum(capture.num_bytes for capture in run), run.new_ids[0]
        run.free()

    @torch.no_grad()
    def recompute() -> None:
        ids, kept = torch.tensor([PROMPT]), []
        for _ in range(new):
            out = model(input_ids=ids, use_cache=False, output_hidden_states=True)
            kept.append(out.hidden_states[1:])
            ids = torch.cat([ids, out.logits[:, -1].argmax(-1, keepdim=True)], 1)
        held["theirs"] = sum(state.nbytes for states in kept for state in states)
        texts["theirs"] = ids[0, len(PROMPT) :].tolist()

    times = in_turns({"ours": ours, "recomputed": recompute}, 2, warm=0 if not lab.quick else 1)
    assert texts["ours"] == texts["theirs"] and len(texts["ours"]) == new, (
        "both made the same tokens"
    )
    return [
        Figure(
            "tokens/s, ours / recomputing",
            of(times, lambda a, b: b / a, "ours", "recomputed"),
            at_least=1,
        ),
        Figure(
            "bytes kept, recomputing / ours", constant(held["theirs"] / held["ours"]), at_least=1
        ),
        Figure("ours", of(times, lambda a: new / a, "ours"), "tokens/s"),
        Figure("ours keeps", constant(held["ours"] / 1e6), "MB"),
    ]
