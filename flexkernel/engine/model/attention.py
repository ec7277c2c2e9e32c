"""Inside attention: the virtual points @q, @k (after rotary), @v, @pattern and @z of every
attention module.

transformers looks up its attention function by name on every call. Our function is registered
under each existing name, so that the masks stay the same, and calls the original. A module without
taps costs one dictionary look-up. Per head: q (B, H, S, D), k and v (B, KV, P+S, D), pattern (B,
H, S, P+S), z (B, S, H, D)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from flexkernel.engine.compat import attention_functions, eager_attention, set_attention

__all__ = ["POINTS", "install", "tap", "untap"]

POINTS = ("q", "k", "v", "pattern", "z")
TAPS = "_flex_taps"  # in the module's __dict__: point → the function that gets its value


def tap(
    module: torch.nn.Module, point: str, function: Callable[[Callable[[], torch.Tensor]], Any]
) -> None:
    """Call function(value) at every forward of the module. There is one function a point.

    value() returns the point's tensor: of the shape above, in the model's dtype and on its device.
    It is computed only if value() is called. If the function returns a tensor, that replaces the
    point's."""
    module.__dict__.setdefault(TAPS, {})[point] = function


def untap(module: torch.nn.Module, point: str) -> None:
    """Remove the function at that point, if there is one."""
    taps = module.__dict__.get(TAPS, {})
    taps.pop(point, None)
    if not taps:
        module.__dict__.pop(TAPS, None)


def install() -> None:
    """Replace every attention function that transformers has, eager included. Calling it again
    changes nothing."""
    for name in ("eager", *attention_functions()):
        set_attention(name, watched(name))


def watched(name: str) -> Callable:
    """The attention function of that name, which also gives its values to the module's taps."""
    original = attention_functions().get(name)

    def attention(module: torch.nn.Module, q, k, v, mask, **kwargs: Any):
        run = original or eager_attention(module)
        taps = module.__dict__.get(TAPS)
        if not taps:
            return run(module, q, k, v, mask, **kwargs)

        def at(point: str, value: Any) -> Any:
            """The value that a tap put in the place of the point's, or None."""
            return taps[point](value) if point in taps else None

        q, k, v = (
            x if (new := at(point, lambda x=x: x)) is None else new
            for point, x in (("q", q), ("k", k), ("v", v))
        )
        z, pattern = run(module, q, k, v, mask, **kwargs)
        whole = functools.cache(lambda: pattern_of(module, pattern, q, k, v, mask, kwargs))
        edited = at("pattern", whole)
        if edited is not None:
            pattern, z = edited, mixed(edited, v, z)
        new = at("z", lambda: z)
        return z if new is None else new, pattern

    return attention


def mixed(pattern: torch.Tensor, v: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """z computed with another pattern: each query head mixes the values of its key/value head.

    pattern: (B, H, S, P+S), v: (B, KV, P+S, D), z: (B, S, H, D) -> (B, S, H, D), same dtype and
    device."""
    every = v.repeat_interleave(pattern.shape[1] // v.shape[1], dim=1)
    return (pattern @ every).transpose(1, 2).contiguous().view(z.shape)


def pattern_of(module, pattern, q, k, v, mask, kwargs) -> torch.Tensor:
    """The attention pattern, (B, H, S, P+S), in q's dtype and on its device. q, k, v: as above.

    It is the forward's own if that returned one. Else the model's eager attention computes it in
    addition."""
    if pattern is not None:
        return pattern
    additive = additive_mask(mask, q, k, kwargs.get("sliding_window"))
    return eager_attention(module)(module, q, k, v, additive, **kwargs)[1]


def additive_mask(
    mask: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, window: int | None
) -> torch.Tensor:
    """The mask in the form that eager attention adds: float, (B or 1, 1, S, P+S), on q's device.

    mask: what another implementation gets. sdpa's is bool of that shape, or None (causal). flash's
    is (B, P+S), or None. An additive mask is returned as it is. window: the size of a sliding
    window, or None."""
    if mask is not None and mask.dtype != torch.bool and mask.dim() == 4:
        return mask
    keep = mask
    if mask is None or mask.dim() == 2:
        Q, K = q.shape[2], k.shape[2]
        keep = torch.ones(Q, K, dtype=torch.bool, device=q.device).tril(K - Q)
        if window:
            keep &= ~torch.ones_like(keep).tril(K - Q - window)
        keep = (
            keep[None, None] if mask is None else keep[None, None] & mask[:, None, None, :].bool()
        )
    assert keep is not None
    return torch.zeros(keep.shape, dtype=q.dtype, device=q.device).masked_fill_(
        ~keep, torch.finfo(q.dtype).min
    )
