"""A run on one rank: PREPARE, in which every rank says whether it can, then GO.

Nothing is sent in the forward that the model would not send by itself.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from flexkernel.boxes import share
from flexkernel.engine.compat import in_fsdp1
from flexkernel.engine.failure import ABORTED, broke_off, report_not_ready
from flexkernel.engine.place.placements import Place
from flexkernel.engine.place.staging import with_landed_digests
from flexkernel.engine.ranks.gather import Exchange, exchange_headers
from flexkernel.engine.runtime import Runtime
from flexkernel.errors import EngineError, HookError, PlacementError
from flexkernel.wire import HookSpec, RunPlan, RunReport

from . import generate
from .autograd import Tape, graph_of
from .context import RunContext
from .edits import EditLibrary, Editor
from .generation import GenerationRecording
from .gradients import differentiate, forget_gradients, parameters_of
from .parameters import owned
from .presets import PRESETS
from .recording import Batch, ForwardRecording, Recording
from .tokens import NewTokens, TokenBuffer

__all__ = ["run"]


class StopForward(Exception):
    """Ends a forward at the module that the run said to stop at. Not an error."""


@dataclass(frozen=True)
class Prepared:
    """A run that this rank can begin. batch: this rank's rows, as the model is called with them."""

    recording: Recording
    batch: Batch


def run(runtime: Runtime, plan: RunPlan) -> RunReport:
    """This rank's share of a run. All ranks must call. What is wrong is raised before the forward,
    on all ranks."""
    start = time.perf_counter()
    runtime.memory.forget(plan.freed)
    prepared: Prepared | Exception
    try:
        prepared = prepare(runtime, plan)
    except Exception as error:  # the header tells all ranks, and it is raised there
        prepared = error
    with runtime.watch.over(plan.timeout_s):
        prepared = agree(runtime, plan, prepared)
        recording = prepared.recording
        ready = time.perf_counter()
        stopped = go(runtime, prepared)
    seconds = {
        "prepare": ready - start,
        "forward": time.perf_counter() - ready - recording.seconds,
        "copy": recording.seconds,
    }
    return RunReport(
        rank=runtime.rank,
        run=plan.run,
        planned=recording.planned,
        others=recording.others,
        seconds=seconds,
        stopped=stopped,
        loss=recording.loss,
        edited=recording.editor.edited,
        forwards=recording.forwards,
        generated=recording.context.tokens.new,
        note=runtime.part.copies.note,
    )


# --- PREPARE --------------------------------------------------------------------------


def prepare(runtime: Runtime, plan: RunPlan) -> Prepared:
    """Everything that can fail before the forward: the hooks, the slab, the rows."""
    part = runtime.part
    if plan.hooks != part.hook_set.digest:
        raise HookError(
            f"rank {runtime.rank} has other hooks than the session; attach again, or load again"
        )
    if plan.generation is not None:
        generate.check(part)
    part.caller.check_pads(not all(map(all, plan.mask)))
    active = part.hook_set.active(plan.groups, plan.complement)
    keys = frozenset(hook.key for hook in active)
    context = context_of(runtime, plan, active)
    editor = editor_of(runtime, context, active)
    recording: Recording
    if plan.generation is None:
        recording = ForwardRecording(context, keys, editor, tape_of(runtime, plan, active))
    else:
        recording = GenerationRecording(context, keys, editor, plan.generation)
    return Prepared(recording, batch_of(plan, context.here.rows, runtime.device))


def context_of(runtime: Runtime, plan: RunPlan, active: list[HookSpec]) -> RunContext:
    """What the run has on this rank. MemoryBudgetError: its slab cannot be made."""
    part = runtime.part
    layout = part.info.layout
    B = len(plan.ids)
    S = len(plan.ids[0])
    num_new = 0
    if plan.generation is not None:
        num_new = plan.generation.max_new_tokens
    captures = part.planner.plan(active, B, S, num_new, plan.loss is not None)
    assert captures.num_bytes == plan.num_bytes, "driver and engine plan the same bytes"
    slab = runtime.memory.slab(plan.slab, plan.slab_bytes)
    part.copies.begin(slab)
    rows = share(B, layout.batch_groups, layout.coordinate(runtime.rank).batch)
    here = Place(layout, runtime.rank, B, S, rows, part.info.window)
    tokens = TokenBuffer(plan)
    if plan.generation is not None:
        table = slab.tensor(captures.text_region(plan.slab, plan.base))
        ends = frozenset(generate.end_tokens(part, plan.generation))
        added = NewTokens(table, plan.generation, ends)
        tokens = TokenBuffer(plan, added, range(*rows))
    return RunContext(plan, captures, here, tokens, part.placer, part.copies, runtime.memory)


def tape_of(runtime: Runtime, plan: RunPlan, active: list[HookSpec]) -> Tape | None:
    """For a run with a loss: what its backward begins from. PlacementError: the model's gradients
    cannot be read or trained."""
    if plan.loss is None:
        return None
    trained = plan.training is not None and bool(plan.training.parameters)
    hooked = [hook.key for hook in active if hook.of == "param"]
    if (hooked or trained) and in_fsdp1(runtime.part.model):
        instead = ["use fully_shard(module)", *(f"unhook {key!r}" for key in hooked[:1])]
        raise PlacementError(
            "FSDP1 flattens parameters and averages their gradients: those are not read or trained "
            f"here; {', or '.join(instead)}"
        )
    own_edits = any(hook.edit is not None and hook.edit not in PRESETS for hook in active)
    modules_in_edits = bool(runtime.trainables.modules) and own_edits
    gradients = any(hook.gradient for hook in active)
    return Tape(graph=modules_in_edits or trained or gradients)


def editor_of(runtime: Runtime, context: RunContext, active: list[HookSpec]) -> Editor:
    """What makes this run's edits. HookError: they cannot be made."""
    editing = [hook for hook in active if hook.edit is not None]
    library = EditLibrary(runtime.edits, runtime.saved, runtime.trainables.modules)
    per = {hook.key: library.per(hook) for hook in editing}
    exchange = None
    if runtime.world > 1 and any(kind != "element" for kind in per.values()):
        whole = [key for key, kind in per.items() if kind == "whole"]
        if whole and context.plan.generation is not None:
            check_rows_on_one_host(runtime, whole[0])
        exchange = Exchange(
            runtime.part.groups,
            runtime.memory,
            runtime.rank_info.hosts,
            runtime.part.info.layout.coordinate(runtime.rank),
            context.plan.timeout_s,
        )
    return Editor(context, runtime.part.info, library, exchange, runtime.device)


def check_rows_on_one_host(runtime: Runtime, hook: str) -> None:
    """HookError for a hook whose edit would not see all rows: in a generation each host has the
    tokens of its own rows only."""
    several_hosts = len(set(runtime.rank_info.hosts)) > 1
    if several_hosts and runtime.part.info.layout.batch_groups > 1:
        raise HookError(
            f"{hook}: the rows of this generation are on several hosts, and an edit there sees "
            "those of its own only: make it per='row'"
        )


def batch_of(plan: RunPlan, rows: tuple[int, int], device: str) -> Batch:
    """This rank's rows: input_ids, attention_mask and position_ids, (rows, S) int64 on the device.
    One copied row where it has none, since it must run the model's collectives all the same."""
    own = slice(*rows)
    if rows[0] == rows[1]:
        own = slice(0, 1)

    def tensor(of_all_rows: list[list[int]]) -> torch.Tensor:
        """(rows, S) int64 on the device."""
        return torch.tensor(of_all_rows[own], dtype=torch.long, device=device)

    return {
        "input_ids": tensor(plan.ids),
        "attention_mask": tensor(plan.mask),
        "position_ids": tensor(plan.positions),
    }


def agree(runtime: Runtime, plan: RunPlan, prepared: Prepared | Exception) -> Prepared:
    """Go on only if every rank can. Raises this rank's own problem, or that another rank has one.
    All ranks must call."""
    if runtime.world > 1:
        agree_with_others(runtime, plan, prepared)
    if isinstance(prepared, Exception):
        raise prepared
    return prepared


def agree_with_others(runtime: Runtime, plan: RunPlan, prepared: Prepared | Exception) -> None:
    """Tell the other ranks whether this one is ready, and raise if they are not. All ranks must
    call."""
    runtime.breaker.busy = True
    try:
        headers = exchange_headers(
            plan.timeout_s,
            run=plan.run,
            hooks=plan.hooks,
            not_ready=int(isinstance(prepared, Exception)),
            num_bytes=plan.num_bytes,
        )
    except BaseException as failure:
        broke_off(runtime, failure)
        raise
    finally:
        runtime.breaker.busy = False
    if isinstance(prepared, Exception):
        return  # this rank raises its own problem
    not_ready = headers["not_ready"].nonzero().flatten().tolist()
    if not_ready:
        error = EngineError(f"rank {not_ready[0]} was not ready for the run", not_ready[0])
        report_not_ready(runtime, error)
        raise error
    if not headers.alike("run", "hooks"):
        runs = headers["run"].tolist()
        raise EngineError(f"the ranks are in different runs: {runs}", runtime.rank)


# --- GO -------------------------------------------------------------------------------


def go(runtime: Runtime, prepared: Prepared) -> bool:
    """The forward and what follows from it; whether it was stopped early. A rank that fails breaks
    the groups, so that nobody waits for it. All ranks must call."""
    part = runtime.part
    recording = prepared.recording
    tape = recording.tape
    runtime.breaker.busy = runtime.world > 1
    part.hooks.recording = recording
    names = parameters_of(runtime, recording)
    try:
        graph = graph_of(part.model, tape, owned(runtime, names))
        with graph, stopping(runtime, recording.context.plan) as enters:
            stopped = enters and forward(runtime, prepared)
            land(runtime, recording)
            if tape is not None and not stopped:
                differentiate(runtime, recording, tape, names)
                land(runtime, recording)
        return stopped
    except BaseException as error:
        broke_off(runtime, error, partial_reports(runtime, recording))
        raise
    finally:
        part.copies.drop()
        part.hooks.recording = None
        runtime.breaker.busy = False
        if tape is not None:
            tape.forget()
        forget_gradients(runtime, names)


def forward(runtime: Runtime, prepared: Prepared) -> bool:
    """This rank's forward, or its forwards; whether it was stopped early."""
    try:
        prepared.recording.run(runtime, prepared.batch)
    except StopForward:
        return True
    return False


def land(runtime: Runtime, recording: Recording) -> None:
    """Wait for all captures. RuntimeError: the groups were aborted meanwhile. On a GPU nothing else
    would say so, and what was computed since is not what it seems to be."""
    recording.land()
    in_flight = recording.context.copies.in_flight
    if in_flight and runtime.world > 1 and runtime.breaker.broken:
        raise RuntimeError(f"{ABORTED} while this rank computed")


def partial_reports(runtime: Runtime, recording: Recording) -> tuple[RunReport, ...]:
    """What a run that ends here has captured on this rank; of a generation, after each of its last
    forwards.

    Nothing on a GPU beside others: the copies are on their way still, and what they wait for may
    not come, or be cut off."""
    if recording.context.copies.in_flight and runtime.world > 1:
        return ()
    recording.land()
    return tuple(
        RunReport(
            runtime.rank,
            recording.context.plan.run,
            with_landed_digests(planned),
            {},
            {},
            forwards=forwards,
            generated={
                row: list(ids[:forwards]) for row, ids in recording.context.tokens.new.items()
            },
        )
        for forwards, planned in recording.whole_by_forward().items()
    )


@contextlib.contextmanager
def stopping(runtime: Runtime, plan: RunPlan) -> Iterator[bool]:
    """Within it the forward ends at plan.stop_at. Yields whether this rank enters the forward at
    all.

    Ranks of a tp group reach the module together. Stages before it end where they would wait for
    the logits; stages after it do not begin. With the batch split (fsdp, dp), and in a builder's
    pipeline, the forward runs to its end: its collectives need all ranks."""
    part = runtime.part
    layout = part.info.layout
    own_pipeline = part.info.built and layout.pp > 1
    if plan.stop_at is None or layout.batch_groups > 1 or own_pipeline:
        yield True
        return
    module = next(m for m in part.info.modules if m.name == plan.stop_at)
    last = module.read_on("output")
    here = layout.coordinate(runtime.rank).pp
    stage = getattr(part.model, "_pp_stage", None)

    def stop(*_args: Any, **_kwargs: Any) -> None:
        raise StopForward

    handle = None
    if here == last:
        handle = part.hooks.modules[plan.stop_at].register_forward_hook(stop)
    elif stage is not None and here < last:
        stage.broadcast_from_last = stop
    try:
        yield here <= last
    finally:
        if handle is not None:
            handle.remove()
        elif stage is not None:
            stage.__dict__.pop("broadcast_from_last", None)
