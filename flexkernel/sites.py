"""Which value of a module a hook reads or a capture is: the little language of `at`."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from .names import display_name, split_point

__all__ = ["BEFORE", "EDITED", "Site", "joined"]

BEFORE = "before"  # the value as it was before the hook's edit
EDITED = "edited"  # what an edit made of each copy of a value: the copies must stay equal


@dataclass(frozen=True)
class Site:
    """Which value of a module: what a name and an `at` such as "grad_output before" say.

    point: the virtual point inside attention, "" for the module's own value. of: "output", "input"
    or "param". gradient: its gradient instead. side: BEFORE, EDITED or "". reduction: what is kept
    of it instead, such as "norm:-1".

    >>> site = Site.parse("model.layers.0.self_attn.@q", "grad_output before norm:-1")
    >>> site.module, site.point, site.of, site.gradient, site.side, site.reduction
    ('model.layers.0.self_attn', 'q', 'output', True, 'before', 'norm:-1')
    >>> str(site), site.value, str(Site.parse(""))
    ('model.layers.0.self_attn.@q grad_output before norm:-1', 'grad_output before', '(root)')
    """

    module: str
    point: str = ""
    of: str = "output"
    gradient: bool = False
    side: str = ""
    reduction: str = ""

    @staticmethod
    @functools.lru_cache(maxsize=4096)
    def parse(name: str, at: str = "output") -> Site:
        kind, *words = at.split(" ")
        of = kind.removeprefix("grad_").removesuffix("_grad")
        side = words.pop(0) if words and words[0] in (BEFORE, EDITED) else ""
        return Site(*split_point(name), of, of != kind, side, " ".join(words))

    @property
    def kind(self) -> str:
        """What a hook's `at` says.

        >>> Site("m", of="param", gradient=True).kind
        'param_grad'
        """
        if not self.gradient:
            return self.of
        return "param_grad" if self.of == "param" else f"grad_{self.of}"

    @property
    def value(self) -> str:
        """The `at` of the value, before it was reduced."""
        return joined(self.kind, self.side)

    @property
    def without_side(self) -> str:
        """The `at` of the value, whether from before or after an edit."""
        return joined(self.kind, self.reduction)

    @property
    def at(self) -> str:
        return joined(self.kind, self.side, self.reduction)

    @property
    def name(self) -> str:
        return f"{self.module}.@{self.point}" if self.point else self.module

    def __str__(self) -> str:
        return display_name(self.name) + (f" {self.at}" if self.at != "output" else "")


def joined(*words: str) -> str:
    return " ".join(word for word in words if word)
