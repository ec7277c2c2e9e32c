"""Slabs: what lies where, and who may use it again. Wrong here is wrong everywhere, without a
word."""

from __future__ import annotations

import gc
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexkernel.errors import CaptureError, CaptureExpired, HookError
from flexkernel.memory import plan as planning
from flexkernel.memory import slab as files
from flexkernel.memory.plan import Plan, Planner
from flexkernel.memory.pool import SLAB_BYTES, Extent, Pool, first_gap
from flexkernel.memory.slab import PAGE, Slab, pages, size_of
from flexkernel.wire import (
    CaptureKey,
    HookSpec,
    Layout,
    ModelInfo,
    ModuleInfo,
    Region,
    ShapeFormula,
)

WIDTH = 8


def leaf(path: str = "", *terms: str, dtype: str = "float32") -> ShapeFormula:
    return ShapeFormula(path, (*((1, term) for term in terms or ("B", "S")), (WIDTH, "")), dtype)


SCAN = {
    ("", "output"): ((leaf("logits"),),),
    ("twice", "output"): ((leaf(),), (leaf(),)),
    ("pair", "output"): ((leaf("0"), leaf("1", dtype="bfloat16")),),
    ("rows", "output"): ((leaf("", "B*S"),),),
    ("data", "output"): ((ShapeFormula("", None, "float32"),),),
    ("odd", "output"): ((ShapeFormula("", ((3, ""),), "uint8"),),),
    ("nothing", "output"): ((),),
    ("attn.@k", "output"): (
        (ShapeFormula("", ((1, "B"), (2, ""), (1, "P+S"), (4, "")), "float32"),),
    ),
    ("attn.@pattern", "output"): (
        (ShapeFormula("", ((1, "B"), (2, ""), (1, "S"), (1, "P+S")), "float32"),),
    ),
}
NAMES = ["", *dict.fromkeys(name for name, _ in SCAN if name and "@" not in name), "attn", "silent"]


def info(scan=SCAN) -> ModelInfo:
    modules = tuple(ModuleInfo(name, "M", 0) for name in NAMES)
    return ModelInfo("p", "M", Layout(), "float32", "sdpa", modules, scan, 0, (0,), (0,), 256, 512)


def planned(*hooks: HookSpec, B: int = 2, S: int = 5) -> Plan:
    return Planner(info()).plan(hooks, B, S)


# --- what lies where ------------------------------------------------------------------

some_hooks = st.lists(
    st.sampled_from(
        [HookSpec(n) for n in ("twice", "pair", "rows", "data", "odd", "nothing", "attn.@k", "**")]
    ),
    unique=True,
)


@given(some_hooks, st.integers(1, 5), st.integers(1, 2000))
@settings(max_examples=60, deadline=None)
def test_captures_start_on_pages_and_never_overlap(hooks, B, S):
    plan = planned(*hooks, B=B, S=S)
    end = 0
    for entry in plan.entries:
        assert entry.offset % PAGE == 0 and entry.offset >= end
        end = entry.offset + size_of(entry.shape, entry.formula.dtype)
    assert end <= plan.num_bytes and plan.num_bytes % PAGE == 0


@given(some_hooks, st.integers(1, 5), st.integers(1, 50))
@settings(max_examples=30, deadline=None)
def test_driver_and_engine_plan_alike(hooks, B, S):
    one, other = Planner(info()), Planner(info())
    other.plan([HookSpec("pair")], 3, 3)  # whatever was planned before
    assert one.plan(hooks, B, S) == other.plan(hooks, B, S)


def test_a_plan_is_made_once():
    planner = Planner(info())
    assert planner.plan([HookSpec("pair")], 2, 5) is planner.plan([HookSpec("pair")], 2, 5)


def test_every_run_has_the_logits():
    (only,) = planned().entries
    assert only.key == CaptureKey("logits", "", "output", "logits") and only.shape == (2, 5, WIDTH)


def test_large_logits_are_kept_for_the_last_position(monkeypatch):
    monkeypatch.setattr(planning, "LOGITS_BYTES", 2 * 5 * WIDTH * 4 - 1)
    plan = planned()
    assert plan.logits_last and plan.entries[0].shape == (2, 1, WIDTH)


def test_a_module_that_fires_twice_has_two_captures():
    found = [
        entry.key.call
        for entry in planned(HookSpec("twice")).entries
        if entry.key.module == "twice"
    ]
    assert found == [0, 1]


def test_what_never_fires_is_named():
    assert planned(HookSpec("silent"), HookSpec("pair")).silent == ("silent",)


def test_what_depends_on_the_data_or_holds_no_tensor_has_no_place():
    assert {e.key.module for e in planned(HookSpec("data"), HookSpec("nothing")).entries} == {""}


def test_an_index_names_a_leaf():
    entries = planned(HookSpec("pair"), HookSpec("pair", index="1")).entries
    assert [(e.key.index, e.formula.dtype) for e in entries[:2]] == [
        ("0", "float32"),
        ("1", "bfloat16"),
    ]


def test_an_unknown_index_names_those_that_are_there():
    with pytest.raises(HookError, match=r"pair output has no tensor at index '7'.*'0', '1'"):
        planned(HookSpec("pair", index="7"))
    with pytest.raises(HookError, match=r"\(root\) output.*'logit'.*\['logits'\]"):
        planned(HookSpec("", index="logit"))


def test_positions_are_kept_in_the_order_asked():
    (entry, _) = planned(HookSpec("pair", positions=(-1, 0, 0))).entries
    assert entry.shape == (2, 3, WIDTH)


def test_a_position_that_is_not_in_the_run_is_refused():
    for outside in (5, -6):
        with pytest.raises(HookError, match=f"position {outside}, but the run has 5"):
            planned(HookSpec("pair", positions=(0, outside)))


def test_positions_of_keys_and_patterns_are_kept_too():
    assert planned(HookSpec("attn.@k", positions=(-1,))).entries[0].shape == (2, 2, 1, 4)
    # of the queries
    assert planned(HookSpec("attn.@pattern", positions=(-1,))).entries[0].shape == (2, 2, 1, 5)


# --- files ----------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("FLEX_SLABS", str(tmp_path))
    return files.make_folder("here")


def mode(path: Path) -> int:
    return path.lstat().st_mode & 0o777


def test_folder_and_files_are_this_users_alone(folder):
    previous = os.umask(0)
    try:
        Slab(folder / "a.slab", PAGE)
        files.make_folder("other")
    finally:
        os.umask(previous)
    assert mode(folder) == mode(folder.parent) == mode(folder.parent / "other") == 0o700
    assert mode(folder / "a.slab") == 0o600


def test_a_folder_that_others_can_read_is_refused(folder):
    folder.parent.chmod(0o755)
    with pytest.raises(CaptureError, match=r"is not a private folder.*FLEX_SLABS"):
        files.make_folder("here")


def test_a_folder_that_leads_elsewhere_is_refused(tmp_path, folder):
    (folder.parent / "link").symlink_to(tmp_path)
    with pytest.raises(CaptureError, match="is not a private folder"):
        files.make_folder("link")


def test_a_file_in_the_place_of_the_folder_is_refused(folder):
    (folder.parent / "file").touch()
    with pytest.raises(CaptureError, match="is not a private folder"):
        files.make_folder("file")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_someone_else_is_refused(folder):
    os.chown(folder.parent, 12345, -1)
    with pytest.raises(CaptureError, match="is not a private folder"):
        files.make_folder("here")


def test_a_root_that_is_not_there_is_an_error_of_ours(tmp_path, monkeypatch):
    monkeypatch.setenv("FLEX_SLABS", str(tmp_path / "nowhere"))
    with pytest.raises(CaptureError, match=r"nowhere.*FLEX_SLABS"):
        files.make_folder("here")


def test_a_slab_through_a_link_is_refused(folder, tmp_path):
    (tmp_path / "target").touch()
    (folder / "a.slab").symlink_to(tmp_path / "target")
    with pytest.raises(OSError):
        Slab(folder / "a.slab", PAGE)
    assert (tmp_path / "target").stat().st_size == 0


def test_sweeping_takes_the_folder_and_may_be_done_twice(folder):
    Slab(folder / "a.slab", PAGE)
    files.remove_folder(folder)
    files.remove_folder(folder)
    assert not folder.exists()


@pytest.mark.slow
def test_a_folder_that_nobody_claims_any_more_is_swept(folder):
    """Who claimed it may have been killed: 64 MB and more of /dev/shm would stay for ever."""
    code = (
        "from flexkernel.memory import slab as s; import os; "
        "p, c = s.claim_folder('dead'); s.Slab(p / 'a.slab', 4096); os._exit(1)"
    )
    subprocess.run([sys.executable, "-c", code], timeout=60)
    assert (folder.parent / "dead" / "a.slab").exists()
    alive, claimed = files.claim_folder("alive")
    assert not (folder.parent / "dead").exists() and alive.exists()
    also, again = files.claim_folder("alive")
    claimed.close()
    files.claim_folder("other")[1].close()
    assert also == alive and alive.exists(), "a second process claims it still"
    again.close()
    files.claim_folder("another")[1].close()
    assert not alive.exists()


def test_a_folder_without_a_claim_in_it_is_left_to_whoever_makes_it(folder):
    files.claim_folder("other")[1].close()
    assert folder.exists()


def test_a_claim_survives_that_its_folder_is_swept_meanwhile(folder, monkeypatch):
    """Between making the folder and claiming it."""
    real, swept = files.make_folder, []

    def made(name, root=None):
        path = real(name, root)
        if not swept:
            swept.append(files.remove_folder(path))
        return path

    monkeypatch.setattr(files, "make_folder", made)
    path, lock = files.claim_folder("late")
    assert swept and path.exists() and mode(path / files.LOCK) == 0o600
    lock.close()


def test_a_reader_finds_no_slab_where_none_is(folder):
    """Making one would show zeros in the place of an activation."""
    with pytest.raises(CaptureExpired, match=r"a\.slab is gone"):
        Slab(folder / "a.slab", PAGE, create=False)
    assert not (folder / "a.slab").exists()


def test_a_slab_that_was_removed_is_said_to_be_gone_and_leaves_no_count(folder):
    slab, freed = Slab(folder / "a.slab", PAGE), []
    files.remove_folder(folder)
    with pytest.raises(CaptureExpired, match=r"a\.slab is gone"):
        slab.private(Region("a.slab", 0, (4,), "float32"), lambda: freed.append(1))
    assert freed == [1]


def test_a_pool_makes_slabs_no_larger_than_it_is_told_to():
    """Where /dev/shm has 64 MB, as in many containers, a slab of 64 MB would never fit."""
    pool = Pool("p", smallest=4 * PAGE)
    assert pool.lease(PAGE).slab_bytes == 4 * PAGE and pool.lease(5 * PAGE).slab_bytes == 8 * PAGE


# --- maps -----------------------------------------------------------------------------

DTYPES = ["float32", "bfloat16", "float16", "bool", "int64", "uint8", "float64", "complex64"]


def put(slab: Slab, region: Region) -> torch.Tensor:
    torch.manual_seed(0)
    value = (torch.randn(region.shape) * 100).to(getattr(torch, region.dtype))
    slab.tensor(region).copy_(value)
    return value


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 5), (), (1,), (4, 1025)])
def test_two_maps_of_a_file_see_the_same_numbers(dtype, shape, folder):
    region = Region("a.slab", PAGE, shape, dtype)
    writer, reader = (Slab(folder / "a.slab", 8 * PAGE + (1 << 16)) for _ in range(2))
    value = put(writer, region)
    for seen in (reader.tensor(region), reader.private(region, print)):
        assert seen.dtype == value.dtype and torch.equal(seen, value)


@pytest.mark.parametrize("shape", [(0,), (2, 0, 3)])
def test_a_tensor_of_nothing_is_a_tensor_and_is_counted_off_at_once(shape, folder):
    freed = []
    seen = Slab(folder / "a.slab", PAGE).private(
        Region("a.slab", PAGE, shape, "float32"), lambda: freed.append(1)
    )
    assert seen.shape == shape and freed == [1]


def test_a_private_write_is_seen_by_nobody_else(folder):
    slab, region = Slab(folder / "a.slab", PAGE), Region("a.slab", 0, (4,), "float32")
    value = put(slab, region)
    mine, second = slab.private(region, int), slab.private(region, int)
    mine.zero_()
    assert torch.equal(second, value) and torch.equal(slab.private(region, int), value)
    assert torch.equal(slab.tensor(region), value) and torch.equal(
        Slab(folder / "a.slab", PAGE).tensor(region), value
    )


def test_a_private_map_ends_with_its_region(folder):
    slab = Slab(folder / "a.slab", 4 * PAGE)
    mine = slab.private(Region("a.slab", PAGE, (3,), "float32"), int)
    assert mine.untyped_storage().nbytes() <= PAGE


def test_freed_is_called_when_the_last_tensor_of_a_map_dies(folder):
    slab, freed = Slab(folder / "a.slab", PAGE), []
    whole = slab.private(Region("a.slab", 0, (4, 4), "float32"), lambda: freed.append(1))
    row, array, flat = whole[1], whole.numpy(), whole.view(-1).detach()
    del whole, row, array
    gc.collect()
    assert freed == []
    del flat
    gc.collect()
    assert freed == [1]


FULL = """
import pathlib, sys, torch
from flexkernel.errors import MemoryBudgetError
from flexkernel.memory.slab import Slab, make_folder
folder = make_folder("here")
first = Slab(folder / "first.slab", 1 << 20)
try:
    Slab(folder / "second.slab", 4 << 20)
except MemoryBudgetError as error:
    print("refused", error)
first.bytes.fill_(7)
small = Slab(folder / "third.slab", 1 << 19)  # what the refused one took is given back
small.bytes.fill_(9)
print("sum", int(first.bytes.sum()) // 7, int(small.bytes.sum()) // 9)
"""


@pytest.fixture
def two_megabytes(tmp_path):
    """A tmpfs of 2 MB; only root can make one."""
    where = tmp_path / "small"
    where.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", where], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("needs to mount a tmpfs")
    yield where
    subprocess.run(["umount", "-l", where], check=True)


@pytest.mark.slow
def test_a_full_tmpfs_is_refused_and_kills_nobody(two_megabytes):
    env = {**os.environ, "FLEX_SLABS": str(two_megabytes)}
    run = subprocess.run(
        [sys.executable, "-c", FULL], env=env, capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 0, run.stderr  # a SIGBUS would be -7
    assert (
        "refused a slab of 4,194,304 bytes does not fit" in run.stdout
        and "FLEX_SLABS" in run.stdout
    )
    assert f"sum {1 << 20} {1 << 19}" in run.stdout


# --- the pool -------------------------------------------------------------------------


def inside(pool: Pool) -> list[tuple[str, int, int]]:
    return sorted(
        (e.slab, e.base, e.base + e.num_bytes)
        for extents in pool._extents.values()
        for e in extents
    )


def test_runs_share_a_slab_until_it_is_full():
    pool = Pool("p")
    first, second, third = (pool.lease(n) for n in (100, 5 * PAGE, SLAB_BYTES))
    assert first.slab == second.slab != third.slab
    assert (first.base, second.base, third.base) == (0, PAGE, 0)


def test_an_extent_comes_back_when_its_run_lets_go():
    pool = Pool("p")
    first = pool.lease(100)
    pool.lease(100)
    pool.release(first)
    again = pool.lease(100)
    assert (again.slab, again.base) == (first.slab, first.base)


def test_an_extent_is_not_used_again_while_a_tensor_of_it_is_alive(folder):
    pool = Pool("p")
    extent = pool.lease(PAGE)
    slab = Slab(folder / extent.slab, extent.slab_bytes)
    region = Region(extent.slab, extent.base, (4,), "float32")
    value = put(slab, region)
    held = slab.private(region, extent.pin())[1:]
    pool.release(extent)
    other = pool.lease(PAGE)
    assert other.base != extent.base and torch.equal(held, value[1:])
    del held
    gc.collect()
    assert pool.lease(PAGE).base == extent.base


def test_a_released_extent_waits_for_every_tensor():
    pool = Pool("p")
    extent = pool.lease(PAGE)
    died = [extent.pin() for _ in range(3)]
    pool.release(extent)
    for one in died:
        assert pool.lease(PAGE).base != extent.base
        one()
    assert pool.lease(PAGE).base == extent.base


def test_an_extent_is_kept_by_its_run_although_its_tensors_died():
    pool = Pool("p")
    extent = pool.lease(PAGE)
    extent.pin()()
    assert pool.lease(PAGE).base != extent.base


def test_an_adopted_extent_is_taken():
    pool = Pool("p")
    pool.adopt(Extent("old.slab", 4 * PAGE, 0, PAGE))
    assert pool.lease(PAGE).base == PAGE and pool.num_bytes == 2 * PAGE


def test_a_slab_that_could_not_be_made_is_not_offered_again():
    """Else every later run would be sent to a file that does not fit, however small the run is."""
    pool = Pool("p")
    large = pool.lease(3 * SLAB_BYTES)
    pool.abandon(large)
    assert pool.lease(PAGE).slab_bytes == SLAB_BYTES and large.slab not in pool.slabs


def test_a_slab_with_other_runs_in_it_survives_a_failure():
    pool = Pool("p")
    kept, failed = pool.lease(PAGE), pool.lease(PAGE)
    pool.abandon(failed)
    assert pool.slabs == {kept.slab: kept.slab_bytes} and pool.lease(PAGE).base == PAGE


sizes = st.integers(0, 3 * SLAB_BYTES // 2)


@given(st.lists(st.tuples(sizes, st.booleans(), st.booleans()), max_size=25))
@settings(deadline=None)
def test_whatever_comes_and_goes_no_two_live_extents_overlap(steps):
    pool, live, watched = Pool("p"), [], []
    for num_bytes, looks, goes in steps:
        extent = pool.lease(num_bytes)
        assert extent.num_bytes >= max(num_bytes, 1) and extent.base % PAGE == 0
        assert extent.base + extent.num_bytes <= extent.slab_bytes == pool.slabs[extent.slab]
        if looks:
            watched.append(extent.pin())
        live.append(extent)
        if goes:
            pool.release(live.pop(0))
        elif watched:
            watched.pop(0)()
        found = inside(pool)
        assert all(a[0] != b[0] or a[2] <= b[1] for a, b in itertools.pairwise(found))


@given(st.lists(st.integers(1, 6), max_size=6), st.integers(1, 8), st.integers(0, 4))
def test_a_gap_is_found_if_there_is_one(lengths, need, space):
    """Extents with gaps between them, at every other place."""
    extents, base = [], 0
    for i, length in enumerate(lengths):
        base += i % 3
        extents.append(Extent("s", 0, base, length))
        base += length
    found = first_gap(extents, need, base + space)
    taken = {b for e in extents for b in range(e.base, e.base + e.num_bytes)}
    fits = [b for b in range(base + space - need + 1) if not taken & set(range(b, b + need))]
    assert found == (min(fits) if fits else None)


def test_bytes_are_rounded_to_pages():
    assert [pages(n) for n in (0, 1, PAGE, PAGE + 1)] == [0, PAGE, PAGE, 2 * PAGE]
