"""The model as the driver puts it together from what each rank says of its part."""

from __future__ import annotations

import dataclasses

import pytest

from flexkernel.errors import HookError, LayoutError, LoadError
from flexkernel.session.model import (
    check_degrees,
    check_sharded,
    check_stop,
    fitted,
    merged,
    source,
)
from flexkernel.wire import Layout, ModelInfo, ModuleInfo, ShapeFormula, Source

NAMES = ("", "model", "model.embed", "model.layers", "model.layers.0", "model.layers.1", "head")


def info(layout: Layout, names=NAMES, num_parameters: int = 100, scan=None) -> ModelInfo:
    modules = tuple(ModuleInfo(name, "M", 1) for name in names)
    return ModelInfo(
        "p", "Llama", layout, "float32", "sdpa", modules, scan or {}, num_parameters, (), (), 9, 9
    )


def part(*names: str, parameters: int = 50) -> tuple[list[ModuleInfo], int, int]:
    return [ModuleInfo(name, "M", 1) for name in names], parameters, 4 * parameters


# --- degrees --------------------------------------------------------------------------


class Engines:
    """So many engines, over which a model can have these layouts."""

    def __init__(self, size: int, *fits: Layout):
        self.size = size
        self.fits = fits

    def call(self, method: str, path: str, world: int) -> list:
        assert (method, path, world) == ("possible_layouts", "a-model", self.size)
        return [self.fits] + [None] * (self.size - 1)


FOLDER = Source("a-model")
BUILDER = Source("build", b"code")


def test_degrees_that_multiply_to_the_engines_are_taken_as_they_are():
    layout = Layout(pp=2, tp=3)
    assert fitted(Engines(6), FOLDER, layout) is layout
    assert fitted(Engines(1), FOLDER, Layout()) == Layout()


def test_without_a_degree_the_model_is_split_as_it_can_be():
    assert fitted(Engines(2, Layout(pp=2), Layout(fsdp=2)), FOLDER, Layout()) == Layout(pp=2)


def test_other_degrees_are_refused_with_those_that_the_model_can_have():
    makes = r"pp=2 × tp=3 makes 6 ranks, the cluster has 4 engines.*multiply to 4, "
    with pytest.raises(LayoutError, match=f"{makes}this model can have pp=4 or dp=4"):
        fitted(Engines(4, Layout(pp=4), Layout(dp=4)), FOLDER, Layout(pp=2, tp=3))
    with pytest.raises(LayoutError, match=f"{makes}for instance pp=4 or tp=4"):
        fitted(Engines(4), BUILDER, Layout(pp=2, tp=3))
    with pytest.raises(LayoutError, match="no degree makes 1 rank, the cluster has 2 engines"):
        fitted(Engines(2), BUILDER, Layout())
    one = r"tp=2 makes 2 ranks, the cluster has 1 engine: .*leave them out"
    with pytest.raises(LayoutError, match=one):
        fitted(Engines(1), FOLDER, Layout(tp=2))


@pytest.mark.parametrize("degree", [0, -1, 1.5, "2", None])
def test_a_degree_is_a_whole_number_from_one(degree):
    with pytest.raises(LayoutError, match=f"dp={degree!r} is not a degree"):
        check_degrees(Layout(dp=degree))


# --- sources --------------------------------------------------------------------------


def test_a_source_is_a_folder_or_a_builder(tmp_path):
    assert source(tmp_path, None).path == str(tmp_path)
    assert not source("~/x", None).path.startswith("~")
    assert source("owner/name", None).path == "owner/name"
    built = source(info, lambda function: function.__name__.encode(), reference=check_degrees)
    assert (built.path, built.builder, built.reference) == ("info", b"info", b"check_degrees")


@pytest.mark.parametrize("what", [3, None, ["a"], b"path"])
def test_anything_else_is_no_source(what):
    with pytest.raises(
        LoadError,
        match=f"a folder, a hub id or a function that builds it; found {type(what).__name__}",
    ):
        source(what, None)


# --- stages ---------------------------------------------------------------------------

TWO_STAGES = Layout(pp=2)


def stages(*parts, layout=TWO_STAGES) -> dict[str, tuple[tuple[int, ...], bool]]:
    return {m.name: (m.stages, m.spans) for m in merged(info(layout), parts).modules}


def test_each_module_knows_its_stages_and_containers_that_they_span():
    shared = ("", "model", "model.layers")
    found = stages(
        part(*shared, "model.embed", "model.layers.0"), part(*shared, "model.layers.1", "head")
    )
    assert found["model.embed"] == ((0,), False) and found["model.layers.1"] == ((1,), False)
    assert (
        found["model"] == ((0, 1), True)
        and found["model.layers"] == ((0, 1), True)
        and found[""] == ((0, 1), True)
    )


def test_a_module_on_both_stages_with_nothing_apart_beneath_it_does_not_span():
    names = ("", "rotary", "rotary.inner")
    layout = Layout(pp=2)
    found = merged(info(layout, names), [part(*names), part(*names)]).modules
    assert all(m.stages == (0, 1) and not m.spans for m in found)


def test_tp_ranks_are_of_one_stage():
    assert stages(part(*NAMES), part(*NAMES), layout=Layout(tp=2))["head"] == ((0,), False)


def test_what_each_rank_holds_is_kept_by_rank():
    found = merged(info(Layout(tp=2)), [part(*NAMES, parameters=60), part(*NAMES, parameters=55)])
    assert (found.rank_parameters, found.rank_bytes) == ((60, 55), (240, 220))


def test_a_module_that_no_rank_holds_or_nobody_expects_is_refused():
    with pytest.raises(LoadError, match=r"1 missing \['head'\], 0 unknown"):
        merged(info(Layout()), [part(*NAMES[:-1])])
    with pytest.raises(LoadError, match=r"0 missing \[\], 1 unknown \['extra'\]"):
        merged(info(Layout()), [part(*NAMES, "extra")])


def test_a_builder_may_have_modules_beside_those_of_the_unsharded_model():
    found = merged(info(Layout()), [part(*NAMES, "wrapper")], foreign=True)
    assert [m.name for m in found.modules] == [*NAMES, "wrapper"]


def test_a_builder_may_leave_out_containers_but_nothing_that_has_parameters():
    unsharded = dataclasses.replace(
        info(Layout(), scan={("model", "output"): OUT}), parameters={"head.weight": (2, 2)}
    )
    found = merged(unsharded, [part(*(n for n in NAMES if n != "model"))], foreign=True)
    assert "model" not in found.names and "head" in found.names and found.scan == {}
    with pytest.raises(
        LoadError, match=r"no rank .* model has head; what it has .* not: heads\. If .*names="
    ):
        merged(unsharded, [part(*NAMES[:-1], "heads", "wrapper")], foreign=True)


# --- really sharded -------------------------------------------------------------------


@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(pp=2), Layout(fsdp=2)])
def test_a_load_that_did_not_shard_is_an_error(layout):
    whole = merged(info(layout), [part(*NAMES, parameters=100)] * 2)
    with pytest.raises(
        LoadError, match=f"loaded as {layout}, but every rank holds all 100 parameters"
    ):
        check_sharded(whole)
    check_sharded(merged(info(layout), [part(*NAMES, parameters=50)] * 2))


def test_copies_over_dp_are_meant():
    check_sharded(merged(info(Layout(dp=2)), [part(*NAMES, parameters=100)] * 2))


# --- stopping -------------------------------------------------------------------------

OUT = ((ShapeFormula("", ((1, "B"),), "float32"),),)


def test_a_run_stops_at_one_module_that_fires():
    fires = info(Layout(), scan={("model.layers.0", "output"): OUT})
    check_stop(fires, "model.layers.0")
    for name, says in (
        ("model.layers.*", "no module matches 'model.layers.*'"),
        ("model.layers.0.@q", "no module matches"),
        ("model.layer.0", "nearest: model.layers.0"),
        ("model.layers", "stop_at='model.layers' never fires in a forward"),
    ):
        with pytest.raises(HookError) as caught:
            check_stop(fires, name)
        assert says in str(caught.value)


def test_without_a_scan_any_module_may_be_stopped_at():
    check_stop(info(Layout()), "model.layers")
