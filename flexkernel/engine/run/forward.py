"""One forward with its captures: PREPARE, in which every rank says whether it can, then GO.

Nothing is sent in the forward that the model would not send by itself.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch

from flexkernel.boxes import share
from flexkernel.engine.compat import in_fsdp1
from flexkernel.engine.failure import ABORTED, broke_off, report_not_ready
from flexkernel.engine.place.placements import Place
from flexkernel.engine.place.staging import with_landed_digests
from flexkernel.engine.ranks.gather import Exchange, header
from flexkernel.engine.runtime import Runtime
from flexkernel.errors import EngineError, HookError, PlacementError
from flexkernel.memory.plan import Plan
from flexkernel.memory.slab import Slab
from flexkernel.wire import HookSpec, RunPlan, RunReport

from . import generate, train
from .autograd import Tape, backward, graph_of, trainable
from .edits import PRESETS, Editor, seen_by
from .generate import Steps
from .gradients import edit_gradients, forget_gradients, sum_parameters, tied
from .hooks import Recording, StopForward, spiller
from .tokens import TokenBuffer

__all__ = ["run"]


def run(runtime: Runtime, plan: RunPlan) -> RunReport:
    """This rank's share of the run. All ranks must call. Raises before the forward what is wrong,
    on all ranks."""
    start = time.perf_counter()
    runtime.memory.forget(plan.freed)
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
        note=runtime.part.copies.note,
    )


def prepare(runtime: Runtime, plan: RunPlan) -> tuple[Recording, dict[str, torch.Tensor]]:
    """Everything that can fail before the forward: the hooks, the slab, the rows."""
    if plan.hooks != runtime.part.hook_set.digest:
        raise HookError(
            f"rank {runtime.rank} has other hooks than the session; attach again, or load again"
        )
    info, layout = runtime.part.info, runtime.part.info.layout
    if plan.generation is not None:
        generate.check(runtime)
    runtime.part.caller.check_pads(not all(map(all, plan.mask)))
    active = runtime.part.hook_set.active(plan.groups, plan.complement)
    B, S = len(plan.ids), len(plan.ids[0])
    new = plan.generation.max_new_tokens if plan.generation is not None else 0
    where: Plan = runtime.part.planner.plan(active, B, S, new, plan.loss is not None)
    assert where.num_bytes == plan.num_bytes, "driver and engine plan the same bytes"
    slab = runtime.memory.slab(plan.slab, plan.slab_bytes)
    runtime.part.copies.begin(slab)
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
        runtime.part.placer,
        here,
        spiller(
            lambda num_bytes: runtime.memory.extra(plan.run, num_bytes), runtime.part.copies.write
        ),
        text,
        editor(runtime, plan, active, here, text),
        tape(runtime, plan, active),
        runtime.part.copies,
    )
    return recording, batch_of(plan, rows, runtime.device)


def tape(runtime: Runtime, plan: RunPlan, active: list[HookSpec]) -> Tape | None:
    """For a run with a loss: what its backward begins from. HookError: it cannot be made."""
    if plan.loss is None:
        return None
    asked = [hook.key for hook in active if hook.of == "param"]
    if (asked or (plan.training is not None and plan.training.parameters)) and in_fsdp1(
        runtime.part.model
    ):
        raise PlacementError(
            "FSDP1 flattens parameters and averages their gradients: those are not read or trained here; "
            f"use fully_shard(module){f', or unhook {asked[0]!r}' if asked else ''}"
        )
    in_edits = runtime.trainables.modules and any(
        hook.edit is not None and hook.edit not in PRESETS for hook in active
    )
    trains = plan.training is not None and bool(plan.training.parameters)
    return Tape(graph=bool(in_edits) or trains or any(hook.gradient for hook in active))


def editor(
    runtime: Runtime, plan: RunPlan, active: list[HookSpec], here: Place, text: TokenBuffer
) -> Editor | None:
    """Who makes this run's edits; None if there are none. HookError where they cannot be made."""
    editing = [hook for hook in active if hook.edit is not None]
    if not editing:
        return None
    exchange = None
    per = {hook.key: seen_by(hook, runtime.edits) for hook in editing}
    if runtime.world > 1 and any(what != "element" for what in per.values()):
        whole = [key for key, what in per.items() if what == "whole"]
        if (
            plan.generation is not None
            and whole
            and runtime.part.info.layout.batch_groups > 1
            and several_hosts(runtime)
        ):
            raise HookError(
                f"{whole[0]}: the rows of this generation are on several hosts, and an edit there sees those of its "
                "own only: make it per='row'"
            )

        def slab_of(group: str, turn: int, num_bytes: int) -> Slab:
            name = f"exchange-{group_name(runtime, group)}-{turn}"
            return runtime.memory.slab_of_size(name, num_bytes)

        exchange = Exchange(runtime.part.groups, slab_of, runtime.rank_info.hosts, plan.timeout_s)
    return Editor(
        runtime.part.info,
        plan,
        here,
        text,
        runtime.part.placer,
        runtime.edits,
        runtime.saved,
        exchange,
        runtime.memory.slab,
        runtime.trainables.modules,
        runtime.device,
    )


def several_hosts(runtime: Runtime) -> bool:
    return len(set(runtime.rank_info.hosts)) > 1


def group_name(runtime: Runtime, group: str) -> str:
    """What tells one group's slab from another's of the same kind."""
    where = runtime.part.info.layout.coordinate(runtime.rank)
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


def agree(runtime: Runtime, plan: RunPlan, problem: Exception | None) -> None:
    """Go on only if every rank can. Raises the rank's own problem, or that another rank has
    one."""
    if runtime.world == 1:
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
        report_not_ready(runtime, error)
        raise error
    if not (said[:, :2] == said[0, :2]).all():
        raise EngineError(f"the ranks are in different runs: {said[:, 0].tolist()}", runtime.rank)


def go(
    runtime: Runtime, plan: RunPlan, recording: Recording, batch: dict[str, torch.Tensor]
) -> bool:
    """The forward itself; whether it was stopped early. A rank that fails breaks the groups, so
    that nobody waits."""
    runtime.breaker.busy = runtime.world > 1
    runtime.part.hooks.recording = recording
    hooked = [name for _, names in recording.of_parameters(runtime) for name in names]
    training = plan.training.parameters if plan.training is not None else ()
    names = tied([*hooked, *training], runtime.part.info.tied)
    try:
        with graph_of(runtime, recording.tape, names), stopping(runtime, plan) as enters:
            stopped = enters and forward(runtime, plan, recording, batch)
            land(runtime, recording)
            if recording.tape is not None and not stopped:
                for parameter in trainable(runtime.trainables.modules):
                    parameter.grad = None
                recording.loss = backward(runtime, plan, recording, runtime.memory.slab_of_size)
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
        runtime.part.copies.drop()
        runtime.part.hooks.recording = None
        runtime.breaker.busy = False
        if recording.tape is not None:
            recording.tape.forget()
        forget_gradients(runtime, names)


def forward(
    runtime: Runtime, plan: RunPlan, recording: Recording, batch: dict[str, torch.Tensor]
) -> bool:
    """This rank's forward, or its forwards; whether it was stopped early."""
    try:
        if isinstance(recording, Steps):
            generate.generate(runtime, plan, recording, batch)
        else:
            runtime.part.caller(batch, use_cache=False)
    except StopForward:
        return True
    return False


def land(runtime: Runtime, recording: Recording) -> None:
    """Have all captures be there. RuntimeError: the groups were aborted meanwhile; on a GPU
    nothing else would say so, and what was computed since is not what it seems to be."""
    recording.land()
    if recording.copies.in_flight and runtime.world > 1 and runtime.breaker.broken:
        raise RuntimeError(f"{ABORTED} while this rank computed")


def so_far(runtime: Runtime, plan: RunPlan, recording: Recording) -> tuple[RunReport, ...]:
    """What a run that ends here has captured on this rank; of a generation, after each of its last
    forwards. Nothing on a GPU beside others: it is on its way still, and what it waits for may not
    come, or be cut off."""
    if recording.copies.in_flight and runtime.world > 1:
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


@contextlib.contextmanager
def stopping(runtime: Runtime, plan: RunPlan) -> Iterator[bool]:
    """Arrange for the forward to end at plan.stop_at; yields whether this rank enters the forward
    at all.

    Ranks of a tp group reach the module together. Stages before it end where they would wait for
    the logits, stages after it do not begin. With the batch split (fsdp, dp), and in a builder's
    pipeline, the forward runs to its end: its collectives need all."""
    layout = runtime.part.info.layout
    if (
        plan.stop_at is None
        or layout.batch_groups > 1
        or (runtime.part.info.built and layout.pp > 1)
    ):
        yield True
        return
    module = next(m for m in runtime.part.info.modules if m.name == plan.stop_at)
    last = module.stages[-1] if module.spans else module.stages[0]
    mine = layout.coordinate(runtime.rank).pp
    stage = getattr(runtime.part.model, "_pp_stage", None)
    handle = None

    def stop(*_args: Any, **_kwargs: Any) -> None:
        raise StopForward

    if mine == last:
        handle = runtime.part.hooks.modules[plan.stop_at].register_forward_hook(stop)
    elif stage is not None and mine < last:
        stage.broadcast_from_last = stop
    try:
        yield mine <= last
    finally:
        if handle is not None:
            handle.remove()
        elif stage is not None:
            stage.__dict__.pop("broadcast_from_last", None)
