"""What a driver may call on an engine: functions of this rank's Runtime, by the name that the
driver says.

"All ranks": the function contains a collective. The driver calls it on every rank, or on none.
"""

from __future__ import annotations

import gc
import os
import pickle
import platform
import socket
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from flexkernel._version import __version__
from flexkernel.memory.heartbeat import Heartbeat
from flexkernel.wire import (
    HookSet,
    Layout,
    ModelInfo,
    ModuleInfo,
    RankInfo,
    RunPlan,
    RunReport,
    Source,
)

from . import dataset, recover, verify
from .compat import is_placeholder, made_groups
from .failure import gave_up
from .model import attention, inspection, load
from .model.part import Pending, RankModel, modules_of
from .ranks import mesh
from .ranks.gather import make_groups
from .run import forward, parameters, train
from .runtime import Runtime

__all__ = ["CALLS", "Call"]

Call = Callable[..., Any]


# --- life -----------------------------------------------------------------------------


def describe(runtime: Runtime) -> dict[str, Any]:
    """Who this engine is, and what it already holds. A dict, since it says whether the two sides
    run the same version, whose classes are the same."""
    return {
        "version": __version__,
        "python": platform.python_version_tuple()[:2],
        "pid": os.getpid(),
        "host": os.environ.get("FLEX_HOST") or socket.gethostname(),
        "machine": socket.gethostname(),
        "rank_info": runtime.rank_info,
        "folder": runtime.folder,
        "device": runtime.device,
        "loaded": runtime.info is not None,
        "gpus": torch.cuda.device_count(),
    }


def open_store(
    runtime: Runtime, mine: bool, folder: str, generation: int, interface: str
) -> tuple[str, int] | None:
    """Begin a generation with a fresh rendezvous store, on the rank that has it: (address, port);
    None on the others."""
    freeze_imports(runtime)
    if not mine:
        return None
    folder_here = runtime.memory.claim(folder)
    address, port, runtime.hosted_store = mesh.open_store(folder_here, generation, interface)
    return address, port


def freeze_imports(runtime: Runtime) -> None:
    """Have the garbage collector leave alone what an engine has imported before its groups are
    first made: a few hundred thousand objects that never go. It takes a fifth of a second to look
    through them."""
    if runtime.world == 1 and runtime.model is None:
        gc.collect()
        gc.freeze()


def init_rank(
    runtime: Runtime,
    rank_info: RankInfo,
    folder: str,
    device: str,
    builder: bytes | None = None,
    address: str = "",
    port: int = 0,
    timeout_s: float = 60,
) -> None:
    """Become this rank, and join the others' groups. builder: see recover.regroup. All ranks."""
    runtime.folder = folder
    runtime.init_rank(rank_info, device)
    folder_here = runtime.memory.claim(folder)
    runtime.watch.beat_into(Heartbeat(folder_here, rank_info.rank, write=True))
    if rank_info.world > 1:
        recover.regroup(runtime, address, port, timeout_s, builder)
        runtime.breaker.watch_interrupts()


def close(runtime: Runtime) -> None:
    """Forget everything: the model, the groups, the slabs."""
    runtime.unload()
    if runtime.world > 1:
        mesh.leave()
    runtime.memory.close()


def call(runtime: Runtime, function: bytes, *args: Any) -> Any:
    """Run a user's function on this rank."""
    return pickle.loads(function)(*args)


# --- model ----------------------------------------------------------------------------


def inspect_model(
    runtime: Runtime,
    source: Source,
    layout: Layout,
    dtype: str,
    attention: str | None,
    placements: dict[str, str],
) -> ModelInfo | None:
    """Everything that can be known before anything is loaded: refusals, and the scan. The answer is
    rank 0's; None on the others."""
    if runtime.rank != 0:
        return None
    return inspection.inspect(source, layout, dtype, attention, placements)


def possible_layouts(runtime: Runtime, path: str, world: int) -> tuple[Layout, ...] | None:
    """The layouts that a model can have over so many engines. The answer is rank 0's."""
    return inspection.possible_layouts(path, world) if runtime.rank == 0 else None


def load_model(
    runtime: Runtime, info: ModelInfo, source: Source
) -> tuple[list[ModuleInfo], int, int]:
    """Load this rank's part of the model: (the modules it holds, its parameters, its bytes). All
    ranks. A rank that fails leaves nobody waiting."""
    runtime.unload()
    runtime.pending = Pending(source)
    try:
        model = load.load_part(info, source, runtime.device)
    except BaseException as error:
        gave_up(runtime, error)
        raise
    mine = RankModel(model, source)
    runtime.pending.mine = mine
    attention.install()
    if runtime.world > 1:
        mine.made = made_groups()
        runtime.breaker.after_groups({runtime.store_port})
    held = [
        ModuleInfo(name, type(module).__name__, load.local_parameters(module))
        for name, module in modules_of(model, source.names).items()
        if not is_placeholder(module)
    ]
    return held, load.local_parameters(model), load.local_bytes(model)


def adopt(runtime: Runtime, info: ModelInfo) -> None:
    """Take the model as all ranks together know it: from here on there can be hooks. All ranks."""
    part = runtime.adopt(info)
    if runtime.world > 1:
        part.groups = make_groups(info.layout, runtime.rank)
        runtime.breaker.after_groups({runtime.store_port})


# --- hooks and runs -------------------------------------------------------------------


def saved_by(runtime: Runtime, name: str) -> dict[str, Any]:
    """What an edit has saved on this rank."""
    return runtime.saved.get(name, {})


def set_hooks(runtime: Runtime, hook_set: HookSet) -> None:
    runtime.part.set_hooks(hook_set)


def run(runtime: Runtime, plan: RunPlan) -> RunReport:
    """One forward. All ranks. What can be refused is refused before it, on all ranks alike."""
    with injected_fault(runtime):
        report = forward.run(runtime, plan)
    active = runtime.part.hook_set.active(plan.groups, plan.complement)
    runtime.memory.runs[plan.run] = plan, tuple(active), report
    return report


def injected_fault(runtime: Runtime) -> AbstractContextManager[None]:
    """The fault that FLEX_FAULT asks for; nothing where it is not set."""
    if not os.environ.get("FLEX_FAULT"):
        return nullcontext()
    from .fault_injection import fault_in_run

    return fault_in_run(runtime)


# --- their names ----------------------------------------------------------------------


CALLS: dict[str, Call] = {
    "attach": describe,  # after the door has agreed
    "inspect": describe,
    "open_store": open_store,
    "init_rank": init_rank,
    "close": close,
    "call": call,
    "inspect_model": inspect_model,
    "possible_layouts": possible_layouts,
    "load": load_model,
    "adopt": adopt,
    "unload": Runtime.unload,
    "define": recover.define,
    "saved_by": saved_by,
    "set_hooks": set_hooks,
    "run": run,
    "serve": lambda runtime, token, interface: runtime.memory.serve(token, interface),
    "memory.free": lambda runtime: runtime.memory.free(),
    "memory.forget": lambda runtime, runs: runtime.memory.forget(runs),
    "memory.has": lambda runtime, run, slab, base: runtime.memory.has(run, slab, base),
    "memory.spill": lambda runtime, *args: runtime.memory.spill(*args),
    "memory.spill_to": lambda runtime, root: runtime.memory.spill_to(root),
    "parameters.held": parameters.shard_of,
    "parameters.write": parameters.write,
    "parameters.put": parameters.put,
    "parameters.restore": parameters.restore,
    "train.add": train.add,
    "train.remove": train.remove,
    "train.state": train.state,
    "train.set_state": train.set_state,
    "train.gradients": train.gradients,
    "train.reset_optimizers": train.reset_optimizers,
    "recover.rank_state": recover.rank_state,
    "recover.load_rank_state": recover.load_rank_state,
    "recover.restore": recover.restore,
    "dataset.write": dataset.write,
    "verify.unsharded": verify.unsharded,
}
