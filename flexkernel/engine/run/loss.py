"""The loss of a run: a function of the whole logits and captures, computed once, on rank 0, on
leaves without a graph.
"""

from __future__ import annotations

import inspect
import math
import pickle
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from flexkernel.boxes import WHOLE, Box
from flexkernel.engine.usercode import users_line
from flexkernel.errors import HookError, LossError
from flexkernel.memory.plan import Entry
from flexkernel.wire import CaptureKey, RunPlan

from .autograd import trainable
from .recording import Recording
from .sandbox import restored_defaults

__all__ = ["CaptureState", "LossBatch", "LossCaptures", "evaluate", "states_of"]

IGNORED = -100  # torch's own: a label that cross_entropy leaves out
UNSHARED = -1  # the shard of a rank that holds nothing of a capture


# --- whether a capture can be read ----------------------------------------------------


@dataclass(frozen=True)
class CaptureState:
    """What became of one capture on one rank: numbers, so that all ranks can say it.

    missing: it did not come. failed: it could not be put into its place, or is an addend of a sum.
    shard: a number for the part that the rank holds, UNSHARED for none. size, written: how many
    elements it wrote, and which."""

    missing: bool = True
    failed: bool = False
    digest: int = 0
    shard: int = UNSHARED
    size: int = 0
    written: Box = WHOLE

    NUMBERS = 5 + Box.NUMBERS

    @classmethod
    def of(cls, recording: Recording, i: int) -> CaptureState:
        """That of planned capture i on this rank."""
        record = recording.planned.get(i)
        if record is None:
            return cls()
        state = cls(
            missing=False,
            failed=record.error is not None or bool(record.partial),
            digest=(record.digest + (1 << 63)) % (1 << 64) - (1 << 63),
        )
        if record.shard.is_empty:
            return state
        state = replace(state, shard=zlib.crc32(repr(record.shard).encode()))
        if record.written is None:
            return state
        size = record.written.volume(recording.entries[i].shape)
        return replace(state, size=size, written=record.written)

    @property
    def is_written(self) -> bool:
        """Whether the rank wrote something of it that can be read."""
        return not self.missing and not self.failed and self.size > 0

    def numbers(self) -> list[int]:
        """The state as NUMBERS ints."""
        flags = [int(self.missing), int(self.failed)]
        return [*flags, self.digest, self.shard, self.size, *self.written.numbers()]

    @classmethod
    def from_numbers(cls, numbers: Sequence[int]) -> CaptureState:
        """The state that numbers() wrote."""
        missing, failed, digest, shard, size, *written = numbers
        box = Box.from_numbers(written)
        return cls(bool(missing), bool(failed), digest, shard, size, box)


def states_of(recording: Recording) -> torch.Tensor:
    """What this rank's captures came to: int64 of the shape (entries, NUMBERS), on the CPU."""
    numbers = [CaptureState.of(recording, i).numbers() for i in range(len(recording.entries))]
    return torch.tensor(numbers, dtype=torch.int64).view(-1, CaptureState.NUMBERS)


def check_whole(entry: Entry, states: Sequence[CaptureState]) -> None:
    """LossError unless the capture is whole and its copies agree. states: one for each rank."""
    if any(state.failed for state in states):
        raise LossError(
            f"the loss asks for {entry.key}, which some rank could not put into its place, or "
            "holds an addend of: a run without a loss says why"
        )
    digests: dict[int, set[int]] = {}
    sizes: dict[Box, int] = {}
    for state in states:
        if state.is_written:
            sizes[state.written] = state.size
        if not state.missing and state.shard != UNSHARED:
            digests.setdefault(state.shard, set()).add(state.digest)
    if any(len(different) > 1 for different in digests.values()):
        raise LossError(f"the loss asks for {entry.key}, of which ranks hold copies that differ")
    if sum(sizes.values()) != math.prod(entry.shape):
        raise LossError(f"the loss asks for {entry.key}, which did not come, or not all of it")


# --- what a loss gets -----------------------------------------------------------------


@dataclass
class LossBatch:
    """What a loss gets beside the logits.

    tokens: ids (B, S). mask: (B, S) bool, False on pads. labels: (B, S), at each position the next
    token; -100, which cross_entropy leaves out, at the last one and where a pad is either.
    captures: by module name, or (module, at, index, call), each whole. modules: the trainable
    ones."""

    tokens: torch.Tensor
    mask: torch.Tensor
    labels: torch.Tensor
    captures: Mapping[Any, torch.Tensor]
    modules: Mapping[str, torch.nn.Module]


class LossCaptures(Mapping[Any, torch.Tensor]):
    """The captures of a run as leaves of the loss's graph, each made when it is first asked for.

    states: (ranks, entries, CaptureState.NUMBERS) int64. leaves: index in the plan → leaf, on
    `device`."""

    def __init__(self, recording: Recording, states: torch.Tensor, device: str):
        self.recording = recording
        self.states = states
        self.device = device
        self.leaves: dict[int, torch.Tensor] = {}
        self._keys = {
            i: entry.key
            for i, entry in enumerate(recording.entries)
            if not entry.hook.gradient and entry.hook.reduce is None
        }

    def leaf(self, i: int) -> torch.Tensor:
        """Planned capture i, whole, of its own shape and dtype on the device. LossError: it is not
        whole."""
        if i not in self.leaves:
            states = [CaptureState.from_numbers(row) for row in self.states[:, i].tolist()]
            check_whole(self.recording.entries[i], states)
            value = self.recording.place(i).to(self.device, copy=True)
            self.leaves[i] = value.requires_grad_(value.is_floating_point())
        return self.leaves[i]

    def logits(self) -> torch.Tensor | None:
        """The leaf of the logits, (B, S, V); None: the model puts out none."""
        for i, key in self._keys.items():
            if key.hook == "logits":
                return self.leaf(i)
        return None

    def __getitem__(self, key: Any) -> torch.Tensor:
        """The whole capture of a module name or (module, at, index, call), or of a hook's name; of
        its own shape. HookError: there is none, or several."""
        own = {i: k for i, k in self._keys.items() if k.hook != "logits"}
        first = (key,)
        if isinstance(key, tuple):
            first = key
        matches = [i for i, k in own.items() if parts(k)[: len(first)] == first]
        matches = matches or [i for i, k in own.items() if k.hook == key]
        if not matches:
            raise HookError(
                f"the loss asks for the capture {key!r}; the run captures "
                f"{[str(k) for k in self] or 'none'}"
            )
        several = dict.fromkeys(parts(own[i]) for i in matches)
        if len(several) > 1:  # a run says the same
            raise HookError(
                f"the loss asks for {key!r}, which has {len(several)} captures: say which of "
                f"{list(several)}"
            )
        return self.leaf(matches[-1])

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys(str(k) for k in self._keys.values() if k.hook != "logits"))

    def __len__(self) -> int:
        return len(list(iter(self)))


def parts(key: CaptureKey) -> tuple[str, str, str, int]:
    return key.module, key.at, key.index, key.call


def labels_of(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(B, S) int64 on the ids' device: the next token at each position, -100 where there is none.

    ids: (B, S) int64. mask: (B, S) bool."""
    labels = torch.full_like(ids, IGNORED)
    both = mask[:, 1:] & mask[:, :-1]
    labels[:, :-1] = torch.where(both, ids[:, 1:], labels[:, :-1])
    return labels


def next_token(logits: torch.Tensor, batch: LossBatch) -> torch.Tensor:
    """The mean cross-entropy of the next tokens: logits (B, S, V) -> scalar."""
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORED
    )


LOSSES: dict[str, Callable[..., torch.Tensor]] = {"next_token": next_token}


# --- computing it ---------------------------------------------------------------------


def evaluate(
    plan: RunPlan, captures: LossCaptures, modules: Mapping[str, torch.nn.Module]
) -> tuple[float, dict[int, torch.Tensor]]:
    """(the loss, index of a capture → its whole gradient, of the capture's shape and dtype on the
    captures' device). On the one rank that computes it. LossError: it cannot be computed.

    The trainable modules get their gradients here."""
    ids = torch.tensor(plan.ids)
    mask = torch.tensor(plan.mask).bool()
    batch = LossBatch(
        tokens=ids.to(captures.device),
        mask=mask.to(captures.device),
        labels=labels_of(ids, mask).to(captures.device),
        captures=captures,
        modules=modules,
    )
    with torch.enable_grad():
        value = compute(plan.loss, captures.logits(), batch)
        trained = trainable(modules)
        used = [i for i, leaf in captures.leaves.items() if leaf.requires_grad]
        inputs = [*(captures.leaves[i] for i in used), *trained]
        gradients: Sequence[torch.Tensor | None] = ()
        if inputs:
            gradients = torch.autograd.grad(value, inputs, allow_unused=True)
    for parameter, gradient in zip(trained, gradients[len(used) :], strict=True):
        add_gradient(parameter, gradient)
    of_captures = zip(used, gradients, strict=False)
    return float(value.detach()), {i: g for i, g in of_captures if g is not None}


def compute(
    loss: bytes | str | None, logits: torch.Tensor | None, batch: LossBatch
) -> torch.Tensor:
    """What the loss makes of the logits (B, S, V): a scalar with a graph.

    LossError names the user's line, or says what the loss should have returned."""
    if isinstance(loss, str):
        function = LOSSES[loss]
    else:
        function = pickle.loads(loss or b"")
    try:
        takes_logits_only = len(inspect.signature(function).parameters) == 1
        with restored_defaults():
            if takes_logits_only:
                value = function(logits)
            else:
                value = function(logits, batch)
    except HookError as error:
        raise LossError(str(error)) from error
    except LossError:
        raise
    except BaseException as error:  # SystemExit, too: the engine is not the loss's to end
        raise LossError(
            f"the loss raised {type(error).__name__}: {error}{users_line(error)}"
        ) from error
    check_scalar(value)
    return value.reshape(())


def check_scalar(value: Any) -> None:
    """LossError unless the loss returned one number with a graph. value: a scalar tensor, or
    whatever it is."""
    kind = type(value).__name__
    is_number = False
    if isinstance(value, torch.Tensor):
        kind = f"{tuple(value.shape)} {value.dtype}"
        is_number = value.numel() == 1 and value.is_floating_point()
    if not is_number:
        raise LossError(
            f"the loss returned {kind}; it has to return one number, a tensor such as x.mean()"
        )
    if not value.requires_grad:
        raise LossError(
            "the loss depends on neither logits, captures nor modules: there is nothing to "
            "differentiate"
        )


def add_gradient(parameter: torch.nn.Parameter, gradient: torch.Tensor | None) -> None:
    """Add to a parameter's gradient. gradient: the parameter's shape, dtype and device; None: there
    is none."""
    if gradient is None:
        return
    if parameter.grad is None:
        parameter.grad = gradient.detach().clone()
    else:
        parameter.grad = parameter.grad + gradient
