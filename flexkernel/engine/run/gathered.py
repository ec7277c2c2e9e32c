"""An edit of a whole activation that lies in parts on several ranks: the parts are gathered on one
rank, edited there, and scattered again; the gradient goes the same way back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.tensor import Replicate

from flexkernel.engine.place.placements import Place, Placed
from flexkernel.engine.ranks.gather import Exchange, ExchangePlan
from flexkernel.wire import ShapeFormula

__all__ = ["Gathering", "exchange_plan", "gathered"]

# Which group of ranks shares an edit: (what it sees, whether the value has rows) → group
GROUPS = {
    ("row", True): "tp",  # each group of rows by itself
    ("row", False): "stage",
    ("whole", True): "stage",
    ("whole", False): "stage",
}


def exchange_plan(placed: Placed, formula: ShapeFormula, per: str, here: Place) -> ExchangePlan:
    """Which ranks share an edit of this value, and which part of it this rank gives and takes."""
    layout = here.layout
    batched = formula.batched
    group = GROUPS[per, bool(batched)]
    shape = here.whole(formula)
    shard = placed.shard
    if group == "tp" and layout.batch_groups > 1:
        # the edit sees the rows of this group only
        shape = here.own(formula)
        shard = shard.only(shard.dims.difference(batched))
    # a copy over tp: the first rank gives it
    gives = not (isinstance(placed.placement, Replicate) and here.tp > 0)
    takes = shard
    if here.idle and batched and group == "stage":
        # this rank's row is a copy that nobody wants: it gives nothing and takes the first row
        gives = False
        takes = shard.only(shard.dims.difference(batched))
        for dim in shard.dims.intersection(batched):
            takes = takes.plus(dim, 0, 1)
    return ExchangePlan(group, shape, shard, takes, gives)


class Gathering:
    """One edit whose parts are gathered. edit: changes the whole, on one rank. no_gradient: this
    rank's row is a copy, which has none."""

    # the edit's graph, on the rank that edits, between the forward and the backward
    _before: torch.Tensor
    _after: torch.Tensor

    def __init__(
        self,
        exchange: Exchange,
        plan: ExchangePlan,
        title: str,
        call: tuple[int, int],
        edit: Callable[[torch.Tensor], torch.Tensor],
        no_gradient: bool,
    ):
        self.exchange = exchange
        self.plan = plan
        self.title = title
        self.call = call
        self.edit = edit
        self.no_gradient = no_gradient

    def forward(self, local: torch.Tensor) -> torch.Tensor:
        """This rank's part of the edited whole. local: its part, without a graph; the result has
        its shape, dtype and device. Every rank of the group must call."""
        return self.exchange.once(self.plan, self.title, self.call, local, self.edit)

    def forward_with_graph(self, local: torch.Tensor) -> torch.Tensor:
        """The same, with the same shapes. The rank that edits keeps the edit's graph."""
        return self.exchange.once(self.plan, self.title, self.call, local, self._edit_with_graph)

    def _edit_with_graph(self, whole: torch.Tensor) -> torch.Tensor:
        """whole: the activation -> the edited one, of the same shape and dtype."""
        with torch.enable_grad():
            self._before = whole.detach().clone().requires_grad_()
            self._after = self.edit(self._before.clone())  # the edit may write into it
        return self._after.detach()

    def backward(self, gradient: torch.Tensor) -> torch.Tensor:
        """The gradient of this rank's part, from that of its part of the result; both of the
        part's shape and dtype. Every rank of the group must call."""
        title = f"{self.title} backward"
        product = self.exchange.once(self.plan, title, self.call, gradient, self._product)
        if self.no_gradient:
            return torch.zeros_like(product)
        return product

    def _product(self, gradient: torch.Tensor) -> torch.Tensor:
        """The edit's vector-Jacobian product: the whole's shape -> the same. Modules in the edit
        get their gradients here."""
        if not self._after.requires_grad:
            return torch.zeros_like(self._before)
        torch.autograd.backward([self._after], [gradient.clone()])
        if self._before.grad is None:
            return torch.zeros_like(self._before)
        return self._before.grad


class GatheredEdit(torch.autograd.Function):
    """A Gathering as a node of autograd's graph.

    The anchor keeps every rank in the graph, also one whose part has no graph. A rank that stayed
    out of the backward would leave the others waiting."""

    @staticmethod
    def forward(
        ctx: Any, local: torch.Tensor, _anchor: torch.Tensor, gathering: Gathering
    ) -> torch.Tensor:
        """local: any shape -> the same shape, dtype and device."""
        ctx.gathering = gathering
        return gathering.forward_with_graph(local.detach())

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """gradient: of the result, of local's shape -> that of local."""
        return ctx.gathering.backward(gradient.contiguous()), None, None


def gathered(local: torch.Tensor, gathering: Gathering) -> torch.Tensor:
    """This rank's part of the edited whole, with a gradient if gradients are enabled.

    local: this rank's part -> the same shape, dtype and device. Every rank of the group must call.
    EditError: the edit failed on this rank; OtherRankFailed: on another one."""
    if not torch.is_grad_enabled():
        return gathering.forward(local)
    anchor = torch.zeros((), requires_grad=True, device=local.device)
    return GatheredEdit.apply(local, anchor, gathering)
