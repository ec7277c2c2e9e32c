"""What the modules of fairscale and Megatron-core say by class: placements over tp, the batch's
dim, split weights.

Against the libraries themselves: test_foreign.py.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from flexkernel.engine.place.layers import layer_placement, weight_placement
from flexkernel.errors import PlacementError


def linear(name: str, module: str, **flags) -> torch.nn.Module:
    made = type(name, (torch.nn.Module,), {"__module__": module})()
    made.__dict__.update(flags)
    return made


@pytest.mark.parametrize(
    ("name", "flags", "inner", "outer"),
    [
        ("ColumnParallelLinear", {"gather_output": False}, Replicate(), Shard(-1)),
        ("ColumnParallelLinear", {"gather_output": True}, Replicate(), Replicate()),
        (
            "ColumnParallelLinear",
            {"gather_output": False, "sequence_parallel": True},
            Shard(0),
            Shard(-1),
        ),
        ("RowParallelLinear", {"input_is_parallel": True}, Shard(-1), Replicate()),
        ("RowParallelLinear", {"input_is_parallel": False}, Replicate(), Replicate()),
        (
            "RowParallelLinear",
            {"input_is_parallel": True, "sequence_parallel": True},
            Shard(-1),
            Shard(0),
        ),
        ("VocabParallelEmbedding", {}, Replicate(), Replicate()),
        ("Linear", {}, None, None),
    ],
)
def test_a_known_parallel_layer_says_what_goes_in_and_out(name, flags, inner, outer):
    module = linear(name, "megatron.core.layers", **flags)
    found = [layer_placement("a", module, at) for at in ("input", "output")]
    assert [one and one.placement for one in found] == [inner, outer]


def test_a_layer_of_that_name_from_elsewhere_says_nothing():
    assert layer_placement("a", linear("ColumnParallelLinear", "mine.layers"), "output") is None
    assert layer_placement("a", None, "output") is None


BETWEEN = SimpleNamespace(sequence_parallel=False), SimpleNamespace(sequence_parallel=True)


@pytest.mark.parametrize(
    ("name", "flags", "outer", "batch"),
    [
        ("TransformerLayer", {"config": BETWEEN[0]}, Replicate(), 1),
        ("TransformerLayer", {"config": BETWEEN[1]}, Shard(0), 1),
        ("DotProductAttention", {}, Shard(-1), 1),
        ("GPTModel", {"post_process": True, "parallel_output": True}, Shard(-1), 0),
        ("GPTModel", {"post_process": True, "parallel_output": False}, Replicate(), 0),
        ("GPTModel", {"post_process": False, "config": BETWEEN[1]}, Shard(0), 1),
        ("VocabParallelEmbedding", {"reduce_scatter_embeddings": True}, Shard(0), 1),
        ("VocabParallelEmbedding", {"reduce_scatter_embeddings": False}, Replicate(), 0),
        ("RowParallelLinear", {}, Replicate(), 1),
    ],
)
def test_megatrons_modules_say_which_dim_has_the_rows(name, flags, outer, batch):
    found = layer_placement("a", linear(name, "megatron.core.x", **flags), "output", "0")
    assert (found.placement, found.batch) == (outer, batch)


def test_fairscales_layers_look_at_the_last_dim_only():
    assert (
        layer_placement(
            "a", linear("ColumnParallelLinear", "fairscale.nn", gather_output=True), "output"
        ).batch
        is None
    )


def test_other_tensors_of_a_value_and_what_experts_order_are_not_meant():
    layer = linear("RowParallelLinear", "megatron.core.x")
    assert layer_placement("a", layer, "output", "0") is not None
    assert (
        layer_placement("a", layer, "output", "1") is None
        and layer_placement("mlp.experts.0", layer, "output", "0") is None
    )


def test_logits_of_transformers_have_the_rows_first():
    model = linear("LlamaForCausalLM", "transformers.models.llama")
    assert (
        layer_placement("", model, "output", "logits").batch == 0
        and layer_placement("", model, "output", "") is None
    )


def test_packed_projections_are_split_each_by_itself_or_refused():
    weight = torch.zeros(4, 2)
    layer = linear(
        "ColumnParallelLinear", "megatron.core.x", config=SimpleNamespace(gated_linear_unit=True)
    )
    layer.weight = weight
    assert weight_placement("linear_qkv.weight", layer, weight) == Shard(0)
    for ask in (
        lambda: weight_placement("mlp.linear_fc1.weight", layer, weight),
        lambda: layer_placement("mlp.linear_fc1", layer, "output", "0"),
    ):
        with pytest.raises(
            PlacementError, match="packs several projections, whose order over tp is not known"
        ):
            ask()
    weight.partition_stride = 2
    assert weight_placement("mlp.linear_fc1.weight", layer, weight) == _StridedShard(
        0, split_factor=2
    )
    assert layer_placement("mlp.linear_fc1", layer, "output", "0").placement == _StridedShard(
        -1, split_factor=2
    )
    assert weight_placement("norm.weight", linear("LayerNorm", "megatron.core.x"), weight) is None
