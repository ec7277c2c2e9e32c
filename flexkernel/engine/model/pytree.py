"""The tensors inside a value that enters or leaves a module, each under its path.

A value that is itself a tensor has the path "". A tuple's elements are "0", "1"; the values of a
mapping or dataclass go by their key; a dot joins nested paths. A module's input is its positional
arguments by number, then its keyword arguments by name."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch

__all__ = ["arguments", "first_leaf", "inputs", "leaf", "leaves", "replaced"]


def inputs(args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A call's arguments as one value."""
    return {**{str(i): arg for i, arg in enumerate(args)}, **kwargs}


def arguments(value: Mapping[str, Any], num_args: int) -> tuple[tuple, dict[str, Any]]:
    """The inverse of `inputs`: (args, kwargs)."""
    items = list(value.items())
    return tuple(inner for _, inner in items[:num_args]), dict(items[num_args:])


def replaced(value: Any, path: str, tensor: torch.Tensor) -> Any:
    """The value with another tensor, of any shape, at that path. Its other parts are the same
    objects."""
    if isinstance(value, torch.Tensor):
        return tensor
    key = next(
        key
        for key, inner in children(value)
        if any(found == path for found, _ in leaves(inner, key))
    )
    inner = replaced(dict(children(value))[key], path[len(key) :].removeprefix("."), tensor)
    if isinstance(value, Mapping):
        other = copy.copy(value)
        other[next(k for k in value if str(k) == key)] = inner  # type: ignore[index]
        return other
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(value, **{key: inner})
    items = [inner if str(i) == key else item for i, item in enumerate(value)]
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)


def children(value: Any) -> Iterator[tuple[str, Any]]:
    """Each (key, part) of a mapping, tuple, list or dataclass; nothing for any other value."""
    if isinstance(value, Mapping):
        yield from ((str(key), inner) for key, inner in value.items())
    elif isinstance(value, (tuple, list)):
        yield from ((str(i), inner) for i, inner in enumerate(value))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from ((f.name, getattr(value, f.name)) for f in dataclasses.fields(value))


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Each (path, tensor), in the value's own order. Tensors have any shape."""
    if isinstance(value, torch.Tensor):
        yield path, value
    else:
        for key, inner in children(value):
            yield from leaves(inner, f"{path}.{key}" if path else key)


def leaf(value: Any, path: str) -> torch.Tensor | None:
    """The tensor at that path, of any shape, or None. A key may contain dots."""
    return next((tensor for found, tensor in leaves(value) if found == path), None)


def first_leaf(value: Any) -> tuple[str, torch.Tensor | None]:
    """(the path, the tensor) of the value's first tensor, of any shape; ("", None): it has none."""
    return next(leaves(value), ("", None))
