"""Above the budget of memory captures lie on disk, the same numbers; what is there goes with its
run."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from flexkernel.errors import CaptureError, CaptureExpired, MemoryBudgetError
from flexkernel.session.store import Store
from tests.support.waiting import until

IDS = [[5, 6, 7, 8]]
MLP, LAYER = "model.layers.1.mlp", "model.layers.2"


@pytest.fixture
def small(session, tiny, tmp_path):
    """A session with memory for two runs, and disk for three."""
    session.load(tiny("llama"))
    session.hook("model.layers.*.mlp")
    first = session.run(IDS)
    one = session.store.pool.num_bytes
    session.store.budget = 2 * one
    session.store.spill_to(tmp_path, budget=3 * one)
    first.free()
    return session


def ids(i: int) -> list[list[int]]:
    return [[5 + i, 6, 7, 8]]


def files(session) -> list:
    return sorted(session.store.spill.folder.glob("*.slab"))


def test_the_oldest_runs_go_to_disk_and_then_expire(small):
    runs = [small.run(ids(i)) for i in range(3)]
    before = [run[MLP].tensor() for run in runs[1:]]
    want = [tensor.clone() for tensor in before]
    del before
    first = runs[0]
    assert first.plan.slab.startswith("spill-") and len(files(small)) == 1
    assert stat.S_IMODE(files(small)[0].stat().st_mode) == 0o600
    assert stat.S_IMODE(small.store.spill.folder.stat().st_mode) == 0o700
    assert "on disk: 1 runs" in dict(small.status().rows)["runs"]

    later = [small.run(ids(i)) for i in range(3, 5)]
    assert (
        len(files(small)) == 3
        and [run.plan.slab[:6] for run in (*runs, *later)]
        == ["spill-"] * 3 + [later[0].plan.slab[:6]] * 2
    )
    for run, whole in zip(runs[1:], want, strict=True):
        capture = run[MLP]
        assert whole.abs().max() > 0 and torch.equal(capture.tensor(), whole)
        assert torch.equal(capture[0, -1, :8], whole[0, -1, :8])
        torch.testing.assert_close(capture.norm(dim=-1), whole.norm(dim=-1))
        assert capture.tiles(height=2, width=2).shape == (2, 2) and run.next_tokens()
    held = runs[1][MLP].tensor()
    held += 1
    assert torch.equal(runs[1][MLP].tensor(), want[0]), "what a user changes is the user's"

    fifth = small.run(ids(5))
    with pytest.raises(
        CaptureExpired, match=r"expired to make room for newer runs; run\.keep\(\) keeps one"
    ):
        first[MLP].tensor()
    assert len(files(small)) == 3 and fifth[MLP].tensor().shape == (1, 4, 64)
    for run in small.runs:
        run.free()
    assert files(small) == [] and torch.equal(held, want[0] + 1), "what was read stays"


def test_what_is_kept_or_looked_into_stays_in_memory(small):
    kept, looked_into = small.run(ids(0)).keep(), small.run(ids(1))
    held = looked_into[MLP].tensor()
    with pytest.raises(MemoryBudgetError, match="kept or looked into"):
        small.run(ids(2))
    assert (
        files(small) == [] and held.shape == (1, 4, 64) and kept[MLP].tensor().shape == (1, 4, 64)
    )


def test_a_capture_on_disk_is_patched_in(small):
    source = small.run(ids(3))
    want = source[MLP].tensor().clone()
    small.store.budget //= 2
    small.run(IDS)
    assert source.plan.slab.startswith("spill-")
    small.store.budget *= 2
    small.hook(MLP, edit="patch", value=source[MLP], name="patched")
    run = small.run(IDS)
    assert torch.equal(run["patched"].tensor(), want)


def test_a_full_disk_lets_the_oldest_expire(small, monkeypatch):
    def full(source, path):
        raise MemoryBudgetError("full")

    monkeypatch.setattr("flexkernel.engine.place.slabs.write_out", full)
    runs = [small.run(ids(i)) for i in range(3)]
    assert files(small) == [] and small.store.spill.num_bytes == 0
    with pytest.raises(CaptureExpired, match="expired to make room"):
        runs[0][MLP].tensor()
    assert runs[1][MLP].tensor().shape == (1, 4, 64)


def test_a_folder_that_engines_cannot_use_lets_the_oldest_expire(session, tiny, monkeypatch):
    session.load(tiny("llama"))
    session.hook(MLP)
    session.store.spill.given = False  # as where the user names no folder

    def refused(runtime, root):
        raise CaptureError("it belongs to somebody else")

    monkeypatch.setattr("flexkernel.engine.place.slabs.Memory.spill_to", refused)
    first = session.run(IDS)
    session.store.budget = session.store.pool.num_bytes
    assert session.run(IDS)[MLP].tensor().shape == (1, 4, 64) and first.freed
    assert "it belongs to somebody else" in dict(session.status().rows)["runs"]


def test_what_is_larger_than_memory_lies_on_disk_at_once_if_told_where(small, tmp_path):
    long = [[5 + i % 200 for i in range(1024)]]
    size = small.preview(long).num_bytes
    small.store.spill_to(tmp_path, budget=size // 2)
    with pytest.raises(
        MemoryBudgetError, match=r"of its budget on disk, in .* are free.*what costs most: "
    ):
        small.run(long)
    small.store.spill_to(tmp_path, budget=3 * size // 2)
    assert small.preview(long).fits and "yes, on disk, in " in repr(small.preview(long))
    older = small.run(long)
    before = older[MLP].tensor().clone()
    run = small.run(long)
    assert len(files(small)) == 1 and older.freed and small.store.pool.num_bytes == 0
    assert run[MLP].shape == (1, 1024, 64) and torch.equal(run[MLP].tensor(), before)
    with pytest.raises(CaptureError, match="runs lie in"):
        small.store.spill_to(tmp_path.parent)
    run.free()
    assert files(small) == []
    small.store.spill.given = False
    with pytest.raises(
        MemoryBudgetError, match=r"or have it on disk, session\.store\.spill_to\(FOLDER\)"
    ):
        small.run(long)


def test_a_failed_run_leaves_a_file_for_what_of_it_is_whole(small, tmp_path):
    small.store.budget = 4096
    handle = small.engines.runtime.model.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(Exception, match="ZeroDivisionError"):
        small.run(IDS)
    handle.remove()
    assert small.last.partial and len(files(small)) == 1
    small.last.free()
    assert files(small) == [] and small.store.spill.num_bytes == 0
    assert small.run(IDS)[MLP].tensor().shape == (1, 4, 64) and len(files(small)) == 1


def test_a_new_load_and_the_end_leave_no_file(small, tiny):
    for i in range(3):
        small.run(ids(i))
    folder, (file,) = small.store.spill.folder, files(small)
    small.load(tiny("llama"))
    assert not file.exists() and folder.is_dir()


@pytest.mark.engines(2)
@pytest.mark.parametrize("layout", [{"tp": 2}, {"pp": 2}], ids=lambda layout: next(iter(layout)))
def test_ranks_share_one_file_and_a_later_driver_finds_it(layout, session, tiny, tmp_path):
    session.load(tiny("llama"), **layout)
    session.hook("**")
    run = session.run(IDS)
    want = {capture.key: capture.tensor().clone() for capture in run if capture.error is None}
    session.store.budget = session.store.pool.num_bytes
    session.store.spill_to(tmp_path)
    session.run(IDS)
    assert len(want) > 50 and len(files(session)) == 1 and run.plan.slab.startswith("spill-")
    for key, whole in want.items():
        assert torch.equal(run.captures[key].tensor(), whole), key
    answers = session.engines.call("recover.rank_state")
    later = Store(session.engines, session.loaded.info.layout)
    later.recover([answer.runs for answer in answers], session.loaded.planner, session.tokenizer)
    again = later.runs[run.number]
    assert torch.equal(again[LAYER, "output"].tensor(), want[again[LAYER, "output"].key])
    later._claim.close()


KILLED = """
import os, signal, sys, flexkernel as fk
session = fk.start(2)
session.load(sys.argv[1], tp=2)
session.store.spill_to(sys.argv[2])
session.store.budget = 1
session.run([[5, 6, 7]])
print(*session.store.spill.folder.glob("*.slab"), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.long
@pytest.mark.slow
def test_a_killed_driver_leaves_nothing_on_disk(tiny, tmp_path):
    command = [sys.executable, "-c", KILLED, str(tiny("llama")), str(tmp_path)]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env={**os.environ}
    )
    assert done.returncode == -signal.SIGKILL
    file = Path(done.stdout.strip())
    assert file.parent.parent.parent == tmp_path and file.name.startswith("spill-")
    until(lambda: not file.parent.exists(), 60)


@pytest.mark.long
@pytest.mark.engines(2)
def test_six_gigabytes_are_foreseen_and_refused_or_on_disk(session, tiny, tmp_path):
    """As the user says; the driver never holds more than it is asked for."""
    session.load(tiny("llama_wide"), tp=2)
    points = {"gate_proj": "output", "up_proj": "output", "act_fn": "output", "down_proj": "input"}
    for name, at in points.items():
        session.hook(f"model.layers.0.mlp.{name}", at=at)
    rows = [[3 + (b + s) % 250 for s in range(4096)] for b in range(6)]
    session.store.budget = 2 << 30
    me = psutil.Process()
    # its own: pages of the file that it has looked at can be taken from it
    before = me.memory_full_info().uss
    said = session.preview(rows)
    assert (
        said.num_bytes > 6e9
        and not said.fits
        and "the session's budget is 2,147,483,648" in said.problem
    )
    begin = time.monotonic()
    with pytest.raises(MemoryBudgetError, match=r"would keep 6,\d{3},\d{3},\d{3} bytes"):
        session.run(rows)
    assert time.monotonic() - begin < 5, "before the forward"

    session.store.spill_to(tmp_path)
    assert session.preview(rows).fits and session.preview(rows).on_disk
    run = session.run(rows)
    assert run.num_bytes > 6e9 and run.plan.slab.startswith("spill-") and len(run) == len(points)
    gate, up = run["model.layers.0.mlp.gate_proj"], run["model.layers.0.mlp.up_proj"]
    product = torch.nn.functional.silu(gate[5, 4000:, 8000:8400]) * up[5, 4000:, 8000:8400]
    torch.testing.assert_close(run["model.layers.0.mlp.down_proj"][5, 4000:, 8000:8400], product)
    first = session.run(rows[:1])["model.layers.0.mlp.gate_proj"]
    torch.testing.assert_close(gate[0, :, 7000:9400], first[0, :, 7000:9400], atol=1e-5, rtol=1e-5)
    whole = gate.tensor()  # mapped, not read
    assert whole.shape == (6, 4096, 16384)
    assert me.memory_full_info().uss - before < 100e6
