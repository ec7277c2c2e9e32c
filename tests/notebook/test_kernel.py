"""FlexKernel as Jupyter starts it, from a kernelspec in a folder of its own: the user's are not
touched."""

from __future__ import annotations

import json
import logging
import os
import struct
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import jupyter_kernel_test
import pytest
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import start_new_kernel

import flexkernel
from flexkernel.__main__ import main
from flexkernel.errors import FlexError
from flexkernel.notebook import kernel

LOADED = "'flexkernel' in get_ipython().extension_manager.loaded"


@pytest.fixture(scope="module", autouse=True)
def jupyter_folders(tmp_path_factory):
    """Jupyter's user folder, first in the search order too: a venv's own kernelspecs would win
    otherwise."""
    folder = tmp_path_factory.mktemp("jupyter")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("JUPYTER_DATA_DIR", "JUPYTER_PATH", "JUPYTER_CONFIG_DIR", "IPYTHONDIR"):
            patch.setenv(name, str(folder))
        installed = Path(kernel.install(user=True))
        assert installed == folder / "kernels" / "flexkernel"
        yield folder


# Installing


def test_the_installed_kernelspec_is_the_one_jupyter_finds(jupyter_folders):
    spec = KernelSpecManager().get_kernel_spec("flexkernel")
    assert Path(spec.resource_dir) == jupyter_folders / "kernels" / "flexkernel"
    assert (spec.display_name, spec.language, spec.metadata["debugger"]) == (
        "FlexKernel",
        "python",
        True,
    )
    assert spec.argv[0] == sys.executable and spec.argv[-4:] == [
        "-m",
        "flexkernel.notebook.kernel",
        "-f",
        "{connection_file}",
    ]


def test_the_source_of_the_kernelspec_names_no_machine():
    content = json.loads((kernel.SOURCES[0] / "kernel.json").read_text())
    assert content["argv"][0] == "python"


@pytest.mark.parametrize("size", [32, 64])
def test_a_logo_is_a_png_of_its_size(jupyter_folders, size):
    data = (jupyter_folders / "kernels" / "flexkernel" / f"logo-{size}x{size}.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">II", data[16:24]) == (size, size)
    assert zlib.crc32(data[12:29]) == struct.unpack(">I", data[29:33])[0]


def test_install_takes_a_prefix(tmp_path, capsys):
    assert main(["install", "--prefix", str(tmp_path)]) == 0
    folder = tmp_path / "share" / "jupyter" / "kernels" / "flexkernel"
    assert capsys.readouterr().out == f"{folder}\n"
    assert {path.name for path in folder.iterdir()} == {
        path.name for path in kernel.SOURCES[0].iterdir()
    }


def test_install_twice_is_install_once(tmp_path):
    assert kernel.install(prefix=str(tmp_path)) == kernel.install(prefix=str(tmp_path))


def test_a_place_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(
        FlexError,
        match=r"the kernelspec cannot be written: .*; --user and --prefix name other places",
    ):
        kernel.install(prefix=str(tmp_path / "file"))


def test_a_lost_kernelspec_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(kernel, "SOURCES", (tmp_path,))
    with pytest.raises(FlexError, match=r"no kernel\.json in .*: install flexkernel again"):
        kernel.install()


def test_an_extension_that_does_not_load_leaves_a_kernel(caplog):
    def broken(name):
        raise ImportError(f"cannot import {name}")

    stub = SimpleNamespace(
        shell=SimpleNamespace(extension_manager=SimpleNamespace(load_extension=broken)),
        log=logging.getLogger("kernel"),
    )
    kernel.FlexKernel.load_extension(stub)
    assert (
        "%load_ext flexkernel shows why" in caplog.text
        and "cannot import flexkernel" in caplog.text
    )


# Jupyter's own suite for kernels


@pytest.mark.slow
class TestProtocol(jupyter_kernel_test.KernelTests):
    kernel_name = "flexkernel"
    language_name = "python"
    file_extension = ".py"
    code_hello_world = "print('hello, world')"
    code_stderr = "import sys; print('test', file=sys.stderr)"
    completion_samples = [{"text": "zi", "matches": {"zip"}}]
    complete_code_samples = ["1", "print('hello, world')", "def f(x):\n  return x*2\n\n"]
    incomplete_code_samples = ["print('''hello", "def f(x):\n  x*2"]
    invalid_code_samples = ["import = 7q"]
    code_page_something = "zip?"
    code_generate_error = "raise ValueError('x')"
    code_execute_result = [{"code": "1+2+3", "result": "6"}]
    code_display_data = [
        {
            "code": "from IPython.display import HTML, display; display(HTML('<b>x</b>'))",
            "mime": "text/html",
        }
    ]
    code_inspect_sample = "zip"
    code_clear_output = "from IPython.display import clear_output; clear_output()"
    code_history_pattern = "1?2*"
    supported_history_operations = ("tail", "search")


# What is ours in it


@pytest.fixture(scope="module")
def client(jupyter_folders):
    manager, client = start_new_kernel(kernel_name="flexkernel", env={**os.environ})
    yield client
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def run(client, code: str) -> tuple[dict, str]:
    """The reply, and what the cell showed: streams, results and tracebacks."""
    shown: list[str] = []

    def collect(message):
        content = message["content"]
        shown.extend(
            [
                content.get("text", ""),
                *content.get("traceback", []),
                content.get("data", {}).get("text/plain", ""),
            ]
        )

    reply = client.execute_interactive(code, output_hook=collect, timeout=60)
    return reply["content"], "".join(shown)


@pytest.mark.slow
def test_the_kernel_says_what_it_is(client):
    info = client.kernel_info(reply=True, timeout=60)["content"]
    assert (info["implementation"], info["implementation_version"]) == (
        "flexkernel",
        flexkernel.__version__,
    )
    assert (
        info["banner"].startswith(f"FlexKernel {flexkernel.__version__}: ")
        and "IPython" in info["banner"]
    )


@pytest.mark.slow
def test_the_magics_are_there_without_loading_them(client):
    _, shown = run(client, f"{LOADED}, 'flex_hook' in get_ipython().magics_manager.magics['line']")
    assert shown == "(True, True)"
    _, shown = run(client, "%load_ext flexkernel")
    assert "already loaded" in shown


@pytest.mark.slow
def test_flex_says_how_to_start_engines(client):
    assert "%flex_cluster start -n 2" in run(client, "flex")[1]
    reply, shown = run(client, "flex.run('abc')")
    assert reply["ename"] == "ClusterError" and "\n" not in shown


@pytest.mark.slow
def test_an_error_of_ours_is_one_block_and_the_kernel_goes_on(client):
    reply, shown = run(
        client,
        "from flexkernel.errors import HookError\nraise HookError(\"no module matches 'x'\")",
    )
    assert (reply["status"], reply["ename"]) == ("error", "HookError")
    assert shown == "HookError: no module matches 'x'"
    assert run(client, "6 * 7")[1] == "42"


@pytest.mark.slow
def test_the_extension_can_be_unloaded_and_loaded_again(client):
    _, shown = run(client, f"%unload_ext flexkernel\n%load_ext flexkernel\n{LOADED}")
    assert shown == "True"
