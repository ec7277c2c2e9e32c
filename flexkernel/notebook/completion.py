"""Completion: what can stand at the cursor in the line of a magic, and in names within Python."""

from __future__ import annotations

import argparse
import os
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
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
# `flex.hook("model.` and `run["model.`: variable, method or nothing, what is typed of the name
PYTHON_NAME = re.compile(r"""([A-Za-z_]\w*)(?:\.(\w+)\(|\[)\s*["']([^"']*)\Z""")
TAKE_MODULES = ("hook", "hooked", "unhook", "tree")
SHOWN_PATHS = 200

# Arguments whose values are known beforehand.
USUAL = {
    "engines": ("slurm", "ssh", "mpi", "pbs", "sge", "lsf", "htcondor"),
    "dtype": ("float32", "bfloat16", "float16"),
    "device": ("cpu", "cuda"),
    "attn": ("sdpa", "eager"),
    "capture": ("after", "before", "both", "none"),
    "as_": ("map",),
}


class NothingElse(list):
    """No completions, nor any of IPython's: it suppresses those only for a list with a length."""

    def __len__(self) -> int:
        return 1


class Completion:
    """Completes the lines of one shell's flex magics, and names of modules in Python.

    magics: the object whose attributes the magics are.
    """

    def __init__(self, magics: Any, current: CurrentSession):
        self.magics = magics
        self.current = current

    @context_matcher()
    def matcher(self, context: CompletionContext) -> SimpleMatcherResult:
        """What IPython asks at each Tab. Other code gets no completions here."""
        typed, texts = self._complete(context.text_until_cursor)
        if texts is None:
            return SimpleMatcherResult(completions=[])
        return SimpleMatcherResult(
            completions=[SimpleCompletion(text=text, type="magic") for text in texts]
            or NothingElse(),
            matched_fragment=typed,
            suppress=True,
            ordered=True,
        )

    def _complete(self, text: str) -> tuple[str, list[str] | None]:
        """(what is typed of it, what it can become); None: it is nothing of ours."""
        line = MAGIC_LINE.match(text)
        if line:
            magic = getattr(self.magics, line[1], None)
            return ("", None) if magic is None else self._in_line(magic, line[2])
        name = PYTHON_NAME.search(text)
        return self._in_python(*name.groups()) if name else ("", None)

    # --- in the line of a magic

    def _in_line(self, magic: Any, text: str) -> tuple[str, list[str]]:
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
            return self._parameters(typed)
        if action.dest == "path":
            return paths(typed)
        texts: Iterable[Any] = action.choices or self._choices(action.dest)
        return (quoted(str(text)) for text in texts if str(text).startswith(typed))

    def _choices(self, argument: str) -> Iterable[Any]:
        """The values that an argument of this name can have now."""
        if argument in USUAL:
            return USUAL[argument]
        if argument == "var":
            return [name for name in self.current.shell.user_ns if not name.startswith("_")]
        session = self.current.find()
        if session is None or argument not in OF_SESSION:
            return []
        return OF_SESSION[argument](session)

    def _module_names(self) -> list[str]:
        session = self.current.find()
        return session.loaded.info.names if session is not None and session.has_model else []

    def _parameters(self, typed: str) -> Iterator[str]:
        session = self.current.find()
        if session is None or not session.has_model:
            return iter(())
        return (name for name in children(session.loaded.info.parameters, typed) if "*" not in name)

    # --- in Python

    def _in_python(
        self, variable: str, method: str | None, typed: str
    ) -> tuple[str, list[str] | None]:
        """Names after `session.hook("` and `run["`."""
        value = self.current.shell.user_ns.get(variable)
        of = type(value).__name__
        if of == "Run" and method is None:
            return typed, list(children([capture.key.module for capture in value], typed))
        if of == "Session" and method in TAKE_MODULES and value.has_model:
            return typed, list(children(value.loaded.info.names, typed))
        if of == "Session" and method == "parameter":
            return typed, list(self._parameters(typed))
        return "", None


def presets(session: Any) -> list[str]:
    """The names of edits; a colon follows those that take a value."""
    from flexkernel.session.edits import PRESETS

    names = [name if takes == "nothing" else f"{name}:" for name, takes in PRESETS.items()]
    return [*names, *session.hooks.edits]


def captured(session: Any) -> list[str]:
    """What %flex_show can draw of the last run."""
    last = session.runs[-1:]
    return list(dict.fromkeys(capture.name for run in last for capture in run))


# Argument → the values that it can have in a session.
OF_SESSION: dict[str, Callable[[Any], Iterable[Any]]] = {
    "groups": lambda session: session.hooks.hook_set.groups,
    "group": lambda session: session.hooks.hook_set.groups,
    "hook": lambda session: [hook.key for hook in session.hooks],
    "run": lambda session: [run.number for run in session.runs],
    "name": captured,
    "edit": presets,
}


def expected(
    magic: Any, before: Sequence[str], options: dict[str, argparse.Action]
) -> tuple[argparse.Action | None, bool]:
    """(the argument that comes after these words, whether a prompt has begun).

    An option's value, else the next positional. In a prompt everything is text.
    """
    positionals = [a for a in magic.parser._actions if not a.option_strings]
    taken = 0
    waiting = None  # the option whose value comes next
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
    last = positionals[-1] if positionals else None
    if last is not None and last.dest != "prompt" and last.nargs in ("*", "+"):
        return last, False
    return None, last is not None and last.dest == "prompt"


def children(names: Iterable[str], typed: str) -> Iterator[str]:
    """The names one segment further than what is typed; `*` too where the segments are numbers.

    >>> list(children(["a.0.mlp", "a.1.mlp", "a.1.norm"], "a."))
    ['a.*', 'a.0', 'a.1']
    >>> list(children(["a.0.mlp", "a.1.norm"], "a.*.m"))
    ['a.*.mlp']
    """
    stem, dot, last = typed.rpartition(".")
    parents = stem.split(".") if dot else []
    segments: dict[str, None] = {}  # in order, each once
    for name in names:
        segments |= dict.fromkeys(beneath(name.split("."), parents))
    if sum(segment.isdecimal() for segment in segments) > 1:
        segments = {"*": None, **segments}
    return (f"{stem}{dot}{s}" for s in segments if s and s.startswith(last))


def beneath(segments: Sequence[str], parents: Sequence[str]) -> Sequence[str]:
    """The segment after those that the parents match; all later ones where a parent is `**`."""
    if "**" in parents:
        return segments[parents.index("**") :]
    fits = len(segments) > len(parents) and all(map(fnmatchcase, segments, parents))
    return segments[len(parents) : len(parents) + 1] if fits else ()


def paths(typed: str) -> Iterator[str]:
    """The files and folders that a path can become, folders first; hidden ones if asked for."""
    stem, slash, last = typed.rpartition("/")
    folder = Path(os.path.expanduser(stem + slash) or ".")
    try:
        entries = sorted(folder.iterdir(), key=lambda entry: (not entry.is_dir(), entry.name))
    except OSError:
        return
    fitting = [entry for entry in entries if entry.name.startswith(last)]
    for entry in fitting[:SHOWN_PATHS]:
        if last or not entry.name.startswith("."):
            yield quoted(f"{stem}{slash}{entry.name}{'/' if entry.is_dir() else ''}")


def quoted(text: str) -> str:
    return shlex.quote(text) if " " in text else text
