"""Short forms of names and texts, for tables and errors."""

from __future__ import annotations

import re
from collections.abc import Sequence

from flexkernel.names import display_name

__all__ = ["ranged", "shorter", "some", "spans"]


def shorter(text: str, most: int = 200) -> str:
    """A text without its middle where it is long."""
    return text if len(text) <= most else f"{text[: most // 2]} … {text[-most // 2 :]}"


def some(names: Sequence[str], limit: int = 3) -> str:
    """A few of the names, and the last.

    >>> some(["a", "b", "c", "d"])
    'a, b, ..., d'
    """
    shown = [display_name(name) for name in names]
    if len(shown) > limit:
        shown = [*shown[: limit - 1], "...", shown[-1]]
    return ", ".join(shown)


def spans(numbers: Sequence[int]) -> str:
    """Numbers in order, those in a row as one span.

    >>> spans([9, 3]), spans(range(30)), spans([0, 1, 2, 5])
    ('3, 9', '0–29', '0–2, 5')
    """
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(span(run) for run in runs)


def span(run: Sequence[int]) -> str:
    if len(run) > 2:
        return f"{run[0]}–{run[-1]}"
    return ", ".join(map(str, run))


def ranged(names: Sequence[str]) -> str:
    """Names that are alike but for numbers, as one that says which numbers there are.

    >>> ranged(["layers.3.mlp", "layers.9.mlp"]), ranged([f"layers.{i}.mlp" for i in range(30)])
    ('layers.3, 9.mlp', 'layers.0–29.mlp')
    """
    parts = [re.split(r"(\d+)", name) for name in names]
    columns = [list(dict.fromkeys(column)) for column in zip(*parts, strict=True)]
    varying = [column for column in columns if len(column) > 1]
    if len(varying) > 1:  # which of the numbers go together cannot be said in one name
        return some(names)
    return "".join(
        column[0] if len(column) == 1 else spans(list(map(int, column))) for column in columns
    )
