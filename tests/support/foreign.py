"""Models that users shard by themselves: builders that tests send to engines, and their unsharded
twins."""

from __future__ import annotations

import os

import torch
from torch import nn

SIZES = {"vocab": 96, "width": 32, "inner": 48, "heads": 4, "layers": 2, "positions": 64}


def on_ci() -> bool:
    """Whether everything has to be there: elsewhere a library that cannot be installed skips its
    tests."""
    return os.environ.get("CI") == "true"


def llama(folder: str) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


# --- torch's wrappers -----------------------------------------------------------------


def in_ddp(folder: str) -> nn.Module:
    from torch.nn.parallel import DistributedDataParallel

    return DistributedDataParallel(llama(folder))


def in_fsdp1(folder: str, original: bool = True) -> nn.Module:
    """FSDP1 around every layer and around the whole."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    model = llama(folder)
    policy = ModuleWrapPolicy({type(model.model.layers[0])})
    return FullyShardedDataParallel(
        model, auto_wrap_policy=policy, use_orig_params=original, device_id=torch.device("cpu")
    )


def in_fsdp2(folder: str) -> nn.Module:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = llama(folder)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("fsdp",))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def compiled_in_checkpoints(folder: str) -> nn.Module:
    """Compiled as a whole, its layers under activation checkpointing: names with two prefixes."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = llama(folder)
    for i, layer in enumerate(model.model.layers):
        model.model.layers[i] = checkpoint_wrapper(layer)
    return torch.compile(model, backend="eager")


class Around(nn.Module):
    """A user's own wrapper, with a prefix of its own."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner, self.extra = inner, nn.Identity()

    def forward(self, *args, **kwargs):
        return self.extra(self.inner(*args, **kwargs))


def around(folder: str) -> nn.Module:
    return Around(llama(folder))


# --- a model with a signature of its own ----------------------------------------------


class Block(nn.Module):
    """x + MLP of what came before, in (S, B, D) order: positions are mixed by a running mean."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x_SBD: torch.Tensor) -> tuple[torch.Tensor, None]:
        count = torch.arange(1, x_SBD.shape[0] + 1, dtype=x_SBD.dtype, device=x_SBD.device)[
            :, None, None
        ]
        mixed = self.norm(x_SBD.cumsum(0) / count)
        return x_SBD + self.down(torch.nn.functional.gelu(self.up(mixed))), None


class Embed(nn.Module):
    def __init__(self, vocab: int, width: int, positions: int):
        super().__init__()
        self.words, self.places = nn.Embedding(vocab, width), nn.Embedding(positions, width)

    def forward(self, tokens: torch.Tensor, start: int) -> torch.Tensor:
        places = self.places(torch.arange(start, start + tokens.shape[1], device=tokens.device))
        return (self.words(tokens) + places).transpose(0, 1)


class Own(nn.Module):
    """A language model of the user's own: forward(tokens) gives (logits, None); between layers it
    is (S, B, D)."""

    def __init__(self, layers: int = 4):
        super().__init__()
        self.embed = Embed(SIZES["vocab"], SIZES["width"], SIZES["positions"])
        self.blocks = nn.ModuleList([Block(SIZES["width"], SIZES["inner"]) for _ in range(layers)])
        self.head = nn.Linear(SIZES["width"], SIZES["vocab"], bias=False)

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, None]:
        return self.run(tokens, 0)

    def run(self, tokens: torch.Tensor, start: int) -> tuple[torch.Tensor, None]:
        x_SBD = self.embed(tokens, start)
        for block in self.blocks:
            x_SBD, _ = block(x_SBD)
        return self.head(x_SBD.transpose(0, 1)), None


class Started(Own):
    """The same, which has to be told where it starts."""

    def forward(self, tokens: torch.Tensor, start_pos: int, flag: bool = False) -> torch.Tensor:
        return self.run(tokens, start_pos)[0]


class Grid(Own):
    """It ends in what every row is to every other: two dims of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs = nn.Identity()

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        logits = super().forward(tokens)[0]
        self.pairs(torch.einsum("bsv,csv->bc", logits, logits))
        return logits


def seeded(kind: type[nn.Module]) -> nn.Module:
    """The same weights in every process; on the meta device none."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return kind().eval()


class Stage(nn.Module):
    """One of two stages of `Own`, its blocks counted from 0 anew: a pipeline split made by
    hand."""

    def __init__(self, whole: Own, stage: int):
        super().__init__()
        half = len(whole.blocks) // 2
        self.stage = stage
        self.part = nn.ModuleDict(
            {"blocks": nn.ModuleList(whole.blocks[stage * half : (stage + 1) * half])}
        )
        if stage == 0:
            self.embed = whole.embed
        else:
            self.head = whole.head

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        import torch.distributed as dist

        if self.stage == 0:
            x_SBD = self.embed(tokens, 0)
        else:
            x_SBD = torch.empty(tokens.shape[1], tokens.shape[0], SIZES["width"])
            dist.recv(x_SBD, 0)
        for block in self.part["blocks"]:
            x_SBD, _ = block(x_SBD)
        if self.stage == 0:
            dist.send(x_SBD.contiguous(), 1)
            return x_SBD
        return self.head(x_SBD.transpose(0, 1))


def by_hand() -> nn.Module:
    import torch.distributed as dist

    return Stage(seeded(Own), dist.get_rank())


def whole_names(name: str) -> str | None:
    """What this stage's modules are called in `Own`."""
    import torch.distributed as dist

    if name == "part":
        return None
    *path, last = name.removeprefix("part.").split(".")
    if name.startswith("part.blocks."):
        number, *rest = name.removeprefix("part.blocks.").split(".")
        return ".".join(["blocks", str(int(number) + 2 * dist.get_rank()), *rest])
    return ".".join([*path, last])


# --- Megatron-core --------------------------------------------------------------------


def without_cuda() -> None:
    """Megatron-core asks for CUDA in two places that a CPU needs not."""
    import contextlib

    from megatron.core import parallel_state, tensor_parallel

    buffer = parallel_state.get_global_memory_buffer()
    buffer.get_tensor = lambda shape, dtype, name, *_a, **_k: torch.empty(tuple(shape), dtype=dtype)
    type(tensor_parallel.get_cuda_rng_tracker()).fork = lambda self, name=None: (
        contextlib.nullcontext()
    )


def megatron(
    weights: str = "", tp: int = 1, sequence: bool = False, gather: bool = False
) -> nn.Module:
    """A small GPTModel of Megatron-core, with grouped queries and a gated MLP; this rank's part of
    the weights in a file, of all of them where tp is 1. All ranks must call."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    parallel_state.destroy_model_parallel()  # its groups are of the generation before
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp)
    without_cuda()
    config = TransformerConfig(
        num_layers=SIZES["layers"],
        hidden_size=SIZES["width"],
        num_attention_heads=SIZES["heads"],
        num_query_groups=2,
        ffn_hidden_size=SIZES["inner"],
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        tensor_model_parallel_size=tp,
        sequence_parallel=sequence,
        use_cpu_initialization=True,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
    )
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(),
        vocab_size=SIZES["vocab"],
        max_sequence_length=SIZES["positions"],
        parallel_output=not gather,
        position_embedding_type="learned_absolute",
        share_embeddings_and_output_weights=False,
    ).eval()
    if weights:
        rank = parallel_state.get_tensor_model_parallel_rank()
        for name, parameter in model.named_parameters():
            parameter.data.copy_(cut(torch.load(weights)[name], parameter, tp, rank))
    return model


def cut(whole: torch.Tensor, parameter: torch.Tensor, tp: int, rank: int) -> torch.Tensor:
    """This rank's part, as Megatron's own initialisation cuts it: of each packed projection its
    chunk."""
    if tp == 1 or not getattr(parameter, "tensor_model_parallel", False):
        return whole
    dim, packs = parameter.partition_dim, parameter.partition_stride
    return torch.cat([each.chunk(tp, dim)[rank] for each in whole.chunk(packs, dim)], dim)
