"""A model onto this rank: transformers' own sharded loading, with the degrees checked before
anything is read."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from flexkernel.engine.compat import (
    distributed_config,
    is_placeholder,
    loading_under,
    meshes_on,
    tp_styles,
)
from flexkernel.engine.place.placements import aimed, parse
from flexkernel.errors import LayoutError, LoadError
from flexkernel.names import select
from flexkernel.wire import Layout, ModelInfo, ModuleInfo, Source

from .checkpoint import check_files, copied_out
from .scan import Scan, read_config, runnable_on_meta, scan, unsharded

__all__ = [
    "build",
    "check",
    "dtype_of",
    "inspect",
    "load",
    "local_bytes",
    "local_parameters",
    "part_of",
]


NUM_SCANS = 8  # are kept


def dtype_of(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise LoadError(
            f"dtype {name!r} is not one of torch's floating point types, such as float32 or bfloat16"
        )
    if found.itemsize < 2:
        raise LoadError(
            f"dtype {name!r} is one to keep weights in, torch computes no layer in it: take bfloat16"
        )
    return found


def inspect(
    source: Source, layout: Layout, dtype: str, attention: str | None, placements: dict[str, str]
) -> ModelInfo:
    """What is known of a model before any of it is loaded: its modules, every value's shape, and
    that the degrees fit.

    LoadError, LayoutError: what is wrong with the path, the dtype or the degrees."""
    model, config = whole_model(source, dtype_of(dtype), layout)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    longest = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
    info = ModelInfo(
        path=source.path,
        cls=type(model).__name__ if model is not None else source.path,
        layout=layout,
        dtype=dtype,
        attention=implementation(attention, model),
        modules=described(model),
        scan=known(model, source, config, dtype) if model is not None else {},
        num_parameters=sum(p.numel() for p in model.parameters()) if model is not None else 0,
        rank_parameters=(),
        rank_bytes=(),
        vocab_size=getattr(text, "vocab_size", None),
        max_positions=longest,
        window=getattr(text, "sliding_window", None) or 0,
        placements=dict(placements),
        styles=tp_styles(model, layout) if model is not None and source.builder is None else {},
        built=source.builder is not None,
        parameters=shapes(model) if model is not None else {},
        buffers=frozenset(name for name, _ in model.named_buffers(remove_duplicate=False))
        if model is not None
        else frozenset(),
        tied=tied(model) if model is not None else (),
    )
    check_placements(info)
    return info


def shapes(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Every parameter and buffer with its shape, tied ones under each of their names."""
    named = (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    )
    return {name: tuple(tensor.shape) for name, tensor in named}


def tied(model: torch.nn.Module) -> tuple[tuple[str, ...], ...]:
    """The names that several names of one parameter are."""
    found: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found.setdefault(id(parameter), []).append(name)
    return tuple(tuple(names) for names in found.values() if len(names) > 1)


_scans: dict[tuple[Any, ...], Scan] = {}  # of the models seen last


def known(model: torch.nn.Module, source: Source, config: Any, dtype: str) -> Scan:
    """The model's scan, made once for each class, config and dtype; a user's own model may depend
    on anything."""
    if source.builder is not None:
        return scanned(model, source.forward)
    try:
        key = type(model), config.to_json_string(use_diff=False), dtype, source.forward
    except TypeError:  # a config that is no JSON
        return scanned(model, source.forward)
    found = _scans.pop(key, None) or scanned(model, source.forward)
    _scans[key] = found
    while len(_scans) > NUM_SCANS:
        _scans.pop(next(iter(_scans)))
    return found


def scanned(model: torch.nn.Module, forward: bytes | None) -> Scan:
    """The model's scan. LoadError if its forward cannot run without data, or not in a way that is
    known."""
    try:
        return scan(model, forward)
    except LoadError:
        raise
    except Exception as error:
        raise LoadError(
            f"{type(model).__name__} cannot be scanned, its forward does not run on the meta device "
            f"({first_line(error)}): load it with a builder that returns it and no reference="
        ) from error


def check_placements(info: ModelInfo) -> None:
    """PlacementError, HookError: a declaration that says nothing, or of no module that there
    is."""
    for key, text in info.placements.items():
        parse(text)
        if not info.built:  # which may have modules that its reference has not
            select(aimed(key)[0], info.names)


ATTENTION = {"flash": "flash_attention_2"}  # short names; transformers' own are taken as they are


def implementation(asked: str | None, model: torch.nn.Module | None) -> str:
    """The attention to load with: the one asked for, else sdpa where the architecture has it."""
    if asked is not None:
        return ATTENTION.get(asked, asked)
    return "sdpa" if getattr(model, "_supports_sdpa", True) else "eager"


def described(model: torch.nn.Module | None) -> tuple[ModuleInfo, ...]:
    named = model.named_modules() if model is not None else ()
    return tuple(
        ModuleInfo(name, type(m).__name__, sum(p.numel() for p in m.parameters()))
        for name, m in named
    )


def whole_model(
    source: Source, dtype: torch.dtype, layout: Layout
) -> tuple[torch.nn.Module | None, Any]:
    """The unsharded model on the meta device, its degrees checked, and its config; None for a
    builder that has no reference."""
    if source.builder is not None:
        if source.reference is None:
            return None, None
        # imports the user's modules, whose own tensors are to be real
        reference = pickle.loads(source.reference)
        with torch.device("meta"):
            model = reference().eval()
        config = copy.deepcopy(getattr(model, "config", None))
        return runnable_on_meta(model), config
    exists(source.path)
    folder = Path(source.path).expanduser()
    try:
        config = read_config(str(folder) if folder.is_dir() else source.path)
    except (OSError, ValueError) as error:
        raise LoadError(
            f"{source.path} is neither a model folder nor a model the hub knows: {first_line(error)}"
        ) from error
    except Exception as error:  # what a config's own checks raise
        raise LoadError(
            f"the config of {source.path} describes no model: {' '.join(str(error).split())}"
        ) from error
    try:
        model = unsharded(config, dtype)
    except Exception as error:
        raise LoadError(
            f"no model can be made from the config of {source.path}: {type(error).__name__}: {first_line(error)}"
        ) from error
    check(config, model, layout)
    if folder.is_dir():
        check_files(folder)
    return model, config


def build(builder: bytes) -> torch.nn.Module:
    """What a user's builder returns on this rank. LoadError if it is no module."""
    model = pickle.loads(builder)()
    if not isinstance(model, torch.nn.Module):
        raise LoadError(
            f"the builder returned {type(model).__name__} on this rank; it should return an nn.Module"
        )
    model.requires_grad_(False)  # the base is frozen unless a run asks for a gradient
    copied_out(model.parameters())
    return model.eval()


def first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def check(config: Any, model: torch.nn.Module, layout: Layout) -> None:
    """LayoutError for degrees that the model cannot have. `model` may be on the meta device."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    name = type(model).__name__
    if layout.tp > 1:
        if not getattr(model, "tp_plan", None):
            raise LayoutError(
                f"tp={layout.tp}: {name} has no tensor-parallel plan in transformers; use fsdp= or dp=, "
                "or load it with a builder that shards it"
            )
        for what, key in (
            ("attention heads", "num_attention_heads"),
            ("key/value heads", "num_key_value_heads"),
            ("MLP width", "intermediate_size"),
        ):
            size = getattr(text, key, None)
            if size and size % layout.tp:
                fits = [d for d in range(2, layout.tp * 4 + 1) if divides(text, d)]
                raise LayoutError(
                    f"tp={layout.tp} does not divide {name}'s {size} {what}; tp could be {fits or 1}"
                )
    if layout.pp > 1:
        base = getattr(model, model.base_model_prefix, model)
        missing = [part for part in ("layers", "embed_tokens", "norm") if not hasattr(base, part)]
        if missing:
            raise LayoutError(
                f"pp={layout.pp}: {name} cannot be split into stages, transformers looks for "
                f"{model.base_model_prefix}.{missing[0]} and it has none; use fsdp= or dp="
            )
        if len(base.layers) < layout.pp:
            raise LayoutError(
                f"pp={layout.pp} stages need as many layers; {name} has {len(base.layers)}"
            )
    if layout.batch_groups > 1 and not getattr(model, "fsdp_plan", None):
        raise LayoutError(
            f"fsdp={layout.fsdp}, dp={layout.dp}: {name} has no FSDP plan in transformers"
        )


def divides(text: Any, tp: int) -> bool:
    keys = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
    return all(getattr(text, key, tp) % tp == 0 for key in keys if getattr(text, key, None))


def load(path: str, layout: Layout, dtype: str, device: str, attention: str) -> torch.nn.Module:
    """This rank's part of the model, in eval mode. All ranks must call; the process group exists
    already."""
    options: dict[str, Any] = {
        "dtype": dtype_of(dtype),
        "attn_implementation": attention,
        "trust_remote_code": False,
    }
    options["use_safetensors"] = True
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


def part_of(info: ModelInfo, source: Source, device: str) -> torch.nn.Module:
    """This rank's part of the model, loaded or built by the user's function. All ranks must
    call."""
    if source.builder is not None:
        return build(source.builder)
    return load(info.path, info.layout, info.dtype, device, info.attention)


def exists(path: str) -> None:
    """LoadError for something that looks like a folder and is none. Anything else may be a hub
    id."""
    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise LoadError(f"{path} holds no config.json: it is not a saved transformers model")
    elif looks_local or folder.exists():
        near = sorted(p.name for p in folder.parent.iterdir())[:8] if folder.parent.is_dir() else []
        raise LoadError(
            f"there is no model folder {path}"
            + (f"; beside it are {', '.join(near)}" if near else "")
        )


def local(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def own(model: torch.nn.Module) -> Iterable[torch.Tensor]:
    """This rank's parameters, placeholders have none."""
    return (
        local(p)
        for m in model.modules()
        if not is_placeholder(m)
        for p in m.parameters(recurse=False)
    )


def local_parameters(model: torch.nn.Module) -> int:
    """How many parameters lie on this rank; tied ones once."""
    return sum(t.numel() for t in {t.data_ptr(): t for t in own(model)}.values())


def local_bytes(model: torch.nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in {t.data_ptr(): t for t in own(model)}.values())
