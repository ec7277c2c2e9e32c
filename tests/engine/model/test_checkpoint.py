"""A loaded model does not lie in its checkpoint's file, whoever writes that anew."""

from __future__ import annotations

import os
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from flexkernel.engine.model.checkpoint import copied_out, files_in_memory
from tests.support import on_engines

IDS = [[5, 6, 7, 8, 9]]


def in_files(tensors) -> int:
    places = files_in_memory()
    return sum(any(start <= t.data_ptr() < end for start, end in places) for t in tensors)


def left_in_files() -> tuple[int, int]:
    """On an engine: (parameters that lie in a file, all of them)."""
    mine = on_engines.local_parameters()
    return in_files(mine), len(mine)


def test_what_lies_in_a_file_is_found_and_copied_with_its_ties(tiny):
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.float32)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert in_files(model.parameters()) == len(before), (
        "else there is nothing to copy, and this test shows nothing"
    )
    assert copied_out(model.parameters()) == len(before) and in_files(model.parameters()) == 0
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert copied_out(model.parameters()) == 0


@pytest.mark.parametrize(
    "layout", [{"tp": 2}, {"pp": 2}, {"fsdp": 2}, {"dp": 2}], ids=lambda d: "x".join(d)
)
@pytest.mark.engines(2)
def test_a_checkpoint_that_is_cut_off_under_its_model_changes_nothing(
    session, tiny, tmp_path, layout
):
    folder = shutil.copytree(tiny("llama"), tmp_path / "model")
    session.load(folder, **layout)
    found = session.on_ranks(left_in_files)
    assert [left for left, _ in found] == [0, 0] and all(total > 10 for _, total in found)
    logits = session.run(IDS).logits.tensor().clone()
    assert logits.abs().sum() > 0
    for file in folder.glob("*.safetensors"):
        os.truncate(file, 4096)
    assert torch.equal(session.run(IDS).logits.tensor(), logits)
