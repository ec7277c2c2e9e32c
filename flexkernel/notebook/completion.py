"""Completion: what can stand at the cursor in the line of a magic."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

MAGIC_LINE = re.compile(r"\s*(?:[^%=]*=\s*)?%{1,2}(flex_\w+)[ \t]+(.*)\Z", re.DOTALL)
USUAL = {
    "engines": ("slurm", "ssh", "mpi", "pbs", "sge", "lsf", "htcondor"),
    "dtype": ("float32", "bfloat16", "float16"),
    "device": ("cpu", "cuda"),
    "attn": ("sdpa", "eager"),
    "as_": ("map",),
}


def expected(
    magic: Any, before: Sequence[str], options: dict[str, argparse.Action]
) -> tuple[argparse.Action | None, bool]:
    """The argument that comes after these words: an option's value, else the next positional. And
    whether a prompt has begun, in which everything is text."""
    positionals = [a for a in magic.parser._actions if not a.option_strings]
    taken, waiting = 0, None
    for word in before:
        if waiting is not None:
            waiting = None
        elif word in options:
            waiting = options[word] if options[word].nargs != 0 else None
        elif not word.startswith("--"):
            taken += 1
    if waiting is not None:
        return waiting, False
    if taken < len(positionals):
        return positionals[taken], False
    return None, bool(positionals) and positionals[-1].dest == "prompt"


def children(names: Iterable[str], typed: str) -> Iterator[str]:
    """The names one segment further, after what is typed; `*` too where the segments are numbers.

    >>> list(children(["a.0.mlp", "a.1.mlp", "a.1.norm"], "a.")), list(children(["a.0.mlp", "a.1.norm"], "a.*.m"))
    (['a.*', 'a.0', 'a.1'], ['a.*.mlp'])
    """
    stem, dot, last = typed.rpartition(".")
    parents = stem.split(".") if dot else []
    found: dict[str, None] = {}
    for name in names:
        segments = name.split(".")
        for segment in beneath(segments, parents):
            found[segment] = None
    if sum(segment.isdecimal() for segment in found) > 1:
        found = {"*": None, **found}
    return (f"{stem}{dot}{segment}" for segment in found if segment and segment.startswith(last))


def beneath(segments: Sequence[str], parents: Sequence[str]) -> Sequence[str]:
    """The segment after those that the parents match; all later ones where a parent is `**`."""
    if "**" in parents:
        return segments[parents.index("**") :]
    fits = len(segments) > len(parents) and all(map(fnmatchcase, segments, parents))
    return segments[len(parents) : len(parents) + 1] if fits else ()


def quoted(text: str) -> str:
    return shlex.quote(text) if " " in text else text
