"""Drift: how far an activation is from what it should be, as one number."""

from __future__ import annotations

import torch

from flexkernel.wire import ShapeFormula

__all__ = ["drift", "real_part"]

# A vector smaller than this share of the largest one is measured against that share, not against
# its own norm
FLOOR = 1e-3


def drift(got: torch.Tensor, truth: torch.Tensor, real: torch.Tensor | None = None) -> float:
    """The largest ‖got − truth‖ / ‖truth‖ of all vectors along the last dim; inf if their NaN are
    at different places.

    got, truth: of one shape, on one device. real: bool, broadcast to that shape; elements where it
    is False do not count. Integers give 0 if all are equal, else inf.

    A norm over the whole tensor would hide small vectors: in many models the first token is a
    thousand times larger than the others.

    >>> drift(torch.tensor([[1.0, 1.1], [0.0, 2.0]]), torch.tensor([[1.0, 1.0], [0.0, 2.0]])) < 0.08
    True
    """
    if real is not None:
        got, truth = (x.masked_fill(~real, 0) for x in (got, truth))
    if not truth.is_floating_point():
        return 0.0 if torch.equal(got, truth) else float("inf")
    got, truth = (torch.atleast_1d(x.to(torch.float64)) for x in (got, truth))
    if not torch.equal(got.isnan(), truth.isnan()):
        return float("inf")
    if truth.numel() == 0:
        return 0.0
    same = (got == truth) | truth.isnan()  # infinities too: inf - inf is NaN
    apart = (got - truth).masked_fill(same, 0).norm(dim=-1)
    size = truth.masked_fill(~truth.isfinite(), 0).norm(dim=-1)
    size = size.clamp(min=max(FLOOR * size.max().item(), torch.finfo(torch.float64).tiny))
    return (apart / size).max().item()


def real_part(formula: ShapeFormula, mask: torch.Tensor) -> torch.Tensor | None:
    """Where a value of this formula belongs to real tokens: a view of the mask that broadcasts to
    the value's shape.

    None: the value has no positions, or has several entries for each. mask: (B, S) bool, False on
    pads."""
    one_each = (formula.rows, formula.positions)
    if formula.folded is None and any(
        d is not None and (formula.dims or ())[d][0] != 1 for d in one_each
    ):
        return None
    return formula.broadcast(mask)
