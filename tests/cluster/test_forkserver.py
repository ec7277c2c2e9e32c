"""The fork server: what it forks is as if it had been started, and goes and stays as it should."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from flexkernel.cluster import launchers
from flexkernel.cluster.forkserver import (
    ForkRequest,
    ForkServer,
    fork_server,
    open_files,
    why_not_fork,
)
from flexkernel.cluster.process import exit_code
from tests.support.waiting import until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there is no fork server")
CHILD = "forked"
MODULES = ("numpy", CHILD)


@pytest.fixture(autouse=True)
def _child_on_path(request, monkeypatch):
    """`python -m` warns of a module of a package that is imported already: the child is in
    none."""
    if "session" in request.fixturenames:
        return  # its engines were forked in the environment that there was
    support = Path(__file__).parents[1] / "support"
    monkeypatch.setenv("PYTHONPATH", str(support), prepend=os.pathsep)


def request(
    tmp_path: Path, *arguments: str, stays: bool = False, **environment: str
) -> ForkRequest:
    log = tmp_path / f"{time.monotonic_ns()}.log"
    return ForkRequest(
        CHILD, list(arguments), {**os.environ, **environment}, str(tmp_path), str(log), stays
    )


@pytest.fixture
def server():
    """A fork server; it has ended when the test has."""
    found = ForkServer(MODULES, os.environ)
    yield found
    for child in psutil.Process(found.pid).children():
        child.kill()
    found.retire()
    found._process.wait(10)


def never() -> bool:
    return False


def gone(pid: int, within_s: float = 10.0) -> bool:
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.02)
    return False


def test_what_it_forks_is_as_if_it_had_been_started(server, tmp_path):
    requests = [request(tmp_path, "say", "--and=more", FLEX_OF_THIS="1") for _ in range(2)]
    for one in requests:
        assert server.wait(server.fork(one), never) == 0
    said = [json.loads(Path(one.log).read_text()) for one in requests]
    assert said[0]["arguments"] == ["say", "--and=more"] and said[0]["name"] == "__main__"
    assert said[0]["environment"] == requests[0].environment
    assert (
        said[0]["folder"] == said[0]["first"] == str(tmp_path)
        and said[0]["session"]
        and said[0]["mask"] == 0o077
    )
    assert "socket" not in said[0]["files"] and {"/dev/null", requests[0].log} <= set(
        said[0]["files"]
    )
    assert said[0]["drawn"] != said[1]["drawn"], "each draws its own random numbers"
    assert Path(requests[0].log).stat().st_mode & 0o077 == 0


def test_it_sees_what_it_has_open(tmp_path, monkeypatch):
    with (tmp_path / "here").open("w"):
        assert str(tmp_path / "here") in open_files()
    monkeypatch.setattr("os.listdir", lambda path: ["one thread"])
    monkeypatch.setattr(
        "flexkernel.cluster.forkserver.open_files", lambda: ["/dev/null", "/dev/nvidiactl"]
    )
    assert why_not_fork() == "/dev/nvidiactl is open"


def test_it_tells_how_they_ended(server, tmp_path):
    assert server.wait(server.fork(request(tmp_path, "exit")), never) == 7
    pid = server.fork(request(tmp_path, "sleep"))
    os.kill(pid, signal.SIGSEGV)
    assert server.wait(pid, never) == -signal.SIGSEGV
    assert server.wait(server.fork(request(tmp_path, "sleep")), lambda: True) is None, (
        "who waits may give up"
    )


def test_what_comes_too_late_is_ended(server, tmp_path, monkeypatch):
    assert server.wait(server.fork(request(tmp_path, "exit")), never) == 7
    monkeypatch.setattr("flexkernel.cluster.forkserver.FORK_S", 0.0)
    process = psutil.Process(server.pid)
    process.suspend()
    assert server.fork(request(tmp_path, "sleep")) is None, "who waits has given up"
    process.resume()
    until(lambda: server._ended)
    assert list(server._ended.values()) == [-signal.SIGKILL] and not process.children()


@pytest.mark.parametrize("why", ["threads", "fails"])
def test_where_it_cannot_fork_it_says_so_and_goes(why, tmp_path, monkeypatch):
    found = ForkServer(MODULES, {**os.environ, "FLEX_ENV": "CHILD_FAULT", "CHILD_FAULT": why})
    assert found.fork(request(tmp_path, "say")) is None
    assert found._process.wait(10) is not None and not found.is_usable and not found.can_fork
    monkeypatch.setattr("flexkernel.cluster.forkserver._current", found)
    assert fork_server(MODULES, found.environment) is None, "another could not fork either"


def test_engines_are_started_where_it_cannot_fork(monkeypatch, tmp_path):
    monkeypatch.setattr(ForkServer, "fork", lambda self, request: None)
    launcher = launchers.FlexEngineLauncher(profile_dir=str(tmp_path), identifier="0")
    launcher.engine_cmd = [sys.executable, "-m", CHILD, "exit"]
    launcher.start()
    launcher._wait_thread.join(30)
    assert launcher._popen_process is not None and exit_code(launcher) == 7


@pytest.mark.slow
def test_another_environment_is_another_server_and_the_first_goes_with_its_last(
    monkeypatch, tmp_path
):
    monkeypatch.setattr("flexkernel.cluster.forkserver._current", None)
    first = fork_server(MODULES, os.environ)
    pid = first.fork(request(tmp_path, "sleep"))
    assert fork_server(MODULES, {**os.environ, "FLEX_FAULT": "x", "OF_NO_ENGINE": "y"}) is first
    second = fork_server(MODULES, {**os.environ, "HF_HOME": str(tmp_path)})
    assert second is not first and second.environment["HF_HOME"] == str(tmp_path)
    time.sleep(0.3)
    assert first._process.poll() is None and not gone(pid, 0)
    os.kill(pid, signal.SIGKILL)
    assert first.wait(pid, never) == -signal.SIGKILL and first._process.wait(10) == 0
    second.retire()
    assert second._process.wait(10) in (0, -signal.SIGIO), "it may import still"


DRIVER = """
import sys, time, os
from flexkernel.cluster.forkserver import ForkRequest, ForkServer
found = ForkServer(sys.argv[2:], os.environ)
requests = [ForkRequest("forked", ["sleep"], dict(os.environ), ".", sys.argv[1], stays) for stays in (False, True)]
print(found.pid, *([found.fork(request) for request in requests] if "numpy" in sys.argv else []), flush=True)
time.sleep(60)
"""


def killed_driver(tmp_path: Path, *modules: str, **environment: str) -> list[int]:
    """The pids that a driver told before it was killed: its fork server's, and those of two that
    it had it fork."""
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(tmp_path / "log"), *modules],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert driver.stdout is not None
    pids = [int(pid) for pid in driver.stdout.readline().split()]
    driver.kill()
    driver.wait()
    return pids


def test_with_its_driver_it_goes_and_what_does_not_stay(tmp_path):
    mine, goes, stays = killed_driver(tmp_path, *MODULES)
    try:
        assert gone(mine) and gone(goes) and not gone(stays, 0.5)
    finally:
        os.kill(stays, signal.SIGKILL)


def test_it_goes_with_its_driver_while_it_imports_too(tmp_path):
    (mine,) = killed_driver(tmp_path, "this", "slow_to_import")
    assert gone(mine, 2)


@pytest.mark.engines(2)
def test_engines_come_from_it(session):
    parents = {psutil.Process(pid).ppid() for pid in session.engines.pids}
    found = launchers.preload(launchers.FlexEngineSetLauncher)
    assert parents == {found.pid} and psutil.Process(found.pid).ppid() == os.getpid()
    assert psutil.Process(found.pid).num_threads() == 1
    assert {psutil.Process(pid).name() for pid in session.engines.pids} == {"flex-engine"}
