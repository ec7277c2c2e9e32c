"""A model streamed from its files does what the whole one does, with no more than a layer's
weights in memory."""

from __future__ import annotations

import pytest
import torch

from flexkernel.engine.model.layerwise import streamed, units
from flexkernel.errors import LoadError
from tests.support import models

BATCH = models.ids_and_mask([5, 8])


def real_parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if not p.is_meta)


@pytest.mark.parametrize("arch", ["llama", "llama_untied", "qwen3", "gpt2", "gemma2", "mistral"])
def test_it_equals_the_whole_model_and_holds_one_layer_at_a_time(arch, tiny):
    whole = models.build(arch)
    model = streamed(str(tiny(arch)), torch.float32, "cpu", whole.config._attn_implementation)
    most = []
    for module in model.modules():
        module.register_forward_hook(lambda *_: most.append(real_parameters(model)))
    assert real_parameters(model) == 0
    with torch.no_grad():
        logits = model(**BATCH, use_cache=False).logits
        truth = whole(**BATCH, use_cache=False).logits
    assert torch.equal(logits, truth)
    largest = max(sum(p.numel() for p in unit.parameters()) for unit in units(model))
    assert 0 < max(most) <= largest < sum(p.numel() for p in whole.parameters()) / 2
    assert real_parameters(model) == 0


def test_a_forward_that_fails_lets_go_of_its_weights_too(tiny):
    model = streamed(str(tiny("llama")), torch.float32, "cpu", "sdpa")

    def boom(*_):
        assert real_parameters(model) > 0
        raise ZeroDivisionError

    model.model.layers[1].mlp.register_forward_hook(boom)
    with pytest.raises(ZeroDivisionError):
        model(**BATCH)
    assert real_parameters(model) == 0


def test_in_half_precision_it_is_what_from_pretrained_makes(tiny):
    from transformers import AutoModelForCausalLM

    whole = AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.bfloat16).eval()
    model = streamed(str(tiny("llama")), torch.bfloat16, "cpu", "sdpa")
    with torch.no_grad():
        assert torch.equal(model(**BATCH).logits, whole(**BATCH).logits)


def test_a_checkpoint_that_is_converted_as_it_is_loaded_is_refused(tiny):
    with pytest.raises(LoadError, match=r"hold no tensor .*experts.*|hold no tensor .*mlp.gate"):
        streamed(str(tiny("mixtral")), torch.float32, "cpu", "sdpa")


def test_a_folder_without_safetensors_is_refused(tiny, tmp_path):
    (tmp_path / "config.json").write_text((tiny("llama") / "config.json").read_text())
    with pytest.raises(LoadError, match=r"has no model\.safetensors"):
        streamed(str(tmp_path), torch.float32, "cpu", "sdpa")
