"""Module names: globs over them, what is nearest to a name that matches nothing, virtual points.

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

# The words of other tools for parts of a layer → what the part's name ends with, by model, and
# where a hook on it reads.
TRADE: dict[str, tuple[tuple[str, ...], str]] = {
    "resid_pre": (("",), "input"),
    "resid_mid": ((".post_attention_layernorm", ".ln_2", ".post_attention_norm"), "input"),
    "resid_post": (("",), "output"),
    "resid": (("",), "output"),
    "residual": (("",), "output"),
    "attn_out": ((".self_attn", ".attn", ".attention", ".self_attention"), "output"),
    "mlp_out": ((".mlp", ".feed_forward"), "output"),
    "mlp_post": ((".mlp.down_proj", ".mlp.c_proj", ".mlp.dense_4h_to_h"), "input"),
    "post": ((".mlp.down_proj", ".mlp.c_proj", ".mlp.dense_4h_to_h"), "input"),
    "pattern": ((".@pattern",), "output"),
    "q": ((".@q",), "output"),
    "k": ((".@k",), "output"),
    "v": ((".@v",), "output"),
    "z": ((".@z",), "output"),
}


# --- names ----------------------------------------------------------------------------


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


# --- globs ----------------------------------------------------------------------------


def match(glob: str, name: str) -> bool:
    """Whether the glob names this module.

    >>> match("model.layers.*.mlp", "model.layers.11.mlp")
    True
    >>> match("**.mlp", "mlp"), match("**.mlp", "model.layers.0.mlp")
    (True, True)
    >>> match("model.*", "model"), match("model.**", "model")
    (False, True)
    >>> match("*.q*", "attn.q_proj"), match("*.q*", "layers.0.q_proj")
    (True, False)
    >>> match("**", "self_attn.@q"), match("**.@q", "self_attn.@q")
    (False, True)
    >>> match("*", ""), match("", "")
    (False, True)
    """
    if "*" not in glob or name == "":
        return glob == name
    return _pattern(glob).match(f".{name}") is not None


@functools.lru_cache(maxsize=4096)
def _pattern(glob: str) -> re.Pattern[str]:
    """What matches a name with a dot before it: each segment takes its own dot."""
    patterns: list[str] = []
    for segment in glob.split("."):
        pattern = _segment(segment)
        # "**.**" means "**", and would make the matcher try every way to share segments out
        if segment != "**" or patterns[-1:] != [pattern]:
            patterns.append(pattern)
    return re.compile("".join(patterns) + r"\Z")


def _segment(segment: str) -> str:
    if segment == "**":  # any number of whole segments, none of them a virtual point
        return r"(?:\.[^.@][^.]*)*"
    text = "[^.]*".join(re.escape(part) for part in re.split(r"\*+", segment))
    return r"\.(?!@)" + text if segment.startswith("*") else r"\." + text


def select(glob: str, names: Iterable[str]) -> list[str]:
    """The names that the glob matches, in their own order. HookError: none; it says what is near,
    or what the model calls a word of the trade."""
    names = list(names)
    found = [name for name in names if match(glob, name)]
    if found:
        return found
    message = f"no module matches {glob!r} among {len(names)}"
    translation = _translated(glob, names)
    near = nearest(glob, names)
    if translation:
        message += f"; {translation}"
    elif near:
        message += f"; nearest: {', '.join(near)}"
    raise HookError(message)


# --- what was meant -------------------------------------------------------------------


def nearest(glob: str, names: Sequence[str], limit: int = 3) -> list[str]:
    """The names that look most like this one, best first; of a glob the globs that match some.

    >>> nearest("model.norn", ["model.norm", "lm_head"])
    ['model.norm']
    >>> nearest("model.layers.*.mpl", ["model.layers.0.mlp", "model.layers.1.mlp", "lm_head"])
    ['model.layers.*.mlp']
    >>> nearest("**.mpl", ["model.layers.0.mlp", "model.layers.1.mlp", "lm_head"])
    ['**.mlp']
    """
    known = [name for name in names if name]
    if glob.startswith("**."):
        probe = glob.removeprefix("**.")
        count = probe.count(".") + 1
        known = [".".join(name.split(".")[-count:]) for name in known]
        return [f"**.{tail}" for tail in _closest(probe, known, limit)]
    if "*" in glob:
        known = [_starred(name) for name in known]
    return _closest(glob, known, limit)


def _closest(probe: str, names: Iterable[str], limit: int) -> list[str]:
    return difflib.get_close_matches(probe, dict.fromkeys(names), n=limit, cutoff=0.5)


def _starred(name: str) -> str:
    """
    >>> _starred("model.layers.10.mlp")
    'model.layers.*.mlp'
    """
    return ".".join("*" if segment.isdigit() else segment for segment in name.split("."))


def _translated(glob: str, names: Sequence[str]) -> str:
    """What a word of the trade is called in a model of these names; "": it is no such word.

    >>> names = ["model.layers.0", "model.layers.0.mlp", "model.layers.1", "model.layers.1.mlp"]
    >>> _translated("blocks.1.hook_resid_pre", names), _translated("**.mlp_out", names)
    ("resid_pre is model.layers.1 with at='input'", 'mlp_out is model.layers.*.mlp')
    """
    *above, last = glob.split(".")
    word = last.lstrip("@").removeprefix("hook_")
    endings, at = TRADE.get(word, ((), ""))
    called = _within_layers(names, endings)
    if called is None:
        return ""
    number = next((segment for segment in above if segment.isdigit()), "*")
    place = f" with at={at!r}" if at != "output" else ""
    return f"{word} is {called.replace('*', number, 1)}{place}"


def _within_layers(names: Sequence[str], endings: Sequence[str]) -> str | None:
    """The glob of the part of every layer that has one of these endings; "" is the layer itself."""
    layers = next((_starred(name) for name in names if name.rpartition(".")[2].isdigit()), None)
    if layers is None:
        return None
    parts = dict.fromkeys(_starred(name) for name in names)
    inside = [part for part in parts if part.startswith(f"{layers}.")]
    for ending in endings:
        if not ending:
            return layers
        for part in inside:
            if part.endswith(ending):
                return part
    return None
