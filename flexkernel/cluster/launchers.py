"""The launchers: how engines come to be, as ipyparallel has it. On this machine, or as jobs of a
batch system."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from ipyparallel.cluster.launcher import (
    BatchSystemLauncher,
    LocalEngineLauncher,
    LocalEngineSetLauncher,
    LocalProcessLauncher,
    SlurmEngineSetLauncher,
    SlurmLauncher,
)
from traitlets import default
from traitlets.config import Config

from flexkernel.errors import ClusterError

from .environment import inherited
from .forkserver import ForkRequest, ForkServer, fork_server
from .process import log_tail

__all__ = [
    "KEPT",
    "FlexEngineSetLauncher",
    "FlexSlurmLauncher",
    "again",
    "beats",
    "ended",
    "engines_of",
    "how_to_end",
    "in_queue",
    "job_of",
    "kind_of",
    "launcher_for",
    "launchers",
    "preload",
    "read_back",
]

KEPT = "kept-"  # what the ids of clusters begin with that outlive their notebook
# how often a controller looks for its engines; a new one is taken in at the second beat
BEAT_S = 0.5
LOST_S = 33.0  # ipyparallel's own: when one that does not answer is taken to be gone
CHECK_S = BEAT_S + 0.5  # how often an engine looks for its controller's beat
LEAVE_S = 180.0  # ipyparallel's own: when one that finds none leaves
ASK_S = 60.0  # how long a command of the batch system may take
LOOK_S = 1.0  # how often it is asked for a job
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "PYDEVD_DISABLE_FILE_VALIDATION": "1",
}


def for_engine(env: dict[str, str]) -> dict[str, str]:
    """What an engine's environment has beside the notebook's: one thread for torch, no bars in its
    log."""
    return {**ENVIRONMENT, **env}


def beats(launcher: Any) -> list[str]:
    """The arguments that tell a controller how often to look for engines of this launcher.
    ipyparallel's 3 s would be most of what a start takes; engines that are not told of it by us
    would leave after fewer seconds."""
    if launcher not in OURS.values():
        return []
    misses = round(LOST_S / BEAT_S)
    return [
        f"--HeartMonitor.period={BEAT_S * 1000:.0f}",
        f"--HeartMonitor.max_heartmonitor_misses={misses}",
    ]


def patience(cluster_id: str, seconds: float) -> list[str]:
    """The argument that says how long an engine waits for a heartbeat of its controller before it
    leaves, 0: for ever.

    A kept one waits for FLEX_IDLE_TTL hours: nobody may be there who would start the controller
    again."""
    if cluster_id.startswith(KEPT):
        seconds = idle_ttl_h() * 3600
    return [f"--IPEngine.max_heartbeat_misses={math.ceil(seconds / CHECK_S)}"]


def idle_ttl_h() -> float:
    """ClusterError: what the environment says is no number of hours."""
    said = os.environ.get("FLEX_IDLE_TTL", "24")
    try:
        hours = float(said)
    except ValueError:
        hours = math.nan
    if not 0 < hours < math.inf:
        raise ClusterError(f"FLEX_IDLE_TTL={said!r} is no number of hours above 0")
    return hours


PROGRAM = "ipyparallel.engine"
ENGINE = [sys.executable, "-m", "flexkernel.cluster.environment", "-m", PROGRAM]
# What takes them longest to import, until they have run a model
IMPORTS = (
    f"{PROGRAM}.app",
    "accelerate",
    "flexkernel.engine.calls",
    "transformers.models.llama.modeling_llama",  # and so what others are made of, too
)


@contextlib.contextmanager
def read_back() -> Iterator[None]:
    """Within it clusters may be read from their files. For each process in one, ipyparallel has a
    thread that waits for its end; where this process has started it, whoever waits second finds
    nothing, and how it ended may be lost to the launcher that is asked for it. So those only
    look."""
    begin = LocalProcessLauncher._start_waiting

    def start_waiting(launcher: LocalProcessLauncher) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            if psutil.Process(launcher.pid).ppid() == os.getpid():
                launcher._wait = functools.partial(look_on, launcher)
        begin(launcher)

    LocalProcessLauncher._start_waiting = start_waiting
    try:
        yield
    finally:
        LocalProcessLauncher._start_waiting = begin


def look_on(launcher: LocalProcessLauncher) -> None:
    """Until its process has ended, whose exit code is left for another."""
    with contextlib.suppress(ChildProcessError):
        os.waitid(os.P_PID, launcher.pid, os.WEXITED | os.WNOWAIT)
    ended = {"exit_code": None, "pid": launcher.pid, "identifier": launcher.identifier}
    launcher.loop.add_callback(lambda: launcher.notify_stop(ended))


# --- on this machine ------------------------------------------------------------------


class FlexEngineLauncher(LocalEngineLauncher):
    """A local engine with one thread for torch. It waits for a controller that crashed for as long
    as its driver, which starts it again, is there; when that goes the reaper ends it.

    It is forked from this driver's nursery where that can be."""

    code: int | None = None  # its exit code, where it was forked
    _fork_server: ForkServer | None = None

    def start(self) -> None:
        environment, folder = (
            inherited({**os.environ, **self.get_env()}),
            os.path.abspath(self.work_dir),
        )
        arguments = self.args[len(self.engine_cmd) :]
        stays = not getattr(getattr(self.parent, "parent", None), "shutdown_atexit", True)
        order = ForkRequest(PROGRAM, arguments, environment, folder, self.output_file, stays)
        found, pid = preload(FlexEngineSetLauncher), None
        if found is not None and found.suits(environment) and self.engine_cmd == ENGINE:
            pid = found.fork(order)
        if pid is None:
            super().start()
            return
        try:
            self.pid, self.process, self._fork_server = pid, psutil.Process(pid), found
            self.notify_start(pid)
            self._start_waiting()
        except psutil.NoSuchProcess:
            raise ClusterError(
                "\n".join(["an engine ended as it began", *log_tail(Path(order.log), 20)])
            ) from None
        except KeyboardInterrupt:
            os.kill(pid, signal.SIGKILL)  # nobody else knows of it yet
            raise

    def _wait(self) -> None:
        if self._fork_server is not None:
            self.code = self._fork_server.wait(self.pid, self._stop_waiting.is_set)
        super()._wait()

    def find_args(self) -> list[str]:
        return [*super().find_args(), *patience(self.cluster_id, 0)]

    def get_env(self) -> dict[str, str]:
        return for_engine(super().get_env())


class FlexEngineSetLauncher(LocalEngineSetLauncher):
    """The engines of this machine."""

    # What a cluster's file names, to be read back by.
    entrypoint_name = "flexkernel.cluster.launchers.FlexEngineSetLauncher"
    launcher_class = FlexEngineLauncher

    @default("engine_cmd")
    def _without_secrets(self) -> list[str]:
        return list(ENGINE)


def preload(launcher: Any) -> ForkServer | None:
    """The nursery of the engines that this launcher starts here and now; None: they have none.
    Begun early, it imports while other things begin."""
    return (
        fork_server(IMPORTS, {**os.environ, **for_engine({})})
        if launcher is FlexEngineSetLauncher
        else None
    )


# --- as jobs --------------------------------------------------------------------------

# --kill-on-bad-exit=0: where an engine dies, the others and their part of the model stay
TEMPLATE = """#!/bin/sh
#SBATCH --job-name=flexkernel-{cluster_id}
#SBATCH --export=ALL
#OPTIONS
umask 077
exec srun --kill-on-bad-exit=0 {program_and_args}
"""
# on each host all of the job's are seen: an engine takes its own
GPUS = "--gpus-per-task=1 --gpu-bind=none"


class FlexSlurmLauncher(SlurmEngineSetLauncher):
    """n engines as one Slurm job. `options`: those of sbatch; unless they speak of GPUs, each
    engine has one.

    The job ends with the session. When the driver is killed the reaper cancels it; if that is gone
    too its engines leave when they have not heard of the controller for three minutes."""

    @default("program")
    def _default_program(self) -> list[str]:
        return list(ENGINE)

    @default("program_args")
    def _default_program_args(self) -> list[str]:
        return [*self.cluster_args, *self.engine_args, *patience(self.cluster_id, LEAVE_S)]

    entrypoint_name = "flexkernel.cluster.launchers.FlexSlurmLauncher"

    @default("batch_file_name")
    # the base's is one for all clusters, in the folder where the notebook runs
    def _own_file(self) -> str:
        return str(Path(self.profile_dir).absolute() / "log" / f"{self.identifier}.sbatch")

    @default("default_template")
    def _own_template(self) -> str:
        words = shlex.split(self.options)
        gpus = [] if any(word.startswith(("--gres", "--gpus", "-G")) for word in words) else [GPUS]
        lines = [f"#SBATCH {line}" for line in (*gpus, *([shlex.join(words)] if words else []))]
        return TEMPLATE.replace("#OPTIONS", "\n".join(lines).replace("{", "{{").replace("}", "}}"))

    def get_env(self) -> dict[str, str]:
        return for_engine(super().get_env())

    def start(self, n: int = 1) -> str:
        Path(self.batch_file).parent.mkdir(parents=True, exist_ok=True)
        try:
            return super().start(n)
        except FileNotFoundError as error:
            raise ClusterError(
                f"Slurm is not on this machine: there is no {error.filename} on PATH"
            ) from None
        except subprocess.CalledProcessError as error:
            raise ClusterError(
                f"sbatch refused the job (exit code {error.returncode}): {self.batch_file}"
            ) from None

    def stop(self) -> str:
        """Cancel the job, if it has not ended."""
        there = self.job_id and state(self.job_id)
        said = super().stop() if there else str(self.notify_stop({"job_id": self.job_id}))
        Path(self.batch_file).unlink(missing_ok=True)
        return said


def state(job: str) -> str:
    """A job's, in Slurm's words; "" if it has ended."""
    command = ["squeue", "--noheader", "--format=%T", f"--jobs={job}"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=ASK_S, check=False)
    except (FileNotFoundError, subprocess.TimeoutExpired) as error:
        raise ClusterError(f"Slurm cannot be asked for job {job}: {error}") from None
    # what it says of one that is long over
    if asked.returncode and "invalid job id" not in asked.stderr.lower():
        raise ClusterError(
            f"Slurm cannot be asked for job {job}: {asked.stderr.strip() or asked.returncode}"
        )
    words = asked.stdout.split()
    return (
        words[0]
        if words and words[0] not in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        else ""
    )


_looked: dict[str, tuple[float, str]] = {}  # job → (when it was asked for, its state)


def looked_at(job: str) -> str:
    """A job's state, not older than a second."""
    if job not in _looked or time.monotonic() - _looked[job][0] > LOOK_S:
        _looked[job] = time.monotonic(), state(job)
    return _looked[job][1]


# --- of any kind ----------------------------------------------------------------------

KINDS = {LocalEngineSetLauncher: "local", SlurmLauncher: "slurm"}
OURS: dict[str, Any] = {"local": FlexEngineSetLauncher, "slurm": FlexSlurmLauncher}


def launcher_for(engines: str | None) -> tuple[Any, Config]:
    """The launcher that the user means, and its configuration: a name of ipyparallel's, and for
    slurm the options of sbatch after it, "slurm --partition=gpu --time=04:00:00"."""
    name, *options = shlex.split(engines or "local")
    if options and name != "slurm":
        raise ClusterError(f"engines={engines!r}: only slurm takes options, those of sbatch")
    config = Config()
    if options:
        config.FlexSlurmLauncher.options = shlex.join(options)
    return OURS.get(name, name), config


def kind_of(launcher: type) -> str:
    """What kind of launcher it is, in a word of guarantees.Origin."""
    return next((kind for base, kind in KINDS.items() if issubclass(launcher, base)), "other")


def launchers(group: Any) -> list[Any]:
    """The local engines of one of a cluster's engine sets; none where a batch system has them."""
    return list(getattr(group, "launchers", {}).values())


def engines_of(group: Any) -> list[psutil.Process]:
    """The processes of an engine set that are on this machine, and there."""
    return [one.process for one in launchers(group) if getattr(one, "process", None) is not None]


def again(groups: list[Any]) -> dict[str, Any]:
    """What a further engine set has to be told to be as these are: a job of the same script."""
    return next(
        (
            {"batch_template": g.batch_template}
            for g in groups
            if isinstance(g, BatchSystemLauncher)
        ),
        {},
    )


def in_queue(group: Any) -> bool:
    """Whether its job has not begun yet."""
    return isinstance(group, SlurmLauncher) and looked_at(group.job_id) in (
        "PENDING",
        "CONFIGURING",
    )


def ended(group: Any) -> list[Path]:
    """The logs of those of its engines that have ended; of a job's, once all have."""
    if isinstance(group, SlurmLauncher):
        return [] if looked_at(group.job_id) else [Path(group.output_file)]
    # by mpiexec: one for all
    started = launchers(group) or ([group] if getattr(group, "pid", -1) > 0 else [])
    return [Path(one.output_file) for one in started if not psutil.pid_exists(one.pid)]


def job_of(groups: list[Any], job: str) -> Any:
    """The engine set that is this job; None: there is none."""
    return next(
        (g for g in groups if isinstance(g, BatchSystemLauncher) and job and g.job_id == job), None
    )


def how_to_end(groups: list[Any]) -> list[list[str]]:
    """The commands that end those that are jobs."""
    return [
        [*g.delete_command, g.job_id]
        for g in groups
        if isinstance(g, BatchSystemLauncher) and g.job_id
    ]
