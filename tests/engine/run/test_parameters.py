"""Parameters: whole and bit for bit the unsharded model's, under every layout, or refused with a
reason."""

from __future__ import annotations

import functools
import gc
import inspect
import os
import signal
import threading

import pytest
import torch
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

import flexkernel as fk
from flexkernel.boxes import WHOLE, Box
from flexkernel.engine import compat
from flexkernel.engine.run import parameters as on_rank
from flexkernel.errors import (
    CaptureError,
    CaptureExpired,
    EditError,
    HookError,
    LoadError,
    MemoryBudgetError,
    PlacementError,
)
from flexkernel.session import parameters
from flexkernel.wire import ParameterShard
from tests.support import foreign, models, on_engines, unsharded

IDS = [[5, 6, 7, 8], [9, 10, 11, 12]]
NORM, GATE, DOWN = (
    "model.norm.weight",
    "model.layers.0.mlp.gate_proj.weight",
    "model.layers.0.mlp.down_proj.weight",
)
ARCHS = [("llama", 257), ("llama_untied", 256), ("qwen3", 256), ("mixtral", 256)]


def check_all(session, want: dict[str, torch.Tensor]) -> None:
    assert len(want) > 40 and set(want) == set(session.loaded.info.parameters)
    for name, whole in want.items():
        capture = session.parameter(name)
        assert (capture.dtype, capture.shape) == (whole.dtype, tuple(whole.shape)), name
        assert torch.equal(capture.tensor(), whole), f"{name}: {capture}"


def read_under(session, folder, want: dict[str, torch.Tensor], **layout: int) -> None:
    """After a forward, which leaves FSDP's root unsharded; and the next forward is the same."""
    session.load(folder, **layout)
    before = session.run(IDS).logits.tensor()
    check_all(session, want)
    assert torch.equal(session.run(IDS).logits.tensor(), before)
    assert session.parameter("lm_head.weight").error is None


# --- every layout ---------------------------------------------------------------------


def test_in_one_process_it_is_the_models(session, tiny):
    session.load(tiny("llama"))
    check_all(session, unsharded.parameters("llama"))


@pytest.mark.long(
    "llama_untied-256-{'dp': 2}",
    "llama_untied-256-{'fsdp': 2}",
    "mixtral-256-{'dp': 2}",
    "mixtral-256-{'fsdp': 2}",
    "qwen3-256-{'dp': 2}",
    "qwen3-256-{'fsdp': 2}",
)
@pytest.mark.slow
@pytest.mark.parametrize("layout", [{"tp": 2}, {"pp": 2}, {"fsdp": 2}, {"dp": 2}], ids=str)
@pytest.mark.parametrize(("arch", "vocab"), ARCHS)
@pytest.mark.engines(2)
def test_on_two_engines_it_is_the_unsharded_ones(session, tiny, arch, vocab, layout):
    read_under(session, tiny(arch, vocab), unsharded.parameters(arch, vocab), **layout)


@pytest.mark.long(
    "llama_untied-256-{'tp': 2, 'fsdp': 2}",
    "mixtral-256-{'tp': 2, 'fsdp': 2}",
    "mixtral-256-{'tp': 2, 'pp': 2}",
)
@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "vocab", "layout"),
    [
        *(((*arch, {"tp": 2, "fsdp": 2})) for arch in ARCHS),
        *(((*arch, {"tp": 2, "pp": 2})) for arch in ARCHS[2:]),
        ("llama", 257, {"tp": 2, "dp": 2}),
        ("llama", 257, {"pp": 2, "fsdp": 2}),
    ],
    ids=str,
)
@pytest.mark.engines(4)
def test_on_four_engines_it_is_the_unsharded_ones(session, tiny, arch, vocab, layout):
    read_under(session, tiny(arch, vocab), unsharded.parameters(arch, vocab), **layout)


@pytest.mark.slow
@pytest.mark.engines(3)
def test_the_real_models_are_those_of_its_file(session, smollm2):
    from safetensors import safe_open

    session.load(smollm2, tp=3, dtype="bfloat16")
    files = [safe_open(path, "pt") for path in sorted(smollm2.glob("*.safetensors"))]
    for name in (
        "model.embed_tokens.weight",
        NORM,
        *(f"model.layers.29.{n}_proj.weight" for n in ("self_attn.o",)),
    ):
        stored = next(file.get_tensor(name) for file in files if name in file.keys())  # noqa: SIM118
        assert torch.equal(session.parameter(name).tensor(), stored.to(torch.bfloat16)), name
    assert torch.equal(
        session.parameter("lm_head.weight").tensor(),
        session.parameter("model.embed_tokens.weight")[:],
    )


@pytest.mark.engines(2)
def test_a_parameter_is_a_capture(session, tiny, tmp_path):
    from safetensors.torch import load_file

    session.load(tiny("llama", 257), tp=2)
    gate, want = session.parameter(GATE), unsharded.parameters("llama", 257)[GATE]
    assert (gate.evidence, gate.placement) == ("dtensor", "Shard(dim=0) over tp")
    assert gate.shards == [(0, [88, 176], ["rank 0", "rank 1"])]
    assert torch.equal(gate[80:96, :3], want[80:96, :3])
    torch.testing.assert_close(gate.norm(dim=-1), want.norm(dim=-1))
    torch.testing.assert_close(gate.topk(3)[0], want.topk(3)[0])
    assert gate.tiles(height=4, width=4).shape == (4, 4)
    assert torch.equal(load_file(gate.save(tmp_path / "gate.safetensors"))[GATE], want)
    assert gate.show() is not None and session.parameter(NORM).show() is not None
    uneven = session.parameter("lm_head.weight")
    assert uneven.shards == [(0, [129, 257], ["rank 0", "rank 1"])]
    assert session.parameter(NORM).evidence == "scan+digest"


@pytest.mark.engines(2)
def test_strides_are_told(session, tiny):
    """gate and up lie one after the other in a rank's part: two runs of rows in the whole."""
    session.load(tiny("mixtral"), tp=2)
    packed = session.parameter("model.layers.0.mlp.experts.gate_up_proj")
    assert packed.records[1].shard == ((1, 88, 176), (1, 264, 352))
    assert [len(ends) for _, ends, _ in packed.shards] == [4]


@pytest.mark.parametrize("layout", [{"tp": 2}, {"pp": 2}, {"fsdp": 2}], ids=str)
@pytest.mark.engines(2)
def test_nothing_is_sent(session, tiny, layout):
    session.load(tiny("llama"), **layout)
    session.run(IDS)

    def sent(name: str) -> tuple[list[str], bool]:
        with on_engines.counting() as counted:
            held = on_rank.shard_of(on_engines.runtime(), name)
        return list(counted), isinstance(held, ParameterShard)

    for name in (GATE, "model.embed_tokens.weight", "lm_head.weight", NORM):
        answers = session.on_ranks(sent, name)
        assert any(there for _, there in answers) and all(
            counted == [] for counted, _ in answers
        ), name


@pytest.mark.engines(2)
def test_it_is_read_as_it_is_now(session, tiny):
    session.load(tiny("llama"), fsdp=2)
    before = session.parameter(GATE)

    def double(name: str) -> None:
        on_engines.runtime().model.get_parameter(name).data.mul_(2)

    session.on_ranks(double, GATE)
    after = session.parameter(GATE)
    assert torch.equal(after.tensor(), 2 * before.tensor()) and not torch.equal(
        after.tensor(), before.tensor()
    )


# --- builders -------------------------------------------------------------------------


@pytest.mark.engines(2)
def test_a_builders_dtensors_say_where_they_lie(session, tiny):
    session.load(functools.partial(on_engines.parallelized, str(tiny("llama"))), tp=2)
    want = unsharded.parameters("llama")
    for name in (GATE, DOWN, NORM, "lm_head.weight", "model.rotary_emb.inv_freq"):
        assert torch.equal(session.parameter(name).tensor(), want[name]), name
    assert (
        session.parameter(DOWN).evidence == "dtensor"
        and session.parameter(NORM).evidence == "described"
    )
    with pytest.raises(
        HookError, match=r"no parameter or buffer 'model.norm.wait'; nearest: model.norm.weight"
    ):
        session.parameter("model.norm.wait")


@pytest.mark.slow
@pytest.mark.engines(4)
def test_a_builders_dtensors_may_lie_on_any_mesh(session):
    session.load(on_engines.on_a_grid, tp=4)
    want = torch.arange(7 * 10.0).view(7, 10)
    answers = {name: session.parameter(name) for name in on_engines.GRID}
    assert len(answers) >= 6
    for name, capture in answers.items():
        assert torch.equal(capture.tensor(), want), f"{name}: {capture}"
    with pytest.raises(PlacementError, match=r"Partial\(sum\), which is no part of a whole"):
        session.parameter("partial")


@pytest.mark.engines(2)
def test_plain_parts_are_put_together_when_declared_only(session, tiny):
    folder = str(tiny("llama_untied"))
    build = functools.partial(on_engines.partial_sums, folder)
    whole_model = functools.partial(on_engines.whole_reduced, folder)
    name = "model.layers.1.mlp.inner.gate_proj.weight"
    session.load(build, tp=2, reference=whole_model)
    with pytest.raises(
        PlacementError,
        match=r"should hold \(176, 64\) of \(176, 64\); it holds \(88, 64\): declare it",
    ):
        session.parameter(name)
    session.load(build, tp=2)
    with pytest.raises(
        PlacementError, match="ranks 0 and 1 hold the same part of it with different numbers"
    ):
        session.parameter(name)
    declared = {
        "**.gate_proj.weight": "shard:0",
        "**.up_proj.weight": "shard:0",
        "**.down_proj.weight": "shard:1",
    }
    for reference in (whole_model, None):
        session.load(build, tp=2, reference=reference, placements=declared)
        for part in ("gate", "up", "down"):
            capture = session.parameter(f"model.layers.1.mlp.inner.{part}_proj.weight")
            assert capture.evidence == "declared"
            assert torch.equal(
                capture.tensor(),
                unsharded.parameters("llama_untied")[f"model.layers.1.mlp.{part}_proj.weight"],
            )
    session.load(build, tp=2, reference=whole_model, placements={"**.gate_proj.weight": "shard:1"})
    with pytest.raises(PlacementError, match=r"declared says Shard\(dim=1\)"):
        session.parameter(name)
    session.load(build, tp=2, placements={"**.gate_proj.weight": "shard:7"})
    with pytest.raises(PlacementError, match="but it has 2 dims"):
        session.parameter(name)


@pytest.mark.engines(2)
def test_known_parallel_layers_say_how_they_split(session, tiny):
    if os.environ.get("CI") != "true":
        pytest.importorskip(
            "fairscale", reason="pip install --no-build-isolation --no-deps fairscale"
        )
    session.load(functools.partial(on_engines.fairscale_mlps, str(tiny("llama"))), tp=2)
    for name in (GATE, DOWN):
        capture = session.parameter(name)
        assert capture.evidence == "class" and torch.equal(
            capture.tensor(), unsharded.parameters("llama")[name]
        )


@pytest.mark.engines(2)
def test_wrappers_are_no_part_of_a_name(session, tiny):
    session.load(functools.partial(on_engines.in_ddp, str(tiny("llama"))), dp=2)
    assert torch.equal(session.parameter(GATE).tensor(), unsharded.parameters("llama")[GATE])


@pytest.mark.parametrize("original", [True, False])
@pytest.mark.engines(2)
def test_flat_parameters_are_gathered(session, tiny, original):
    """FSDP1's, of which each rank has a piece of all, flattened; after a forward its root keeps
    them whole."""
    session.load(functools.partial(foreign.in_fsdp1, str(tiny("llama")), original), fsdp=2)
    for _ in range(2):
        for name in (GATE, NORM, "lm_head.weight", "model.embed_tokens.weight"):
            capture = session.parameter(name)
            assert torch.equal(capture.tensor(), unsharded.parameters("llama")[name]), name
            assert (capture.evidence, capture.placement) == (
                "flat",
                "part of a flat parameter over fsdp",
            )
        session.run(IDS)
    with pytest.raises(HookError, match=r"no parameter or buffer 'model.norm.wait'"):
        session.parameter("model.norm.wait")


@pytest.mark.engines(2)
def test_ranks_that_have_diverged_are_refused(session, tiny):
    session.load(tiny("llama"), tp=2)

    def nudge(name: str) -> None:
        if on_engines.runtime().rank == 1:
            on_engines.runtime().model.get_parameter(name).data[3] += 1

    session.on_ranks(nudge, NORM)
    used = session.store.pool.num_bytes
    with pytest.raises(
        PlacementError, match=f"{NORM}: ranks 0 and 1 hold the same part .* different numbers"
    ):
        session.parameter(NORM)
    assert session.store.pool.num_bytes == used
    assert session.parameter(GATE).error is None


# --- edits ----------------------------------------------------------------------------

EMBED = "model.embed_tokens.weight"
TOLERANCE = 1e-5


def doubled(whole: torch.Tensor) -> torch.Tensor:
    return whole * 2 + whole.roll(1, 0)


@functools.cache
def edits() -> dict:
    """A whole new tensor, and functions of the old one; the embedding is tied in "llama"."""
    new = torch.randn(
        unsharded.parameters("llama")[DOWN].shape, generator=torch.Generator().manual_seed(1)
    )
    return {
        DOWN: new,
        GATE: doubled,
        EMBED: lambda whole: whole.flip(0),
        NORM: lambda whole: whole.mul_(1.5),
    }


@functools.cache
def edited_truth(arch: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The unsharded model's logits, as it is and edited alike."""
    model = models.build(arch)
    named = dict(model.named_parameters(remove_duplicate=False))
    found = []
    with torch.no_grad():
        found.append(model(torch.tensor(IDS)).logits)
        for name, change in edits().items():
            named[name].copy_(change(named[name].clone()) if callable(change) else change)
        found.append(model(torch.tensor(IDS)).logits)
    return found[0], found[1]


def check_edited(session, arch: str) -> None:
    """Edited as the unsharded model, and bit for bit as before afterwards."""
    plain, want = edited_truth(arch)
    assert (want - plain).abs().max() > 100 * TOLERANCE
    before = session.run(IDS).logits.tensor()
    calls: list[tuple[int, ...]] = []

    def once(whole: torch.Tensor) -> torch.Tensor:
        calls.append(tuple(whole.shape))
        return doubled(whole)

    with session.parameters_edited({**edits(), GATE: once}):
        torch.testing.assert_close(
            session.run(IDS).logits.tensor(), want, atol=TOLERANCE, rtol=TOLERANCE
        )
        assert torch.equal(session.parameter(DOWN).tensor(), edits()[DOWN])
        if arch == "llama":
            assert torch.equal(
                session.parameter("lm_head.weight").tensor(),
                unsharded.parameters(arch)[EMBED].flip(0),
            )
    assert calls == [tuple(unsharded.parameters(arch)[GATE].shape)]
    assert torch.equal(session.run(IDS).logits.tensor(), before)
    check_as_it_was(session, arch)


def check_as_it_was(session, arch: str = "llama") -> None:
    for name in (*edits(), "lm_head.weight", "model.layers.3.mlp.down_proj.weight"):
        assert torch.equal(session.parameter(name).tensor(), unsharded.parameters(arch)[name]), name


def test_in_one_process_edits_are_made_and_undone(session, tiny):
    session.load(tiny("llama"))
    check_edited(session, "llama")


@pytest.mark.slow
@pytest.mark.parametrize("layout", [{"tp": 2}, {"pp": 2}, {"fsdp": 2}, {"dp": 2}], ids=str)
@pytest.mark.engines(2)
def test_edits_are_the_unsharded_models(session, tiny, layout):
    session.load(tiny("llama"), **layout)
    check_edited(session, "llama")


@pytest.mark.slow
@pytest.mark.engines(4)
def test_edits_are_the_unsharded_models_on_four_engines(session, tiny):
    session.load(tiny("llama_untied"), tp=2, pp=2)
    check_edited(session, "llama_untied")
    session.load(tiny("llama"), tp=2, fsdp=2)
    check_edited(session, "llama")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "layout"),
    [
        (foreign.in_fsdp1, {"fsdp": 2}),
        (functools.partial(foreign.in_fsdp1, original=False), {"fsdp": 2}),
        (foreign.in_fsdp2, {"fsdp": 2}),
        (on_engines.parallelized, {"tp": 2}),
    ],
    ids=["fsdp1", "fsdp1 flat", "fsdp2", "tp"],
)
@pytest.mark.engines(2)
def test_a_builders_parameters_are_edited_alike(session, tiny, build, layout):
    folder = str(tiny("llama"))
    session.load(
        functools.partial(build, folder),
        reference=functools.partial(on_engines.whole, folder),
        **layout,
    )
    check_edited(session, "llama")


@pytest.mark.engines(2)
def test_edits_may_lie_within_edits(session, tiny):
    session.load(tiny("llama"), tp=2)
    with session.parameters_edited({GATE: doubled}):
        with session.parameters_edited(
            {GATE: torch.zeros_like(unsharded.parameters("llama")[GATE]), NORM: doubled}
        ):
            assert not session.parameter(GATE).tensor().any()
        assert torch.equal(
            session.parameter(GATE).tensor(), doubled(unsharded.parameters("llama")[GATE])
        )
        assert torch.equal(session.parameter(NORM).tensor(), unsharded.parameters("llama")[NORM])
    check_as_it_was(session)


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, SystemExit])
@pytest.mark.engines(2)
def test_a_block_that_raises_leaves_them_as_they_were(session, tiny, error):
    session.load(tiny("llama"), pp=2)
    with pytest.raises(error), session.parameters_edited(edits()):
        assert torch.equal(session.parameter(DOWN).tensor(), edits()[DOWN])
        raise error
    check_as_it_was(session)


@pytest.mark.engines(2)
def test_a_stop_in_a_run_of_the_block_leaves_them_as_they_were(session, tiny):
    session.load(tiny("llama"), tp=2)
    before = session.run(IDS).logits.tensor()
    session.on_ranks(on_engines.sleep_at, "model.layers.1.mlp", 1)
    with pytest.raises(KeyboardInterrupt), session.parameters_edited({GATE: doubled}):
        timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        session.run(IDS)
    check_as_it_was(session)
    assert torch.equal(session.run(IDS).logits.tensor(), before)


def test_a_stop_while_they_are_given_back_does_it_again():
    tries = []

    def give_back() -> None:
        tries.append(1)
        if len(tries) < 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        parameters.surely(give_back)
    assert len(tries) == 3


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda whole: whole[:3],
            r"its new value is \(3, 64\) torch.float32; it is \(176, 64\) torch.float32",
        ),
        (lambda whole: whole.double(), r"its new value is \(176, 64\) torch.float64; it is"),
        (lambda whole: None, "its new value is NoneType; it has to be a tensor like it"),
        (3.0, "its new value is float"),
    ],
)
@pytest.mark.engines(2)
def test_what_cannot_take_its_place_changes_nothing(session, tiny, change, says):
    session.load(tiny("llama"), tp=2)
    with (
        pytest.raises(EditError, match=says),
        session.parameters_edited({DOWN: edits()[DOWN], GATE: change}),
    ):
        pytest.fail("the block is not entered")
    check_as_it_was(session)


@pytest.mark.engines(2)
def test_a_function_that_raises_changes_nothing(session, tiny):
    session.load(tiny("llama"), tp=2)
    with (
        pytest.raises(ZeroDivisionError),
        session.parameters_edited({DOWN: edits()[DOWN], GATE: lambda w: 1 / 0}),
    ):
        pytest.fail("the block is not entered")
    check_as_it_was(session)


@pytest.mark.engines(2)
def test_two_names_of_one_parameter_are_refused(session, tiny):
    session.load(tiny("llama"), pp=2)
    both = {EMBED: doubled, "lm_head.weight": doubled}
    with (
        pytest.raises(HookError, match=r"embed_tokens.weight and lm_head.weight are one"),
        session.parameters_edited(both),
    ):
        pytest.fail("the block is not entered")
    # nothing says it, but they are
    session.load(functools.partial(foreign.llama, str(tiny("llama"))), dp=2)
    with (
        pytest.raises(HookError, match="are one parameter: change one"),
        session.parameters_edited(both),
    ):
        pytest.fail("the block is not entered")
    check_as_it_was(session)
    with pytest.raises(HookError, match="at least one"), session.parameters_edited({}):
        pytest.fail("the block is not entered")


@pytest.mark.engines(2)
def test_a_load_in_the_block_ends_it(session, tiny):
    session.load(tiny("llama"), tp=2)
    with session.parameters_edited({GATE: doubled}):
        session.load(tiny("llama"), pp=2)
        check_as_it_was(session)
    check_as_it_was(session)


# --- what goes wrong ------------------------------------------------------------------


@pytest.mark.engines(2)
def test_a_name_that_is_not_there_is_an_error_with_the_nearest(session, tiny):
    session.load(tiny("llama"), pp=2)
    with pytest.raises(
        HookError,
        match=r"LlamaForCausalLM has no parameter or buffer 'model.norm.wait'; nearest: mod",
    ):
        session.parameter("model.norm.wait")
    with pytest.raises(
        HookError,
        match=r"'model.layers.3.mlp' is a module; a parameter of it is model.layers.3.mlp.",
    ):
        session.parameter("model.layers.3.mlp")
    for name in ("", ".", "model..weight", "model.layers.*.mlp.gate_proj.weight"):
        with pytest.raises(HookError, match="no parameter"):
            session.parameter(name)
    assert session.parameter("model.layers.3.mlp.up_proj.weight").error is None


def test_before_a_load_there_are_none():
    with fk.local() as session, pytest.raises(LoadError, match="no model is loaded"):
        session.parameter(NORM)


def test_memory_that_does_not_suffice_is_refused_before_anything_is_read(
    session, tiny, monkeypatch
):
    session.load(tiny("llama"))
    monkeypatch.setattr(session.store, "budget", 1000)
    monkeypatch.setattr(session.engines, "call", watched_call(session.engines.call, asked := []))
    with pytest.raises(
        MemoryBudgetError,
        match=rf"{GATE} would keep 45,056 bytes and the session's budget is 1,000",
    ):
        session.parameter(GATE)
    assert asked == ["parameters.held"]


def watched_call(call, asked: list[str]):
    def noted(method, *args, **more):
        asked.append(method)
        return call(method, *args, **more)

    return noted


def test_gaps_and_overlaps_are_refused():
    def held(*boxes):
        return {
            rank: ParameterShard((4, 6), "float32", Box(box), "dtensor", "")
            for rank, box in enumerate(boxes)
        }

    good = held(((0, 0, 2),), ((0, 2, 4),), ((0, 2, 4),))
    parameters.check_cover("w", (4, 6), good)
    parameters.check_cover(
        "w", (4, 6), held(((0, 0, 1), (0, 2, 3)), ((0, 1, 2), (0, 3, 4)), ((0, 0, 0),))
    )
    for wrong in (
        held(((0, 0, 2),)),
        held(((0, 0, 2),), ((0, 1, 4),)),
        held((), ((0, 2, 4),)),
        # as many elements as the whole, twice some, some not at all
        held(((0, 0, 2),), ((1, 0, 3),)),
    ):
        with pytest.raises(
            PlacementError, match=r"w: the parts there are make .* of its 24 elements, or lie over"
        ):
            parameters.check_cover("w", (4, 6), wrong)
    with pytest.raises(
        PlacementError, match=r"is \(4, 6\) float32 on rank 0 and \(4, 7\) float32 on rank 1"
    ):
        parameters.agreed("w", held(()) | {1: ParameterShard((4, 7), "float32", WHOLE, "scan", "")})


# --- its memory -----------------------------------------------------------------------


@pytest.fixture
def loaded(session, tiny):
    session.load(tiny("llama"))
    gc.collect()
    session.store.pool.drain()
    return session


def used(session) -> int:
    gc.collect()
    session.store.pool.drain()
    return session.store.pool.num_bytes


def test_memory_goes_back_when_it_is_freed(loaded):
    before = used(loaded)
    gate = loaded.parameter(GATE)
    kept = gate.tensor()
    assert used(loaded) > before
    gate.free()
    gate.free()
    with pytest.raises(CaptureExpired, match="it was freed"):
        gate.tensor()
    loaded.parameter(DOWN).tensor().fill_(7)
    assert torch.equal(kept, unsharded.parameters("llama")[GATE]), (
        "a tensor that was read stays as it is"
    )
    del kept
    assert used(loaded) == before
    with pytest.raises(CaptureError, match=r"belongs to a run.*run.free\(\)"):
        loaded.run(IDS).logits.free()


def test_memory_goes_back_when_nobody_has_it_any_more(loaded):
    before = used(loaded)
    gate = loaded.parameter(GATE)
    tensor = gate.tensor()
    del gate
    assert used(loaded) > before, "somebody looks into it"
    del tensor
    assert used(loaded) == before


def test_parameters_expire_before_runs_to_make_room(loaded, monkeypatch):
    run = loaded.run(IDS)
    oldest, looked_into, newest = (loaded.parameter(name) for name in (GATE, DOWN, NORM))
    tensor = looked_into.tensor()
    monkeypatch.setattr(loaded.store, "budget", used(loaded) + 100)
    again = loaded.parameter(NORM)
    with pytest.raises(
        CaptureExpired, match=r"expired to make room; session.parameter\(name\) reads it again"
    ):
        oldest.tensor()
    assert looked_into.error is None and torch.equal(looked_into.tensor(), tensor)
    assert torch.equal(newest.tensor(), again.tensor()) and not run.freed


def test_a_load_ends_those_of_the_model_before(loaded, tiny):
    gate = loaded.parameter(GATE)
    kept = gate.tensor()
    loaded.load(tiny("qwen3"))
    with pytest.raises(CaptureExpired, match="has loaded another model"):
        gate.tensor()
    assert torch.equal(kept, unsharded.parameters("llama")[GATE])


def test_reading_again_and_again_takes_no_more(loaded):
    loaded.parameter(GATE)
    before = used(loaded)
    for _ in range(200):
        loaded.parameter(GATE).tensor()
    assert used(loaded) == before and len(loaded.store._lent) < 10


# --- where parts lie ------------------------------------------------------------------


def indices(shape, *axes):
    splits = [on_rank.Split(*axis) for axis in axes]
    return [index.tolist() for index in on_rank.indices_here(shape, splits, "w")]


def test_axes_split_from_left_to_right():
    assert indices((5,), (Shard(0), 2, 0), (Shard(0), 2, 1)) == [[2]]
    assert indices((5, 4), (Shard(-1), 2, 1), (Replicate(), 3, 2)) == [[0, 1, 2, 3, 4], [2, 3]]
    assert indices((8,), (_StridedShard(0, split_factor=2), 2, 1)) == [[2, 3, 6, 7]]
    assert indices((8,), (_StridedShard(0, split_factor=2), 2, 1), (Shard(0), 2, 0)) == [[2, 3]]
    assert indices((3,), (Shard(0), 4, 3)) == [[]]
    assert Box.of_indices((3,), [torch.tensor([], dtype=torch.long)]) == ((0, 0, 0),)


def test_an_uneven_split_in_an_order_that_is_not_known_is_refused():
    """On some rank, which is enough. FSDP 3 over TP 2 of 259 rows."""

    def axes(rank: int):
        return (_StridedShard(0, split_factor=2), 3, rank // 2), (Shard(0), 2, rank % 2)

    assert sorted(i for rank in range(6) for i in indices((258,), *axes(rank))[0]) == list(
        range(258)
    )
    with pytest.raises(
        PlacementError, match=r"splits \(259,\) unevenly and in an order that is not known"
    ):
        [indices((259,), *axes(rank)) for rank in range(6)]


def test_what_is_no_part_of_a_whole_is_refused():
    with pytest.raises(PlacementError, match="no part of a whole"):
        indices((4,), (Partial(), 2, 0))
    with pytest.raises(PlacementError, match="1 dims"):
        indices((4,), (Shard(1), 2, 0))


def test_torch_splits_data_as_compat_splits_an_index():
    """Pins `_split_tensor`, which distribute_tensor and FSDP use."""
    for placement in (Shard(0), _StridedShard(0, split_factor=2), _StridedShard(0, split_factor=3)):
        for size in (1, 5, 12, 257):
            data = torch.randn(size)
            parts, _ = placement._split_tensor(data, 4, with_padding=False)
            for rank, part in enumerate(parts):
                assert torch.equal(
                    data[compat.split_index(placement, torch.arange(size), 4, rank)], part
                )
    assert compat.is_split(_StridedShard(0, split_factor=2)) and not compat.is_split(Replicate())
    assert (
        compat.split_factor(Shard(0)),
        compat.split_factor(_StridedShard(0, split_factor=3)),
    ) == (1, 3)


def test_reshard_is_a_method_without_arguments():
    from torch.distributed.fsdp import FSDPModule

    assert list(inspect.signature(FSDPModule.reshard).parameters) == ["self"]
