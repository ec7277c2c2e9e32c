"""Module names: globs over them, and the nearest ones to a name that matches nothing.

`*` matches within one dotted segment, `**` zero or more segments; a pattern with neither is exact.
The root's name is "" and only "" matches it. A virtual point (`...self_attn.@q`) matches only if
its `@` is written.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Iterable, Sequence

from .errors import HookError

__all__ = ["display_name", "match", "nearest", "select", "split_point"]


@functools.lru_cache(maxsize=4096)
def _regex(glob: str) -> re.Pattern[str]:
    pattern = ""
    first, before = "(?:^)", ""
    for segment in glob.split("."):
        # twice is as once, and the matcher would try every way to share segments out
        if segment == before == "**":
            continue
        before = segment
        if segment == "**":  # zero or more whole segments, none of them a virtual point
            pattern += r"(?:(?:^|\.)[^.@][^.]*)*"
            first = r"(?:^|\.)" if first != r"\." else first
            continue
        virtual = segment.startswith("@")
        body = "".join(
            "[^.]*" if part[0] == "*" else re.escape(part)
            for part in re.split(r"(\*+)", segment)
            if part
        )
        pattern += first + ("" if virtual or not segment.startswith("*") else "(?!@)") + body
        first = r"\."
    return re.compile(pattern + r"\Z")


def display_name(name: str) -> str:
    """A module's name as users see it: the root's is empty.

    >>> display_name("model.norm"), display_name("")
    ('model.norm', '(root)')
    """
    return name or "(root)"


def split_point(name: str) -> tuple[str, str]:
    """(module, virtual point) of a name or glob; "": the module's own value.

    >>> split_point("layers.0.self_attn.@q"), split_point("layers.0.mlp")
    (('layers.0.self_attn', 'q'), ('layers.0.mlp', ''))
    """
    module, dot, point = name.rpartition(".@")
    return (module, point) if dot else (name, "")


def match(glob: str, name: str) -> bool:
    """Whether the glob names this module.

    >>> match("model.layers.*.mlp", "model.layers.11.mlp"), match("**.mlp", "model.layers.0.mlp"), match("*", "")
    (True, True, False)
    """
    if "*" not in glob or name == "":
        return glob == name
    return _regex(glob).match(name) is not None


def select(glob: str, names: Iterable[str]) -> list[str]:
    """The names the glob matches, in their own order; HookError with the nearest names when there
    is none."""
    names = list(names)
    found = [name for name in names if match(glob, name)]
    if not found:
        near = nearest(glob, names)
        raise HookError(
            f"no module matches {glob!r} among {len(names)}"
            + (f"; nearest: {', '.join(near)}" if near else "")
        )
    return found


def nearest(glob: str, names: Sequence[str], limit: int = 3) -> list[str]:
    """Names that look most like the glob, best first; layer numbers stand for its stars.

    >>> nearest("model.layers.*.mpl", ["model.layers.0.mlp", "model.layers.1.mlp", "lm_head"])
    ['model.layers.0.mlp', 'model.layers.1.mlp']
    """
    probe = glob.replace("**", "0").replace("*", "0")
    return difflib.get_close_matches(probe, [n for n in names if n], n=limit, cutoff=0.5)
