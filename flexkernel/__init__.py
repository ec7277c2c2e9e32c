"""flexkernel: look inside, and change, language models that are spread over many GPUs, from a
notebook.

>>> import flexkernel as fk                       # doctest: +SKIP
>>> session = fk.start(n=2)                       # doctest: +SKIP
>>> session.load("path/to/model", pp=2)           # doctest: +SKIP
>>> session.hook("model.layers.*.mlp")            # doctest: +SKIP
>>> session.run("The capital of France is")       # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import errors
from ._version import __version__ as __version__
from .errors import FlexError

if TYPE_CHECKING:
    from flexkernel.experiments.collect import collect
    from flexkernel.experiments.dataset import open_dataset
    from flexkernel.experiments.preview import preview
    from flexkernel.experiments.sweep import sweep
    from flexkernel.experiments.verify import verify
    from flexkernel.session.capture import Capture
    from flexkernel.session.run import Run
    from flexkernel.session.session import Session, attach, local
    from flexkernel.session.start import start
    from flexkernel.views import tensor_map

    from .notebook import demo

__all__ = [
    "Capture",
    "FlexError",
    "Run",
    "Session",
    "attach",
    "collect",
    "demo",
    "errors",
    "local",
    "open_dataset",
    "preview",
    "start",
    "sweep",
    "tensor_map",
    "verify",
]

# The door is light: torch, ipyparallel and the widgets are imported when one of these names is
# first used.
_HOMES = {
    "Capture": "session.capture",
    "Run": "session.run",
    "Session": "session.session",
    "attach": "session.session",
    "collect": "experiments",
    "local": "session.session",
    "open_dataset": "experiments",
    "preview": "experiments",
    "start": "session.start",
    "sweep": "experiments",
    "tensor_map": "views",
    "verify": "experiments",
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name == "demo":
        return import_module(".notebook.demo", __name__)
    if name not in _HOMES:
        raise AttributeError(f"module 'flexkernel' has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


def load_ipython_extension(shell: Any) -> None:
    """What `%load_ext flexkernel` calls: registers the magics and their completion."""
    from flexkernel.notebook.magics import register

    register(shell)


def unload_ipython_extension(shell: Any) -> None:
    """What `%unload_ext flexkernel` calls: takes the completion out again; the session stays."""
    from flexkernel.notebook.magics import unregister

    unregister(shell)
