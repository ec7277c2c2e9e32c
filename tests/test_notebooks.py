"""Every notebook of notebooks/ is executed on the real model over real engines, and shows what its
text says."""

from __future__ import annotations

import base64
import contextlib
import functools
import os
import re
import time
from pathlib import Path

import nbformat
import numpy as np
import psutil
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
FIGURE = "application/vnd.plotly.v1+json"
WIDGET = "application/vnd.jupyter.widget-view+json"


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def execute(path: Path, folder: Path) -> nbformat.NotebookNode:
    """The notebook with its outputs. A cell that raises raises here. metadata.processes: how many
    it had at most."""
    book = read(path)
    book.metadata.processes = 0
    client = NotebookClient(book, timeout=240, kernel_name="python3", store_widget_state=False)

    def count(**_) -> None:
        book.metadata.processes = max(book.metadata.processes, len(processes(folder)))

    client.on_cell_executed = count
    client.execute(
        cwd=str(folder), env={**os.environ, "IPYTHONDIR": str(folder), "OMP_NUM_THREADS": "1"}
    )
    book.metadata.left = left(folder)
    return book


def left(folder: Path, patience_s: float = 30) -> list[str]:
    """What still runs when the engines have had the time that they take to end with a notebook."""
    end = time.monotonic() + patience_s
    while (found := processes(folder)) and time.monotonic() < end:
        time.sleep(0.2)
    return [repr(process) for process in found]


def processes(folder: Path) -> list[psutil.Process]:
    """Those that were begun, directly or not, with this as their IPython folder: kernel,
    controller, engines."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("IPYTHONDIR") == str(folder):
                found.append(process)
    return found


def shown(book: nbformat.NotebookNode, source: str) -> dict[str, str]:
    """What the one cell with this in its source showed, mime type → data."""
    (cell,) = [c for c in book.cells if c.cell_type == "code" and source in c.source]
    found: dict[str, str] = {}
    for output in cell.outputs:
        found |= output.get("data", {})
    return found


def test_there_is_a_quickstart():
    assert "quickstart" in [path.stem for path in NOTEBOOKS]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_committed_notebook_has_no_outputs_and_names_no_machine(path):
    book = read(path)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert code and all(cell.outputs == [] and cell.execution_count is None for cell in code)
    assert "widgets" not in book.metadata
    assert not re.search(r"/(home|root|Users|tmp)/", path.read_text())


@pytest.fixture(scope="module")
def executed(smollm2, tmp_path_factory):
    """Path of a notebook → the notebook with its outputs, executed once."""
    return functools.cache(lambda path: execute(path, tmp_path_factory.mktemp(path.stem)))


@pytest.fixture(scope="module")
def quickstart(executed):
    return executed(next(path for path in NOTEBOOKS if path.stem == "quickstart"))


@pytest.mark.long("tuned_lens")
@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_says_nothing_aside(path, executed):
    assert_quiet(executed(path))


def assert_quiet(book: nbformat.NotebookNode) -> None:
    outputs = [output for cell in book.cells for output in cell.get("outputs", [])]
    assert outputs and [o.text for o in outputs if o.output_type == "stream"] == []


@pytest.mark.slow
def test_the_quickstart_spreads_the_model_and_finds_paris(quickstart):
    table = shown(quickstart, "%flex_load")["text/plain"]
    parts = [int(row.split()[2].replace(",", "")) for row in table.splitlines()[-2:]]
    assert (
        "pp=2" in table
        and all(0 < part < 134_515_008 for part in parts)
        and sum(parts) > 134_515_008
    )
    run = shown(quickstart, "run = %flex_run The capital of France is\nrun")
    assert re.search(r"next: ' Paris' 0\.\d+", run["text/plain"]) and "Paris" in run["text/html"]
    assert "30 captures" in run["text/plain"] and "model.layers.0–29.mlp" in run["text/plain"]
    assert "torch.Size([1, 5, 576])" in shown(quickstart, "mlp.shape")["text/plain"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["model.layers.3.mlp", "model.layers.0.self_attn.@pattern"])
def test_the_quickstart_keeps_a_picture_beside_each_live_view(quickstart, name):
    data = shown(quickstart, f"%flex_show {name}")
    assert WIDGET in data and base64.b64decode(data["image/png"])[:8] == b"\x89PNG\r\n\x1a\n"
    assert "data:image/png;base64," in data["text/html"] and name in data["text/plain"]


@pytest.mark.slow
def test_the_first_token_of_the_quickstart_stands_out_as_it_says(quickstart):
    lines = shown(quickstart, "go.Figure")[FIGURE]["data"]
    norms = np.stack([values(line["y"]) for line in lines])
    assert norms.shape == (5, 30) and (norms > 0).all()
    assert (norms[0] > 30 * norms[1:].max(0)).sum() >= 2


def values(y: dict) -> np.ndarray:
    return np.frombuffer(base64.b64decode(y["bdata"]), np.dtype(y["dtype"]))


@pytest.mark.slow
def test_the_quickstarts_attention_never_looks_ahead_and_its_group_goes_off(quickstart):
    rows = re.findall(r"\[+([\d., ]+)\]", shown(quickstart, "pattern[0].mean(0)")["text/plain"])
    pattern = np.array([[float(cell) for cell in row.split(",") if cell.strip()] for row in rows])
    assert (
        pattern.shape == (5, 5)
        and np.allclose(pattern.sum(1), 1, atol=1e-3)
        and not np.triu(pattern, 1).any()
    )
    assert shown(quickstart, "%flex_group off attention")["text/plain"] == "30"


@pytest.mark.slow
def test_the_quickstart_leaves_no_process_behind(quickstart):
    assert quickstart.metadata.processes > 3  # kernel, controller, two engines
    assert quickstart.metadata.left == []


@pytest.mark.slow
def test_the_notebook_of_induction_heads_draws_its_findings_and_ends_its_engines(executed):
    """The findings themselves are asserted in its cells."""
    book = executed(next(path for path in NOTEBOOKS if path.stem == "induction_heads"))
    assert sum("assert " in cell.source for cell in book.cells if cell.cell_type == "code") == 3
    for title in ('title="induction score', "from (down), to (across)"):
        data = shown(book, title)
        assert WIDGET in data and base64.b64decode(data["image/png"])[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(shown(book, "go.Scatter(y=y, name=name)")[FIGURE]["data"]) == 3
    assert book.metadata.processes > 3 and book.metadata.left == []
