"""The session's store of runs: it keeps them within a budget of bytes, in memory and on disk."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import os
import secrets
import socket
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import psutil
import torch

from flexkernel.cluster.cluster import Cluster
from flexkernel.cluster.interrupts import SignalMask
from flexkernel.errors import CaptureExpired, MemoryBudgetError
from flexkernel.memory.plan import Plan, Planner
from flexkernel.memory.pool import SLAB_BYTES, Extent, Pool
from flexkernel.memory.slab import PAGE, Slab, claim_folder, folder_path, on_disk, pages
from flexkernel.wire import Layout, Region, RunPlan, RunReport

from .capture import Capture
from .edits import made_text
from .generation import generated
from .prompts import token_strings
from .reports import captures_of, made_nan
from .run import Run
from .spill import Spill

__all__ = ["Store", "costliest"]

# kept at a time: each costs the driver and every engine some memory beside its bytes in slabs
MOST_RUNS = 100


class Store:
    """The session's runs and the memory behind them: slabs on this host, clients of the hosts that
    are elsewhere.

    A notebook's Out[] keeps every run for ever, so memory is bounded by a budget: above it the
    oldest runs that nobody keeps or looks into expire.
    """

    def __init__(self, engines: Cluster, layout: Layout):
        self.layout = layout
        host = os.environ.get("FLEX_HOST", "")
        name = engines.folder + (f"-{host}" if host else "")
        # An engine made the folder under a random name: where it is there already, this is the
        # engine's own memory.
        same = folder_path(name).is_dir()
        self.engines = engines
        self.here = (host or socket.gethostname()) if same else "elsewhere"
        self.folder, self._claim = claim_folder(name)
        self.notes: dict[str, str] = {}  # rank → what made its copies of the last run slow
        self.spill = Spill(engines, name, same)
        self.hosts: list[str] = list(engines.hosts)
        free = psutil.disk_usage(str(self.folder)).free
        self.pool = Pool(secrets.token_hex(4), max(min(SLAB_BYTES, free // 8 // PAGE * PAGE), PAGE))
        self.most_runs = MOST_RUNS
        self.budget = min(psutil.virtual_memory().available // 4, free)
        self.runs: collections.OrderedDict[int, Run] = collections.OrderedDict()
        self._freed: list[int] = []
        self._extents: dict[int, Extent] = {}
        # captures that belong to no run
        self._lent: list[tuple[weakref.ref[Capture], Extent]] = []
        self._slabs: dict[str, Slab] = {}
        # (module, at, index) of what equals the unsharded model's
        self.verified: set[tuple[str, str, str]] = set()
        self._clients: dict[str, Any] = {}
        self._count = 0
        # bytes a second of the last run's copies, all ranks together
        self.bandwidth: float | None = None
        self._connect()

    def slab(self, name: str, num_bytes: int, create: bool = False) -> Slab:
        """A slab of this host, mapped once and kept. create: it is written into here, where no
        engine may have yet."""
        if name not in self._slabs:
            home = self.spill.folder if on_disk(name) else self.folder
            if home is None:
                raise CaptureExpired(f"{name} was moved to disk by a session that has ended")
            # A large one is not read at once: this process would be said to have all of it in
            # memory
            self._slabs[name] = Slab(
                home / name, num_bytes, create, create or num_bytes <= SLAB_BYTES
            )
        return self._slabs[name]

    def _connect(self) -> None:
        """Have every other host serve its slabs from here on: an engine that is busy later would
        not begin to."""
        for host in dict.fromkeys(self.hosts):
            if host != self.here:
                self.client(host)

    def client(self, host: str) -> Any:
        """Who asks another host for its slabs: its first engine serves them from a thread."""
        if host not in self._clients:
            from flexkernel.memory.client import Client

            token = secrets.token_hex(16)
            address, token = self.engines.call(
                "serve", token, "127.0.0.1", ranks=[self.hosts.index(host)]
            )[0]
            self._clients[host] = Client(address, token)
        return self._clients[host]

    def close(self) -> None:
        """Let go of every run and connection."""
        for run in list(self.runs.values()):
            self.free(run, "its session has ended, or has loaded another model")
        self._recall("its session has ended, or has loaded another model")
        self.spill.close()
        for client in self._clients.values():
            client.close()
        self._clients.clear()
        self._slabs.clear()
        self._claim.close()

    def read_everywhere(self, region: Region, slab_bytes: int) -> list[torch.Tensor]:
        """What lies in a region of the same slab on each host: tensors of the region's shape."""
        return [
            self.slab(region.slab, slab_bytes).tensor(region)
            if host == self.here
            else self.client(host).read(region)
            for host in dict.fromkeys(self.hosts)
        ]

    def discard(self, number: int) -> None:
        """Have the engines forget a run with the next one, unless it is added."""
        self._freed.append(number)

    def take_freed(self) -> tuple[int, ...]:
        """The runs freed since the last call: the engines hear of them with the next run."""
        freed, self._freed = tuple(self._freed), []
        return freed

    def next_number(self) -> int:
        self._count += 1
        return self._count

    def _may_expire(self, run: Run) -> bool:
        """Whether nobody keeps the run or looks into it."""
        extent = self._extents.get(run.number)
        return not run.kept and not run.freed and extent is not None and extent.tensors <= 0

    def _in_memory(self, run: Run) -> bool:
        return not on_disk(self._extents[run.number].slab)

    def pinned_bytes(self) -> int:
        """Bytes that no newer run could have: of runs that are kept or looked into, and of
        parameters in use."""
        free = [run for run in self.runs.values() if self._may_expire(run) and self._in_memory(run)]
        gone = [self._extents[run.number] for run in free]
        gone += [extent for _, extent in self._lent if extent.tensors <= 1]
        return self.pool.num_bytes - sum(extent.num_bytes for extent in gone)

    def spill_to(self, folder: str, budget: int | None = None) -> None:
        """Move the oldest captures there when memory is short, up to so many bytes (budget=0:
        none, they expire), and have there at once what alone is larger than the budget of memory.
        On every host."""
        self.spill.to(folder, budget)

    def beyond_memory(self, num_bytes: int) -> bool:
        """Whether so much is put on disk at once: the user has said where, and it cannot be had in
        memory."""
        return self.spill.given and num_bytes > self.budget

    def refusal(
        self, num_bytes: int, what: str = "this run", costs: str = "", disk: bool = False
    ) -> MemoryBudgetError | None:
        """Why there cannot be room for so much; None: there can. costs: which hooks it is mostly
        for. disk: it may lie there."""
        self.pool.drain()  # tensors that died since the last run count no more
        if disk and self.beyond_memory(num_bytes):
            there = [
                run
                for run in self.runs.values()
                if self._may_expire(run) and not self._in_memory(run)
            ]
            room = self.spill.room() + sum(self._extents[run.number].num_bytes for run in there)
            if num_bytes <= room:
                return None
            return MemoryBudgetError(
                f"{what} would keep {num_bytes:,} bytes; the session's budget of memory is "
                f"{self.budget:,}, and of its "
                f"budget on disk, in {self.spill.root}, {room:,} are free: free runs (run.free()) "
                f"or hook less{costs}"
            )
        if num_bytes > self.budget:
            instead = ", or have it on disk, session.store.spill_to(FOLDER)" if disk else ""
            return MemoryBudgetError(
                f"{what} would keep {num_bytes:,} bytes and the session's budget is "
                f"{self.budget:,}: hook less, use "
                f"--positions or --reduce, raise session.store.budget{instead}{costs}"
            )
        held = self.pinned_bytes()
        if held + num_bytes > self.budget:
            return MemoryBudgetError(
                f"{what} would keep {num_bytes:,} bytes; runs that are kept or looked into hold "
                f"{held:,} of the "
                f"session's budget of {self.budget:,}: free some (run.free()){costs}"
            )
        return None

    def growth(self, num_bytes: int) -> int:
        """Bytes of a new slab file that a run of so many needs; 0: there is one, or older runs
        give theirs back."""
        lacks = self.pool.num_bytes + num_bytes > self.budget
        return 0 if lacks else self.pool.growth(num_bytes)

    def take(self, num_bytes: int, what: str = "this run") -> Extent:
        """Room for captures; older ones go to disk to make it, or expire, parameters first.
        MemoryBudgetError: that is not enough."""
        problem = self.refusal(num_bytes, what)
        if problem is not None:
            raise problem
        self._recall("it expired to make room; session.parameter(name) reads it again", num_bytes)
        for run in list(self.runs.values()):
            few = len(self.runs) < self.most_runs
            if self.pool.num_bytes + num_bytes <= self.budget and few:
                break
            if self._may_expire(run) and (
                not few or (self._in_memory(run) and not self._to_disk(run))
            ):
                self._expire(run)
        return self.pool.lease(num_bytes)

    def _expire(self, run: Run) -> None:
        self.free(run, "it expired to make room for newer runs; run.keep() keeps one")

    def _room_on_disk(self, num_bytes: int) -> bool:
        """Whether there is room on disk, once older runs there have expired."""
        for run in list(self.runs.values()):
            if self.spill.room() >= num_bytes:
                return True
            if self._may_expire(run) and not self._in_memory(run):
                self._expire(run)
        return self.spill.room() >= num_bytes

    def _to_disk(self, run: Run) -> bool:
        """Move what a run keeps to disk; False: there is no room."""
        extent = self._extents[run.number]
        if (
            self.spill.budget == 0
            or not self.spill.useful()
            or not self._room_on_disk(extent.num_bytes)
        ):
            return False
        target = self.spill.move(run.number, extent)
        if target is None:
            return False
        run.plan = dataclasses.replace(
            run.plan, slab=target.slab, slab_bytes=target.slab_bytes, base=0
        )
        for capture in run.captures.values():
            capture.move(target, extent.base)
        self._extents[run.number] = target
        self.pool.release(extent)
        return True

    def give_back(self, extent: Extent, spoilt: bool = False) -> None:
        """Bytes that nobody needs any more. spoilt: the slab could not be made."""
        if on_disk(extent.slab):
            self.spill.release(extent)
        elif spoilt:
            self.pool.abandon(extent)
        else:
            self.pool.release(extent)

    def lend(self, capture: Capture, extent: Extent) -> None:
        """Let a capture that belongs to no run have these bytes until it is freed or dies, or room
        is needed."""
        # it counts as a tensor made from the extent
        back = weakref.finalize(capture, extent.pin())
        back.atexit = False
        self.pool.release(extent)

        def give_back() -> None:
            back()
            self.pool.drain()

        capture.give_back = give_back
        self._lent = [(ref, held) for ref, held in self._lent if ref() is not None] + [
            (weakref.ref(capture), extent)
        ]

    def _recall(self, why: str, num_bytes: int | None = None) -> None:
        """Take back what is lent, the oldest first; with num_bytes: only until these fit, and
        nothing looked into."""
        for ref, extent in list(self._lent):
            if num_bytes is not None and self.pool.num_bytes + num_bytes <= self.budget:
                return
            capture = ref()
            if (
                capture is not None
                and capture.give_back is not None
                and (num_bytes is None or extent.tensors <= 1)
            ):
                capture.expire(why)
                capture.give_back()
                self._lent.remove((ref, extent))

    @contextlib.contextmanager
    def room(self, num_bytes: int, what: str = "this run") -> Iterator[Extent]:
        """Room while something is made; given back if that fails."""
        with self._unless_it_fails(self.take(num_bytes, what)) as extent:
            yield extent

    @contextlib.contextmanager
    def room_for_run(self, number: int, num_bytes: int, costs: str) -> Iterator[Extent]:
        """The same for what a run keeps, which lies on disk if it is larger than the budget of
        memory."""
        problem = self.refusal(num_bytes, costs=costs, disk=True)
        if problem is not None:
            raise problem
        if self.beyond_memory(num_bytes):
            self._room_on_disk(num_bytes)
            taken = self.spill.take(number, num_bytes)
        else:
            taken = self.take(num_bytes)
        with self._unless_it_fails(taken, costs) as extent:
            yield extent

    @contextlib.contextmanager
    def _unless_it_fails(self, extent: Extent, costs: str = "") -> Iterator[Extent]:
        try:
            yield extent
        except MemoryBudgetError as error:
            self.give_back(extent, spoilt=True)
            raise MemoryBudgetError(f"{error}{costs}") from None
        except BaseException:
            # else it is that of a partial run
            if not any(extent is held for held in self._extents.values()):
                self.give_back(extent)
            raise

    def recover(self, by_rank: Sequence[dict], planner: Planner, tokenizer: Any) -> None:
        """The runs of an earlier driver that every rank still knows: their captures lie where that
        one put them."""
        for number, (plan, hooks, _) in sorted(by_rank[0].items()):
            reports = [runs[number][2] for runs in by_rank if number in runs]
            if len(reports) == len(by_rank):
                new = plan.generation.max_new_tokens if plan.generation is not None else 0
                where = planner.plan(
                    hooks, len(plan.ids), len(plan.ids[0]), new, plan.loss is not None
                )
                tokens = [token_strings(row, tokenizer) for row in plan.ids]
                extent = Extent(
                    plan.slab, plan.slab_bytes, plan.base, max(pages(plan.num_bytes), pages(1))
                )
                self._adopt(extent)
                run = self.add(plan, where, extent, reports, tokens, tokenizer)
                run.edits = tuple(made_text(hook) for hook in hooks if hook.edit is not None)

    def _adopt(self, extent: Extent) -> None:
        if not on_disk(extent.slab):
            self.pool.adopt(extent)
            return
        self.spill.recover()
        self.spill.adopt(extent)

    def add(
        self,
        plan: RunPlan,
        where: Plan,
        extent: Extent,
        reports: Sequence[RunReport],
        tokens: Any,
        tokenizer: Any,
        partial: str = "",
    ) -> Run:
        """The run that these reports describe. partial: why it ended early, if it did."""
        forwards = max(report.forwards for report in reports)
        new = generated(reports, len(plan.ids)) if plan.generation is not None else []
        longest = max(map(len, new), default=0)
        more = [[*token_strings(row, tokenizer), *[""] * (longest - len(row))] for row in new]
        tokens = (
            [[*row, *words] for row, words in zip(tokens, more, strict=True)] if new else tokens
        )
        run = Run(plan.run, plan, tokens, tokenizer, new, forwards)
        self._count = max(self._count, plan.run)
        run.silent, run.stopped = where.silent, any(report.stopped for report in reports)
        run.globs = {entry.hook.key: entry.hook.glob for entry in where.entries}
        run.warnings = made_nan(reports)
        self.notes = {f"rank {report.rank}": report.note for report in reports if report.note}
        run.seconds = {
            k: max(r.seconds.get(k, 0.0) for r in reports) for k in ("prepare", "forward", "copy")
        }
        run.partial = partial
        run.loss = next((r.loss for r in reports if r.loss is not None), None)
        run.captures = captures_of(run, where, extent, reports, self, self.layout)
        for capture in run.captures.values():
            value = capture.key.module, capture.key.site.without_side, capture.key.index
            capture.verified = value in self.verified
        run._store = self
        with SignalMask():
            self.runs[run.number] = run
            self._extents[run.number] = extent
            self._freed = [number for number in self._freed if number != run.number]
        return run

    def records(self, rank: int, of_another: Mapping[int, Any], planner: Planner) -> dict[int, Any]:
        """What an engine keeps of each stored run, (plan, hooks, report), for a rank whose engine
        lost it; of_another: what another rank's engine keeps."""
        found: dict[int, Any] = {}
        for number, (plan, hooks, _) in of_another.items():
            run = self.runs.get(number)
            if run is None:
                continue
            length = plan.generation.max_new_tokens if plan.generation is not None else 0
            where = planner.plan(hooks, len(plan.ids), len(plan.ids[0]), length)
            at = {entry.key: i for i, entry in enumerate(where.entries)}
            seen = {
                key: capture.records[rank]
                for key, capture in run.captures.items()
                if rank in capture.records
            }
            planned = {at[key]: value for key, value in seen.items() if key in at}
            others = {key: value for key, value in seen.items() if key not in at}
            report = RunReport(rank, number, planned, others, run.seconds, run.stopped)
            new = dict(enumerate(run.new_ids))
            found[number] = (
                plan,
                hooks,
                dataclasses.replace(report, forwards=run.forwards, generated=new),
            )
        return found

    def reconnect(self) -> None:
        """Engines have changed: find out anew who is where, and who serves another host's
        slabs."""
        self.hosts = list(self.engines.hosts)
        for client in self._clients.values():
            client.close()
        self._clients.clear()
        self._connect()
        self.spill.reopen()

    def may_keep(self) -> None:
        """Refuse to keep a run where that is not in this session's hands."""

    def free(self, run: Run, why: str) -> None:
        """Take a run's memory back."""
        if run.freed:
            return
        run.freed = "freed"
        for region in [
            s.region
            for c in run.captures.values()
            for s in c.records.values()
            if s.region is not None
        ]:
            self._slabs.pop(region.slab, None)
        if on_disk(run.plan.slab):
            self._slabs.pop(run.plan.slab, None)
        for capture in run.captures.values():
            capture.expire(why)
        self.runs.pop(run.number, None)
        self._freed.append(run.number)
        extent = self._extents.pop(run.number, None)
        if extent is not None:
            self.give_back(extent)


def costliest(where: Plan, most: int = 3) -> str:
    """Which hooks a run's bytes are mostly for, as the end of a sentence."""
    rows = [
        f"{hook} {num_bytes:,} bytes"
        for hook, (_, num_bytes) in list(where.by_hook().items())[:most]
    ]
    return f"; what costs most: {', '.join(rows)}" if rows else ""
