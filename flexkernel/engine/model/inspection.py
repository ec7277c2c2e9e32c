"""What is known of a model before it is loaded: its modules, the shape of every value, and whether
the requested degrees and dtype are possible."""

from __future__ import annotations

import contextlib
import copy
import pickle
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from flexkernel.engine.compat import tp_styles
from flexkernel.engine.place.placements import aimed, parse
from flexkernel.errors import LayoutError, LoadError, first_line
from flexkernel.names import select
from flexkernel.wire import Layout, ModelInfo, ModuleInfo, Source, either

from .checkpoint import check_files
from .scan import Scan, read_config, runnable_on_meta, scan, unsharded

__all__ = [
    "attention_of",
    "check_degrees",
    "check_path",
    "dtype_of",
    "inspect",
    "possible_layouts",
]

ATTENTION = {"flash": "flash_attention_2"}  # short names; transformers' own names also work
# What tp splits evenly: in words, and its key in a config
SPLIT_BY_TP = {
    "attention heads": "num_attention_heads",
    "key/value heads": "num_key_value_heads",
    "MLP width": "intermediate_size",
}


@dataclass
class WholeModel:
    """The unsharded model on the meta device, where it takes no memory, and its config if it has
    one."""

    model: torch.nn.Module
    config: Any

    @property
    def text_config(self) -> Any:
        """The config of the language model, where it is one part of several."""
        if hasattr(self.config, "get_text_config"):
            return self.config.get_text_config()
        return self.config


def inspect(
    source: Source, layout: Layout, dtype: str, attention: str | None, placements: dict[str, str]
) -> ModelInfo:
    """What is known of a model before it is loaded.

    LoadError, LayoutError: the path, the dtype or the degrees are wrong. PlacementError,
    HookError: a declared placement is wrong."""
    whole = whole_model(source, dtype_of(dtype), layout)
    info = ModelInfo(
        path=source.path,
        cls=source.path,
        layout=layout,
        dtype=dtype,
        attention=attention_of(attention, None if whole is None else whole.model),
        modules=(),
        scan={},
        num_parameters=0,
        rank_parameters=(),
        rank_bytes=(),
        vocab_size=None,
        max_positions=None,
        placements=dict(placements),
        built=source.builder is not None,
    )
    if whole is not None:
        info = with_model(info, whole, source)
    check_placements(info)
    return info


def with_model(info: ModelInfo, whole: WholeModel, source: Source) -> ModelInfo:
    """The same info, completed from the unsharded model."""
    model = whole.model
    text = whole.text_config
    longest = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
    return replace(
        info,
        cls=type(model).__name__,
        modules=modules_in(model),
        scan=SCANS.scan_of(model, source, whole.config, info.dtype),
        num_parameters=sum(p.numel() for p in model.parameters()),
        vocab_size=getattr(text, "vocab_size", None),
        max_positions=longest,
        window=getattr(text, "sliding_window", None) or 0,
        styles={} if info.built else tp_styles(model, info.layout),
        parameters=shapes(model),
        buffers=frozenset(name for name, _ in model.named_buffers(remove_duplicate=False)),
        tied=tied(model),
    )


def dtype_of(name: str) -> torch.dtype:
    """torch's dtype of that name. LoadError: there is none, or no layer computes in it."""
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise LoadError(
            f"dtype {name!r} is not one of torch's floating point types, such as float32 or "
            "bfloat16"
        )
    if found.itemsize < 2:
        raise LoadError(
            f"dtype {name!r} only stores weights, no layer of torch computes in it: take bfloat16"
        )
    return found


def attention_of(asked: str | None, model: torch.nn.Module | None) -> str:
    """The attention implementation to load with: the requested one, else sdpa if the architecture
    supports it."""
    if asked is not None:
        return ATTENTION.get(asked, asked)
    return "sdpa" if getattr(model, "_supports_sdpa", True) else "eager"


def modules_in(model: torch.nn.Module) -> tuple[ModuleInfo, ...]:
    """Every module with its class and number of parameters."""
    return tuple(
        ModuleInfo(name, type(module).__name__, sum(p.numel() for p in module.parameters()))
        for name, module in model.named_modules()
    )


def shapes(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Every parameter and buffer with its shape, tied ones under each of their names."""
    named = (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    )
    return {name: tuple(tensor.shape) for name, tensor in named}


def tied(model: torch.nn.Module) -> tuple[tuple[str, ...], ...]:
    """The names of each parameter that has more than one."""
    names_of: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names_of.setdefault(id(parameter), []).append(name)
    return tuple(tuple(names) for names in names_of.values() if len(names) > 1)


def check_placements(info: ModelInfo) -> None:
    """PlacementError, HookError: a declared placement cannot be parsed, or names no module."""
    for key, text in info.placements.items():
        parse(text)
        if not info.built:  # a builder's model may have modules that its reference lacks
            select(aimed(key)[0], info.names)


# --- the unsharded model --------------------------------------------------------------


def whole_model(source: Source, dtype: torch.dtype, layout: Layout) -> WholeModel | None:
    """The unsharded model on the meta device, its degrees checked; None for a builder without a
    reference."""
    if source.builder is None:
        return model_of_path(source.path, dtype, layout)
    if source.reference is None:
        return None
    # outside the meta device: importing the user's modules may make tensors, which must be real
    reference = pickle.loads(source.reference)
    with torch.device("meta"):
        model = reference().eval()
    config = copy.deepcopy(getattr(model, "config", None))
    return WholeModel(runnable_on_meta(model), config)


def model_of_path(path: str, dtype: torch.dtype, layout: Layout) -> WholeModel:
    """The unsharded model of a folder or hub id, its files and degrees checked."""
    check_path(path)
    folder = Path(path).expanduser()
    config, model = described(path, dtype)
    try:
        check_degrees(config, model, layout)
    except LayoutError as error:
        raise LayoutError(f"{error}{advice(config, model, layout.world)}") from None
    if folder.is_dir():
        check_files(folder)
    return WholeModel(model, config)


def described(path: str, dtype: torch.dtype) -> tuple[Any, torch.nn.Module]:
    """(config, unsharded model on the meta device) of a folder or hub id. LoadError: no model can
    be made of it."""
    config = config_of(path)
    try:
        model = unsharded(config, dtype)
    except Exception as error:
        raise LoadError(
            f"no model can be made from the config of {path}: {type(error).__name__}: "
            f"{first_line(error)}"
        ) from error
    return config, model


def config_of(path: str) -> Any:
    """The config of a model folder or hub id. LoadError: there is none, or it is invalid."""
    folder = Path(path).expanduser()
    try:
        return read_config(str(folder) if folder.is_dir() else path)
    except (OSError, ValueError) as error:
        raise LoadError(
            f"{path} is neither a model folder nor a model the hub knows: {first_line(error)}"
        ) from error
    except Exception as error:  # what a config's own checks raise
        raise LoadError(
            f"the config of {path} describes no model: {' '.join(str(error).split())}"
        ) from error


def check_path(path: str) -> None:
    """LoadError if the path looks like a model folder but is none. Any other may be a hub id."""
    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise LoadError(f"{path} holds no config.json: it is not a saved transformers model")
    elif looks_local or folder.exists():
        raise LoadError(f"there is no model folder {path}{beside(folder)}")


def beside(folder: Path) -> str:
    """What else is in the parent of a missing folder, in words."""
    if not folder.parent.is_dir():
        return ""
    near = sorted(path.name for path in folder.parent.iterdir())[:8]
    return f"; beside it are {', '.join(near)}" if near else ""


# --- its scan -------------------------------------------------------------------------


class ScanCache:
    """The scans of the most recent models, one for each class, config and dtype."""

    def __init__(self, most: int):
        self.most = most
        self._scans: dict[tuple[Any, ...], Scan] = {}

    def scan_of(self, model: torch.nn.Module, source: Source, config: Any, dtype: str) -> Scan:
        """The model's scan. LoadError: its forward does not run on the meta device."""
        if source.builder is not None:  # a user's own model may depend on anything
            return new_scan(model, source.forward)
        try:
            key = type(model), config.to_json_string(use_diff=False), dtype, source.forward
        except TypeError:  # a config that cannot be written as JSON
            return new_scan(model, source.forward)
        found = self._scans.pop(key, None) or new_scan(model, source.forward)
        self._scans[key] = found
        while len(self._scans) > self.most:
            self._scans.pop(next(iter(self._scans)))
        return found


SCANS = ScanCache(most=8)  # one per process, because a scan takes a second or two


def new_scan(model: torch.nn.Module, forward: bytes | None) -> Scan:
    """The model's scan. LoadError: its forward does not run without data, or nobody says how to
    call it."""
    try:
        return scan(model, forward)
    except LoadError:
        raise
    except Exception as error:
        raise LoadError(
            f"{type(model).__name__} cannot be scanned, its forward does not run on the meta "
            "device "
            f"({first_line(error)}): load it with a builder that returns it and no reference="
        ) from error


# --- its degrees ----------------------------------------------------------------------


def check_degrees(config: Any, model: torch.nn.Module, layout: Layout) -> None:
    """LayoutError if the model cannot be split into these degrees. model: may be on the meta
    device."""
    whole = WholeModel(model, config)
    if layout.tp > 1:
        check_tp(whole, layout)
    if layout.pp > 1:
        check_pp(whole, layout)
    if layout.batch_groups > 1 and not getattr(model, "fsdp_plan", None):
        raise LayoutError(
            f"fsdp={layout.fsdp}, dp={layout.dp}: {type(model).__name__} has no FSDP plan in "
            "transformers"
        )


def possible_layouts(path: str, world: int) -> tuple[Layout, ...]:
    """The layouts of one axis that the model of a folder or hub id can have over so many engines.

    The first is taken where no degree is given. fsdp comes before pp: it changes nothing of a
    forward, while a pipeline repeats on each stage what a model does between its modules.
    LoadError: there is no such model."""
    check_path(path)
    return layouts_of(*described(path, torch.float32), world)


def layouts_of(config: Any, model: torch.nn.Module, world: int) -> tuple[Layout, ...]:
    """As possible_layouts, of a model that is on the meta device."""
    fits = []
    for layout in (Layout(tp=world), Layout(fsdp=world), Layout(pp=world), Layout(dp=world)):
        with contextlib.suppress(LayoutError):
            check_degrees(config, model, layout)
            fits.append(layout)
    return tuple(fits)


def advice(config: Any, model: torch.nn.Module, world: int) -> str:
    """What the model can have instead over so many engines, as the end of a sentence."""
    fits = layouts_of(config, model, world)
    return f"; over {world} engines it can have {either(fits)}" if fits else ""


def check_tp(whole: WholeModel, layout: Layout) -> None:
    """LayoutError unless the model has a plan for tp, and tp divides every size that it splits."""
    name = type(whole.model).__name__
    text = whole.text_config
    if not getattr(whole.model, "tp_plan", None):
        raise LayoutError(
            f"tp={layout.tp}: {name} has no tensor-parallel plan in transformers; use fsdp= or "
            "dp=, "
            "or load it with a builder that shards it"
        )
    for words, key in SPLIT_BY_TP.items():
        size = getattr(text, key, None)
        if size and size % layout.tp:
            fits = [tp for tp in range(2, layout.tp * 4 + 1) if divides(text, tp)]
            raise LayoutError(
                f"tp={layout.tp} does not divide {name}'s {size} {words}; tp could be {fits or 1}"
            )


def divides(text_config: Any, tp: int) -> bool:
    """Whether tp divides every size that it would split."""
    sizes = [getattr(text_config, key, None) for key in SPLIT_BY_TP.values()]
    return all(size % tp == 0 for size in sizes if size)


def check_pp(whole: WholeModel, layout: Layout) -> None:
    """LayoutError unless transformers can split the model into that many stages."""
    model = whole.model
    name = type(model).__name__
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
