"""Verifies a sharded model against the unsharded one, which runs the same rows on one rank.

What its modules take and return is written into a slab, and the driver compares. It uses plain
torch hooks, and shares nothing with the placement that it judges."""

from __future__ import annotations

import contextlib
import functools
import gc
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import psutil
import torch

from flexkernel.engine.model.caller import Caller
from flexkernel.engine.model.inspection import dtype_of
from flexkernel.engine.model.layerwise import streamed
from flexkernel.engine.model.load import load
from flexkernel.engine.model.part import modules_of
from flexkernel.engine.model.pytree import inputs, leaf
from flexkernel.engine.runtime import Runtime
from flexkernel.errors import LoadError, MemoryBudgetError
from flexkernel.memory.drift import drift, real_part
from flexkernel.memory.plan import Entry, Plan
from flexkernel.names import split_point
from flexkernel.wire import HookSpec, Layout, Region, Unsharded, dtype_name

from .model import attention

__all__ = ["samples", "unsharded"]

ROOM = 1.2  # memory that a run of a few short rows needs, as a multiple of the weights
LOW = (torch.bfloat16, torch.float16)
Put = Callable[[int, torch.Tensor], None]


def unsharded(  # noqa: PLR0913
    runtime: Runtime,
    hooks: tuple[HookSpec, ...],
    ids: list[list[int]],
    mask: list[list[int]],
    positions: list[list[int]],
    region: Region,
    slab_bytes: int,
    stream: bool | None,
    sampled: Sequence[str],
) -> Unsharded:
    """Run these rows through the unsharded model and write the values of the hooks' plan, from
    `region` on.

    One rank calls it. In half precision the model runs once more in float32: the drift of the
    unsharded model from that is the yardstick. stream: keep only one layer's weights at a time;
    None: only if the model does not fit. sampled: parameters of which samples are returned.
    MemoryBudgetError: the model does not fit and cannot be streamed."""
    start = time.perf_counter()
    plan = runtime.part.planner.plan(hooks, len(ids), len(ids[0]))
    tensor = lambda rows: torch.tensor(rows, dtype=torch.long, device=runtime.device)  # noqa: E731
    batch = {
        "input_ids": tensor(ids),
        "attention_mask": tensor(mask),
        "position_ids": tensor(positions),
    }
    slab = runtime.memory.slab(region.slab, slab_bytes)
    dtype = dtype_of(runtime.part.info.dtype)
    streams = (
        stream
        if stream is not None
        else not fits(runtime, max(dtype.itemsize, 4 if dtype in LOW else 0))
    )
    where = [slab.tensor(plan.region(entry, region.slab, region.offset)) for entry in plan.entries]
    written = Written(plan, where, torch.tensor(mask).bool())
    taken: dict[str, list[float]] = {}
    passes: list[tuple[torch.dtype, Put]] = [(dtype, written.put)]
    if dtype in LOW:
        passes.append((torch.float32, written.measure))
    for precision, what in passes:
        model = whole(runtime, precision, streams)
        try:
            taken = taken or samples(model, sampled)
            observe(Caller(model, runtime.part.source.forward), batch, plan, what)
        finally:
            del model
            gc.collect()  # a model has reference cycles
    seconds = time.perf_counter() - start
    order = tuple(written.order)
    return Unsharded(order, written.failed, written.yardstick, streams, taken, seconds)


class Written:
    """The unsharded values of a plan's entries, as they are written.

    where: entry → its place, of the entry's shape. real: (B, S) bool, False on pads. failed: entry
    → why it has no value. yardstick: entry → how far it drifts from float32."""

    def __init__(self, plan: Plan, where: Sequence[torch.Tensor], real: torch.Tensor):
        self.plan = plan
        self.where = where
        self.real = real
        self.order: list[int] = []
        self.failed: dict[int, str] = {}
        self.yardstick: dict[int, float] = {}

    def put(self, i: int, value: torch.Tensor) -> None:
        """Write the value of plan entry i, which should have the entry's shape, into the slab."""
        self.order.append(i)
        place = self.where[i]
        if value.shape != place.shape or value.dtype != place.dtype:
            self.failed[i] = f"the unsharded model has {tuple(value.shape)} {value.dtype} there"
        else:
            place.copy_(value)

    def measure(self, i: int, value: torch.Tensor) -> None:
        """Keep how far the value in the slab drifts from this float32 one of the same shape."""
        if i not in self.failed:
            real = real_part(self.plan.entries[i].formula, self.real)
            exact = value.to("cpu", torch.float32 if value.is_floating_point() else None)
            self.yardstick[i] = drift(self.where[i], exact, real)


def fits(runtime: Runtime, itemsize: int) -> bool:
    """Whether the unsharded model fits into this rank's free memory, including what torch reserves
    but does not use."""
    needed = int(runtime.part.info.num_parameters * itemsize * ROOM)
    if runtime.device == "cpu":
        return needed < psutil.virtual_memory().available
    return (
        needed
        < torch.cuda.mem_get_info()[0]
        + torch.cuda.memory_reserved()
        - torch.cuda.memory_allocated()
    )


def whole(runtime: Runtime, dtype: torch.dtype, streams: bool) -> torch.nn.Module:
    """The unsharded version of the loaded model, ready to run on this rank's device.

    LoadError: it cannot be built or run. MemoryBudgetError: it must be streamed, but a builder's
    model cannot be."""
    info = runtime.part.info
    source = runtime.part.source
    name = dtype_name(dtype)
    if source.builder is None:
        if streams:
            return streamed(info.path, dtype, runtime.device, info.attention)
        return load(info.path, Layout(), name, runtime.device, info.attention)
    if source.reference is None:
        raise LoadError(
            f"{info.path} was loaded without reference=, which builds what it is verified against"
        )
    if streams:
        raise MemoryBudgetError(
            f"{info.path}: the unsharded model has {info.num_parameters:,} parameters, which do "
            "not fit into what is "
            "free here; only a model that was loaded from a folder can be verified layer by layer"
        )
    model = pickle.loads(source.reference)().eval()
    if any(p.is_meta for p in model.parameters()):
        raise LoadError(
            f"{info.path}: reference() returns a model without weights (on meta): it cannot be run"
        )
    return model.to(runtime.device, dtype if dtype != dtype_of(info.dtype) else None)


def samples(model: torch.nn.Module, names: Sequence[str]) -> dict[str, list[float]]:
    """A few elements of each of these parameters, spread evenly."""
    there = dict(model.named_parameters(remove_duplicate=False))
    return {
        name: sample(there[name].detach())
        for name in names
        if name in there and not there[name].is_meta
    }


def sample(tensor: torch.Tensor) -> list[float]:
    """At most about 128 elements, spread evenly over a tensor of any shape and dtype."""
    flat = tensor.flatten()
    return flat[:: max(1, flat.numel() // 64)].float().tolist()


# --- watching -------------------------------------------------------------------------


def observe(call: Caller, batch: dict[str, torch.Tensor], plan: Plan, put: Put) -> None:
    """Run one forward and call put(index in the plan, value) for each value of the plan, in the
    order of the forward.

    batch: input_ids, attention_mask, position_ids, each (B, S) int64 on the model's device. A
    value should have the shape of its entry."""
    with watching(modules_of(call.model, twice=True), plan, put), torch.no_grad():
        call(batch, use_cache=False)


@contextlib.contextmanager
def watching(modules: dict[str, torch.nn.Module], plan: Plan, put: Put) -> Iterator[None]:
    """Inside the context, hooks call put() for each value of the plan."""
    wanted: dict[tuple[str, str], dict[int, list[tuple[int, Entry]]]] = {}
    for i, entry in enumerate(plan.entries):
        calls = wanted.setdefault((entry.key.module, entry.key.at), {})
        calls.setdefault(entry.key.call, []).append((i, entry))
    undo = [watch(modules, name, at, noting(calls, put)) for (name, at), calls in wanted.items()]
    try:
        yield
    finally:
        for each in undo:
            each()


def noting(calls: dict[int, list[tuple[int, Entry]]], put: Put) -> Callable[[Any], None]:
    """A function that receives each value of one module, and calls put() with the tensors planned
    for that call."""
    count = 0

    def note(value: Any) -> None:
        nonlocal count
        for i, entry in calls.get(count, ()):
            tensor = leaf(value, entry.key.index)
            if tensor is not None:
                put(i, tensor.detach())
        count += 1

    return note


def watch(
    modules: dict[str, torch.nn.Module], name: str, at: str, note: Callable[[Any], None]
) -> Callable[[], None]:
    """Call note with each value of a module or virtual point. Returns a function that stops it."""
    owner, point = split_point(name)
    if point:
        attention.tap(modules[owner], point, lambda value: note(value()))
        return functools.partial(attention.untap, modules[owner], point)
    if at == "input":

        def before(_module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
            note(inputs(args, kwargs))

        return modules[name].register_forward_pre_hook(before, with_kwargs=True).remove

    def after(_module: torch.nn.Module, _args: tuple, out: Any) -> None:
        note(out)

    return modules[name].register_forward_hook(after).remove
