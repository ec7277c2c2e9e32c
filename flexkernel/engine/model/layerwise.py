"""A model larger than the memory: a layer reads its weights from the safetensors files when it is
called, and drops them when it returns. The forward is the model's own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from flexkernel.engine.compat import fill_buffers
from flexkernel.errors import LoadError

from .scan import read_config

__all__ = ["streamed"]


def streamed(path: str, dtype: torch.dtype, device: str, attention: str) -> torch.nn.Module:
    """The unsharded model of a folder or hub id, without weights in memory until they are needed.

    LoadError: the checkpoint has no safetensors files, or its tensors have other names than the
    model's."""
    folder = local_folder(path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            read_config(str(folder)), attn_implementation=attention, dtype=dtype
        )
    fill_buffers(model, device)
    files = files_of(folder)
    for name, buffer in model.named_buffers():
        if name in files:
            buffer.copy_(read(files[name], name, device))
    lies = whereabouts(model, files, path)
    for unit in units(model):
        unit.register_forward_pre_hook(lambda unit, _args: fetch(unit, lies, device))
        unit.register_forward_hook(lambda unit, _args, _out: drop(unit), always_call=True)
    return model.eval()


def local_folder(path: str) -> Path:
    """The folder with the model's files. Those of a hub id are downloaded."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(path, allow_patterns=["*.safetensors", "*.json"]))


def files_of(folder: Path) -> dict[str, Path]:
    """Tensor → the file that holds it. LoadError: the folder has no safetensors files."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return {
            name: folder / file
            for name, file in json.loads(index.read_text())["weight_map"].items()
        }
    single = folder / "model.safetensors"
    if not single.is_file():
        raise LoadError(
            f"{folder} has no model.safetensors: its layers cannot be read one at a time"
        )
    with safe_open(single, framework="pt") as file:
        return dict.fromkeys(file.keys(), single)


Whereabouts = dict[torch.nn.Module, list[tuple[str, torch.nn.Parameter, Path, str]]]


def whereabouts(model: torch.nn.Module, files: dict[str, Path], path: str) -> Whereabouts:
    """Module → each of its own parameters: its name there, the parameter on meta, the file, the
    tensor's name in the file.

    A tied parameter is stored under one of its names. LoadError: the files lack a parameter."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    found: Whereabouts = {}
    for module in model.modules():
        for short, parameter in module.named_parameters(recurse=False):
            called = names[id(parameter)]
            stored = next(
                (n for name in called for n in (name, name.removeprefix(prefix)) if n in files),
                None,
            )
            if stored is None:
                raise LoadError(
                    f"{path}: its files hold no tensor {called[0]!r}; transformers converts this "
                    "checkpoint as it "
                    "loads it, so that its layers cannot be read one at a time: verify where the "
                    "whole model fits"
                )
            found.setdefault(module, []).append((short, parameter, files[stored], stored))
    return found


def units(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The modules that load one at a time: each layer of the outermost lists, and each other
    module with weights."""
    if next(model.parameters(recurse=False), None) is not None:
        yield model
        return
    for child in model.children():
        if isinstance(child, torch.nn.ModuleList):
            yield from child
        else:
            yield from units(child)


def fetch(unit: torch.nn.Module, lies: Whereabouts, device: str) -> None:
    """A torch pre-hook: give the unit its weights, on the device. LoadError: a tensor in the file
    has another shape."""
    for module in unit.modules():
        for short, parameter, path, stored in lies.get(module, ()):
            tensor = read(path, stored, device).to(parameter.dtype)
            if tensor.shape != parameter.shape:
                raise LoadError(
                    f"{stored} is {tuple(tensor.shape)} in {path}, the model's is "
                    f"{tuple(parameter.shape)}"
                )
            module._parameters[short] = torch.nn.Parameter(tensor, requires_grad=False)
            module.__dict__.setdefault("_flex_meta", {})[short] = parameter


def read(path: Path, name: str, device: str) -> torch.Tensor:
    """A tensor of a safetensors file, in the file's shape and dtype, on that device."""
    with safe_open(path, framework="pt") as file:  # it does not know this rank's GPU
        return file.get_tensor(name).to(device)


def drop(unit: torch.nn.Module) -> None:
    """A torch hook: put the unit's parameters on meta back in place of its weights."""
    for module in unit.modules():
        kept: dict[str, Any] = module.__dict__.pop("_flex_meta", {})
        module._parameters.update(kept)
