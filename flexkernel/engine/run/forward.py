"""One forward with its captures: PREPARE, in which every rank says whether it can, then GO.

Nothing is sent in the forward that the model would not send by itself.
"""

from __future__ import annotations

import contextlib
import functools
import time
import traceback
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from flexkernel.boxes import share
from flexkernel.engine.compat import in_fsdp1
from flexkernel.engine.place.placements import Place
from flexkernel.engine.place.slabs import extra_slab, forget, open_slab, power
from flexkernel.engine.place.staging import with_landed_digests
from flexkernel.engine.ranks.breaker import fault
from flexkernel.engine.ranks.gather import Exchange, OtherRankFailed, header
from flexkernel.engine.ranks.mesh import leave
from flexkernel.errors import EngineError, FlexError, HookError, LoadError, PlacementError
from flexkernel.memory.plan import Plan
from flexkernel.memory.slab import Slab
from flexkernel.wire import ErrorReport, HookSpec, RunPlan, RunReport

from . import generate, train
from .autograd import Tape, backward, graph_of, trainable
from .edits import PRESETS, Editor, seen_by
from .generate import Steps
from .gradients import edit_gradients, forget_gradients, sum_parameters, tied
from .hooks import Recording, StopForward, spiller
from .tokens import TokenBuffer

__all__ = ["run"]

ABORTED = "NCCL communicator was aborted"
BROKEN = ("gloo/transport", ABORTED)  # a collective says so when a peer has broken it


def run(runtime: Any, plan: RunPlan) -> RunReport:
    """This rank's share of the run. All ranks must call. Raises before the forward what is wrong,
    on all ranks."""
    start = time.perf_counter()
    forget(runtime, plan.freed)
    prepared: tuple[Recording, dict[str, torch.Tensor]] | None = None
    problem: Exception | None = None
    try:
        prepared = prepare(runtime, plan)
    except Exception as error:  # told to all ranks in the header, and raised there
        problem = error
    with runtime.watch.over(plan.timeout_s):
        agree(runtime, plan, problem)
        assert prepared is not None
        recording, batch = prepared
        ready = time.perf_counter()
        stopped = go(runtime, plan, recording, batch)
    return RunReport(
        rank=runtime.rank,
        run=plan.run,
        planned=recording.planned,
        others=recording.others,
        seconds={
            "prepare": ready - start,
            "forward": time.perf_counter() - ready - recording.seconds,
            "copy": recording.seconds,
        },
        stopped=stopped,
        loss=recording.loss,
        edited=recording.editor.edited if recording.editor is not None else {},
        forwards=recording.forwards if isinstance(recording, Steps) else 1,
        generated=recording.text.new if isinstance(recording, Steps) else {},
        note=runtime.copies.note,
    )


def prepare(runtime: Any, plan: RunPlan) -> tuple[Recording, dict[str, torch.Tensor]]:
    """Everything that can fail before the forward: the hooks, the slab, the rows."""
    if runtime.model is None:
        raise EngineError("no model is loaded on this rank", runtime.rank)
    if plan.hooks != runtime.hook_set.digest:
        raise HookError(
            f"rank {runtime.rank} has other hooks than the session; attach again, or load again"
        )
    info, layout = runtime.info, runtime.info.layout
    if plan.generation is not None:
        generate.check(runtime)
    runtime.caller.check_pads(not all(map(all, plan.mask)))
    active = runtime.hook_set.active(plan.groups, plan.complement)
    B, S = len(plan.ids), len(plan.ids[0])
    new = plan.generation.max_new_tokens if plan.generation is not None else 0
    where: Plan = runtime.planner.plan(active, B, S, new, plan.loss is not None)
    assert where.num_bytes == plan.num_bytes, "driver and engine plan the same bytes"
    slab = open_slab(runtime, plan.slab, plan.slab_bytes)
    runtime.copies.begin(slab)
    rows = share(B, layout.batch_groups, layout.coordinate(runtime.rank).batch)
    here = Place(layout, runtime.rank, B, S, rows, info.window)
    text = TokenBuffer(plan)
    if plan.generation is not None:
        text = TokenBuffer(
            plan, slab.tensor(where.text_region(plan.slab, plan.base)), generate.ends(runtime, plan)
        )
        text.begin(range(*rows))
    kind = Steps if plan.generation is not None else Recording
    recording = kind(
        where,
        frozenset(hook.key for hook in active),
        slab,
        lambda entry: where.region(entry, plan.slab, plan.base),
        runtime.placer,
        here,
        spiller(lambda num_bytes: extra_slab(runtime, plan, num_bytes), runtime.copies.write),
        text,
        editor(runtime, plan, active, here, text),
        tape(runtime, plan, active),
        runtime.copies,
    )
    return recording, batch_of(plan, rows, runtime.device)


def tape(runtime: Any, plan: RunPlan, active: list[HookSpec]) -> Tape | None:
    """For a run with a loss: what its backward begins from. HookError: it cannot be made."""
    if plan.loss is None:
        return None
    asked = [hook.key for hook in active if hook.of == "param"]
    if (asked or (plan.training is not None and plan.training.parameters)) and in_fsdp1(
        runtime.model
    ):
        raise PlacementError(
            "FSDP1 flattens parameters and averages their gradients: those are not read or trained here; "
            f"use fully_shard(module){f', or unhook {asked[0]!r}' if asked else ''}"
        )
    in_edits = runtime.modules and any(
        hook.edit is not None and hook.edit not in PRESETS for hook in active
    )
    trains = plan.training is not None and bool(plan.training.parameters)
    return Tape(graph=bool(in_edits) or trains or any(hook.gradient for hook in active))


def editor(
    runtime: Any, plan: RunPlan, active: list[HookSpec], here: Place, text: TokenBuffer
) -> Editor | None:
    """Who makes this run's edits; None if there are none. HookError where they cannot be made."""
    editing = [hook for hook in active if hook.edit is not None]
    if not editing:
        return None
    exchange = None
    per = {hook.key: seen_by(hook, runtime.edits) for hook in editing}
    if runtime.seat.world > 1 and any(what != "element" for what in per.values()):
        whole = [key for key, what in per.items() if what == "whole"]
        if (
            plan.generation is not None
            and whole
            and runtime.info.layout.batch_groups > 1
            and several_hosts(runtime)
        ):
            raise HookError(
                f"{whole[0]}: the rows of this generation are on several hosts, and an edit there sees those of its "
                "own only: make it per='row'"
            )

        def slab_of(group: str, turn: int, num_bytes: int) -> Slab:
            size = power(num_bytes)
            return open_slab(
                runtime, f"exchange-{group_name(runtime, group)}-{turn}-{size}.slab", size
            )

        exchange = Exchange(runtime.groups, slab_of, runtime.seat.hosts, plan.timeout_s)
    return Editor(
        runtime.info,
        plan,
        here,
        text,
        runtime.placer,
        runtime.edits,
        runtime.saved,
        exchange,
        lambda name, num_bytes: open_slab(runtime, name, num_bytes),
        runtime.modules,
        runtime.device,
    )


def several_hosts(runtime: Any) -> bool:
    return len(set(runtime.seat.hosts)) > 1


def group_name(runtime: Any, group: str) -> str:
    """What tells one group's slab from another's of the same kind."""
    where = runtime.info.layout.coordinate(runtime.rank)
    if group == "world":
        return group
    return f"{group}-{where.pp}" + (f"-{where.batch}" if group == "tp" else "")


def batch_of(plan: RunPlan, rows: tuple[int, int], device: str) -> dict[str, torch.Tensor]:
    """This rank's rows; one copied row where it has none, since it must run the model's
    collectives all the same."""
    own = slice(*rows) if rows[1] > rows[0] else slice(0, 1)
    tensor = lambda rows: torch.tensor(rows[own], dtype=torch.long, device=device)  # noqa: E731
    return {
        "input_ids": tensor(plan.ids),
        "attention_mask": tensor(plan.mask),
        "position_ids": tensor(plan.positions),
    }


def agree(runtime: Any, plan: RunPlan, problem: Exception | None) -> None:
    """Go on only if every rank can. Raises the rank's own problem, or that another rank has
    one."""
    if runtime.seat.world == 1:
        if problem is not None:
            raise problem
        return
    runtime.breaker.busy = True
    try:
        said = header(
            [plan.run, plan.hooks, int(problem is not None), plan.num_bytes], plan.timeout_s
        )
    except BaseException as failure:
        broke_off(runtime, failure)
        raise
    finally:
        runtime.breaker.busy = False
    if problem is not None:
        raise problem
    unready = said[:, 2].nonzero().flatten().tolist()
    if unready:
        error = EngineError(f"rank {unready[0]} was not ready for the run", unready[0])
        error.flex_report = told(runtime, error, secondary=True)  # type: ignore[attr-defined]
        raise error
    if not (said[:, :2] == said[0, :2]).all():
        raise EngineError(f"the ranks are in different runs: {said[:, 0].tolist()}", runtime.rank)


def go(runtime: Any, plan: RunPlan, recording: Recording, batch: dict[str, torch.Tensor]) -> bool:
    """The forward itself; whether it was stopped early. A rank that fails breaks the groups, so
    that nobody waits."""
    runtime.breaker.busy = runtime.seat.world > 1
    runtime.hooks.recording = recording
    hooked = [name for _, names in recording.of_parameters(runtime) for name in names]
    training = plan.training.parameters if plan.training is not None else ()
    names = tied([*hooked, *training], runtime.info.tied)
    try:
        hurt = fault(runtime.rank, runtime.named)
        with graph_of(runtime, recording.tape, names), hurt, stopping(runtime, plan) as enters:
            stopped = enters and forward(runtime, plan, recording, batch)
            land(runtime, recording)
            if recording.tape is not None and not stopped:
                slab_of = functools.partial(slab_of_size, runtime)
                for parameter in trainable(runtime.modules):
                    parameter.grad = None
                recording.loss = backward(runtime, plan, recording, slab_of)
                sum_parameters(runtime, names, plan.timeout_s)
                train.sum_modules(runtime, plan.timeout_s)
                recording.keep_parameters(runtime, before=True)
                edit_gradients(runtime, recording)
                recording.keep_parameters(runtime)
                if plan.training is not None:
                    train.step(runtime, plan)
                land(runtime, recording)
        return stopped
    except BaseException as error:
        broke_off(runtime, error, so_far(runtime, plan, recording))
        raise
    finally:
        runtime.copies.drop()
        runtime.hooks.recording = None
        runtime.breaker.busy = False
        if recording.tape is not None:
            recording.tape.forget()
        forget_gradients(runtime, names)


def forward(
    runtime: Any, plan: RunPlan, recording: Recording, batch: dict[str, torch.Tensor]
) -> bool:
    """This rank's forward, or its forwards; whether it was stopped early."""
    try:
        if isinstance(recording, Steps):
            generate.generate(runtime, plan, recording, batch)
        else:
            runtime.caller(batch, use_cache=False)
    except StopForward:
        return True
    return False


def land(runtime: Any, recording: Recording) -> None:
    """Have all captures be there. RuntimeError: the groups were aborted meanwhile; on a GPU
    nothing else would say so, and what was computed since is not what it seems to be."""
    recording.land()
    if recording.copies.in_flight and runtime.seat.world > 1 and runtime.breaker.broken:
        raise RuntimeError(f"{ABORTED} while this rank computed")


def so_far(runtime: Any, plan: RunPlan, recording: Recording) -> tuple[RunReport, ...]:
    """What a run that ends here has captured on this rank; of a generation, after each of its last
    forwards. Nothing on a GPU beside others: it is on its way still, and what it waits for may not
    come, or be cut off."""
    if recording.copies.in_flight and runtime.seat.world > 1:
        return ()
    recording.land()
    done = recording.whole if isinstance(recording, Steps) else {1: recording.planned}
    new = recording.text.new if isinstance(recording, Steps) else {}
    return tuple(
        RunReport(
            runtime.rank,
            plan.run,
            with_landed_digests(planned),
            {},
            {},
            forwards=forwards,
            generated={row: list(ids[:forwards]) for row, ids in new.items()},
        )
        for forwards, planned in done.items()
    )


def broke_off(runtime: Any, error: BaseException, partial: tuple[RunReport, ...] = ()) -> None:
    """This rank does not go on: say why, and let nobody wait for it."""
    report = told(runtime, error, broken=runtime.seat.world > 1)
    error.flex_report = replace(report, partial=partial)  # type: ignore[attr-defined]
    if runtime.seat.world > 1:
        runtime.breaker.break_groups()


def gave_up(runtime: Any, error: BaseException) -> None:
    """This rank has not got its part of a model: say why, and leave the groups, those too that the
    load has made and that no breaker knows of. What is left of the model holds them: it goes
    first."""
    broke_off(runtime, error)
    at: BaseException | None = error
    while at is not None:
        traceback.clear_frames(at.__traceback__)
        at = at.__cause__ or at.__context__
    runtime.unload()
    if runtime.seat.world > 1:
        leave()


@contextlib.contextmanager
def stopping(runtime: Any, plan: RunPlan) -> Iterator[bool]:
    """Arrange for the forward to end at plan.stop_at; yields whether this rank enters the forward
    at all.

    Ranks of a tp group reach the module together. Stages before it end where they would wait for
    the logits, stages after it do not begin. With the batch split (fsdp, dp), and in a builder's
    pipeline, the forward runs to its end: its collectives need all."""
    layout = runtime.info.layout
    if plan.stop_at is None or layout.batch_groups > 1 or (runtime.info.built and layout.pp > 1):
        yield True
        return
    module = next(m for m in runtime.info.modules if m.name == plan.stop_at)
    last = module.stages[-1] if module.spans else module.stages[0]
    mine = layout.coordinate(runtime.rank).pp
    stage = getattr(runtime.model, "_pp_stage", None)
    handle = None

    def stop(*_args: Any, **_kwargs: Any) -> None:
        raise StopForward

    if mine == last:
        handle = runtime.hooks.modules[plan.stop_at].register_forward_hook(stop)
    elif stage is not None and mine < last:
        stage.broadcast_from_last = stop
    try:
        yield mine <= last
    finally:
        if handle is not None:
            handle.remove()
        elif stage is not None:
            stage.__dict__.pop("broadcast_from_last", None)


def told(
    runtime: Any, error: BaseException, broken: bool = False, secondary: bool = False
) -> ErrorReport:
    """The error as the driver hears of it."""
    text = "".join(traceback.format_exception(error))
    name = (
        type(error).__name__ if isinstance(error, (FlexError, KeyboardInterrupt)) else "EngineError"
    )
    message = (
        str(error)
        if name != "EngineError"
        else f"{type(error).__name__} on rank {runtime.rank}: {error}"
    )
    message += f" (rank {runtime.rank})" if name == "EditError" else ""
    broke = isinstance(error, RuntimeError | LoadError) and any(mark in message for mark in BROKEN)
    secondary = secondary or broke or isinstance(error, OtherRankFailed)
    stall, waited = runtime.watch.stall, ""
    if stall is not None and (
        broke or isinstance(error, KeyboardInterrupt) or "KeyboardInterrupt" in message
    ):
        stall.waiting |= broke
        secondary, waited = stall.waiting, stall.module if stall.waiting else ""
        edit = f"; {message}" if name == "EditError" else ""
        name = "EngineError" if name == "KeyboardInterrupt" else name
        message = f"rank {runtime.rank} " + (
            f"{stall}" if stall.waiting else f"did not arrive, {stall}{edit}"
        )
    return ErrorReport(runtime.rank, name, message, text, time.time(), broken, secondary, waited)


def slab_of_size(runtime: Any, name: str, num_bytes: int) -> Slab:
    """A slab that holds at least so many bytes, under a name that says how many it has."""
    size = power(num_bytes)
    return open_slab(runtime, f"{name}-{size}.slab", size)
