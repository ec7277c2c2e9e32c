"""The cluster: one answer a rank, errors that come at once with their cause, engines usable again,
an end."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time

import ipyparallel
import psutil
import pytest
import torch

import flexkernel as fk
import flexkernel.engine as engine
from flexkernel.cluster import controller, waiting
from flexkernel.cluster.reports import cause
from tests.support import on_engines
from tests.support.waiting import until

IDS = [[5, 6, 7, 8, 9]]
LAYOUTS = [{"tp": 2}, {"pp": 2}, {"fsdp": 2}]


@pytest.fixture(params=LAYOUTS, ids=lambda d: "x".join(d))
def loaded(request, session, tiny):
    """A session with a model under each layout, its logits and where its weights lie."""
    session.load(tiny("llama"), **request.param)
    logits = session.run(IDS).logits.tensor()
    yield session, logits, session.on_ranks(on_engines.weights_at)


def still_right(session, logits, weights) -> None:
    """The next run is bit-equal, and nothing was loaded again."""
    assert torch.equal(session.run(IDS).logits.tensor(), logits)
    assert session.on_ranks(on_engines.weights_at) == weights


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.engines(2)
def test_a_rank_that_raises_leaves_nobody_waiting(loaded, rank):
    session, logits, weights = loaded
    name = f"model.layers.{3 * rank}.mlp"
    session.on_ranks(on_engines.raise_at, name, rank)
    begin = time.monotonic()
    with pytest.raises(
        fk.errors.EngineError, match=rf"ZeroDivisionError on rank {rank}: a test raised this"
    ) as caught:
        session.run(IDS)
    assert time.monotonic() - begin < 10, (
        "five times the bound of 2 s; the groups' own timeout is 60"
    )
    assert caught.value.rank == rank and "on_engines.py" in caught.value.remote_traceback
    still_right(session, logits, weights)


@pytest.mark.engines(2)
def test_an_interrupt_frees_every_rank_and_keeps_the_model(loaded):
    session, logits, weights = loaded
    for name, rank in (("model.layers.0.mlp", 0), ("model.layers.3.mlp", 1)):
        session.on_ranks(on_engines.sleep_at, name, rank)
        timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        begin = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            session.run(IDS)
        assert time.monotonic() - begin < 0.5 + 10, "five times the bound of 2 s"
        still_right(session, logits, weights)


@pytest.mark.engines(2)
def test_the_groups_are_broken_twenty_times_without_a_leak(session, tiny):
    session.load(tiny("llama"), tp=2)
    logits = session.run(IDS).logits.tensor()

    def held():
        process = psutil.Process()
        return process.num_fds(), process.num_threads()

    counts = []
    for _ in range(20):
        session.on_ranks(on_engines.raise_at, "model.layers.1.mlp", 1)
        with pytest.raises(fk.errors.EngineError):
            session.run(IDS)
        counts.append(session.on_ranks(held))
    assert torch.equal(session.run(IDS).logits.tensor(), logits)
    for rank in (0, 1):
        fds = [count[rank][0] for count in counts]
        threads = [count[rank][1] for count in counts]
        assert fds[-1] <= fds[4] + 4 and threads[-1] <= threads[4] + 2, (fds, threads)


@pytest.mark.engines(2)
def test_every_rank_answers_in_order(session):
    import socket

    assert session.on_ranks(lambda: on_engines.runtime().rank) == [0, 1]
    assert session.engines.hosts == [socket.gethostname()] * 2
    assert session.on_ranks(lambda a, b: a + b, 2, 3) == [5, 5]


@pytest.mark.engines(2)
def test_a_function_that_cannot_travel_is_refused_here(session):
    lock = threading.Lock()
    with pytest.raises(fk.errors.ClusterError, match="cannot be sent to engines"):
        session.on_ranks(lambda: lock)


@pytest.mark.engines(2)
def test_nothing_is_kept_of_calls_that_are_over(session, tiny):
    session.load(tiny("llama"), tp=2)
    for _ in range(5):
        session.run(IDS)
    client = session.engines.client
    assert len(client.history) == len(client.results) == len(client._futures) == 0
    assert len(client.metadata) <= 1, "ipyparallel keeps one entry of its own"


@pytest.mark.engines(2)
def test_all_our_sockets_are_on_loopback(session, tiny):
    session.load(tiny("llama"), tp=2)
    pids = session.on_ranks(os.getpid)
    mine = [psutil.Process(), *psutil.Process().children(recursive=True)]
    assert set(pids) <= {p.pid for p in mine}
    listening = [
        (p.pid, c.laddr)
        for p in mine
        for c in p.net_connections("inet")
        if c.status == psutil.CONN_LISTEN
    ]
    assert len(listening) > 5
    assert {address.ip for _, address in listening} <= {"127.0.0.1", "::1", "127.0.1.1"}


@pytest.mark.slow
def test_an_engine_that_dies_is_named_and_the_others_come_back(tiny):
    with fk.start(2) as session:
        session.load(tiny("llama"), tp=2)
        session.run(IDS)
        session.on_ranks(on_engines.die_at, "model.layers.1.mlp", 1)
        begin = time.monotonic()
        with pytest.raises(fk.errors.EngineDied, match="rank 1"):
            session.run(IDS)
        assert time.monotonic() - begin < 10
        with pytest.raises(fk.errors.EngineDied, match="rank 1's engine is gone"):
            session.run(IDS)
        assert session.engines.alive() == [True, False]
        assert "1 of 2 alive" in repr(session.status())


DRIVER = """
import sys, time, flexkernel as fk
session = fk.start(2)
session.load(sys.argv[1], tp=2)
session.run([[1, 2, 3]])
print(*session.on_ranks(__import__("os").getpid), session.store.folder, flush=True)
time.sleep(100)
"""


@pytest.mark.slow
def test_an_owned_cluster_goes_when_its_driver_is_killed(tiny):
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(tiny("llama"))], stdout=subprocess.PIPE, text=True
    )
    try:
        assert driver.stdout is not None
        *pids, folder = driver.stdout.readline().split()
        processes = [
            p
            for p in psutil.Process(driver.pid).children(recursive=True)
            if "reaper" not in str(p.cmdline())
        ]
        assert {int(pid) for pid in pids} <= {p.pid for p in processes} and os.path.isdir(folder)
        driver.kill()
        gone, alive = psutil.wait_procs(processes, 30)
        assert not alive and len(gone) >= 3
        until(lambda: not os.path.exists(folder))
    finally:
        driver.kill()
        driver.wait()


@pytest.mark.slow
def test_a_cluster_goes_whose_driver_is_killed_while_it_starts_it():
    driver = subprocess.Popen([sys.executable, "-c", "import flexkernel as fk; fk.start(2)"])
    mine = f"flex-{driver.pid}-"
    try:
        until(lambda: started_for(mine))
        driver.kill()
        until(lambda: not started_for(mine), 30)
    finally:
        driver.kill()
        driver.wait()


def started_for(prefix: str) -> list[psutil.Process]:
    """The processes of clusters whose id begins so."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("IPP_CLUSTER_ID", "").startswith(prefix) or (
                process.name() == "flex-engine"
                and any(f"-{prefix}" in file.path for file in process.open_files())
            ):
                found.append(process)
    return found


def test_a_cluster_that_is_not_there_is_said_to_be_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    with pytest.raises(
        fk.errors.ClusterError,
        match=r"no cluster to attach to at cluster_id='none-such'.*ipcluster",
    ):
        fk.attach(cluster_id="none-such")


def test_a_broken_cluster_file_is_said_to_be_broken(tmp_path, monkeypatch):
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    folder = tmp_path / "profile_default" / "security"
    folder.mkdir(parents=True)
    (folder / "cluster-.json").write_text("{ not json")
    with pytest.raises(fk.errors.ClusterError, match="no cluster to attach to"):
        fk.attach()


@pytest.mark.parametrize("n", [0, -1, 1.5, "two"])
def test_a_number_of_engines_that_is_none_is_refused(n):
    with pytest.raises(fk.errors.ClusterError, match="whole number"):
        fk.start(n)


def test_the_earliest_error_that_is_not_about_another_rank_is_the_cause():
    from flexkernel.wire import ErrorReport

    reports = [
        ErrorReport(0, "EngineError", "rank 1 was not ready", "", 1.0, secondary=True),
        ErrorReport(1, "HookError", "rank 1 has other hooks", "", 2.0),
        ErrorReport(2, "RuntimeError", "connection closed by peer", "", 3.0),
    ]
    found = cause(reports)
    assert isinstance(found, fk.errors.HookError) and "other hooks" in str(found)


def test_an_edits_error_shows_the_line_whose_source_only_this_process_has():
    import linecache

    from flexkernel.wire import ErrorReport

    linecache.cache["<edit mine>"] = (0, None, ["def mine(x, ctx):\n", "    y = x.foo\n"], "")
    traceback = '  File "<edit mine>", line 2, in mine\nAttributeError: foo\n'
    message = "edit 'mine' raised AttributeError: foo (line 2: mine)"
    found = cause([ErrorReport(1, "EditError", message, traceback, 1.0)])
    assert str(found) == "edit 'mine' raised AttributeError: foo (line 2: y = x.foo)"
    unknown = traceback.replace("<edit mine>", "<edit of another process>")
    assert str(cause([ErrorReport(1, "EditError", message, unknown, 1.0)])) == message


KEEPER = """
import sys, time, flexkernel as fk
session = fk.start(2, keep=True)
session.load(sys.argv[1], tp=2)
session.hook("model.layers.*.mlp")
run = session.run([[1, 2, 3]])
print(session.engines.cluster_id, float(run["model.layers.1.mlp"].norm()), flush=True)
time.sleep(100)
"""


def crash(cluster_id: str) -> None:
    """End a cluster's controller by force, with the processes it has begun."""
    cluster = ipyparallel.Cluster(cluster_id=cluster_id)
    found = controller.controllers(cluster)
    assert len(found) > 1
    for process in found:
        process.kill()
    psutil.wait_procs(found, 10)


@pytest.mark.long
@pytest.mark.slow
def test_a_kept_cluster_outlives_its_driver_with_model_hooks_and_runs(tiny):
    driver = subprocess.Popen(
        [sys.executable, "-c", KEEPER, str(tiny("llama"))], stdout=subprocess.PIPE, text=True
    )
    assert driver.stdout is not None
    cluster_id, norm = driver.stdout.readline().split()
    driver.kill()
    driver.wait()
    crash(cluster_id)
    session = fk.attach(cluster_id=cluster_id)  # which starts the controller again
    try:
        begin = time.monotonic()
        again = fk.attach(cluster_id=cluster_id)  # a second time, now that everything is imported
        assert time.monotonic() - begin < 5, "five times the bound of 1 s"
        again.close()
        assert session.has_model and str(session.loaded.info.layout) == "tp=2"
        assert [hook.key for hook in session.hooks] == ["model.layers.*.mlp"]
        assert float(session.runs[0]["model.layers.1.mlp"].norm()) == float(norm)
        assert float(session.run([[1, 2, 3]])["model.layers.1.mlp"].norm()) == float(norm)
        assert "kept: it stays" in repr(session.status())
        pids = session.on_ranks(os.getpid)
        assert session.on_ranks(on_engines.waits_for_a_controller_s) == [24 * 3600.0] * 2, (
            "FLEX_IDLE_TTL"
        )
    finally:
        session.close(end=True)
    until(lambda: not any(psutil.pid_exists(pid) for pid in pids), 20)


@pytest.mark.long
@pytest.mark.slow
def test_a_session_of_a_kept_cluster_says_how_its_controller_comes_back(tiny):
    session = fk.start(2, keep=True)
    cluster_id = session.engines.cluster_id
    try:
        session.load(tiny("llama"), tp=2)
        logits = session.run(IDS).logits.tensor().clone()
        session.close()
        session = fk.attach(cluster_id=cluster_id)
        crash(cluster_id)
        with pytest.raises(
            fk.errors.ClusterError, match=f"model still: %flex_cluster attach .*{cluster_id}"
        ):
            session.run(IDS)
        session = fk.attach(cluster_id=cluster_id)
        assert torch.equal(session.run(IDS).logits.tensor(), logits)
    finally:
        session.close(end=True)


@pytest.mark.engines(2)
def test_groups_are_made_anew_for_each_model_and_are_found_again_after_a_break(session, tiny):
    """Model after model, then a break: the meshes find their groups, and none of the old ones are
    left."""

    def num_groups():
        import torch.distributed as dist

        return len(dist.distributed_c10d._world.pg_names)

    counts = []
    for layout in (*LAYOUTS, {"dp": 2}, *LAYOUTS, {"dp": 2}):
        session.load(tiny("llama"), **layout)
        logits = session.run(IDS).logits.tensor()
        counts.append(session.on_ranks(num_groups)[0])
        session.on_ranks(on_engines.raise_at, "model.layers.3.mlp", 1)
        session.load(tiny("llama"), **layout)
        session.on_ranks(on_engines.raise_at, "model.layers.3.mlp", 1)
        with pytest.raises(fk.errors.EngineError, match="ZeroDivisionError"):
            session.run(IDS)
        assert torch.equal(session.run(IDS).logits.tensor(), logits)
    assert counts[:4] == counts[4:]


OTHER = """
import sys, flexkernel as fk
try:
    fk.attach(cluster_id=sys.argv[1])
except fk.errors.ClusterError as error:
    print(error)
session = fk.attach(cluster_id=sys.argv[1], take=True)
session.load(sys.argv[2], fsdp=2)
print(session.run([[1, 2, 3]]).next_tokens(1))
session.close()
"""


@pytest.mark.long
@pytest.mark.slow
def test_a_session_whose_engines_another_took_says_so_and_can_take_them_back(tiny):
    with fk.start(2) as session:
        session.load(tiny("llama"), pp=2)
        before = session.run([[1, 2, 3]]).next_tokens(1)
        cluster_id = session.engines.cluster_id
        other = subprocess.run(
            [sys.executable, "-c", OTHER, cluster_id, str(tiny("llama"))],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert other.returncode == 0, other.stderr
        me = rf"another notebook has these engines: pid {os.getpid()} on \S+, since 20\d\d-.*--take"
        assert re.match(me, other.stdout), other.stdout
        with pytest.raises(
            fk.errors.ClusterError, match=r"another notebook \(pid \d+ on .*\) has attached"
        ):
            session.run([[1, 2, 3]])
        again = fk.attach(cluster_id=cluster_id)
        assert str(again.info.layout) == "fsdp=2"
        assert again.run([[1, 2, 3]]).next_tokens(1)[0][0][0] == before[0][0][0]
        again.close()


@pytest.mark.long
@pytest.mark.slow
def test_a_cluster_that_another_ended_is_said_to_have_ended(tiny):
    session = fk.start(2)
    session.load(tiny("llama"), pp=2)
    other = (
        "import sys, flexkernel as fk; fk.attach(cluster_id=sys.argv[1], take=True).close(end=True)"
    )
    subprocess.run(
        [sys.executable, "-c", other, session.engines.cluster_id], check=True, timeout=120
    )
    begin = time.monotonic()
    with pytest.raises((fk.errors.ClusterError, fk.errors.EngineDied)):
        session.run([[1, 2, 3]])
    assert time.monotonic() - begin < 20
    session.close()


@pytest.mark.slow
def test_a_controller_that_crashes_is_restored_and_the_call_in_flight_arrives(tiny):
    with fk.start(2) as session:
        session.load(tiny("llama"), tp=2)
        session.hook("model.layers.*.mlp")
        logits, weights = (
            session.run(IDS).logits.tensor().clone(),
            session.on_ranks(on_engines.weights_at),
        )
        process = session.engines.ipcluster.controller.process
        crashed = [process, *process.children(recursive=True)]

        def crash() -> None:
            for process in crashed:
                process.kill()

        timer = threading.Timer(1.0, crash)
        timer.start()
        assert session.on_ranks(on_engines.slowly, 4.0) == [0, 1], (
            "the answers of a call that was in flight"
        )
        assert session.engines.ipcluster.controller.process.pid != process.pid
        assert torch.equal(session.run(IDS).logits.tensor(), logits)
        assert session.on_ranks(on_engines.weights_at) == weights and len(session.hooks) == 1
        pids = [p.pid for p in psutil.Process().children(recursive=True)]
    assert not [
        p
        for p in psutil.Process().children(recursive=True)
        if p.pid in pids and ("ipyparallel.controller" in p.cmdline() or p.name() == "flex-engine")
    ]


@pytest.mark.slow
def test_a_controller_that_has_lost_a_part_is_started_again(tiny, monkeypatch):
    """ipyparallel chooses ports first and binds them later: whoever takes one meanwhile ends the
    part whose it was."""
    degraded = controller.degraded
    answers = iter([True])
    begun = []
    monkeypatch.setattr(
        controller,
        "degraded",
        lambda cluster: begun.append(cluster) or next(answers, None) or degraded(cluster),
    )
    with fk.start(2) as session:
        first, second = begun
        assert first.cluster_id != second.cluster_id == session.engines.cluster_id
        until(lambda: not started_for(first.cluster_id))
        session.load(tiny("llama"), tp=2)
        logits = session.run(IDS).logits.tensor().clone()
        process = session.engines.ipcluster.controller.process
        for part in process.children():
            part.kill()
        begin = time.monotonic()
        assert torch.equal(session.run(IDS).logits.tensor(), logits)
        assert time.monotonic() - begin < 40, "it is looked at each 5 s"
        assert session.engines.ipcluster.controller.process.pid != process.pid


def lose_the_next_answer(rank: int) -> None:
    """On an engine: as a signal does that meets it between its work and its reply."""
    from ipyparallel.engine.app import IPEngine

    if on_engines.runtime().rank != rank:
        return
    session = IPEngine.instance().kernel.session
    send = session.send

    def lost(stream, msg_or_type, *args, **kwargs):
        if msg_or_type == "apply_reply":
            session.send = send
            return None
        return send(stream, msg_or_type, *args, **kwargs)

    session.send = lost


TIMES = [0]


def once_more(rank: int) -> int:
    """On an engine: how often it has been called there; the answer to this is lost."""
    from tests.cluster import (
        test_cluster,  # this one travels by its code: the module's list is the engine's
    )

    lose_the_next_answer(rank)
    test_cluster.TIMES[0] += 1
    return test_cluster.TIMES[0]


@pytest.mark.engines(2)
def test_a_call_whose_answer_is_lost_is_sent_again_and_made_once(session, monkeypatch):
    monkeypatch.setattr(waiting, "UNHEARD_S", (0.5, 1.0))
    assert session.on_ranks(once_more, 1) == [1, 1]
    assert session.on_ranks(os.getpid) == session.engines.pids


def test_a_call_that_others_have_overtaken_is_not_made_any_more(monkeypatch):
    made = []
    door = engine.Door()
    monkeypatch.setattr(
        door, "answer", lambda driver, method, *args: made.append(method) or len(made)
    )
    assert [door.call("me", 1, "a"), door.call("me", 1, "a"), door.call("me", 2, "b")] == [1, 1, 2]
    assert door.call("me", 1, "a") is None and door.call("other", 1, "c") == 3
    assert made == ["a", "b", "c"]


@pytest.mark.engines(2)
def test_a_rank_whose_answer_is_lost_at_an_interrupt_is_back_at_once(session, tiny):
    session.load(tiny("llama"), tp=2)
    before = session.run(IDS).logits.tensor().clone()

    timer = threading.Timer(1.0, signal.raise_signal, [signal.SIGINT])
    timer.start()
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        session.on_ranks(lose_the_next_answer, 0)
    assert time.monotonic() - begin < 10 and session.engines.answering() == [True, True]
    assert torch.equal(session.run(IDS).logits.tensor(), before)


@pytest.mark.long
@pytest.mark.slow
def test_a_dead_engine_of_an_attached_cluster_is_replaced_from_here_or_by_hand(
    tiny, tmp_path, monkeypatch
):
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    with open(tmp_path / "log", "w") as log:
        shell = {"stdout": log, "stderr": log, "start_new_session": True}
        ipcluster = subprocess.Popen(["ipcluster", "start", "-n", "2"], **shell)
        by_hand = None
        try:
            until(lambda: list(tmp_path.glob("profile_default/security/cluster-*.json")))
            session = fk.attach()
            session.load(tiny("llama"), tp=2)
            logits = session.run(IDS).logits.tensor().clone()

            os.kill(session.engines.pids[1], signal.SIGKILL)
            until(lambda: not session.engines.alive()[1])
            assert session.restart() == [1]
            assert torch.equal(session.run(IDS).logits.tensor(), logits)

            os.kill(session.engines.pids[0], signal.SIGKILL)
            until(lambda: not session.engines.alive()[0])
            # as if the engines were somewhere else
            session.engines.ipcluster.engine_launcher_class = "mpi"
            with pytest.raises(
                fk.errors.ClusterError, match=r"MPI\S+ by somebody else: .* Start 1 there"
            ) as refused:
                session.restart()
            command = re.findall("`(ipcluster .*)`", str(refused.value))
            by_hand = subprocess.Popen(shlex.split(*command), **shell)
            until(lambda: len(session.engines.client.ids) == 2)
            assert session.restart() == [0]
            assert torch.equal(session.run(IDS).logits.tensor(), logits)
            session.close()
        finally:
            for process in filter(None, (by_hand, ipcluster)):
                process.terminate()
            for process in filter(None, (by_hand, ipcluster)):
                process.wait(30)
