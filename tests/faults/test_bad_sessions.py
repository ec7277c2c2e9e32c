"""Bad inputs by number (bad.CATALOGUE): cluster files, several notebooks, clocks, limits,
interrupts, and what comes over the wire. Afterwards a run equals the unsharded model's.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import zmq

import flexkernel as fk
from flexkernel import engine
from flexkernel.cluster import begin
from flexkernel.cluster.private import check_private
from flexkernel.cluster.reaper import end
from flexkernel.errors import ClusterError
from flexkernel.memory.heartbeat import start_time
from flexkernel.wire import Owner
from tests.support import bad
from tests.support.waiting import until

two = pytest.mark.engines(2)


# --- cluster files --------------------------------------------------------------------


@pytest.fixture
def security(tmp_path, monkeypatch) -> Path:
    """The folder of a profile's cluster files."""
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    folder = tmp_path / "profile_default" / "security"
    folder.mkdir(parents=True, mode=0o700)
    return folder


BROKEN_FILES = {
    "61-empty": "",
    "61-half": '{"cluster": {"class": "ipyparallel.cluster.cluster.Cluster", "cluster_',
    "61-list": "[]",
    "61-null": "null",
    "61-other": '{"some": "thing"}',
    "61-class": '{"cluster": {"class": "os.system", "cluster_id": ""}, "engines": {"class": "x", "sets": {}}}',
    "61-deep": "[" * 100_000,
    "61-binary": "\x00\x01\x02",
}


@pytest.mark.parametrize("case", BROKEN_FILES)
def test_a_broken_cluster_file_is_one_sentence(case, security):
    (security / "cluster-.json").write_text(BROKEN_FILES[case])
    with pytest.raises(ClusterError, match="no cluster to attach to"):
        fk.attach(profile="default")


@pytest.mark.numbers(61)
@pytest.mark.parametrize("which", ["cluster-.json", "ipcontroller-client.json"])
def test_a_cluster_file_that_others_can_read_is_refused(which, security):
    path = security / which
    path.write_text("{}")
    path.chmod(0o644)
    # nobody can enter its folder: what `ipcluster start` leaves with a common umask
    check_private(path)
    security.chmod(0o755)
    with pytest.raises(
        ClusterError, match=rf"{which} has mode 0644 and its folder 0755: others .* chmod 600"
    ):
        check_private(path)
    security.chmod(0o700)
    with pytest.raises(ClusterError) as caught:
        fk.attach(profile="default")
    # which holds the key
    assert ("has mode 0644" in str(caught.value)) == (which == "ipcontroller-client.json")
    path.chmod(0o600)
    check_private(path, key=True)


@pytest.mark.numbers(61)
@pytest.mark.skipif(os.getuid() != 0, reason="giving a file away takes root")
def test_a_cluster_file_of_somebody_else_is_refused(security):
    path = security / "cluster-.json"
    path.write_text(json.dumps({"cluster": {"class": "never.imported"}}))
    path.chmod(0o600)
    os.chown(path, 65534, 65534)
    with pytest.raises(
        ClusterError, match=r"cluster-.json belongs to uid 65534, and you are uid 0"
    ):
        fk.attach(profile="default")
    os.chown(path, 0, 0)
    os.chown(security, 65534, 65534)
    with pytest.raises(ClusterError, match=r"security belongs to uid 65534"):
        fk.attach(profile="default")


@pytest.mark.numbers(72)
@two
def test_another_key_gets_no_answer(session, tiny, security, monkeypatch):
    """The files of the real cluster, with another key in them: whoever has only the ports is not
    let in."""
    bad.fit(session, tiny("llama"), **bad.TP)
    real, name = (
        Path(session.engines.ipcluster.profile_dir) / "security",
        session.engines.cluster_id,
    )
    for path in real.glob(f"*{name}*.json"):
        shutil.copy(path, security)
    client = security / f"ipcontroller-{name}-client.json"
    content = json.loads(client.read_text())
    client.write_text(json.dumps(content | {"key": "0" * len(content["key"])}))
    cluster = json.loads((security / f"cluster-{name}.json").read_text())
    cluster["cluster"]["profile_dir"] = cluster["controller"]["state"]["profile_dir"] = str(
        security.parent
    )
    (security / f"cluster-{name}.json").write_text(json.dumps(cluster))
    with pytest.raises(ClusterError, match="no cluster to attach to"):
        begin.attach(cluster_id=name, timeout_s=2)
    bad.healthy(session, tiny("llama"), **bad.TP)


# --- several notebooks ----------------------------------------------------------------

INTRUDER = """
import sys, flexkernel as fk
try:
    session = fk.attach(cluster_id=sys.argv[1])
    session.hook("model.layers.*")
    print("came in")
except fk.errors.ClusterError as error:
    print(error)
"""


@pytest.mark.numbers(63, 65)
@two
def test_another_notebook_that_attaches_during_a_load_is_refused(session, tiny):
    """It has to wait for the engines, and then it is told who has them."""
    intruder = subprocess.Popen(
        [sys.executable, "-c", INTRUDER, session.engines.cluster_id],
        stdout=subprocess.PIPE,
        text=True,
    )
    loads = 0
    while intruder.poll() is None and loads < 100:
        session.load(tiny("llama"), tp=2)
        loads += 1
    said = intruder.communicate(timeout=60)[0]
    assert (
        f"another notebook has these engines: pid {os.getpid()} on {socket.gethostname()}" in said
    )
    assert loads > 0 and len(session.hooks) == 0
    bad.healthy(session, tiny("llama"), **bad.TP)


LEAVER = """
import os, signal, sys, threading, flexkernel as fk
from tests.support import bad
from pathlib import Path
name, folder, first = sys.argv[1:]
if first == "first":
    session = fk.start(2, cluster_id=name, keep=True)
    session.load(folder, tp=2)
else:
    session = fk.attach(cluster_id="kept-" + name)
    bad.healthy(session, Path(folder), **bad.TP)
session.hook("model.layers.*.mlp")
session.edit("slow")(bad.slow)
session.hook("model.layers.2.mlp", edit="slow", name="slow")
threading.Timer(0.3, lambda: print(len(session.hooks), flush=True)).start()
session.run(bad.ROWS)
print("it came to its end")
"""


@pytest.mark.long
@pytest.mark.parametrize(
    "times", [pytest.param(1, id="64-once"), pytest.param(5, id="70-five-times")]
)
def test_a_notebook_that_goes_during_a_forward_leaves_a_model_that_runs(times, tiny):
    """Killed while its engines compute, several in a row: the next one finds model and hooks, and
    goes on."""
    name = f"bad-{os.getpid()}-{times}"
    session = None
    try:
        for turn in range(times):
            driver = subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    LEAVER,
                    name,
                    str(tiny("llama")),
                    "first" if turn == 0 else "again",
                ],
                stdout=subprocess.PIPE,
                text=True,
            )
            assert driver.stdout is not None and driver.stdout.readline().strip() == "2"
            driver.kill()
            assert driver.wait(10) == -signal.SIGKILL
        session = fk.attach(cluster_id=f"kept-{name}")
        assert [hook.key for hook in session.hooks] == ["model.layers.*.mlp", "slow"]
        bad.healthy(session, tiny("llama"), **bad.TP)
    finally:
        (session or fk.attach(cluster_id=f"kept-{name}", take=True)).close(end=True)


# --- clocks and limits ----------------------------------------------------------------


@pytest.mark.numbers(66)
def test_a_clock_that_jumps_changes_nothing(monkeypatch):
    """Which process it was is not asked of the clock: nobody is thought dead, and nobody's process
    is ended."""
    mine = start_time(os.getpid())
    sleeper = subprocess.Popen(["sleep", "60"])
    known = [(sleeper.pid, start_time(sleeper.pid))]
    owner = Owner("somebody", socket.gethostname(), os.getpid(), mine, 0.0)
    real = time.time
    for hours in (-5, 5):
        monkeypatch.setattr(time, "time", lambda hours=hours: real() + 3600 * hours)
        monkeypatch.setattr(psutil._pslinux, "BOOT_TIME", real() + 3600 * hours, raising=False)
        assert start_time(os.getpid()) == mine and engine.lives(owner)
    assert not engine.lives(Owner("x", socket.gethostname(), os.getpid(), mine - 100, 0.0))
    assert end([(sleeper.pid, known[0][1] + 5)], 0.1) == [] and sleeper.poll() is None
    assert end(known, 3) == [sleeper.pid] and sleeper.wait(5) is not None
    with pytest.raises(psutil.NoSuchProcess):
        start_time(sleeper.pid)


@pytest.mark.numbers(66)
@two
def test_a_run_while_the_clock_jumps(session, tiny, monkeypatch):
    real, calls = time.time, iter(range(10**9))
    monkeypatch.setattr(time, "time", lambda: real() + 3600 * (-1) ** next(calls))
    bad.healthy(session, tiny("llama"), **bad.TP)


ALONE = """
import os, sys, flexkernel as fk
from tests.support import bad
from pathlib import Path
try:
    with fk.start(2) as session:
        bad.healthy(session, Path(sys.argv[1]), **bad.TP)
    print("right")
except fk.errors.FlexError as error:
    print(type(error).__name__, error)
"""


def alone(folder: Path, prefix: list[str], **env: str) -> str:
    """What a notebook of its own says under such circumstances."""
    code = [*prefix, sys.executable, "-c", ALONE, str(folder)]
    done = subprocess.run(
        code,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | env,
        check=False,
    )
    return done.stdout.strip() or done.stderr[-2000:]


def can_unshare() -> bool:
    return (
        subprocess.run(["unshare", "--uts", "true"], capture_output=True, check=False).returncode
        == 0
    )


@pytest.mark.numbers(67, 68)
@pytest.mark.long
@pytest.mark.skipif(not can_unshare(), reason="a host name of its own takes a namespace of its own")
def test_a_host_without_an_address_and_a_home_that_cannot_be_written(tiny):
    """A name that leads nowhere, and a home in /proc, which not even root can write to."""
    shell = 'hostname nowhere-at-all.invalid; exec "$@"'
    said = alone(tiny("llama"), ["unshare", "--uts", "sh", "-c", shell, "sh"], HOME="/proc/none")
    assert said == "right"


@pytest.mark.numbers(69)
@pytest.mark.long
def test_few_open_files_are_enough_or_are_said_to_be_too_few(tiny):
    said = alone(tiny("llama"), ["sh", "-c", 'ulimit -n 64; exec "$@"', "sh"])
    assert said == "right" or re.match(
        r"(ClusterError|LoadError) .*too many open files", said, re.IGNORECASE | re.DOTALL
    )


# --- interrupts -----------------------------------------------------------------------


@pytest.mark.long("71-hundred")
@two
@pytest.mark.parametrize(
    "times", [pytest.param(5, id="71-five"), pytest.param(100, id="71-hundred")]
)
def test_an_interrupt_at_any_moment_leaves_a_session_that_is_right(times, session, tiny):
    folder = tiny("llama")
    moments = random.Random(71)
    bad.fit(session, folder, **bad.TP)
    came = 0
    for turn in range(times):
        try:
            timer = threading.Timer(moments.uniform(0, 0.15), os.kill, (os.getpid(), signal.SIGINT))
            timer.start()
            while timer.is_alive():
                session.hook("model.layers.*.mlp")
                session.run(bad.ROWS)
                session.unhook()
            time.sleep(0.2)
        except KeyboardInterrupt:
            came += 1
        timer.join()
        try:
            bad.healthy(session, folder, **bad.TP)
        except BaseException as error:
            error.add_note(f"turn {turn}")
            raise
    assert came == times


# --- the wire -------------------------------------------------------------------------


@pytest.mark.numbers(73)
@two
def test_a_message_that_is_sent_again_is_not_obeyed_again(session, tiny, tmp_path):
    """As it was signed, from another connection: the engine has seen its signature."""
    from ipyparallel import serialize

    bad.fit(session, tiny("llama"), **bad.TP)
    client, mark = session.engines.client, tmp_path / "mark"
    content = serialize.pack_apply_message(bad.note, (str(mark),), {})
    told = {"follow": [], "after": [], "timeout": None, "targets": None, "retries": 0}
    message = client.session.msg("apply_request", content={}, metadata=told)
    frames = (
        client.session.serialize(message, [client._engines[session.engines[0].id].encode()])
        + content
    )
    security = Path(session.engines.ipcluster.profile_dir) / "security"
    info = json.loads(
        (security / f"ipcontroller-{session.engines.cluster_id}-client.json").read_text()
    )
    url = f"{info['interface']}:{info['mux']}"
    with zmq.Context() as context:
        for _ in range(3):
            with context.socket(zmq.DEALER) as dealer:
                dealer.identity, dealer.linger = os.urandom(8), 1000
                dealer.connect(url)
                dealer.send_multipart(frames)
                until(mark.exists)
    session.on_ranks(int)  # behind them in the engine's line
    time.sleep(0.2)
    assert mark.read_text() == "once\n"
    bad.healthy(session, tiny("llama"), **bad.TP)


def listening(session) -> list[tuple[int, str, int]]:
    """(pid, address, port) of everything of ours that listens: this process's, the controller's,
    the engines'."""
    mine = [psutil.Process(), *psutil.Process().children(recursive=True)]
    found = [
        (p.pid, c.laddr.ip, c.laddr.port)
        for p in mine
        for c in p.net_connections("inet")
        if c.status == psutil.CONN_LISTEN
    ]
    assert {pid for pid, _, _ in found} >= set(session.engines.pids) and len(found) > 10
    return found


@pytest.mark.numbers(74)
@pytest.mark.long
@two
def test_random_bytes_to_every_port(session, tiny):
    bad.fit(session, tiny("llama"), **bad.TP)
    pids, rng = list(session.engines.pids), random.Random(5)
    for _, address, port in listening(session):
        for start in (b"", b"\xff" + bytes(8) + b"\x01\x7f", b"GET / HTTP/1.1\r\n\r\n", bytes(8)):
            with socket.create_connection((address, port), 5) as connection:
                connection.sendall(start + rng.randbytes(rng.randint(0, 4000)))
    assert session.engines.pids == pids and all(session.engines.alive())
    bad.healthy(session, tiny("llama"), **bad.TP)
    session.load(tiny("llama_untied"), pp=2)  # new groups: over new connections
    bad.healthy(session, tiny("llama"), **bad.TP)


@pytest.mark.numbers(75)
@two
def test_two_hundred_idle_connections_to_every_port(session, tiny):
    bad.fit(session, tiny("llama"), **bad.TP)
    for _, address, port in listening(session):
        idle = []
        try:
            for _ in range(200):
                connection = socket.socket()
                connection.setblocking(False)
                idle.append(connection)
                connection.connect_ex((address, port))
            bad.healthy(session, tiny("llama"), **bad.TP)
        finally:
            for connection in idle:
                connection.close()
    session.load(tiny("llama_untied"), pp=2)
    bad.healthy(session, tiny("llama"), **bad.TP)
