"""Globs over module names."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexkernel.errors import HookError
from flexkernel.names import match, nearest, select

LLAMA = ["", "model", "model.embed_tokens", "model.layers"]
for layer in range(12):
    LLAMA += [f"model.layers.{layer}"]
    LLAMA += [
        f"model.layers.{layer}.{part}"
        for part in ("self_attn", "self_attn.@q", "self_attn.q_proj", "mlp")
    ]
LLAMA += ["model.norm", "lm_head"]


@pytest.mark.parametrize(
    ("glob", "name"),
    [
        ("lm_head", "lm_head"),
        ("model.layers.3.mlp", "model.layers.3.mlp"),
        ("model.layers.*.mlp", "model.layers.11.mlp"),
        ("model.layers.1*", "model.layers.11"),
        ("model.layers.*1", "model.layers.1"),
        ("*.norm", "model.norm"),
        ("*", "lm_head"),
        ("*.*", "model.norm"),
        ("lm_*d", "lm_head"),
        ("**", "lm_head"),
        ("**", "model.layers.3.mlp"),
        ("**.mlp", "mlp"),
        ("**.mlp", "model.layers.3.mlp"),
        ("model.**", "model"),
        ("model.**", "model.layers.3"),
        ("model.**.mlp", "model.mlp"),
        ("model.**.mlp", "model.layers.3.mlp"),
        ("**.layers.**.q_proj", "model.layers.0.self_attn.q_proj"),
        ("**.3.**", "model.layers.3"),
        ("**.**", "lm_head"),
        ("", ""),
    ],
)
def test_these_match(glob, name):
    assert match(glob, name)


@pytest.mark.parametrize(
    ("glob", "name"),
    [
        ("lm_head", "model.lm_head"),
        ("mlp", "model.layers.3.mlp"),
        ("model.layers.3", "model.layers.3.mlp"),
        ("model.layers.3.mlp", "model.layers.3"),
        ("*", "model.norm"),
        ("model.*", "model"),
        ("model.*", "model.layers.3"),
        ("model.layers.*.mlp", "model.layers.3.self_attn.mlp"),
        ("model.layers.1", "model.layers.11"),
        ("**.mlp", "model.layers.3.xmlp"),
        ("**.mlp", "model.layers.3.mlp.up_proj"),
        ("model.**", "models.layers"),
        ("model.**.mlp", "modelmlp"),
        ("LM_HEAD", "lm_head"),
    ],
)
def test_these_do_not_match(glob, name):
    assert not match(glob, name)


@pytest.mark.parametrize("glob", ["*", "**", "*.*", "**.*", "model"])
def test_only_the_empty_glob_matches_the_root(glob):
    assert match("", "") and not match(glob, "") and not match("", "model")


@pytest.mark.parametrize(
    "glob",
    ["model.layers.?", "model.layers.[0-3]", "model.layers.(0|1)", "model|lm_head", "model+"],
)
def test_other_wildcards_are_plain_characters(glob):
    assert match(glob, glob) and not any(match(glob, name) for name in LLAMA)


def test_a_dot_is_only_a_dot():
    assert not match("lm.head", "lm_head")


@pytest.mark.parametrize(
    "glob", ["**", "model.layers.*.self_attn.*", "model.**", "**.*q", "**.self_attn.**", "**.*"]
)
def test_a_virtual_point_matches_only_if_its_at_is_written(glob):
    assert not match(glob, "model.layers.0.self_attn.@q")


@pytest.mark.parametrize(
    "glob", ["model.layers.*.self_attn.@q", "**.@q", "**.self_attn.@*", "model.**.@q"]
)
def test_a_written_virtual_point_matches(glob):
    assert match(glob, "model.layers.0.self_attn.@q") and not match(
        glob, "model.layers.0.self_attn.q_proj"
    )


def test_selection_keeps_the_models_order():
    found = select("model.layers.*.mlp", LLAMA)
    assert found == [f"model.layers.{layer}.mlp" for layer in range(12)]


def test_two_stars_select_every_module_but_the_root_and_the_virtual_points():
    assert select("**", LLAMA) == [name for name in LLAMA if name and "@" not in name]


def test_selection_takes_any_iterable():
    assert select("model.*", iter(LLAMA)) == ["model.embed_tokens", "model.layers", "model.norm"]


@pytest.mark.parametrize("glob", ["model.layers.*.mpl", "modle.layers.*.mlp", "layers.*.mlp"])
def test_nothing_matched_is_an_error_with_the_nearest_names(glob):
    with pytest.raises(HookError, match=r"nearest: model\.layers\.\*\.mlp") as caught:
        select(glob, LLAMA)
    assert str(caught.value).startswith(f"no module matches '{glob}' among {len(LLAMA)}; nearest: ")


def test_nothing_near_is_said_without_names():
    with pytest.raises(HookError, match=r"^no module matches 'xyzzy' among 66$"):
        select("xyzzy", LLAMA)


def test_no_modules_at_all_is_an_error_too():
    with pytest.raises(HookError, match="among 0"):
        select("**", [])


def test_the_nearest_names_are_few_and_never_the_root():
    near = nearest("model.layers.*.self_atn", LLAMA)
    assert 0 < len(near) <= 3 and near[0] == "model.layers.*.self_attn"
    assert nearest("model.layers.0.self_atn", LLAMA)[0] == "model.layers.0.self_attn"
    assert nearest("", LLAMA) == []


@pytest.mark.parametrize("glob", ["model.layers.*.self_atn", "**.self_atn", "**.q_prj", "*.nrm"])
def test_a_glob_that_is_proposed_matches(glob):
    proposed = nearest(glob, LLAMA)
    assert proposed and all(select(each, LLAMA) for each in proposed)


GPT2 = ["transformer.wte", "transformer.h", "transformer.h.0", "transformer.h.0.ln_2"]
GPT2 += ["transformer.h.0.attn", "transformer.h.0.attn.@z", "transformer.h.0.mlp"]
GPT2 += ["transformer.h.0.mlp.c_proj", "lm_head"]


@pytest.mark.parametrize(
    ("glob", "names", "says"),
    [
        ("model.layers.*.residual", LLAMA, "residual is model.layers.*"),
        ("blocks.5.hook_resid_pre", LLAMA, "resid_pre is model.layers.5 with at='input'"),
        ("**.attn_out", LLAMA, "attn_out is model.layers.*.self_attn"),
        ("blocks.2.attn.hook_q", LLAMA, "q is model.layers.2.self_attn.@q"),
        ("resid_mid", GPT2, "resid_mid is transformer.h.*.ln_2 with at='input'"),
        ("blocks.0.hook_mlp_out", GPT2, "mlp_out is transformer.h.0.mlp"),
        ("blocks.0.mlp.hook_post", GPT2, "post is transformer.h.0.mlp.c_proj with at='input'"),
        ("blocks.*.attn.@z", GPT2, "z is transformer.h.*.attn.@z"),
    ],
)
def test_the_words_of_other_tools_are_translated(glob, names, says):
    with pytest.raises(HookError) as caught:
        select(glob, names)
    assert str(caught.value) == f"no module matches {glob!r} among {len(names)}; {says}"


def test_a_word_that_this_model_has_no_part_for_is_not_translated():
    with pytest.raises(HookError, match=r"among 66; nearest: model\.layers\.0\.@?\w*|among 66$"):
        select("model.layers.0.resid_mid", LLAMA)


# The regex against a second way to say the same: segments matched one by one

SEGMENTS = st.text("ab1", min_size=1, max_size=3)
NAMES = st.builds(
    lambda parts, virtual: ".".join([*parts[:-1], "@" + parts[-1] if virtual else parts[-1]]),
    st.lists(SEGMENTS, min_size=1, max_size=5),
    st.booleans(),
)
GLOBS = st.lists(
    st.one_of(
        st.just("**"),
        st.just("*"),
        SEGMENTS,
        st.text("ab1*", min_size=1, max_size=3),
        st.just("@a"),
        st.just("@*"),
    ),
    min_size=1,
    max_size=5,
).map(".".join)


def by_segments(glob: list[str], name: list[str]) -> bool:
    if not glob:
        return not name
    if glob[0] == "**":
        eats_one = bool(name) and name[0][0] != "@" and by_segments(glob, name[1:])
        return by_segments(glob[1:], name) or eats_one
    return bool(name) and one_segment(glob[0], name[0]) and by_segments(glob[1:], name[1:])


def one_segment(glob: str, segment: str) -> bool:
    if segment[0] == "@" and glob[0] != "@":
        return False
    return re.fullmatch(".*".join(map(re.escape, glob.split("*"))), segment) is not None


@settings(max_examples=1000, deadline=None)
@given(GLOBS, NAMES)
def test_the_pattern_equals_segment_by_segment_matching(glob, name):
    assert match(glob, name) == by_segments(glob.split("."), name.split("."))
