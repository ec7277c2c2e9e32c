"""The launchers: engines as Slurm's jobs, with stand-ins for its commands that start and end real
processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import ipyparallel as ipp
import psutil
import pytest
import torch

import flexkernel as fk
from flexkernel.cluster import launchers
from flexkernel.cluster.controller import controllers
from tests.support import slurm

IDS = [[5, 6, 7, 8]]
pytestmark = pytest.mark.slow


@pytest.fixture
def jobs(tmp_path, monkeypatch):
    """Where the jobs of a Slurm are that has just been installed."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{slurm.install(folder)}{os.pathsep}{os.environ['PATH']}")
    yield folder / "jobs"
    for job in (folder / "jobs").iterdir():
        slurm.scancel(folder / "jobs", [job.name])


def left(jobs: Path, timeout_s: float = 30.0) -> list[psutil.Process]:
    """The processes of jobs that are still there once they have had time to go."""
    end = time.monotonic() + timeout_s
    while (
        there := [p for job in jobs.iterdir() for p in slurm.processes(job)]
    ) and time.monotonic() < end:
        time.sleep(0.1)
    return there


def test_engines_of_a_job_run_the_model_and_one_that_dies_comes_back_by_another_job(jobs, tiny):
    from tests.support import reference

    want = reference.load(tiny("llama"))(torch.tensor(IDS)).logits
    with fk.start(2, engines="slurm --partition=gpu --time=04:00:00") as session:
        asked = slurm.options((jobs / "100" / "script").read_text())
        assert (
            asked["ntasks"] == "2" and asked["partition"] == "gpu" and asked["time"] == "04:00:00"
        )
        assert asked["gpus-per-task"] == "1" and asked["gpu-bind"] == "none"
        assert session.on_ranks(os.getenv, "SLURM_JOB_ID") == ["100", "100"]
        assert session.on_ranks(os.getenv, "OMP_NUM_THREADS") == ["1", "1"]
        # as another notebook has it
        file = ipp.Cluster.from_file(cluster_id=session.engines.cluster_id)
        assert (
            file.engine_launcher_class is launchers.FlexSlurmLauncher
            and file.engine_set.job_id == "100"
        )
        session.load(tiny("llama"), tp=2)
        logits = session.run(IDS).logits.tensor()
        torch.testing.assert_close(logits, want, atol=1e-5, rtol=1e-5)
        assert "by another job" in repr(session.guarantees())
        assert "scancel" in repr(session.guarantees())

        session.on_ranks(write_and_die, 1)
        with pytest.raises(
            fk.errors.EngineDied, match=r"rank 1(.|\n)*its log ends:(.|\n)*the last words of rank 1"
        ):
            session.run(IDS)
        assert session.restart() == [1]
        assert session.on_ranks(os.getenv, "SLURM_JOB_ID") == ["100", "101"]
        assert slurm.options((jobs / "101" / "script").read_text())["ntasks"] == "1"
        assert torch.equal(session.run(IDS).logits.tensor(), logits)
    assert (
        all((job / "cancelled").exists() for job in jobs.iterdir())
        and len(list(jobs.iterdir())) == 2
    )
    assert left(jobs) == []


def write_and_die(rank: int) -> None:
    """On an engine: at its next forward it ends by a signal, and says so before."""
    from tests.support import on_engines

    if on_engines.runtime().rank == rank:
        os.write(2, f"the last words of rank {rank}\n".encode())
        on_engines.die_at("model.layers.1.mlp", rank)


DRIVER = """
import sys, time, flexkernel as fk
session = fk.start(2, engines="slurm")
print("started", flush=True)
time.sleep(100)
"""


@pytest.mark.long
def test_jobs_are_cancelled_when_their_driver_is_killed(jobs):
    driver = subprocess.Popen([sys.executable, "-c", DRIVER], stdout=subprocess.PIPE, text=True)
    assert driver.stdout is not None and driver.stdout.readline() == "started\n"
    assert len(slurm.processes(jobs / "100")) >= 3
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    assert left(jobs) == [] and (jobs / "100" / "cancelled").exists()


def test_a_job_that_ends_before_its_engines_are_there_is_an_error_with_its_log(jobs, monkeypatch):
    monkeypatch.setattr(
        launchers, "TEMPLATE", launchers.TEMPLATE.replace("exec srun", "echo no such module; false")
    )
    begin = time.monotonic()
    with pytest.raises(
        fk.errors.ClusterError,
        match=r"2 engines did not start: 2 of 2 new engines ended\nno such module",
    ):
        fk.start(2, engines="slurm")
    assert time.monotonic() - begin < 60 and left(jobs) == []


def test_without_slurm_it_is_said_to_be_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        fk.errors.ClusterError, match="Slurm is not on this machine: there is no sbatch on PATH"
    ):
        fk.start(2, engines="slurm", cluster_id="of-this-test")
    assert controllers(ipp.Cluster(cluster_id="of-this-test")) == []


@pytest.mark.parametrize(
    ("given", "gpus"), [("", True), ("--time=1:00", True), ("--gres=gpu:a100:2", False)]
)
def test_each_engine_has_a_gpu_unless_the_options_speak_of_them(given, gpus):
    launcher = launchers.FlexSlurmLauncher(options=given)
    assert (
        launchers.GPUS in launcher.default_template
    ) is gpus and given in launcher.default_template


def test_only_slurm_takes_options():
    with pytest.raises(fk.errors.ClusterError, match="only slurm takes options"):
        fk.start(2, engines="mpi --oversubscribe")


@pytest.mark.parametrize("hours", ["0", "-1", "nan", "a day"])
def test_a_time_to_live_that_is_none_is_refused(monkeypatch, hours):
    monkeypatch.setenv("FLEX_IDLE_TTL", hours)
    with pytest.raises(
        fk.errors.ClusterError, match=f"FLEX_IDLE_TTL='{hours}' is no number of hours above 0"
    ):
        launchers.leave_options("kept-a", 0)
    assert launchers.leave_options("a", 0) == ["--IPEngine.max_heartbeat_misses=0"]
