"""New process groups under old weights: what a broken collective costs is a second, never the
model.

A rank whose engine died is taken by a new one, which loads its part by itself and then joins the
others' regroup.
"""

from __future__ import annotations

from typing import Any

from flexkernel.engine.compat import (
    alone,
    fix_cached_groups,
    made_groups,
    meshes_on,
    rebuild_meshes,
    refresh_groups,
    remake_groups,
    reset_forward,
)
from flexkernel.errors import LoadError
from flexkernel.wire import RankInfo, RankState

from .gather import make_groups
from .mesh import join, leave, settle_in

__all__ = ["describe", "inherit", "regroup", "settle"]


def regroup(
    runtime: Any, seat: RankInfo, address: str, port: int, timeout_s: float, builder: bytes | None
) -> None:
    """Leave the groups, join those of the seat's generation, and put them under the loaded model.
    All ranks must call.

    The meshes are made again in the order of the load, so that groups get the names that meshes,
    DTensors and forward closures remember; weights stay where they are and the next forward is
    bit-equal. builder: a rank is new and its part is built by the user's code, which may send to
    the other ranks: every rank runs it, those that have their part already drop what comes of
    it."""
    leave()
    reset_forward(runtime.model)
    runtime.breaker.before_groups()
    runtime.store, runtime.store_port = join(seat, address, port, runtime.device, timeout_s), port
    layout = runtime.info.layout if runtime.info is not None else None
    if builder is not None:
        build_again(runtime, builder)
    elif runtime.model is not None and layout is not None and layout.world > 1:
        if getattr(runtime.model, "_mesh_manager", None) is not None:
            with meshes_on(runtime.device):
                rebuild_meshes(layout)
        else:
            remake_groups(runtime.made)
    if runtime.model is not None:
        fix_cached_groups(runtime.model)
        refresh_groups(runtime.model)
    runtime.groups = make_groups(layout, seat.rank) if layout is not None else {}
    runtime.breaker.after_groups({port})


def build_again(runtime: Any, builder: bytes) -> None:
    from flexkernel.engine.model.load import build, know, take

    fresh = build(builder)
    runtime.made = made_groups()
    if runtime.model is None:
        runtime.model = fresh
        take(runtime, runtime.source)
        know(runtime, runtime.info)


def describe(runtime: Any) -> RankState:
    """What an attaching driver needs to go on where the last one stopped, and a new engine to take
    a rank."""
    from flexkernel.engine.run import train

    edits = {name: spec for name, (spec, _) in runtime.edits.items()}
    return RankState(
        runtime.info, runtime.source, runtime.hook_set, edits, runtime.runs, train.held(runtime)
    )


def inherit(runtime: Any, seat: RankInfo, device: str, heritage: RankState) -> None:
    """Take a dead engine's rank: load its part of the model, alone. The groups come with `sit`, on
    all ranks, and a builder's model with them."""
    from flexkernel.engine.model import attention
    from flexkernel.engine.model.load import know, load, take

    info = heritage.info
    runtime.seat, runtime.device, runtime.info, runtime.source = seat, device, info, heritage.source
    settle_in(seat, device)
    attention.install()
    if heritage.source.builder is None:
        with alone(seat.rank, seat.world):
            runtime.model = load(info.path, info.layout, info.dtype, device, info.attention)
        take(runtime, heritage.source)
        know(runtime, info)


def settle(runtime: Any, heritage: RankState) -> int:
    """Hooks, edits and stored runs as the dead engine had them; how many bytes of the model were
    loaded for it."""
    from flexkernel.engine.model.load import local_bytes
    from flexkernel.engine.run import train

    if runtime.model is None:
        raise LoadError(f"rank {runtime.rank} came back without a model")
    for spec in heritage.edits.values():
        runtime.define(spec)
    for name, (code, weights) in heritage.modules.items():
        train.add(runtime, name, code)
        train.set_state(runtime, name, weights)
    runtime.set_hooks(heritage.hook_set)
    runtime.runs.update(heritage.runs)
    return local_bytes(runtime.model)
