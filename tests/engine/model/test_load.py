"""Loading: what cannot be is refused before anything is read, by a sentence; what can be is what
transformers loads."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers
from torch import nn

from flexkernel.engine.model.inspection import (
    advice,
    attention_of,
    check_degrees,
    check_path,
    dtype_of,
    inspect,
    layouts_of,
)
from flexkernel.engine.model.load import build, local_bytes, local_parameters
from flexkernel.errors import LayoutError, LoadError
from flexkernel.wire import Layout, Source
from tests.support import reference

SMOLLM2 = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 4,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 64,
}


def on_meta(kind: str, **options) -> tuple:
    config = getattr(transformers, f"{kind}Config")(**options)
    with torch.device("meta"):
        return config, transformers.AutoModelForCausalLM.from_config(config)


# --- degrees --------------------------------------------------------------------------


def test_tp_must_divide_the_heads_and_says_what_would():
    config, model = on_meta("Llama", **SMOLLM2)
    check_degrees(config, model, Layout(tp=3))
    with pytest.raises(
        LayoutError,
        match=r"tp=2 does not divide LlamaForCausalLM's 9 attention heads; tp could be \[3\]",
    ):
        check_degrees(config, model, Layout(tp=2))
    with pytest.raises(
        LayoutError, match="tp=9 does not divide LlamaForCausalLM's 3 key/value heads"
    ):
        check_degrees(config, model, Layout(tp=9))


def test_the_advice_is_what_this_model_and_these_engines_can_have():
    config, model = on_meta("Llama", **SMOLLM2)
    expected = (Layout(fsdp=2), Layout(pp=2), Layout(dp=2))
    assert layouts_of(config, model, 2) == expected, "2 does not divide 9 heads"
    assert layouts_of(config, model, 3)[0] == Layout(tp=3)
    assert advice(config, model, 2) == "; over 2 engines it can have fsdp=2, pp=2 or dp=2"


@pytest.mark.engines(2)
def test_without_a_degree_a_model_is_split_as_it_can_be(session, tiny):
    assert session.load(tiny("llama")).layout == Layout(tp=2)
    assert session.load(tiny("gpt2")).layout == Layout(fsdp=2), "it has no plan for tp or pp"


def test_tp_must_divide_the_mlp():
    config, model = on_meta(
        "Llama",
        **{
            **SMOLLM2,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "intermediate_size": 1022,
        },
    )
    with pytest.raises(LayoutError, match="tp=4 does not divide LlamaForCausalLM's 1022 MLP width"):
        check_degrees(config, model, Layout(tp=4))


GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64}


def test_an_architecture_without_a_plan_is_refused_with_what_does_work():
    config, model = on_meta("GPT2", **GPT2)
    with pytest.raises(
        LayoutError, match=r"tp=2: GPT2LMHeadModel has no tensor-parallel plan .* use fsdp= or dp="
    ):
        check_degrees(config, model, Layout(tp=2))
    with pytest.raises(
        LayoutError, match=r"pp=2: GPT2LMHeadModel cannot be split into stages.*transformer\.layers"
    ):
        check_degrees(config, model, Layout(pp=2))
    check_degrees(config, model, Layout(fsdp=2))


def test_stages_need_a_layer_each():
    config, model = on_meta("Llama", **SMOLLM2)
    check_degrees(config, model, Layout(pp=4))
    with pytest.raises(
        LayoutError, match="pp=5 stages need as many layers; LlamaForCausalLM has 4"
    ):
        check_degrees(config, model, Layout(pp=5))


def test_one_engine_needs_nothing():
    for kind, options in (
        ("Llama", SMOLLM2),
        ("GPT2", GPT2),
        ("Bloom", {"hidden_size": 32, "n_layer": 1, "n_head": 4}),
    ):
        check_degrees(*on_meta(kind, **options), Layout())


# --- paths ----------------------------------------------------------------------------


def inspected(source: str | Source, layout: Layout = Layout(), dtype: str = "float32", attn=None):  # noqa: B008
    return inspect(
        source if isinstance(source, Source) else Source(str(source)), layout, dtype, attn, {}
    )


def test_a_folder_that_is_not_there_names_those_beside_it(tmp_path):
    (tmp_path / "llama").mkdir()
    with pytest.raises(LoadError, match=r"there is no model folder .*/lama; beside it are llama"):
        inspected(tmp_path / "lama")
    with pytest.raises(LoadError, match=r"there is no model folder \./nowhere/at/all$"):
        inspected("./nowhere/at/all")


def test_a_folder_without_a_config_is_no_model(tmp_path):
    with pytest.raises(
        LoadError, match=r"holds no config\.json: it is not a saved transformers model"
    ):
        inspected(tmp_path)


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "weights.gguf").touch()
    with pytest.raises(LoadError, match="there is no model folder"):
        inspected(tmp_path / "weights.gguf")


@pytest.mark.parametrize("text", ["", "not json", "[]", '{"model_type": "no-such-model"}', "{}"])
def test_a_config_that_means_nothing_is_one_sentence(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(LoadError) as caught:
        inspected(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_name_that_is_no_folder_is_taken_for_one_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_path("gpt2")
    check_path("owner/name")
    with pytest.raises(LoadError, match="is neither a model folder nor a model the hub knows"):
        inspected("owner/no-such-model-at-all")


def test_code_of_a_repository_is_not_run(tiny, tmp_path):
    """trust_remote_code stays off, whatever the config asks for."""
    ran = tmp_path / "ran"
    folder = tmp_path / "model"
    folder.mkdir()
    config = json.loads((tiny("llama") / "config.json").read_text())
    config |= {
        "model_type": "mine",
        "auto_map": {"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.Model"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text(f"open({str(ran)!r}, 'w').close()\nraise SystemExit")
    with pytest.raises(LoadError):
        inspected(folder)
    assert not ran.exists()


def test_weights_are_never_unpickled(tiny, session, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text((tiny("llama") / "config.json").read_text())
    torch.save(reference.load(tiny("llama")).state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(LoadError, match="cannot be loaded as one engine"):
        session.load(folder)


# --- dtypes and attention -------------------------------------------------------------


@pytest.mark.parametrize("name", ["int64", "float33", "", "nn", "bool", "cuda", "Tensor"])
def test_a_dtype_that_is_none_is_refused(name):
    with pytest.raises(
        LoadError, match=f"dtype '{name}' is not one of torch's floating point types"
    ):
        dtype_of(name)


def test_attention_is_sdpa_where_there_is_sdpa():
    assert attention_of(None, on_meta("Llama", **SMOLLM2)[1]) == "sdpa"
    assert attention_of("flash", None) == "flash_attention_2"
    assert attention_of("eager", None) == "eager"


def test_an_attention_that_is_not_there_is_refused(tiny, session):
    with pytest.raises(LoadError, match="no-such"):
        session.load(tiny("llama"), attn="no-such")


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_the_attention_asked_for_is_loaded(attn, tiny, session):
    assert session.load(tiny("llama"), attn=attn).attention == attn
    assert session.engines.runtime.model.config._attn_implementation == attn


# --- devices --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("cuda:1", "device='cuda:1' is not one of cpu, cuda"),
        ("cuda", "device='cuda': torch sees no GPU on"),
    ],
)
def test_a_device_that_is_not_there_is_refused_and_the_loaded_model_stays(
    device, message, tiny, session, monkeypatch
):
    monkeypatch.setattr(session.engines, "gpus", {})
    session.load(tiny("llama"))
    with pytest.raises(LoadError, match=message):
        session.load(tiny("llama"), device=device)
    assert session.engines.device == "cpu" and session.run([[5, 6]]).logits.shape[1] == 2


# --- what is known before, and what is loaded -----------------------------------------


def test_a_model_is_known_before_anything_is_read(tiny, tmp_path):
    """The folder holds a config and no weights."""
    (tmp_path / "config.json").write_text((tiny("llama") / "config.json").read_text())
    info = inspected(tmp_path, dtype="bfloat16")
    assert (info.cls, info.vocab_size, info.dtype) == ("LlamaForCausalLM", 256, "bfloat16")
    assert info.names[:2] == ["", "model"] and "model.layers.3.mlp.act_fn" in info.names
    assert info.num_parameters == sum(p.numel() for p in reference.load(tiny("llama")).parameters())


@pytest.mark.parametrize("arch", ["llama", "gpt2", "mixtral"])
def test_what_is_loaded_is_what_transformers_loads(arch, tiny, session):
    info = session.load(tiny(arch))
    ours, theirs = session.engines.runtime.model, reference.load(tiny(arch))
    assert info.rank_parameters == (info.num_parameters,)
    assert not ours.training and not any(p.requires_grad for p in ours.parameters())
    for (name, a), (other, b) in zip(
        ours.state_dict().items(), theirs.state_dict().items(), strict=True
    ):
        assert name == other and torch.equal(a, b)


def test_the_dtype_is_the_one_asked_for(tiny, session):
    for dtype in ("bfloat16", torch.float64):
        info = session.load(tiny("llama"), dtype=dtype)
        assert info.dtype == str(dtype).removeprefix("torch.")
        assert str(session.run([[5, 6]]).logits.dtype).endswith(info.dtype)


def test_tied_parameters_are_counted_once():
    model = nn.ModuleDict({"a": nn.Linear(4, 4, bias=False), "b": nn.Linear(4, 4, bias=False)})
    model["b"].weight = model["a"].weight
    assert (local_parameters(model), local_bytes(model)) == (16, 64)


def test_a_builder_must_return_a_module():
    import cloudpickle

    with pytest.raises(
        LoadError, match=r"the builder returned str on this rank; it should return an nn.Module"
    ):
        build(cloudpickle.dumps(lambda: "model"))
    assert not build(cloudpickle.dumps(lambda: nn.Dropout())).training


def test_a_model_is_scanned_once_for_each_config_and_dtype(tiny, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny("llama"), folder)
    first, again, half = (
        inspect(Source(str(folder)), Layout(), dtype, None, {}).scan
        for dtype in ("float32", "float32", "bfloat16")
    )
    assert again is first and {
        f.dtype for calls in half.values() for call in calls for f in call
    } >= {"bfloat16"}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    other = inspect(Source(str(folder)), Layout(), "float32", None, {}).scan
    assert ("model.layers.1", "output") in first and ("model.layers.1", "output") not in other
