"""Lines of magics: their words, options and prompts; the code in their arguments and cells."""

from __future__ import annotations

import argparse
import linecache
import re
import shlex
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

from IPython.core.error import UsageError
from IPython.core.inputtransformer2 import HelpEnd, MagicAssign

from flexkernel.session.hookfile import compiled


def body(name: str, cell: str, namespace: dict[str, Any]) -> Callable:
    """The function (x, ctx) whose body the cell is. Its lines show in tracebacks."""
    if not name.isidentifier():
        raise UsageError(f"{name!r} cannot be the name of an edit: it is a Python name")
    head = f"def {name}(x, ctx):\n"
    source = head + (
        textwrap.indent(textwrap.dedent(cell), "    ") if cell.strip() else "    pass\n"
    )
    try:
        return compiled(name, source, namespace)
    except SyntaxError as error:
        line = (error.text or "").strip()
        raise UsageError(
            f"edit {name!r}, line {(error.lineno or 1) - 1}: {error.msg}: {line}"
        ) from None
    except ValueError as error:  # a NUL in it; a line that ends the function
        raise UsageError(f"edit {name!r}: {error}") from None


LOSS = """def loss(logits, batch):
    import torch
    from torch.nn import functional as F
    tokens, mask, labels, captures, modules = batch.tokens, batch.mask, batch.labels, batch.captures, batch.modules
    return ({})
"""


def loss_of(text: str, namespace: dict[str, Any]) -> Callable | str:
    """The loss that an expression is, over logits, labels, captures, tokens, mask and modules; or
    one of ours."""
    if text == "next_token":
        return text
    try:
        made: dict[str, Any] = {}
        exec(compile(LOSS.format(text), "<loss>", "exec"), namespace, made)
    except SyntaxError as error:
        raise UsageError(f"--backward {text!r} is no Python expression: {error.msg}") from None
    linecache.cache["<loss>"] = (len(LOSS), None, LOSS.format(text).splitlines(True), "<loss>")
    return made["loss"]


def twin(text: str) -> Callable:
    """Say what does the same as this magic in Python."""

    def mark(magic: Any) -> Any:
        magic.twin = text
        return magic

    return mark


def parsed(magic: Any, line: str | Sequence[str]) -> argparse.Namespace:
    """The line's arguments. UsageError itself, never a child of it: IPython shows those with a
    traceback."""
    try:
        words = shlex.split(line) if isinstance(line, str) else list(line)
        return magic.parser.parse_args(glued(words))
    except (ValueError, UsageError) as error:
        raise UsageError(f"{error}. %{magic.__name__}? shows what it takes") from None


def glued(words: Sequence[str]) -> list[str]:
    """`--positions -1,0` as one word: to argparse the second half looks like an option.

    >>> glued(["a", "--positions", "-1,0"])
    ['a', '--positions=-1,0']
    """
    done: list[str] = []
    for word in words:
        negative = re.fullmatch(r"-\d+(,-?\d+)*", word)
        if negative and done and done[-1].startswith("--") and "=" not in done[-1]:
            done[-1] += f"={word}"
        else:
            done.append(word)
    return done


def given(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Those arguments that the line had: for the others the session has its own defaults."""
    return {name: getattr(args, name) for name in names if getattr(args, name) not in (None, [])}


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def words(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def options_of(magic: Any) -> dict[str, argparse.Action]:
    # argparse has no public list of a parser's options
    return dict(magic.parser._option_string_actions)


def split_prompt(line: str, options: dict[str, argparse.Action]) -> tuple[list[str], str]:
    """The options that a line begins with, and the prompt: the raw rest. `--` by itself ends the
    options."""
    found: list[str] = []
    rest = line.strip()
    while rest.startswith("--"):
        word, rest = next_word(rest)
        if word == "--":
            break
        name, given_here, _ = word.partition("=")
        if name not in options:
            raise UsageError(
                f"there is no option {name}; there are {', '.join(options)}. "
                f"A prompt that begins with dashes is written after --: %flex_run -- {line.strip()}"
            )
        found.append(word)
        if options[name].nargs != 0 and not given_here and rest:
            value, rest = next_value(rest)
            found.append(value)
    return found, unquoted(rest)


def next_word(text: str) -> tuple[str, str]:
    word, *rest = text.split(None, 1)
    return word, rest[0] if rest else ""


def next_value(text: str) -> tuple[str, str]:
    """An option's value, which has spaces if it is quoted.

    >>> next_value("'a - b' The rest"), next_value("logits.mean() The rest")
    (('a - b', 'The rest'), ('logits.mean()', 'The rest'))
    """
    quoted = re.match(r"""(["'])(.*?)\1(?:\s+|$)""", text)
    return (quoted[2], text[quoted.end() :]) if quoted else next_word(text)


def unquoted(text: str) -> str:
    """Without the quotes that enclose all of it.

    >>> unquoted("'Hello '"), unquoted("'a' or 'b'")
    ('Hello ', "'a' or 'b'")
    """
    quote = text[:1]
    whole = (
        len(text) > 1 and quote in ("'", '"') and text.endswith(quote) and quote not in text[1:-1]
    )
    return text[1:-1] if whole else text


class Question(HelpEnd):
    """`%flex_run Is it so?` asks the model. To IPython any line that ends in ? asks for help, here
    on `so`."""

    priority = HelpEnd.priority - 1

    def __init__(self, start: tuple[int, int], percent: tuple[int, int]):
        self.start_line, self.start_col, self.percent = start[0] - 1, start[1], percent

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
    """Index of the first token after `%flex_run ` at the beginning of a line or of what is
    assigned."""
    for i, (a, b, c) in enumerate(zip(line, line[1:], line[2:], strict=False)):
        begins = not any(token.string.strip() for token in line[:i]) or line[i - 1].string == "="
        # %flex_run? is for help
        if (a.string, b.string) == ("%", "flex_run") and begins and c.start != b.end:
            return i + 2
    return None
