"""The launchers: how engines come to be, as ipyparallel has it. On this machine, or as jobs of a batch system."""

from __future__ import annotations

from typing import Any

from ipyparallel.cluster.launcher import LocalEngineLauncher, LocalEngineSetLauncher, SlurmLauncher

__all__ = ["KEPT", "FlexEngineSetLauncher", "kind_of", "launchers"]

KEPT = "kept-"  # what the ids of clusters begin with that outlive their notebook


class FlexEngineLauncher(LocalEngineLauncher):
    """A local engine with one thread for torch. It waits for a controller that crashed for as long as its driver, which
    starts it again, is there; when that goes the reaper ends it. A kept one, which has no reaper, leaves by itself."""

    def find_args(self) -> list[str]:
        kept = self.cluster_id.startswith(KEPT)
        return [*super().find_args(), *([] if kept else ["--IPEngine.max_heartbeat_misses=0"])]

    def get_env(self) -> dict[str, str]:
        env = super().get_env()
        env.setdefault("OMP_NUM_THREADS", "1")
        env.update(TOKENIZERS_PARALLELISM="false", HF_HUB_DISABLE_PROGRESS_BARS="1", PYDEVD_DISABLE_FILE_VALIDATION="1")
        return env


class FlexEngineSetLauncher(LocalEngineSetLauncher):
    """The engines of this machine; found by name through the entry point, so that a cluster file can be read back."""

    launcher_class = FlexEngineLauncher


KINDS = {LocalEngineSetLauncher: "local", SlurmLauncher: "slurm"}


def kind_of(launcher: type) -> str:
    """What kind of launcher it is, in a word of promises.How."""
    return next((kind for base, kind in KINDS.items() if issubclass(launcher, base)), "other")


def launchers(group: Any) -> list[Any]:
    """The local engines of one of a cluster's engine sets; none where a batch system has them."""
    return list(getattr(group, "launchers", {}).values())
