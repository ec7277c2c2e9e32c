"""Status: engines, what is promised for them, model, hooks and memory as they are now."""

from __future__ import annotations

from typing import Any

from flexkernel.cluster.cluster import Cluster
from flexkernel.cluster.guarantees import guarantees
from flexkernel.views.table import Table

from .hooks import HookBook
from .model import Loaded
from .store import Store

__all__ = ["Status"]


def lifetime(cluster: Any) -> str:
    """What becomes of the engines when this session ends."""
    if getattr(cluster, "reader", False):
        return f"joined read-only: {cluster.owner_text()}"
    if getattr(cluster, "kept", False):
        return "kept: it stays when this notebook ends; %flex_cluster stop ends it"
    return (
        "owned: it ends with this session"
        if cluster.owned
        else "attached: it stays when this session ends"
    )


class Status:
    """A table of what a session has. rows: (what, value)."""

    def __init__(
        self, cluster: Cluster, loaded: Loaded | None, store: Store | None, hooks: HookBook
    ):
        alive = cluster.answering()
        self.rows: list[tuple[str, str]] = [
            (
                "engines",
                f"{sum(alive)} of {cluster.size} alive on {', '.join(dict.fromkeys(cluster.hosts))}",
            ),
            ("cluster", lifetime(cluster)),
        ]
        cluster_id = getattr(cluster, "cluster_id", "")
        if cluster_id:
            self.rows.append(("cluster id", cluster_id))
        promised = guarantees(cluster.origin)
        if loaded is None or store is None:
            self.rows += [("model", "none loaded"), *promised]
            return
        info = loaded.info
        self.rows += [
            ("model", f"{info.cls} from {info.path}"),
            (
                "layout",
                f"{info.layout}, {info.dtype}, attention {info.attention}, on {cluster.device}",
            ),
            (
                "parameters",
                f"{info.num_parameters:,} in all; by rank {', '.join(f'{n:,}' for n in info.rank_parameters)}",
            ),
            ("weights", ", ".join(f"{n / 1e6:,.0f} MB" for n in info.rank_bytes) + " by rank"),
            ("hooks", f"{len(hooks)}"),
            (
                "runs",
                f"{len(store.runs)} stored: {store.pool.num_bytes / 1e6:,.1f} of {store.budget / 1e6:,.0f} MB budget, "
                f"at most {store.most_runs} runs",
            ),
            (
                "slabs",
                f"{len(store.pool.slabs)} files, {sum(store.pool.slabs.values()) / 1e6:,.0f} MB, in {store.folder}",
            ),
        ]
        self.rows += [("copies", f"{rank}: {note}") for rank, note in store.notes.items()]
        if store.spill.problem:
            self.rows.append(("on disk", f"nothing can be moved there: {store.spill.problem}"))
        if store.spill.extents:
            self.rows.append(
                (
                    "on disk",
                    f"{len(store.spill.extents)} runs, {store.spill.num_bytes / 1e6:,.1f} of "
                    f"{(store.spill.budget or 0) / 1e6:,.0f} MB budget, in {store.spill.root}",
                )
            )
        self.rows += promised

    def __repr__(self) -> str:
        return Table(self.rows).text()

    def _repr_html_(self) -> str:
        return Table(self.rows).html()
