"""Lines of magics: their words, options and prompts; the code in their arguments and cells."""

from __future__ import annotations

import argparse
import linecache
import re
import shlex
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from IPython.core.error import UsageError
from IPython.core.inputtransformer2 import HelpEnd, MagicAssign

from flexkernel.session.source import compiled

# --- code in a cell or an argument ------------------------------------------------------------

LOSS = """def loss(logits, batch):
    import torch
    from torch.nn import functional as F
    tokens, mask, labels = batch.tokens, batch.mask, batch.labels
    captures, modules = batch.captures, batch.modules
    return ({})
"""


def compile_edit(name: str, cell: str, namespace: dict[str, Any]) -> Callable:
    """The function name(x, ctx) that has the cell as its body. Tracebacks show the cell's lines.

    UsageError: the name or the body is not Python.
    """
    if not name.isidentifier():
        raise UsageError(f"{name!r} cannot be the name of an edit: it has to be a Python name")
    code = textwrap.indent(textwrap.dedent(cell), "    ") if cell.strip() else "    pass\n"
    try:
        return compiled(name, f"def {name}(x, ctx):\n{code}", namespace)
    except SyntaxError as error:
        line = (error.text or "").strip()
        number = (error.lineno or 1) - 1  # the head is ours
        raise UsageError(f"edit {name!r}, line {number}: {error.msg}: {line}") from None
    except ValueError as error:  # it has a NUL, or a line that ends the function
        raise UsageError(f"edit {name!r}: {error}") from None


def compile_loss(text: str, namespace: dict[str, Any]) -> Callable | str:
    """The loss function (logits, batch) that returns this expression, or the name of a preset.

    The expression sees logits, labels, captures, tokens, mask, modules, torch and F. UsageError:
    it is not Python.
    """
    if text == "next_token":
        return text
    source = LOSS.format(text)
    made: dict[str, Any] = {}
    try:
        exec(compile(source, "<loss>", "exec"), namespace, made)
    except SyntaxError as error:
        raise UsageError(f"--backward {text!r} is no Python expression: {error.msg}") from None
    linecache.cache["<loss>"] = (len(source), None, source.splitlines(True), "<loss>")
    return made["loss"]


# --- the line of a magic ----------------------------------------------------------------------


def twin(text: str) -> Callable:
    """A decorator: what does the same as this magic in Python, for README's table."""

    def mark(magic: Any) -> Any:
        magic.twin = text
        return magic

    return mark


def parse(magic: Any, line: str | Sequence[str]) -> argparse.Namespace:
    """The arguments of a magic's line. UsageError: it has others.

    IPython shows a traceback for children of UsageError, so it is always UsageError itself.
    """
    try:
        split = shlex.split(line) if isinstance(line, str) else list(line)
        return magic.parser.parse_args(join_negatives(split))
    except (ValueError, UsageError) as error:
        raise UsageError(f"{error}. %{magic.__name__}? shows what it takes") from None


def join_negatives(split: Sequence[str]) -> list[str]:
    """`--positions -1,0` as one word: to argparse the second half looks like an option.

    >>> join_negatives(["a", "--positions", "-1,0"])
    ['a', '--positions=-1,0']
    """
    joined: list[str] = []
    for word in split:
        negative = re.fullmatch(r"-\d+(,-?\d+)*", word)
        if negative and joined and joined[-1].startswith("--") and "=" not in joined[-1]:
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


def options_given(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Those of the arguments that the line has. The session has defaults for the others."""
    return {name: getattr(args, name) for name in names if getattr(args, name) not in (None, [])}


def numbers(text: str) -> list[int]:
    """The type of an argument like `0,-1`."""
    return [int(part) for part in text.split(",")]


def words(text: str) -> list[str]:
    """The type of an argument like `red,blue`."""
    return [part for part in text.split(",") if part]


def options_of(magic: Any) -> dict[str, argparse.Action]:
    """The options that a magic declares: `--name` → its argument."""
    return dict(magic.parser._option_string_actions)  # argparse has no public list of them


# --- the prompt of %flex_run ------------------------------------------------------------------


def split_prompt(line: str, options: dict[str, argparse.Action]) -> tuple[list[str], str]:
    """The words of the options that a line begins with, and the prompt, which is the rest.

    `--` by itself ends the options. UsageError: there is no such option.
    """
    taken: list[str] = []
    rest = line.strip()
    while rest.startswith("--"):
        word, rest = next_word(rest)
        if word == "--":
            break
        name, equals, _ = word.partition("=")
        if name not in options:
            raise UsageError(
                f"there is no option {name}; there are {', '.join(options)}. "
                f"A prompt that begins with dashes is written after --: %flex_run -- {line.strip()}"
            )
        taken.append(word)
        if options[name].nargs != 0 and not equals and rest:
            value, rest = next_value(rest)
            taken.append(value)
    return taken, unquote(rest)


def next_word(text: str) -> tuple[str, str]:
    """The first word and the rest."""
    word, *rest = text.split(None, 1)
    return word, rest[0] if rest else ""


def next_value(text: str) -> tuple[str, str]:
    """An option's value, which has spaces if it is quoted, and the rest.

    >>> next_value("'a - b' The rest"), next_value("logits.mean() The rest")
    (('a - b', 'The rest'), ('logits.mean()', 'The rest'))
    """
    quoted = re.match(r"""(["'])(.*?)\1(?:\s+|$)""", text)
    if quoted:
        return quoted[2], text[quoted.end() :]
    return next_word(text)


def unquote(text: str) -> str:
    """The text without the quotes that enclose all of it.

    >>> unquote("'Hello '"), unquote("'a' or 'b'")
    ('Hello ', "'a' or 'b'")
    """
    quote = text[:1]
    encloses = len(text) > 1 and quote in ("'", '"') and text.endswith(quote)
    if encloses and quote not in text[1:-1]:
        return text[1:-1]
    return text


def variable_note(prompt: str, variables: Mapping[str, Any]) -> str:
    """A note for a prompt that names a Python variable as other magics do; "" for any other.

    >>> variable_note("$text", {"text": "Hello"})
    "the prompt is the text '$text'. The variable's value: %flex_run --var text"
    >>> variable_note("$5 is a price", {})
    ''
    """
    name = re.fullmatch(r"\{(\w+)\}|\$(\w+)|\$\{(\w+)\}", prompt)
    variable = next(filter(None, name.groups()), "") if name else ""
    if variable not in variables:
        return ""
    return f"the prompt is the text {prompt!r}. The variable's value: %flex_run --var {variable}"


class Question(HelpEnd):
    """`%flex_run Is it so?` asks the model.

    IPython takes any line that ends in ? for a question to itself, here about `so`.
    """

    priority = HelpEnd.priority - 1

    def __init__(self, start: tuple[int, int], percent: tuple[int, int]):
        self.start_line = start[0] - 1
        self.start_col = start[1]
        self.percent = percent

    @classmethod
    def find(cls, tokens_by_line: list[list[Any]]) -> Question | None:
        for line in tokens_by_line:
            at = prompt_begins(line)
            if at is not None and len(line) > 1 and line[-2].string == "?":
                first = next(token for token in line if token.string.strip())
                return cls(first.start, line[at - 2].start)
        return None

    def transform(self, lines: list[str]) -> list[str]:
        return MagicAssign(self.percent).transform(lines)


def prompt_begins(line: list[Any]) -> int | None:
    """Index of the first token after `%flex_run `, where that begins a line or is assigned."""
    for i, (a, b, c) in enumerate(zip(line, line[1:], line[2:], strict=False)):
        if (a.string, b.string) != ("%", "flex_run") or c.start == b.end:
            continue  # %flex_run? asks for help
        if not any(token.string.strip() for token in line[:i]) or line[i - 1].string == "=":
            return i + 2
    return None
