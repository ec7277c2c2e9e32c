"""Session: the driver's one object. Each method says what is asked in a few lines and
delegates."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from flexkernel.cluster import begin
from flexkernel.cluster.cluster import Cluster, InProcess
from flexkernel.cluster.packing import pack
from flexkernel.errors import CaptureError, HookError
from flexkernel.memory.plan import Plan, Planner
from flexkernel.wire import HookSet, Layout, ModelInfo, Source, Training

from . import generation, model, parameters, prompts
from .capture import Capture
from .experiments import Experiments, Progress
from .hooking import Hooking
from .hooks import check_groups
from .modules import Trainable
from .readonly import OthersStore
from .recovery import Recovery
from .run import Run, Store
from .status import Status
from .tree import Tree

__all__ = ["Session", "attach", "local"]


def attach(
    profile: str | None = None,
    cluster_id: str | None = None,
    take: bool = False,
    read_only: bool = False,
) -> Session:
    """A session over engines that run already; a model, hooks and runs that they hold are found
    again.

    ClusterError: another notebook has them; take=True takes them from it, read_only=True only
    looks at them."""
    return Session(begin.attach(profile, cluster_id, take, read_only=read_only))


def local() -> Session:
    """A session over one engine in this process."""
    return Session(InProcess())


class Session(Hooking, Experiments, Trainable, Recovery):
    """Engines, the model on them, its hooks and its runs."""

    def __init__(self, cluster: Cluster):
        self.cluster = cluster
        self.info: ModelInfo | None = None
        self.tokenizer: Any = None
        super().__init__()
        self.seed = 0  # of what edits draw
        self.store: Store | None = None
        if getattr(cluster, "loaded", False):
            self._recover()

    # --- life -------------------------------------------------------------------------

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    @property
    def closed(self) -> bool:
        return self.cluster.closed

    def close(self, end: bool | None = None) -> None:
        """End the session. Engines it started stop; attached and kept ones stay with their model.
        end= overrides."""
        self.cluster.may("close" if end else "inspect")
        self._forget()
        self.cluster.close(end)

    def status(self) -> Status:
        """Engines, model, hooks, memory: what there is now."""
        return Status(self)

    def on_ranks(self, function: Callable, *args: Any) -> list[Any]:
        """Run a function on every engine; its results in order of rank."""
        return self.cluster.call("call", pack(function), *args)

    # --- model ------------------------------------------------------------------------

    def load(
        self,
        source: str | os.PathLike[str] | Callable[[], Any],
        tp: int = 1,
        pp: int = 1,
        dp: int = 1,
        fsdp: int = 1,
        dtype: Any = "float32",
        device: str | None = None,
        attn: str | None = None,
        reference: Callable[[], Any] | None = None,
        names: Mapping[str, str] | Callable[[str], str | None] | None = None,
        placements: Mapping[str, str] | None = None,
        forward: Callable[[Any, Mapping[str, Any]], Any] | None = None,
        progress: Progress | None = None,
    ) -> ModelInfo:
        """Load a model folder or hub id, split over the engines: each reads only its part.
        Replaces what was loaded.

        Or a builder: it returns a rank's nn.Module, however it was distributed, and the degrees
        say how; reference() builds the unsharded one, for the scan. names: a rank's module names →
        the unsharded model's, a mapping of prefixes or a function. placements: glob → "shard:DIM",
        "replicate" or "partial", over tp, and "batch:DIM", the dim of a batch's rows. Its forward
        gets the ids and, if it takes them, attention_mask, position_ids, use_cache; if it needs
        more, forward(model, batch) calls it, for the reference too, with a dict of the first
        three. LoadError, LayoutError: refused before anything is read; the degrees multiply to the
        number of engines."""
        layout = Layout(pp, dp, fsdp, tp)
        model.check_world(layout, self.cluster.size)
        where = model.source(source, pack, reference=reference, forward=forward, names=names)
        self.cluster.ready(device or self.cluster.best_device())
        told = progress or (lambda *_: None)
        dtype = str(dtype).removeprefix("torch.")
        info = model.inspect(self.cluster, where, layout, dtype, attn, dict(placements or {}), told)
        self._forget()  # only now: what is refused leaves the loaded model as it is
        self.cluster.renew()
        info = model.load(self.cluster, where, info, told)
        self._know(info, where)
        return info

    def _know(self, info: ModelInfo, source: Source) -> None:
        self.source = source
        self.tokenizer = None if info.built else prompts.tokenizer(info.path)
        self.info, self.planner = info, Planner(info)
        self.cluster.module_names = [module.name for module in info.modules]
        self.store = (OthersStore if self.cluster.reader else Store)(self.cluster, info.layout)

    def _forget(self) -> None:
        if self.store is not None:
            self.store.close()
        self.info, self.store, self.hook_set, self._modules, self._hooks_sent = (
            None,
            None,
            HookSet(),
            {},
            True,
        )
        self._held.keep([])

    def _recover(self) -> None:
        """Find again what the engines hold: they are the source of truth."""
        if not self.cluster.reader:
            # what an earlier driver had changed for a while
            self.cluster.call("parameters.restore")
        answers = self.cluster.call("recover.rank_state")
        self._know(answers[0].info, answers[0].source)
        self.hook_set, self.edits = answers[0].hook_set, answers[0].edits
        self._recover_modules(answers[0].modules)
        assert self.store is not None
        self.store.recover([answer.runs for answer in answers], self.planner, self.tokenizer)

    def tree(self, glob: str = "**") -> Tree:
        """The modules a glob names, with shapes, placements, ranks and hooks."""
        return Tree(self._loaded(), self.hook_set, glob)

    def parameter(self, name: str) -> Capture:
        """A whole parameter or buffer, under the unsharded model's name, from whichever ranks hold
        it."""
        return parameters.read(self.cluster, self.store, self._loaded(), name)

    def parameters_edited(self, edits: Mapping[str, Any]) -> AbstractContextManager[None]:
        """`with session.parameters_edited({name: tensor, name: lambda whole: ...}):` in it the
        parameters have these values on every rank; after it, however it ends, those they had
        before, bit for bit. A function gets the whole parameter and runs once, here. Tied weights
        are one parameter: give one of their names."""
        return parameters.edited(self.cluster, self.store, self._loaded(), edits)

    # --- runs -------------------------------------------------------------------------

    def _batch(self, prompts_or_ids: Any, chat: bool = False) -> prompts.Batch:
        info = self._loaded()
        return prompts.batch(
            prompts_or_ids, self.tokenizer, chat, info.vocab_size, info.max_positions
        )

    def _plan(
        self,
        batch: prompts.Batch,
        groups: Any,
        complement: bool,
        new: int = 0,
        backward: bool = False,
    ) -> tuple[Plan, dict[str, Any]]:
        """(where what the hooks keep will lie, the fields of a RunPlan that say which hooks)."""
        groups = (groups,) if isinstance(groups, str) else tuple(groups)
        check_groups(self.hook_set, groups)
        active, (B, S) = (
            self.hook_set.active(groups, complement),
            (len(batch.ids), len(batch.ids[0])),
        )
        wanted = {
            "groups": groups,
            "complement": complement,
            "seed": self.seed,
            "hooks": self.hook_set.digest,
        }
        return self.planner.plan(active, B, S, new, backward), wanted

    @property
    def runs(self) -> list[Run]:
        """The runs that are stored, oldest first."""
        return list(self.store.runs.values()) if self.store is not None else []

    @property
    def last(self) -> Run:
        """The run that was made last: also one that was interrupted or failed, with what was whole
        (run.partial)."""
        if not self.runs:
            raise CaptureError("no run is stored: session.run(prompt)")
        return self.runs[-1]

    def run(
        self,
        prompts_or_ids: Any,
        groups: Sequence[str] | str = (),
        complement: bool = False,
        chat: bool = False,
        stop_at: str | None = None,
        loss: Callable[..., Any] | str | None = None,
    ) -> Run:
        """One forward over prompts, token ids or chat messages, with what the hooks capture.

        groups: only the hooks of these groups; complement: all but those. stop_at: end after this
        module, the rest is not computed. loss: a function (logits, batch) that returns one number,
        run once, on whole logits (B, S, V) and captures; gradients go back from it to the hooks
        that are at one. batch.tokens, .mask, .labels, .captures, .modules. "next_token" is the
        mean cross-entropy. PromptError, MemoryBudgetError: refused before the forward."""
        return self._run(prompts_or_ids, groups, complement, chat, stop_at, loss)

    def _run(
        self,
        prompts_or_ids: Any,
        groups: Sequence[str] | str = (),
        complement: bool = False,
        chat: bool = False,
        stop_at: str | None = None,
        loss: Callable[..., Any] | str | None = None,
        training: Training | None = None,
    ) -> Run:
        batch = self._batch(prompts_or_ids, chat)
        assert self.store is not None
        if stop_at is not None:
            model.check_stop(self._loaded(), stop_at)
        if loss is not None and stop_at is not None:
            raise HookError("a loss needs the whole forward: leave stop_at out")
        where, wanted = self._plan(batch, groups, complement, 0, loss is not None)
        code = loss if loss is None or isinstance(loss, str) else pack(loss)
        wanted |= {"stop_at": stop_at, "loss": code, "training": training}
        return self.store.run(batch, where, self.tokenizer, wanted)

    def generate(
        self,
        prompts_or_ids: Any,
        max_new_tokens: int = 32,
        groups: Sequence[str] | str = (),
        complement: bool = False,
        chat: bool = False,
        on_token: Callable[[int, str], Any] | None = None,
        seed: int | None = None,
        **options: Any,
    ) -> Run:
        """Go on after prompts, token ids or chat messages, greedily unless do_sample=True; hooks
        fire at every step.

        Captures cover the prompt and all new tokens but the last, which is never fed.
        on_token(row, text) is told the text as it comes. options: of transformers' generate,
        temperature=, top_k=, top_p=, repetition_penalty=, eos_token_id=, ... seed: of what is
        drawn, else a new one each time (run.seed). GenerationError, PromptError,
        MemoryBudgetError: refused before the first forward."""
        batch = self._batch(prompts_or_ids, chat)
        asked = generation.asked(max_new_tokens, options, batch, self._loaded().max_positions, seed)
        where, wanted = self._plan(batch, groups, complement, max_new_tokens)
        assert self.store is not None
        return self.store.run(
            batch, where, self.tokenizer, wanted | {"generation": asked}, on_token
        )
