"""Run: one forward with what it captured; and the session's store of runs, which keeps them within
a budget."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import html
import os
import re
import secrets
import socket
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import psutil
import torch

from flexkernel.cluster.cluster import Cluster
from flexkernel.cluster.interrupts import SignalMask
from flexkernel.errors import CaptureError, CaptureExpired, EditError, FlexError, MemoryBudgetError
from flexkernel.memory.plan import (
    Entry,
    Plan,
    Planner,
    cut,
    kept_columns,
    kept_shape,
    left,
)
from flexkernel.memory.pool import SLAB_BYTES, Extent, Pool
from flexkernel.memory.reduce import result_dtype
from flexkernel.memory.slab import PAGE, Slab, claim_folder, folder_path, on_disk, pages
from flexkernel.names import match, nearest
from flexkernel.views.table import Cell, Table, page
from flexkernel.wire import EDITED, CaptureKey, Layout, Region, RunPlan, RunReport, ShardRecord

from .capture import Capture, Reduced, differing
from .generation import Stream, generated
from .prompts import Batch, texts, token_strings
from .spill import Spill

__all__ = ["Run", "Store", "costliest"]

TOKEN_STYLE = "background:rgba(127,127,127,.16);border-radius:3px;padding:0 2px;white-space:pre"
# kept at a time: each costs the driver and every engine some memory beside its bytes in slabs
MOST_RUNS = 100
SHOWN = 24  # captures listed in a repr
WARNED = 4  # and warnings
MEASURED_BYTES = 1 << 20  # a run that copies less says little of how fast copies are


class Run:
    """One forward: its tokens, its next-token table, its captures.

    run[module], run[module, at], run[module, at, index], run[module, at, index, call]: a Capture.
    With a glob for the module: the list of those it matches. run[a hook's name]: what it captured,
    a list where its glob has a star. Of an edited activation it is what came after the edit;
    run[module, "output before"] is what was there before. run.captures: all of them. run.logits:
    the model's output, whole or (where that would be large) its last position. A generation goes
    on after its prompt: run.generated is the new text, run.text and run.tokens have both. Captures
    cover the prompt and all new tokens but the last, which is never fed; run.mask says which of
    that is real. run.warnings: what to know before believing it. run.partial: why it did not come
    to its end, "" if it did. Then it has those captures that every rank had whole by then, of a
    generation up to its last whole forward, and no others.
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
        self.number, self.plan, self.tokens, self._tokenizer = number, plan, tokens, tokenizer
        self.new_ids, self.forwards = [list(row) for row in new], forwards
        self.captures: dict[CaptureKey, Capture] = {}
        self.seconds: dict[str, float] = {}
        self.silent: tuple[str, ...] = ()
        self.globs: dict[str, str] = {}  # hook → the glob it was given
        self.warnings: tuple[str, ...] = ()
        self.stopped = False
        self.partial = ""
        self.loss: float | None = None  # where the run had one
        self.kept = False
        self.freed = ""
        self._store: Any = None

    # --- looking ----------------------------------------------------------------------

    def __getitem__(self, key: str | tuple) -> Any:
        wanted = _wanted(key)
        found, several = self._find(wanted)
        if not found:
            raise CaptureError(self._nothing_at(wanted))
        if several:
            return found
        if len(found) == 1:
            return found[0]
        options = [repr(_of(c.key)) for c in found]
        raise CaptureError(
            f"{wanted[0]!r} has {len(found)} captures: say which, one of {', '.join(options[:6])}"
        )

    def _nothing_at(self, wanted: tuple) -> str:
        names = list(dict.fromkeys(k.module for k in self.captures if k.hook != "logits"))
        if wanted[0] in self.silent:
            return f"{wanted[0]!r} never fires in a forward of this model, so there is nothing to capture"
        beside = [_of(k) for k in self.captures if k.module == wanted[0] != ""]
        near = [str(key) for key in beside] or nearest(wanted[0], names) or names[:3]
        if self.partial:
            return f"run {self.number} ended before {wanted!r} was whole ({self.partial}); it has {len(self)} captures"
        return f"run {self.number} captured nothing at {wanted!r}" + (
            f"; it has {', '.join(near)}" if near else ""
        )

    def _find(self, wanted: tuple) -> tuple[list[Capture], bool]:
        """The captures of that module, of the modules of that glob or of the hook of that name;
        and whether what was asked for means several, however many there are. What was there before
        an edit is found if nothing else is."""
        name, *rest = wanted
        keys = [key for key in self.captures if key.hook != "logits"]
        chosen = [
            key for key in keys if (match(name, key.module) if "*" in name else key.module == name)
        ]
        several = "*" in name
        if not chosen:
            chosen = [key for key in keys if key.hook == name]
            several = several or "*" in self.globs.get(name, "")
        found = [key for key in chosen if _fits(key, rest)]
        after = {key.module for key in found}
        found += [
            key for key in chosen if key.module not in after and _fits(key, rest, before=True)
        ]
        return list({_of(key): self.captures[key] for key in found}.values()), several

    def __contains__(self, key: str | tuple) -> bool:
        return bool(self._find(_wanted(key))[0])

    def __iter__(self) -> Iterator[Capture]:
        return (c for k, c in self.captures.items() if k.hook != "logits")

    def __len__(self) -> int:
        return sum(1 for _ in self)

    @property
    def logits(self) -> Capture:
        """(B, S, V), or (B, 1, V) where all positions would take more than 64 MiB. Of a generation
        one position a forward, (B, forwards, V): those from which the new tokens were taken, the
        prompt's last one first."""
        for key, capture in self.captures.items():
            if key.hook == "logits":
                return capture
        raise CaptureError(
            f"run {self.number} has no logits"
            + (
                ": it was stopped before them"
                if self.stopped
                else f": {self.partial}"
                if self.partial
                else ""
            )
        )

    @property
    def logits_are_last_only(self) -> bool:
        return self.plan.logits_last

    @property
    def text(self) -> list[str] | str:
        """The prompt as text, and what was generated after it: a string, or a list of them for a
        batch."""
        prompts = ["".join(row[: len(self.plan.ids[0])]) for row in self.tokens]
        rows = (
            [a + b for a, b in zip(prompts, self._generated(), strict=True)]
            if self.new_ids
            else prompts
        )
        return rows[0] if len(rows) == 1 else rows

    @property
    def generated(self) -> list[str] | str:
        """The new text of a generation: a string, or a list of them for a batch. CaptureError: a
        plain run has none."""
        if self.plan.generation is None:
            raise CaptureError(
                f"run {self.number} is one forward, it generated nothing: session.generate(prompt)"
            )
        rows = self._generated()
        return rows[0] if len(rows) == 1 else rows

    def _generated(self) -> list[str]:
        if self._tokenizer is None:
            return ["".join(f" {i}" for i in row) for row in self.new_ids]
        return texts(self.new_ids, self._tokenizer)

    @property
    def ids(self) -> list[list[int]]:
        """The batch's token ids, pads on the left; in a generation with the new ones, pads after a
        row's end."""
        if self.plan.generation is None:
            return [list(row) for row in self.plan.ids]
        pad, width = self.plan.generation.pad_id, max(map(len, self.new_ids))
        rows = zip(self.plan.ids, self.new_ids, strict=True)
        return [[*prompt, *new, *[pad] * (width - len(new))] for prompt, new in rows]

    @property
    def mask(self) -> torch.Tensor:
        """(B, S) bool: which positions of the captures are real. In a generation (B, S + forwards
        - 1), for each row up to the token before its last one: that was never fed, or only for the
        sake of other rows."""
        prompt = torch.tensor(self.plan.mask).bool()
        fed = torch.arange(1, self.forwards) if self.new_ids else torch.arange(0)
        lengths = torch.tensor([[len(row)] for row in self.new_ids] or [[0]] * len(prompt))
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
                f"next tokens are read from (B, S, V) logits; the model puts out {self.logits.shape}"
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
        for key in [k for k in self.captures if k.at == "grad_output"]:
            of_output = (key.module, "output", key.index, key.call)
            if of_output in self and of_output in other:
                this, that = self[of_output].tensor(), other[of_output].tensor()
                if this.shape != that.shape:
                    raise ValueError(
                        f"{key.module}: {tuple(this.shape)} here, {tuple(that.shape)} in the other run"
                    )
                found[key.module] = ((that - this) * self.captures[key].tensor()).sum(-1)
        if not found:
            raise CaptureError(
                "attribution needs modules of which both runs captured the output and this one the gradient: "
                "hook(glob), hook(glob, at='grad_output'), run(..., loss=)"
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
        return sum(c.num_bytes for c in self.captures.values() if c.error is None)

    # --- repr -------------------------------------------------------------------------

    def __repr__(self) -> str:
        lines = [self._headline(), *(f"  warning: {text}" for text in self.warnings[:WARNED])]
        lines += [f"  {shorter(row)!r}" for row in self._rows_of_text()[:4]] if self.new_ids else []
        lines += [
            f"  next: {', '.join(f'{w!r} {p:.3f}' for w, p in row)}" for row in self._table()[:4]
        ]
        rows = folded(self)
        captures = [(name, str(n), shape, f"{by} by {how}") for name, n, shape, by, how in rows]
        if rows:
            lines.append(Table(captures[:SHOWN], right=(1,)).text("  "))
        if len(rows) > SHOWN:
            lines.append(f"  ... and {sum(row[1] for row in rows[SHOWN:])} more captures")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        esc = html.escape
        next_ = self._table()
        prompts: list[list[Cell]] = []
        for i, tokens in enumerate(row[: len(self.plan.ids[0])] for row in self.tokens[:8]):
            prompts.append([Cell("", shown_tokens(tokens) + self._shown_new(i))])
            for word, share in next_[i] if i < len(next_) else ():
                prompts[-1].append(Cell("", f"<code>{esc(word)}</code>&nbsp;{share:.3f}"))
        if len(self.tokens) > 8:
            prompts.append([Cell(f"… and {len(self.tokens) - 8} more rows")])
        next_head = [] if self.new_ids else [Cell("next token", span=5)]
        parts = [f'<p style="color:#c22">{esc(text)}</p>' for text in self.warnings[:WARNED]]
        parts.append(Table(prompts, ["prompt", *next_head]).html())
        captured = folded(self)
        if captured:
            cells = [(name, str(n), *rest) for name, n, *rest in captured[:SHOWN]]
            head = ("captures", "n", "shape", "placement over tp", "evidence")
            parts.append(Table(cells, head, right=(1,), code=(0,)).html())
        left = sum(row[1] for row in captured[SHOWN:])
        if left:
            parts.append(f"<p>… and {left} more captures</p>")
        return page(self._headline(), *parts)

    def _shown_new(self, row: int) -> str:
        """What the row was continued with, told from the prompt."""
        return (
            f" <b>{html.escape(shorter(self._generated()[row], 2000))}</b>" if self.new_ids else ""
        )

    def _headline(self) -> str:
        B, S = len(self.plan.ids), len(self.plan.ids[0])
        state = f", {self.freed}" if self.freed else ""
        state = f", loss {self.loss:.6g}" + state if self.loss is not None else state
        state = f", PARTIAL: {self.partial}" + state if self.partial else state
        new = f" + {self.forwards} new" if self.new_ids else ""
        if self.plan.stop_at is not None and not self.stopped:
            state += ", run to its end: under this layout the ranks cannot stop early"
        return (
            f"Run {self.number}: {B} × {S} tokens{new}, {len(self)} captures, {self.num_bytes / 1e6:.1f} MB, "
            f"{self.seconds.get('total', 0) * 1e3:.0f} ms{state}"
        )

    def _rows_of_text(self) -> list[str]:
        return [self.text] if isinstance(self.text, str) else self.text

    def _table(self) -> list[list[tuple[str, float]]]:
        if self.new_ids:  # its last logits are those of the last new token
            return []
        try:
            return self.next_tokens()
        except (
            FlexError
        ):  # stopped early, freed, or not to be placed: the rest of the repr is still good
            return []


def shorter(text: str, most: int = 200) -> str:
    return text if len(text) <= most else f"{text[: most // 2]} … {text[-most // 2 :]}"


def _wanted(key: str | tuple | CaptureKey) -> tuple:
    """(module, at, index, call), or the beginning of it; an index may be a number."""
    if isinstance(key, CaptureKey):
        return _of(key)
    wanted = key if isinstance(key, tuple) else (key,)
    if not wanted or not isinstance(wanted[0], str) or len(wanted) > 4:
        raise CaptureError(
            f"a capture is run[module], or run[module, at, index, call]; not {key!r}"
        )
    return (*wanted[:2], *map(str, wanted[2:3]), *wanted[3:])


def shown_tokens(tokens: list[str]) -> str:
    """A row's tokens as text in boxes; pads, which are empty, are left out."""
    return " ".join(
        f'<span style="{TOKEN_STYLE}">{html.escape(t)}</span>' for t in tokens[:200] if t
    )


def _of(key: CaptureKey) -> tuple[str, str, str, int]:
    """What tells a value from the others of its run, whichever hook captured it."""
    return key.module, key.at, key.index, key.call


def _fits(key: CaptureKey, rest: Sequence[Any], before: bool = False) -> bool:
    """Whether it is at this (at, index, call), or the beginning of it. before: it may be from
    before an edit."""
    if not before and not rest and key.site.side:
        return False
    at = key.site.without_side if before else key.at
    return (at, key.index, key.call)[: len(rest)] == tuple(rest)


def folded(captures: Iterable[Capture]) -> list[tuple[str, int, str, str, str]]:
    """(names, how many, shape, placement, evidence): captures alike but for a number in their name
    are one row."""
    groups: dict[tuple, list[str]] = {}
    for c in captures:
        alike = (re.sub(r"\d+", "#", c.name), _shape(c), c.placement, c.evidence)
        groups.setdefault(alike, []).append(c.name)
    return [(_ranged(names), len(names), *alike[1:]) for alike, names in groups.items()]


def _ranged(names: list[str]) -> str:
    """Names that differ in one number, as one: model.layers.0–29.mlp."""
    parts = [re.split(r"(\d+)", name) for name in names]
    columns = [list(dict.fromkeys(column)) for column in zip(*parts, strict=True)]
    return "".join(c[0] if len(c) == 1 else f"{c[0]}–{c[-1]}" for c in columns)


def _shape(capture: Capture) -> str:
    if capture.error is not None:
        return type(capture.error).__name__
    return "×".join(map(str, capture.shape)) or "scalar"


class Store:
    """The session's runs and the memory behind them: slabs on this host, clients of the hosts that
    are elsewhere.

    A notebook's Out[] keeps every run for ever, so memory is bounded by a budget: above it the
    oldest runs that nobody keeps or looks into expire.
    """

    def __init__(self, engines: Cluster, layout: Layout):
        self.layout = layout
        host = os.environ.get("FLEX_HOST", "")
        name = engines.folder + (f"-{host}" if host else "")
        # An engine made the folder under a random name: where it is there already, this is the
        # engine's own memory.
        same = folder_path(name).is_dir()
        self.engines = engines
        self.here = (host or socket.gethostname()) if same else "elsewhere"
        self.folder, self._claim = claim_folder(name)
        self.notes: dict[str, str] = {}  # rank → what made its copies of the last run slow
        self.spill = Spill(engines, name, same)
        self.hosts: list[str] = list(engines.hosts)
        free = psutil.disk_usage(str(self.folder)).free
        self.pool = Pool(secrets.token_hex(4), max(min(SLAB_BYTES, free // 8 // PAGE * PAGE), PAGE))
        self.most_runs = MOST_RUNS
        self.budget = min(psutil.virtual_memory().available // 4, free)
        self.runs: collections.OrderedDict[int, Run] = collections.OrderedDict()
        self._freed: list[int] = []
        self._extents: dict[int, Extent] = {}
        # captures that belong to no run
        self._lent: list[tuple[weakref.ref[Capture], Extent]] = []
        self._slabs: dict[str, Slab] = {}
        # (module, at, index) of what equals the unsharded model's
        self.verified: set[tuple[str, str, str]] = set()
        self._clients: dict[str, Any] = {}
        self._count = 0
        # bytes a second of the last run's copies, all ranks together
        self.bandwidth: float | None = None
        self._connect()

    def slab(self, name: str, num_bytes: int, create: bool = False) -> Slab:
        """A slab of this host, mapped once and kept. create: it is written into here, where no
        engine may have yet."""
        if name not in self._slabs:
            home = self.spill.folder if on_disk(name) else self.folder
            if home is None:
                raise CaptureExpired(f"{name} was moved to disk by a session that has ended")
            # A large one is not read at once: this process would be said to have all of it in
            # memory
            self._slabs[name] = Slab(
                home / name, num_bytes, create, create or num_bytes <= SLAB_BYTES
            )
        return self._slabs[name]

    def _connect(self) -> None:
        """Have every other host serve its slabs from here on: an engine that is busy later would
        not begin to."""
        for host in dict.fromkeys(self.hosts):
            if host != self.here:
                self.client(host)

    def client(self, host: str) -> Any:
        """Who asks another host for its slabs: its first engine serves them from a thread."""
        if host not in self._clients:
            from flexkernel.memory.channel import Client

            token = secrets.token_hex(16)
            address, token = self.engines.call(
                "serve", token, "127.0.0.1", ranks=[self.hosts.index(host)]
            )[0]
            self._clients[host] = Client(address, token)
        return self._clients[host]

    def close(self) -> None:
        """Let go of every run and connection."""
        for run in list(self.runs.values()):
            self.free(run, "its session has ended, or has loaded another model")
        self._recall("its session has ended, or has loaded another model")
        self.spill.close()
        for client in self._clients.values():
            client.close()
        self._clients.clear()
        self._slabs.clear()
        self._claim.close()

    def take_freed(self) -> tuple[int, ...]:
        """The runs freed since the last call: the engines hear of them with the next run."""
        freed, self._freed = tuple(self._freed), []
        return freed

    def next_number(self) -> int:
        self._count += 1
        return self._count

    def _may_expire(self, run: Run) -> bool:
        """Whether nobody keeps the run or looks into it."""
        extent = self._extents.get(run.number)
        return not run.kept and not run.freed and extent is not None and extent.tensors <= 0

    def _in_memory(self, run: Run) -> bool:
        return not on_disk(self._extents[run.number].slab)

    def held(self) -> int:
        """Bytes that no newer run could have: of runs that are kept or looked into, and of
        parameters in use."""
        free = [run for run in self.runs.values() if self._may_expire(run) and self._in_memory(run)]
        gone = [self._extents[run.number] for run in free]
        gone += [extent for _, extent in self._lent if extent.tensors <= 1]
        return self.pool.num_bytes - sum(extent.num_bytes for extent in gone)

    def spill_to(self, folder: str, budget: int | None = None) -> None:
        """Move the oldest captures there when memory is short, up to so many bytes (budget=0:
        none, they expire), and have there at once what alone is larger than the budget of memory.
        On every host."""
        self.spill.to(folder, budget)

    def beyond_memory(self, num_bytes: int) -> bool:
        """Whether so much is put on disk at once: the user has said where, and it cannot be had in
        memory."""
        return self.spill.given and num_bytes > self.budget

    def refusal(
        self, num_bytes: int, what: str = "this run", costs: str = "", disk: bool = False
    ) -> MemoryBudgetError | None:
        """Why there cannot be room for so much; None: there can. costs: which hooks it is mostly
        for. disk: it may lie there."""
        self.pool.drain()  # tensors that died since the last run count no more
        if disk and self.beyond_memory(num_bytes):
            there = [
                run
                for run in self.runs.values()
                if self._may_expire(run) and not self._in_memory(run)
            ]
            room = self.spill.room() + sum(self._extents[run.number].num_bytes for run in there)
            if num_bytes <= room:
                return None
            return MemoryBudgetError(
                f"{what} would keep {num_bytes:,} bytes; the session's budget of memory is {self.budget:,}, and of its "
                f"budget on disk, in {self.spill.root}, {room:,} are free: free runs (run.free()) or hook less{costs}"
            )
        if num_bytes > self.budget:
            instead = ", or have it on disk, session.store.spill_to(FOLDER)" if disk else ""
            return MemoryBudgetError(
                f"{what} would keep {num_bytes:,} bytes and the session's budget is {self.budget:,}: hook less, use "
                f"--positions or --reduce, raise session.store.budget{instead}{costs}"
            )
        held = self.held()
        if held + num_bytes > self.budget:
            return MemoryBudgetError(
                f"{what} would keep {num_bytes:,} bytes; runs that are kept or looked into hold {held:,} of the "
                f"session's budget of {self.budget:,}: free some (run.free()){costs}"
            )
        return None

    def growth(self, num_bytes: int) -> int:
        """Bytes of a new slab file that a run of so many needs; 0: there is one, or older runs
        give theirs back."""
        lacks = self.pool.num_bytes + num_bytes > self.budget
        return 0 if lacks else self.pool.growth(num_bytes)

    def take(self, num_bytes: int, what: str = "this run") -> Extent:
        """Room for captures; older ones go to disk to make it, or expire, parameters first.
        MemoryBudgetError: that is not enough."""
        problem = self.refusal(num_bytes, what)
        if problem is not None:
            raise problem
        self._recall("it expired to make room; session.parameter(name) reads it again", num_bytes)
        for run in list(self.runs.values()):
            few = len(self.runs) < self.most_runs
            if self.pool.num_bytes + num_bytes <= self.budget and few:
                break
            if self._may_expire(run) and (
                not few or (self._in_memory(run) and not self._to_disk(run))
            ):
                self._expire(run)
        return self.pool.lease(num_bytes)

    def _expire(self, run: Run) -> None:
        self.free(run, "it expired to make room for newer runs; run.keep() keeps one")

    def _room_on_disk(self, num_bytes: int) -> bool:
        """Whether there is room on disk, once older runs there have expired."""
        for run in list(self.runs.values()):
            if self.spill.room() >= num_bytes:
                return True
            if self._may_expire(run) and not self._in_memory(run):
                self._expire(run)
        return self.spill.room() >= num_bytes

    def _to_disk(self, run: Run) -> bool:
        """Move what a run keeps to disk; False: there is no room."""
        extent = self._extents[run.number]
        if (
            self.spill.budget == 0
            or not self.spill.useful()
            or not self._room_on_disk(extent.num_bytes)
        ):
            return False
        target = self.spill.move(run.number, extent)
        if target is None:
            return False
        run.plan = dataclasses.replace(
            run.plan, slab=target.slab, slab_bytes=target.slab_bytes, base=0
        )
        for capture in run.captures.values():
            capture.move(target.slab, target.slab_bytes, extent.base, lambda: self.pool.pin(target))
        self._extents[run.number] = target
        self.pool.release(extent)
        return True

    def give_back(self, extent: Extent, spoilt: bool = False) -> None:
        """Bytes that nobody needs any more. spoilt: the slab could not be made."""
        if on_disk(extent.slab):
            self.spill.release(extent)
        elif spoilt:
            self.pool.abandon(extent)
        else:
            self.pool.release(extent)

    def lend(self, capture: Capture, extent: Extent) -> None:
        """Let a capture that belongs to no run have these bytes until it is freed or dies, or room
        is needed."""
        # it counts as a tensor made from the extent
        back = weakref.finalize(capture, self.pool.pin(extent))
        back.atexit = False
        self.pool.release(extent)

        def give_back() -> None:
            back()
            self.pool.drain()

        capture.give_back = give_back
        self._lent = [(ref, held) for ref, held in self._lent if ref() is not None] + [
            (weakref.ref(capture), extent)
        ]

    def _recall(self, why: str, num_bytes: int | None = None) -> None:
        """Take back what is lent, the oldest first; with num_bytes: only until these fit, and
        nothing looked into."""
        for ref, extent in list(self._lent):
            if num_bytes is not None and self.pool.num_bytes + num_bytes <= self.budget:
                return
            capture = ref()
            if (
                capture is not None
                and capture.give_back is not None
                and (num_bytes is None or extent.tensors <= 1)
            ):
                capture.expire(why)
                capture.give_back()
                self._lent.remove((ref, extent))

    @contextlib.contextmanager
    def room(self, num_bytes: int, what: str = "this run") -> Iterator[Extent]:
        """Room while something is made; given back if that fails."""
        with self._unless_it_fails(self.take(num_bytes, what)) as extent:
            yield extent

    @contextlib.contextmanager
    def room_for_run(self, number: int, num_bytes: int, costs: str) -> Iterator[Extent]:
        """The same for what a run keeps, which lies on disk if it is larger than the budget of
        memory."""
        problem = self.refusal(num_bytes, costs=costs, disk=True)
        if problem is not None:
            raise problem
        if self.beyond_memory(num_bytes):
            self._room_on_disk(num_bytes)
            taken = self.spill.take(number, num_bytes)
        else:
            taken = self.take(num_bytes)
        with self._unless_it_fails(taken, costs) as extent:
            yield extent

    @contextlib.contextmanager
    def _unless_it_fails(self, extent: Extent, costs: str = "") -> Iterator[Extent]:
        try:
            yield extent
        except MemoryBudgetError as error:
            self.give_back(extent, spoilt=True)
            raise MemoryBudgetError(f"{error}{costs}") from None
        except BaseException:
            # else it is that of a partial run
            if not any(extent is held for held in self._extents.values()):
                self.give_back(extent)
            raise

    def run(
        self,
        batch: Batch,
        where: Plan,
        tokenizer: Any,
        wanted: dict[str, Any],
        on_token: Callable[[int, str], Any] | None = None,
    ) -> Run:
        """Have the engines run a batch, once there is room for what it keeps. wanted: the
        RunPlan's other fields. on_token(row, text): called with the text of a generation as it
        comes."""
        begin = time.perf_counter()
        number = self.next_number()
        with self.room_for_run(number, where.num_bytes, costliest(where)) as extent:
            plan = RunPlan(
                run=number,
                ids=batch.ids,
                mask=batch.mask,
                positions=batch.positions,
                slab=extent.slab,
                slab_bytes=extent.slab_bytes,
                base=extent.base,
                num_bytes=where.num_bytes,
                logits_last=where.logits_last,
                timeout_s=self.engines.timeout_s,
                freed=self.take_freed(),
                **wanted,
            )
            # if it fails: what it left on the engines goes with the next run
            self._freed.append(number)
            try:
                if plan.generation is None:
                    reports = self.engines.call("run", plan)
                else:
                    reports = self._streamed(plan, where, tokenizer, on_token)
            except BaseException as error:
                self._keep_partial(error, plan, where, extent, batch, tokenizer)
                raise
            check_edited(reports)
            run = self.add(plan, where, extent, reports, batch.tokens, tokenizer)
        run.seconds["total"] = time.perf_counter() - begin
        if where.num_bytes >= MEASURED_BYTES and run.seconds["copy"] > 0:
            self.bandwidth = where.num_bytes / run.seconds["copy"]
        return run

    def _keep_partial(
        self,
        error: BaseException,
        plan: RunPlan,
        where: Plan,
        extent: Extent,
        batch: Batch,
        tokenizer: Any,
    ) -> None:
        """Store what all ranks had captured of a run before it failed, if that is anything."""
        reports = at_one_forward(getattr(error, "flex_partial", ()))
        if not reports:
            return
        why = (
            "interrupted"
            if isinstance(error, KeyboardInterrupt)
            else shorter(str(error).partition("\n")[0], 120)
        )
        whole = whole_everywhere(where, reports)
        if any(where.entries[i].key.hook != "logits" for i in whole):
            kept = [
                dataclasses.replace(r, planned={i: r.planned[i] for i in whole & set(r.planned)})
                for r in reports
            ]
            self.add(plan, where, extent, kept, batch.tokens, tokenizer, partial=why)

    def _streamed(
        self, plan: RunPlan, where: Plan, tokenizer: Any, on_token: Callable[[int, str], Any] | None
    ) -> list[RunReport]:
        """The run's reports; meanwhile its new text is told as it comes. What it raises says how
        far it was."""

        def read(region: Region) -> list[list[list[int]]]:
            return [
                self.slab(region.slab, plan.slab_bytes).tensor(region).tolist()
                if host == self.here
                else self.client(host).read(region).tolist()
                for host in dict.fromkeys(self.hosts)
            ]

        stream = Stream(plan, where.text_region(plan.slab, plan.base), tokenizer, read, on_token)
        try:
            with self.engines.watched(stream if on_token is not None else None):
                reports = self.engines.call("run", plan)
            stream.end(generated(reports, len(plan.ids)))
            return reports
        except BaseException as error:
            raised = stream.failure or error
            made = [text for text in stream.so_far() if text]
            if made:
                raised.add_note(f"generated before that: {made}")
            if raised is error:
                raise
            raised.flex_partial = getattr(error, "flex_partial", ())  # type: ignore[attr-defined]
            raise raised from None

    def recover(self, by_rank: Sequence[dict], planner: Planner, tokenizer: Any) -> None:
        """The runs of an earlier driver that every rank still knows: their captures lie where that
        one put them."""
        for number, (plan, hooks, _) in sorted(by_rank[0].items()):
            reports = [runs[number][2] for runs in by_rank if number in runs]
            if len(reports) == len(by_rank):
                new = plan.generation.max_new_tokens if plan.generation is not None else 0
                where = planner.plan(
                    hooks, len(plan.ids), len(plan.ids[0]), new, plan.loss is not None
                )
                tokens = [token_strings(row, tokenizer) for row in plan.ids]
                extent = Extent(
                    plan.slab, plan.slab_bytes, plan.base, max(pages(plan.num_bytes), pages(1))
                )
                self._adopt(extent)
                self.add(plan, where, extent, reports, tokens, tokenizer)

    def _adopt(self, extent: Extent) -> None:
        if not on_disk(extent.slab):
            self.pool.adopt(extent)
            return
        self.spill.recover()
        self.spill.adopt(extent)

    def add(
        self,
        plan: RunPlan,
        where: Plan,
        extent: Extent,
        reports: Sequence[RunReport],
        tokens: Any,
        tokenizer: Any,
        partial: str = "",
    ) -> Run:
        """The run that these reports describe. partial: why it ended early, if it did."""
        forwards = max(report.forwards for report in reports)
        new = generated(reports, len(plan.ids)) if plan.generation is not None else []
        longest = max(map(len, new), default=0)
        more = [[*token_strings(row, tokenizer), *[""] * (longest - len(row))] for row in new]
        tokens = (
            [[*row, *words] for row, words in zip(tokens, more, strict=True)] if new else tokens
        )
        run = Run(plan.run, plan, tokens, tokenizer, new, forwards)
        self._count = max(self._count, plan.run)
        run.silent, run.stopped = where.silent, any(report.stopped for report in reports)
        run.globs = {entry.hook.key: entry.hook.glob for entry in where.entries}
        run.warnings = made_nan(reports)
        self.notes = {f"rank {report.rank}": report.note for report in reports if report.note}
        run.seconds = {
            k: max(r.seconds.get(k, 0.0) for r in reports) for k in ("prepare", "forward", "copy")
        }
        run.partial = partial
        run.loss = next((r.loss for r in reports if r.loss is not None), None)
        run.captures = captures(run, where, extent, reports, self)
        run._store = self
        with SignalMask():
            self.runs[run.number] = run
            self._extents[run.number] = extent
            self._freed = [number for number in self._freed if number != run.number]
        return run

    def records(self, rank: int, of_another: Mapping[int, Any], planner: Planner) -> dict[int, Any]:
        """What an engine keeps of each stored run, (plan, hooks, report), for a rank whose engine
        lost it; of_another: what another rank's engine keeps."""
        found: dict[int, Any] = {}
        for number, (plan, hooks, _) in of_another.items():
            run = self.runs.get(number)
            if run is None:
                continue
            length = plan.generation.max_new_tokens if plan.generation is not None else 0
            where = planner.plan(hooks, len(plan.ids), len(plan.ids[0]), length)
            at = {entry.key: i for i, entry in enumerate(where.entries)}
            seen = {
                key: capture.seen[rank]
                for key, capture in run.captures.items()
                if rank in capture.seen
            }
            planned = {at[key]: value for key, value in seen.items() if key in at}
            others = {key: value for key, value in seen.items() if key not in at}
            report = RunReport(rank, number, planned, others, run.seconds, run.stopped)
            new = dict(enumerate(run.new_ids))
            found[number] = (
                plan,
                hooks,
                dataclasses.replace(report, forwards=run.forwards, generated=new),
            )
        return found

    def reconnect(self) -> None:
        """Engines have changed: find out anew who is where, and who serves another host's
        slabs."""
        self.hosts = list(self.engines.hosts)
        for client in self._clients.values():
            client.close()
        self._clients.clear()
        self._connect()
        self.spill.reopen()

    def may_keep(self) -> None:
        """Refuse to keep a run where that is not in this session's hands."""

    def free(self, run: Run, why: str) -> None:
        """Take a run's memory back."""
        if run.freed:
            return
        run.freed = "freed"
        for region in [
            s.region for c in run.captures.values() for s in c.seen.values() if s.region is not None
        ]:
            self._slabs.pop(region.slab, None)
        if on_disk(run.plan.slab):
            self._slabs.pop(run.plan.slab, None)
        for capture in run.captures.values():
            capture.expire(why)
        self.runs.pop(run.number, None)
        self._freed.append(run.number)
        extent = self._extents.pop(run.number, None)
        if extent is not None:
            self.give_back(extent)


def costliest(where: Plan, most: int = 3) -> str:
    """Which hooks a run's bytes are mostly for, as the end of a sentence."""
    rows = [
        f"{hook} {num_bytes:,} bytes"
        for hook, (_, num_bytes) in list(where.by_hook().items())[:most]
    ]
    return f"; what costs most: {', '.join(rows)}" if rows else ""


def captures(
    run: Run, where: Plan, extent: Extent, reports: Sequence[RunReport], home: Store
) -> dict:
    """Key → Capture, from what each rank saw."""
    planned: dict[int, dict[int, ShardRecord]] = {}
    others: dict[CaptureKey, dict[int, ShardRecord]] = {}
    for report in reports:
        for i, seen in report.planned.items():
            planned.setdefault(i, {})[report.rank] = seen
        for key, seen in report.others.items():
            others.setdefault(key, {})[report.rank] = seen

    def looked_into():
        return home.pool.pin(extent)

    text = Positions(run)
    found: dict[CaptureKey, Capture] = {}
    for i, entry in enumerate(where.entries):
        if i not in planned and (run.stopped or run.partial):
            continue
        region: Region = where.region(entry, extent.slab, extent.base)
        dtype = getattr(torch, entry.formula.dtype)
        shape, part = text.there(entry)
        tokens, mask = text.of(entry)
        kind: Callable[..., Capture] = Capture
        if entry.hook.reduce is not None:
            kind, dtype = (
                functools.partial(Reduced, entry, home.layout),
                result_dtype(entry.hook.reduce.op, dtype),
            )
        found[entry.key] = kind(
            entry.key,
            shape,
            dtype,
            planned.get(i, {}),
            region,
            home,
            extent.slab_bytes,
            looked_into,
            tokens,
            mask,
            part,
            entry.shape,
        )
    for key, by_rank in others.items():
        shape, dtype = described(by_rank)
        found[key] = Capture(key, shape, dtype, by_rank, None, home, 0, None, run.tokens)
    for key, capture in found.items():
        capture.verified = (key.module, key.site.without_side, key.index) in home.verified
    return found


def at_one_forward(by_rank: Sequence[Sequence[RunReport]]) -> list[RunReport]:
    """One report of each rank, all of after the same forward, the last that all have; none if
    there is no such one."""
    each = [{report.forwards: report for report in reports} for reports in by_rank]
    common = set.intersection(*map(set, each)) if each else set()
    return [reports[max(common)] for reports in each] if common else []


def whole_everywhere(where: Plan, reports: Sequence[RunReport]) -> set[int]:
    """The planned captures of which every rank that sees them says that it has its part. Nothing
    is kept of others: what lies in their place is partly of this run and partly of one before."""
    by_rank = {report.rank: report.planned for report in reports}
    return {
        i
        for i, entry in enumerate(where.entries)
        if entry.ranks
        and all(
            r in by_rank and i in by_rank[r] and by_rank[r][i].error is None for r in entry.ranks
        )
    }


class Positions:
    """Which positions of a run's text its captures have."""

    def __init__(self, run: Run):
        self.run, self.mask = run, run.mask
        self.B, self.S = len(run.plan.ids), len(run.plan.ids[0])
        self._kept: dict[tuple[int, ...] | None, list[int]] = {}

    def there(
        self, entry: Entry
    ) -> tuple[tuple[int, ...], Callable[[torch.Tensor], torch.Tensor] | None]:
        """The shape of what there is, and how it is cut out of what was planned: a generation may
        end early."""
        run = self.run
        if (
            run.plan.generation is None
            or entry.newest
            or run.forwards == run.plan.generation.max_new_tokens
        ):
            return entry.kept, None
        shape = kept_shape(entry.formula, entry.hook, self.B, self.S, 0, run.forwards, check=False)
        shape = left(shape, entry.over)
        if shape == entry.kept:
            return shape, None
        folded = entry.formula.folded
        return shape, functools.partial(cut, shape=shape, folded=folded, B=self.B)

    def of(self, entry: Entry) -> tuple[list[list[str]] | None, torch.Tensor | None]:
        """(each row's tokens, which of the positions are real). None: rows or positions were
        reduced."""
        if {entry.formula.positions, *entry.formula.batched} & set(entry.over):
            return None, None
        if entry.formula.positions is None and entry.formula.folded is None:
            return self.run.tokens, None
        columns = (
            [self.mask.shape[1] - 1] if entry.newest else self._columns(entry.hook.kept_positions)
        )
        if len(columns) == self.mask.shape[1]:
            return self.run.tokens, self.mask
        return [[row[c] for c in columns] for row in self.run.tokens], self.mask[:, columns]

    def _columns(self, positions: tuple[int, ...] | None) -> list[int]:
        if positions not in self._kept:
            self._kept[positions] = [
                c for f in kept_columns(positions, self.S, self.run.forwards) for c in f
            ]
        return self._kept[positions]


def check_edited(reports: Sequence[RunReport]) -> None:
    """PlacementError if ranks edited what they held as copies of one value, and these differed.
    EditError: those were equal, and what the edit made of them was not."""
    by_rank: dict[CaptureKey, dict[int, ShardRecord]] = {}
    for report in reports:
        for key, seen in report.edited.items():
            by_rank.setdefault(key, {})[report.rank] = seen
    for key, ranks in by_rank.items():
        problem = differing(key, ranks)
        if problem is not None and key.site.side == EDITED:
            raise EditError(
                f"the edit of hook {key.hook!r} made different values of the copies of {key.module} that ranks hold: "
                "draw what is random in an edit that is per='whole', which runs once",
                min(ranks),
            )
        if problem is not None:
            raise problem


def made_nan(reports: Sequence[RunReport]) -> tuple[str, ...]:
    """A sentence for each edit that made NaN of an activation that had none."""
    keys = dict.fromkeys(
        key for report in reports for key, seen in report.edited.items() if seen.nan
    )
    return tuple(
        f"the edit of hook {key.hook!r} put out NaN at {key}, where none came in" for key in keys
    )


def described(by_rank: Mapping[int, ShardRecord]) -> tuple[tuple[int, ...], torch.dtype]:
    """The whole shape and dtype of a value that no plan foresaw, from the parts that ranks
    describe."""
    lies = next((s.region for s in by_rank.values() if s.region is not None), None)
    if lies is None:
        return (), torch.float32
    shape = list(lies.shape)
    for dim in range(len(shape)):
        shape[dim] = max(
            [stop for s in by_rank.values() for d, _, stop in s.shard if d == dim],
            default=shape[dim],
        )
    return tuple(shape), getattr(torch, lies.dtype)
