"""Pictures and tables: each takes a Capture, or a tensor made by hand, and returns what a notebook
shows, now and when it is opened again.

The widgets are imported when one is first used: a table needs none of them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from flexkernel.errors import ViewError

if TYPE_CHECKING:
    from .source import Drawable
    from .tensormap import TensorMap, freeze_all, tensor_map
    from .tree import ModelTree, ModuleRow

_HOMES = {
    "ModelTree": "tree",
    "ModuleRow": "tree",
    "TensorMap": "tensormap",
    "freeze_all": "tensormap",
    "tensor_map": "tensormap",
}
VIEWS = {"map": "tensor_map"}  # what a user calls a view → the function that makes it

__all__ = [
    "VIEWS",
    "ModelTree",
    "ModuleRow",
    "TensorMap",
    "freeze_all",
    "show",
    "tensor_map",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def show(source: Drawable, as_: str = "map", **options: Any) -> TensorMap:
    """The view of that name. source: a Capture, a torch tensor, a numpy array; options: those of
    the view. ViewError: there is no such view."""
    if as_ not in VIEWS:
        raise ViewError(f"there is no view {as_!r}; views: {', '.join(VIEWS)}")
    return __getattr__(VIEWS[as_])(source, **options)
