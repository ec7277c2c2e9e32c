"""Every module's output and input, under every layout, equals the unsharded model's."""

from __future__ import annotations

import pytest

import flexkernel as fk
from tests.support import layouts, reference
from tools import parity

TINY = {
    1: [("llama", {}), ("mixtral", {}), ("gpt2", {}), ("gemma2", {})],
    2: [
        *(
            (arch, layout)
            for arch in ("llama", "qwen3", "mixtral")
            for layout in ({"tp": 2}, {"pp": 2}, {"fsdp": 2})
        ),
        ("mistral", {"tp": 2}),
        ("llama", {"dp": 2}),
        ("gpt2", {"fsdp": 2}),
    ],
    4: [
        *((arch, {"tp": 2, "fsdp": 2}) for arch in ("llama", "qwen3", "mixtral")),
        *(
            ("llama", d)
            for d in (
                {"tp": 2, "pp": 2},
                {"pp": 2, "fsdp": 2},
                {"pp": 2, "dp": 2},
                {"tp": 2, "dp": 2},
            )
        ),
    ],
}
REAL = {2: [{"pp": 2}, {"fsdp": 2}, {"dp": 2}], 3: [{"tp": 3}], 6: [{"tp": 3, "pp": 2}]}


def cases(table: dict) -> list:
    return [
        layouts.param(arch, layout, prefix=f"{arch}-")
        for rows in table.values()
        for arch, layout in rows
    ]


def accept(row: parity.Row, record) -> None:
    """Nothing wrong, nothing skipped, something compared; refused only what the data orders."""
    record("parity", str(row))
    print("\n" + parity.HEAD + "\n" + str(row))
    assert row.compared > 300 and row.wrong == [] and row.skipped == []
    for where, error in row.refused.items():
        assert "experts" in where and error.startswith("PlacementError"), (where, error)


@pytest.mark.long(
    "gpt2-fsdp2-eager",
    "mistral-tp2-eager",
    "mixtral-fsdp2-eager",
    "mixtral-pp2-eager",
    "mixtral-tp2-eager",
)
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize(("arch", "layout"), cases(TINY))
def test_every_module_of_a_tiny_model_equals_the_unsharded_one(
    arch, layout, attn, session, tiny, record_property
):
    # transformers refuses it by name; without a name eager is taken
    if arch == "gemma2" and attn == "sdpa":
        with pytest.raises(fk.errors.LoadError, match="scaled_dot_product_attention"):
            session.load(tiny(arch), attn="sdpa")
        assert session.load(tiny(arch)).attention == "eager"
        return
    if attn == "eager" and session.engines.size == 4 and arch != "llama":
        pytest.skip("its attention was compared on two engines")
    row = parity.measure(session, arch, tiny(arch), attn, layout)
    accept(row, record_property)


real_cases = [
    layouts.param(layout, marks=[pytest.mark.slow]) for rows in REAL.values() for layout in rows
]


@pytest.mark.long(
    "dp2-eager",
    "dp2-sdpa",
    "fsdp2-eager",
    "fsdp2-sdpa",
    "pp2-eager",
    "tp3-eager",
    "tp3xpp2-eager",
    "tp3xpp2-sdpa",
)
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("layout", real_cases)
def test_every_module_of_the_real_model_equals_the_unsharded_one(
    layout, attn, session, smollm2, record_property
):
    row = parity.measure(session, "SmolLM2", smollm2, attn, layout)
    accept(row, record_property)


def test_a_wrong_number_is_found(session, tiny):
    """The comparison can fail: one changed weight in the reference is seen."""
    import torch

    session.load(tiny("llama"))
    parity.hook_everything(session, points=False)
    ref_model = reference.load(tiny("llama"))
    with torch.no_grad():
        ref_model.model.layers[2].mlp.down_proj.weight[0, 0] += 1.0
    row = parity.Row("llama", "one", "sdpa")
    parity.compare(session, ref_model, row, [7], points=False)
    assert any("layers.2.mlp" in line for line in row.wrong)
    assert not any("layers.1." in line for line in row.wrong)
