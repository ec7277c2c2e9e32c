"""New process groups under old weights: what a broken collective costs is a second, never the
model.

A rank whose engine died is taken by a new one, which loads its part by itself and then joins the
others' regroup.
"""

from __future__ import annotations

import pickle

from flexkernel.errors import EngineError, LoadError
from flexkernel.wire import EditSpec, HookSet, RankInfo, RankState

from .compat import (
    alone,
    fix_cached_groups,
    made_groups,
    meshes_on,
    rebuild_meshes,
    refresh_groups,
    remake_groups,
    reset_forward,
)
from .model import attention
from .model.load import build, load, local_bytes
from .model.part import Pending, RankModel
from .ranks.gather import make_groups
from .ranks.mesh import join, leave
from .run import train
from .runtime import Runtime

__all__ = ["define", "load_rank_state", "rank_state", "regroup", "restore"]


def regroup(
    runtime: Runtime, address: str, port: int, timeout_s: float, builder: bytes | None
) -> None:
    """Leave the groups, join those of this rank's generation, and put them under the loaded model.
    All ranks must call.

    The meshes are made again in the order of the load, so that groups get the names that meshes,
    DTensors and forward closures remember; weights stay where they are and the next forward is
    bit-equal. builder: a rank is new and its part is built by the user's code, which may send to
    the other ranks. Every rank runs it; those that have their part already drop the result."""
    leave()
    reset_forward(runtime.model)
    runtime.breaker.before_groups()
    runtime.store = join(runtime.rank_info, address, port, runtime.device, timeout_s)
    runtime.store_port = port
    if builder is not None:
        build_again(runtime, builder)
    elif runtime.loaded is not None and runtime.loaded.info.layout.world > 1:
        remake_all_groups(runtime)
    if runtime.model is not None:
        fix_cached_groups(runtime.model)
        refresh_groups(runtime.model)
    if runtime.info is not None:
        groups = make_groups(runtime.info.layout, runtime.rank)
        if runtime.loaded is not None:
            runtime.loaded.groups = groups
    runtime.breaker.after_groups({port})


def remake_all_groups(runtime: Runtime) -> None:
    """Make the groups again that the loaded model was made with."""
    part = runtime.part
    if getattr(part.model, "_mesh_manager", None) is not None:
        with meshes_on(runtime.device):
            rebuild_meshes(part.info.layout)
    else:
        remake_groups(part.made)


def build_again(runtime: Runtime, builder: bytes) -> None:
    """Run the user's builder, and take its model if this rank has none."""
    fresh = build(builder)
    made = made_groups()
    if runtime.loaded is not None:
        runtime.loaded.made = made
    elif runtime.pending is not None and runtime.pending.mine is not None:
        runtime.pending.mine.made = made
    elif runtime.pending is not None and runtime.pending.info is not None:
        runtime.pending.mine = RankModel(fresh, runtime.pending.source)
        runtime.pending.mine.made = made
        runtime.adopt(runtime.pending.info)


def rank_state(runtime: Runtime) -> RankState:
    """What an attaching driver needs to go on where the last one stopped, and a new engine to take
    a rank. EngineError: no model is loaded."""
    if runtime.info is None or runtime.source is None:
        raise EngineError("no model is loaded on this rank", runtime.rank)
    return RankState(
        info=runtime.info,
        source=runtime.source,
        hook_set=HookSet() if runtime.loaded is None else runtime.loaded.hook_set,
        edits={name: spec for name, (spec, _) in runtime.edits.items()},
        runs=runtime.memory.runs,
        modules=train.save_all(runtime),
    )


def load_rank_state(runtime: Runtime, rank_info: RankInfo, device: str, state: RankState) -> None:
    """Take a dead engine's rank: load its part of the model, alone. The groups come with
    init_rank, on all ranks, and a builder's model with them."""
    runtime.pending = Pending(state.source, state.info)
    runtime.init_rank(rank_info, device)
    attention.install()
    if state.source.builder is None:
        info = state.info
        with alone(rank_info.rank, rank_info.world):
            model = load(info.path, info.layout, info.dtype, device, info.attention)
        runtime.pending.mine = RankModel(model, state.source)
        runtime.adopt(info)


def restore(runtime: Runtime, state: RankState) -> int:
    """Give this rank the hooks, edits and stored runs of the dead engine. Returns how many bytes
    of the model were loaded for it."""
    if runtime.loaded is None:
        raise LoadError(f"rank {runtime.rank} came back without a model")
    for spec in state.edits.values():
        define(runtime, spec)
    for name, (code, weights) in state.modules.items():
        train.add(runtime, name, code)
        train.set_state(runtime, name, weights)
    runtime.loaded.set_hooks(state.hook_set)
    runtime.memory.runs.update(state.runs)
    return local_bytes(runtime.loaded.model)


def define(runtime: Runtime, spec: EditSpec) -> None:
    """Give an edit its name, or a new meaning."""
    runtime.edits[spec.name] = spec, pickle.loads(spec.code)
