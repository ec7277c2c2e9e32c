"""Runner: has the engines run a batch, and stores what came of it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

from flexkernel.cluster.cluster import Cluster
from flexkernel.memory.plan import Plan
from flexkernel.memory.pool import Extent
from flexkernel.wire import Region, RunPlan, RunReport

from .generation import Stream, generated
from .prompts import Batch
from .reports import at_one_forward, check_edited, whole_everywhere
from .run import Run
from .store import Store, costliest
from .text import shorter

__all__ = ["Runner"]

MEASURED_BYTES = 1 << 20  # a run that copies less says little of how fast copies are
OnToken = Callable[[int, str], Any]  # (row, text)


class Runner:
    """Runs batches on engines; the runs go into the store. tokenizer: transformers', or None."""

    def __init__(self, engines: Cluster, store: Store, tokenizer: Any):
        self._engines = engines
        self._store = store
        self._tokenizer = tokenizer

    def run(
        self,
        batch: Batch,
        where: Plan,
        wanted: dict[str, Any],
        edits: tuple[str, ...] = (),
        on_token: OnToken | None = None,
    ) -> Run:
        """Have the engines run a batch, once there is room for what it keeps.

        where: the plan of what it keeps. wanted: the RunPlan's other fields. edits: those that are
        active, in words. on_token: called with the text of a generation as it comes."""
        begin = time.perf_counter()
        store = self._store
        number = store.next_number()
        with store.room_for_run(number, where.num_bytes, costliest(where)) as extent:
            plan = RunPlan(
                run=number,
                ids=batch.ids,
                mask=batch.mask,
                positions=batch.positions,
                slab=extent.slab,
                slab_bytes=extent.slab_bytes,
                base=extent.base,
                num_bytes=where.num_bytes,
                logits_last=where.logits_last,
                timeout_s=self._engines.timeout_s,
                freed=store.take_freed(),
                **wanted,
            )
            store.discard(number)  # if it fails: what it left on the engines goes with the next run
            try:
                reports = self._reports(plan, where, on_token)
            except BaseException as error:
                self._keep_partial(error, plan, where, extent, batch, edits)
                raise
            check_edited(reports)
            run = store.add(plan, where, extent, reports, batch.tokens, self._tokenizer)
        run.edits = edits
        run.seconds["total"] = time.perf_counter() - begin
        if where.num_bytes >= MEASURED_BYTES and run.seconds["copy"] > 0:
            store.bandwidth = where.num_bytes / run.seconds["copy"]
        return run

    def _reports(self, plan: RunPlan, where: Plan, on_token: OnToken | None) -> list[RunReport]:
        if plan.generation is None:
            return self._engines.call("run", plan)
        return self._streamed(plan, where, on_token)

    def _keep_partial(
        self,
        error: BaseException,
        plan: RunPlan,
        where: Plan,
        extent: Extent,
        batch: Batch,
        edits: tuple[str, ...],
    ) -> None:
        """Store what all ranks had captured of a run before it failed, if that is anything. An
        interrupt says where that is."""
        interrupted = isinstance(error, KeyboardInterrupt)
        why = "interrupted" if interrupted else shorter(str(error).partition("\n")[0], 120)
        reports = at_one_forward(getattr(error, "flex_partial", ()))
        whole = whole_everywhere(where, reports) if reports else set()
        if not any(where.entries[i].key.hook != "logits" for i in whole):
            return
        kept = [
            dataclasses.replace(r, planned={i: r.planned[i] for i in whole & set(r.planned)})
            for r in reports
        ]
        args = (plan, where, extent, kept, batch.tokens, self._tokenizer)
        run = self._store.add(*args, partial=why)
        run.edits = edits
        if interrupted:
            new = max(map(len, run.new_ids), default=0)
            after = f" after {new} token{'s' * (new != 1)}" if plan.generation is not None else ""
            error.args = (f"interrupted{after}; what was captured is session.last",)

    def _streamed(self, plan: RunPlan, where: Plan, on_token: OnToken | None) -> list[RunReport]:
        """The reports of a generation; meanwhile on_token gets its new text. What it raises says
        how far it was."""
        region = where.text_region(plan.slab, plan.base)

        def read(region: Region) -> list[list[list[int]]]:
            return [
                table.tolist() for table in self._store.read_everywhere(region, plan.slab_bytes)
            ]

        stream = Stream(plan, region, self._tokenizer, read, on_token)
        try:
            with self._engines.watched(stream if on_token is not None else None):
                reports = self._engines.call("run", plan)
            stream.end(generated(reports, len(plan.ids)))
            return reports
        except BaseException as error:
            raised = stream.failure or error
            made = [text for text in stream.so_far() if text]
            if made:
                raised.add_note(f"generated before that: {made}")
            if raised is error:
                raise
            raised.flex_partial = getattr(error, "flex_partial", ())  # type: ignore[attr-defined]
            raise raised from None
