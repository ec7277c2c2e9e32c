"""Views in real Chromium: what is drawn, what travels, what is left when the kernel is gone."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch

from flexkernel.errors import CaptureExpired
from flexkernel.views import ModelTree, ModuleRow, tensor_map
from flexkernel.views.tensormap import ESM
from tests.support.chromium import (
    HOW_TO_GET,
    KERNEL,
    Bridge,
    Traffic,
    bridged,
    chromium,
    command,
    execute,
    open_browser,
    open_lab,
    open_page,
)
from tests.support.sources import Source

pytestmark = pytest.mark.browser

ROWS, COLS, HOT = 4096, 16384, (1234, 4321)
MAX_VIEW = 400_000  # bytes
RED = """() => {
  const canvas = document.querySelector(".fk-plot canvas");
  const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  let red = 0, painted = 0;
  for (let i = 0; i < data.length; i += 4) {
    painted += data[i + 3] === 255;
    red += data[i] > 120 && data[i + 1] < 40 && data[i + 2] < 60;
  }
  return { red, share: painted / (data.length / 4) };
}"""


@pytest.fixture(scope="module")
def browser():
    with open_browser() as running:
        yield running


@pytest.fixture
def page(browser):
    with open_page(browser) as opened:
        yield opened


@pytest.fixture
def bridge(page):
    with bridged(page) as wire:
        yield wire


def drawn(page: Any, count: int = 1) -> None:
    page.wait_for_function(
        f"() => Number(document.querySelector('.fk-plot')?.dataset.tiles ?? 0) >= {count}"
    )


def num_tiles(page: Any) -> int:
    return int(page.locator(".fk-plot").first.get_attribute("data-tiles"))


def looking_at(page: Any) -> dict[str, float]:
    return json.loads(page.locator(".fk-plot").get_attribute("data-view"))


def point_at(page: Any, row: float, col: float) -> None:
    """The pointer over a cell."""
    box, view = page.locator(".fk-plot canvas").bounding_box(), looking_at(page)
    x = box["x"] + box["width"] * (col + 0.5 - view["c0"]) / (view["c1"] - view["c0"])
    y = box["y"] + box["height"] * (row + 0.5 - view["r0"]) / (view["r1"] - view["r0"])
    page.mouse.move(x, y)


def wheel(page: Any, delta: int = -120) -> None:
    count = num_tiles(page)
    page.mouse.wheel(0, delta)
    drawn(page, count + 1)


def press(page: Any, key: str) -> None:
    count = num_tiles(page)
    page.locator(".fk-plot canvas").press(key)
    drawn(page, count + 1)


# --- in a bare page


def test_a_hot_cell_in_a_large_matrix_survives_four_zooms(page, bridge: Bridge):
    x = torch.zeros(ROWS, COLS)
    x[HOT], x[0, 0] = 5, -1  # a negative one, for the blue-white-red map
    bridge.show(tensor_map(x))
    drawn(page)
    assert page.evaluate(RED)["red"] >= 1
    for _ in range(4):
        point_at(page, *HOT)
        wheel(page)
        pixels = page.evaluate(RED)
        assert pixels["share"] > 0.99 and pixels["red"] >= 1
    assert looking_at(page)["r1"] - looking_at(page)["r0"] < ROWS / 5


def test_a_view_of_noise_stays_under_its_bytes(page, bridge: Bridge):
    x = torch.randn(ROWS, COLS)
    view = tensor_map(x)
    still, _ = view._repr_mimebundle_()
    bridge.show(view)
    drawn(page)
    assert len(ESM.encode()) <= 30_000
    assert bridge.num_bytes + len(json.dumps(still)) <= MAX_VIEW
    for _ in range(4):
        before = bridge.num_bytes
        point_at(page, *HOT)
        wheel(page)
        assert 0 < bridge.num_bytes - before <= MAX_VIEW


def test_ten_small_views_cost_less_than_a_megabyte(page, bridge: Bridge):
    began = time.perf_counter()
    stills = 0
    for _ in range(10):
        # what a short prompt gives
        view = tensor_map(Source(torch.randn(1, 9, 576), tokens=[["token"] * 9]))
        stills += len(json.dumps(view._repr_mimebundle_()[0]))
        bridge.show(view)
    page.wait_for_function("() => document.querySelectorAll('.fk-plot[data-tiles]').length === 10")
    assert bridge.num_bytes + stills <= 1_000_000
    assert time.perf_counter() - began < 20  # 1 s when nobody else works


def test_tokens_are_text_whatever_they_look_like(page, bridge: Bridge):
    tokens = [
        "<s>",
        "</think>",
        "<script>alert(1)</script>",
        "\n",
        "שלום",
        "👩‍👩‍👧",
        " the",
        "&amp;",
        "<img src=x onerror=1>",
    ]
    shown = [
        "<s>",
        "</think>",
        "<script>alert(1)</script>",
        "↵",
        "שלום",
        "👩‍👩‍👧",
        "·the",
        "&amp;",
        "<img src=x onerror=1>",
    ]
    view = tensor_map(Source(torch.randn(1, 9, 32), tokens=[tokens], name="<b>name</b>"))
    bridge.show(view)
    drawn(page)
    labels = page.locator(".fk-rows bdi").all_text_contents()
    assert labels == [f"[0, {i}] {token}" for i, token in enumerate(shown)]
    assert page.locator(".fk-title").text_content() == "<b>name</b>"
    assert page.locator(".fk-map script, .fk-map img, .fk-map b").count() == 0
    point_at(page, 2, 5)
    page.wait_for_function(
        "() => document.querySelector('.fk-read').textContent.includes('<script>alert(1)</script>')"
    )
    page.set_content(view._repr_mimebundle_()[0]["text/html"])
    assert page.locator("script, b").count() == 0


def test_hovering_reads_the_exact_cell(page, bridge: Bridge):
    x = torch.randn(40, 50)
    bridge.show(tensor_map(x))
    drawn(page)
    point_at(page, 7, 11)
    page.wait_for_function("() => document.querySelector('.fk-read').textContent")
    name, value = page.locator(".fk-read").text_content().rsplit(": ", 1)
    assert name == "row 7, column 11"
    assert float(value) == pytest.approx(float(x[7, 11]), rel=1e-6)


def test_hovering_a_reduced_pixel_says_where_its_extreme_is(page, bridge: Bridge):
    x = torch.zeros(ROWS, COLS, dtype=torch.bfloat16)
    x[HOT] = -3
    bridge.show(tensor_map(x))
    drawn(page)
    point_at(page, *HOT)
    page.wait_for_function(
        "() => document.querySelector('.fk-read').textContent.includes('at row 1234, column 4321')"
    )
    assert "signed extreme -3 at" in page.locator(".fk-read").text_content()


def test_the_keyboard_zooms_pans_resets_and_moves_the_cursor(page, bridge: Bridge):
    bridge.show(tensor_map(torch.randn(1000, 2000)))
    drawn(page)
    press(page, "+")
    zoomed = looking_at(page)
    assert zoomed["c1"] - zoomed["c0"] == pytest.approx(2000 / 1.5)
    press(page, "Shift+ArrowRight")
    assert looking_at(page)["c0"] > zoomed["c0"]
    page.locator(".fk-plot canvas").press("ArrowDown")
    page.wait_for_function("() => document.querySelector('.fk-read').textContent")
    assert page.locator(".fk-mark").is_visible()
    press(page, "-")
    press(page, "Home")
    assert looking_at(page) == {"r0": 0, "r1": 1000, "c0": 0, "c1": 2000}


def test_dragging_pans_and_shift_dragging_zooms_to_the_box(page, bridge: Bridge):
    bridge.show(tensor_map(torch.randn(1000, 2000), rows=(200, 600), cols=(400, 1200)))
    drawn(page)
    box = page.locator(".fk-plot canvas").bounding_box()
    middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2

    def drag(dx: float, dy: float) -> None:
        count = num_tiles(page)
        page.mouse.move(*middle)
        page.mouse.down()
        page.mouse.move(middle[0] + dx, middle[1] + dy, steps=4)
        page.mouse.up()
        drawn(page, count + 1)

    drag(box["width"] / 4, box["height"] / 4)
    assert looking_at(page) == pytest.approx({"r0": 100, "r1": 500, "c0": 200, "c1": 1000}, abs=5)
    page.keyboard.down("Shift")
    drag(box["width"] / 4, box["height"] / 4)
    page.keyboard.up("Shift")
    assert looking_at(page) == pytest.approx({"r0": 300, "r1": 400, "c0": 600, "c1": 800}, abs=5)


def test_one_question_is_in_flight_and_a_stale_answer_is_dropped(page, bridge: Bridge):
    view = tensor_map(torch.randn(500, 800))
    bridge.show(view)
    drawn(page)
    held: list[Any] = []
    answer, view.send = view.send, lambda content, buffers=None: held.append((content, buffers))
    page.locator(".fk-plot canvas").press("+")
    page.wait_for_function("() => window.sent.length === 2")
    for _ in range(5):
        page.locator(".fk-plot canvas").press("+")
    page.wait_for_function(
        "() => document.querySelector('.fk-busy').textContent.startsWith('kernel busy')"
    )
    assert page.evaluate("window.sent.length") == 2
    (content, buffers), view.send = held[0], answer
    view.send({**content, "seq": 1}, buffers)  # an answer nobody waits for
    assert num_tiles(page) == 1
    view.send(content, buffers)
    drawn(page, 3)  # the one asked for, then the latest
    assert page.evaluate("window.sent.length") == 3
    assert page.locator(".fk-busy").text_content() == ""


def test_two_displays_of_one_map_do_not_disturb_each_other(page, bridge: Bridge):
    view = tensor_map(torch.randn(500, 800))
    bridge.show(view)
    bridge.show(view)
    page.wait_for_function("() => document.querySelectorAll('.fk-plot[data-tiles]').length === 2")
    second = page.locator(".fk-plot").nth(1)
    page.locator(".fk-plot canvas").nth(0).press("+")
    drawn(page, 2)
    assert json.loads(second.get_attribute("data-view"))["r1"] == 500
    assert second.get_attribute("data-tiles") == "1"


def test_the_controls_change_what_is_drawn(page, bridge: Bridge):
    bridge.show(tensor_map(torch.randn(900, 2000)))
    drawn(page)
    page.locator(".fk-tools select").select_option("mean")
    drawn(page, 2)
    assert page.locator(".fk-says").text_content().startswith("mean of ")
    press(page, "+")
    before = page.locator(".fk-bar bdi").first.text_content()
    count = num_tiles(page)
    page.get_by_text("fit colours").click()
    drawn(page, count + 1)
    assert page.locator(".fk-bar bdi").first.text_content() != before


def test_shards_are_drawn_with_their_ranks(page, bridge: Bridge):
    shards = [(1, [300, 600], ["rank 0", "rank 1"]), (0, [5, 10], ["rank 0", "rank 2"])]
    bridge.show(tensor_map(Source(torch.randn(10, 600), shards=shards)))
    drawn(page)
    assert page.locator(".fk-top span").all_text_contents() == ["rank 0", "rank 1"]
    assert page.locator(".fk-side span").all_text_contents() == ["rank 0", "rank 2"]
    boxes = "() => ['.fk-plot', '.fk-cut'].map(s => document.querySelector(s)?.getBoundingClientRect().toJSON())"
    # a map that is drawn again has no cuts for a moment
    page.wait_for_function(f"() => ({boxes})().every(Boolean)")
    plot, cut = page.evaluate(boxes)
    assert cut["x"] == pytest.approx(plot["x"] + plot["width"] / 2, abs=2)


def test_the_map_takes_its_colours_from_the_theme(browser):
    dark = "<style>:root { --jp-ui-font-color1: rgb(1, 200, 3); --jp-layout-color1: #111; }</style>"
    with open_page(browser) as page, bridged(page, dark) as bridge:
        bridge.show(tensor_map(torch.randn(5, 6)))
        drawn(page)
        assert (
            page.evaluate("getComputedStyle(document.querySelector('.fk-rows bdi')).color")
            == "rgb(1, 200, 3)"
        )
        assert "5 rows by 6 columns" in page.locator(".fk-plot canvas").get_attribute("aria-label")


def test_an_expired_capture_says_so_in_the_page(page, bridge: Bridge):
    class Fleeting(Source):
        gone = False

        def tensor(self):
            if self.gone:
                raise CaptureExpired("the run was freed; run.keep() keeps it")
            return super().tensor()

    source = Fleeting(torch.randn(300, 400))
    bridge.show(tensor_map(source))
    drawn(page)
    source.gone = True
    page.locator(".fk-plot canvas").press("+")
    page.wait_for_function(
        "() => document.querySelector('.fk-busy').textContent.includes('the run was freed')"
    )
    assert page.evaluate(RED)["share"] > 0.99  # what was drawn stays


def test_the_static_picture_and_the_tree_need_no_script(browser):
    with open_page(browser, java_script_enabled=False) as page:
        html = tensor_map(torch.randn(20, 30))._repr_mimebundle_()[0]["text/html"]
        rows = [ModuleRow(f"layers.{i}.mlp", "MLP", hooks=[("h", ["g"])]) for i in range(4)]
        page.set_content(html + ModelTree(rows)._repr_html_())
        assert page.locator("img").bounding_box()["width"] > 300
        assert page.get_by_text("0–3 ×4").is_visible()
        page.locator("summary").last.click()
        assert page.get_by_text("h (g)").is_visible()


def test_without_chromium_a_test_is_skipped_with_the_reason_and_on_ci_it_fails(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setenv("CI", "false")
    with pytest.raises(pytest.skip.Exception, match="apt-get install"):
        chromium()
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match=r"need Debian's chromium"):
        chromium()
    assert "chromium" in HOW_TO_GET


def test_a_page_that_leaves_this_machine_or_has_an_error_fails(browser):
    for content in ("<img src='http://192.0.2.1/x.png'>", "<script>throw Error('broken')</script>"):
        with (
            pytest.raises(AssertionError, match=r"192\.0\.2\.1|broken"),
            open_page(browser) as page,
        ):
            page.set_content(content, wait_until="commit")
            page.wait_for_timeout(200)


# --- in JupyterLab

HAND_MADE = f"""
import torch
from flexkernel.views import freeze_all, tensor_map
x = torch.randn({ROWS}, {COLS}, generator=torch.Generator().manual_seed(0))
x[{HOT[0]}, {HOT[1]}] = 90.0
"""
PICTURE = """() => {
  const image = [...document.querySelectorAll("img")].find((i) => i.src.startsWith("data:image/png"));
  return image?.complete && image.naturalWidth > 500 && image.getBoundingClientRect().width > 300;
}"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    chromium()
    with open_lab(tmp_path_factory.mktemp("notebooks"), tmp_path_factory.mktemp("home")) as running:
        yield running


@pytest.mark.long
@pytest.mark.slow
def test_a_large_map_in_jupyterlab_from_drawing_to_a_reopened_notebook(browser, lab, tmp_path):
    path = lab.write("map.ipynb", HAND_MADE, "view = tensor_map(x, title='made by hand')\nview")
    with open_page(browser, viewport={"width": 1200, "height": 1200}) as page:
        traffic = Traffic().on(page)
        lab.open(page, "map.ipynb")
        traffic.take()
        command(page, "notebook:run-all-cells")
        page.wait_for_selector(".fk-plot[data-tiles]", timeout=60_000)
        assert traffic.take() <= MAX_VIEW
        for _ in range(4):
            point_at(page, *HOT)
            wheel(page)
            assert 0 < traffic.take() <= MAX_VIEW
            assert page.evaluate(RED)["red"] >= 4
        page.screenshot(path=tmp_path / "zoomed.png")
        assert (
            execute(page, "print(view.window[1][1] - view.window[1][0] < 4000)").strip() == "True"
        )
        command(page, "docmanager:save")
        wait_for_output(path, "application/vnd.jupyter.widget-view+json")
        assert_html_shows_the_picture(browser, path, tmp_path)

        execute(page, "freeze_all()")
        page.wait_for_function(PICTURE)
        assert page.locator(".fk-plot").count() == 0
        command(page, "docmanager:save")
        outputs = wait_for_output(
            path, "text/html", without="application/vnd.jupyter.widget-view+json"
        )
        assert len(json.dumps(outputs)) <= 500_000
        page.evaluate(f"() => ({KERNEL}).shutdown()")

    # the kernel is gone
    with open_page(browser, viewport={"width": 1200, "height": 1200}) as page:
        page.goto(f"{lab.url}/doc/tree/map.ipynb?token={lab.token}&reset")
        page.wait_for_function(PICTURE, timeout=60_000)
        assert page.get_by_text("Error displaying widget").count() == 0
        page.screenshot(path=tmp_path / "reopened.png")
    assert_html_shows_the_picture(browser, path, tmp_path)


def wait_for_output(path: Path, mime: str, without: str = "") -> list[Any]:
    """The saved outputs of the notebook's last cell, once they hold `mime`."""
    end = time.monotonic() + 20
    while time.monotonic() < end:
        outputs = nbformat.read(path, as_version=4).cells[-1].outputs
        held = {kind for output in outputs for kind in output.get("data", {})}
        if mime in held and without not in held:
            return outputs
        time.sleep(0.2)
    raise AssertionError(f"the saved notebook has {held}, not {mime}")


def assert_html_shows_the_picture(browser: Any, path: Path, folder: Path) -> None:
    """nbconvert's HTML, opened with the network cut: its template names scripts elsewhere, the
    picture needs none."""
    from nbconvert import HTMLExporter

    page_path = folder / "notebook.html"
    page_path.write_text(HTMLExporter().from_filename(str(path))[0], encoding="utf-8")
    context = browser.new_context(offline=True)
    page = context.new_page()
    page.goto(page_path.as_uri(), wait_until="domcontentloaded")
    page.wait_for_function(PICTURE)
    context.close()


ACTIVATION = """
import torch
import flexkernel as fk
from tests.support import models
session = fk.start(2)
session.load(models.tiny("llama_wide", {folder!r}), tp=2)
session.hook("model.layers.0.mlp.gate_proj")
ids = torch.randint(3, 256, (1, 4096), generator=torch.Generator().manual_seed(0))
run = session.run(ids)
capture = run["model.layers.0.mlp.gate_proj"]
assert capture.shape == (1, 4096, 16384) and capture.placement == "Shard(dim=-1)"
"""


@pytest.mark.slow
def test_a_large_sharded_activation_is_drawn_and_zoomed_in_jupyterlab(browser, lab, tmp_path):
    """268 MB that two engines wrote: what crosses the wire is pixels, and they are those of the
    whole tensor."""
    lab.write("activation.ipynb", "view = capture.show()\nview")
    with open_page(browser, viewport={"width": 1200, "height": 1200}) as page:
        traffic = Traffic().on(page)
        lab.open(page, "activation.ipynb")
        told = execute(page, ACTIVATION.format(folder=str(tmp_path)) + "print('there')")
        assert told.endswith("there\n"), told
        traffic.take()  # of the bars of the start and the load
        command(page, "notebook:run-all-cells")
        page.wait_for_selector(".fk-plot[data-tiles]", timeout=120_000)
        assert traffic.take() <= MAX_VIEW
        for _ in range(3):
            point_at(page, 2000, 9000)
            wheel(page)
            assert 0 < traffic.take() <= MAX_VIEW
        page.screenshot(path=tmp_path / "activation.png")
        told = execute(page, "print(view.window, float(capture[0, 2000, 9000]), session.close())")
        assert "None" in told, told


@pytest.mark.slow
def test_a_capture_that_expires_freezes_the_map_in_jupyterlab(browser, lab):
    """The browser's question may be answered on another thread than the cell's: from there the
    output is replaced."""
    lab.write(
        "expire.ipynb",
        "import time, torch\nfrom flexkernel.errors import CaptureExpired\nfrom flexkernel.views "
        "import tensor_map\n"
        "class Fleeting:\n"
        "    shape, dtype, name, gone = (300, 400), torch.float32, 'fleeting', False\n"
        "    def __init__(self): self.held = torch.randn(300, 400)\n"
        "    def __getitem__(self, index): return self.tensor()[index]\n"
        "    def tensor(self):\n"
        "        if self.gone: raise CaptureExpired('the run was freed; run.keep() keeps it')\n"
        "        return self.held\n"
        "source = Fleeting(); tensor_map(source)",
    )
    with open_page(browser, viewport={"width": 1200, "height": 1200}) as page:
        lab.open(page, "expire.ipynb")
        command(page, "notebook:run-all-cells")
        page.wait_for_selector(".fk-plot[data-tiles]", timeout=60_000)
        execute(page, "source.gone = True")
        page.locator(".fk-plot canvas").press("+")
        page.wait_for_function(PICTURE, timeout=20_000)
        assert page.get_by_text("the run was freed; run.keep() keeps it").first.is_visible()
