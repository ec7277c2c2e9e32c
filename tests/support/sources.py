"""Sources of views, made by hand: what a Capture looks like to a picture."""

from __future__ import annotations

from typing import Any

import torch

from flexkernel.memory import reduce

__all__ = ["FarSource", "Source"]


class Source:
    """What a Capture looks like to a view."""

    def __init__(self, tensor: torch.Tensor, **more: Any):
        self.held, self.shape, self.dtype = tensor, tuple(tensor.shape), tensor.dtype
        self.name, self.tokens, self.shards, self.evidence = (
            "model.layers.3.mlp",
            None,
            None,
            "plan",
        )
        self.__dict__.update(more)

    def tensor(self) -> torch.Tensor:
        return self.held

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self.held[index]


class FarSource(Source):
    """One that never gives its tensor away: it reduces itself, and gives parts."""

    def tensor(self) -> torch.Tensor:
        raise AssertionError("a view gathered a tensor to look at it")

    def tiles(self, rows, cols, height, width, how):
        return reduce.tiles(self.held.reshape(-1, self.shape[-1]), rows, cols, height, width, how)
