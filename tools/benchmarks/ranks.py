"""Ranks: what benchmarks have each engine do beside our own runs. Importable there; each returns
plain data.

All ranks must call those that run the model.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from flexkernel.engine import DOOR

__all__ = [
    "bare",
    "busy",
    "flexmodel",
    "nothing",
    "pid_and_memory",
    "put",
    "raw_hooks",
    "seconds_of",
    "send_raw",
    "slice_of",
]

Rows = Sequence[Sequence[int]]
_kept: dict[str, Any] = {}  # what an engine holds for the next call


def batch_of(rows: Rows) -> dict[str, torch.Tensor]:
    ids = torch.tensor(rows)
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": positions}


@contextmanager
def unwatched() -> Iterator[Any]:
    """This engine's Runtime, its model without anything of ours on it. The session has no hooks
    then."""
    runtime = DOOR.runtime
    assert not runtime.part.hook_set.hooks, "a bare forward is one without hooks"
    names, modules = runtime.watch._names, runtime.part.hooks.modules
    runtime.watch.follow([], {})
    try:
        with torch.no_grad():
            yield runtime
    finally:
        runtime.watch.follow(names, modules)


def forward(call: Callable[..., Any], rows: Rows) -> float:
    """Seconds of one forward that all ranks begin together."""
    batch = batch_of(rows)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()
    begin = time.perf_counter()
    call(**batch, use_cache=False)
    return time.perf_counter() - begin


def bare(rows: Rows) -> float:
    """Seconds of the sharded forward by itself."""
    with unwatched() as runtime:
        return forward(runtime.model, rows)


def raw_hooks(rows: Rows, names: Sequence[str]) -> float:
    """Seconds with torch's own hooks, each of which keeps a copy of this rank's shard."""
    found: dict[str, torch.Tensor] = {}
    with unwatched() as runtime:
        modules = dict(runtime.model.named_modules())

        def keep(name: str) -> Callable[..., None]:
            return lambda _module, _args, out: found.__setitem__(name, leaf(out).detach().clone())

        handles = [modules[name].register_forward_hook(keep(name)) for name in names]
        try:
            seconds = forward(runtime.model, rows)
        finally:
            for handle in handles:
                handle.remove()
    assert len(found) == len(names), "every hook fired"
    return seconds


def leaf(value: Any) -> torch.Tensor:
    return value[0] if isinstance(value, tuple) else value


def halved(_module: Any, x: torch.Tensor, _save: Any, _modules: Any) -> torch.Tensor:
    return x * 0.5


def flexmodel(
    rows: Rows, hooks: Sequence[tuple[str, int | None]], edit: bool, where: str
) -> tuple[float, int, dict[str, float]]:
    """(seconds of a forward under FlexModel, bytes that this rank keeps after it, module → sum of
    what was kept).

    hooks: (module, the whole size of its last dim if that is sharded). where: the folder it is
    installed in."""
    if where not in sys.path:
        sys.path.append(where)
    from flex_model.core import HookFunction
    from flex_model.core.wrapper import _finalize_dangling_state, _HookFunctionGroupManager

    with unwatched() as runtime:
        wrapped, found = flexmodel_of(runtime.model)
        for name, size in hooks:
            shape = None if size is None else (None, None, size)
            function = HookFunction(
                name, expected_shape=shape, editing_function=halved if edit else None
            )
            wrapped.register_forward_hook(function)
        try:
            seconds = forward(wrapped, rows)
        finally:
            # a hook of it cannot be taken away otherwise
            _finalize_dangling_state(wrapped._module_to_hook_fns_map)
            wrapped._hook_fn_group_manager = _HookFunctionGroupManager()
        kept = sum(t.nbytes for tensors in found.values() for t in tensors)
        sums = {name: float(tensors[-1].double().sum()) for name, tensors in found.items()}
        assert len(sums) == len(hooks), "every hook fired"
        found.clear()
    return seconds, kept, sums


def flexmodel_of(model: torch.nn.Module) -> tuple[Any, dict[str, list[torch.Tensor]]]:
    """The model wrapped, once, with the gloo group that it would not make by itself; and where it
    puts activations."""
    if _kept.get("model") is not model:
        from flex_model.core import FlexModel

        found: dict[str, list[torch.Tensor]] = {}
        group = dist.new_group(backend="gloo")
        world = dist.get_world_size()
        _kept["model"] = model
        _kept["wrapped"] = (
            FlexModel(model, found, tensor_parallel_size=world, process_group=group),
            found,
        )
    return _kept["wrapped"]


def forget() -> None:
    """Let go of what earlier calls kept."""
    _kept.clear()


def nothing() -> None:
    """What an empty call does."""


def busy(flag: str) -> int:
    """Keep this engine's main thread at work as a forward does while that file is there; how many
    products it made."""
    a, count, end = torch.randn(384, 384), 0, time.monotonic() + 60
    while os.path.exists(flag) and time.monotonic() < end:
        a = (a @ a).tanh()
        count += 1
    return count


def pid_and_memory() -> tuple[int, int]:
    """(this engine's pid, its RSS in bytes)."""
    import psutil

    process = psutil.Process()
    return process.pid, process.memory_info().rss


def seconds_of(run: int) -> dict[str, float]:
    """How long this rank was at each part of a stored run."""
    return DOOR.runtime.memory.runs[run][2].seconds


def put(name: str, num_bytes: int) -> None:
    """Have an array of ones of this size under that name where ipyparallel's pull finds it."""
    import numpy as np
    from IPython import get_ipython

    get_ipython().user_ns[name] = np.ones(num_bytes // 4, dtype=np.float32)


def slice_of(name: str, num_bytes: int) -> Any:
    """The first bytes of that array."""
    from IPython import get_ipython

    return get_ipython().user_ns[name][: num_bytes // 4].copy()


def send_raw(name: str, address: str) -> None:
    """Send that array over a bare zmq socket, without copying it."""
    import zmq
    from IPython import get_ipython

    socket = zmq.Context.instance().socket(zmq.PUSH)
    socket.connect(address)
    socket.send(get_ipython().user_ns[name], copy=False)
    socket.close(linger=60_000)
