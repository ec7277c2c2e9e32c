"""The part of a session that is about faults: dead engines are replaced, runs that do not move are
broken off."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from flexkernel.cluster.cluster import Cluster, chosen
from flexkernel.memory.plan import Planner
from flexkernel.wire import EditSpec, HookSet, ModelInfo, RankState, Source

from .run import Store

__all__ = ["Recovery"]


class Recovery:
    """Brings ranks back, with what the session knows of them."""

    cluster: Cluster
    info: ModelInfo | None
    source: Source
    store: Store | None
    planner: Planner
    hook_set: HookSet
    edits: dict[str, EditSpec]
    _held_modules: Callable[[], dict[str, tuple[bytes, bytes]]]

    def restart(self, rank: int | Sequence[int] | None = None) -> list[int]:
        """Replace engines by new ones, by default those that have died; returns their ranks. Each
        loads its rank's part of the model only; the others keep theirs where it is. Hooks, edits
        and stored runs are as before; what an edit saved in ctx.save on a rank that died is lost.

        A rank whose engine runs, or hangs, is ended first. ClusterError: nothing to replace, or
        none can be started."""
        ranks = chosen(self.cluster, rank)
        self.cluster.replace(ranks, self._heritage(ranks))
        if self.store is not None:
            self.store.reconnect()
            self.cluster.call("train.forget_steps")
        return ranks

    @property
    def auto_restart(self) -> bool:
        """Whether a dead engine is replaced by itself, before the next call to the engines. Off
        unless you set it."""
        return self.cluster.revive is not None

    @auto_restart.setter
    def auto_restart(self, value: bool) -> None:
        self.cluster.revive = self.restart if value else None

    @property
    def timeout_s(self) -> float:
        """Seconds after which a run in which nothing moves is broken off: the ranks come back, the
        model stays loaded. 60 unless you set it; a longer one counts in full from the next load
        on."""
        return self.cluster.timeout_s

    @timeout_s.setter
    def timeout_s(self, value: float) -> None:
        self.cluster.timeout_s = value

    def _heritage(self, ranks: Sequence[int]) -> dict[int, RankState]:
        """What the new engines of these ranks are given; nothing while no model is loaded."""
        if self.info is None or self.store is None:
            return {}
        left = [r for r, alive in enumerate(self.cluster.alive()) if alive and r not in ranks][:1]
        there = self.cluster.call("recover.rank_state", ranks=left)[0] if left else None
        modules = there.modules if there else self._held_modules()
        runs = {
            rank: self.store.records(rank, there.runs if there else {}, self.planner)
            for rank in ranks
        }
        return {
            r: RankState(self.info, self.source, self.hook_set, self.edits, runs[r], modules)
            for r in ranks
        }
