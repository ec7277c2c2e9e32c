"""The nursery: what it forks is as if it had been started, and goes and stays as it should."""

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
from flexkernel.cluster.forkserver import ForkRequest, ForkServer, fork_server, opened, unfit
from flexkernel.cluster.process import exit_code

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there is no nursery")
CHILD = "forked"
MODULES = ("numpy", CHILD)


@pytest.fixture(autouse=True)
def _child_on_path(monkeypatch):
    """`python -m` warns of a module of a package that is imported already: the child is in none."""
    support = Path(__file__).parents[1] / "support"
    monkeypatch.setenv("PYTHONPATH", str(support), prepend=os.pathsep)


def order(tmp_path: Path, *arguments: str, stays: bool = False, **environment: str) -> ForkRequest:
    log = tmp_path / f"{time.monotonic_ns()}.log"
    return ForkRequest(
        CHILD, list(arguments), {**os.environ, **environment}, str(tmp_path), str(log), stays
    )


@pytest.fixture
def bred():
    """A nursery; it has ended when the test has."""
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


def test_what_it_forks_is_as_if_it_had_been_started(bred, tmp_path):
    orders = [order(tmp_path, "say", "--and=more", FLEX_OF_THIS="1") for _ in range(2)]
    for one in orders:
        assert bred.wait(bred.fork(one), never) == 0
    said = [json.loads(Path(one.log).read_text()) for one in orders]
    assert said[0]["arguments"] == ["say", "--and=more"] and said[0]["name"] == "__main__"
    assert said[0]["environment"] == orders[0].environment
    assert (
        said[0]["folder"] == said[0]["first"] == str(tmp_path)
        and said[0]["session"]
        and said[0]["mask"] == 0o077
    )
    assert "socket" not in said[0]["files"] and {"/dev/null", orders[0].log} <= set(
        said[0]["files"]
    )
    assert said[0]["drawn"] != said[1]["drawn"], "each draws its own random numbers"
    assert Path(orders[0].log).stat().st_mode & 0o077 == 0


def test_it_sees_what_it_has_open(tmp_path, monkeypatch):
    with (tmp_path / "here").open("w"):
        assert str(tmp_path / "here") in opened()
    monkeypatch.setattr("os.listdir", lambda path: ["one thread"])
    monkeypatch.setattr(
        "flexkernel.cluster.forkserver.opened", lambda: ["/dev/null", "/dev/nvidiactl"]
    )
    assert unfit() == "/dev/nvidiactl is open"


def test_it_tells_how_they_ended(bred, tmp_path):
    assert bred.wait(bred.fork(order(tmp_path, "exit")), never) == 7
    pid = bred.fork(order(tmp_path, "sleep"))
    os.kill(pid, signal.SIGSEGV)
    assert bred.wait(pid, never) == -signal.SIGSEGV
    assert bred.wait(bred.fork(order(tmp_path, "sleep")), lambda: True) is None, (
        "who waits may give up"
    )


def test_what_comes_too_late_is_ended(bred, tmp_path, monkeypatch):
    assert bred.wait(bred.fork(order(tmp_path, "exit")), never) == 7
    monkeypatch.setattr("flexkernel.cluster.forkserver.FORK_S", 0.0)
    process = psutil.Process(bred.pid)
    process.suspend()
    assert bred.fork(order(tmp_path, "sleep")) is None, "who waits has given up"
    process.resume()
    end = time.monotonic() + 10
    while not bred._ended and time.monotonic() < end:
        time.sleep(0.02)
    assert list(bred._ended.values()) == [-signal.SIGKILL] and not process.children()


@pytest.mark.parametrize("why", ["threads", "fails"])
def test_where_it_cannot_fork_it_says_so_and_goes(why, tmp_path, monkeypatch):
    found = ForkServer(MODULES, {**os.environ, "FLEX_ENV": "NURSLING", "NURSLING": why})
    assert found.fork(order(tmp_path, "say")) is None
    assert found._process.wait(10) is not None and not found.there and found.unfit
    monkeypatch.setattr("flexkernel.cluster.forkserver._fork_server", found)
    assert fork_server(MODULES, found.environment) is None, "another would not be fit either"


def test_engines_are_started_where_it_cannot_fork(monkeypatch, tmp_path):
    monkeypatch.setattr(ForkServer, "fork", lambda self, order: None)
    launcher = launchers.FlexEngineLauncher(profile_dir=str(tmp_path), identifier="0")
    launcher.engine_cmd = [sys.executable, "-m", CHILD, "exit"]
    launcher.start()
    launcher._wait_thread.join(30)
    assert launcher._popen_process is not None and exit_code(launcher) == 7


def test_another_environment_is_another_nursery_and_the_first_goes_with_its_last(
    monkeypatch, tmp_path
):
    monkeypatch.setattr("flexkernel.cluster.forkserver._fork_server", None)
    first = fork_server(MODULES, os.environ)
    pid = first.fork(order(tmp_path, "sleep"))
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
orders = [ForkRequest("forked", ["sleep"], dict(os.environ), ".", sys.argv[1], stays) for stays in (False, True)]
print(found.pid, *([found.fork(order) for order in orders] if "numpy" in sys.argv else []), flush=True)
time.sleep(60)
"""


def killed_driver(tmp_path: Path, *modules: str, **environment: str) -> list[int]:
    """The pids that a driver told before it was killed: its nursery's, and those of two that it
    had it fork."""
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
