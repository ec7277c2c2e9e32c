"""Placement, rank by rank in one process: the pieces of any layout are the whole again, each
element written once.

What the engines themselves make of real layouts is in test_parity.py and test_evidence.py.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.tensor import Partial, Replicate, Shard

from flexkernel.boxes import chunk, share
from flexkernel.engine.model.hooks import Tap
from flexkernel.engine.place import placements
from flexkernel.engine.place.placements import Declared, Place, Placer, parse
from flexkernel.engine.place.staging import Copies, digest
from flexkernel.engine.run.context import RunContext
from flexkernel.engine.run.recording import ForwardRecording, failure
from flexkernel.errors import HookError, PlacementError
from flexkernel.memory.plan import Entry, Plan
from flexkernel.memory.pool import Extent
from flexkernel.memory.slab import PAGE, Slab, pages, size_of
from flexkernel.session.capture import Capture, Location, Value
from flexkernel.wire import STYLES, CaptureKey, HookSpec, Layout, Region, ShapeFormula

TERMS = ("", "B", "S", "B*S", "P+S")


class Home:
    """One host and its slabs."""

    here = "here"

    def __init__(self, folder, world: int):
        self.folder, self.hosts = folder, ["here"] * world
        self.slabs: dict[str, Slab] = {}

    def slab(self, name: str, num_bytes: int) -> Slab:
        if name not in self.slabs:
            self.slabs[name] = Slab(self.folder / name, num_bytes)
        return self.slabs[name]


class RankMemory:
    """One rank's slabs on that host."""

    def __init__(self, home: Home, rank: int):
        self.home, self.rank = home, rank

    def slab(self, name: str, num_bytes: int) -> Slab:
        return self.home.slab(name, num_bytes)

    def extra(self, run: int, num_bytes: int) -> tuple[Slab, str]:
        name = f"extra-{self.rank}.slab"
        return self.home.slab(name, max(pages(num_bytes), PAGE)), name


class Ranks:
    """All ranks of a layout, writing one value into one slab, as the hooks of a run do."""

    def __init__(
        self,
        folder,
        layout: Layout,
        formula: ShapeFormula,
        B: int,
        S: int,
        hook: HookSpec,
        placer: Placer,
    ):
        self.layout, self.formula, self.B, self.S, self.placer = layout, formula, B, S, placer
        key = CaptureKey(hook.key, hook.glob, hook.at, formula.path)
        shape = list(formula.shape(B, S))
        if hook.positions is not None and formula.dims_of("S"):
            shape[formula.dims_of("S")[0]] = len(hook.positions)
        self.entry = Entry(key, hook, formula, tuple(shape), 0)
        self.num_bytes = max(pages(size_of(shape, formula.dtype)), PAGE)
        self.plan = Plan((self.entry,), self.num_bytes, (), False)
        self.home, self.hook = Home(folder, layout.world), hook
        self.region = Region("planned.slab", 0, tuple(shape), formula.dtype)
        # what nobody writes is seen
        self.home.slab("planned.slab", self.num_bytes).bytes.fill_(0x55)

    def place(self, rank: int) -> Place:
        rows = share(self.B, self.layout.batch_groups, self.layout.coordinate(rank).batch)
        return Place(self.layout, rank, self.B, self.S, rows)

    def capture(self, locals_: dict[int, torch.Tensor]) -> Capture:
        run = SimpleNamespace(run=1, slab="planned.slab", slab_bytes=self.num_bytes, base=0)
        seen = {}
        for rank, local in locals_.items():
            context = RunContext(
                plan=run,
                captures=self.plan,
                here=self.place(rank),
                tokens=None,
                placer=self.placer,
                copies=Copies(),
                memory=RankMemory(self.home, rank),
            )
            recording = ForwardRecording(context, frozenset({self.hook.key}), None)
            recording.record(Tap.of(self.hook, self.hook.glob), self.hook.at, local)
            seen[rank] = recording.planned[0]
        dtype = getattr(torch, self.formula.dtype)
        extent = Extent(self.region.slab, self.num_bytes, 0, self.num_bytes)
        of = Value(self.entry.key, self.entry.shape, dtype)
        return Capture(of, Location(self.home, self.region, extent), seen)


def rows_of(whole: torch.Tensor, formula: ShapeFormula, here: Place) -> torch.Tensor:
    """What a rank with these rows computes of a whole value; an idle one computes row 0."""
    start, stop = here.rows if not here.idle else (0, 1)
    for dim in formula.dims_of("B", "B*S"):
        unit = whole.shape[dim] // here.B
        whole = whole.narrow(dim, start * unit, (stop - start) * unit)
    return whole


def numbered(shape) -> torch.Tensor:
    return torch.arange(1, math.prod(shape) + 1, dtype=torch.float32).view(shape)


terms = st.sampled_from(TERMS)
formulas = st.lists(st.tuples(st.integers(1, 5), terms), max_size=4).filter(
    lambda dims: (
        sum(term in ("B", "B*S") for _, term in dims) <= 1
        and all(f == 1 or term != "B" for f, term in dims)
    )
)
layouts = st.builds(Layout, st.just(1), st.integers(1, 3), st.integers(1, 2), st.integers(1, 4))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("slabs")


@given(formulas, layouts, st.integers(1, 5), st.integers(1, 6), st.data())
@settings(max_examples=250, deadline=None)
def test_the_pieces_of_any_layout_are_the_whole_written_once(
    tmp_path_factory, dims, layout, B, S, data
):
    """By scan: replicated, or sharded in any dim that tp divides as torch.chunk does, uneven and
    empty pieces too."""
    formula = ShapeFormula("", tuple(dims), "float32")
    whole = numbered(formula.shape(B, S))
    free = [
        d for d, (_, term) in enumerate(dims) if term not in ("B", "B*S") and whole.shape[d] > 1
    ]
    split = data.draw(st.sampled_from([None, *free])) if layout.tp > 1 else None
    ranks = Ranks(
        tmp_path_factory.mktemp("s"), layout, formula, B, S, HookSpec("m"), Placer(layout, {}, {})
    )
    locals_ = {}
    for rank in range(layout.world):
        local = rows_of(whole, formula, ranks.place(rank))
        if split is not None:
            start, stop = chunk(whole.shape[split], layout.tp, layout.coordinate(rank).tp)
            local = local.narrow(split, start, stop - start)
        locals_[rank] = local.clone()
    capture = ranks.capture(locals_)
    assert capture.error is None and torch.equal(capture.tensor(), whole)
    written = torch.zeros(whole.shape, dtype=torch.int64)
    for seen in capture.records.values():
        if seen.written is not None:
            written[seen.written.slices(whole.dim())] += 1
    assert (written == 1).all()


@given(layouts, st.integers(1, 5), st.integers(1, 6), st.booleans())
@settings(max_examples=60, deadline=None)
def test_addends_are_summed_once_whatever_the_batch_groups(tmp_path_factory, layout, B, S, batched):
    formula = ShapeFormula("", ((1, "B" if batched else ""), (1, "S"), (3, "")), "float32")
    whole = numbered(formula.shape(B, S))
    ranks = Ranks(
        tmp_path_factory.mktemp("s"),
        layout,
        formula,
        B,
        S,
        HookSpec("m"),
        Placer(layout, {}, {"m": "partial"}),
    )
    # of each rank's addend
    weight = [1.0 if t else 1.0 - (layout.tp - 1) for t in range(layout.tp)]
    locals_ = {
        rank: rows_of(whole, formula, ranks.place(rank)) * weight[layout.coordinate(rank).tp]
        for rank in range(layout.world)
    }
    capture = ranks.capture(locals_)
    torch.testing.assert_close(capture.tensor(), whole)


@given(layouts, st.integers(1, 4), st.lists(st.integers(-5, 4), min_size=1, max_size=6))
@settings(max_examples=60, deadline=None)
def test_positions_are_picked_on_every_rank(tmp_path_factory, layout, B, positions):
    formula, S = ShapeFormula("", ((1, "B"), (1, "S"), (4, "")), "float32"), 5
    whole = numbered(formula.shape(B, S))
    hook = HookSpec("m", positions=tuple(positions))
    ranks = Ranks(tmp_path_factory.mktemp("s"), layout, formula, B, S, hook, Placer(layout, {}, {}))
    locals_ = {rank: rows_of(whole, formula, ranks.place(rank)) for rank in range(layout.world)}
    assert torch.equal(ranks.capture(locals_).tensor(), whole[:, positions])


BSD = ShapeFormula("", ((1, "B"), (1, "S"), (6, "")), "float32")
TWO = Layout(tp=2)


def two_ranks(
    folder, *locals_, declared=None, styles=None, formula=BSD, hook=None, B=2, S=4
) -> Capture:
    hook = hook or HookSpec("m")
    ranks = Ranks(folder, TWO, formula, B, S, hook, Placer(TWO, styles or {}, declared or {}))
    return ranks.capture(dict(enumerate(locals_)))


def test_copies_that_differ_are_refused(tmp_path):
    one = torch.randn(2, 4, 6)
    capture = two_ranks(tmp_path, one, one + 1e-6)
    with pytest.raises(
        PlacementError, match=r"m: ranks 0 and 1 hold the same part of it with different numbers"
    ):
        capture.tensor()
    assert two_ranks(tmp_path, one, one.clone()).error is None


def test_what_a_rank_with_copied_rows_holds_is_dropped(tmp_path):
    layout = Layout(dp=3)
    ranks = Ranks(tmp_path, layout, BSD, 2, 4, HookSpec("m"), Placer(layout, {}, {}))
    whole = numbered((2, 4, 6))
    capture = ranks.capture({0: whole[:1], 1: whole[1:], 2: torch.full((1, 4, 6), float("nan"))})
    assert torch.equal(capture.tensor(), whole)


def test_rows_repeated_in_an_unknown_order_are_refused_when_the_batch_is_split(tmp_path):
    """x.repeat(2, 1) puts the copies apart, x.repeat_interleave(2) side by side: the shape is the
    same."""
    formula, whole = ShapeFormula("", ((2, "B"), (3, "")), "float32"), numbered((8, 3))
    for layout, refused in ((Layout(dp=2), True), (Layout(tp=2), False)):
        folder = tmp_path / str(layout)
        folder.mkdir()
        ranks = Ranks(folder, layout, formula, 4, 1, HookSpec("m"), Placer(layout, {}, {}))
        capture = ranks.capture(
            {0: whole[:4] if refused else whole, 1: whole[4:] if refused else whole}
        )
        if refused:
            with pytest.raises(
                PlacementError,
                match="2 entries for each row of the batch, in an order that is not known",
            ):
                capture.tensor()
        else:
            assert torch.equal(capture.tensor(), whole)


def test_positions_of_a_split_sequence_are_refused(tmp_path):
    whole = numbered((2, 4, 6))
    capture = two_ranks(tmp_path, whole[:, :2], whole[:, 2:], hook=HookSpec("m", positions=(0, 1)))
    with pytest.raises(PlacementError, match="positions cannot be picked"):
        capture.tensor()


def test_positions_of_rows_that_run_over_the_batch_are_refused(tmp_path):
    rows = numbered((8, 6))
    formula = ShapeFormula("", ((1, "B*S"), (6, "")), "float32")
    capture = two_ranks(tmp_path, rows, rows, formula=formula, hook=HookSpec("m", positions=(0,)))
    with pytest.raises(PlacementError, match=r"positions cannot be picked from B\*S×6"):
        capture.tensor()


# --- wrong shapes ---------------------------------------------------------------------


def place(
    local_shape, placer=None, rank=0, layout=TWO, formula=BSD, at="output", name="m", B=2, S=4
):
    rows = share(B, layout.batch_groups, layout.coordinate(rank).batch)
    here = Place(layout, rank, B, S, rows)
    return (placer or Placer(layout, {}, {})).place(
        name, at, torch.zeros(local_shape), formula, here
    )


@pytest.mark.parametrize(
    "shape",
    [
        (2, 4),
        (2, 4, 6, 1),
        (1, 4, 3),
        (2, 2, 3),
        (2, 4, 2),
        (2, 4, 7),
        (2, 4, 12),
        (0, 4, 6),
        (2, 4, 0),
    ],
)
def test_a_shape_that_no_split_explains_is_refused_with_both_shapes(shape):
    with pytest.raises(PlacementError) as caught:
        place(shape)
    assert str(tuple(shape)) in str(caught.value) and "placements={'m': 'shard:-1'}" in str(
        caught.value
    )


def test_without_tp_nothing_is_split():
    with pytest.raises(
        PlacementError, match=r"holds \(2, 4, 3\), the unsharded model's value is \(2, 4, 6\)"
    ):
        place((2, 4, 3), layout=Layout(dp=1))


@given(st.lists(st.integers(1, 9), min_size=3, max_size=3), st.integers(0, 1))
def test_a_shape_is_either_placed_within_the_whole_or_refused(shape, rank):
    whole = (2, 4, 6)
    try:
        placed = place(shape, rank=rank)
    except PlacementError:
        return
    want = list(whole)
    for dim, start, stop in placed.shard:
        assert 0 <= start < stop <= whole[dim]
        want[dim] = stop - start
    assert want == list(shape)


def test_a_dim_split_over_batch_and_tp_is_refused():
    placer = Placer(Layout(dp=2, tp=2), {}, {"m": "shard:0"})
    with pytest.raises(PlacementError, match="split over the batch and over tp"):
        place((1, 4, 6), placer, layout=Layout(dp=2, tp=2), B=4)


def test_a_failure_to_place_stays_with_the_capture(tmp_path):
    capture = two_ranks(tmp_path, torch.zeros(2, 4, 5), torch.zeros(2, 4, 6))
    assert isinstance(capture.error, PlacementError) and "rank 0 should hold" in str(capture.error)


def test_a_value_of_another_dtype_than_scanned_is_refused(tmp_path):
    whole = torch.zeros(2, 4, 6, dtype=torch.float64)
    with pytest.raises(PlacementError, match=r"scan says float32, the value is torch\.float64"):
        two_ranks(tmp_path, whole, whole).tensor()


# --- declarations ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("shard:-1", Declared(Shard(-1))),
        ("shard:0", Declared(Shard(0))),
        ("replicate", Declared(Replicate())),
        ("partial", Declared(Partial())),
        ("batch:1", Declared(None, 1)),
        ("batch:1 shard:0", Declared(Shard(0), 1)),
        ("replicate batch:none", Declared(Replicate(), "none")),
    ],
)
def test_a_declaration_is_read(text, want):
    assert parse(text) == want


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "shard",
            "shard:",
            "shard:x",
            "shard:--1",
            "Shard(0)",
            "partial:0",
            "batch",
            "batch:x",
        ),
        *("batch:0 batch:1", "replicate shard:0", "partial nothing", None),
    ],
)
def test_a_declaration_that_says_nothing_is_refused(text):
    with pytest.raises(
        PlacementError, match="a placement is 'shard:DIM', 'replicate' or 'partial'"
    ):
        parse(text)


def test_a_declaration_is_of_the_output_unless_it_says_input():
    placer = Placer(TWO, {}, {"m": "partial", "n.* input": "shard:-1"})
    assert place((2, 4, 6), placer).evidence == "declared"
    assert place((2, 4, 6), placer, at="input").placement == Replicate()
    assert place((2, 4, 3), placer, at="input", name="n.a").evidence == "declared"
    assert place((2, 4, 6), placer, name="n.a").evidence == "scan"


def test_a_declaration_that_the_shape_denies_is_refused():
    placer = Placer(TWO, {}, {"m": "shard:1"})
    with pytest.raises(
        PlacementError,
        match=r"declared says S(hard)?\(.*1\) over tp=2, so rank 0 .*\(2, 2, 6\); it",
    ):
        place((2, 4, 3), placer)


@pytest.mark.parametrize("dim", [3, -4])
def test_a_declared_dim_that_is_not_there_is_refused(dim):
    with pytest.raises(PlacementError, match=r"but the value has 3 dims: \[2, 4, 6\]"):
        place((2, 4, 3), Placer(TWO, {}, {"m": f"shard:{dim}"}))


def test_declarations_are_checked_before_anything_is_loaded(session, tiny):
    session.load(tiny("llama"))
    with pytest.raises(PlacementError, match="a placement is"):
        session.load(tiny("llama"), placements={"lm_head": "sharded"})
    with pytest.raises(HookError, match=r"no module matches 'lm_haed'.*lm_head"):
        session.load(tiny("llama"), placements={"lm_haed": "partial"})
    assert session.run([[5, 6]]).logits.shape == (1, 2, 256)


# --- plans and classes ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("style", "inner", "outer"),
    [
        ("colwise", Replicate(), Shard(-1)),
        ("colwise_gather_output", Replicate(), Replicate()),
        ("rowwise", Shard(-1), Replicate()),
        ("embedding_rowwise", Replicate(), Replicate()),
        ("moe_tp_experts", Replicate(), Replicate()),
    ],
)
def test_each_style_of_a_plan_says_what_goes_in_and_out(style, inner, outer):
    placer = Placer(TWO, {"m": style}, {})
    for at, want in (("input", inner), ("output", outer)):
        shape = (2, 4, 3) if isinstance(want, Shard) else (2, 4, 6)
        placed = place(shape, placer, at=at)
        assert (placed.evidence, placed.placement) == ("plan", want)


def test_a_plan_that_the_shape_denies_is_refused():
    with pytest.raises(PlacementError, match="plan says"):
        place((2, 4, 6), Placer(TWO, {"m": "colwise"}, {}))


@pytest.mark.parametrize(
    ("style", "at"), [("packed_colwise", "output"), ("packed_rowwise", "input")]
)
def test_interleaved_columns_are_refused_under_tp_only(style, at):
    with pytest.raises(
        PlacementError, match=rf"m is {style} over tp=2.*interleaved.*hook the modules around it"
    ):
        place((2, 4, 3), Placer(TWO, {"m": style}, {}), at=at)
    assert place((2, 4, 6), Placer(Layout(), {"m": style}, {}), layout=Layout()).evidence == "scan"


def test_every_style_of_transformers_is_known_or_left_to_the_scan():
    """A style that is new in transformers shows here, before its output is placed by shape
    alone."""
    from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES

    scanned = set(ALL_PARALLEL_STYLES) - set(STYLES) - set(placements.STRIDED)
    assert scanned <= SCANNED, f"new: {scanned - SCANNED}"


SCANNED = {
    *(
        "embedding_colwise",
        "colwise_rep",
        "rowwise_rep",
        "rowwise_split_input",
        "sequence_parallel",
        "replicate",
    ),
    *(
        "ep_dispatch_experts",
        "grouped_gemm",
        "replicated_with_grad_allreduce",
        "mla_kv_a_proj",
        "moe_identity_expert",
        "local_params",
    ),
}


# --- arithmetic -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.bool, torch.uint8, torch.int64]
)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (7,), (3, 5), (16, 16)])
def test_equal_values_have_equal_digests_however_they_lie(shape, dtype):
    value = (torch.randn(shape) * 10).to(dtype)
    assert (
        digest(value)
        == digest(value.clone())
        == digest(value.t().contiguous().t() if value.dim() == 2 else value)
    )
    shifted = (
        torch.cat([value.reshape(-1)[:1], value.reshape(-1)])[1:].reshape(shape)
        if value.numel()
        else value
    )
    assert digest(shifted) == digest(value)


@given(st.integers(1, 40), st.data())
def test_one_flipped_bit_changes_the_digest(length, data):
    value = torch.randint(0, 255, (length,), dtype=torch.uint8)
    other = value.clone()
    other[data.draw(st.integers(0, length - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert digest(value) != digest(other)


def test_rows_in_another_order_have_another_digest():
    """Values that experts sort by the data may differ between ranks in nothing but their order."""
    rows = torch.randn(6, 64)
    assert digest(rows) != digest(rows.flip(0))


def test_a_failure_keeps_its_type_and_text():
    seen = failure(HookError("so"))
    assert seen.error == ("HookError", "so") and seen.written is None
