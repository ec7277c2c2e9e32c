"""Capture, by itself: the parts that ranks wrote, here and on other hosts, are one tensor, or an
error that says why.

Captures here are made by hand over real slabs; those of real runs are compared in test_parity.py.
"""

from __future__ import annotations

import gc

import pytest
import torch
from safetensors import safe_open

from flexkernel.boxes import WHOLE, Box
from flexkernel.errors import CaptureError, CaptureExpired, PlacementError
from flexkernel.memory.pool import Pool
from flexkernel.memory.slab import PAGE, Slab, pages
from flexkernel.session.capture import Capture, Location, Value
from flexkernel.wire import CaptureKey, Region, ShardRecord

KEY = CaptureKey("m", "m")


class Far:
    """A client of another host: it reads that host's slabs. asked: what was asked of it."""

    def __init__(self, home: Home, host: str):
        self.home, self.host = home, host
        self.asked: list[str] = []

    def _whole(self, op: str, region: Region) -> torch.Tensor:
        self.asked.append(op)
        return self.home.slab_of(self.host, region.slab).tensor(region).clone()

    def read(self, region: Region) -> torch.Tensor:
        return self._whole("read", region)

    def slice(self, region: Region, index) -> torch.Tensor:
        return self._whole("slice", region)[index].clone()

    def reduce(self, region: Region, op: str, dim, keepdim: bool) -> torch.Tensor:
        return getattr(self._whole(op, region), op)(dim=dim, keepdim=keepdim)


class Home:
    """Hosts with a folder of slabs each; the driver is on host a."""

    here = "a"

    def __init__(self, folder, hosts: str):
        self.folder, self.hosts = folder, list(hosts)
        self.clients = {host: Far(self, host) for host in hosts}
        self._slabs: dict[tuple[str, str], Slab] = {}

    def slab_of(self, host: str, name: str) -> Slab:
        if (host, name) not in self._slabs:
            (self.folder / host).mkdir(exist_ok=True)
            self._slabs[host, name] = Slab(self.folder / host / name, 16 * PAGE)
        return self._slabs[host, name]

    def slab(self, name: str, num_bytes: int) -> Slab:
        return self.slab_of(self.here, name)

    def client(self, host: str) -> Far:
        return self.clients[host]


def value_of(whole: torch.Tensor) -> Value:
    return Value(KEY, tuple(whole.shape), whole.dtype)


def written(
    tmp_path, whole: torch.Tensor, hosts: str, *runs: tuple | None, holds=None, digests=None, **more
) -> Capture:
    """What a run leaves when rank i wrote box i on its host; elsewhere in the slabs there is
    rubbish."""
    home = Home(tmp_path, hosts)
    region = Region("p.slab", PAGE, tuple(whole.shape), str(whole.dtype).removeprefix("torch."))
    for host in hosts:
        home.slab_of(host, "p.slab").bytes.fill_(0x7F)
    seen = {}
    boxes = [None if box is None else Box(box) for box in runs]
    for rank, box in enumerate(boxes):
        if box is not None:
            index = box.slices(whole.dim())
            home.slab_of(hosts[rank], "p.slab").tensor(region)[index] = whole[index]
        mine = Box(holds[rank]) if holds else box or WHOLE
        seen[rank] = ShardRecord(
            "scan", "Replicate()", (digests or [0] * len(boxes))[rank], mine, box
        )
    return Capture(value_of(whole), Location(home, region, **more), seen)


@pytest.fixture
def whole() -> torch.Tensor:
    return torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1))


# --- one tensor -----------------------------------------------------------------------


def test_what_one_rank_wrote_is_the_tensor(tmp_path, whole):
    capture = written(tmp_path, whole, "a", ())
    assert torch.equal(capture.tensor(), whole)
    assert (capture.shape, capture.dtype, capture.ndim, capture.num_bytes) == (
        (3, 5, 8),
        torch.float32,
        3,
        480,
    )
    assert capture.evidence == "scan+digest" and "by scan+digest" in repr(capture)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.bool, torch.int64]
)
def test_every_dtype_comes_as_it_is(dtype, tmp_path, whole):
    value = (whole * 10).to(dtype)
    got = written(tmp_path, value, "a", ()).tensor()
    assert got.dtype == dtype and torch.equal(got, value)


@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 0, 4)])
def test_a_scalar_and_a_tensor_of_nothing_are_captures_too(shape, tmp_path):
    value = torch.full(shape, 2.5)
    capture = written(tmp_path, value, "a", ())
    assert torch.equal(capture.tensor(), value) and capture.shape == shape


INDICES = [
    0,
    -1,
    (0, -1),
    (slice(None), -1),
    (..., slice(1, 8, 3)),
    (0, [1, 3]),
    (None, 2),
    ...,
    torch.tensor([2, 0]),
]


@pytest.mark.parametrize("index", INDICES, ids=str)
@pytest.mark.parametrize(
    ("hosts", "boxes"), [("a", [()]), ("b", [()]), ("ab", [((0, 0, 2),), ((0, 2, 3),)])]
)
def test_a_slice_is_what_torch_takes_wherever_it_lies(index, hosts, boxes, tmp_path, whole):
    assert torch.equal(written(tmp_path, whole, hosts, *boxes)[index], whole[index])


@pytest.mark.parametrize(
    ("hosts", "boxes"), [("a", [()]), ("b", [()]), ("ab", [((2, 0, 4),), ((2, 4, 8),)])]
)
@pytest.mark.parametrize("op", ["mean", "norm", "var", "amax", "amin"])
@pytest.mark.parametrize("dim", [-1, 0, (0, 2)])
@pytest.mark.parametrize("keepdim", [False, True])
def test_a_reduction_is_what_torch_makes_wherever_it_lies(
    op, dim, keepdim, hosts, boxes, tmp_path, whole
):
    got = getattr(written(tmp_path, whole, hosts, *boxes), op)(dim=dim, keepdim=keepdim)
    want = getattr(whole, op)(dim=dim, keepdim=keepdim)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("op", ["mean", "norm", "var", "amax", "amin"])
def test_a_reduction_of_all_dims_is_a_scalar(op, tmp_path, whole):
    torch.testing.assert_close(
        getattr(written(tmp_path, whole, "a", ()), op)(), getattr(whole, op)()
    )


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("dim", [-1, 1])
def test_topk_is_that_of_torch(dim, largest, tmp_path, whole):
    values, indices = written(tmp_path, whole, "a", ()).topk(3, dim=dim, largest=largest)
    want = whole.topk(3, dim=dim, largest=largest)
    assert torch.equal(values, want.values) and torch.equal(indices, want.indices)


def test_a_reduction_of_half_precision_is_made_in_float32(tmp_path):
    value = torch.full((1, 4096), 1.001, dtype=torch.bfloat16)
    mean = written(tmp_path, value, "a", ()).mean(dim=-1)
    assert mean.dtype == torch.float32
    torch.testing.assert_close(mean, value.float().mean(-1))


def test_tiles_of_a_capture_in_parts_are_those_of_the_whole(tmp_path, whole):
    one = written(tmp_path / "1", whole, "a", ()) if (tmp_path / "1").mkdir() is None else None
    parts = written(tmp_path, whole, "ab", ((0, 0, 1),), ((0, 1, 3),))
    assert torch.equal(one.tiles(height=4, width=3), parts.tiles(height=4, width=3))
    assert torch.equal(one.bounds(height=4, width=3)[0], parts.bounds(height=4, width=3)[0])


# --- yours to change ------------------------------------------------------------------


def test_changing_a_tensor_changes_neither_the_capture_nor_a_second_read(tmp_path, whole):
    capture = written(tmp_path, whole, "a", ())
    mine, second = capture.tensor(), capture.tensor()
    mine.zero_()
    assert torch.equal(second, whole) and torch.equal(capture.tensor(), whole)
    assert torch.equal(capture[0], whole[0]) and torch.equal(capture.amax(), whole.amax())


def test_changing_a_slice_changes_nothing_else(tmp_path, whole):
    for hosts, boxes in (("a", [()]), ("ab", [((0, 0, 2),), ((0, 2, 3),)])):
        folder = tmp_path / hosts
        folder.mkdir()
        capture = written(folder, whole, hosts, *boxes)
        capture[0].zero_()
        capture[...].zero_()
        assert torch.equal(capture.tensor(), whole)


def test_a_tensor_is_read_for_as_long_as_it_lives_and_the_slab_is_not_reused(tmp_path, whole):
    pool = Pool("p")
    extent = pool.lease(PAGE)
    capture = written(tmp_path, whole, "a", (), extent=extent)
    held = capture.tensor()[1]
    capture.expire("it was freed")
    pool.release(extent)
    assert pool.lease(PAGE).base != extent.base
    assert torch.equal(held, whole[1])
    del held
    gc.collect()
    assert pool.lease(PAGE).base == extent.base


def test_slices_and_reductions_hold_nothing(tmp_path, whole):
    pool = Pool("p")
    extent = pool.lease(PAGE)
    capture = written(tmp_path, whole, "a", (), extent=extent)
    kept = [capture[0], capture.mean(dim=-1), capture.topk(2), capture.tiles(), capture.amax()]
    pool.release(extent)
    assert kept and pool.lease(PAGE).base == extent.base


# --- saving ---------------------------------------------------------------------------


def test_a_saved_capture_is_read_by_safetensors_under_its_name(tmp_path, whole):
    path = written(tmp_path, whole, "a", ()).save(tmp_path / "x.safetensors")
    with safe_open(path, "pt") as file:
        assert list(file.keys()) == ["m"] and torch.equal(file.get_tensor("m"), whole)


def test_a_save_that_fails_leaves_the_old_file_and_no_litter(tmp_path, whole, monkeypatch):
    target = tmp_path / "out" / "x.safetensors"
    target.parent.mkdir()
    capture = written(tmp_path, whole, "a", ())
    capture.save(target)
    before = target.read_bytes()

    def half(tensors, part):
        open(part, "wb").write(b"half")
        raise OSError("the disk is full")

    monkeypatch.setattr("safetensors.torch.save_file", half)
    with pytest.raises(CaptureError, match="cannot be written, and is as it was: the disk is full"):
        capture.save(target)
    assert target.read_bytes() == before and [p.name for p in target.parent.iterdir()] == [
        target.name
    ]


def test_a_relative_path_is_in_the_working_folder(tmp_path, whole, monkeypatch):
    capture = written(tmp_path, whole, "a", ())
    monkeypatch.chdir(tmp_path)
    assert capture.save("x.safetensors").exists() and (tmp_path / "x.safetensors").exists()


# --- several ranks, several hosts -----------------------------------------------------


def test_parts_on_two_hosts_are_put_together(tmp_path, whole):
    capture = written(
        tmp_path, whole, "aabb", ((2, 0, 2),), ((2, 2, 4),), ((2, 4, 7),), ((2, 7, 8),)
    )
    assert torch.equal(capture.tensor(), whole)


def test_nothing_is_fetched_from_ranks_that_wrote_nothing(tmp_path, whole):
    capture = written(tmp_path, whole, "ab", (), None, holds=[(), ()])
    assert torch.equal(capture.tensor(), whole) and capture._lies.home.clients["b"].asked == []


def test_what_lies_on_one_other_host_is_reduced_there(tmp_path, whole):
    capture = written(tmp_path, whole, "b", ())
    torch.testing.assert_close(capture.amax(dim=-1), whole.amax(-1))
    assert torch.equal(capture[0], whole[0]) and capture._lies.home.clients["b"].asked == [
        "amax",
        "slice",
    ]


def own_part(home: Home, rank: int, value: torch.Tensor, holds: tuple = (), **more) -> ShardRecord:
    """What a rank keeps in a file of its own."""
    region = Region(
        f"extra-{rank}.slab", 0, tuple(value.shape), str(value.dtype).removeprefix("torch.")
    )
    home.slab_of(home.hosts[rank], region.slab).tensor(region).copy_(value)
    return ShardRecord("dtensor", "x", rank, Box(holds), None, region, **more)


def test_addends_of_two_hosts_are_summed(tmp_path, whole):
    home = Home(tmp_path, "ab")
    seen = {
        0: own_part(home, 0, whole - 1, partial=2),
        1: own_part(home, 1, torch.ones(3, 5, 8), partial=2),
    }
    capture = Capture(Value(KEY, (3, 5, 8), torch.float32), Location(home), seen)
    torch.testing.assert_close(capture.tensor(), whole)
    torch.testing.assert_close(capture[0, 1], whole[0, 1])
    torch.testing.assert_close(capture.norm(dim=-1), whole.norm(dim=-1))


def test_addends_of_half_precision_are_summed_in_float32(tmp_path):
    """Summed in bfloat16, 256 + 1 + 1 stays 256."""
    home = Home(tmp_path, "aaa")
    values = [torch.full((2,), v, dtype=torch.bfloat16) for v in (256.0, 1.0, 1.0)]
    seen = {rank: own_part(home, rank, value, partial=3) for rank, value in enumerate(values)}
    capture = Capture(Value(KEY, (2,), torch.bfloat16), Location(home), seen)
    assert capture.tensor().tolist() == [258.0, 258.0] and capture.tensor().dtype == torch.bfloat16


def test_parts_without_a_planned_place_are_put_together(tmp_path, whole):
    home = Home(tmp_path, "ab")
    seen = {
        r: own_part(home, r, part, ((2, 4 * r, 4 * r + 4),))
        for r, part in enumerate(whole.chunk(2, -1))
    }
    capture = Capture(Value(KEY, (3, 5, 8), torch.float32), Location(home), seen)
    assert torch.equal(capture.tensor(), whole)
    torch.testing.assert_close(capture.mean(dim=0), whole.mean(0))


def test_a_value_that_one_rank_has_in_a_file_of_its_own_is_a_view(tmp_path, whole):
    home = Home(tmp_path, "a")
    capture = Capture(
        Value(KEY, (3, 5, 8), torch.float32), Location(home), {0: own_part(home, 0, whole)}
    )
    assert torch.equal(capture.tensor(), whole) and capture.num_bytes <= pages(1)


def test_shards_say_where_parts_end_and_who_has_them(tmp_path, whole):
    holds = [
        ((0, 0, 2), (2, 0, 4)),
        ((0, 0, 2), (2, 4, 8)),
        ((0, 2, 3), (2, 0, 4)),
        ((0, 2, 3), (2, 4, 8)),
    ]
    capture = written(tmp_path, whole, "aaaa", *holds)
    assert capture.shards == [
        (0, [2, 3], ["rank 0, 1", "rank 2, 3"]),
        (2, [4, 8], ["rank 0, 2", "rank 1, 3"]),
    ]
    assert torch.equal(capture.tensor(), whole)


def test_ranks_that_are_no_range_are_not_called_one(tmp_path, whole):
    holds = [((2, 0, 4),) if rank % 2 == 0 else ((2, 4, 8),) for rank in range(10)]
    capture = written(tmp_path, whole, "a" * 10, *holds[:2], *[None] * 8, holds=holds)
    assert capture.shards == [(2, [4, 8], ["rank 0, 2, 4, 6, 8", "rank 1, 3, 5, 7, 9"])]


# --- not to be read -------------------------------------------------------------------

LOOKS = {
    "tensor": lambda c: c.tensor(),
    "slice": lambda c: c[0],
    "mean": lambda c: c.mean(),
    "topk": lambda c: c.topk(1),
    "tiles": lambda c: c.tiles(),
    "count_nan": lambda c: c.count_nan(),
    "save": lambda c: c.save("never"),
    "show": lambda c: c.show(),
}


def refuses(capture: Capture, kind: type[Exception], says: str) -> None:
    for look in LOOKS.values():
        with pytest.raises(kind, match=says):
            look(capture)


def test_an_expired_capture_says_why_however_it_is_looked_at(tmp_path, whole):
    capture = written(tmp_path, whole, "a", ())
    held = capture.tensor()
    capture.expire("it expired to make room for newer runs; run.keep() keeps one")
    refuses(
        capture,
        CaptureExpired,
        r"m: it expired to make room for newer runs; run\.keep\(\) keeps one",
    )
    assert torch.equal(held, whole) and capture.shape == (3, 5, 8) and repr(capture)


def test_copies_that_differ_are_not_shown(tmp_path, whole):
    capture = written(tmp_path, whole, "aa", (), None, holds=[(), ()], digests=[1, 2])
    refuses(
        capture,
        PlacementError,
        "ranks 0 and 1 hold the same part .* different numbers: it is a partial sum, or",
    )
    assert repr(capture) == "<Capture m: PlacementError>"


def test_different_parts_may_have_different_digests(tmp_path, whole):
    capture = written(tmp_path, whole, "aa", ((0, 0, 2),), ((0, 2, 3),), digests=[1, 2])
    assert torch.equal(capture.tensor(), whole)


def test_a_rank_whose_rows_were_a_copy_has_no_say(tmp_path, whole):
    boxes = [((0, 0, 3),), None, None]
    capture = written(
        tmp_path,
        whole,
        "aaa",
        *boxes,
        holds=[((0, 0, 3),), ((0, 3, 3),), ((0, 3, 3),)],
        digests=[1, 2, 3],
    )
    assert torch.equal(capture.tensor(), whole)


def test_a_missing_part_is_counted(tmp_path, whole):
    refuses(
        written(tmp_path, whole, "aa", ((0, 0, 2),), None),
        CaptureError,
        "m: 80 of 120 elements were written",
    )


def test_a_module_that_did_not_fire_says_so(tmp_path, whole):
    refuses(written(tmp_path, whole, "a"), CaptureError, "m: it did not fire in this run")


def test_parts_that_overlap_do_not_make_up_for_one_that_is_missing(tmp_path, whole):
    """Two ranks wrote rows 0 and 1, nobody wrote rows 2 and 3: the counts alone would agree."""
    value = torch.randn(4, 2)
    capture = written(tmp_path, value, "aa", ((0, 0, 2),), ((0, 0, 2),))
    refuses(capture, CaptureError, "m: 4 of 8 elements were written")


def test_a_sum_without_one_of_its_addends_is_not_shown(tmp_path, whole):
    """Of two tp ranks in two batch groups one came to nothing: three addends are no sum."""
    home = Home(tmp_path, "aaaa")
    part = torch.ones(1, 4)
    seen = {r: own_part(home, r, part, ((0, r // 2, r // 2 + 1),), partial=2) for r in range(3)}
    refuses(
        Capture(Value(KEY, (2, 4), torch.float32), Location(home), seen),
        CaptureError,
        "m: .* addends",
    )


def test_an_error_of_one_rank_is_the_captures(tmp_path, whole):
    ok = written(tmp_path, whole, "aa", (), None, holds=[(), ()])
    seen = {
        **ok.records,
        1: ShardRecord(
            "none", "unknown", written=None, error=("PlacementError", "it has no tensor")
        ),
    }
    capture = Capture(value_of(whole), ok._lies, seen)
    refuses(capture, PlacementError, r"it has no tensor \(rank 1\)")


def test_an_error_that_is_raised_often_does_not_grow(tmp_path, whole):
    capture = written(tmp_path, whole, "a")
    depths = set()
    for _ in range(3):
        try:
            capture.tensor()
        except CaptureError as error:
            depth, frame = 0, error.__traceback__
            while frame is not None:
                depth, frame = depth + 1, frame.tb_next
            depths.add(depth)
    assert len(depths) == 1
