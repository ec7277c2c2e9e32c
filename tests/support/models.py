"""Tiny random models, saved as safetensors folders: the same weights in every process and on every
run.

Importable on engines, so that a builder can be sent by name. No tokenizer, but for
`reading_bytes`: feed ids below `vocab`.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

__all__ = ["ARCHS", "build", "ids_and_mask", "padded", "reading_bytes", "rows", "tiny"]

SEED = 20231203
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
# what two and three ranks can share alike
SIX = {
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_attention_heads": 12,
    "num_key_value_heads": 6,
}
GPT2 = {"n_embd": 64, "n_layer": 4, "n_head": 8, "n_positions": 512}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None, "initializer_range": 0.1}

# name -> (config class, what differs from SPECIAL and the vocabulary)
ARCHS = {
    "llama": ("LlamaConfig", dict(**SMALL, tie_word_embeddings=True)),
    "llama_six": ("LlamaConfig", dict(**(SMALL | SIX), tie_word_embeddings=True)),
    "llama_untied": ("LlamaConfig", dict(**SMALL, tie_word_embeddings=False)),
    "qwen3": ("Qwen3Config", dict(**SMALL, head_dim=16, tie_word_embeddings=False)),
    "mixtral": (
        "MixtralConfig",
        dict(**SMALL, num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
    ),
    "gpt2": ("GPT2Config", GPT2),
    "gemma2": ("Gemma2Config", dict(**SMALL, head_dim=16, sliding_window=8)),
    "mistral": ("MistralConfig", dict(**SMALL, sliding_window=8)),
}

# for benchmarks, and for large activations: one layer whose MLP is 16384 wide
WIDE = {
    "llama_wide": (
        "LlamaConfig",
        dict(
            **(SMALL | {"intermediate_size": 16384, "num_hidden_layers": 1}),
            max_position_embeddings=8192,
        ),
    ),
    # a forward that takes as long as a small model's does, for what is measured against it
    "llama_deep": (
        "LlamaConfig",
        dict(**(SMALL | {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8})),
    ),
}


def build(arch: str, vocab: int = 256) -> torch.nn.Module:
    """The model itself in float32, eval mode. Does not touch the caller's random state."""
    import transformers

    config_class, differs = (ARCHS | WIDE)[arch]
    config = getattr(transformers, config_class)(vocab_size=vocab, **{**SPECIAL, **differs})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        _stir(model)
    return model.eval()


@torch.no_grad()
def _stir(model: torch.nn.Module) -> None:
    """Norm weights and biases start as ones and zeros, which hide a bias added twice or a norm
    left out."""
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.add_(torch.randn_like(parameter), alpha=0.1)


def tiny(arch: str, folder: str | os.PathLike[str], vocab: int = 256) -> Path:
    """Folder with that architecture's model under `folder`, built once, whoever asks at the same
    time."""
    target = Path(folder) / (arch if vocab == 256 else f"{arch}-{vocab}")
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    part = tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent)
    build(arch, vocab).save_pretrained(part)
    try:
        os.rename(part, target)
    except OSError:  # another process was first
        shutil.rmtree(part)
    return target


def reading_bytes(arch: str, folder: str | os.PathLike[str]) -> Path:
    """A folder with that model and a tokenizer whose tokens are bytes."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers import models as kinds
    from transformers import PreTrainedTokenizerFast

    target = shutil.copytree(tiny(arch, Path(folder) / "plain"), Path(folder) / arch)
    tokenizer = Tokenizer(kinds.BPE(byte_letters(), []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(target)
    return target


def byte_letters() -> dict[str, int]:
    """The letter that stands for each byte in byte-level vocabularies."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in shown]
    return {chr(b): b for b in shown} | {chr(256 + i): b for i, b in enumerate(hidden)}


def ids_and_mask(lengths: list[int], vocab: int = 256, seed: int = 0) -> dict[str, torch.Tensor]:
    """Left-padded random rows of these lengths, as `padded` gives them."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    ids = torch.randint(3, vocab, (len(lengths), longest), generator=generator)
    return padded([row[longest - n :].tolist() for row, n in zip(ids, lengths, strict=True)])


def padded(rows: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    """Left-padded, as the keyword arguments of a forward: ids, mask and position ids, each (B, S)
    int64."""
    longest = max(map(len, rows))
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}


def rows(batch: dict[str, torch.Tensor]) -> list[list[int]]:
    """The real tokens of each row."""
    pairs = zip(batch["input_ids"], batch["attention_mask"], strict=True)
    return [ids[mask.bool()].tolist() for ids, mask in pairs]
