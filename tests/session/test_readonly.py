"""Joining read-only: a second notebook sees what the first one has, and changes nothing."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from tests.support import on_engines

pytestmark = pytest.mark.engines(2)
IDS = [[5, 6, 7, 8]]

READER = """
import sys, flexkernel as fk
from flexkernel.errors import CaptureExpired, ClusterError

session = fk.attach(cluster_id=sys.argv[1], read_only=True)
status = repr(session.status())
assert "joined read-only: pid" in status, status
assert "The session that has the engines replaces it" in repr(session.guarantees())
assert [hook.key for hook in session.hooks] == ["mine"] and "mine" in repr(session.tree("model.layers.1.mlp"))
run = session.runs[0]
print(float(run["model.layers.1.mlp"].tensor().double().sum()), float(run.logits[0, -1].double().sum()), flush=True)

refused = {
    "hook": lambda: session.hook("lm_head"),
    "unhook": lambda: session.unhook(),
    "edit": lambda: session.edit("mine")(lambda x, ctx: x),
    "run": lambda: session.run([[1, 2]]),
    "generate": lambda: session.generate([[1, 2]], 2),
    "on_ranks": lambda: session.on_ranks(int),
    "load": lambda: session.load(sys.argv[2], pp=2),
    "restart": lambda: session.restart(1),
    "parameter": lambda: session.parameter("lm_head.weight"),
    "free": lambda: run.free(),
    "keep": lambda: run.keep(),
    "close": lambda: session.close(end=True),
}
for name, does in refused.items():
    try:
        does()
        sys.exit(f"{name} came in")
    except ClusterError as error:
        assert "joined read-only" in str(error) and f"pid {sys.argv[3]} on" in str(error), (name, error)
assert [hook.key for hook in session.hooks] == ["mine"] and len(session.tree("**").rows) > 10

sys.stdin.readline()  # the owner lets go of the run, and writes another in its place
try:
    sys.exit(f"it read {run['model.layers.1.mlp'].tensor()}")
except CaptureExpired as error:
    assert "is not there any more" in str(error), error
    print("expired", flush=True)
session.close()
"""


def test_a_second_notebook_sees_hooks_runs_and_captures_and_changes_nothing(session, tiny):
    session.load(tiny("llama"), tp=2)
    session.hook("model.layers.*.mlp", name="mine")
    run = session.run(IDS)
    sums = [
        float(run["model.layers.1.mlp"].tensor().double().sum()),
        float(run.logits[0, -1].double().sum()),
    ]
    logits, weights = run.logits.tensor().clone(), session.on_ranks(on_engines.weights_at)
    command = [
        sys.executable,
        "-c",
        READER,
        session.engines.cluster_id,
        str(tiny("llama")),
        str(os.getpid()),
    ]
    reader = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert reader.stdin is not None and reader.stdout is not None
        assert [float(word) for word in reader.stdout.readline().split()] == sums
        run.free()
        session.run([[9, 9, 9, 9]])
        assert reader.communicate("\n", timeout=120)[0] == "expired\n" and reader.returncode == 0
    finally:
        reader.kill()
        reader.wait()
    assert session.engines.answering() == [True, True] and [hook.key for hook in session.hooks] == [
        "mine"
    ]
    assert torch.equal(session.run(IDS).logits.tensor(), logits)
    assert session.on_ranks(on_engines.weights_at) == weights
