"""Loads this rank's part of a model: with transformers, sharded as the layout says, or with the
user's builder."""

from __future__ import annotations

import pickle
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from flexkernel.engine.compat import distributed_config, is_placeholder, loading_under, meshes_on
from flexkernel.errors import LoadError
from flexkernel.wire import Layout, ModelInfo, Source

from .checkpoint import copied_out
from .inspection import dtype_of

__all__ = ["build", "load", "load_part", "local_bytes", "local_parameters"]


def load_part(info: ModelInfo, source: Source, device: str) -> torch.nn.Module:
    """This rank's part of the model, in eval mode. All ranks must call; their process group exists
    already.

    LoadError: it cannot be loaded or built."""
    if source.builder is not None:
        return build(source.builder)
    return load(info.path, info.layout, info.dtype, device, info.attention)


def build(builder: bytes) -> torch.nn.Module:
    """The module that a user's builder returns on this rank, frozen and in eval mode. LoadError:
    it is no module."""
    model = pickle.loads(builder)()
    if not isinstance(model, torch.nn.Module):
        raise LoadError(
            f"the builder returned {type(model).__name__} on this rank; it should return an "
            "nn.Module"
        )
    model.requires_grad_(False)  # frozen, except while a run asks for gradients
    copied_out(model.parameters())
    return model.eval()


def load(path: str, layout: Layout, dtype: str, device: str, attention: str) -> torch.nn.Module:
    """This rank's part of the model of a folder or hub id, frozen and in eval mode.

    All ranks of the layout must call; their process group exists already. LoadError: transformers
    cannot load it."""
    options: dict[str, Any] = {
        "dtype": dtype_of(dtype),
        "attn_implementation": attention,
        "trust_remote_code": False,
        "use_safetensors": True,
    }
    if layout.world > 1:
        options["distributed_config"] = distributed_config(layout)
    elif device != "cpu":
        options["device_map"] = torch.device(device, torch.cuda.current_device())
    try:
        with loading_under(layout), meshes_on(device):
            model = AutoModelForCausalLM.from_pretrained(path, **options).eval()
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise LoadError(f"{path} cannot be loaded as {layout}: {error}") from error
    model.requires_grad_(False)
    copied_out(model.parameters())
    return model


def local_parameters(model: torch.nn.Module) -> int:
    """The number of parameter elements on this rank; tied ones count once."""
    return sum(tensor.numel() for tensor in own(model))


def local_bytes(model: torch.nn.Module) -> int:
    """The bytes of parameters on this rank; tied ones count once."""
    return sum(tensor.numel() * tensor.element_size() for tensor in own(model))


def own(model: torch.nn.Module) -> list[torch.Tensor]:
    """This rank's parameters, tied ones once. Of a DTensor it is the local shard, of its own shape
    and device.

    Placeholders for modules of other stages have none."""
    by_address: dict[int, torch.Tensor] = {}
    for module in model.modules():
        if is_placeholder(module):
            continue
        for parameter in module.parameters(recurse=False):
            tensor = parameter.to_local() if hasattr(parameter, "to_local") else parameter
            by_address[tensor.data_ptr()] = tensor
    return list(by_address.values())
