"""Completion: what can stand at the cursor in the line of a magic."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

from IPython.core.completer import (
    CompletionContext,
    SimpleCompletion,
    SimpleMatcherResult,
    context_matcher,
)

from .current import CurrentSession
from .lines import options_of, words

MAGIC_LINE = re.compile(r"\s*(?:[^%=]*=\s*)?%{1,2}(flex_\w+)[ \t]+(.*)\Z", re.DOTALL)
USUAL = {
    "engines": ("slurm", "ssh", "mpi", "pbs", "sge", "lsf", "htcondor"),
    "dtype": ("float32", "bfloat16", "float16"),
    "device": ("cpu", "cuda"),
    "attn": ("sdpa", "eager"),
    "as_": ("map",),
}


class Completion:
    """Completes the lines of one shell's flex magics.

    magics: the object whose attributes the magics are.
    """

    def __init__(self, magics: Any, current: CurrentSession):
        self.magics = magics
        self.current = current

    @context_matcher()
    def matcher(self, context: CompletionContext) -> SimpleMatcherResult:
        """What IPython asks at each Tab. Other lines than ours get no completions here."""
        line = MAGIC_LINE.match(context.text_until_cursor)
        magic = getattr(self.magics, line[1], None) if line else None
        if line is None or magic is None:
            return SimpleMatcherResult(completions=[])
        fragment, texts = self._complete(magic, line[2])
        return SimpleMatcherResult(
            completions=[SimpleCompletion(text=text, type="magic") for text in texts],
            matched_fragment=fragment,
            suppress=True,
            ordered=True,
        )

    def _complete(self, magic: Any, text: str) -> tuple[str, list[str]]:
        """(what is typed of it, what it can become) for the last word of the arguments."""
        *before, typed = re.split(r"[ \t]+", text)
        options = options_of(magic)
        action, in_prompt = expected(magic, before, options)
        if in_prompt:
            return typed, []
        if typed.startswith("-") and (action is None or not action.option_strings):
            name, equals, value = typed.partition("=")
            if not equals or name not in options:
                return typed, [option for option in options if option.startswith(typed)]
            action = options[name]
            typed = value
        if action is None:
            return typed, []
        if action.type is words:
            typed = typed.rpartition(",")[2]
        return typed, list(self._values(action, typed))

    def _values(self, action: argparse.Action, typed: str) -> Iterator[str]:
        if action.dest in ("glob", "stop_at"):
            return children(self._module_names(), typed)
        if action.dest == "parameter":
            return (name for name in children(self._parameters(), typed) if "*" not in name)
        texts: Iterable[Any] = action.choices or self._choices(action.dest)
        return (quoted(str(text)) for text in texts if str(text).startswith(typed))

    def _module_names(self) -> list[str]:
        session = self.current.find()
        return session.info.names if session is not None and session.info is not None else []

    def _parameters(self) -> Iterable[str]:
        session = self.current.find()
        return session.info.parameters if session is not None and session.info is not None else []

    def _choices(self, argument: str) -> Iterable[Any]:
        """The values that an argument of this name can have now."""
        if argument in USUAL:
            return USUAL[argument]
        if argument == "var":
            return [name for name in self.current.shell.user_ns if not name.startswith("_")]
        session = self.current.find()
        if session is None:
            return []
        if argument in ("groups", "group"):
            return session.hook_set.groups
        if argument == "hook":
            return [hook.key for hook in session.hook_set.hooks]
        if argument == "run":
            return [run.number for run in session.runs]
        if argument == "name" and session.runs:
            return dict.fromkeys(capture.name for capture in session.runs[-1])
        return []


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
