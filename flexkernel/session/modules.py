"""The half of a session that trains: modules beside the model, and steps of an optimizer."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as tensors_of
from safetensors.torch import load_file, save_file
from safetensors.torch import save as bytes_of

from flexkernel.cluster.cluster import Cluster
from flexkernel.cluster.packing import pack
from flexkernel.errors import CaptureError, FlexError, HookError, LoadError
from flexkernel.names import select
from flexkernel.wire import ModelInfo, Training

from .files import whole_file
from .run import Run

__all__ = ["Trainable"]


class Trainable:
    """Keeps the driver's copies of the trainable modules; the engines have the ones that count."""

    cluster: Cluster
    info: ModelInfo | None
    _loaded: Callable[[], ModelInfo]
    _run: Callable[..., Run]

    def __init__(self) -> None:
        super().__init__()
        self._modules: dict[str, torch.nn.Module] = {}

    def add_module(self, name: str, module: torch.nn.Module) -> torch.nn.Module:
        """Have a trainable module (a probe, a lens, a LoRA) on every engine, instead of one that
        had its name.

        In edits it is ctx.modules[name], in losses batch.modules[name]. It runs once, where they
        do; its gradients are sums over all ranks."""
        self._loaded()
        if not name.isidentifier() or not isinstance(module, torch.nn.Module):
            raise HookError(
                f"add_module takes a name and an nn.Module, not {name!r} and {type(module).__name__}"
            )
        self.cluster.call("train.add", name, pack(module))
        self._modules[name] = module
        return module

    def remove_module(self, name: str) -> None:
        self._known(name)
        self.cluster.call("train.remove", name)
        del self._modules[name]

    @property
    def modules(self) -> list[str]:
        """The names of the trainable modules."""
        return list(self._modules)

    def module(self, name: str) -> torch.nn.Module:
        """The driver's copy of a trainable module, with its weights as they are now."""
        copy = self._known(name)
        copy.load_state_dict(self._tensors("train.state", name))
        return copy

    def gradients(self, name: str) -> dict[str, torch.Tensor]:
        """The gradients of a trainable module in the last run that had a loss; train_step has used
        them up."""
        self._known(name)
        return dict(self._tensors("train.gradients", name))

    def parameters(self, glob: str = "**") -> dict[str, tuple[int, ...]]:
        """Name → whole shape, of the model's parameters and of the trainable modules', which are
        called NAME.weight."""
        info = self._loaded()
        own = {
            f"{n}.{key}": tuple(p.shape)
            for n, m in self._modules.items()
            for key, p in m.named_parameters()
        }
        every = {
            name: shape for name, shape in info.parameters.items() if name not in info.buffers
        } | own
        return {name: every[name] for name in select(glob, list(every))}

    def train_step(
        self,
        prompts_or_ids: Any,
        loss: Callable[..., Any] | str,
        optimizer: Callable[[list[torch.Tensor]], torch.optim.Optimizer] | None = None,
        parameters: str | Sequence[str] = (),
        modules: Sequence[str] | None = None,
        chat: bool = False,
    ) -> float:
        """One forward, one backward, one step; returns the loss. The model stays as it is, but for
        `parameters`: names or globs of its own that are trained as well. optimizer: makes a torch
        optimizer of parameters, by default AdamW with lr 1e-3; the same function goes on where it
        stopped. modules: all by default. LossError: as run()."""
        info = self._loaded()
        globs = (parameters,) if isinstance(parameters, str) else tuple(parameters)
        names = [name for name in info.parameters if name not in info.buffers]
        wanted = tuple(dict.fromkeys(name for glob in globs for name in select(glob, names)))
        trained = tuple(self._modules if modules is None else modules)
        for name in trained:
            self._known(name)
        if not trained and not wanted:
            raise HookError(
                "there is nothing to train: session.add_module(name, module), or parameters="
            )
        made = None if optimizer is None else pack(optimizer)
        run = self._run(
            prompts_or_ids, chat=chat, loss=loss, training=Training(made, wanted, trained)
        )
        run.free()
        assert run.loss is not None
        return run.loss

    def save_modules(self, path: str | os.PathLike[str]) -> Path:
        """Write the weights of all trainable modules as one safetensors file, which appears whole
        or not at all. FlexError: it could not be written."""
        tensors = {
            f"{n}.{k}": t for n in self._modules for k, t in self._tensors("train.state", n).items()
        }
        with whole_file(path, FlexError) as part:
            save_file(tensors, part)
        return Path(path)

    def load_modules(self, path: str | os.PathLike[str]) -> list[str]:
        """Read weights that save_modules wrote into the modules that are there; returns their
        names. LoadError: the file has other shapes, or is no whole safetensors file."""
        found: dict[str, dict[str, torch.Tensor]] = {}
        try:
            tensors_of_file = load_file(path)
        except SafetensorError as error:
            raise LoadError(f"{path} is no whole safetensors file: {error}") from None
        for key, tensor in tensors_of_file.items():
            name, _, rest = key.partition(".")
            found.setdefault(name, {})[rest] = tensor
        for name, tensors in found.items():
            own = self._known(name).state_dict()
            if {k: t.shape for k, t in own.items()} != {k: t.shape for k, t in tensors.items()}:
                raise LoadError(
                    f"{path}: {name} has other weights there than the module of that name has here"
                )
        for name, tensors in found.items():
            self.cluster.call("train.set_state", name, bytes_of(tensors))
        return list(found)

    # --- inside -----------------------------------------------------------------------

    def _known(self, name: str) -> torch.nn.Module:
        if name not in self._modules:
            there = ", ".join(self._modules) or "none"
            raise HookError(
                f"no trainable module is called {name!r}; there are {there}: session.add_module(name, module)"
            )
        return self._modules[name]

    def _tensors(self, method: str, name: str) -> Mapping[str, torch.Tensor]:
        """What every rank has, from the first. CaptureError: the copies have diverged."""
        answers = self.cluster.call(method, name)
        if len({said for _, said in answers}) > 1:
            raise CaptureError(
                f"the copies of {name!r} on the ranks have diverged: add the module again"
            )
        return tensors_of(answers[0][0])

    def _recover_modules(self, held: Mapping[str, tuple[bytes, bytes]]) -> None:
        """The modules that the engines hold, for a driver that attaches."""
        self._modules = {name: pickle.loads(code) for name, (code, _) in held.items()}
        for name, (_, weights) in held.items():
            self._modules[name].load_state_dict(tensors_of(weights))

    def _held_modules(self) -> dict[str, tuple[bytes, bytes]]:
        """The driver's copies, as an engine would describe its own."""
        return {n: (pack(m), bytes_of(dict(m.state_dict()))) for n, m in self._modules.items()}
