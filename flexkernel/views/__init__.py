"""Views: each takes a Capture, or a tensor made by hand, and returns what a notebook shows, now
and when reopened."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .tensormap import TensorMap, freeze_all, tensor_map
from .tree import ModelTree, ModuleRow, model_tree, tree_html

__all__ = [
    "VIEWS",
    "ModelTree",
    "ModuleRow",
    "TensorMap",
    "freeze_all",
    "model_tree",
    "show",
    "tensor_map",
    "tree_html",
]

VIEWS: dict[str, Callable[..., Any]] = {"map": tensor_map}


def show(source: Any, as_: str = "map", **options: Any) -> Any:
    """The view of that name. source: a Capture, a torch tensor, a numpy array; options: those of
    the view."""
    if as_ not in VIEWS:
        raise ValueError(f"no view {as_!r}; there are {', '.join(VIEWS)}")
    return VIEWS[as_](source, **options)
