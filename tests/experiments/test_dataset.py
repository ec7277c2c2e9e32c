"""A dataset holds the unsharded model's activations of every real token, whatever layouts wrote it
and wherever it was interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
import torch

import flexkernel as fk
from flexkernel.errors import CaptureError, HookError
from tests.support import models, reference
from tests.support.waiting import until

PROMPTS = [[5 + (7 * i + 3 * j) % 200 for j in range(1 + (5 * i) % 9)] for i in range(11)]
LAYER, GATE, MLP = "model.layers.1", "model.layers.2.mlp.gate_proj", "model.layers.*.mlp"
Z = "model.layers.3.self_attn.@z"


@pytest.fixture(scope="module")
def unsharded(tiny):
    """Name → (tokens, ...), of each prompt by itself."""
    found: dict[str, list[torch.Tensor]] = {}
    model = models.build("llama")
    for row in PROMPTS:
        ids = torch.tensor([row])
        seen = reference.reference(model, ids, torch.ones_like(ids), torch.arange(len(row))[None])
        for name in (LAYER, GATE, "model.layers.0.mlp", "model.layers.3.mlp"):
            found.setdefault(name, []).append(seen.outputs[name, 0, ""][0])
    return {name: torch.cat(parts) for name, parts in found.items()}


def close(have: torch.Tensor, want: torch.Tensor) -> None:
    assert want.numel() and want.abs().max() > 0
    torch.testing.assert_close(have, want, rtol=2e-5, atol=5e-5)


def lengths() -> list[int]:
    return [len(row) for row in PROMPTS]


@pytest.mark.engines(2)
def test_a_dataset_is_the_unsharded_models_whatever_layouts_wrote_it(
    session, tiny, unsharded, tmp_path
):
    """It is begun under one layout and ended under another."""
    told: list[tuple[str, int, int]] = []

    def interrupted(stage: str, done: int, total: int) -> None:
        told.append((stage, done, total))
        if len(told) == 2:  # as Ctrl-C does
            raise KeyboardInterrupt

    folder = tmp_path / "acts"
    for number, layout in enumerate([{"tp": 2}, {"dp": 2}, {"pp": 2}]):
        session.load(tiny("llama"), **layout)
        session.hook(LAYER)
        session.hook(GATE)
        session.hook(MLP)
        session.hook(GATE, reduce="norm:-1", name="norms")
        session.hook(LAYER, reduce="mean:1", name="means")
        session.hook(LAYER, positions=[-1], name="last")
        if number < 2:
            part = session.collect(
                PROMPTS[: 4 * number + 4], path=folder, batch_size=2, progress=interrupted
            )
            assert len(part) == 4 * number + 4 and part.complete == (number == 1)
        else:
            made = session.collect(PROMPTS, path=folder, batch_size=2)
    data = fk.open_dataset(folder)
    assert (
        data.complete
        and made.complete
        and len(data) == 11
        and data.lengths == lengths()
        and data.tokens == PROMPTS
    )
    writers = {
        name.partition("-")[2] for batch in data._index["batches"] for name in batch["files"]
    }
    assert writers == {"0.safetensors", "1.safetensors", "driver.safetensors"}
    for name, want in unsharded.items():
        close(data[name], want)
    close(data[f"{GATE} output norm:-1"], unsharded[GATE].norm(dim=-1))
    by_prompt = unsharded[LAYER].split(lengths())
    close(data[f"{LAYER} output mean:1"], torch.stack([rows.mean(0) for rows in by_prompt]))
    close(torch.cat(list(data.batches(GATE))), unsharded[GATE])
    close(data.prompt(LAYER, 9), by_prompt[9])
    assert told[1][1:] == (4, 4) and "tokens/s" in told[0][0]
    assert session.runs == [] and "11 prompts" in repr(data) and "<table" in data._repr_html_()


@pytest.fixture
def loaded(session, tiny):
    session.load(tiny("llama"))
    return session


def test_hooks_of_a_collection_are_there_for_it_only(loaded, unsharded, tmp_path):
    loaded.hook(LAYER, edit="zero")
    before = loaded.hooks.hook_set
    data = loaded.collect(PROMPTS, [MLP, Z], tmp_path / "a", batch_size=4)
    assert loaded.hooks.hook_set == before and data.names == [
        *(f"model.layers.{i}.mlp" for i in range(4)),
        Z,
    ]
    close(data["model.layers.3.mlp"], unsharded["model.layers.3.mlp"])  # without the user's edit
    assert data[Z].shape == (sum(lengths()), 8, 8)
    last = loaded.collect(iter(PROMPTS), MLP, tmp_path / "b", positions=-1, batch_size=4)
    ends = torch.tensor(lengths()).cumsum(0) - 1
    close(last["model.layers.0.mlp"], unsharded["model.layers.0.mlp"][ends])


def test_what_is_not_to_be_told_by_prompts_is_refused(loaded, tmp_path):
    for does, kind, says in [
        (
            lambda: loaded.collect(PROMPTS, "**.@pattern", tmp_path),
            HookError,
            "more than one dim is as long as a prompt",
        ),
        (
            lambda: loaded.collect(PROMPTS, MLP, tmp_path, reduce="mean:0"),
            HookError,
            "prompts cannot be told apart",
        ),
        (lambda: loaded.collect(PROMPTS, path=tmp_path), HookError, "no hook would keep anything"),
        (lambda: loaded.collect("text", MLP, tmp_path), HookError, "give a list of them"),
        (
            lambda: loaded.collect(PROMPTS, MLP, tmp_path, batch_size=0),
            HookError,
            "batch_size=0: give 1 or more",
        ),
        (
            lambda: loaded.collect(PROMPTS, path=tmp_path, at="input"),
            HookError,
            "your own hooks have theirs",
        ),
        (
            lambda: fk.open_dataset(tmp_path / "nothing"),
            CaptureError,
            "cannot be read as a dataset",
        ),
    ]:
        with pytest.raises(kind, match=says):
            does()
    data = loaded.collect(PROMPTS[:3], MLP, tmp_path / "a")
    with pytest.raises(CaptureError, match="holds other prompts: batch 0 differs"):
        loaded.collect(PROMPTS, MLP, tmp_path / "a")
    with pytest.raises(CaptureError, match="was collected with hooks="):
        loaded.collect(PROMPTS[:3], LAYER, tmp_path / "a")
    with pytest.raises(
        CaptureError, match=r"has no capture 'model\.layers\.1\.mpl'; it has model\.layers\.1\.mlp"
    ):
        data["model.layers.1.mpl"]
    with pytest.raises(CaptureError, match="no prompt 3"):
        data.prompt("model.layers.1.mlp", 3)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x").touch()
    with pytest.raises(CaptureError, match="is not empty and holds no dataset"):
        loaded.collect(PROMPTS, MLP, tmp_path / "other")


KILLED = """
import sys, flexkernel as fk
folder, model = sys.argv[1:]
prompts = [[5 + (7 * i + 3 * j) % 200 for j in range(1 + (5 * i) % 9)] for i in range(11)] * 300
with fk.local() as session:
    session.load(model)
    session.collect(prompts, "model.layers.1", folder, batch_size=11)
"""


@pytest.mark.slow
def test_a_collection_that_was_killed_goes_on(loaded, tiny, unsharded, tmp_path):
    folder = tmp_path / "acts"
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(folder), str(tiny("llama"))], env={**os.environ}
    )
    until(lambda: (folder / "index.json").exists() or child.poll() is not None, 120)
    child.send_signal(signal.SIGKILL)
    child.wait()
    there = json.loads((folder / "index.json").read_text())["batches"]
    assert 0 < len(there) < 300, "it was killed on its way"
    data = loaded.collect(PROMPTS * (len(there) + 2), "model.layers.1", folder, batch_size=11)
    assert data.complete and len(data) == 11 * (len(there) + 2)
    close(data[LAYER], unsharded[LAYER].repeat(len(there) + 2, 1))
