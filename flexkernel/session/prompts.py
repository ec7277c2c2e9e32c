"""Prompts into token batches and back: text, chat, ids, left padding. Only this file talks to a
tokenizer."""

from __future__ import annotations

import operator
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import numpy
    import torch

from flexkernel.errors import LoadError, PromptError
from flexkernel.wire import dtype_name

__all__ = ["Batch", "Prompts", "batch", "texts", "token_strings", "tokenizer"]

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "spiece.model",
)
LARGEST_ID = 2**63 - 1  # what an int64 tensor can hold


Message = Mapping[str, str]  # {"role": ..., "content": ...}
# What a user may run: see batch()
Prompts: TypeAlias = (
    "str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]] | Sequence[Message] "
    "| Sequence[Sequence[Message]] | Mapping[str, Any] | torch.Tensor | numpy.ndarray | Batch"
)


@dataclass(frozen=True)
class Batch:
    """Rows of equal length, padded on the left: what a forward takes, and each token as text for
    display.

    positions: 0 on pads and on the first real token. tokens: "" on pads.
    """

    ids: list[list[int]]
    mask: list[list[int]]
    positions: list[list[int]]
    tokens: list[list[str]]
    pad_id: int


def batch(
    prompts: Prompts,
    tokenizer: Any = None,
    chat: bool = False,
    vocab_size: int | None = None,
    max_positions: int | None = None,
    pad_id: int | None = None,
) -> Batch:
    """The batch of any prompt a user may write; PromptError for those the model cannot take.

    prompts: a string or several; token ids, a row or several, as lists or as an integer tensor or
    array; the mapping a tokenizer returns; a list of {"role", "content"} messages, or several.
    chat: each string is one user message.

    >>> batch([[5, 6, 7], [8]]).ids, batch([[5, 6, 7], [8]]).positions
    ([[5, 6, 7], [0, 0, 8]], [[0, 1, 2], [0, 0, 0]])
    """
    if isinstance(prompts, Batch):
        rows = _unpad(prompts.ids, prompts.mask)
        pad_id = prompts.pad_id if pad_id is None else pad_id
    else:
        rows = _rows(prompts, tokenizer, chat)
    if not rows:
        raise PromptError("the batch has no rows: give at least one prompt")
    for number, row in enumerate(rows):
        _check(row, f" in row {number}" if len(rows) > 1 else "", vocab_size, max_positions)
    return _pad(rows, tokenizer, _pad_id(tokenizer, vocab_size) if pad_id is None else pad_id)


def tokenizer(path: str) -> Any:
    """The tokenizer of a model folder or hub id; None where the folder has none."""
    from pathlib import Path

    from transformers import AutoTokenizer

    folder = Path(path)
    if folder.is_dir() and not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise LoadError(f"the tokenizer of {path} cannot be loaded: {error}") from error


def texts(
    ids: Batch | Sequence[Sequence[int]], tokenizer: Any, skip_special: bool = True
) -> list[str]:
    """Each row as text, pads left out where the mask is known."""
    if tokenizer is None:
        raise PromptError(
            "there is no tokenizer to turn ids into text with: the model's folder has none"
        )
    rows = _unpad(ids.ids, ids.mask) if isinstance(ids, Batch) else [list(row) for row in ids]
    return [
        tokenizer.decode(row, skip_special_tokens=skip_special, clean_up_tokenization_spaces=False)
        for row in rows
    ]


def token_strings(ids: Sequence[int], tokenizer: Any = None) -> list[str]:
    """Each id by itself as readable text, its leading space kept. Half a character shows as
    U+FFFD, no text as <id>.

    A notebook's Out[] keeps every run: all that have a token share its text."""
    shown = {i: sys.intern(_shown(i, tokenizer)) for i in set(ids)}
    return [shown[i] for i in ids]


def _shown(token: int, tokenizer: Any) -> str:
    if tokenizer is None:
        return str(token)
    try:
        text = tokenizer.decode([token], clean_up_tokenization_spaces=False)
        piece = tokenizer.convert_ids_to_tokens(token)
    except Exception:  # an id the tokenizer has no word for: models round their vocabulary up
        return f"<{token}>"
    if isinstance(piece, str) and piece.startswith("▁") and not text.startswith(" "):
        text = " " + text  # SentencePiece drops the space of whatever comes first
    return text or f"<{token}>"


# From what the user wrote to rows of ids


def _rows(prompts: Any, tokenizer: Any, chat: bool) -> list[list[int]]:
    if isinstance(prompts, str):
        return _encode([prompts], tokenizer, chat)
    if isinstance(prompts, Mapping) and "input_ids" in prompts:
        return _encoded(prompts)
    if hasattr(prompts, "dtype") and hasattr(prompts, "tolist"):
        prompts = _from_array(prompts)
    if not isinstance(prompts, list | tuple):
        raise PromptError(
            f"a prompt is text, token ids or a list of messages; found {_kind(prompts)}: "
            f"{_short(prompts)}"
        )
    if not prompts:
        raise PromptError("the prompt is empty: write some text or give at least one token id")
    if isinstance(prompts[0], str):
        return _encode(list(prompts), tokenizer, chat)
    if talks := _conversations(prompts):
        return [_encode_text(_render(talk, tokenizer), tokenizer, special=False) for talk in talks]
    if chat:
        raise PromptError(
            "chat wraps text as a user's message; found token ids: leave chat out, or give the text"
        )
    return _id_rows(prompts)


def _encoded(encoding: Mapping) -> list[list[int]]:
    """What a tokenizer returned: its own pads are taken out, wherever they are."""
    ids, mask = (encoding.get(name) for name in ("input_ids", "attention_mask"))
    rows = _rows(ids, None, chat=False)
    if mask is None:
        return rows
    masks = _rows(mask, None, chat=False)
    if [len(m) for m in masks] != [len(r) for r in rows]:
        raise PromptError(
            f"input_ids have rows of {_lengths(rows)} and attention_mask of {_lengths(masks)}"
        )
    return _unpad(rows, masks)


def _from_array(array: Any) -> list:
    """The lists of an integer tensor or array of one or two dims."""
    kind = dtype_name(array.dtype)
    if not kind.startswith(("int", "uint")):
        raise PromptError(
            f"token ids are integers; found {_kind(array)} of {kind}: convert it, e.g. .long()"
        )
    if array.ndim not in (1, 2):
        raise PromptError(
            f"token ids have one or two dims (batch, position); found shape {tuple(array.shape)}"
        )
    return array.tolist()


def _id_rows(prompts: Sequence) -> list[list[int]]:
    if not any(
        isinstance(row, list | tuple) or (hasattr(row, "tolist") and _ndim(row)) for row in prompts
    ):
        return [_ids(prompts, "")]
    return [_ids(_listed(row, number), f" of row {number}") for number, row in enumerate(prompts)]


def _listed(row: Any, number: int) -> Sequence:
    if hasattr(row, "dtype") and hasattr(row, "tolist"):
        row = _from_array(row)
    if not isinstance(row, list | tuple):
        raise PromptError(
            f"row {number} is {_kind(row)}: {_short(row)}; the other rows are lists of token ids"
        )
    return row


def _ids(row: Sequence, where: str) -> list[int]:
    for position, token in enumerate(row):
        if isinstance(token, bool) or not hasattr(token, "__index__") or _ndim(token):
            raise PromptError(
                f"token ids are integers; position {position}{where} has {_kind(token)}: "
                f"{_short(token)}"
            )
    try:
        return [operator.index(token) for token in row]
    except TypeError as error:  # numpy's bool, a float tensor of one element
        raise PromptError(f"token ids are integers{where}: {error}") from None


def _conversations(prompts: Sequence) -> list[list[Mapping]]:
    """The conversations, or nothing if these are no messages."""
    if all(isinstance(message, Mapping) for message in prompts):
        return [list(prompts)]
    if all(
        isinstance(talk, list | tuple) and talk and isinstance(talk[0], Mapping) for talk in prompts
    ):
        return [list(talk) for talk in prompts]
    return []


# Text


def _encode(prompts: list[str], tokenizer: Any, chat: bool) -> list[list[int]]:
    for number, text in enumerate(prompts):
        where = f" (prompt {number} of {len(prompts)})" if len(prompts) > 1 else ""
        _check_text(text, where)
        if not text:
            raise PromptError(f"the prompt is empty{where}: write some text")
    if chat:
        talks = [_render([{"role": "user", "content": text}], tokenizer) for text in prompts]
        return [_encode_text(text, tokenizer, special=False) for text in talks]
    return [_encode_text(text, tokenizer) for text in prompts]


def _check_text(text: Any, where: str) -> None:
    if not isinstance(text, str):
        raise PromptError(
            f"prompts are all text or all token ids; found {_kind(text)}{where}: {_short(text)}"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(
            f"the prompt{where} has half a character ({text[error.start]!r}) at {error.start}: a "
            "lone surrogate is not "
            "text; read the file as UTF-8, or use text.encode('utf-8', 'replace').decode()"
        ) from None


def _encode_text(text: str, tokenizer: Any, special: bool = True) -> list[int]:
    _need(tokenizer)
    return list(tokenizer(text, add_special_tokens=special)["input_ids"])


def _render(messages: list[Mapping], tokenizer: Any) -> str:
    """The conversation as the model's template writes it, up to where the assistant is to
    speak."""
    _need(tokenizer)
    if not getattr(tokenizer, "chat_template", None):
        raise PromptError("this tokenizer has no chat template: give the prompt as plain text")
    for number, message in enumerate(messages):
        if not (isinstance(message, Mapping) and {"role", "content"} <= set(message)):
            raise PromptError(
                f'a message is {{"role": ..., "content": ...}}; message {number} is '
                f"{_short(message)}"
            )
        if isinstance(message["content"], str):
            _check_text(message["content"], f" (message {number})")
    ends = messages[-1]["role"] != "assistant"
    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=ends, tokenize=False)
    except Exception as error:  # whatever the template's own code raises
        raise PromptError(f"the model's chat template refuses these messages: {error}") from None


def _need(tokenizer: Any) -> None:
    if tokenizer is None:
        raise PromptError(
            "the prompt is text and the model's folder has no tokenizer: give token ids, e.g. [[5, "
            "6, 7]]"
        )


# Checks, padding


def _check(row: list[int], where: str, vocab_size: int | None, max_positions: int | None) -> None:
    if not row:
        raise PromptError(f"the prompt is empty{where}: it has no tokens")
    limit = LARGEST_ID if vocab_size is None else vocab_size - 1
    for position, token in enumerate(row):
        if not 0 <= token <= limit:
            raise PromptError(
                f"token id {token} at position {position}{where} is outside the vocabulary, 0 to "
                f"{limit}"
            )
    if max_positions is not None and len(row) > max_positions:
        raise PromptError(
            f"the prompt{where} has {len(row)} tokens and the model {max_positions} positions: "
            f"leave out at least {len(row) - max_positions}"
        )


def _pad_id(tokenizer: Any, vocab_size: int | None) -> int:
    """Any id the embedding has will do: the mask hides it."""
    for name in ("pad_token_id", "eos_token_id"):
        found = getattr(tokenizer, name, None)
        if isinstance(found, int) and 0 <= found < (
            LARGEST_ID if vocab_size is None else vocab_size
        ):
            return found
    return 0


def _pad(rows: list[list[int]], tokenizer: Any, pad_id: int) -> Batch:
    width = max(map(len, rows))
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return Batch(
        ids=[[pad_id] * (width - len(row)) + row for row in rows],
        mask=mask,
        positions=[[max(count - 1, 0) for count in accumulate(row)] for row in mask],
        tokens=[[""] * (width - len(row)) + token_strings(row, tokenizer) for row in rows],
        pad_id=pad_id,
    )


def _unpad(rows: Sequence[Sequence[int]], masks: Sequence[Sequence[int]]) -> list[list[int]]:
    return [
        [i for i, m in zip(row, mask, strict=True) if m]
        for row, mask in zip(rows, masks, strict=True)
    ]


def _lengths(rows: list[list[int]]) -> str:
    return ", ".join(str(len(row)) for row in rows)


def _ndim(value: Any) -> int:
    return getattr(value, "ndim", 0)


def _kind(value: Any) -> str:
    return type(value).__name__


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
