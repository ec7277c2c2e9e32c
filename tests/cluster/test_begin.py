"""Beginnings: progress while engines are started or attached to, and ends that print nothing."""

from __future__ import annotations

import subprocess
import sys
import time

import psutil
import pytest
from ipyparallel.cluster.launcher import LocalProcessLauncher

import flexkernel as fk
from flexkernel.cluster import begin
from flexkernel.cluster.controller import LOG
from flexkernel.cluster.launchers import reading_clusters


@pytest.mark.slow
def test_start_and_attach_report_what_they_do():
    told: list[tuple[str, int, int]] = []
    started = begin.start(2, progress=lambda *stage: told.append(stage))
    try:
        stages = [stage for stage, _, _ in told]
        assert stages[:2] == ["starting the controller", "forking 2 engines"]
        assert stages[-2:] == ["engines are there: 2 of 2", "joining"]
        assert told[-1] == ("joining", 2, 2)
        told.clear()
        attached = begin.attach(
            cluster_id=started.cluster_id, take=True, progress=lambda *stage: told.append(stage)
        )
        attached.close()
        assert [stage for stage, _, _ in told] == ["looking for the cluster", "joining"]
    finally:
        begin.attach(cluster_id=started.cluster_id, take=True).close(end=True)
        started.close()


UNCLOSED = """
import flexkernel as fk
session = fk.start(1)
print(session.on_ranks(lambda: 1), flush=True)
"""


@pytest.mark.slow
def test_a_script_that_does_not_close_its_session_ends_without_a_word():
    done = subprocess.run(
        [sys.executable, "-c", UNCLOSED], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0
    assert done.stdout == "[1]\n"
    assert done.stderr == ""


KEEPER = """
import os, flexkernel as fk
print(fk.start(1, keep=True).engines.cluster_id, flush=True)
os._exit(0)
"""


@pytest.mark.slow
def test_to_stop_an_attached_cluster_prints_nothing(capfd, caplog):
    kept = subprocess.run(
        [sys.executable, "-c", KEEPER], capture_output=True, text=True, timeout=200
    )
    session = fk.attach(cluster_id=kept.stdout.strip())
    began = time.monotonic()
    session.close(end=True)
    assert time.monotonic() - began < 10
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""
    assert not caplog.records


PARENT = """
import subprocess, sys, time
child = subprocess.Popen(["sleep", "100"])
print(child.pid, flush=True)
time.sleep(100)  # it never waits for its child, as an init that does not reap
"""


def test_an_ended_process_that_nobody_reaps_has_ended():
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    try:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        with reading_clusters():
            launcher = LocalProcessLauncher.from_dict({"pid": pid, "identifier": "0"}, log=LOG)
        assert launcher._wait_thread.is_alive()
        psutil.Process(pid).terminate()
        launcher._wait_thread.join(5)
        assert psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
        assert not launcher._wait_thread.is_alive()
    finally:
        parent.kill()
        parent.wait()
