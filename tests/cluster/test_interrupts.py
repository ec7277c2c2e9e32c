"""Interrupts: none is lost, none leaves something half done, and what was captured before one is
kept or not there."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch

from flexkernel.cluster.interrupts import INSISTS, SignalMask
from flexkernel.errors import CaptureError, EngineError
from tests.support import on_engines
from tests.support.waiting import until

IDS = [[5, 6, 7, 8, 9], [10, 11, 12, 13, 14]]
MLPS = [f"model.layers.{i}.mlp" for i in range(4)]


def press() -> None:
    signal.raise_signal(signal.SIGINT)  # the handler has run when it returns


# --- SignalMask -----------------------------------------------------------------------


def test_an_interrupt_waits_until_what_it_came_into_is_done():
    done = []
    with pytest.raises(KeyboardInterrupt), SignalMask():
        with SignalMask():
            press()
            done.append("inner")
        done.append("outer")
    assert (
        done == ["inner", "outer"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )


def test_where_it_is_heard_it_is_heard_at_once_also_one_that_came_before():
    with SignalMask() as mask:
        with pytest.raises(KeyboardInterrupt), mask.unmasked():
            press()
            raise AssertionError("the interrupt was to come here")
        press()
        with pytest.raises(KeyboardInterrupt), mask.unmasked():
            raise AssertionError("and here before anything")
        with mask.unmasked():
            pass  # each is heard once


def test_whoever_insists_is_heard_whatever_is_left_half_done():
    done = []
    with pytest.raises(KeyboardInterrupt), SignalMask():
        for _ in range(INSISTS):
            press()
            done.append(1)
    assert len(done) == INSISTS - 1


def test_other_threads_and_ignored_signals_are_left_alone():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with SignalMask():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    seen = []

    def elsewhere() -> None:
        with SignalMask():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [before]


# --- what is kept of a run that ended early -------------------------------------------


def interrupt_at(session, module: str, rank: int, run) -> None:
    """Ctrl-C while that rank is asleep in a module."""
    with tempfile.TemporaryDirectory() as folder:
        sleeps = Path(folder, "sleeps")
        session.on_ranks(on_engines.sleep_at, module, rank, 100.0, str(sleeps))

        def press_when_it_sleeps() -> None:
            until(sleeps.exists)
            time.sleep(0.2)  # the other rank comes to where it waits
            os.kill(os.getpid(), signal.SIGINT)

        thread = threading.Thread(target=press_when_it_sleeps)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            run()
        thread.join()


@pytest.mark.parametrize("layout", [{"tp": 2}, {"pp": 2}], ids=["tp", "pp"])
@pytest.mark.engines(2)
def test_what_was_whole_before_an_interrupt_is_kept_and_nothing_else(session, tiny, layout):
    session.load(tiny("llama"), **layout)
    session.hook("model.layers.*.mlp")
    session.hook("model.layers.3.self_attn.q_proj")
    whole = {c.key: c.tensor().clone() for c in session.run(IDS)}
    interrupt_at(session, "model.layers.3.input_layernorm", 1, lambda: session.run(IDS))
    run = session.last
    assert (
        run.partial == "interrupted"
        and "PARTIAL: interrupted" in repr(run)
        and "PARTIAL" in run._repr_html_()
    )
    assert [c.key.module for c in run] == MLPS[:3], (
        "rank 0 of tp has its half of q_proj, rank 1 has not"
    )
    assert all(torch.equal(c.tensor(), whole[c.key]) for c in run)
    with pytest.raises(
        CaptureError, match=r"ended before .*q_proj.* was whole \(interrupted\); it has 3 captures"
    ):
        run["model.layers.3.self_attn.q_proj"]
    with pytest.raises(CaptureError, match="no logits: interrupted"):
        run.logits  # noqa: B018
    after = session.run(IDS)
    assert (
        after.partial == ""
        and all(torch.equal(c.tensor(), whole[c.key]) for c in after)
        and len(after) == 5
    )
    assert all(torch.equal(c.tensor(), whole[c.key]) for c in run), "its memory is its own"
    before = session.store.pool.num_bytes
    run.free()
    assert session.store.pool.num_bytes < before and run not in session.runs


@pytest.mark.engines(2)
def test_of_a_generation_what_came_in_whole_steps_is_kept(session, tiny):
    session.load(tiny("llama"), pp=2)
    session.hook("model.layers.*.mlp")
    whole = session.generate(IDS, max_new_tokens=12, eos_token_id=None)
    told = []

    def stop(_row: int, text: str) -> None:
        told.append(text)
        if len(told) == 6:
            raise KeyboardInterrupt

    session.on_ranks(on_engines.slow_at, MLPS[2], 0.1)
    with pytest.raises(KeyboardInterrupt):
        session.generate(IDS, max_new_tokens=12, eos_token_id=None, on_token=stop)
    run = session.last
    assert run.partial == "interrupted" and 1 <= run.forwards < 12
    assert [row[: run.forwards] for row in whole.new_ids] == run.new_ids
    assert [c.key.module for c in run] == MLPS
    for capture in run:
        length = len(IDS[0]) + run.forwards - 1
        assert capture.shape == (2, length, 64)
        assert torch.equal(capture.tensor(), whole[capture.key].tensor()[:, :length])
    assert torch.equal(run.logits.tensor(), whole.logits.tensor()[:, : run.forwards])


@pytest.mark.engines(2)
def test_what_was_whole_before_an_edit_failed_is_kept_too(session, tiny):
    session.load(tiny("llama"), tp=2)
    session.hook("model.layers.*.mlp")
    whole = session.run(IDS)

    @session.edit("boom")
    def boom(x, ctx):
        raise ZeroDivisionError("in the middle")

    session.hook("model.layers.2", edit="boom")
    with pytest.raises(EngineError, match="in the middle"):
        session.run(IDS)
    run = session.last
    assert run is not whole and "boom' at model.layers.2 raised ZeroDivisionError" in run.partial
    assert [c.key.module for c in run] == MLPS[:3]
    assert all(torch.equal(run[name].tensor(), whole[name].tensor()) for name in MLPS[:3])


@pytest.mark.engines(2)
def test_an_interrupt_at_any_moment_leaves_hooks_and_runs_as_they_were_said(session, tiny):
    """Ten here, a hundred in `make faults`."""
    session.load(tiny("llama"), tp=2)
    session.hook(MLPS[1])
    logits, stored = session.run(IDS).logits.tensor().clone(), len(session.runs)
    for i in range(10):
        timer = threading.Timer(0.013 * i, os.kill, (os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            timer.start()
            for _ in range(1000):
                session.hook(MLPS[2], groups=str(i))
                session.run(IDS).free()
        timer.join()
        assert torch.equal(session.run(IDS).logits.tensor(), logits)
        session.last.free()
    for run in session.runs[stored:]:
        run.free()
    session.run(IDS)
    assert len(session.runs) == stored + 1
    in_use = {extent.base for extent in session.store._extents.values()}
    assert {e.base for held in session.store.pool._extents.values() for e in held} == in_use, (
        "no memory is lost"
    )
