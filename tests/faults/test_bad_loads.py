"""Bad inputs by number (bad.CATALOGUE): checkpoints, configs, degrees. What can be known before a
load is refused while the earlier model is there; a load that fails later leaves engines that can
load again.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from flexkernel.engine.model.checkpoint import check_files
from flexkernel.errors import LayoutError, LoadError, PromptError
from tests.support import bad, reference

two = pytest.mark.engines(2)


@pytest.fixture(scope="module")
def sharded(tiny, tmp_path_factory) -> Path:
    """A tiny Llama whose weights lie in several files, and an index."""
    folder = tmp_path_factory.mktemp("sharded") / "model"
    reference.load(tiny("llama")).save_pretrained(folder, max_shard_size="200KB")
    assert len(shards(folder)) > 3
    return folder


@pytest.fixture
def broken(sharded, tmp_path) -> Path:
    """A copy of it to break."""
    return Path(shutil.copytree(sharded, tmp_path / "model"))


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def index_of(folder: Path) -> Path:
    return folder / "model.safetensors.index.json"


def rename(folder: Path, name: str) -> None:
    """Have the index name another file for every tensor of the first shard."""
    index = json.loads(index_of(folder).read_text())
    first = shards(folder)[0].name
    index["weight_map"] = {
        key: name if file == first else file for key, file in index["weight_map"].items()
    }
    index_of(folder).write_text(json.dumps(index))


def cut(path: Path, by: int) -> None:
    os.truncate(path, path.stat().st_size - by)


def circle(path: Path) -> None:
    other = path.with_name("other")
    path.unlink()
    path.symlink_to(other)
    other.symlink_to(path)


def replaced(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def whole_file(folder: Path) -> Path:
    """As one file, which transformers takes before any index."""
    return folder / "model.safetensors"


class Runs:
    """What a pickle runs when it is read."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


POISONED = b"\x80\x04\x95"
BROKEN = {
    "49": (lambda f: shards(f)[1].unlink(), "cannot be opened: No such file or directory"),
    "50": (
        lambda f: cut(shards(f)[1], 1000),
        r"has [\d,]+ bytes and its header says [\d,]+: it was cut off",
    ),
    "50-byte": (lambda f: cut(shards(f)[-1], 1), "it was cut off"),
    "50-empty": (lambda f: replaced(shards(f)[0], b""), "is no safetensors file: it has 0 bytes"),
    "50-longer": (lambda f: shards(f)[0].open("ab").write(b"junk"), "and its header says"),
    "50-header": (lambda f: replaced(shards(f)[0], b"\xff" * 64), "is no safetensors file"),
    "50-json": (
        lambda f: replaced(shards(f)[0], (5).to_bytes(8, "little") + b"{none"),
        "is no safetensors file",
    ),
    "50-deep": (
        lambda f: replaced(shards(f)[0], (90_000).to_bytes(8, "little") + b"[" * 90_000),
        "is no safetensors",
    ),
    "50-index": (lambda f: cut(index_of(f), 40), "is no index of a checkpoint"),
    "51": (
        lambda f: rename(f, "../../../../etc/passwd"),
        "names '../../../../etc/passwd', which is outside",
    ),
    "51-absolute": (
        lambda f: rename(f, "/etc/passwd"),
        "names '/etc/passwd', which is outside of its folder",
    ),
    "51-number": (lambda f: rename(f, 7), "is no index of a checkpoint: TypeError"),
    "52": (lambda f: circle(shards(f)[0]), "cannot be opened: Too many levels of symbolic links"),
    "52-whole": (
        lambda f: whole_file(f).symlink_to(whole_file(f)),
        "cannot be opened: Too many levels",
    ),
    "52-pipe": (lambda f: os.mkfifo(whole_file(f)), "is no regular file"),
    "52-folder": (lambda f: whole_file(f).mkdir(), "is no regular file"),
    "58": (
        lambda f: replaced(shards(f)[0], pickle.dumps(Runs(f / "ran"))),
        "it begins as a pickle does",
    ),
    "58-zip": (
        lambda f: torch.save({"a": Runs(f / "ran")}, whole_file(f)),
        "it begins as a zip archive",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_checkpoint_that_is_not_whole_is_refused(case, broken):
    does, says = BROKEN[case]
    check_files(broken)
    does(broken)
    with pytest.raises(LoadError, match=says) as caught:
        check_files(broken)
    assert str(broken) in str(caught.value) and not (broken / "ran").exists()


@two
@pytest.mark.parametrize("case", ["49", "50", "51", "52-whole", "58"])
def test_the_loaded_model_stays_when_another_is_refused(case, broken, session, tiny):
    bad.fit(session, tiny("llama"), **bad.TP)
    info = session.loaded.info
    does, says = BROKEN[case]
    does(broken)
    with pytest.raises(LoadError, match=says):
        session.load(broken, tp=2)
    assert session.loaded.info is info and not (broken / "ran").exists()
    bad.healthy(session, tiny("llama"), **bad.TP)


def test_what_is_whole_is_taken(sharded, tmp_path, tiny):
    check_files(sharded)
    check_files(tiny("llama"))
    check_files(tmp_path)  # nothing there: whoever loads says so
    (tmp_path / "model.safetensors").write_bytes(save({}))
    check_files(tmp_path)


@pytest.mark.numbers(54, 55, 56)
@two
def test_dtypes_and_degrees_that_cannot_be(session, tiny, tmp_path):
    folder = tiny("llama")
    bad.fit(session, folder, **bad.TP)
    config = json.loads((folder / "config.json").read_text())
    nine = tmp_path / "nine"
    nine.mkdir()
    (nine / "config.json").write_text(
        json.dumps(config | {"hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3})
    )
    for how, kind, says in (
        (
            (folder, {"dtype": "float8_e4m3fn", "tp": 2}),
            LoadError,
            "only stores weights, no layer of torch computes in it",
        ),
        (
            (nine, {"tp": 2}),
            LayoutError,
            r"tp=2 does not divide LlamaForCausalLM's 9 attention heads; tp could be 1",
        ),
        ((folder, {"tp": 2, "pp": 2}), LayoutError, "makes 4 ranks, the cluster has 2 engines"),
        ((folder, {"tp": 3}), LayoutError, "tp=3 makes 3 ranks, the cluster has 2 engines"),
    ):
        path, options = how
        with pytest.raises(kind, match=says):
            session.load(path, **options)
    bad.healthy(session, folder, **bad.TP)


@pytest.mark.numbers(57)
@two
def test_one_model_over_another(session, tiny):
    """Other weights, another layout, another architecture; what is there is the last one,
    whole."""
    for arch, layout in (("qwen3", {"pp": 2}), ("llama_untied", {"tp": 2}), ("gpt2", {"fsdp": 2})):
        session.load(tiny(arch), **layout)
        want = reference.reference(str(tiny(arch)), **bad.BATCH).outputs["", 0, "logits"]
        got = session.run(bad.ROWS).logits.tensor()
        torch.testing.assert_close(got[bad.MASK], want[bad.MASK], atol=2e-5, rtol=2e-5)
    bad.healthy(session, tiny("llama"), **bad.TP)


@pytest.mark.numbers(59)
@two
def test_another_models_tokenizer(session, tiny, smollm2, tmp_path):
    """Its ids are beyond the model's vocabulary: said for the first that is, before any engine
    sees it."""
    folder = Path(shutil.copytree(tiny("llama"), tmp_path / "model"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(smollm2 / name, folder)
    session.load(folder, tp=2)
    with pytest.raises(
        PromptError, match=r"token id \d{3,} at position \d+ is outside the vocabulary, 0 to 255"
    ):
        session.run("The capital of France is Paris")
    assert session.run([[5, 6]]).tokens
    bad.healthy(session, tiny("llama"), **bad.TP)


@pytest.mark.numbers(60)
@two
@pytest.mark.parametrize("layout", [{"tp": 2}, {"pp": 2}, {"fsdp": 2}], ids=str)
def test_the_disk_goes_while_it_is_read(session, tiny, broken, layout):
    """After everything was looked at: every engine says so, none waits, and they can load
    again."""

    def goes(stage: str, _done: int, _total: int) -> None:
        if stage == "loading" and broken.exists():
            shutil.rmtree(broken)

    with pytest.raises(LoadError, match="cannot be loaded as"):
        session.load(broken, progress=goes, **layout)
    assert not session.has_model
    bad.healthy(session, tiny("llama"), **bad.TP)


@pytest.mark.numbers(60)
@two
def test_the_disk_goes_for_one_rank_only(session, tiny):
    bad.fit(session, tiny("llama"), **bad.TP)
    session.on_ranks(bad.fails_to_load, 1)
    with pytest.raises(LoadError, match="Input/output error"):
        session.load(tiny("llama_untied"), tp=2)
    bad.healthy(session, tiny("llama"), **bad.TP)
