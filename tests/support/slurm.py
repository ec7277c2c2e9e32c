"""Stand-ins for Slurm: sbatch, squeue, scancel and srun as scripts that start and end real
processes on this machine.

They keep to what Slurm documents of the options and words that flexkernel uses. A job waits until
squeue has been asked for it WAITS times: so whoever waits for it has to ask.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
WAITS = 2


def install(folder: Path) -> Path:
    """A folder with the four commands, to be put on PATH; its jobs are in `jobs` beside them."""
    (folder / "jobs").mkdir()
    for name in ("sbatch", "squeue", "scancel", "srun"):
        script = folder / name
        lines = (
            f"#!{sys.executable}",
            "import pathlib, sys",
            f"sys.path.insert(0, {str(ROOT)!r})",
            "from tests.support import slurm",
            f"slurm.{name}(pathlib.Path({str(folder / 'jobs')!r}), sys.argv[1:])",
            "",
        )
        script.write_text("\n".join(lines))
        script.chmod(0o700)
    return folder


def options(script: str) -> dict[str, str]:
    """What a script's #SBATCH lines ask for."""
    words = [
        word for line in re.findall(r"^#SBATCH (.*)$", script, re.M) for word in shlex.split(line)
    ]
    assert all(re.fullmatch(r"--[a-z-]+=\S+", word) for word in words), words
    return dict(word.removeprefix("--").split("=", 1) for word in words)


def sbatch(jobs: Path, arguments: list[str]) -> None:
    [script] = arguments
    job = str(100 + len(list(jobs.iterdir())))
    (jobs / job).mkdir()
    (jobs / job / "script").write_text(Path(script).read_text())
    (jobs / job / "asked").write_text("0")
    env = {
        **os.environ,
        "SLURM_JOB_ID": job,
        "SLURM_NTASKS": options(Path(script).read_text())["ntasks"],
    }
    # What Slurm itself would be: it begins the job when its turn has come
    subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import pathlib; from tests.support import slurm; "
            f"slurm.turn(pathlib.Path({str(jobs / job)!r}))",
        ],
        env=env | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"},
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    print(f"Submitted batch job {job}")


def turn(job: Path) -> None:
    """Wait for the job's turn, and be the job."""
    while int((job / "asked").read_text() or 0) < WAITS:
        time.sleep(0.05)
    with open(options((job / "script").read_text())["output"], "w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    (job / "pid").write_text(str(os.getpid()))
    os.execv("/bin/sh", ["/bin/sh", str(job / "script")])


def processes(job: Path) -> list[psutil.Process]:
    """A job's, by its id in their environment, as Slurm knows them by their cgroup."""
    found = []
    for process in psutil.process_iter():
        try:
            if (
                process.environ().get("SLURM_JOB_ID") == job.name
                and process.status() != psutil.STATUS_ZOMBIE
            ):
                found.append(process)
        except psutil.Error:
            continue
    return found


def squeue(jobs: Path, arguments: list[str]) -> None:
    assert arguments[:2] == ["--noheader", "--format=%T"] and arguments[2].startswith("--jobs="), (
        arguments
    )
    job = jobs / arguments[2].removeprefix("--jobs=")
    if not job.is_dir() or not processes(job):
        sys.exit("slurm_load_jobs error: Invalid job id specified")
    asked = job / "asked"
    asked.write_text(str(int(asked.read_text()) + 1))
    print("RUNNING" if (job / "pid").exists() else "PENDING")


def scancel(jobs: Path, arguments: list[str]) -> None:
    [job] = arguments
    (jobs / job / "cancelled").touch()
    for process in processes(jobs / job):
        try:
            process.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue


def srun(jobs: Path, arguments: list[str]) -> None:
    assert arguments[0] == "--kill-on-bad-exit=0", arguments
    tasks = [subprocess.Popen(arguments[1:]) for _ in range(int(os.environ["SLURM_NTASKS"]))]
    sys.exit(max(task.wait() for task in tasks))
