"""What fairscale's, Megatron-core's and transformers' modules tell by their class and flags.

That is how their values lie over tp, which dim has the batch's rows, and how they split their
weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.distributed.tensor import Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from flexkernel.errors import PlacementError

__all__ = ["LayerPlacement", "layer_placement", "weight_placement"]

# paths of the tensor, in a module's value, that these tables describe
FIRST = ("", "0", "input", "input_", "input_ids", "query", "hidden_states")


@dataclass(frozen=True)
class LayerPlacement:
    """What a module's class tells of a value.

    placement: over tp; None if the class does not tell. batch: the dim of the batch's rows; None
    if it does not tell."""

    placement: Placement | None
    batch: int | None


# The dim of the rows. S positions, B rows, D width: Megatron's values are (S, B, D), but what
# enters and leaves its models and embedding layers is (B, S, D)
SBD = 1
BSD = 0
WHOLE = Replicate()


def layer_placement(
    name: str,
    module: torch.nn.Module | None,
    at: str,
    path: str = "",
    parent: torch.nn.Module | None = None,
) -> LayerPlacement | None:
    """What the class of a module, or of its parent, tells of its value. at: "input" or "output".

    None: neither class tells."""
    library, kind = library_of(module), type(module).__name__
    if path == "logits" and library == "transformers":
        return LayerPlacement(None, BSD)
    if module is None or path not in FIRST or "experts" in name.split(".")[:-1]:
        return None
    if parent is not None and library_of(parent) == "megatron":
        of_child = CHILDREN.get(type(parent).__name__, {}).get(name.rpartition(".")[2])
        if of_child is not None:
            return of_child(parent, at)
    if not library:
        return None
    if library == "transformers":
        return None
    if library == "megatron" and kind in MODULES:
        return MODULES[kind](module, at)
    found = parallel_layer(name, module, kind, at)
    if found is not None and library == "fairscale":  # rows may be in any dim but the last
        return LayerPlacement(found.placement, None)
    return found


def library_of(module: torch.nn.Module | None) -> str:
    """The library that the module's class comes from, if it is one of the three; else ""."""
    top = type(module).__module__.partition(".")[0]
    return top if top in ("fairscale", "megatron", "transformers") else ""


def parallel_layer(name: str, module: torch.nn.Module, kind: str, at: str) -> LayerPlacement | None:
    """What the class of a tensor-parallel layer tells of its value; None for any other layer."""
    # with sequence parallelism S is split over tp between the layers
    sequence = bool(getattr(module, "sequence_parallel", False))
    if kind == "ColumnParallelLinear":
        if at == "input":
            return LayerPlacement(Shard(0) if sequence else WHOLE, SBD)
        gathered = getattr(module, "gather_output", False)
        return LayerPlacement(
            WHOLE if gathered else split_along(-1, name, module, getattr(module, "weight", None)),
            SBD,
        )
    if kind == "RowParallelLinear":
        if at == "input":
            return LayerPlacement(
                Shard(-1) if getattr(module, "input_is_parallel", False) else WHOLE, SBD
            )
        return LayerPlacement(Shard(0) if sequence else WHOLE, SBD)
    if kind in ("VocabParallelEmbedding", "ParallelEmbedding"):
        scattered = at == "output" and getattr(module, "reduce_scatter_embeddings", False)
        return LayerPlacement(Shard(0), SBD) if scattered else LayerPlacement(WHOLE, BSD)
    return None


def split_along(
    dim: int, name: str, module: torch.nn.Module, weight: torch.Tensor | None
) -> Placement:
    """The placement over tp of a layer's output or weight that is split along `dim`.

    A layer that packs several projections splits each of them by itself. weight: of any shape, or
    None; only its attributes are read. PlacementError: the layer packs several projections and its
    weight does not tell how."""
    packs = getattr(weight, "partition_stride", 1)
    if isinstance(packs, int) and packs > 1:
        return _StridedShard(dim, split_factor=packs)
    if (
        getattr(getattr(module, "config", None), "gated_linear_unit", False)
        and "linear_fc1" in name
    ):
        raise PlacementError(
            f"{name}: its layer packs several projections, whose order over tp is not known"
        )
    return Shard(dim)


def between(module: torch.nn.Module, _at: str) -> LayerPlacement:
    """The values that pass from layer to layer."""
    config = getattr(module, "config", None)
    return LayerPlacement(Shard(0) if getattr(config, "sequence_parallel", False) else WHOLE, SBD)


def attention_core(_module: torch.nn.Module, at: str) -> LayerPlacement:
    """DotProductAttention: heads are split over tp."""
    # query (S, B, heads, D); (S, B, heads × D)
    return LayerPlacement(Shard(2) if at == "input" else Shard(-1), SBD)


def embedding(module: torch.nn.Module, at: str) -> LayerPlacement:
    """LanguageModelEmbedding: token ids in, (S, B, D) out."""
    if at == "input":
        return LayerPlacement(WHOLE, BSD)
    scattered = (
        getattr(module, "reduce_scatter_embeddings", False) or module.scatter_to_sequence_parallel
    )
    return between(module, at) if scattered else LayerPlacement(WHOLE, SBD)


def language_model(module: torch.nn.Module, at: str) -> LayerPlacement:
    """GPTModel: token ids in; logits out, or on an earlier stage what passes between layers."""
    if at == "input":
        return LayerPlacement(WHOLE, BSD)
    if not getattr(module, "post_process", True):
        return between(module, at)
    return LayerPlacement(Shard(-1) if getattr(module, "parallel_output", False) else WHOLE, BSD)


MODULES = {
    "GPTModel": language_model,
    "LanguageModelEmbedding": embedding,
    "TransformerBlock": between,
    "TransformerLayer": between,
    "SelfAttention": between,
    "MLP": between,
    "DotProductAttention": attention_core,
}


def heads(_module: torch.nn.Module, _at: str) -> LayerPlacement:
    """A value that has a dim of heads, which is split over tp."""
    return LayerPlacement(Shard(2), SBD)  # (S, B, heads, D)


def pattern(_module: torch.nn.Module, _at: str) -> LayerPlacement:
    """An attention pattern, whose heads are split over tp."""
    return LayerPlacement(Shard(1), BSD)  # (B, heads, S, S)


def places(_module: torch.nn.Module, _at: str) -> LayerPlacement:
    """Positions, which are whole on each rank."""
    return LayerPlacement(WHOLE, BSD)


# Children of Megatron's modules whose own class tells nothing: a norm, for example, may be torch's
CHILDREN: dict[str, dict[str, Callable[[torch.nn.Module, str], LayerPlacement]]] = {
    "TransformerLayer": dict.fromkeys(
        ("input_layernorm", "pre_cross_attn_layernorm", "cross_attention", "pre_mlp_layernorm"),
        between,
    ),
    "TransformerBlock": {"final_layernorm": between},
    "SelfAttention": {"q_layernorm": heads, "k_layernorm": heads},
    "DotProductAttention": {"scale_mask_softmax": pattern, "attention_dropout": pattern},
    "LanguageModelEmbedding": {
        "position_embeddings": places,
        "embedding_dropout": lambda module, _at: embedding(module, "output"),
    },
}

# The dim along which parallel layers split their parameters. Each rank has the others whole
WEIGHTS = {
    "ColumnParallelLinear": {"weight": 0, "bias": 0},
    "RowParallelLinear": {"weight": 1},
    "VocabParallelEmbedding": {"weight": 0},
    "ParallelEmbedding": {"weight": 1},
}


def weight_placement(name: str, module: torch.nn.Module, tensor: torch.Tensor) -> Placement | None:
    """How such a layer splits a parameter over tp; None if the layer is not one of them.

    tensor: this rank's part of the parameter, of any shape; only its attributes are read.
    PlacementError: as split_along()."""
    kind, last = type(module).__name__, name.rpartition(".")[2]
    if library_of(module) not in ("fairscale", "megatron") or kind not in WEIGHTS:
        return None
    dim = WEIGHTS[kind].get(last)
    return WHOLE if dim is None else split_along(dim, name, module, tensor)
