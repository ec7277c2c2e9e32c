"""What this rank's modules are called: by the unsharded model's names, whatever a builder calls
them."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping

import torch

from flexkernel.engine.compat import own_modules
from flexkernel.errors import LoadError

__all__ = ["modules_of", "renamed"]

Rename = Callable[[str], str | None]


def modules_of(
    model: torch.nn.Module, names: bytes | None = None, twice: bool = False
) -> dict[str, torch.nn.Module]:
    """This rank's modules by the unsharded model's names, placeholders of other stages included,
    wrappers not.

    twice: a module that is there twice under each of its names, else under the first. names: the
    user's mapping or function. A name that it gives takes the place of one that was left as it is;
    the root stays "" unless something else is called so. LoadError: two modules are given one
    name."""
    own = own_modules(model, twice)
    if names is None:
        return own
    rename, found = renamed(names), {"": own[""]}
    asked: dict[str, str] = {}
    for name, module in own.items():
        new = rename(name) if name else ""
        if new is None:
            continue  # nothing of the unsharded model
        if new != name:
            if new in asked:
                raise LoadError(f"names= calls both {asked[new]!r} and {name!r} {new!r}")
            asked[new] = name
        elif new in asked:
            continue
        found[new] = module
    return found


def renamed(names: bytes) -> Rename:
    """The user's names as a function of one module's name. A mapping replaces the longest prefix
    that it has."""
    given = pickle.loads(names)
    if callable(given):
        return checked(given)
    if not isinstance(given, Mapping) or not all(
        isinstance(part, str) for pair in given.items() for part in pair
    ):
        raise LoadError(
            "names= is a function of a module's name, or a mapping of prefixes like {'stage.layers': 'model.layers'}, "
            f"not {type(given).__name__}"
        )

    def replaced(name: str) -> str:
        for prefix in sorted(given, key=len, reverse=True):
            if prefix == "" or name == prefix or name.startswith(f"{prefix}."):
                rest = name[len(prefix) :].removeprefix(".")
                return ".".join(filter(None, (given[prefix], rest)))
        return name

    return replaced


def checked(function: Callable[[str], str | None]) -> Rename:
    def rename(name: str) -> str | None:
        new = function(name)
        if new is not None and not isinstance(new, str):
            raise LoadError(
                f"names= gave {new!r} for {name!r}; it gives a name, or None for what the model has not"
            )
        return new

    return rename
