"""The door: how new engines begin, before this process imports what it needs itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flexkernel.cluster.launchers import launcher_for, preload

if TYPE_CHECKING:
    from .progress import Progress
    from .session import Session

__all__ = ["start"]


def start(
    n: int = 2,
    engines: str | None = None,
    cluster_id: str = "",
    keep: bool = False,
    progress: Progress | None = None,
) -> Session:
    """A session over n new engines, which end with it unless keep is set.

    engines: slurm ("slurm --time=1:00:00"), ssh, mpi, pbs, ... progress: called with (what is being
    done, how many engines are there, of how many)."""
    preload(launcher_for(engines)[0])  # it imports torch while this process does
    from flexkernel.cluster import begin

    from .session import Session

    return Session(begin.start(n, engines, cluster_id, keep, progress=progress))
