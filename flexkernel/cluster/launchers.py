"""How engines are started: as processes of this machine, or as jobs of a batch system.

These are ipyparallel's launchers, and what the rest of the cluster asks of one of any kind."""

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
    BaseLauncher,
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
from .process import is_running, log_tail, pid_is_running

__all__ = [
    "KEPT",
    "FlexEngineSetLauncher",
    "FlexSlurmLauncher",
    "end_commands",
    "ended_logs",
    "engine_launchers",
    "engine_processes",
    "heartbeat_options",
    "is_queued",
    "job_of",
    "kind_of",
    "launcher_for",
    "preload",
    "reading_clusters",
    "same_job_options",
]

KEPT = "kept-"  # the ids of clusters that outlive their notebook begin so
# How often a controller pings its engines. It registers a new one at the second ping.
BEAT_S = 0.5
LOST_S = 33.0  # ipyparallel's own: when an engine that does not answer counts as lost
CHECK_S = BEAT_S + 0.5  # how often an engine looks for a ping
LEAVE_S = 180.0  # ipyparallel's own: when an engine without a controller leaves
ASK_S = 60.0  # how long a command of the batch system may take
STATE_S = 1.0  # how old a job's state may be
END_POLL_S = 0.1  # how often an end is looked for that only another process is told of
LOG_LINES = 20
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "PYDEVD_DISABLE_FILE_VALIDATION": "1",
}


def for_engine(env: dict[str, str]) -> dict[str, str]:
    """An engine's environment: with one thread for torch, and no bars in its log."""
    return {**ENVIRONMENT, **env}


def heartbeat_options(launcher: type[BaseLauncher] | str) -> list[str]:
    """The controller's arguments that say how often it pings engines of this launcher.

    ipyparallel's 3 s would be most of the time that a start takes. Other launchers keep them:
    their engines count pings, and would leave after a few seconds."""
    if launcher not in OURS.values():
        return []
    misses = round(LOST_S / BEAT_S)
    return [
        f"--HeartMonitor.period={BEAT_S * 1000:.0f}",
        f"--HeartMonitor.max_heartmonitor_misses={misses}",
    ]


def leave_options(cluster_id: str, seconds: float) -> list[str]:
    """An engine's argument that says how long it waits for its controller's ping before it leaves.
    0: for ever.

    An engine of a kept cluster waits for FLEX_IDLE_TTL hours: nobody may be there to start the
    controller again."""
    if cluster_id.startswith(KEPT):
        seconds = idle_ttl_h() * 3600
    return [f"--IPEngine.max_heartbeat_misses={math.ceil(seconds / CHECK_S)}"]


def idle_ttl_h() -> float:
    """FLEX_IDLE_TTL in hours, 24 by default. ClusterError: it is not a positive number."""
    text = os.environ.get("FLEX_IDLE_TTL", "24")
    try:
        hours = float(text)
    except ValueError:
        hours = math.nan
    if not 0 < hours < math.inf:
        raise ClusterError(f"FLEX_IDLE_TTL={text!r} is no number of hours above 0")
    return hours


PROGRAM = "ipyparallel.engine"
ENGINE = [sys.executable, "-m", "flexkernel.cluster.environment", "-m", PROGRAM]
# What takes engines longest to import until they have run a model.
IMPORTS = (
    f"{PROGRAM}.app",
    "accelerate",
    "flexkernel.engine.calls",
    "transformers.models.llama.modeling_llama",  # and so most of what other models need
)


# --- clusters that are read from their files ------------------------------------------


@contextlib.contextmanager
def reading_clusters() -> Iterator[None]:
    """Within it ipyparallel may read clusters from their files.

    It starts a thread for each process of a cluster, which waits for its end. Two things go wrong
    with them. A second waiter in the process that started one takes the exit code away from the
    first. And the zombie of an orphan counts as running until init reaps it, seconds later or
    never. So within this these threads only watch."""
    begin = LocalProcessLauncher._start_waiting

    def start_waiting(launcher: LocalProcessLauncher) -> None:
        launcher._wait = functools.partial(watch_process, launcher)
        begin(launcher)

    LocalProcessLauncher._start_waiting = start_waiting
    try:
        yield
    finally:
        LocalProcessLauncher._start_waiting = begin


def watch_process(launcher: LocalProcessLauncher) -> None:
    """Wait for the end of a launcher's process. Leave its exit code to whoever started it."""
    with contextlib.suppress(ChildProcessError):  # it is another process's child
        os.waitid(os.P_PID, launcher.pid, os.WEXITED | os.WNOWAIT)
    wait_for_end(launcher)


def wait_for_end(launcher: LocalProcessLauncher) -> None:
    """Wait until another process's child does not run any more, or its launcher gives up. Then
    tell the launcher, as its own thread would."""
    while is_running(launcher.process) and not launcher._stop_waiting.wait(END_POLL_S):
        pass
    ended = {"exit_code": None, "pid": launcher.pid, "identifier": launcher.identifier}
    launcher.loop.add_callback(lambda: launcher.notify_stop(ended))


# --- on this machine ------------------------------------------------------------------


class FlexEngineLauncher(LocalEngineLauncher):
    """A local engine with one thread for torch.

    The driver's fork server forks it where it can. It never leaves because its controller is gone:
    the driver starts a crashed controller again, and when the driver is gone the reaper ends the
    engine."""

    code: int | None = None  # the exit code of a forked engine
    _fork_server: ForkServer | None = None

    def start(self) -> None:
        request = self._request()
        server = preload(FlexEngineSetLauncher)
        pid = None
        if server is not None and self._can_be_forked(server, request):
            pid = server.fork(request)
        if server is None or pid is None:
            super().start()
        else:
            self._adopt(server, pid, request)

    def _request(self) -> ForkRequest:
        return ForkRequest(
            module=PROGRAM,
            arguments=self.args[len(self.engine_cmd) :],
            environment=inherited({**os.environ, **self.get_env()}),
            folder=os.path.abspath(self.work_dir),
            log=self.output_file,
            stays=self.cluster_id.startswith(KEPT),
        )

    def _can_be_forked(self, server: ForkServer, request: ForkRequest) -> bool:
        return server.suits(request.environment) and self.engine_cmd == ENGINE

    def _adopt(self, server: ForkServer, pid: int, request: ForkRequest) -> None:
        """Be the launcher of a process that the fork server has forked."""
        try:
            self.pid = pid
            self.process = psutil.Process(pid)
            self._fork_server = server
            self.notify_start(pid)
            self._start_waiting()
        except psutil.NoSuchProcess:
            lines = log_tail(Path(request.log), LOG_LINES)
            raise ClusterError("\n".join(["an engine ended as it started", *lines])) from None
        except KeyboardInterrupt:
            os.kill(pid, signal.SIGKILL)  # nobody else knows of it yet
            raise

    def _wait(self) -> None:
        if self._fork_server is None:
            super()._wait()
            return
        self.code = self._fork_server.wait(self.pid, self._stop_waiting.is_set)
        wait_for_end(self)

    def find_args(self) -> list[str]:
        return [*super().find_args(), *leave_options(self.cluster_id, 0)]

    def get_env(self) -> dict[str, str]:
        return for_engine(super().get_env())


class FlexEngineSetLauncher(LocalEngineSetLauncher):
    """The engines of this machine."""

    # A cluster's file names the launcher so, to read it back.
    entrypoint_name = "flexkernel.cluster.launchers.FlexEngineSetLauncher"
    launcher_class = FlexEngineLauncher

    @default("engine_cmd")
    def _without_secrets(self) -> list[str]:
        return list(ENGINE)


def preload(launcher: type[BaseLauncher] | str) -> ForkServer | None:
    """The fork server for this launcher, or None if its engines are not forked here.

    Call it early: the server imports while other things start."""
    if launcher is not FlexEngineSetLauncher:
        return None
    return fork_server(IMPORTS, {**os.environ, **for_engine({})})


# --- as jobs --------------------------------------------------------------------------

# --kill-on-bad-exit=0: when one engine dies the others stay, with their part of the model.
TEMPLATE = """#!/bin/sh
#SBATCH --job-name=flexkernel-{cluster_id}
#SBATCH --export=ALL
#OPTIONS
umask 077
exec srun --kill-on-bad-exit=0 {program_and_args}
"""
# An engine sees all GPUs of its job on its host, and takes its own.
GPUS = "--gpus-per-task=1 --gpu-bind=none"
GPU_OPTIONS = ("--gres", "--gpus", "-G")


class FlexSlurmLauncher(SlurmEngineSetLauncher):
    """n engines as one Slurm job.

    `options`: those of sbatch. Each engine gets one GPU unless they say something about GPUs.

    The job ends with the session. When the driver is killed the reaper cancels it. When the reaper
    is gone too its engines leave after three minutes without a controller."""

    # A cluster's file names the launcher so, to read it back.
    entrypoint_name = "flexkernel.cluster.launchers.FlexSlurmLauncher"

    @default("program")
    def _default_program(self) -> list[str]:
        return list(ENGINE)

    @default("program_args")
    def _default_program_args(self) -> list[str]:
        return [*self.cluster_args, *self.engine_args, *leave_options(self.cluster_id, LEAVE_S)]

    @default("batch_file_name")
    # The base class has one for all clusters, in the notebook's folder.
    def _own_file(self) -> str:
        return str(Path(self.profile_dir).absolute() / "log" / f"{self.identifier}.sbatch")

    @default("default_template")
    def _own_template(self) -> str:
        words = shlex.split(self.options)
        lines = []
        if not any(word.startswith(GPU_OPTIONS) for word in words):
            lines.append(f"#SBATCH {GPUS}")
        if words:
            lines.append(f"#SBATCH {shlex.join(words)}")
        options = "\n".join(lines).replace("{", "{{").replace("}", "}}")
        return TEMPLATE.replace("#OPTIONS", options)

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
        """Cancel the job if it has not ended."""
        if self.job_id and job_state(self.job_id):
            output = super().stop()
        else:
            output = str(self.notify_stop({"job_id": self.job_id}))
        Path(self.batch_file).unlink(missing_ok=True)
        return output


OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


def job_state(job: str) -> str:
    """A job's state in Slurm's words, "" if it has ended. ClusterError: Slurm does not answer."""
    command = ["squeue", "--noheader", "--format=%T", f"--jobs={job}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ASK_S, check=False)
    except (FileNotFoundError, subprocess.TimeoutExpired) as error:
        raise ClusterError(f"Slurm cannot be asked for job {job}: {error}") from None
    # Slurm says "invalid job id" of a job that ended long ago.
    if done.returncode and "invalid job id" not in done.stderr.lower():
        why = done.stderr.strip() or done.returncode
        raise ClusterError(f"Slurm cannot be asked for job {job}: {why}")
    words = done.stdout.split()
    if not words or words[0] in OVER:
        return ""
    return words[0]


_states: dict[str, tuple[float, str]] = {}  # job → (when Slurm was asked, its state then)


def recent_state(job: str) -> str:
    """A job's state, at most a second old."""
    if job not in _states or time.monotonic() - _states[job][0] > STATE_S:
        _states[job] = (time.monotonic(), job_state(job))
    return _states[job][1]


# --- of any kind ----------------------------------------------------------------------

KINDS = {LocalEngineSetLauncher: "local", SlurmLauncher: "slurm"}
OURS: dict[str, Any] = {"local": FlexEngineSetLauncher, "slurm": FlexSlurmLauncher}


def launcher_for(engines: str | None) -> tuple[type[BaseLauncher] | str, Config]:
    """The launcher of this name, and its configuration.

    engines: one of ipyparallel's names. After slurm come options of sbatch:
    "slurm --partition=gpu --time=04:00:00". ClusterError: options for another launcher."""
    name, *options = shlex.split(engines or "local")
    if options and name != "slurm":
        raise ClusterError(f"engines={engines!r}: only slurm takes options, those of sbatch")
    config = Config()
    if options:
        config.FlexSlurmLauncher.options = shlex.join(options)
    return OURS.get(name, name), config


def kind_of(launcher: type) -> str:
    """The kind of a launcher, as in guarantees.Origin: "local", "slurm" or "other"."""
    for base, kind in KINDS.items():
        if issubclass(launcher, base):
            return kind
    return "other"


def engine_launchers(group: BaseLauncher) -> list[LocalEngineLauncher]:
    """The launchers of the local engines of an engine set; none where a batch system has them."""
    return list(getattr(group, "launchers", {}).values())


def engine_processes(group: BaseLauncher) -> list[psutil.Process]:
    """The processes of an engine set on this machine."""
    processes = [getattr(launcher, "process", None) for launcher in engine_launchers(group)]
    return [process for process in processes if process is not None]


def same_job_options(groups: list[BaseLauncher]) -> dict[str, Any]:
    """Options for a further engine set that make it a job of the same script as these."""
    for group in groups:
        if isinstance(group, BatchSystemLauncher):
            return {"batch_template": group.batch_template}
    return {}


def is_queued(group: BaseLauncher) -> bool:
    """Whether an engine set is a job that has not begun."""
    if not isinstance(group, SlurmLauncher):
        return False
    return recent_state(group.job_id) in ("PENDING", "CONFIGURING")


def ended_logs(group: BaseLauncher) -> list[Path]:
    """The logs of an engine set's engines that have ended; of a job, once all have."""
    if isinstance(group, SlurmLauncher):
        if recent_state(group.job_id):
            return []
        return [Path(group.output_file)]
    started = engine_launchers(group)
    if not started and getattr(group, "pid", -1) > 0:
        started = [group]  # mpiexec is one process for all
    return [Path(one.output_file) for one in started if not pid_is_running(one.pid)]


def job_of(groups: list[BaseLauncher], job: str) -> BaseLauncher | None:
    """The engine set that is this job, or None."""
    for group in groups:
        if isinstance(group, BatchSystemLauncher) and job and group.job_id == job:
            return group
    return None


def end_commands(groups: list[BaseLauncher]) -> list[list[str]]:
    """The commands that cancel the jobs among these engine sets."""
    return [
        [*group.delete_command, group.job_id]
        for group in groups
        if isinstance(group, BatchSystemLauncher) and group.job_id
    ]
