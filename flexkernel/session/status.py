"""Status: engines, model, memory, hooks and runs as they are now; and what is guaranteed for the
engines."""

from __future__ import annotations

from flexkernel.cluster.cluster import Cluster
from flexkernel.cluster.guarantees import guarantees
from flexkernel.views.table import Table

from .edits import made_text
from .hooks import HookBook
from .model import Loaded
from .store import Store

__all__ = ["Guarantees", "Status"]


class Facts:
    """A table of facts. rows: (what, value)."""

    rows: list[tuple[str, str]]

    def __repr__(self) -> str:
        return Table(self.rows).text()

    def _repr_html_(self) -> str:
        return Table(self.rows).html()


class Status(Facts):
    """What a session has, in five lines."""

    def __init__(
        self, engines: Cluster, loaded: Loaded | None, store: Store | None, hooks: HookBook
    ):
        self.rows = [("engines", engines_text(engines))]
        if loaded is None or store is None:
            self.rows.append(("model", "none loaded"))
            return
        self.rows += [
            ("model", model_text(loaded, engines.device)),
            ("memory", memory_text(loaded, store)),
            ("hooks", hooks_text(hooks)),
            ("runs", runs_text(store)),
        ]


class Guarantees(Facts):
    """What is guaranteed for the engines of a session, by how it came to them."""

    def __init__(self, engines: Cluster):
        self.rows = [("cluster", lifetime(engines))]
        cluster_id = getattr(engines, "cluster_id", "")
        if cluster_id:
            self.rows.append(("cluster id", cluster_id))
        self.rows += guarantees(engines.origin)


def engines_text(engines: Cluster) -> str:
    alive = sum(engines.answering())
    hosts = ", ".join(dict.fromkeys(engines.hosts))
    cluster_id = getattr(engines, "cluster_id", "")
    name = f"; cluster {cluster_id}" if cluster_id else ""
    return f"{alive} of {engines.size} alive on {hosts}{name}; {lifetime(engines)}"


def lifetime(engines: Cluster) -> str:
    """What becomes of the engines when this session ends."""
    origin = engines.origin
    if origin.reader:
        return f"joined read-only: {getattr(engines, 'owner_text', str)()}"
    if origin.kept:
        return "kept: it stays when this notebook ends; %flex_cluster stop ends it"
    if origin.owned:
        return "owned: it ends with this session"
    return "attached: it stays when this session ends"


def model_text(loaded: Loaded, device: str) -> str:
    info = loaded.info
    return (
        f"{info.cls} from {info.path}: {info.num_parameters:,} parameters, {info.layout}, "
        f"{info.dtype}, attention {info.attention}, on {device}"
    )


def memory_text(loaded: Loaded, store: Store) -> str:
    weights = ", ".join(f"{num_bytes / 1e6:,.0f}" for num_bytes in loaded.info.rank_bytes)
    slabs = sum(store.pool.slabs.values()) / 1e6
    parts = [
        f"weights {weights} MB by rank",
        f"slabs {slabs:,.0f} MB in {len(store.pool.slabs)} files, in {store.folder}",
        *(f"copies of {rank}: {note}" for rank, note in store.notes.items()),
    ]
    return "; ".join(parts)


def hooks_text(hooks: HookBook) -> str:
    edits = [made_text(hook) for hook in hooks if hook.edit is not None]
    text = str(len(hooks))
    if edits:
        text += f", {len(edits)} of them edits: {'; '.join(edits[:3])}"
    if len(edits) > 3:
        text += "; ..."
    return text if hooks.sent else f"{text}; to be sent when all ranks answer"


def runs_text(store: Store) -> str:
    parts = [
        f"{len(store.runs)} stored: {store.pool.num_bytes / 1e6:,.1f} of "
        f"{store.budget / 1e6:,.0f} MB budget, at most {store.most_runs} runs"
    ]
    spill = store.spill
    if spill.problem:
        parts.append(f"on disk: nothing can be moved there: {spill.problem}")
    if spill.extents:
        budget = (spill.budget or 0) / 1e6
        parts.append(
            f"on disk: {len(spill.extents)} runs, {spill.num_bytes / 1e6:,.1f} of {budget:,.0f} MB "
            f"budget, in {spill.root}"
        )
    return "; ".join(parts)
