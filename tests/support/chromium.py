"""A real widget in a real browser: in a bare page with Python in the same process, or in
JupyterLab end to end.

In the bare page a patched comm carries what Jupyter's would: state and custom messages to the
page, the page's messages back. So Python and ESM are the real ones, a test takes a second, and its
pixels are asked for with getImageData.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import comm
import nbformat
import pytest
from comm.base_comm import BaseComm

from flexkernel.views import tensormap

HOW_TO_GET = "browser tests need Debian's chromium: apt-get install --no-install-recommends chromium fonts-dejavu-core"
ARGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def chromium() -> str:
    """The path of chromium. Where there is none the test is skipped; on CI, which must run it, it
    fails."""
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if found:
        return found
    if os.environ.get("CI") == "true":
        pytest.fail(HOW_TO_GET)
    pytest.skip(HOW_TO_GET)


@contextlib.contextmanager
def open_browser() -> Iterator[Any]:
    path = chromium()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=ARGS)
        yield browser
        browser.close()


@dataclass
class Watch:
    """What a page did that it must not do: errors, and requests that leave this machine."""

    errors: list[str] = field(default_factory=list)
    strays: list[str] = field(default_factory=list)

    def on(self, page: Any) -> None:
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", lambda request: self._request(request.url))

    def _request(self, url: str) -> None:
        if url.startswith(("http", "ws")) and "//127.0.0.1" not in url:
            self.strays.append(url)

    def check(self) -> None:
        assert not self.errors, self.errors
        assert not self.strays, self.strays


@contextlib.contextmanager
def open_page(browser: Any, **options: Any) -> Iterator[Any]:
    """A page that fails the test on any page error or any request off 127.0.0.1."""
    context = browser.new_context(**({"viewport": {"width": 1000, "height": 700}} | options))
    page = context.new_page()
    page.watch = Watch()
    page.watch.on(page)
    yield page
    context.close()
    page.watch.check()


# --- a bare page ----------------------------------------------------------------------

HOST = r"""
const decode = (s) => new DataView(Uint8Array.from(atob(s), (c) => c.charCodeAt(0)).buffer);
const put = (object, path, value) => {
  for (const key of path.slice(0, -1)) object = object[key];
  object[path.at(-1)] = value;
};
const models = {};
window.host = {
  open(id, state, paths, buffers) {
    paths.forEach((path, i) => put(state, path, decode(buffers[i])));
    const listeners = {};
    const model = {
      get: (key) => state[key],
      set: (key, value) => { state[key] = value; (listeners["change:" + key] ?? []).forEach((f) => f()); },
      save_changes() {},
      on: (name, f) => (listeners[name] ??= []).push(f),
      off: (name, f) => { listeners[name] = (listeners[name] ?? []).filter((g) => g !== f); },
      send: (content) => { window.sent.push(content); pySend(id, content); },
    };
    models[id] = { model, state, listeners };
  },
  async show(id) {
    const { model, state } = models[id];
    const url = URL.createObjectURL(new Blob([state._esm], { type: "text/javascript" }));
    const widget = (await import(url)).default;
    const el = document.createElement("div");
    document.body.append(el);
    await widget.render({ model, el });
  },
  receive(id, data, buffers) {
    const { listeners } = models[id] ?? { listeners: {} };
    if (data.method === "custom") (listeners["msg:custom"] ?? []).forEach((f) => f(data.content, buffers.map(decode)));
  },
};
window.sent = [];
"""


class Bridge:
    """The wire between widgets of this process and one page. num_bytes: all that Python sent over
    it."""

    def __init__(self, page: Any, body: str = ""):
        self.page = page
        self.comms: dict[str, BaseComm] = {}
        self.num_bytes = 0
        self.open = True
        page.expose_function("pySend", self._from_page)
        page.set_content(f"<!doctype html><body>{body}</body>")
        page.evaluate(HOST)

    def create_comm(self, *args: Any, **kwargs: Any) -> BaseComm:
        made = _Comm(self, *args, **kwargs)
        self.comms[made.comm_id] = made
        return made

    def show(self, widget: Any) -> None:
        self.page.evaluate("id => host.show(id)", widget.comm.comm_id)

    def to_page(self, comm_id: str, msg_type: str, data: Any, buffers: list[bytes]) -> None:
        if not self.open:  # a widget that outlives its page says something later, to nobody
            return
        self.num_bytes += len(json.dumps(data)) + sum(map(len, buffers))
        packed = [base64.b64encode(b).decode() for b in buffers]
        if msg_type == "comm_open" and data["state"].get("_model_module") == "anywidget":
            call = [comm_id, data["state"], data.get("buffer_paths", []), packed]
            self.page.evaluate("call => host.open(...call)", call)
        elif msg_type == "comm_msg":
            self.page.evaluate("call => host.receive(...call)", [comm_id, data, packed])

    def _from_page(self, comm_id: str, content: Any) -> None:
        data = {"method": "custom", "content": content}
        message = {
            "content": {"data": data},
            "buffers": [],
            "metadata": {},
            "header": {"msg_type": "comm_msg"},
        }
        self.comms[comm_id].handle_msg(message)


class _Comm(BaseComm):
    def __init__(self, bridge: Bridge, *args: Any, **kwargs: Any):
        self.bridge = bridge
        super().__init__(*args, **kwargs)

    def publish_msg(
        self, msg_type: str, data: Any = None, metadata: Any = None, buffers: Any = None, **_: Any
    ) -> None:
        raw = [bytes(memoryview(b).cast("B")) for b in buffers or []]
        self.bridge.to_page(self.comm_id, msg_type, data, raw)


@contextlib.contextmanager
def bridged(page: Any, body: str = "") -> Iterator[Bridge]:
    bridge = Bridge(page, body)
    before, comm.create_comm = comm.create_comm, bridge.create_comm
    try:
        yield bridge
    finally:
        bridge.open = False
        tensormap._live.clear()  # the page's maps are nobody's any more
        comm.create_comm = before


# --- JupyterLab -----------------------------------------------------------------------


@dataclass
class Lab:
    """A running JupyterLab: its address, token, and the folder its notebooks are in."""

    url: str
    token: str
    root: Path

    def write(self, name: str, *cells: str) -> Path:
        book = nbformat.v4.new_notebook()
        book.metadata.kernelspec = {
            "name": "python3",
            "display_name": "Python 3",
            "language": "python",
        }
        book.cells = [nbformat.v4.new_code_cell(cell) for cell in cells]
        nbformat.write(book, self.root / name)
        return self.root / name

    def open(self, page: Any, name: str) -> None:
        """The notebook in a page, its kernel idle."""
        page.goto(f"{self.url}/doc/tree/{name}?token={self.token}&reset")
        page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=60_000)
        page.wait_for_function("() => window.jupyterapp?.restored.then(() => true)", timeout=60_000)
        page.wait_for_function(f"() => ({KERNEL})?.status === 'idle'", timeout=90_000)


KERNEL = "window.jupyterapp.shell.currentWidget?.sessionContext?.session?.kernel"


@dataclass
class Traffic:
    """Bytes that a page received from its kernel since the last `take`."""

    num_bytes: int = 0

    def on(self, page: Any) -> Traffic:
        page.on("websocket", self._socket)
        return self

    def _socket(self, socket: Any) -> None:
        if "/channels" in socket.url:
            socket.on("framereceived", self._frame)

    def _frame(self, payload: Any) -> None:
        self.num_bytes += len(payload)

    def take(self) -> int:
        taken, self.num_bytes = self.num_bytes, 0
        return taken


def command(page: Any, name: str) -> None:
    page.evaluate("name => window.jupyterapp.commands.execute(name)", name)


def execute(page: Any, code: str) -> str:
    """What a line of code prints in the open notebook's kernel."""
    return page.evaluate(
        f"""async (code) => {{
          let text = "";
          const future = ({KERNEL}).requestExecute({{ code }});
          future.onIOPub = (message) => {{ text += message.content.text ?? message.content.evalue ?? ""; }};
          await future.done;
          return text;
        }}""",
        code,
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def open_lab(root: Path, home: Path) -> Iterator[Lab]:
    """JupyterLab on loopback, with folders of its own, gone when the block ends."""
    port, token = free_port(), secrets.token_hex(16)
    options = [
        "--no-browser",
        "--allow-root",
        f"--port={port}",
        "--ip=127.0.0.1",
        "--ServerApp.port_retries=0",
        f"--IdentityProvider.token={token}",
        f"--ServerApp.root_dir={root}",
        "--LabApp.expose_app_in_browser=True",
        "--LabApp.news_url=",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
        "--LabApp.extension_manager=readonly",
    ]
    folders = {
        "JUPYTER_CONFIG_DIR": "config",
        "JUPYTER_DATA_DIR": "data",
        "JUPYTER_RUNTIME_DIR": "run",
        "IPYTHONDIR": "ipy",
    }
    checkout = {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    env = (
        os.environ
        | checkout
        | {"HOME": str(home)}
        | {name: str(home / folder) for name, folder in folders.items()}
    )
    log = home / "lab.log"
    with log.open("w") as out:
        lab = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *options], env=env, stdout=out, stderr=out
        )
    try:
        _wait_until_up(lab, f"http://127.0.0.1:{port}/api/status?token={token}", log)
        yield Lab(f"http://127.0.0.1:{port}", token, root)
    finally:
        lab.terminate()
        try:
            lab.wait(15)
        except subprocess.TimeoutExpired:
            lab.kill()
            lab.wait()


def _wait_until_up(lab: subprocess.Popen, url: str, log: Path, timeout_s: float = 90) -> None:
    end = time.monotonic() + timeout_s
    while lab.poll() is None and time.monotonic() < end:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(url, timeout=2).read()
            return
        time.sleep(0.1)
    raise RuntimeError(f"JupyterLab did not come up: {log.read_text()[-2000:]}")
