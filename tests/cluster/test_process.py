"""EngineProcess: how a process ended, what it had and what it wrote."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import types

import psutil
import pytest

from flexkernel.cluster.process import LOG_LINES, EngineProcess
from tests.support.waiting import until


def started(code: str, log):
    """A process as ipyparallel's launchers know one: a thread waits for it, and the process keeps
    the code."""
    with open(log, "wb") as file:
        child = subprocess.Popen(
            [sys.executable, "-c", code], stdout=file, stderr=subprocess.STDOUT
        )
    process = psutil.Process(child.pid)
    thread = threading.Thread(target=process.wait, daemon=True)
    thread.start()
    return types.SimpleNamespace(
        process=process, _wait_thread=thread, output_file=str(log), pid=child.pid
    )


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("raise SystemExit(3)", "exit code 3"),
        ("import os; os.abort()", "signal 6 (SIGABRT)"),
        (
            "import os; os.kill(os.getpid(), 9)",
            "signal 9 (SIGKILL), probably out of memory if nobody killed it",
        ),
    ],
)
def test_how_a_process_ended_is_said_in_words(tmp_path, code, said):
    launcher = started(code, tmp_path / "log")
    process = EngineProcess(launcher.pid, launcher)
    assert said in process.end()


def test_of_nobodys_child_nothing_is_said():
    assert EngineProcess(os.getpid()).end() == "" and EngineProcess(os.getpid()).log() == []


def test_memory_is_sampled():
    process = EngineProcess(os.getpid())
    assert process.rss > 1 << 20


def test_the_log_is_its_end_without_what_is_routine(tmp_path):
    lines = [f"line {i}" for i in range(100)] + [
        "2026-01-01 00:00:00.000 [IPEngine.0] Handling apply_request: 1"
    ]
    (tmp_path / "log").write_text("\n".join(lines))
    log = EngineProcess(os.getpid(), types.SimpleNamespace(output_file=str(tmp_path / "log"))).log()
    assert log == lines[100 - LOG_LINES : 100]


def test_of_a_crash_the_log_is_where_it_was(tmp_path):
    code = "import faulthandler, os\nfaulthandler.enable()\ndef culprit(): os.abort()\nculprit()"
    launcher = started(code, tmp_path / "log")
    launcher._wait_thread.join()
    log = EngineProcess(launcher.pid, launcher).log()
    assert log[0].startswith("Fatal Python error: Aborted") and any(
        "culprit" in line for line in log
    )


def test_a_stopped_process_is_known_and_can_be_ended(tmp_path):
    launcher = started("import time; time.sleep(100)", tmp_path / "log")
    process = EngineProcess(launcher.pid, launcher)
    assert not process.is_stopped()
    launcher.process.suspend()
    until(process.is_stopped)
    process.kill()
    assert "SIGKILL" in process.end()
