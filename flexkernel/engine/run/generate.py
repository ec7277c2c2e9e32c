"""A generation: transformers' own loop on every rank.

A step is one forward: the first runs the prompt, each later one the newest token. A counter on the
root module says which step it is and which positions it runs, never the cache. All ranks make as
many forwards, since each of them may hold collectives.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from flexkernel.engine.compat import StageCache, as_written
from flexkernel.engine.model.part import Part
from flexkernel.engine.place.placements import Place
from flexkernel.engine.runtime import Runtime
from flexkernel.errors import GenerationError
from flexkernel.wire import Generation

from .context import RunContext
from .tokens import TokenStreamer

__all__ = ["StepCounter", "check", "end_tokens", "generate"]


class StepCounter(Protocol):
    """What counts the forwards of a generation. active: the keys of the run's hooks."""

    generation: Generation
    context: RunContext
    active: frozenset[str]

    def begin(self, num_positions: int) -> None:
        """The next forward begins, over that many positions."""


def check(part: Part) -> None:
    """GenerationError: this model cannot generate."""
    name = type(part.model).__name__
    if not (hasattr(part.model, "can_generate") and part.model.can_generate()):
        raise GenerationError(f"{name} has no generate(): it is no language model of transformers")
    if part.info.layout.pp > 1 and not hasattr(part.model, "_pp_stage"):
        raise GenerationError(
            f"{name} is a pipeline of your own: its stages share no cache to go on from"
        )
    if part.caller.forward is not None:
        raise GenerationError(f"{name} is called by your forward=, and its generate() would not be")


def end_tokens(part: Part, generation: Generation) -> list[int]:
    """The tokens that end a row."""
    configured = getattr(part.model.generation_config, "eos_token_id", None)
    tokens = dict(generation.options).get("eos_token_id", configured)
    if tokens is None:
        return []
    if isinstance(tokens, int):
        return [tokens]
    return list(tokens)


def generate(runtime: Runtime, counter: StepCounter, batch: dict[str, torch.Tensor]) -> None:
    """Go on after the batch; the new tokens go to the run's token buffer. All ranks must call, and
    all make as many forwards.

    batch: input_ids and attention_mask, (rows, S) int64 on the model's device."""
    part = runtime.part
    context = counter.context
    generation = counter.generation
    layout = part.info.layout
    options = dict(generation.options)
    if layout.pp > 1:
        options["past_key_values"] = StageCache(part.model)
    if needs_all_logits(part, counter.active):
        options["logits_to_keep"] = 0  # 0: of all positions
    with (
        counted(part.hooks.modules[""], counter),
        seeded(generation.seed, context.here, runtime.device),
        as_written(part.caller.compiled),
    ):
        part.model.generate(
            batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=generation.max_new_tokens,
            pad_token_id=generation.pad_id,
            num_beams=1,
            num_return_sequences=1,
            use_cache=True,
            return_dict_in_generate=False,
            synced_gpus=layout.batch_groups > 1,  # none leaves before all have stopped
            streamer=TokenStreamer(context.tokens, runtime.tick),
            **options,
        )


def needs_all_logits(part: Part, active: frozenset[str]) -> bool:
    """Whether a hook of the run is on the root or the head, where transformers otherwise computes
    the newest position only."""
    if "logits_to_keep" not in inspect.signature(part.model.forward).parameters:
        return False
    base = part.model.base_model_prefix
    hooks = [hook for hook in part.hook_set.hooks if hook.key in active]
    names = {name for hook in hooks for name in part.planner.targets(hook.glob)}
    return any(name != base and not name.startswith(f"{base}.") for name in names)


@contextmanager
def counted(root: torch.nn.Module, counter: StepCounter) -> Iterator[None]:
    """Within it the counter learns, before any other hook fires, how many positions each forward
    runs."""

    def before(_module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids")
        if ids is None:
            ids = args[0]
        counter.begin(ids.shape[1])

    handle = root.register_forward_pre_hook(before, with_kwargs=True, prepend=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def seeded(seed: int, here: Place, device: str) -> Iterator[None]:
    """Within it ranks that share rows draw alike, and others do not. Where the batch is not split
    they draw as one process with this seed would."""
    group = here.coordinate.batch
    if here.idle:
        group = 0
    devices = []
    if device == "cuda":
        devices = [torch.cuda.current_device()]
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed((seed + group * 0x9E3779B97F4A7C15) % (1 << 63))
        yield
