"""Preview: what a run would keep, where, how long its copies take, and whether it fits. Nothing is
run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flexkernel.boxes import share
from flexkernel.memory.plan import Entry, Plan
from flexkernel.session.prompts import Prompts
from flexkernel.session.store import costliest
from flexkernel.views.table import Table
from flexkernel.wire import Layout, ModelInfo, ModuleInfo

if TYPE_CHECKING:
    from flexkernel.session.session import Session
    from flexkernel.session.store import Store

__all__ = ["Preview", "preview"]

# bytes a second, until a run has been measured: less than warm slabs take, more than fresh ones
BANDWIDTH = 2e9
SHOWN = 12  # hooks in a repr


@dataclass(frozen=True)
class Preview:
    """What a run would keep.

    hooks: hook → (captures, bytes), what costs most first. num_bytes: of all of it, on each host
    that has engines. by_rank: bytes that each rank copies there. free: host → bytes that are free
    (where slabs lie, of memory). budget, room: of the session, and how much of it newer runs can
    have. bandwidth: bytes a second of all ranks together; measured: it is the last run's.
    unplanned: modules of which the size depends on the data, beside all that. problem: why the run
    would be refused, "" if it would not. on_disk: the folder, if it is larger than the budget of
    memory and the user has said where; else ""."""

    B: int
    S: int
    new: int
    hooks: dict[str, tuple[int, int]]
    num_bytes: int
    by_rank: tuple[int, ...]
    free: dict[str, tuple[int, int]]
    budget: int
    room: int
    bandwidth: float
    measured: bool
    unplanned: tuple[str, ...]
    problem: str
    on_disk: str

    @property
    def fits(self) -> bool:
        return not self.problem

    @property
    def seconds(self) -> float:
        """How long the ranks copy."""
        return self.num_bytes / self.bandwidth

    def rows(self) -> list[tuple[str, str]]:
        """(what, value), but for the hooks."""
        how = "as in the last run" if self.measured else "a guess until a run was measured"
        tokens = f"{self.B} × {self.S} tokens"
        if self.new:
            tokens += f" + {self.new} new"
        size = f"{shown(self.num_bytes)} on each host"
        if self.unplanned:
            size += f"; beside it {len(self.unplanned)} modules whose size depends on the data"
        rows = [
            ("batch", tokens),
            ("to keep", size),
            ("by rank", ", ".join(map(shown, self.by_rank))),
            ("to copy", f"{self.seconds:.3g} s at {shown(self.bandwidth)}/s, {how}"),
            ("budget", f"{shown(self.budget)}, of which {shown(self.room)} can be had"),
        ]
        for host, (slabs, memory) in self.free.items():
            rows.append((f"free on {host}", f"{shown(slabs)} for slabs, {shown(memory)} of memory"))
        fits = "yes"
        if self.on_disk:
            fits += f", on disk, in {self.on_disk}"
        rows.append(("fits", self.problem or fits))
        return rows

    def __repr__(self) -> str:
        parts = [Table(self.rows()).text(), self._table().text("  "), self._left_out()]
        return "\n".join(filter(None, parts))

    def _repr_html_(self) -> str:
        tables = Table(self.rows()).html() + self._table().html()
        return f"<div>{tables}<p>{self._left_out()}</p></div>"

    def _table(self) -> Table:
        """The hooks that cost most."""
        rows = [
            (hook, str(count), shown(num_bytes))
            for hook, (count, num_bytes) in list(self.hooks.items())[:SHOWN]
        ]
        return Table(rows, ("hook", "captures", "bytes"), right=(1, 2), code=(0,))

    def _left_out(self) -> str:
        left = len(self.hooks) - SHOWN
        if left <= 0:
            return ""
        return f"... and {left} more hooks"


def preview(
    session: Session,
    prompts_or_ids: Prompts,
    groups: Sequence[str] | str = (),
    complement: bool = False,
    chat: bool = False,
    max_new_tokens: int = 0,
    loss: bool = False,
    bandwidth: float | None = None,
) -> Preview:
    """What a run of this would keep; see Session.preview. It asks every engine for what is free on
    its host."""
    batch = session.batch(prompts_or_ids, chat)
    where = session.plan(batch, groups, complement, max_new_tokens, loss)
    store = session.store
    info = session.loaded.info
    free = dict(zip(store.hosts, session.call("memory.free"), strict=True))
    return Preview(
        B=len(batch.ids),
        S=len(batch.ids[0]),
        new=max_new_tokens,
        hooks=where.by_hook(),
        num_bytes=where.num_bytes,
        by_rank=by_rank(info, where.entries, len(batch.ids)),
        free=free,
        budget=store.budget,
        room=max(store.budget - store.pinned_bytes(), 0),
        bandwidth=bandwidth or store.bandwidth or BANDWIDTH,
        measured=bandwidth is None and store.bandwidth is not None,
        unplanned=where.unplanned,
        problem=problem_of(store, where, free),
        on_disk=str(store.spill.root) if store.beyond_memory(where.num_bytes) else "",
    )


def problem_of(store: Store, where: Plan, free: dict[str, tuple[int, int]]) -> str:
    """Why there would be no room; "" if there would."""
    refusal = store.refusal(where.num_bytes, costs=costliest(where), disk=True)
    if refusal is not None:
        return str(refusal)
    if store.beyond_memory(where.num_bytes):
        return ""
    grows = store.growth(where.num_bytes)
    for host, (slabs, _) in free.items():
        if grows > slabs:
            return (
                f"a slab of {grows:,} bytes is needed and {slabs:,} are free for it on "
                f"{host}{costliest(where)}"
            )
    return ""


def by_rank(info: ModelInfo, entries: Sequence[Entry], B: int) -> tuple[int, ...]:
    """Bytes that each rank copies: its rows of the batch, its part over tp, of what its stage
    holds. Ranks that hold copies share the work, so that it is as if they held parts."""
    modules = {module.name: module for module in info.modules}
    total = [0.0] * info.layout.world
    for entry in entries:
        for rank in range(info.layout.world):
            total[rank] += entry.num_bytes * part(info.layout, rank, entry, B, modules)
    return tuple(map(round, total))


def part(layout: Layout, rank: int, entry: Entry, B: int, modules: dict[str, ModuleInfo]) -> float:
    """Which share of a capture a rank copies."""
    where = layout.coordinate(rank)
    if where.pp != stage_of(entry, modules):
        return 0.0
    rows = 1 / layout.batch_groups
    if entry.formula.batched:
        start, stop = share(B, layout.batch_groups, where.batch)
        rows = (stop - start) / B
    return rows / layout.tp


def stage_of(entry: Entry, modules: dict[str, ModuleInfo]) -> int:
    """The stage that reads a value: the first that holds its module, for outputs that span stages
    the last."""
    name = entry.key.site.module
    if entry.hook.of == "param":
        name = name.rpartition(".")[0]
    module = modules.get(name) or modules[""]
    if module.spans and entry.hook.of == "output":
        return module.stages[-1]
    return module.stages[0]


def shown(num_bytes: float) -> str:
    """A number of bytes, to read.

    >>> shown(1_234), shown(6_400_000_000)
    ('1.2 kB', '6.4 GB')
    """
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes:.0f} B"
