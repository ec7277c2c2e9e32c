"""Moves: how an activation gets from a hook into the notebook, on this host and from another;
beside ipyparallel's pull and a bare socket."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import zmq

from . import ranks
from .lab import Lab
from .reads import milliseconds
from .timing import Figure, in_turns, of, spread

__all__ = ["WIDE", "from_far", "here", "slices", "wide"]

WIDE = "model.layers.0.mlp.gate_proj"  # 16384 wide: with 4096 positions 256 MiB in float32
SLICE = 256 * 1024
ROUNDS = 200  # of what takes less than a millisecond


def wide(lab: Lab, positions: int = 4096, host: str = "") -> tuple[Any, list[list[int]]]:
    """(session with a model that has a wide, sharded activation, rows that make it so large)."""
    session = lab.session(lab.tiny("llama_wide"), host=host, tp=2)
    return session, [[3 + s % 250 for s in range(64 if lab.quick else positions)]]


def here(lab: Lab) -> list[Figure]:
    """From the hook to a tensor in the notebook, on this host. Ours: the slowest rank's time in
    hooks (which copies and digests), and the reading of the tensor; the first run, which makes its
    slab, apart."""
    session, rows = wide(lab)
    session.hook(WIDE)
    runs: list[Any] = []

    def ours() -> float:
        while runs:
            runs.pop().free()
        run = session.run(rows)
        runs.append(run)
        begin = time.perf_counter()
        whole = run[WIDE].tensor()
        seconds = time.perf_counter() - begin
        assert whole.shape[-1] == 16384 and float(whole[0, -1, -1]) != 0
        return run.seconds["copy"] + seconds

    cold = ours() + runs[0].seconds["prepare"]
    num_bytes = runs[0][WIDE].num_bytes
    views = in_turns({"tensor": lambda: tensor_alone(runs[0])}, 20)["tensor"]
    read = in_turns({"read": lambda: read_alone(runs[0])}, 3)["read"]
    with pulled(session, num_bytes) as pull:
        times = in_turns({"ours": ours, "pull": pull}, lab.repeats)
    for run in runs:
        run.free()

    def speed(seconds: float) -> float:
        return num_bytes / 1e6 / seconds

    return [
        Figure("ours / pull, MB/s", of(times, lambda a, b: b / a, "ours", "pull"), at_least=20),
        Figure("ours", of(times, speed, "ours"), "MB/s"),
        Figure("pull", of(times, speed, "pull"), "MB/s"),
        Figure("ours, first run with its new slab", spread([speed(cold)]), "MB/s"),
        Figure("`.tensor()` itself", milliseconds(views), "ms", at_most=2),
        Figure("and all of it read once, through its new mapping", milliseconds(read), "ms"),
    ]


def tensor_alone(run: Any) -> float:
    begin = time.perf_counter()
    whole = run[WIDE].tensor()
    seconds = time.perf_counter() - begin
    assert whole.numel()
    return seconds


def read_alone(run: Any) -> float:
    begin = time.perf_counter()
    assert torch.isfinite(run[WIDE].tensor().sum())
    return time.perf_counter() - begin


@contextmanager
def pulled(session: Any, num_bytes: int) -> Iterator[Callable[[], None]]:
    """ipyparallel's pull of an array of that size from the first engine."""
    view = session.engines.client[session.engines[0].id]
    view.apply_sync(ranks.put, "bench", num_bytes)

    def pull() -> None:
        array = view.pull("bench", block=True)
        assert array.nbytes == num_bytes and array[-1] == 1
        del array
        forget(session)

    try:
        yield pull
    finally:
        view.execute("del bench", block=True)
        forget(session)


def forget(session: Any) -> None:
    """ipyparallel's client keeps every result for ever."""
    client = session.engines.client
    client.purge_everything() if not client.outstanding else None


def from_far(lab: Lab) -> list[Figure]:
    """The same tensor from engines that say that they are on another host, over loopback TCP."""
    session, rows = wide(lab, host="b")
    session.hook(WIDE)
    run = session.run(rows)
    num_bytes = run[WIDE].num_bytes

    def ours() -> None:
        whole = run[WIDE].tensor()
        assert whole.nbytes == num_bytes

    with pulled(session, num_bytes) as pull, raw_socket(session, num_bytes) as raw:
        times = in_turns({"ours": ours, "pull": pull, "raw": raw}, lab.repeats)
    run.free()

    def speed(seconds: float) -> float:
        return num_bytes / 1e6 / seconds

    return [
        Figure("ours / pull, MB/s", of(times, lambda a, b: b / a, "ours", "pull"), at_least=3),
        Figure("ours / raw zmq, MB/s", of(times, lambda a, b: b / a, "ours", "raw"), at_least=0.8),
        *(Figure(name, of(times, speed, name), "MB/s") for name in ("ours", "raw", "pull")),
    ]


@contextmanager
def raw_socket(session: Any, num_bytes: int) -> Iterator[Callable[[], None]]:
    """One message with the array over PUSH and PULL, uncopied on both sides: what TCP and zmq take
    by themselves."""
    view = session.engines.client[session.engines[0].id]
    socket = zmq.Context.instance().socket(zmq.PULL)
    socket.RCVTIMEO = 60_000
    port = socket.bind_to_random_port("tcp://127.0.0.1")

    def raw() -> None:
        asked = view.apply_async(ranks.send_raw, "bench", f"tcp://127.0.0.1:{port}")
        message = socket.recv(copy=False)
        assert len(message.buffer) == num_bytes
        asked.get(60)

    try:
        yield raw
    finally:
        socket.close(linger=0)


def slices(lab: Lab) -> list[Figure]:
    """256 KiB of the same activation: on this host; and from another while the engine that serves
    it computes. With both at it two cores leave none to this process, which stands in for another
    host."""
    rounds = 20 if lab.quick else ROUNDS
    session, rows = wide(lab, 256)
    session.hook(WIDE)
    capture = session.run(rows)[WIDE]
    near = in_turns({"slice": lambda: sliced(capture)}, rounds, warm=3)["slice"]
    view = session.engines.client[session.engines[0].id]
    view.apply_sync(ranks.put, "bench", 4 * SLICE)
    trips = in_turns(
        {"trip": lambda: view.apply_sync(ranks.slice_of, "bench", SLICE)}, min(rounds, 50), warm=3
    )["trip"]
    view.execute("del bench", block=True)
    forget(session)

    session, rows = wide(lab, 256, host="b")
    session.hook(WIDE)
    capture = session.run(rows)[WIDE]
    sliced(capture)  # the first to ask has the engine open its socket, on its main thread
    with computing(session, [session.engines[0].id]):
        far = in_turns({"slice": lambda: sliced(capture)}, rounds, warm=3)["slice"]
    with computing(session, [one.id for one in session.engines]):
        crowded = in_turns({"slice": lambda: sliced(capture)}, rounds, warm=3)["slice"]
    idle = in_turns({"slice": lambda: sliced(capture)}, rounds, warm=3)["slice"]
    return [
        Figure("same host", milliseconds(near), "ms", at_most=0.1),
        Figure(
            "other host, the engine that serves it computing", milliseconds(far), "ms", at_most=1
        ),
        Figure("both engines computing", milliseconds(crowded), "ms"),
        Figure("other host, idle", milliseconds(idle), "ms"),
        Figure("`apply_sync`, idle", milliseconds(trips), "ms"),
    ]


def sliced(capture: Any) -> float:
    begin = time.perf_counter()
    part = capture[0, :16, :4096]
    seconds = time.perf_counter() - begin
    assert part.nbytes == SLICE
    return seconds


@contextmanager
def computing(session: Any, engines: Sequence[int]) -> Iterator[None]:
    """While it is entered these engines' main threads multiply matrices."""
    with tempfile.NamedTemporaryFile() as flag:
        calls = [session.engines.client[i].apply_async(ranks.busy, flag.name) for i in engines]
        time.sleep(0.5)
        yield
        assert not any(call.done() for call in calls), "the engines were at work all the time"
    assert all(call.get(60) > 0 for call in calls)
    forget(session)
