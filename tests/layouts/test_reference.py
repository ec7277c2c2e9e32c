"""The reference is what all other tests believe, so it is checked against torch and transformers
alone."""

from __future__ import annotations

import ast
import dataclasses
import itertools
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from tests.support.models import ARCHS, build, ids_and_mask, tiny
from tests.support.reference import leaves, load, reference


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.mark.parametrize("arch", ARCHS)
def test_every_call_has_its_input_and_output_and_the_logits_are_the_models(arch, folder):
    batch = ids_and_mask([16, 5, 11])
    model = load(tiny(arch, folder))
    fired = Counter()
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: fired.update([name]))
    with torch.no_grad():
        logits = model(**batch, use_cache=False).logits
    ref = reference(tiny(arch, folder), **batch)
    assert "" in fired and len(fired) > 4 * 8
    for found in (ref.outputs, ref.inputs):
        assert {(name, call) for name, call, _ in found} == {
            (n, c) for n, times in fired.items() for c in range(times)
        }
    assert torch.equal(ref.outputs["", 0, "logits"], logits)
    assert torch.equal(ref.inputs["", 0, "input_ids"], batch["input_ids"])


def test_values_are_far_from_trivial(folder):
    ref = reference(tiny("llama", folder), **ids_and_mask([16]))
    layers = [ref.outputs[f"model.layers.{i}", 0, ""] for i in range(4)]
    assert all((a - b).abs().max() > 0.1 for a, b in itertools.pairwise(layers))
    assert ref.outputs["", 0, "logits"].std() > 0.1


def test_a_folder_is_built_once_and_a_seed_gives_one_model(folder):
    path = tiny("qwen3", folder)
    before = (path / "model.safetensors").stat().st_mtime_ns
    assert (
        tiny("qwen3", folder) == path and (path / "model.safetensors").stat().st_mtime_ns == before
    )
    torch.manual_seed(1)
    for (name, a), b in zip(
        load(path).state_dict().items(), build("qwen3").state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name


def test_a_vocabulary_of_257_is_another_folder(folder):
    assert load(tiny("llama", folder, vocab=257)).config.vocab_size == 257
    assert load(tiny("llama", folder)).config.vocab_size == 256


@pytest.mark.parametrize("arch", ["mistral", "gemma2"])
def test_sixteen_positions_exceed_the_window(arch, folder):
    pattern = reference(tiny(arch, folder), **ids_and_mask([16])).attention[
        "model.layers.0.self_attn", "pattern"
    ]
    assert pattern[0, :, 15, :8].abs().max() == 0 and pattern[0, :, 15, 8:].min() > 0


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("arch", ARCHS)
def test_attention_points_rebuild_the_attention(arch, attn, folder):
    batch = ids_and_mask([16, 5, 11])
    ref = reference(tiny(arch, folder), **batch, attn=attn)
    real = batch["attention_mask"].bool()
    modules = {name for name, _ in ref.attention}
    assert len(modules) == 4 and len(ref.attention) == 20
    for name in modules:
        q, k, v, pattern, z = (
            ref.attention[name, point] for point in ("q", "k", "v", "pattern", "z")
        )
        groups = q.shape[1] // k.shape[1]
        mixed = (pattern @ v.repeat_interleave(groups, 1)).transpose(1, 2)
        torch.testing.assert_close(mixed[real], z[real], rtol=1e-4, atol=1e-5)
        scores = (q @ k.repeat_interleave(groups, 1).mT) * ref.model.get_submodule(name).scaling
        if cap := getattr(ref.model.config, "attn_logit_softcapping", None):
            scores = torch.tanh(scores / cap) * cap
        rebuilt = scores.masked_fill(pattern == 0, -torch.inf).softmax(-1).transpose(1, 2)
        torch.testing.assert_close(
            rebuilt[real], pattern.transpose(1, 2)[real], rtol=1e-4, atol=1e-5
        )


def test_asking_for_attention_leaves_the_model_as_it_was(folder):
    batch = ids_and_mask([9])
    ref = reference(tiny("llama", folder), **batch)
    assert not any(
        module._forward_hooks or module._forward_pre_hooks for module in ref.model.modules()
    )
    assert ref.attention
    again = reference(ref.model, **batch)
    assert ref.model.config._attn_implementation == "sdpa"
    assert all(torch.equal(again.outputs[key], value) for key, value in ref.outputs.items())


def test_leaves_walk_nested_values():
    @dataclasses.dataclass
    class Pair:
        left: torch.Tensor
        right: object

    one, two, three = torch.zeros(1), torch.zeros(2), torch.zeros(3)
    assert list(leaves(one)) == [("", one)]
    value = (one, None, {"a": [two, "text"], "b": Pair(three, 7)})
    assert [path for path, _ in leaves(value)] == ["0", "2.a.0", "2.b.left"]


def test_the_reference_does_not_know_flexkernel():
    tree = ast.parse(Path(sys.modules["tests.support.reference"].__file__).read_text())
    named = [n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    named += [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
    assert "torch" in named and not any(name.startswith("flexkernel") for name in named)
