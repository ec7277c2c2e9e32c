"""Copies on their way from a GPU. A lane on which nothing arrives before it is waited for stands
in for one; the tests below the line need a real one, and run where there is one."""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import flexkernel as fk
from flexkernel.engine.place.placements import Place
from flexkernel.engine.place.staging import (
    Copies,
    Lane,
    Staged,
    copies_from,
    digest,
    digest_in_flight,
    joined_digest,
    with_landed_digests,
)
from flexkernel.engine.run.context import RunContext
from flexkernel.engine.run.recording import ForwardRecording
from flexkernel.errors import FlexError
from flexkernel.memory.plan import Plan
from flexkernel.memory.slab import Slab
from flexkernel.wire import CaptureKey, Layout, Region, ShardRecord
from tests.support.models import ids_and_mask

IDS = [[5, 6, 7, 8, 9], [3, 4, 5, 6, 2]]
HOOKS = ("model.layers.*", "model.layers.*.mlp.gate_proj", "model.layers.*.self_attn.@pattern")
GPUS = torch.cuda.device_count()
on_a_gpu = pytest.mark.skipif(GPUS < 1, reason="there is no GPU")
on_two_gpus = pytest.mark.skipif(GPUS < 2, reason="there are no two GPUs")


class Arrival:
    """Says when a copy is there, and those before it on its lane."""

    def __init__(self, lane, clone, held):
        self.lane, self.clone, self.held = lane, clone, held

    def synchronize(self):
        while self in self.lane.travelling:
            self.lane.arrive()


class Delayed:
    """A lane for tensors of the CPU: what is sent travels, in order, until somebody waits for it.
    `most` bytes did. It carries to memory that is locked, and to no other."""

    def __init__(self, problem=""):
        self.travelling: deque[Arrival] = deque()
        self.problem, self.most, self.locks, self.unlocks = problem, 0, [], []
        self.ours: list[int] = []
        self.slabs: list[tuple[int, int]] = []

    def carries(self, value):
        return True

    def clone(self, value, dtype):
        return torch.empty(value.shape, dtype=dtype).copy_(value)

    def locked(self, shape, dtype):
        held = torch.zeros(shape, dtype=dtype)
        self.ours.append(held.data_ptr())
        return held

    def send(self, clone, held):
        at = held.data_ptr()
        assert held.is_contiguous() and (
            at in self.ours or any(a <= at < b for a, b in self.slabs)
        ), "not locked"
        self.travelling.append(Arrival(self, clone, held))
        self.most = max(self.most, sum(one.clone.nbytes for one in self.travelling))
        return self.travelling[-1]

    def arrive(self):
        first = self.travelling.popleft()
        first.held.copy_(first.clone)

    def synchronize(self):
        while self.travelling:
            self.arrive()

    def lock(self, memory):
        self.locks.append(memory.data_ptr())
        if not self.problem:
            self.slabs.append((memory.data_ptr(), memory.data_ptr() + memory.numel()))
        return self.problem

    def unlock(self, memory):
        self.unlocks.append(memory.data_ptr())


@pytest.fixture
def slab(tmp_path):
    return Slab(tmp_path / "one.slab", 1 << 20)


def places(slab: Slab) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Kind → (a place in the slab, a value for it)."""
    torch.manual_seed(0)
    whole = slab.tensor(Region("", 0, (4, 6, 32), "float32"))
    half = slab.tensor(Region("", 1 << 16, (4, 6, 32), "bfloat16"))
    return {
        "whole": (whole, torch.randn(4, 6, 32)),
        "rows": (whole[1:3], torch.randn(2, 6, 32)),
        "columns": (whole[..., 8:16], torch.randn(4, 6, 8)),
        "turned": (whole[0], torch.randn(32, 6).T),
        "bfloat16": (half[..., ::2], torch.randn(4, 6, 16).bfloat16()),
        "bool": (slab.tensor(Region("", 1 << 17, (5, 3), "bool")), torch.rand(5, 3) > 0.5),
        "none": (whole[:0], torch.randn(0, 6, 32)),
        "scalar": (slab.tensor(Region("", 1 << 18, (), "int64")), torch.tensor(7)),
    }


KINDS = ("whole", "rows", "columns", "turned", "bfloat16", "bool", "none", "scalar")


def check_a_value_may_change(copies: Copies, slab: Slab, kind: str, device: str) -> None:
    place, value = places(slab)[kind]
    before = slab.bytes.clone()
    place.zero_()
    copies.begin(slab)
    moving = value.to(device, copy=True)
    copies.write(place, moving)
    moving.zero_()
    copies.land()
    assert torch.equal(place, value)
    place.copy_(torch.zeros_like(place))
    assert torch.equal(slab.bytes, before), "nothing was written beside its place"
    copies.close()


# --- the bookkeeping, on any machine --------------------------------------------------


@pytest.mark.parametrize("problem", ["", "error 1"], ids=["locked", "not locked"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_value_may_change_as_soon_as_it_is_written(slab, kind, problem):
    check_a_value_may_change(Staged(Delayed(problem)), slab, kind, "cpu")


@pytest.mark.parametrize("kind", ["whole", "columns"])
def test_nothing_is_there_before_it_has_landed(slab, kind):
    place, value = places(slab)[kind]
    copies = Staged(Delayed())
    copies.begin(slab)
    copies.write(place, value)
    assert not place.any() and copies.num_bytes == value.nbytes
    copies.land()
    assert torch.equal(place, value) and copies.num_bytes == 0


@given(
    st.lists(
        st.tuples(st.integers(1, 9), st.integers(1, 40), st.booleans()), min_size=1, max_size=12
    )
)
@settings(max_examples=60, deadline=None)
def test_no_more_than_the_bound_travels_and_all_of_it_comes(tmp_path_factory, writes):
    slab = Slab(tmp_path_factory.mktemp("slab") / "one.slab", 1 << 20)
    copies, rows = Staged(lane := Delayed(), 256), slab.tensor(Region("", 0, (200, 64), "float32"))
    copies.begin(slab)
    expected, at = torch.zeros(200, 64), 0
    for height, width, strided in writes:
        columns = slice(3, 3 + width) if strided else slice(0, 64)
        value = torch.randn(height, width if strided else 64)
        copies.write(rows[at : at + height, columns], value)
        expected[at : at + height, columns] = value
        at += height
    assert 0 < lane.most <= 256 and copies.num_bytes <= 256
    copies.land()
    assert torch.equal(rows, expected)


@pytest.mark.parametrize("kind", ["whole", "columns"])
def test_of_two_values_in_one_place_the_last_stays(slab, kind):
    place, value = places(slab)[kind]
    copies = Staged(Delayed())
    copies.begin(slab)
    copies.write(place, value)
    copies.write(place, value + 1)
    copies.land()
    assert torch.equal(place, value + 1)


def test_what_is_dropped_does_not_come_later(slab):
    place, value = places(slab)["columns"]
    copies = Staged(Delayed())
    copies.begin(slab)
    copies.write(place, value)
    copies.drop()
    copies.begin(slab)
    copies.write(place[:2], value[:2])
    copies.land()
    assert torch.equal(place[:2], value[:2]) and not place[2:].any() and copies.num_bytes == 0


def test_a_slab_is_locked_once_and_given_back(slab, tmp_path):
    copies, spilled = Staged(lane := Delayed()), Slab(tmp_path / "spill-1.slab", 4096)
    for each in (slab, slab, spilled):
        copies.begin(each)
    assert lane.locks == [slab.bytes.data_ptr()] and copies.note == ""
    copies.close()
    assert lane.unlocks == lane.locks
    copies.begin(slab)
    assert len(lane.locks) == 2, "it is another life of the slab"


def test_a_slab_that_cannot_be_locked_is_noted_and_not_unlocked(slab):
    copies = Staged(lane := Delayed("CUDA error 1"))
    copies.begin(slab)
    assert (
        copies.note == "one.slab cannot be page-locked (CUDA error 1): captures take a second copy"
    )
    copies.close()
    assert lane.locks and not lane.unlocks


def test_without_page_locked_memory_a_copy_waits_for_those_before_it(slab):
    place, value = places(slab)["columns"]
    copies = Staged(lane := Delayed())
    copies.write(place, value)
    lane.locked = none_left
    copies.write(place, value + 1)
    assert (
        torch.equal(place, value + 1)
        and not lane.travelling
        and "no page-locked memory" in copies.note
    )


def none_left(shape, dtype):
    raise RuntimeError("CUDA error: out of memory")


def test_digests_in_flight_are_the_digests():
    torch.manual_seed(0)
    values = [
        torch.randn(9, 33),
        torch.rand(5, 3) > 0.5,
        torch.randn(3, 7).bfloat16(),
        torch.tensor(3),
        torch.zeros(0),
    ]
    seen = {
        i: ShardRecord("scan", "whole", digest_in_flight(value)) for i, value in enumerate(values)
    }
    assert any(isinstance(one.digest, torch.Tensor) for one in seen.values())
    assert [one.digest for one in with_landed_digests(seen).values()] == [
        digest(value) for value in values
    ]
    numbers = flying = 0
    for value in values:
        numbers, flying = (
            joined_digest(numbers, digest(value)),
            joined_digest(flying, digest_in_flight(value)),
        )
    assert isinstance(flying, torch.Tensor) and int(flying) == numbers != 0


def test_a_recording_that_has_landed_tells_numbers():
    value, copies = torch.randn(9, 33), Staged(Delayed())
    captures, here = Plan((), 0, (), False), Place(Layout(), 0, 1, 1, (0, 1))
    context = RunContext(SimpleNamespace(), captures, here, None, None, copies, None)
    recording = ForwardRecording(context, frozenset(), None)
    recording.planned = {0: ShardRecord("scan", "whole", copies.digest(value))}
    recording.others = {CaptureKey("h", "m"): ShardRecord("scan", "whole", copies.digest(value))}
    recording.land()
    assert [one.digest for one in (*recording.planned.values(), *recording.others.values())] == [
        digest(value)
    ] * 2
    assert type(recording.planned[0].digest) is int


@pytest.fixture
def delayed(session, tiny):
    """A session whose copies travel. The bound is small: several are waited for within a
    forward."""
    session.load(tiny("llama"), attn="eager")
    for glob in HOOKS:
        session.hook(glob)
    session.hook("model.layers.*.mlp", reduce="norm:0,1", name="reduced")
    runtime = session.engines.runtime

    def switch(lane) -> None:
        runtime.part.copies = Staged(lane, 4096)

    yield session, switch
    runtime.part.copies = Copies()


ASKS = {
    "run": lambda session: session.run(IDS),
    "stopped": lambda session: session.run(IDS, stop_at="model.layers.1"),
    "generation": lambda session: session.generate(IDS, max_new_tokens=4),
    "backward": lambda session: session.run(IDS, loss=lambda logits, batch: logits.square().mean()),
}


@pytest.mark.parametrize("what", ASKS)
def test_a_run_whose_copies_travel_is_the_run(delayed, what):
    session, switch = delayed
    session.hook("model.layers.*.mlp", at="grad_output", name="gradient")
    at_once = ASKS[what](session)
    switch(lane := Delayed())
    travelled = ASKS[what](session)
    assert 0 < lane.most <= 4096 and not lane.travelling
    there = [key for key, capture in at_once.captures.items() if capture.error is None]
    assert len(there) > 6 and travelled.loss == at_once.loss
    for key in there:
        assert torch.equal(travelled.captures[key].tensor(), at_once.captures[key].tensor()), key
        assert all(isinstance(one.digest, int) for one in travelled.captures[key].records.values())


def test_a_step_adds_to_what_the_step_before_it_wrote(delayed):
    session, _ = delayed
    for glob in HOOKS:
        session.unhook(glob)
    at_once = session.generate(IDS, max_new_tokens=4)
    # nothing of a forward has to land for another's sake
    session.engines.runtime.part.copies = Staged(Delayed())
    travelled = session.generate(IDS, max_new_tokens=4)
    reduced = [key for key in at_once.captures if "norm" in key.at]
    assert len(reduced) == 4
    for key in reduced:
        assert torch.equal(travelled.captures[key].tensor(), at_once.captures[key].tensor()), key


class Full(Delayed):
    def clone(self, value, dtype):
        if value.shape[-1] == 176:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().clone(value, dtype)


def test_a_gpu_that_is_full_costs_the_capture_and_not_the_run(delayed):
    session, switch = delayed
    switch(lane := Full())
    run = session.run(IDS)
    with pytest.raises(FlexError, match=r"CUDA out of memory.*rank 0"):
        run["model.layers.1.mlp.gate_proj"].tensor()
    assert run["model.layers.1"].tensor().any() and not lane.travelling


def test_an_edit_that_fails_leaves_nothing_on_its_way(delayed):
    session, switch = delayed
    whole = session.run(IDS)["model.layers.0"].tensor()

    @session.edit("broken")
    def broken(x, ctx):
        raise ValueError("no")

    switch(Delayed())
    session.hook("model.layers.2", edit="broken", name="broken")
    with pytest.raises(FlexError, match="no"):
        session.run(IDS)
    session.unhook("broken")
    assert torch.equal(session.run(IDS)["model.layers.0"].tensor(), whole)


def test_the_status_says_what_makes_copies_slow(delayed):
    session, switch = delayed
    session.run(IDS)
    assert "copies" not in dict(session.status().rows)["memory"]
    switch(Delayed("CUDA error 1"))
    session.run(IDS)
    assert "cannot be page-locked (CUDA error 1)" in dict(session.status().rows)["memory"]


def test_an_engine_on_the_cpu_copies_at_once():
    assert type(copies_from("cpu")) is Copies and not Copies.in_flight


# --- a real GPU -----------------------------------------------------------------------


@on_a_gpu
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpus_value_may_change_as_soon_as_it_is_written(slab, kind):
    check_a_value_may_change(Staged(Lane()), slab, kind, "cuda")


@on_a_gpu
def test_a_slab_can_be_page_locked_and_given_back(tmp_path):
    lane, slab = Lane(), Slab(tmp_path / "one.slab", 1 << 20)
    for _ in range(2):
        assert lane.lock(slab.bytes) == "" and slab.bytes.is_pinned()
        lane.unlock(slab.bytes)
        assert not slab.bytes.is_pinned()


@on_a_gpu
def test_a_lock_that_fails_leaves_no_error_behind(slab):
    lane = Lane()
    assert lane.lock(slab.bytes) == ""
    assert "CUDA error" in lane.lock(slab.bytes), "it is locked already"
    assert torch.ones(3, device="cuda").sum().item() == 3
    lane.unlock(slab.bytes)


@on_a_gpu
def test_a_gpu_keeps_no_more_than_the_bound(tmp_path):
    slab, most = Slab(tmp_path / "one.slab", 64 << 20), 4 << 20
    copies, value = Staged(Lane(), most), torch.randn(1 << 20, 4, device="cuda")
    place = slab.tensor(Region("", 0, (1 << 20, 8), "float32"))
    copies.begin(slab)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for at in (slice(0, 4), slice(4, 8)):
        copies.write(place[:, at], value)
    copies.land()
    assert torch.cuda.max_memory_allocated() - before <= most + (1 << 20)
    assert torch.equal(place[:, :4], value.cpu()) and torch.equal(place[:, 4:], value.cpu())
    copies.close()


def hooked_by_hand(session, globs) -> dict[str, torch.Tensor]:
    """What these modules put out, by torch's own hooks on the loaded model. In this process."""
    runtime, found = session.engines.runtime, {}
    handles = [
        module.register_forward_hook(
            lambda _m, _a, out, name=name: found.__setitem__(
                name, (out if torch.is_tensor(out) else out[0]).cpu()
            )
        )
        for name, module in runtime.model.named_modules()
        if name.startswith("model.layers.") and (name.count(".") == 2 or name.endswith("gate_proj"))
    ]
    ids, mask = (
        torch.tensor(rows, device="cuda") for rows in (IDS, [[1] * len(row) for row in IDS])
    )
    with torch.no_grad():
        runtime.model(input_ids=ids, attention_mask=mask, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


@on_a_gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_captures_on_a_gpu_are_what_the_modules_put_out(tiny, dtype):
    with fk.local() as session:
        session.load(tiny("llama"), dtype=dtype, device="cuda")
        for glob in HOOKS[:2]:
            session.hook(glob)
        run, expected = session.run(IDS), hooked_by_hand(session, HOOKS[:2])
        assert len(expected) == 8
        for name, value in expected.items():
            assert torch.equal(run[name].tensor(), value), name
        assert "copies" not in dict(session.status().rows)["memory"]


@on_a_gpu
@pytest.mark.parametrize("what", ASKS)
def test_a_run_on_a_gpu_is_that_on_the_cpu(tiny, what):
    found = {}
    for device in ("cpu", "cuda"):
        with fk.local() as session:
            session.load(tiny("llama"), device=device, attn="eager")
            for glob in HOOKS:
                session.hook(glob)
            session.hook("model.layers.*.mlp", reduce="norm:0,1", name="reduced")
            session.hook("model.layers.2", edit="scale", value=0.5, name="scaled")
            run = ASKS[what](session)
            found[device] = {
                k: c.tensor().clone() for k, c in run.captures.items() if c.error is None
            }
    assert len(found["cpu"]) > 6 and found["cpu"].keys() == found["cuda"].keys()
    for key, value in found["cpu"].items():
        torch.testing.assert_close(
            found["cuda"][key], value, atol=2e-3, rtol=2e-3, msg=lambda m, k=key: f"{k}: {m}"
        )


@on_a_gpu
def test_an_edit_on_a_gpu_is_told_on_the_gpu(tiny):
    with fk.local() as session:
        session.load(tiny("llama"), device="cuda")

        @session.edit("real")
        def real(x, ctx):
            return x * ctx.mask[..., None]

        session.hook("model.layers.1", edit="real", name="masked")
        assert session.run(IDS)["model.layers.1"].tensor().any()


@on_two_gpus
@pytest.mark.parametrize("degrees", [{"tp": 2}, {"pp": 2}, {"fsdp": 2}, {"dp": 2}], ids=str)
def test_two_gpus_are_the_cpu_and_go_on_after_a_failure(tiny, degrees):
    with fk.start(2) as session:
        found = {}
        for device in ("cpu", "cuda"):
            session.load(tiny("llama"), device=device, **degrees)
            session.hook("model.layers.*")
            found[device] = (
                session.run(ids_and_mask([16, 5])["input_ids"].tolist())["model.layers.2"]
                .tensor()
                .clone()
            )
        torch.testing.assert_close(found["cuda"], found["cpu"], atol=2e-3, rtol=2e-3)

        @session.edit("broken")
        def broken(x, ctx):
            raise ValueError("no")

        session.hook("model.layers.1", edit="broken", name="broken")
        with pytest.raises(FlexError, match="no"):
            session.run(IDS)
        session.unhook("broken")
        assert session.run(IDS)["model.layers.2"].error is None
