"""Drift: how far an activation is from what it should be, as one number."""

from __future__ import annotations

import torch

from flexkernel.wire import ShapeFormula

__all__ = ["drift", "real_part"]

# of the largest vector: what a vector far smaller than it is measured against instead of its own
# norm
FLOOR = 1e-3


def drift(got: torch.Tensor, truth: torch.Tensor, real: torch.Tensor | None = None) -> float:
    """The largest ‖got − truth‖ / ‖truth‖ of any vector along the last dim; inf where one has NaN
    and the other none.

    A measure over the whole tensor would hide the small vectors: the first token of many models is
    a thousand times larger than the others. real: bool, broadcast to the tensor; what is False
    does not count. Integers have to be equal: 0 or inf.

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
    same = (got == truth) | truth.isnan()  # infinities too: their difference is NaN
    apart = (got - truth).masked_fill(same, 0).norm(dim=-1)
    size = truth.masked_fill(~truth.isfinite(), 0).norm(dim=-1)
    size = size.clamp(min=max(FLOOR * size.max().item(), torch.finfo(torch.float64).tiny))
    return (apart / size).max().item()


def real_part(formula: ShapeFormula, mask: torch.Tensor) -> torch.Tensor | None:
    """Where a value of this formula belongs to real tokens, as a view that broadcasts to its shape;
    None: it has no positions, or several numbers for each.

    mask: (B, S) bool, False on pads."""
    one_each = (formula.rows, formula.positions)
    if formula.folded is None and any(
        d is not None and (formula.dims or ())[d][0] != 1 for d in one_each
    ):
        return None
    return formula.broadcast(mask)
