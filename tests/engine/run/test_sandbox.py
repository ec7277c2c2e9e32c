"""Edits that do what would leave other ranks waiting: one clear error, the model stays loaded."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
import torch

import flexkernel as fk

IDS = [[5, 6, 7, 8, 9]]
NAME = "model.layers.1.mlp"


@pytest.fixture
def loaded(session, tiny):
    session.load(tiny("llama"), tp=2)
    yield session, session.run(IDS).logits.tensor().clone()
    session.engines.timeout_s = 60.0


def sends(x, ctx):
    import torch.distributed as dist

    dist.all_reduce(x)
    return x


def calls_the_model(x, ctx):
    from flexkernel.engine import DOOR

    return DOOR.runtime.model.model.layers[0].mlp(x)


def prints_without_end(x, ctx):
    while True:
        print("x" * 1000)


def loops(x, ctx):
    while True:
        pass


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (sends, "an edit cannot send to other ranks"),
        (calls_the_model, "an edit cannot run the model that it is in"),
        (prints_without_end, "an edit cannot print more than"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@pytest.mark.engines(2)
def test_what_an_edit_may_not_do_is_refused_at_once(loaded, function, says):
    session, logits = loaded
    session.edit("bad")(function)
    session.hook(NAME, edit="bad")
    begin = time.monotonic()
    with pytest.raises(
        fk.errors.EditError, match=rf"edit 'bad' at {NAME} raised Refused: {says}.*\(rank 0\)"
    ):
        session.run(IDS)
    assert time.monotonic() - begin < 10, "five times the bound of 2 s"
    session.unhook()
    assert torch.equal(session.run(IDS).logits.tensor(), logits)


@pytest.mark.engines(2)
def test_an_edit_that_loops_for_ever_is_broken_off_by_the_timeout(loaded):
    session, logits = loaded
    session.edit("endless")(loops)
    session.hook(NAME, edit="endless")
    session.engines.timeout_s = 2.0
    said = rf"rank 0 did not arrive, no progress for 2 s: it is in {NAME}, at .*test_sandbox.py.*"
    with pytest.raises(
        fk.errors.EditError, match=rf"{said}edit 'endless' at {NAME} .*; rank 1 waited in {NAME}"
    ):
        session.run(IDS)
    session.unhook()
    assert torch.equal(session.run(IDS).logits.tensor(), logits)


@pytest.mark.engines(2)
def test_an_edit_that_loops_for_ever_ends_with_an_interrupt(loaded):
    session, logits = loaded
    session.edit("endless")(loops)
    session.hook(NAME, edit="endless")
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        session.run(IDS)
    assert time.monotonic() - begin < 0.5 + 10, "five times the bound of 2 s"
    session.unhook()
    assert torch.equal(session.run(IDS).logits.tensor(), logits)
