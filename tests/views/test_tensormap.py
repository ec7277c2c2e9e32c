"""The tensor map without a browser: what it answers, what it says, what it leaves in a saved
notebook."""

from __future__ import annotations

import base64
import gc
import math
import re
import threading
import weakref
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
import torch

from flexkernel import views as widgets
from flexkernel.errors import CaptureExpired
from flexkernel.views import freeze_all, tensor_map, tensormap
from flexkernel.views.messages import TILE_PIXELS, VALUES
from flexkernel.views.tensormap import ESM
from flexkernel.views.tile import fitting, number
from tests.support.sources import FarSource, Source


class Fleeting(Source):
    """A capture whose run gives its memory back."""

    gone = False

    def tensor(self) -> torch.Tensor:
        if self.gone:
            raise CaptureExpired("the run was freed; run.keep() keeps it")
        return super().tensor()


class Wire:
    """Asks a map as its browser would, and keeps what it answers."""

    def __init__(self, view: Any, monkeypatch: pytest.MonkeyPatch):
        self.view, self.answers, self.seq = view, [], 0
        monkeypatch.setattr(
            view,
            "send",
            lambda content, buffers=None: self.answers.append((content, buffers or [])),
        )

    def ask(self, kind: str = "view", **asked: Any) -> tuple[dict[str, Any], list[bytes]]:
        self.seq += 1
        rows, cols = self.view.info["size"]
        whole = {
            "rows": [0, rows],
            "cols": [0, cols],
            "size": [300, 600],
            "ticks": [20, 9],
            "how": "extreme",
        }
        self.view._handle_custom_msg(
            {"kind": kind, "view": "me", "seq": self.seq, **whole, **asked}, []
        )
        return self.answers[-1]


@pytest.fixture
def wire(monkeypatch):
    return lambda view: Wire(view, monkeypatch)


def indices(content: dict[str, Any], buffers: list[bytes]) -> np.ndarray:
    return np.frombuffer(buffers[0], np.uint8).reshape(content["size"])


def test_a_view_is_answered_with_pixels_and_all_that_explains_them(wire):
    x = torch.randn(600, 900)
    x[100, 200], x[5] = 50.0, math.nan
    content, buffers = wire(tensor_map(x)).ask(seq=7)
    assert (content["kind"], content["view"], content["seq"]) == ("tile", "me", 7)
    assert content["cells"] == (2, 2)
    pixels = indices(content, buffers)
    assert pixels.shape == (300, 450)
    assert pixels[50, 100] == 255
    assert len(buffers) == 1
    lo, hi = content["range"]
    assert lo == -hi and 2 < hi < 6
    assert re.fullmatch(
        r"signed extreme of 2×2 cells/pixel · range ±\S+, \d+ pixels beyond · 900 NaN",
        content["says"],
    )
    assert len(content["ticks"][0]) <= 20 and len(content["ticks"][1]) <= 9


def test_native_cells_bring_their_values_and_their_rows_names(wire):
    x = torch.randn(3, 5, 40)
    content, buffers = wire(tensor_map(x)).ask()
    assert content["says"].startswith("one pixel is one cell")
    values = np.frombuffer(buffers[1], np.float32).reshape(15, 40)
    assert np.array_equal(values, x.reshape(15, 40).numpy())
    assert content["names"][6] == "[1, 1], "


def test_no_answer_is_larger_than_a_view_may_be(wire):
    x = torch.randn(1500, 2500)
    for size in ([4000, 4000], [1, 10**9], [380, 900]):
        content, buffers = wire(tensor_map(x)).ask(size=size)
        assert sum(map(len, buffers)) <= TILE_PIXELS * 1.02
    tokens = [["<|a long token of no use|>"] * 1500]
    content, buffers = wire(tensor_map(Source(x, tokens=tokens))).ask(rows=[0, 500], cols=[0, 500])
    assert sum(map(len, buffers)) + len(str(content)) < 400_000
    content, buffers = wire(tensor_map(x)).ask(rows=[0, 91], cols=[0, 90])
    assert len(buffers) == 2 and len(buffers[1]) <= 4 * VALUES


def test_the_esm_is_small_and_asks_nobody_else():
    assert len(ESM.encode()) <= 30_000
    assert not re.search(r"https?://|\bimport\b|fetch\(|innerHTML|eval\(", ESM)


def test_a_hot_cell_is_seen_at_every_zoom(wire):
    x = torch.zeros(4096, 16384)
    x[1234, 4321] = 3.0
    link = wire(tensor_map(x))
    span_r, span_c = [0, 4096], [0, 16384]
    for _ in range(8):
        content, buffers = link.ask(rows=span_r, cols=span_c)
        assert (indices(content, buffers) == 255).sum() == 1, content["cells"]
        span_r = [1234 - (1234 - span_r[0]) // 2, 1234 + (span_r[1] - 1234) // 2 + 1]
        span_c = [4321 - (4321 - span_c[0]) // 2, 4321 + (span_c[1] - 4321) // 2 + 1]


def test_panning_keeps_the_blocks_where_they_are(wire):
    link = wire(tensor_map(torch.randn(2000, 3000)))
    one, pixels = link.ask(rows=[200, 1400], cols=[600, 1800], size=[100, 100])
    other, moved = link.ask(rows=[207, 1407], cols=[601, 1801], size=[100, 100])
    assert one["cells"] == other["cells"] == (12, 12)
    assert one["rows"][0] % 12 == other["rows"][0] % 12 == 0
    shift = (other["rows"][0] - one["rows"][0]) // 12, (other["cols"][0] - one["cols"][0]) // 12
    a, b = indices(one, pixels), indices(other, moved)
    h, w = min(a.shape[0] - shift[0], b.shape[0]), min(a.shape[1] - shift[1], b.shape[1])
    assert np.array_equal(a[shift[0] : shift[0] + h, shift[1] : shift[1] + w], b[:h, :w])


def test_the_range_stays_the_same_when_zooming_until_one_asks_to_fit_it(wire):
    x = torch.randn(500, 800) * 0.01
    x[:10] = torch.randn(10, 800)
    link = wire(tensor_map(x))
    whole, _ = link.ask()
    zoomed, _ = link.ask(rows=[100, 200], cols=[0, 100])
    assert zoomed["range"] == whole["range"]
    fitted, _ = link.ask(rows=[100, 200], cols=[0, 100], range="view")
    assert fitted["range"][1] < whole["range"][1] / 5
    kept, _ = link.ask(rows=[0, 50], cols=[0, 100], range=list(fitted["range"]))
    assert kept["range"] == fitted["range"]
    assert "pixels beyond" in kept["says"]


@pytest.mark.parametrize("how", ["extreme", "mean", "max", "min", "std"])
def test_every_reduction_says_itself_and_has_its_own_range(wire, how):
    link = wire(tensor_map(torch.randn(900, 900)))
    content, _ = link.ask(how=how)
    assert content["how"] == how and how in content["says"]
    assert content["signed"] == (how != "std")
    lo, hi = content["range"]
    assert lo < hi and (lo == -hi or how == "std")


def test_values_that_are_never_negative_get_the_unsigned_map(wire):
    content, _ = wire(tensor_map(torch.rand(50, 60).softmax(-1))).ask()
    assert not content["signed"]
    assert content["range"][0] == 0.0 or content["range"][0] > 0
    small_negative = torch.rand(500, 600)
    small_negative[7, 7] = -0.01  # hidden behind larger neighbours in every tile, and still known
    content, _ = wire(tensor_map(small_negative)).ask(size=[10, 10])
    assert content["signed"]


def test_a_question_that_makes_no_sense_gets_an_error_and_the_next_an_answer(wire):
    link = wire(tensor_map(torch.randn(5, 6)))
    content, _ = link.ask(how="median")
    assert content["kind"] == "error" and "no reduction 'median'" in content["text"]
    assert content["seq"] == 1
    content, _ = link.ask(rows="nonsense")
    assert content["kind"] == "error"
    assert link.ask()[0]["kind"] == "tile"


def test_a_probe_names_the_cell_behind_a_pixel(wire):
    x = torch.zeros(2, 100, 200)
    x[1, 50, 60] = -7.25
    link = wire(tensor_map(Source(x, tokens=[["a"] * 100, ["b"] * 100])))
    content, _ = link.ask("probe", rows=[140, 160], cols=[50, 70])
    assert (
        content["text"]
        == "rows 140–159, columns 50–69: signed extreme -7.25 at [1, 50] b, column 60"
    )
    content, _ = link.ask("probe", rows=[150, 151], cols=[60, 61])
    assert content["text"] == "[1, 50] b, column 60: -7.25"


def test_probes_are_exact_where_fp32_is_not(wire):
    x = torch.full((3, 4), 2**53 + 2, dtype=torch.int64)
    assert (
        wire(tensor_map(x)).ask("probe", rows=[1, 2], cols=[2, 3])[0]["text"]
        == f"row 1, column 2: {2**53 + 2}"
    )


def test_a_source_elsewhere_is_asked_for_tiles_and_never_for_itself(wire):
    x = torch.randn(2, 300, 700)
    x[1, 200, 600] = 99.0
    far, near = tensor_map(FarSource(x)), tensor_map(x)
    (_, pixels), (_, want) = wire(far).ask(), wire(near).ask()
    assert np.array_equal(pixels[0], want[0])
    assert "99 at [1, 200], column 600" in repr(far)
    assert "column 600: 99" in wire(far).ask("probe", rows=[500, 501], cols=[600, 601])[0]["text"]


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool]
)
def test_every_dtype_is_drawn(wire, dtype):
    x = (torch.rand(40, 50) * 3).to(dtype)
    content, _ = wire(tensor_map(x)).ask()
    assert content["kind"] == "tile", content
    assert str(dtype).removeprefix("torch.") in repr(tensor_map(x))


def test_extremes_of_shape_and_value_are_drawn(wire):
    for x in (
        torch.randn(7),
        torch.randn(1, 1),
        torch.zeros(4, 4),
        torch.full((4, 4), math.nan),
        torch.full((4, 4), -math.inf),
        torch.tensor([[3.4e38, -3.4e38]]),
        torch.randn(2, 0 + 3, 4, 5),
        torch.randn(30, 20).t(),
        torch.randn(3, 4, requires_grad=True),
    ):
        view = tensor_map(x)
        assert wire(view).ask()[0]["kind"] == "tile"
        assert "image/png" in view._repr_mimebundle_()[0]


def test_what_has_no_cells_is_text():
    assert list(tensor_map(torch.tensor(2.5), title="loss")._repr_mimebundle_()[0]) == [
        "text/plain"
    ]
    assert repr(tensor_map(torch.tensor(2.5), title="loss")) == "loss () float32: 2.5"
    assert (
        repr(tensor_map(torch.zeros(0, 4))) == "tensor (0, 4) float32: no elements, nothing to draw"
    )


def test_the_part_to_open_at_is_what_the_picture_shows():
    view = tensor_map(torch.randn(100, 200), rows=(10, 30), cols=slice(-50, None))
    assert view.window == ((10, 30), (150, 200))
    assert view.to_tensor().shape == (20, 50)
    with pytest.raises(ValueError, match=r"\(200, 300\) holds none of 100"):
        tensor_map(torch.randn(100, 200), rows=(200, 300))


# --- the static copy


class Allowed(HTMLParser):
    """Collects tags and attributes, to show that nothing is there that a sanitiser would take
    out."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.names, self.text = set(), set(), ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.names |= {name for name, _ in attrs}

    def handle_data(self, data):
        self.text += data


def test_the_bundle_has_four_ways_to_be_shown():
    x = torch.randn(1, 4, 64)
    x[0, 2, 7] = -30.0
    tokens = [["<s>", "</think>", "<script>alert(1)</script>", "\n"]]
    view = tensor_map(Source(x, tokens=tokens))
    data, metadata = view._repr_mimebundle_()
    assert list(data) == [
        "application/vnd.jupyter.widget-view+json",
        "text/plain",
        "text/html",
        "image/png",
    ]
    assert base64.b64decode(data["image/png"]).startswith(b"\x89PNG")
    assert metadata["image/png"]["width"] > 300
    page = Allowed(data["text/html"])
    assert page.tags <= {"figure", "img", "figcaption", "table", "tr", "td", "bdi", "div"}
    assert page.names <= {"style", "src", "alt"}
    assert "-30 at [0, 2] <script>alert(1)</script>, column 7" in page.text
    assert "model.layers.3.mlp  (1, 4, 64) float32" in data["text/plain"]
    assert "-30 at [0, 2] <script>" in data["text/plain"]
    assert "evidence: plan" in data["text/plain"]


def test_a_first_picture_of_pure_noise_costs_less_than_a_view_may(wire):
    view = tensor_map(torch.randn(1024, 4096))
    data, _ = view._repr_mimebundle_()
    _, buffers = wire(view).ask(size=[380, 900])
    assert len(str(data)) + len(ESM) + len(buffers[0]) < 400_000


def test_largest_elements_are_the_largest_there_are():
    x = torch.randn(300, 500)
    x[0, 0], x[0, 1], x[299, 499] = 9.0, -8.0, 7.0  # two of them behind one pixel
    assert (
        "farthest from zero: 9 at row 0, column 0, -8 at row 0, column 1, 7 at row 299, column 499"
        in repr(tensor_map(x))
    )


def test_freezing_keeps_what_was_on_screen_and_lets_the_tensor_go(wire):
    view = tensor_map(torch.randn(400, 500))
    link = wire(view)
    link.ask(rows=[0, 400], cols=[0, 450], how="max")
    assert view.freeze() is view and view.frozen
    data, _ = view._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" not in data
    assert data["text/plain"].splitlines()[1].startswith("max of")
    assert view._grid.source is None
    assert link.answers[-1][0]["kind"] == "frozen"
    assert link.ask()[0] == {"kind": "frozen", "text": "frozen"}
    with pytest.raises(CaptureExpired, match="this map is frozen"):
        view.to_tensor()


def test_freeze_all_freezes_every_live_map():
    one, other = tensor_map(torch.randn(4, 5)), tensor_map(torch.randn(4, 5))
    frozen = freeze_all()
    assert {one, other} <= set(frozen)
    assert one.frozen and other.frozen
    assert freeze_all() == []


def test_only_the_newest_maps_stay_live_so_that_a_cell_can_run_a_thousand_times(monkeypatch):
    freeze_all()
    monkeypatch.setattr(tensormap, "MAX_LIVE", 3)
    views = [tensor_map(torch.randn(4, 5)) for _ in range(5)]
    assert [view.frozen for view in views] == [True, True, False, False, False]
    assert "only the last 3 maps stay live" in repr(views[0])
    held = weakref.ref(views[1])
    del views[1]
    gc.collect()
    assert held() is None  # ipywidgets has let it go too


def test_a_capture_that_expires_freezes_the_map_with_the_reason(wire):
    source = Fleeting(torch.randn(50, 60))
    view = tensor_map(source)
    before, _ = view._repr_mimebundle_()
    link = wire(view)
    source.gone = True
    content, _ = link.ask(rows=[0, 9])
    assert content["kind"] == "frozen" and "the run was freed; run.keep()" in content["text"]
    data, _ = view._repr_mimebundle_()
    assert data["image/png"] == before["image/png"]
    assert "the run was freed" in data["text/html"] and "the run was freed" in data["text/plain"]


def test_a_capture_that_expired_before_it_was_drawn_says_so():
    source = Fleeting(torch.randn(5, 6))
    view = tensor_map(source)
    source.gone = True
    assert "the run was freed" in repr(view)
    assert list(view._repr_mimebundle_()[0]) == ["text/plain"]


def test_questions_from_several_threads_are_answered_one_by_one(wire):
    view = tensor_map(torch.randn(500, 700))
    link = wire(view)
    threads = [
        threading.Thread(target=link.ask, kwargs={"how": how})
        for how in ("extreme", "mean", "max", "std") * 3
    ]
    for thread in threads:
        thread.start()
    view._repr_mimebundle_()
    for thread in threads:
        thread.join()
    assert [content["kind"] for content, _ in link.answers] == ["tile"] * 12


def test_show_finds_a_view_by_name():
    assert isinstance(widgets.show(torch.randn(3, 4), "map", title="x"), widgets.TensorMap)
    with pytest.raises(ValueError, match="there is no view 'mpa'; views: map"):
        widgets.show(torch.randn(3, 4), "mpa")


def test_a_fitted_range_is_symmetric_where_the_whole_has_negatives():
    assert fitting(torch.tensor([1.0, 2.0]), 0.0) == (-2.0, 2.0)
    assert number(-0.0) == "0" and number(12345.6) == "1.23e+04"


# --- a centre, and labels of one's own


def test_colours_diverge_from_the_centre_that_a_source_has(wire):
    x = torch.full((4, 6), 6.0)
    x[1, 2], x[3, 5] = 0.5, 7.0
    view = tensor_map(Source(x, centre=6.0))
    content, buffers = wire(view).ask()
    assert content["signed"] and content["range"] == (0.5, 11.5), "no finding is cut off"
    pixels = indices(content, buffers)
    assert pixels[0, 0] == 128 and pixels[1, 2] == 1 and 128 < pixels[3, 5] < 255
    assert "range 6 ± 5.5" in repr(view) and "farthest from 6: 0.5 at row 1" in repr(view)


def test_a_pixel_of_several_cells_is_the_one_farthest_from_the_centre(wire):
    x = torch.full((600, 900), 6.0)
    x[100, 200] = -1.0
    view = tensor_map(Source(x, centre=6.0))
    content, buffers = wire(view).ask()
    assert content["cells"] == (2, 2)
    pixels = indices(content, buffers)
    assert pixels[50, 100] == 1 and (pixels == 128).sum() == pixels.size - 1
    text = wire(view).ask("probe", rows=[100, 102], cols=[200, 202])[0]["text"]
    assert text.endswith("signed extreme -1 at row 100, column 200")


def test_a_tensor_of_ones_own_takes_labels_for_its_columns_and_rows(wire):
    x = torch.zeros(2, 3)
    x[1, 2] = 5.0
    view = tensor_map(x, x=["<s>", " a", "\n"], y=["query", 7])
    assert "5 at row 1 7, ↵" in repr(view)
    content, _ = wire(view).ask()
    assert content["columns"] == ["<s>", "·a", "↵"]
    assert content["names"] == ["row 0 query, ", "row 1 7, "]
    assert [label for _, label in content["ticks"][1]] == ["<s>", "·a", "↵"]
    text = wire(view).ask("probe", rows=[1, 2], cols=[2, 3])[0]["text"]
    assert text == "row 1 7, ↵: 5"


def test_labels_are_as_many_as_cells():
    with pytest.raises(ValueError, match="x= has 2 labels; the tensor has 3 columns"):
        tensor_map(torch.zeros(2, 3), x=["a", "b"])
    with pytest.raises(ValueError, match="y= has 3 labels; the tensor has 2 rows"):
        tensor_map(torch.zeros(2, 3), y="abc")
