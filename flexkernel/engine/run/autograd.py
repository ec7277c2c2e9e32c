"""The gradients of one run: a loss on whole logits and captures, and each rank's backward from its
own ends.

The loss is computed once, on rank 0, on leaves without a graph; the gradients of these go through
shared memory to the ranks that hold the activations, and each rank makes one backward from what it
holds. Over tp a value of which every rank has all has a gradient of which every rank has all; over
dp and fsdp each rank has its rows'; the stages of a pipeline go back one after another. Nothing is
averaged and nothing is scaled.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import pickle
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from flexkernel.boxes import WHOLE, Box
from flexkernel.engine.compat import stage_edges, without_gradient_sync
from flexkernel.engine.model.pytree import users_line
from flexkernel.engine.place.placements import Place, Placed
from flexkernel.engine.ranks.gather import (
    OtherRankFailed,
    fetched,
    gathered,
    header,
    post,
    receive,
    send,
)
from flexkernel.engine.runtime import Runtime
from flexkernel.errors import HookError, LossError
from flexkernel.memory.plan import Entry
from flexkernel.memory.slab import PAGE, Slab, pages, size_of
from flexkernel.wire import CaptureKey, Region, RunPlan

from .gradients import parameter_of
from .sandbox import restored_defaults

__all__ = [
    "Batch",
    "Tape",
    "backward",
    "differentiable",
    "graph_of",
    "trainable",
    "watched",
]

IGNORED = -100  # torch's own: a label that cross_entropy leaves out


@dataclass
class Tape:
    """What one rank's backward begins from.

    graph: whether the forward keeps a graph at all. ends: index in the plan → this rank's part of
    that capture, with its graph, which part of the whole it is, and whether its gradient counts
    here. sent, received: what went to the next pipeline stage and came from the one before."""

    graph: bool
    ends: dict[int, tuple[torch.Tensor, Any, bool]] = field(default_factory=dict)
    sent: torch.Tensor | None = None
    received: torch.Tensor | None = None

    def forget(self) -> None:
        """Let go of the graph. Its hooks know the recording, which knows this tape: a ring that no
        collector sees through, and that would hold the model and its groups for ever."""
        self.ends.clear()
        self.sent = self.received = None

    def end(self, i: int, local: torch.Tensor, placed: Placed, here: Place, batched: bool) -> None:
        """Note where a capture's gradient would come in. Of ranks that hold copies for other rows
        of the batch the first counts; a rank whose rows nobody wants gets zeros."""
        counts = not here.idle if batched else here.coordinate.batch == 0
        self.ends[i] = local, placed.shard, counts


# --- the graph ------------------------------------------------------------------------


@contextlib.contextmanager
def graph_of(runtime: Runtime, tape: Tape | None, parameters: Sequence[str]) -> Iterator[None]:
    """While it is entered a forward keeps its graph on the tape, if the tape says so, and these
    parameters get a gradient; those that this rank does not hold are left out."""
    if tape is None or not tape.graph:
        with torch.no_grad():
            yield
        return
    owned = {id(p): p for name in parameters if (p := parameter_of(runtime, name)) is not None}
    frozen = [p for p in owned.values() if not p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        with (
            torch.enable_grad(),
            stage_edges(runtime.part.model, tape),
            without_gradient_sync(runtime.part.model),
        ):
            yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


# --- the loss -------------------------------------------------------------------------


@dataclass
class Batch:
    """What a loss is told beside the logits.

    tokens: ids (B, S). mask: (B, S) bool, False on pads. labels: (B, S), at each position the next
    token; -100, which cross_entropy leaves out, at the last one and where a pad is either.
    captures: by module name, or (module, at, index, call), each whole. modules: the trainable
    ones."""

    tokens: torch.Tensor
    mask: torch.Tensor
    labels: torch.Tensor
    captures: Mapping[Any, torch.Tensor]
    modules: Mapping[str, torch.nn.Module]


class Leaves(Mapping):
    """The captures of a run as leaves of the loss's graph, each made when it is first asked
    for."""

    def __init__(self, entries: Sequence[Entry], whole: Callable[[int], torch.Tensor]):
        self._keys = {
            i: e.key for i, e in enumerate(entries) if not e.hook.gradient and e.hook.reduce is None
        }
        self._whole, self.made = whole, {}  # type: ignore[var-annotated]

    def leaf(self, i: int) -> torch.Tensor:
        if i not in self.made:
            value = self._whole(i)
            self.made[i] = value.requires_grad_(value.is_floating_point())
        return self.made[i]

    def __getitem__(self, key: Any) -> torch.Tensor:
        wanted = key if isinstance(key, tuple) else (key,)
        own = [i for i, k in self._keys.items() if k.hook != "logits"]
        found = [i for i in own if parts(self._keys[i])[: len(wanted)] == wanted] or [
            i for i in own if self._keys[i].hook == key
        ]
        if not found:
            raise HookError(
                f"the loss asks for the capture {key!r}; the run captures {[str(k) for k in self] or 'none'}"
            )
        several = dict.fromkeys(parts(self._keys[i]) for i in found)
        if len(several) > 1:  # as a run says, too
            raise HookError(
                f"the loss asks for {key!r}, which has {len(several)} captures: say which of {list(several)}"
            )
        return self.leaf(found[-1])

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys(str(k) for k in self._keys.values() if k.hook != "logits"))

    def __len__(self) -> int:
        return len(list(iter(self)))


def parts(key: CaptureKey) -> tuple:
    return key.module, key.at, key.index, key.call


def labels_of(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The next token at each position, -100 where there is none."""
    labels = torch.full_like(ids, IGNORED)
    both = mask[:, 1:] & mask[:, :-1]
    labels[:, :-1] = torch.where(both, ids[:, 1:], labels[:, :-1])
    return labels


def next_token(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """The mean cross-entropy of the next tokens."""
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORED
    )


LOSSES: dict[str, Callable] = {"next_token": next_token}


NOTHING, WRITTEN, FAILED = range(3)
# of what a rank says of a capture: state, digest, part held, elements written, part written
COLUMNS = 4 + Box.NUMBERS


def said_of(recording: Any) -> torch.Tensor:
    """What this rank's captures came to, (entries, COLUMNS) int64: whoever computes the loss must
    not read what is not there, or differs between copies, or is a sum's addend."""
    rows = []
    for i, entry in enumerate(recording.plan.entries):
        seen = recording.planned.get(i)
        if seen is None:
            rows.append([NOTHING] + [0] * (COLUMNS - 1))
            continue
        state = FAILED if seen.error is not None or seen.partial else WRITTEN
        empty = seen.shard.is_empty
        box = seen.written if seen.written is not None and not empty else None
        size = 0 if box is None else box.volume(entry.shape)
        digest = (seen.digest + (1 << 63)) % (1 << 64) - (1 << 63)
        held = -1 if empty else zlib.crc32(repr(seen.shard).encode())
        rows.append([state, digest, held, size, *(box or WHOLE).numbers()])
    return torch.tensor(rows, dtype=torch.int64).view(-1, COLUMNS)


def check_whole(entry: Entry, said: torch.Tensor) -> None:
    """LossError unless the capture is whole and its copies agree. said: (ranks, COLUMNS), as
    above."""
    rows = said.tolist()
    if any(state == FAILED for state, *_ in rows):
        raise LossError(
            f"the loss asks for {entry.key}, which some rank could not put into its place, or holds an addend of: "
            "a run without a loss says why"
        )
    digests: dict[int, set[int]] = {}
    written: dict[tuple[int, ...], int] = {}
    for state, digest, held, size, *box in rows:
        if state == WRITTEN and size:
            written[tuple(box)] = size
        if state == WRITTEN and held != -1:
            digests.setdefault(held, set()).add(digest)
    if any(len(found) > 1 for found in digests.values()):
        raise LossError(f"the loss asks for {entry.key}, of which ranks hold copies that differ")
    if sum(written.values()) != math.prod(entry.shape):
        raise LossError(f"the loss asks for {entry.key}, which did not come, or not all of it")


def evaluated(
    runtime: Runtime, plan: RunPlan, recording: Any, said: torch.Tensor
) -> tuple[float, dict[int, torch.Tensor]]:
    """(the loss, index of a capture → its gradient), on the one rank that computes it. LossError.

    said: (ranks, entries, COLUMNS), what each rank's captures came to."""
    entries = recording.plan.entries

    def whole(i: int) -> torch.Tensor:
        check_whole(entries[i], said[:, i])
        return recording.slab.tensor(recording.region(entries[i])).to(runtime.device, copy=True)

    leaves = Leaves(entries, whole)
    ids, mask = torch.tensor(plan.ids), torch.tensor(plan.mask).bool()
    tokens, real, labels = (t.to(runtime.device) for t in (ids, mask, labels_of(ids, mask)))
    batch = Batch(tokens, real, labels, leaves, runtime.trainables.modules)
    number = next((i for i, entry in enumerate(entries) if entry.key.hook == "logits"), None)
    with torch.enable_grad():
        value = scalar(plan.loss, leaves.leaf(number) if number is not None else None, batch)
        trained = trainable(runtime.trainables.modules)
        asked = [i for i, leaf in leaves.made.items() if leaf.requires_grad]
        wanted = [*(leaves.made[i] for i in asked), *trained]
        found = torch.autograd.grad(value, wanted, allow_unused=True) if wanted else ()
    for parameter, gradient in zip(trained, found[len(asked) :], strict=True):
        add_gradient(parameter, gradient)
    return float(value.detach()), {
        i: g for i, g in zip(asked, found, strict=False) if g is not None
    }


def scalar(loss: bytes | str | None, logits: torch.Tensor | None, batch: Batch) -> torch.Tensor:
    """What the user's loss makes of them. LossError names its line, or says what it should have
    returned."""
    assert loss is not None
    function = LOSSES[loss] if isinstance(loss, str) else pickle.loads(loss)
    try:
        takes = len(inspect.signature(function).parameters)
        with restored_defaults():
            value = function(logits) if takes == 1 else function(logits, batch)
    except HookError as error:
        raise LossError(str(error)) from error
    except LossError:
        raise
    except (
        BaseException
    ) as error:  # SystemExit and KeyboardInterrupt in it too: the engine is not the loss's to end
        raise LossError(
            f"the loss raised {type(error).__name__}: {error}{users_line(error)}"
        ) from error
    if not isinstance(value, torch.Tensor) or value.numel() != 1 or not value.is_floating_point():
        what = (
            f"{tuple(value.shape)} {value.dtype}"
            if isinstance(value, torch.Tensor)
            else type(value).__name__
        )
        raise LossError(
            f"the loss returned {what}; it has to return one number, a tensor such as x.mean()"
        )
    if not value.requires_grad:
        raise LossError(
            "the loss depends on neither logits, captures nor modules: there is nothing to differentiate"
        )
    return value.reshape(())


def add_gradient(parameter: torch.Tensor, gradient: torch.Tensor | None) -> None:
    if gradient is not None:
        parameter.grad = (
            gradient.detach().clone() if parameter.grad is None else parameter.grad + gradient
        )


# --- backward -------------------------------------------------------------------------


def backward(
    runtime: Runtime, plan: RunPlan, recording: Any, slab_of: Callable[[str, int], Slab]
) -> float | None:
    """The loss, on the rank that computes it, and this rank's share of the backward. All ranks
    must call."""
    tape: Tape = recording.tape
    value, gradients = seeds(runtime, plan, recording, slab_of)
    if tape.graph:
        ends, grads = [], []
        for i, (local, holds, counts) in tape.ends.items():
            if i in gradients and local.requires_grad:
                gradient = holds.cut(gradients[i]).to(local.device)
                ends.append(local)
                grads.append(gradient.clone() if counts else torch.zeros_like(local))
        go_back(runtime, tape, ends, grads, plan.timeout_s)
    return value


def seeds(
    runtime: Runtime, plan: RunPlan, recording: Any, slab_of: Callable[[str, int], Slab]
) -> tuple[float | None, dict[int, torch.Tensor]]:
    """The loss, on rank 0, and the whole gradients of the captures it looked at, on every rank."""
    if runtime.world == 1:
        return evaluated(runtime, plan, recording, said_of(recording)[None])
    what = zlib.crc32(b"the loss")
    entries = recording.plan.entries
    said_by = gathered(said_of(recording), plan.timeout_s)  # all have written what they captured
    collect(runtime, recording, said_by, plan.timeout_s)
    value, problem = 0.0, None
    found: dict[int, torch.Tensor] = {}
    if runtime.rank == 0:
        try:
            value, found = evaluated(runtime, plan, recording, said_by)
        except LossError as error:
            problem = error
    size = lambda i: pages(size_of(entries[i].shape, entries[i].formula.dtype))  # noqa: E731
    num_bytes = sum(map(size, found))
    said = header(
        [plan.run, what, int(problem is not None), len(found), num_bytes, bits(value)],
        plan.timeout_s,
    )
    if problem is not None:
        raise problem
    if said[0, 2]:
        raise OtherRankFailed("the loss failed on rank 0")
    count, num_bytes = int(said[0, 3]), int(said[0, 4])
    if count == 0:
        return (value if runtime.rank == 0 else None), {}
    index = Region("", 0, (count,), "int64")
    slab = slab_of("gradients", pages(8 * count) + max(num_bytes, PAGE))
    data = lambda i, at: slab.tensor(Region("", at, entries[i].shape, entries[i].formula.dtype))  # noqa: E731
    if runtime.rank == 0:
        slab.tensor(index).copy_(torch.tensor(list(found)))
        at = pages(8 * count)
        for i, gradient in found.items():
            data(i, at).copy_(gradient)
            at += size(i)
    hand_out(runtime, slab.bytes[: pages(8 * count) + num_bytes], plan.timeout_s)
    header([plan.run, what + 1], plan.timeout_s)  # it lies there
    wholes, at = {}, pages(8 * count)
    for i in slab.tensor(index).tolist():
        wholes[i] = data(i, at)
        at += size(i)
    return (value if runtime.rank == 0 else None), wholes


def collect(runtime: Runtime, recording: Any, said: torch.Tensor, timeout_s: float) -> None:
    """Bring to rank 0's host what ranks of other hosts have captured: there the loss looks at it.
    All ranks.

    said: (ranks, entries, COLUMNS), what each rank's captures came to."""
    hosts, entries = runtime.rank_info.hosts, recording.plan.entries
    for rank in [r for r, host in enumerate(hosts) if host != hosts[0]]:
        for i, (state, _, _, size, *numbers) in enumerate(said[rank].tolist()):
            if (
                state != WRITTEN
                or not size
                or entries[i].hook.reduce is not None
                or runtime.rank not in (0, rank)
            ):
                continue
            region, box = recording.region(entries[i]), Box.from_numbers(numbers)
            part = box.cut(recording.slab.tensor(region))
            if runtime.rank == rank:
                post(part, 0, None, timeout_s)
            else:
                part.copy_(fetched(part.shape, part.dtype, rank, None, timeout_s))


def hand_out(runtime: Runtime, shared: torch.Tensor, timeout_s: float) -> None:
    """What rank 0 has put there, to the first rank of every other host, into its own slab at the
    same place."""
    hosts = runtime.rank_info.hosts
    for rank in [r for r, host in enumerate(hosts) if host != hosts[0] and hosts.index(host) == r]:
        if runtime.rank == 0:
            post(shared, rank, None, timeout_s)
        elif runtime.rank == rank:
            shared.copy_(fetched(shared.shape, shared.dtype, 0, None, timeout_s))


def go_back(
    runtime: Runtime,
    tape: Tape,
    ends: list[torch.Tensor],
    gradients: list[torch.Tensor],
    timeout_s: float,
) -> None:
    """This rank's backward. A stage first waits for the gradient of what it sent, and sends that
    of what it got: zeros where nothing depends on it, since the stage before waits."""
    if tape.sent is not None:
        gradient = receive(runtime.part.model, torch.empty_like(tape.sent), +1, timeout_s)
        if tape.sent.requires_grad:
            ends, gradients = [*ends, tape.sent], [*gradients, gradient]
    if ends:
        torch.autograd.backward(ends, gradients)
    if tape.received is not None:
        gradient = tape.received.grad
        send(
            runtime.part.model,
            torch.zeros_like(tape.received) if gradient is None else gradient,
            -1,
            timeout_s,
        )


def bits(value: float) -> int:
    """A float64 as the int64 of the same bits, which is what a header carries."""
    return struct.unpack("<q", struct.pack("<d", value))[0]


# --- edits ----------------------------------------------------------------------------


class Meeting(torch.autograd.Function):
    """An edit of a whole activation that lies in parts: the parts meet on one rank, going forward
    for the edit, going back for its vector-Jacobian product. The anchor keeps every rank in the
    graph, also one whose part has none: a rank that stayed out of the backward would leave the
    others waiting."""

    @staticmethod
    def forward(
        ctx: Any, local: torch.Tensor, anchor: torch.Tensor, meet: Callable, edit: Callable
    ) -> torch.Tensor:
        ctx.meet, ctx.inner = meet, None

        def edited(x: torch.Tensor) -> torch.Tensor:
            with torch.enable_grad():
                leaf = x.detach().clone().requires_grad_()
                new = edit(leaf.clone())  # the edit may write into it
            ctx.inner = leaf, new
            return new.detach()

        return meet(local.detach(), edited, "")

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple:
        def product(whole: torch.Tensor) -> torch.Tensor:
            leaf, new = ctx.inner
            if not new.requires_grad:
                return torch.zeros_like(leaf)
            # modules in the edit get their gradients here
            torch.autograd.backward([new], [whole.clone()])
            return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad

        return ctx.meet(gradient.contiguous(), product, " backward"), None, None, None


def differentiable(local: torch.Tensor, meet: Callable, edit: Callable) -> torch.Tensor:
    """meet(local, edit, "") with a gradient. meet(part, function, what): function of the whole,
    run on one rank."""
    if not torch.is_grad_enabled():
        return meet(local, edit, "")
    anchor = torch.zeros((), requires_grad=True, device=local.device)
    return Meeting.apply(local, anchor, meet, edit)


def watched(
    tensor: torch.Tensor, arrived: Callable[[torch.Tensor], torch.Tensor | None]
) -> torch.Tensor:
    """The same numbers, as a view of which arrived(gradient) is told; what it returns goes on in
    the gradient's place. A view: the value may have other uses, whose gradients are not this
    module's. HookError: it can have no gradient."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        raise HookError(f"a value of {tensor.dtype} has no gradient")
    source = tensor if tensor.requires_grad else tensor.detach().requires_grad_()
    view = source.view_as(source)
    view.register_hook(arrived)
    return view


# --- modules --------------------------------------------------------------------------


def trainable(modules: Mapping[str, torch.nn.Module]) -> list[torch.nn.Parameter]:
    """The parameters of these modules that are trained, in an order that is the same on every
    rank."""
    return [p for name in sorted(modules) for p in modules[name].parameters() if p.requires_grad]
