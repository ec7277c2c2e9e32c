"""Layouts that tests go through, as pytest's parameters: each under its title, with as many engines
as it has ranks."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import pytest

__all__ = ["ALL", "REAL", "Layout", "only", "param", "params", "title", "without"]

Layout = dict[str, int]  # axis -> degree, as `session.load` takes them


def title(layout: Layout) -> str:
    """
    >>> title({"tp": 2, "pp": 2}), title({})
    ('tp2xpp2', 'one')
    """
    return "x".join(f"{axis}{degree}" for axis, degree in layout.items()) or "one"


def param(*values: Any, prefix: str = "", marks: Iterable[Any] = ()) -> Any:
    """The parameters of one case, of which the last is its layout."""
    layout = values[-1]
    engines = pytest.mark.engines(math.prod(layout.values()))
    return pytest.param(*values, id=prefix + title(layout), marks=[engines, *marks])


def params(*layouts: Layout) -> list[Any]:
    return [param(layout) for layout in layouts]


def only(parameters: list[Any], *ids: str) -> list[Any]:
    assert set(ids) <= {p.id for p in parameters}
    return [p for p in parameters if p.id in ids]


def without(parameters: list[Any], *ids: str) -> list[Any]:
    assert set(ids) <= {p.id for p in parameters}
    return [p for p in parameters if p.id not in ids]


# Each axis alone, and each pair of axes that share something
ALL = params(
    {},
    {"tp": 2},
    {"pp": 2},
    {"fsdp": 2},
    {"dp": 2},
    {"tp": 2, "pp": 2},
    {"tp": 2, "fsdp": 2},
    {"pp": 2, "fsdp": 2},
)
# Of the demo model, whose nine heads three ranks can share
REAL = params({"pp": 2}, {"fsdp": 2}, {"tp": 3})
