"""Run: one forward, backward or generation, with what it captured."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol, overload

import torch

from flexkernel.errors import CaptureError, FlexError
from flexkernel.names import display_name, match, nearest
from flexkernel.views.table import Cell, Table, page
from flexkernel.wire import CaptureKey, RunPlan

from .capture import Capture
from .prompts import texts, token_strings
from .text import ranged, shorter

__all__ = ["Run"]

TOKEN_STYLE = "background:rgba(127,127,127,.16);border-radius:3px;padding:0 2px;white-space:pre"
SHOWN = 24  # captures listed in a repr
SHOWN_TOKENS = 200  # of a row
WARNED = 4  # warnings in a repr
HEAD = ("captures", "n", "shape", "placement over tp", "evidence")


class Keeper(Protocol):
    """Who keeps runs: the session's store."""

    def may_keep(self) -> None: ...
    def free(self, run: Run, why: str) -> None: ...


class Run:
    """One forward: its tokens, its next-token table, its captures.

    run[module], run[module, at], run[module, at, index], run[module, at, index, call]: a Capture.
    With a glob for the module: the list of those it matches. run[a hook's name]: what it captured,
    a list where its glob has a star. Of an edited activation it is what came after the edit;
    run[module, "output before"] is what was there before. run.captures: all of them.

    run.logits: the model's output, whole or (where that would be large) its last position. A
    generation goes on after its prompt: run.generated is the new text, run.text and run.tokens
    have both. Captures cover the prompt and all new tokens but the last, which is never fed;
    run.mask says which of that is real.

    run.edits: the edits that were active, in words. run.warnings: what to know before believing
    it. run.partial: why it did not come to its end, "" if it did. Then it has those captures that
    every rank had whole by then, of a generation up to its last whole forward, and no others.
    """

    def __init__(
        self,
        number: int,
        plan: RunPlan,
        tokens: list[list[str]],
        tokenizer: Any,
        new: Sequence[Sequence[int]] = (),
        forwards: int = 1,
    ):
        self.number = number
        self.plan = plan
        self.tokens = tokens
        self.new_ids = [list(row) for row in new]
        self.forwards = forwards
        self.captures: dict[CaptureKey, Capture] = {}
        self.seconds: dict[str, float] = {}
        self.silent: tuple[str, ...] = ()
        self.globs: dict[str, str] = {}  # hook → the glob it was given
        self.edits: tuple[str, ...] = ()
        self.warnings: tuple[str, ...] = ()
        self.stopped = False
        self.partial = ""
        self.loss: float | None = None  # where the run had one
        self.kept = False
        self.freed = ""
        self._tokenizer = tokenizer
        self._store: Keeper | None = None

    # --- captures ---------------------------------------------------------------------

    @overload
    def __getitem__(self, key: CaptureKey) -> Capture: ...
    @overload
    def __getitem__(self, key: str | tuple[Any, ...]) -> Any: ...
    def __getitem__(self, key: CaptureKey | str | tuple[Any, ...]) -> Any:
        wanted = parsed_key(key)
        found, several = self._find(wanted)
        if not found:
            raise CaptureError(self._nothing_at(wanted))
        if several:
            return found
        if len(found) == 1:
            return found[0]
        options = [repr(value_of(capture.key)) for capture in found]
        raise CaptureError(
            f"{wanted[0]!r} has {len(found)} captures: say which, one of {', '.join(options[:6])}"
        )

    def matching(
        self, glob: str, at: str | None = None, index: str | int | None = None
    ) -> list[Capture]:
        """The captures of the modules of this glob, in the order of the model; none if it captured
        none there.

        at: "output", "input", ...; index: path of the tensor in the value; None: any."""
        rest = [] if at is None else [at] if index is None else [at, str(index)]
        return self._find((glob, *rest))[0]

    def stack(self, glob: str, at: str = "output", index: str | int | None = None) -> torch.Tensor:
        """The captures of the modules of this glob as one tensor: (layer, batch, position, width),
        their dtype, on the CPU.

        CaptureError: there are none, or their shapes differ."""
        captures = self.matching(glob, at, index)
        if not captures:
            raise CaptureError(self._nothing_at((glob, at)))
        shapes = {capture.shape: capture.name for capture in captures}
        if len(shapes) > 1:
            each = ", ".join(f"{name} is {shape}" for shape, name in shapes.items())
            raise CaptureError(f"captures of different shapes cannot be stacked: {each}")
        return torch.stack([capture.tensor() for capture in captures])

    def _nothing_at(self, wanted: tuple[Any, ...]) -> str:
        name = ", ".join([repr(wanted[0]), *map(str, wanted[1:])])
        modules = list(dict.fromkeys(capture.key.module for capture in self))
        if wanted[0] in self.silent:
            return f"{name} never fires in a forward of this model, so there is nothing to capture"
        if self.partial:
            return (
                f"run {self.number} ended before {name} was whole ({self.partial}); "
                f"it has {len(self)} captures"
            )
        beside = [value_of(c.key) for c in self if c.key.module == wanted[0] != ""]
        near = [str(key) for key in beside] or nearest(wanted[0], modules) or modules[:3]
        has = f"; it has {', '.join(map(display_name, near))}" if near else ""
        return (
            f"run {self.number} captured nothing at {name}: hook it first, "
            f"session.hook({wanted[0]!r}), and run again{has}"
        )

    def _find(self, wanted: tuple[Any, ...]) -> tuple[list[Capture], bool]:
        """The captures of that module, of the modules of that glob or of the hook of that name;
        and whether what was asked for means several, however many there are. What was there before
        an edit is found if nothing else is."""
        name, *rest = wanted
        keys = [key for key in self.captures if key.hook != "logits"]
        several = "*" in name
        if several:
            chosen = [key for key in keys if match(name, key.module)]
        else:
            chosen = [key for key in keys if key.module == name]
        if not chosen:
            chosen = [key for key in keys if key.hook == name]
            several = several or "*" in self.globs.get(name, "")
        found = [key for key in chosen if fits(key, rest)]
        after = {key.module for key in found}
        found += [key for key in chosen if key.module not in after and fits(key, rest, before=True)]
        return list({value_of(key): self.captures[key] for key in found}.values()), several

    def __contains__(self, key: CaptureKey | str | tuple[Any, ...]) -> bool:
        return bool(self._find(parsed_key(key))[0])

    def __iter__(self) -> Iterator[Capture]:
        return (capture for key, capture in self.captures.items() if key.hook != "logits")

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _ipython_key_completions_(self) -> list[str]:
        """What `run["` can become: modules and names of hooks."""
        modules = [capture.key.module for capture in self]
        return list(dict.fromkeys([*modules, *(capture.key.hook for capture in self)]))

    @property
    def logits(self) -> Capture:
        """(B, S, V), or (B, 1, V) where all positions would take more than 64 MiB. Of a generation
        one position a forward, (B, forwards, V): those from which the new tokens were taken, the
        prompt's last one first."""
        for key, capture in self.captures.items():
            if key.hook == "logits":
                return capture
        why = f": {self.partial}" if self.partial else ""
        if self.stopped:
            why = ": it was stopped before them"
        raise CaptureError(f"run {self.number} has no logits{why}")

    # --- text -------------------------------------------------------------------------

    @property
    def text(self) -> list[str]:
        """Each row's prompt as text, and what was generated after it."""
        width = len(self.plan.ids[0])
        space = " " if self._tokenizer is None else ""
        prompts = [space.join(filter(None, row[:width])) for row in self.tokens]
        if not self.new_ids:
            return prompts
        return [a + b for a, b in zip(prompts, self._new_text(), strict=True)]

    @property
    def generated(self) -> list[str]:
        """Each row's new text. CaptureError: a plain run has none."""
        if self.plan.generation is None:
            raise CaptureError(
                f"run {self.number} is one forward, it generated nothing: session.generate(prompt)"
            )
        return self._new_text()

    def _new_text(self) -> list[str]:
        """Each row's new text; without a tokenizer its ids, a space before each."""
        if self._tokenizer is None:
            return ["".join(f" {token}" for token in row) for row in self.new_ids]
        return texts(self.new_ids, self._tokenizer)

    @property
    def ids(self) -> list[list[int]]:
        """The batch's token ids, pads on the left; in a generation with the new ones, pads after a
        row's end."""
        if self.plan.generation is None:
            return [list(row) for row in self.plan.ids]
        pad = self.plan.generation.pad_id
        width = max(map(len, self.new_ids))
        rows = zip(self.plan.ids, self.new_ids, strict=True)
        return [[*prompt, *new, *[pad] * (width - len(new))] for prompt, new in rows]

    @property
    def mask(self) -> torch.Tensor:
        """(B, S) bool: which positions of the captures are real. In a generation (B, S + forwards
        - 1), for each row up to the token before its last one: that was never fed, or only for the
        sake of other rows."""
        prompt = torch.tensor(self.plan.mask).bool()
        if not self.new_ids:
            return prompt
        fed = torch.arange(1, self.forwards)
        lengths = torch.tensor([[len(row)] for row in self.new_ids])
        return torch.cat([prompt, fed < lengths], 1)

    @property
    def seed(self) -> int:
        """Of what the run drew: session.generate(..., seed=run.seed) draws the same."""
        return self.plan.seed if self.plan.generation is None else self.plan.generation.seed

    def next_tokens(self, k: int = 5) -> list[list[tuple[str, float]]]:
        """For each row the k likeliest next tokens and their probabilities; of a generation, those
        of its last step."""
        if self.logits.ndim != 3 and self.logits.error is None:
            raise CaptureError(
                "next tokens are read from (B, S, V) logits; the model puts out "
                f"{self.logits.shape}"
            )
        last = self.logits[:, -1].float().softmax(-1)
        values, ids = last.topk(min(k, last.shape[-1]))
        words = [token_strings(row, self._tokenizer) for row in ids.tolist()]
        return [list(zip(w, v, strict=True)) for w, v in zip(words, values.tolist(), strict=True)]

    def attribution(self, other: Run) -> dict[str, torch.Tensor]:
        """Module → to first order, what patching `other`'s activation in would change of this
        run's loss, by position: (other - this) × gradient, summed over the last dim. Attribution
        patching (Nanda 2023, Syed et al. 2023).

        Of every module of which this run has the output and its gradient, and the other the
        output. CaptureError: of none; ValueError: their shapes differ."""
        found = {}
        for key in [key for key in self.captures if key.at == "grad_output"]:
            output = (key.module, "output", key.index, key.call)
            if output not in self or output not in other:
                continue
            this = self[output].tensor()
            that = other[output].tensor()
            if this.shape != that.shape:
                raise ValueError(
                    f"{key.module}: {tuple(this.shape)} here, {tuple(that.shape)} in the other run"
                )
            found[key.module] = ((that - this) * self.captures[key].tensor()).sum(-1)
        if not found:
            raise CaptureError(
                "attribution needs modules of which both runs captured the output and this one the "
                "gradient: hook(glob), hook(glob, at='grad_output'), run(..., loss=)"
            )
        return found

    # --- life -------------------------------------------------------------------------

    def keep(self) -> Run:
        """Never expire this run to make room for others."""
        if self._store is not None:
            self._store.may_keep()
        self.kept = True
        return self

    def free(self) -> None:
        """Give its memory back now. Tensors that were read stay as they are."""
        if self._store is not None:
            self._store.free(self, "its run was freed (run.free())")

    @property
    def num_bytes(self) -> int:
        """Of its captures that can be read."""
        return sum(c.num_bytes for c in self.captures.values() if c.error is None)

    # --- how it is shown --------------------------------------------------------------

    def __repr__(self) -> str:
        lines = [self._headline(), *(f"  warning: {text}" for text in self.warnings[:WARNED])]
        if self.new_ids:
            lines += [f"  {shorter(row)!r}" for row in self.text[:4]]
        for row in self._next_table()[:4]:
            lines.append(f"  next: {', '.join(f'{word!r} {share:.3f}' for word, share in row)}")
        rows = folded(self)
        captures = [(name, str(n), shape, f"{by} by {how}") for name, n, shape, by, how in rows]
        if rows:
            lines.append(Table(captures[:SHOWN], right=(1,)).text("  "))
        if len(rows) > SHOWN:
            lines.append(f"  ... and {sum(row[1] for row in rows[SHOWN:])} more captures")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        warnings = [html.escape(text) for text in self.warnings[:WARNED]]
        parts = [f'<p style="color:#c22">{text}</p>' for text in warnings]
        parts.append(self._prompt_table())
        captured = folded(self)
        if captured:
            cells = [(name, str(n), *rest) for name, n, *rest in captured[:SHOWN]]
            parts.append(Table(cells, HEAD, right=(1,), code=(0,)).html())
        left = sum(row[1] for row in captured[SHOWN:])
        if left:
            parts.append(f"<p>… and {left} more captures</p>")
        return page(self._headline(), *parts)

    def _prompt_table(self) -> str:
        """The rows of the batch as HTML, each with its continuation or its next tokens."""
        width = len(self.plan.ids[0])
        likeliest = self._next_table()
        rows: list[list[Cell]] = []
        for i, tokens in enumerate(row[:width] for row in self.tokens[:8]):
            text = shown_tokens(tokens)
            if self.new_ids:
                text += f" <b>{html.escape(shorter(self._new_text()[i], 2000))}</b>"
            rows.append([Cell("", text)])
            for word, share in likeliest[i] if i < len(likeliest) else ():
                rows[-1].append(Cell("", f"<code>{html.escape(word)}</code>&nbsp;{share:.3f}"))
        if len(self.tokens) > 8:
            rows.append([Cell(f"… and {len(self.tokens) - 8} more rows")])
        head = [] if self.new_ids else [Cell("next token", span=5)]
        return Table(rows, ["prompt", *head]).html()

    def _headline(self) -> str:
        size = f"{len(self.plan.ids)} × {len(self.plan.ids[0])} tokens"
        if self.new_ids:
            size += f" + {self.forwards} new"
        parts = [
            size,
            f"{len(self)} captures",
            f"{self.num_bytes / 1e6:.1f} MB",
            f"{self.seconds.get('total', 0) * 1e3:.0f} ms",
        ]
        if self.plan.stop_at is not None and not self.stopped:
            parts.append("run to its end: under this layout the ranks cannot stop early")
        if self.partial:
            parts.append(f"PARTIAL: {self.partial}")
        if self.loss is not None:
            parts.append(f"loss {self.loss:.6g}")
        if self.freed:
            parts.append(self.freed)
        if self.edits:
            parts.append(f"with {'; '.join(self.edits)}")
        return f"Run {self.number}: {', '.join(parts)}"

    def _next_table(self) -> list[list[tuple[str, float]]]:
        """The next tokens, where a repr shows them: a generation's last logits are those of its
        last token."""
        if self.new_ids:
            return []
        try:
            return self.next_tokens()
        except FlexError:  # stopped early, freed, or not to be placed: the rest is still good
            return []


# --- keys -----------------------------------------------------------------------------


def parsed_key(key: CaptureKey | str | tuple[Any, ...]) -> tuple[Any, ...]:
    """(module, at, index, call), or the beginning of it; an index may be a number."""
    if isinstance(key, CaptureKey):
        return value_of(key)
    wanted = key if isinstance(key, tuple) else (key,)
    if not wanted or not isinstance(wanted[0], str) or len(wanted) > 4:
        raise CaptureError(
            f"a capture is run[module], or run[module, at, index, call]; not {key!r}"
        )
    return (*wanted[:2], *map(str, wanted[2:3]), *wanted[3:])


def value_of(key: CaptureKey) -> tuple[str, str, str, int]:
    """What tells a value from the others of its run, whichever hook captured it."""
    return key.module, key.at, key.index, key.call


def fits(key: CaptureKey, rest: Sequence[Any], before: bool = False) -> bool:
    """Whether it is at this (at, index, call), or the beginning of it. before: it may be from
    before an edit."""
    at = key.at.removesuffix(" before") if before else key.at
    if not rest and at.endswith(" before"):
        return False
    return (at, key.index, key.call)[: len(rest)] == tuple(rest)


# --- words ----------------------------------------------------------------------------


def shown_tokens(tokens: Sequence[str]) -> str:
    """A row's tokens as text in boxes; pads, which are empty, are left out."""
    real = [token for token in tokens if token]
    boxes = [
        f'<span style="{TOKEN_STYLE}">{html.escape(token)}</span>' for token in real[:SHOWN_TOKENS]
    ]
    if len(real) > SHOWN_TOKENS:
        boxes.append("…")
    return " ".join(boxes)


def folded(captures: Iterable[Capture]) -> list[tuple[str, int, str, str, str]]:
    """(names, how many, shape, placement, evidence): captures alike but for a number in their name
    are one row."""
    groups: dict[tuple[str, str, str, str], list[str]] = {}
    for capture in captures:
        pattern = re.sub(r"\d+", "#", capture.name)
        alike = (pattern, shape_text(capture), capture.placement, capture.evidence)
        groups.setdefault(alike, []).append(capture.name)
    return [(ranged(names), len(names), *alike[1:]) for alike, names in groups.items()]


def shape_text(capture: Capture) -> str:
    """A capture's shape; where it cannot be read, the kind of its error."""
    if capture.error is not None:
        return type(capture.error).__name__
    return "×".join(map(str, capture.shape)) or "scalar"
