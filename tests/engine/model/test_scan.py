"""The scan: a formula made on the meta device at two sizes is the shape that a real forward has at
any other."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from flexkernel.engine.model import attention
from flexkernel.engine.model.scan import SIZES, TERMS, WINDOW, dim_of, formula, scan, unsharded
from flexkernel.errors import LoadError
from flexkernel.wire import ShapeFormula
from tests.support import reference

WIDTHS = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
GQA = {**WIDTHS, "num_key_value_heads": 2}
SPECIAL = {"vocab_size": 96, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
WINDOWED = 5  # the real models' window; the scan's is another

ARCHS = {
    "Llama": GQA,
    "Qwen2": GQA,
    "Qwen3": {**GQA, "head_dim": 8},
    "Phi3": GQA,
    "Olmo2": GQA,
    "Mistral": {**GQA, "sliding_window": WINDOWED},
    "Gemma2": {**GQA, "head_dim": 8, "sliding_window": WINDOWED},
    "Gemma3Text": {**GQA, "head_dim": 8, "sliding_window": WINDOWED},
    "Mixtral": {**GQA, "num_local_experts": 4, "sliding_window": None},
    "GptOss": {**GQA, "head_dim": 8, "num_local_experts": 4, "sliding_window": WINDOWED},
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "GPTJ": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 128},
    "GPTNeoX": {**WIDTHS, "max_position_embeddings": 128},
    "OPT": {
        "hidden_size": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 32,
    },
    "Bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "Falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    "Mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
}
WITHOUT_POINTS = {"GPTJ", "Bloom", "Falcon", "Mamba"}  # they do not go through AttentionInterface
WITH_EXPERTS = {"Mixtral", "GptOss"}


def config(arch: str):
    return getattr(transformers, f"{arch}Config")(**SPECIAL, **ARCHS[arch])


def real(arch: str) -> nn.Module:
    return transformers.AutoModelForCausalLM.from_config(
        config(arch), attn_implementation="eager"
    ).eval()


Shapes = dict[tuple[str, str], list[dict[str, tuple[tuple[int, ...], str]]]]


def observed(model: nn.Module, B: int, S: int, past: int = 0) -> Shapes:
    """The shape of every tensor of one real forward, by hooks of the test's own."""
    found: Shapes = {}

    def note(name: str, at: str, value) -> None:
        shapes = {
            p: (tuple(t.shape), str(t.dtype).removeprefix("torch."))
            for p, t in reference.leaves(value)
        }
        found.setdefault((name, at), []).append(shapes)

    ids = torch.randint(3, 90, (B, past + S))
    positions = torch.arange(past + S).expand(B, -1)
    mask = torch.ones(B, past + S, dtype=torch.long)
    cache = transformers.DynamicCache(config=model.config) if past else None
    with torch.no_grad():
        if past:
            model(
                ids[:, :past],
                attention_mask=mask[:, :past],
                position_ids=positions[:, :past],
                past_key_values=cache,
            )
        with noting(model, note):
            more = {"past_key_values": cache, "use_cache": True} if past else {"use_cache": False}
            model(
                input_ids=ids[:, past:],
                attention_mask=mask,
                position_ids=positions[:, past:],
                **more,
            )
    return found


class noting:
    """Hooks on every module and taps on every point of attention, for as long as it is entered."""

    def __init__(self, model: nn.Module, note):
        self.model, self.note, self.handles = model, note, []

    def __enter__(self) -> None:
        attention.install()
        for name, module in self.model.named_modules():
            before = lambda _, args, kwargs, name=name: self.note(  # noqa: E731
                name, "input", {**dict(enumerate(args)), **kwargs}
            )
            after = lambda _, args, out, name=name: self.note(name, "output", out)  # noqa: E731
            self.handles += [
                module.register_forward_pre_hook(before, with_kwargs=True),
                module.register_forward_hook(after),
            ]
            for point in attention.POINTS:
                tapped = lambda value, name=f"{name}.@{point}": self.note(name, "output", value())  # noqa: E731
                attention.tap(module, point, tapped)

    def __exit__(self, *error) -> None:
        for handle in self.handles:
            handle.remove()
        for module in self.model.modules():
            for point in attention.POINTS:
                attention.untap(module, point)


def differences(
    found: dict, truth: Shapes, B: int, S: int, past: int, window: int
) -> Iterator[str]:
    """Where a formula says another shape or dtype than the real forward, or says nothing."""
    for where, calls in truth.items():
        if len(found.get(where, ())) != len(calls):
            yield f"{where}: {len(calls)} calls, scanned {len(found.get(where, ()))}"
            continue
        for leaves, shapes in zip(found[where], calls, strict=True):
            formulas = {leaf.path: leaf for leaf in leaves}
            for path, (shape, dtype) in shapes.items():
                leaf = formulas.get(path)
                if leaf is None or leaf.dims is None:
                    yield f"{where} [{path}]: {'no formula' if leaf else 'not scanned'} for {shape}"
                elif (leaf.shape(B, S, past, window), leaf.dtype) != (shape, dtype):
                    yield f"{where} [{path}]: {leaf} says {leaf.shape(B, S, past, window)}, it is {shape} {dtype}"


@pytest.fixture(scope="module")
def models() -> dict[str, tuple[dict, nn.Module]]:
    return {}


def scanned(models: dict, arch: str) -> tuple[dict, nn.Module]:
    if arch not in models:
        models[arch] = (scan(unsharded(config(arch), torch.float32)), real(arch))
    return models[arch]


def sorted_by_expert(line: str) -> bool:
    return ".experts." in line


# --- against real forwards ------------------------------------------------------------


@pytest.mark.parametrize(("B", "S"), [(1, 1), (1, 7), (4, 6), (5, 13)])
@pytest.mark.parametrize("arch", ARCHS)
def test_formulas_are_the_shapes_of_a_real_forward(arch, B, S, models):
    found, model = scanned(models, arch)
    truth = observed(model, B, S)
    assert len(truth) > 25
    wrong = [
        line for line in differences(found, truth, B, S, 0, WINDOWED) if not sorted_by_expert(line)
    ]
    assert wrong == []


@pytest.mark.parametrize(("B", "S", "past"), [(3, 1, 3), (2, 1, 12), (1, 3, 4)])
@pytest.mark.parametrize("arch", [arch for arch in ARCHS if arch != "Mamba"])
def test_formulas_are_the_shapes_of_a_cached_step(arch, B, S, past, models):
    found, model = scanned(models, arch)
    truth = observed(model, B, S, past)
    wrong = [
        line
        for line in differences(found, truth, B, S, past, WINDOWED)
        if not sorted_by_expert(line)
    ]
    assert wrong == []


@pytest.mark.parametrize("arch", sorted(WITH_EXPERTS))
def test_nothing_inside_experts_has_a_formula(arch, models):
    """Their rows may have a shape that a formula fits; their order is the data's."""
    found, _ = scanned(models, arch)
    inside = [
        leaf
        for (name, _), calls in found.items()
        if ".experts." in name
        for leaves in calls
        for leaf in leaves
    ]
    assert all(leaf.dims is None for leaf in inside)
    assert arch != "Mixtral" or inside
    around = [
        leaves
        for (name, _), calls in found.items()
        if name.endswith(".experts")
        for leaves in calls
    ]
    assert around and all(leaf.dims is not None for leaves in around for leaf in leaves)


@pytest.mark.parametrize("arch", ARCHS)
def test_attention_has_points_where_it_goes_through_the_interface(arch, models):
    points = {name.rpartition(".@")[2] for name, _ in scanned(models, arch)[0] if ".@" in name}
    assert points == (set() if arch in WITHOUT_POINTS else set(attention.POINTS))


def test_a_window_is_a_term_of_its_own(models):
    mistral, gemma = scanned(models, "Mistral")[0], scanned(models, "Gemma2")[0]
    key = lambda found, layer: found[f"model.layers.{layer}.self_attn.@k", "output"][0][0].dims[2]  # noqa: E731
    assert key(mistral, 0) == key(gemma, 0) == (1, "W+S")
    assert key(gemma, 1) == (1, "P+S"), "every other layer of Gemma-2 has none"
    assert key(scanned(models, "Llama")[0], 0) == (1, "P+S")


def test_a_scan_leaves_nothing_on_the_model():
    model = unsharded(config("Llama"), torch.float32)
    scan(model)
    assert not any(
        m._forward_hooks or m._forward_pre_hooks or attention.TAPS in m.__dict__
        for m in model.modules()
    )


def test_the_scan_of_a_windowed_model_leaves_the_config_alone():
    given = config("Mistral")
    unsharded(given, torch.float32)
    assert given.sliding_window == WINDOWED


def test_the_dtype_is_the_loads():
    found = scan(unsharded(config("Llama"), torch.bfloat16))
    assert found["model.layers.0.mlp", "output"][0][0].dtype == "bfloat16"
    assert found["model.embed_tokens", "input"][0][0].dtype == "int64"


def test_the_comparison_can_fail(models):
    found, model = scanned(models, "Llama")
    broken = {
        **found,
        ("lm_head", "output"): ((ShapeFormula("", ((1, "S"), (1, "B"), (96, "")), "float32"),),),
    }
    assert any("lm_head" in line for line in differences(broken, observed(model, 2, 3), 2, 3, 0, 0))


# --- other modules --------------------------------------------------------------------


class Odd(nn.Module):
    """A module of each kind that is hard: called twice, returning a dict, sorting rows,
    flattening, keeping S first."""

    def __init__(self):
        super().__init__()
        self.embed, self.twice, self.flat = nn.Embedding(32, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.experts = nn.ModuleDict({"up": nn.Linear(4, 4)})
        self.picked, self.never, self.halved = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, input_ids, attention_mask=None, position_ids=None, use_cache=None):
        x = self.twice(self.twice(self.embed(input_ids)))
        flat = self.flat(x.flatten(0, 1))
        self.picked(torch.cat([flat, flat]))
        self.experts["up"](flat)
        self.halved(x[:, : (x.shape[1] + 1) // 2])
        return {"seq": x.transpose(0, 1), "none": None, "flat": flat}


def formulas(name: str) -> list[list[str]]:
    with torch.device("meta"):
        found = scan(Odd())
    return [
        [f"{leaf.path}: {leaf}" for leaf in leaves] for leaves in found.get((name, "output"), ())
    ]


def test_a_module_called_twice_has_two_calls():
    assert formulas("twice") == [[": B×S×4"], [": B×S×4"]]


def test_a_dicts_tensors_have_formulas_in_any_order_of_dims():
    assert formulas("") == [["seq: S×B×4", "flat: B*S×4"]]


def test_rows_that_outnumber_the_tokens_have_no_formula():
    assert formulas("picked") == [[": depends on the data"]]


def test_rows_inside_experts_have_no_formula_although_their_number_fits_one():
    """With one expert a token they are as many as the tokens, sorted by expert."""
    assert formulas("flat") == [[": B*S×4"]] and formulas("experts.up") == [
        [": depends on the data"]
    ]


def test_a_shape_that_is_no_multiple_has_no_formula():
    assert formulas("halved") == [[": depends on the data"]]


def test_a_module_that_never_fires_is_not_there():
    assert formulas("never") == []


def test_a_model_that_needs_data_is_refused_with_the_way_out(session):
    class Reads(Odd):
        def forward(self, input_ids, **_):
            return self.embed(input_ids) * input_ids.sum().item()

    with pytest.raises(
        LoadError, match=r"Reads cannot be scanned, .* meta device .*: load it with a builder"
    ):
        session.load(Reads, reference=Reads)


# --- one dim --------------------------------------------------------------------------


@given(st.sampled_from(sorted(TERMS)), st.integers(1, 64))
def test_a_multiple_of_a_term_is_found_as_what_it_is(term, factor):
    """No other term gives the same numbers at all sizes."""
    values = [factor * TERMS[term](*size) for size in SIZES]
    found = dim_of(values, SIZES)
    if term == "P":
        assert found is None  # it is 0 without a past
    else:
        assert found == (factor, term)


@given(st.integers(0, 500))
def test_a_constant_is_a_constant(value):
    assert dim_of([value] * len(SIZES), SIZES) == (value, "")


@given(st.lists(st.integers(1, 400), min_size=len(SIZES), max_size=len(SIZES)))
def test_whatever_is_found_gives_back_the_numbers_it_was_found_from(values):
    found = dim_of(values, SIZES)
    if found is not None:
        shape = [
            ShapeFormula("", (found,), "float32").shape(B, S, past, WINDOW)[0]
            for B, S, past in SIZES
        ]
        assert shape == values


def test_one_sighting_is_no_formula():
    assert formula("m", [(2, 3), None, None, None], SIZES) is None
    assert formula("m", [(2, 11), (3, 17, 1), (5, 13), (2, 1)], SIZES) is None
