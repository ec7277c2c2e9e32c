"""The trainable modules of a session: modules beside the model, on every engine."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as tensors_of
from safetensors.torch import load_file, save_file
from safetensors.torch import save as bytes_of

from flexkernel.cluster.packing import pack
from flexkernel.errors import CaptureError, FlexError, HookError, LoadError

from .files import whole_file

__all__ = ["Modules"]


class Modules(MutableMapping[str, torch.nn.Module]):
    """Trainable modules (a probe, a lens, a LoRA) by name: `session.modules["lens"] = nn.Linear(…)`
    puts one on every engine.

    In edits it is ctx.modules["lens"], in losses batch.modules["lens"]. It runs once, where they
    do; its gradients are sums over all ranks. `session.modules["lens"]` reads the weights from the
    engines, as they are now. call: calls a method on every engine; ready: LoadError if no model is
    loaded."""

    def __init__(self, call: Callable[..., list[Any]], ready: Callable[[], Any]):
        self._call = call
        self._ready = ready
        self._copies: dict[str, torch.nn.Module] = {}  # the driver's

    # --- a mapping --------------------------------------------------------------------

    def __setitem__(self, name: str, module: torch.nn.Module) -> None:
        self.add(name, module)

    def __getitem__(self, name: str) -> torch.nn.Module:
        """The driver's copy, with the weights that the engines have now. HookError: there is none
        of that name."""
        copy = self._copy(name)
        copy.load_state_dict(self._tensors("train.state", name))
        return copy

    def __delitem__(self, name: str) -> None:
        self._copy(name)
        self._call("train.remove", name)
        del self._copies[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._copies)

    def __len__(self) -> int:
        return len(self._copies)

    def __contains__(self, name: object) -> bool:
        return name in self._copies

    def get(self, name: str, default: Any = None) -> Any:
        if name not in self:
            return default
        return self[name]

    def __repr__(self) -> str:
        names = [f"{name}: {type(copy).__name__}" for name, copy in self._copies.items()]
        return f"<Modules {', '.join(names) or 'none'}>"

    def add(self, name: str, module: torch.nn.Module) -> torch.nn.Module:
        """Have a trainable module on every engine, in place of one of its name."""
        self._ready()
        if not name.isidentifier() or not isinstance(module, torch.nn.Module):
            raise HookError(
                f"a trainable module has a name and is an nn.Module, "
                f"not {name!r} and {type(module).__name__}"
            )
        self._call("train.add", name, pack(module))
        self._copies[name] = module
        return module

    # --- looking ----------------------------------------------------------------------

    def gradients(self, name: str) -> dict[str, torch.Tensor]:
        """Name → gradient, of the parameter's shape, in the last run that had a loss. train_step
        uses them up."""
        self._copy(name)
        return dict(self._tensors("train.gradients", name))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """NAME.weight → shape, of all modules' parameters."""
        return {
            f"{name}.{key}": tuple(parameter.shape)
            for name, copy in self._copies.items()
            for key, parameter in copy.named_parameters()
        }

    def trained(self, names: Sequence[str] | None = None) -> tuple[str, ...]:
        """The names of the modules that a step trains: these, or all. HookError: there is none of
        that name."""
        chosen = tuple(self._copies if names is None else names)
        for name in chosen:
            self._copy(name)
        return chosen

    # --- a file -----------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the weights of all modules as one safetensors file. It appears whole or not at
        all. FlexError: it could not be written."""
        tensors = {}
        for name in self._copies:
            for key, tensor in self._tensors("train.state", name).items():
                tensors[f"{name}.{key}"] = tensor
        with whole_file(path, FlexError) as part:
            save_file(tensors, part)
        return Path(path)

    def load(self, path: str | os.PathLike[str]) -> list[str]:
        """Read weights that save() wrote into the modules of the same names. Returns these names.
        LoadError: the file has other shapes, or is no whole safetensors file."""
        by_module: dict[str, dict[str, torch.Tensor]] = {}
        try:
            tensors_of_file = load_file(path)
        except SafetensorError as error:
            raise LoadError(f"{path} is no whole safetensors file: {error}") from None
        for key, tensor in tensors_of_file.items():
            name, _, rest = key.partition(".")
            by_module.setdefault(name, {})[rest] = tensor
        for name, tensors in by_module.items():
            if shapes_of(self._copy(name).state_dict()) != shapes_of(tensors):
                raise LoadError(
                    f"{path}: {name} has other weights there than the module of that name has here"
                )
        for name, tensors in by_module.items():
            self._call("train.set_state", name, bytes_of(tensors))
        return list(by_module)

    # --- engines come and go ----------------------------------------------------------

    def adopt(self, held: Mapping[str, tuple[bytes, bytes]]) -> None:
        """Take over the modules that the engines have: name → (pickled module, its weights as
        safetensors)."""
        self._copies = {name: pickle.loads(code) for name, (code, _) in held.items()}
        for name, (_, weights) in held.items():
            self._copies[name].load_state_dict(tensors_of(weights))

    def state(self) -> dict[str, tuple[bytes, bytes]]:
        """The driver's copies, as an engine describes its own."""
        return {
            name: (pack(copy), bytes_of(dict(copy.state_dict())))
            for name, copy in self._copies.items()
        }

    def end(self) -> None:
        """Forget all modules: the engines have another model, or are gone."""
        self._copies = {}

    def _copy(self, name: str) -> torch.nn.Module:
        if name not in self._copies:
            names = ", ".join(self._copies) or "none"
            raise HookError(
                f"no trainable module is called {name!r}; there are {names}: "
                "session.modules[name] = module"
            )
        return self._copies[name]

    def _tensors(self, method: str, name: str) -> Mapping[str, torch.Tensor]:
        """Name → tensor, of the parameter's shape, on the CPU: the same on every rank.
        CaptureError: the ranks' copies have diverged."""
        answers = self._call(method, name)
        if len({digest for _, digest in answers}) > 1:
            raise CaptureError(
                f"the copies of {name!r} on the ranks have diverged: add the module again"
            )
        return tensors_of(answers[0][0])


def shapes_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Size]:
    """Name → shape."""
    return {name: tensor.shape for name, tensor in tensors.items()}
