"""How a model is called with a batch.

A forward gets the arguments that it names: input_ids, attention_mask, position_ids, use_cache. If
it has no input_ids, its first parameter gets the ids. If it needs anything else, the user must say
how to call it: forward=."""

from __future__ import annotations

import inspect
import pickle
from collections.abc import Callable, Mapping
from typing import Any

import torch

from flexkernel.engine.compat import as_written, is_compiled, unwrapped
from flexkernel.errors import LoadError, PromptError

__all__ = ["Caller"]

IDS = "input_ids"
MASK = "attention_mask"
POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
VARIABLE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


class Caller:
    """Calls a model with a batch: input_ids, attention_mask, position_ids, each (B, S) int64 on
    the model's device.

    forward: the user's function (model, batch) → output, as cloudpickled code; None: call it by
    its signature. LoadError: the forward needs an argument that the batch lacks."""

    def __init__(self, model: torch.nn.Module, forward: bytes | None = None):
        self.model = model
        self.compiled = is_compiled(model)
        self.forward: Callable[[torch.nn.Module, Mapping[str, torch.Tensor]], Any] | None = None
        if forward is not None:
            self.forward = pickle.loads(forward)
            if not callable(self.forward):
                raise LoadError(
                    "forward= is a function of the model and a batch; found "
                    f"{type(self.forward).__name__}"
                )
            return
        inner = unwrapped(model)
        self.name = type(inner).__name__
        self.parameters = inspect.signature(inner.forward).parameters
        self.any_name = any(
            p.kind is inspect.Parameter.VAR_KEYWORD for p in self.parameters.values()
        )
        first = next((p.name for p in self.parameters.values() if p.kind in POSITIONAL), None)
        # a first parameter with the name of another tensor of the batch takes that one
        self.first = None if IDS in self.parameters or first in (MASK, "position_ids") else first
        # Megatron's masks are True where attention is not allowed, and its causal layers do not
        # look for pads in them
        self.megatron = type(inner).__module__.startswith("megatron.")
        self._check()

    def __call__(self, batch: Mapping[str, torch.Tensor], **more: Any) -> Any:
        """The model's output. more: use_cache, past_key_values; passed on if the forward takes
        them.

        Compiled modules run uncompiled here: compiled code contains the hooks of the time when it
        was compiled."""
        with as_written(self.compiled):
            return self._called(batch, **more)

    def _called(self, batch: Mapping[str, torch.Tensor], **more: Any) -> Any:
        """The model's output. batch: (B, S) int64 tensors on its device, passed under the names
        that the forward has."""
        if self.forward is not None:
            return self.forward(self.model, batch)
        given = {
            name: value
            for name, value in {**batch, **more}.items()
            if self.takes(name) and name != self.first
        }
        if self.megatron and MASK in given:
            S = batch[IDS].shape[1]
            given[MASK] = torch.ones(1, 1, S, S, dtype=torch.bool, device=batch[IDS].device).triu(1)
        if self.first is not None:
            return self.model(given.pop(IDS, batch[IDS]), **given)
        return self.model(**given)

    def takes(self, name: str) -> bool:
        """Whether the forward takes an argument of that name."""
        found = self.parameters.get(name)
        return self.any_name if found is None else found.kind not in VARIABLE

    @property
    def caches(self) -> bool:
        """Whether the model continues from a cache as transformers' models do."""
        return (
            self.forward is None
            and "past_key_values" in self.parameters
            and hasattr(self.model, "config")
        )

    def check_pads(self, padded: bool) -> None:
        """PromptError if rows differ in length and the forward would read the pads as tokens."""
        if padded and self.forward is None and (self.megatron or not self.takes(MASK)):
            raise PromptError(
                f"the rows have different lengths, and {self.name}.forward "
                + ("has a mask of another meaning" if self.takes(MASK) else f"takes no {MASK}")
                + ", so that it would read the pads: run rows of one length, or load it with forward=, a function "
                "(model, batch) that makes the mask it needs"
            )

    def _check(self) -> None:
        """LoadError: the forward needs an argument that nobody gives."""
        if type(unwrapped(self.model)).forward is torch.nn.Module.forward:
            return  # a model without a forward: its parameters can still be read
        known = {IDS, MASK, "position_ids", "use_cache", self.first}
        needs = [
            p.name
            for p in self.parameters.values()
            if p.default is p.empty and p.kind not in VARIABLE and p.name not in known
        ]
        nowhere = self.first is None and not self.takes(IDS)
        if needs or nowhere:
            what = f"needs {', '.join(needs)}" if needs else "takes no token ids"
            raise LoadError(
                f"{self.name}.forward({', '.join(self.parameters)}) {what}: say how it is called, "
                "session.load(..., forward=lambda model, batch: model(batch['input_ids'], ...)); "
                "a batch has "
                "input_ids, attention_mask and position_ids"
            )
