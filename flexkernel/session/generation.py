"""The driver's view of a generation: what may be asked for, the text as it comes, and what the
ranks say came out."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flexkernel.errors import CaptureError, EngineError, GenerationError, PromptError
from flexkernel.names import nearest
from flexkernel.wire import Generation, Region, RunPlan, RunReport

from .prompts import Batch

__all__ = ["OPTIONS", "Stream", "generated", "request"]

# What of transformers' generate is passed on: it shapes the scores of the next token, or says when
# a row ends
OPTIONS = (
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "top_h",
    "min_p",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
    "repetition_penalty",
    "encoder_repetition_penalty",
    "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size",
    "bad_words_ids",
    "sequence_bias",
    "suppress_tokens",
    "begin_suppress_tokens",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "exponential_decay_length_penalty",
    "min_new_tokens",
    "min_length",
    "remove_invalid_values",
    "renormalize_logits",
    "eos_token_id",
)
SAMPLING = (
    "temperature",
    "top_k",
    "top_p",
    "top_h",
    "min_p",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
)
REFUSED = {
    "max_length": "say max_new_tokens=, which does not count the prompt",
    "num_beams": "a beam's forwards are of rows that change places: captures of them have no order",
    "num_return_sequences": "give the prompt several times: generate([prompt] * n, do_sample=True)",
    "use_cache": "each forward runs what is new, with the cache",
    "stop_strings": "engines have no tokenizer; give eos_token_id=",
    "max_time": "ranks would stop at different steps",
    "guidance_scale": "it runs a second forward at each step",
    "streamer": "on_token= is called with the text as it comes",
    "stopping_criteria": "only plain data goes to the engines; eos_token_id= ends a row",
    "logits_processor": "only plain data goes to the engines; an edit of the root's or the head's output does it",
    "pad_token_id": "the tokenizer's is taken, and pads are masked",
    "return_dict_in_generate": "the Run has it all",
    "output_hidden_states": "hook the layers",
    "output_attentions": "hook **.@pattern",
    "output_scores": "run.logits has them",
    "output_logits": "run.logits has them",
}


def request(
    max_new_tokens: int,
    options: Mapping[str, Any],
    batch: Batch,
    max_positions: int | None,
    seed: int | None = None,
) -> Generation:
    """What goes to the engines. GenerationError: an option that cannot be had. PromptError: the
    model has not so many positions."""
    if (
        isinstance(max_new_tokens, bool)
        or not isinstance(max_new_tokens, int)
        or max_new_tokens < 1
    ):
        raise GenerationError(f"max_new_tokens={max_new_tokens!r}: it is a whole number from 1")
    check(options)
    longest = max(map(sum, batch.mask))
    if max_positions is not None and longest + max_new_tokens > max_positions:
        raise PromptError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones are "
            f"{longest + max_new_tokens}, and the model "
            f"has {max_positions} positions: at most {max(max_positions - longest, 0)} more fit"
        )
    seed = secrets.randbits(31) if seed is None else seed
    given = tuple(sorted({"do_sample": False, **options}.items()))
    return Generation(max_new_tokens, given, seed, batch.pad_id, 1 + secrets.randbits(30))


def check(options: Mapping[str, Any]) -> None:
    """GenerationError: an option that is not there, or means nothing."""
    for name in options:
        if name in REFUSED:
            raise GenerationError(f"{name}= cannot be had here: {REFUSED[name]}")
        if name not in OPTIONS:
            near = nearest(name, OPTIONS)
            raise GenerationError(
                f"generate has no option {name}="
                + (f"; nearest: {', '.join(near)}" if near else "")
            )
    idle = [name for name in SAMPLING if options.get(name) is not None]
    if idle and not options.get("do_sample"):
        raise GenerationError(
            f"{idle[0]}= is about sampling: say do_sample=True too (%flex_run --sample)"
        )
    for name, fits, what in (
        (
            "temperature",
            lambda v: v > 0,
            "a number above 0; without do_sample the likeliest token is taken",
        ),
        ("top_k", lambda v: isinstance(v, int) and v >= 1, "a whole number from 1"),
        ("top_p", lambda v: 0 < v <= 1, "a number above 0 and at most 1"),
        ("repetition_penalty", lambda v: v > 0, "a number above 0"),
        ("min_new_tokens", lambda v: isinstance(v, int) and v >= 0, "a whole number"),
    ):
        value = options.get(name)
        if value is not None and not (isinstance(value, int | float) and fits(value)):
            raise GenerationError(f"{name}={value!r}: it is {what}")


def generated(reports: Sequence[RunReport], B: int) -> list[list[int]]:
    """Each row's new tokens. EngineError: ranks that run the same row say different ones."""
    rows: dict[int, tuple[int, list[int]]] = {}
    for report in reports:
        for row, ids in report.generated.items():
            rank, other = rows.setdefault(row, (report.rank, ids))
            if ids != other:
                raise EngineError(
                    f"ranks {rank} and {report.rank} run the same row and went on differently with "
                    "it: "
                    f"{other[:8]}... and {ids[:8]}...; these ranks have diverged",
                    report.rank,
                )
    return [rows[row][1] for row in range(B)]


class Stream:
    """The new text of a run while its call is in flight: read from the slab, where the ranks write
    each token.

    read(region): each host's (B, max_new_tokens) cells as they are now; on a host the rows that
    its ranks run come. Calling it hands what is new to on_token(row, text)."""

    def __init__(
        self,
        plan: RunPlan,
        region: Region,
        tokenizer: Any,
        read: Callable[[Region], list[list[list[int]]]],
        on_token: Callable[[int, str], Any] | None,
    ):
        assert plan.generation is not None
        self.generation, self.region, self.read, self.on_token = (
            plan.generation,
            region,
            read,
            on_token,
        )
        self.rows = [Detokenizer(tokenizer) for _ in plan.ids]
        self.failure: BaseException | None = None

    def __call__(self) -> None:
        """Whatever on_token raises is kept too: on its way through an engine in this process it
        changes its type."""
        if self.on_token is None:
            return
        try:
            for row, (words, ids) in enumerate(zip(self.rows, self._new(), strict=True)):
                self._tell(row, words.add(ids[len(words.ids) :]))
        except BaseException as error:
            self.failure = error
            raise

    def end(self, rows: Sequence[Sequence[int]]) -> None:
        """The run is done, and these are its new tokens."""
        for row, words in enumerate(self.rows):
            self._tell(row, words.add(rows[row][len(words.ids) :]) + words.rest())

    def _tell(self, row: int, text: str) -> None:
        if text and self.on_token is not None:
            self.on_token(row, text)

    def _new(self) -> list[list[int]]:
        """Each row's tokens so far."""
        try:
            hosts = self.read(self.region)
        except CaptureError:  # the ranks have not made the slab yet
            hosts = []
        return [
            max((self._valid(table[row]) for table in hosts), key=len, default=[])
            for row in range(len(self.rows))
        ]

    def _valid(self, cells: Sequence[int]) -> list[int]:
        """A cell of another run, or of what lay there before, has another stamp."""
        ids = [cell & 0xFFFFFFFF if cell >> 32 == self.generation.stamp else -1 for cell in cells]
        return ids[: ids.index(-1)] if -1 in ids else ids

    def so_far(self) -> list[str]:
        """Each row's new text as far as it has come."""
        found = []
        for words, ids in zip(self.rows, self._new(), strict=True):
            whole = Detokenizer(words.tokenizer)
            found.append(whole.add(ids) + whole.rest())
        return found


class Detokenizer:
    """Tokens into text as they come. A last U+FFFD is held back: with the next token's bytes it
    may be a character."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        # the ids decoded together begin at _begin; they end in a whole
        self._begin = self._whole = self._said = 0
        # character at _whole; _said characters of their text have been said

    def add(self, ids: Sequence[int]) -> str:
        """The text that these tokens add."""
        self.ids += ids
        return self._text(hold=True) if ids else ""

    def rest(self) -> str:
        """What was held back."""
        return self._text(hold=False)

    def _text(self, hold: bool) -> str:
        now = self._decoded(self.ids[self._begin :])
        sure = now[:-1] if hold and now.endswith("\ufffd") else now
        new, self._said = sure[self._said :], max(self._said, len(sure))
        if sure == now:  # go on from here; the tokens just before say how what follows is spaced
            self._begin, self._whole = self._whole, len(self.ids)
            self._said = len(self._decoded(self.ids[self._begin :]))
        return new

    def _decoded(self, ids: Sequence[int]) -> str:
        if self.tokenizer is None:
            return "".join(f" {i}" for i in ids)
        return self.tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
