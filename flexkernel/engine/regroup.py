"""New process groups under old weights: what a broken collective costs is a second, never the model."""

from __future__ import annotations

import torch
import torch.distributed as dist

from ..wire import Layout, Seat
from .compat import fix_cached_groups, rebuild_meshes, reset_forward
from .faults import Breaker
from .gather import make_groups
from .mesh import join, leave

__all__ = ["regroup"]


def regroup(
    seat: Seat,
    address: str,
    port: int,
    device: str,
    timeout_s: float,
    breaker: Breaker,
    model: torch.nn.Module | None,
    layout: Layout | None,
) -> tuple[dist.TCPStore, dict[str, dist.ProcessGroup | None]]:
    """Leave the groups, join those of the seat's generation, and put them under the loaded model. All ranks must call.

    The meshes are made again in the order of the load, so that groups get the names that meshes, DTensors and forward
    closures remember; weights stay where they are and the next forward is bit-equal."""
    leave()
    reset_forward(model)
    breaker.before_groups()
    store = join(seat, address, port, device, timeout_s)
    if model is not None and layout is not None and layout.world > 1:
        if getattr(model, "_mesh_manager", None) is not None:
            rebuild_meshes(layout)
        fix_cached_groups(model)
    groups = make_groups(layout, seat.rank) if layout is not None else {}
    breaker.after_groups({port})
    return store, groups
