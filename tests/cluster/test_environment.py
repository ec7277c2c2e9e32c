"""The environment of engines: what they need of the notebook's, and no keys that are no business
of theirs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flexkernel.cluster.environment import inherited

SECRETS = {
    "AWS_SECRET_ACCESS_KEY",
    "GITHUB_TOKEN",
    "OPENAI_API_KEY",
    "JUPYTERHUB_API_TOKEN",
    "JPY_API_TOKEN",
    "PGPASSWORD",
}
NEEDED = {
    "PATH",
    "HOME",
    "PYTHONPATH",
    "OMP_NUM_THREADS",
    "HF_TOKEN",
    "CUDA_VISIBLE_DEVICES",
    "SLURM_JOB_ID",
    "LC_ALL",
}


def test_what_engines_need_is_inherited_and_keys_are_not():
    assert set(inherited(dict.fromkeys(SECRETS | NEEDED, "x"))) == NEEDED


def test_the_user_names_what_else_there_is():
    found = inherited(
        {"FLEX_ENV": "PG*, MY_DATA,", "PGPASSWORD": "x", "MY_DATA": "y", "MY_DATA_KEY": "z"}
    )
    assert set(found) == {"FLEX_ENV", "PGPASSWORD", "MY_DATA"}


def test_the_process_itself_gives_up_what_it_had():
    script = "import pathlib; print(pathlib.Path('/proc/self/environ').read_text().split(chr(0)))"
    command = [sys.executable, "-m", "flexkernel.cluster.environment", "-c", script]
    env = {**os.environ, "GITHUB_TOKEN": "ghp_of-this-test", "LC_ALL": "C.UTF-8"}
    said = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
    assert "LC_ALL=C.UTF-8" in said and "ghp_of-this-test" not in said


@pytest.mark.engines(2)
def test_engines_have_only_that(session):
    """conftest.py puts a key into the environment before any engine starts."""
    assert os.environ["OF_NO_ENGINE"]
    for pid in session.engines.pids:
        there = dict(
            v.split("=", 1)
            for v in Path(f"/proc/{pid}/environ").read_text().split("\0")
            if "=" in v
        )
        assert there["PYTHONPATH"] == os.environ["PYTHONPATH"] and there["OMP_NUM_THREADS"] == "1"
        assert "OF_NO_ENGINE" not in there and inherited(there) == there
    assert session.on_ranks(os.getenv, "OF_NO_ENGINE") == [None, None]
