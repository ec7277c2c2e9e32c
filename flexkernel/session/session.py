"""Session: the driver's one object. It holds the parts and has the verbs of every day."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, overload

from flexkernel.cluster import begin
from flexkernel.cluster.cluster import Cluster, InProcess, ranks_to_replace
from flexkernel.cluster.packing import pack
from flexkernel.errors import CaptureError, HookError, LoadError
from flexkernel.memory.plan import Plan
from flexkernel.wire import HookSpec, Layout, ModelInfo, RankState, Training, dtype_name

from . import generation, model, parameters, prompts
from .capture import Capture
from .edits import Edit
from .hooks import Hook, HookBook
from .model import Loaded
from .modules import Modules
from .progress import Bar, Progress, reporting
from .readonly import OthersStore
from .run import Run
from .runner import Runner
from .status import Guarantees, Status
from .store import Store
from .tree import Tree

if TYPE_CHECKING:
    import torch

    from flexkernel.experiments import Dataset, Preview, Sweep, Verification

__all__ = ["Session", "attach", "local"]


def attach(
    profile: str | None = None,
    cluster_id: str | None = None,
    take: bool = False,
    read_only: bool = False,
    progress: Progress | None = None,
) -> Session:
    """A session over engines that run already. It finds their model, hooks and runs.

    progress: called with (what is being done, how many engines are there, of how many).
    ClusterError: another notebook has them. take=True takes them from it, read_only=True only
    looks at them."""
    joined = begin.attach(profile, cluster_id, take, read_only=read_only, progress=progress)
    return Session(joined)


def local() -> Session:
    """A session over one engine in this process."""
    return Session(InProcess())


class Session:
    """Engines, the model on them, its hooks, its trainable modules and its runs.

    engines: the cluster; .timeout_s, .auto_restart. hooks: the book of hooks and edits. modules:
    the trainable modules by name. seed: of what edits draw. bar: how a notebook shows progress."""

    bar: Bar | None = None

    def __init__(self, engines: Cluster):
        self.engines = engines
        self.hooks = HookBook(self.call)
        self.modules = Modules(self.call, lambda: self.loaded)
        self.seed = 0
        self._loaded: Loaded | None = None
        self._store: Store | None = None
        if engines.loaded:
            self._recover()

    # --- parts that a load replaces ---------------------------------------------------

    @property
    def loaded(self) -> Loaded:
        """The loaded model: .info, .planner, .source, .tokenizer. LoadError: none is loaded."""
        if self._loaded is None:
            raise LoadError(model.NONE_LOADED)
        return self._loaded

    @property
    def has_model(self) -> bool:
        """Whether a model is loaded."""
        return self._loaded is not None

    @property
    def store(self) -> Store:
        """The runs of the loaded model and their memory. LoadError: no model is loaded."""
        if self._store is None:
            raise LoadError(model.NONE_LOADED)
        return self._store

    @property
    def tokenizer(self) -> Any:
        """The loaded model's tokenizer. None: its folder has none, or no model is loaded."""
        return None if self._loaded is None else self._loaded.tokenizer

    # --- life -------------------------------------------------------------------------

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def close(self, end: bool | None = None) -> None:
        """End the session. Engines that it started stop; attached and kept ones stay with their
        model. end: overrides that."""
        self.engines.check_allowed("close" if end else "inspect")
        self._forget()
        self.engines.close(end)

    def status(self) -> Status:
        """Engines, model, memory, hooks and runs as they are now."""
        return Status(self.engines, self._loaded, self._store, self.hooks)

    def guarantees(self) -> Guarantees:
        """What can be counted on for these engines: when they end, who replaces a dead one."""
        return Guarantees(self.engines)

    def __repr__(self) -> str:
        return repr(self.status())

    def _repr_html_(self) -> str:
        return self.status()._repr_html_()

    def call(
        self,
        method: str,
        *args: Any,
        ranks: Sequence[int] | None = None,
        each: Sequence[tuple] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[Any]:
        """Each rank's answer to a method of the engine, in order of rank.

        Dead engines are replaced first if session.engines.auto_restart is set. each: arguments of
        their own for each rank."""
        if ranks is None:
            self._revive()
        return self.engines.call(method, *args, ranks=ranks, each=each, progress=progress)

    def on_ranks(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Run a function on every engine. Returns its results in order of rank."""
        return self.call("call", pack(function), *args)

    def restart(self, rank: int | Sequence[int] | None = None) -> list[int]:
        """Replace engines by new ones, by default those that have died. Returns their ranks.

        Each new engine loads its rank's part of the model; the others keep theirs. Hooks, edits
        and stored runs stay. What an edit saved in ctx.save on a rank that died is lost. A rank
        whose engine runs or hangs is ended first. ClusterError: there is nothing to replace, or no
        engine can be started."""
        ranks = ranks_to_replace(self.engines, rank)
        self.engines.replace(ranks, self._rank_states(ranks))
        if self._store is not None:
            self._store.reconnect()
            self.engines.call("train.reset_optimizers")
            self.hooks.send()
        return ranks

    def _revive(self) -> None:
        """Replace dead engines, if the user wants that."""
        engines = self.engines
        if not engines.auto_restart or engines.closed or engines.reader:
            return
        if not all(engines.answering()):
            self.restart()

    def _rank_states(self, ranks: Sequence[int]) -> dict[int, RankState]:
        """What the new engines of these ranks are given; nothing while no model is loaded."""
        if self._loaded is None or self._store is None:
            return {}
        alive = [rank for rank, lives in enumerate(self.engines.alive()) if lives]
        survivors = [rank for rank in alive if rank not in ranks][:1]
        modules = self.modules.state()
        runs: dict[int, Any] = {}
        if survivors:
            answer = self.engines.call("recover.rank_state", ranks=survivors)[0]
            modules = answer.modules
            runs = answer.runs
        info, source = self._loaded.info, self._loaded.source
        return {
            rank: RankState(
                info,
                source,
                self.hooks.hook_set,
                self.hooks.edits,
                self._store.records(rank, runs, self._loaded.planner),
                modules,
            )
            for rank in ranks
        }

    # --- the model --------------------------------------------------------------------

    def load(  # noqa: PLR0913 - a user's keywords
        self,
        source: str | os.PathLike[str] | Callable[[], torch.nn.Module],
        tp: int = 1,
        pp: int = 1,
        dp: int = 1,
        fsdp: int = 1,
        dtype: str | torch.dtype = "float32",
        device: str | None = None,
        attn: str | None = None,
        reference: Callable[[], torch.nn.Module] | None = None,
        names: Mapping[str, str] | Callable[[str], str | None] | None = None,
        placements: Mapping[str, str] | None = None,
        forward: Callable[[Any, Mapping[str, Any]], Any] | None = None,
        progress: Progress | None = None,
    ) -> ModelInfo:
        """Load a model folder or hub id, split over the engines. It replaces the loaded model.

        The degrees multiply to the number of engines; each engine reads only its part. Without any
        degree the model is split as it can be: by tp, else fsdp, else pp, else dp. source may be a
        builder instead: it returns a rank's nn.Module, however that is distributed, and the
        degrees say how.

        reference: builds the unsharded model, for the scan of shapes. names: a rank's module names
        → the unsharded model's, as a mapping of prefixes or a function. placements: glob →
        "shard:DIM", "replicate" or "partial", over tp, and "batch:DIM", the dim of a batch's rows.
        forward: forward(model, batch) calls a model that takes more than ids, attention_mask,
        position_ids and use_cache; batch is a dict of the first three. LoadError, LayoutError:
        refused before anything is read."""
        degrees = Layout(pp, dp, fsdp, tp)
        model.check_degrees(degrees)
        where = model.source(source, pack, reference=reference, forward=forward, names=names)
        kind = dtype_name(dtype)
        name = where.path.rstrip("/").rpartition("/")[2]
        with reporting(self.bar, progress, name, "engine", self.engines.size) as report:
            self.engines.use_device(device or self.engines.best_device())
            layout = model.fitted(self.engines, where, degrees)
            info = model.inspect(
                self.engines, where, layout, kind, attn, dict(placements or {}), report
            )
            self._forget()  # only now: what is refused leaves the loaded model as it is
            self.engines.renew_groups()
            info = model.load(self.engines, where, info, report)
            self._begin(Loaded.of(info, where))
            report("loaded", layout.world, layout.world)
        return info

    def _begin(self, loaded: Loaded) -> None:
        """Work with this model from here on."""
        kind = OthersStore if self.engines.reader else Store
        self._store = kind(self.engines, loaded.info.layout)
        self._loaded = loaded
        self.hooks.begin(loaded)

    def _forget(self) -> None:
        if self._store is not None:
            self._store.close()
        self._loaded = None
        self._store = None
        self.hooks.end()
        self.modules.end()

    def _recover(self) -> None:
        """Find again what the engines hold. They are the source of truth."""
        if not self.engines.reader:
            # what an earlier driver had changed for a while
            self.engines.call("parameters.restore")
        answers = self.engines.call("recover.rank_state")
        first = answers[0]
        self._begin(Loaded.of(first.info, first.source))
        self.hooks.adopt(first.hook_set, first.edits)
        self.modules.adopt(first.modules)
        self.store.recover([answer.runs for answer in answers], self.loaded.planner, self.tokenizer)

    def tree(self, glob: str = "**") -> Tree:
        """The modules of a glob, with shapes, placements, ranks and hooks."""
        return Tree(self.loaded.info, self.hooks.hook_set, glob)

    def parameter(self, name: str) -> Capture:
        """A whole parameter or buffer, under its name in the unsharded model, from whichever ranks
        hold it."""
        self._revive()
        return parameters.read(self.store, self.loaded.info, name)

    def parameter_shapes(self, glob: str = "**") -> dict[str, tuple[int, ...]]:
        """Name → whole shape, of the model's parameters and of the trainable modules'. Those are
        called NAME.weight."""
        return parameters.shapes(self.loaded.info, self.modules.shapes(), glob)

    def parameters_edited(self, edits: Mapping[str, Any]) -> AbstractContextManager[None]:
        """`with session.parameters_edited({name: tensor, name: lambda whole: ...}):` gives these
        parameters other values on every rank, for the block.

        After it, however it ends, they are what they were, bit for bit. A function gets the whole
        parameter and runs once, here. Tied weights are one parameter: give one of their names."""
        self._revive()
        return parameters.edited(self.store, self.loaded.info, edits)

    # --- hooks and edits --------------------------------------------------------------

    def hook(  # noqa: PLR0913 - a user's keywords
        self,
        glob: str,
        at: str = "output",
        index: str | int | None = None,
        edit: str | Edit | None = None,
        groups: Sequence[str] | str = (),
        capture: str = "after",
        positions: Sequence[int] | int | None = None,
        name: str = "",
        value: Any = None,
        heads: Sequence[int] | int | None = None,
        neurons: Sequence[int] | int | None = None,
        reduce: str | None = None,
        replace: bool = False,
    ) -> Hook:
        """Capture what the modules of this glob put out (at="output") or take in ("input") in
        every run from here on.

        at="grad_output", "grad_input": the gradient of that value, in runs with a loss: of what
        the module itself put out, before its edits. at="param_grad": of the parameters that the
        glob names. Reads change no other number, but for "grad_input": it adds up a value's uses
        in another order, as torch's own full backward hooks do.

        index: path of a tensor in the value ("0", "logits", "0.1"); by default its first.
        positions: keep only these, of the padded batch, in a generation of all the text; -1 is
        each forward's last one. A hook is its name, else (glob, at, index): hooking again replaces
        it.

        edit: change the value, by a preset (zero mean scale add set project_out clamp noise patch;
        value: what it takes), by the name of an edit that you defined, or by a function (x, ctx);
        at these positions, heads (of @q @k @v @pattern @z) and neurons (of the last dim) only.
        capture: what is kept of an edited activation, "after" the edit, "before" it, "both" or
        "none". Edits of the same values add up; the same edit of the same parts is one, of which
        the last value counts. replace: of all these only this one stays.

        reduce: keep only this: "norm:-1", "mean:0,1", "amax", ... over these dims or all, computed
        where the shards lie, over rows and positions without pads; "last" is positions=-1.
        HookError: no such module."""
        options = {
            "at": at,
            "index": index,
            "groups": groups,
            "capture": capture,
            "positions": positions,
            "name": name,
            "heads": heads,
            "neurons": neurons,
            "reduce": reduce,
        }
        near = set(self.engines.hosts) <= {self.store.here}
        return self.hooks.hook(glob, edit, value, near, replace, options)

    @overload
    def hooked(self, glob: str, /, **options: Any) -> AbstractContextManager[Hook]: ...
    @overload
    def hooked(self, /, *specs: HookSpec) -> AbstractContextManager[list[Hook]]: ...
    def hooked(self, /, *what: Any, **options: Any) -> AbstractContextManager[Any]:
        """`with session.hooked(glob, edit=fn):` hooks as hook() does, for the block. After it the
        hooks are what they were.

        Takes HookSpecs instead of a glob, too."""
        if len(what) == 1 and isinstance(what[0], str):
            return self.hooks.restored(lambda: self.hook(what[0], **options))
        return self.hooks.restored(lambda: self.hooks.put(what))

    def unhook(self, glob_or_name: str | None = None) -> list[str]:
        """Remove hooks, by name or by the glob they were given; all if none is named. Returns
        their names."""
        self.loaded  # noqa: B018  (LoadError)
        return self.hooks.remove(glob_or_name)

    def edit(self, name: str, per: str = "whole") -> Callable[[Edit], Edit]:
        """A decorator: `@session.edit("name")` defines an edit, a function (x, ctx) that returns a
        tensor like x.

        per: "whole" sees the whole activation and runs once, "row" each group's rows of the batch
        by themselves, "element" the shards where they lie. ctx.module, .tokens, .mask, .positions;
        .save, a dict that lives on."""
        return self.hooks.defining(name, per)

    # --- runs -------------------------------------------------------------------------

    def batch(self, prompts_or_ids: prompts.Prompts, chat: bool = False) -> prompts.Batch:
        """Prompts, token ids or chat messages as the batch that a run of them takes. PromptError:
        the loaded model cannot take them."""
        info = self.loaded.info
        return prompts.batch(
            prompts_or_ids, self.tokenizer, chat, info.vocab_size, info.max_positions
        )

    def plan(
        self,
        batch: prompts.Batch,
        groups: Sequence[str] | str = (),
        complement: bool = False,
        new: int = 0,
        backward: bool = False,
    ) -> Plan:
        """Where the captures of a run of this batch will lie, in bytes.

        new: of a generation, how many tokens at most. backward: the run has a loss."""
        active = self.hooks.active(groups, complement)
        return self.loaded.planner.plan(active, len(batch.ids), len(batch.ids[0]), new, backward)

    @property
    def runs(self) -> list[Run]:
        """The runs that are stored, oldest first."""
        return [] if self._store is None else list(self._store.runs.values())

    @property
    def last(self) -> Run:
        """The run that was made last: also one that was interrupted or failed, with what was whole
        by then (run.partial)."""
        if not self.runs:
            raise CaptureError("no run is stored: session.run(prompt)")
        return self.runs[-1]

    def run(
        self,
        prompts_or_ids: prompts.Prompts,
        groups: Sequence[str] | str = (),
        complement: bool = False,
        chat: bool = False,
        stop_at: str | None = None,
        loss: Callable[..., torch.Tensor] | str | None = None,
    ) -> Run:
        """One forward over prompts, token ids or chat messages, with what the hooks capture.

        groups: only the hooks of these groups; complement: all but those. stop_at: end after this
        module, the rest is not computed. loss: a function (logits, batch) that returns one number,
        run once, on whole logits (B, S, V) and captures; gradients go back from it to the hooks
        that are at one. batch.tokens, .mask, .labels, .captures, .modules. "next_token" is the
        mean cross-entropy. PromptError, MemoryBudgetError: refused before the forward."""
        batch = self.batch(prompts_or_ids, chat)
        if stop_at is not None:
            model.check_stop(self.loaded.info, stop_at)
        if loss is not None and stop_at is not None:
            raise HookError("a loss needs the whole forward: leave stop_at out")
        where = self.plan(batch, groups, complement, backward=loss is not None)
        wanted = self._hook_fields(groups, complement)
        return self._run(batch, where, {**wanted, "stop_at": stop_at, "loss": code_of(loss)})

    def generate(
        self,
        prompts_or_ids: prompts.Prompts,
        max_new_tokens: int = 32,
        groups: Sequence[str] | str = (),
        complement: bool = False,
        chat: bool = False,
        on_token: Callable[[int, str], Any] | None = None,
        seed: int | None = None,
        **options: Any,
    ) -> Run:
        """Continue prompts, token ids or chat messages, greedily unless do_sample=True; hooks fire
        at every step.

        Captures cover the prompt and all new tokens but the last, which is never fed.
        on_token(row, text) is called with the text as it comes. options: of transformers'
        generate: temperature=, top_k=, top_p=, repetition_penalty=, eos_token_id=, ... seed: of
        what is drawn, else a new one each time (run.seed). GenerationError, PromptError,
        MemoryBudgetError: refused before the first forward."""
        batch = self.batch(prompts_or_ids, chat)
        most = self.loaded.info.max_positions
        asked = generation.request(max_new_tokens, options, batch, most, seed)
        where = self.plan(batch, groups, complement, max_new_tokens)
        wanted = {**self._hook_fields(groups, complement), "generation": asked}
        return self._run(batch, where, wanted, on_token)

    def train_step(
        self,
        prompts_or_ids: prompts.Prompts,
        loss: Callable[..., torch.Tensor] | str,
        optimizer: Callable[[list[torch.Tensor]], torch.optim.Optimizer] | None = None,
        parameters: str | Sequence[str] = (),
        modules: Sequence[str] | None = None,
        chat: bool = False,
    ) -> float:
        """One forward, one backward, one step of the optimizer. Returns the loss, a scalar.

        The model stays as it is, but for `parameters`: names or globs of its own that are trained
        as well. optimizer: makes a torch optimizer of parameters, by default AdamW with lr 1e-3;
        the same function goes on where it stopped. modules: names of trainable modules, all by
        default. LossError: as run()."""
        trained = self.modules.trained(modules)
        own = model.trainable(self.loaded.info, parameters)
        if not trained and not own:
            raise HookError(
                "there is nothing to train: session.modules[name] = module, or parameters="
            )
        made = None if optimizer is None else pack(optimizer)
        batch = self.batch(prompts_or_ids, chat)
        where = self.plan(batch, backward=True)
        training = Training(made, own, trained)
        wanted = {**self._hook_fields(), "loss": code_of(loss), "training": training}
        run = self._run(batch, where, wanted)
        run.free()
        assert run.loss is not None
        return run.loss

    def _hook_fields(
        self, groups: Sequence[str] | str = (), complement: bool = False
    ) -> dict[str, Any]:
        """The fields of a RunPlan that say which hooks fire, and how."""
        return {
            "groups": (groups,) if isinstance(groups, str) else tuple(groups),
            "complement": complement,
            "seed": self.seed,
            "hooks": self.hooks.hook_set.digest,
        }

    def _run(
        self,
        batch: prompts.Batch,
        where: Plan,
        wanted: dict[str, Any],
        on_token: Callable[[int, str], Any] | None = None,
    ) -> Run:
        self._revive()
        self.hooks.send()
        unit = "step" if wanted.get("training") else "run"
        if on_token is not None:
            unit = "text"  # which shows by itself that it goes on
        edits = self.hooks.active_edits(wanted["groups"], wanted["complement"])
        runner = Runner(self.engines, self.store, self.tokenizer)
        with reporting(self.bar, None, "", unit):
            return runner.run(batch, where, wanted, edits, on_token)

    # --- experiments: many runs over this session -------------------------------------

    def preview(
        self,
        prompts_or_ids: prompts.Prompts,
        groups: Sequence[str] | str = (),
        complement: bool = False,
        chat: bool = False,
        max_new_tokens: int = 0,
        loss: bool = False,
        bandwidth: float | None = None,
    ) -> Preview:
        """What a run of this would keep: bytes by hook, by rank and by host, how long they take to
        copy, and whether they fit. Nothing is run.

        max_new_tokens: of a generation. loss: the run has one, so that there are gradients.
        bandwidth: bytes a second, if not those of the last run. HookError, PromptError: as run()
        refuses."""
        from flexkernel import experiments

        how = (groups, complement, chat, max_new_tokens, loss, bandwidth)
        return experiments.preview(self, prompts_or_ids, *how)

    def verify(
        self,
        prompt: prompts.Prompts | None = None,
        hooks: str | Sequence[str] | None = None,
        stream: bool | None = None,
        progress: Progress | None = None,
    ) -> Verification:
        """Compare every module's input and output with the unsharded model's, on a few short rows.

        prompt: rows of your own. hooks: only the modules of these globs. Your hooks and edits stay
        out of it. What is equal has the evidence "verified" in later runs. In half precision the
        drift is measured by the unsharded model's own from float32. stream: run the unsharded
        model one layer at a time; None: where it does not fit."""
        from flexkernel import experiments

        return experiments.verify(self, prompt, hooks, stream, progress)

    def sweep(
        self,
        prompt: prompts.Prompts,
        modules: str | Sequence[str],
        positions: Sequence[int] | None = None,
        *,
        metric: Callable[[Run], Any],
        edit: str | Edit,
        value: Any = None,
        at: str = "output",
        progress: Progress | None = None,
    ) -> Sweep:
        """One number for each module of these globs and each position: metric(run) when that alone
        is edited.

        value: what the edit takes; for edit="patch" a run of another prompt as long, with these
        modules hooked. positions: columns of the batch, all by default. Each run is freed when the
        metric has seen it. Ctrl-C ends it with what there is so far, and sweep.resume() goes on.
        HookError, CaptureError: refused before anything runs."""
        from flexkernel import experiments

        how: dict[str, Any] = {
            "metric": metric,
            "edit": edit,
            "value": value,
            "at": at,
            "progress": progress,
        }
        return experiments.sweep(self, prompt, modules, positions, **how)

    def collect(  # noqa: PLR0913 - a user's keywords
        self,
        prompts: Iterable[Any],
        hooks: str | Sequence[str] | None = None,
        path: str | os.PathLike[str] = "dataset",
        *,
        at: str | None = None,
        positions: Sequence[int] | int | None = None,
        reduce: str | None = None,
        batch_size: int = 16,
        chat: bool = False,
        progress: Progress | None = None,
    ) -> Dataset:
        """The activations of many prompts, into a folder: fk.open_dataset(path)[name] is a whole
        tensor, by token.

        prompts: anything that yields them, text or ids; run batch_size at a time. hooks: globs, at
        these at=, positions= and reduce=; None: your own hooks. Each rank writes its own shard.
        Ctrl-C or a kill ends it with what there is so far; the same call again goes on, under
        another layout too. HookError, CaptureError: refused."""
        from flexkernel import experiments

        how: dict[str, Any] = {"at": at, "positions": positions, "reduce": reduce}
        how |= {"batch_size": batch_size, "chat": chat, "progress": progress}
        return experiments.collect(self, prompts, hooks, path, **how)

    # --- names of an earlier version --------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        if name not in MOVED:
            raise AttributeError(f"'Session' object has no attribute {name!r}")
        return functools.reduce(getattr, moved(name).split("."), self)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in MOVED:
            *parts, last = moved(name).split(".")
            setattr(functools.reduce(getattr, parts, self), last, value)
        else:
            super().__setattr__(name, value)


# The names of version 0.1 → where they are now.
MOVED = {
    "add_module": "modules.add",
    "also": "hooked",
    "auto_restart": "engines.auto_restart",
    "closed": "engines.closed",
    "cluster": "engines",
    "edits": "hooks.edits",
    "gradients": "modules.gradients",
    "group": "hooks.group",
    "hook_set": "hooks.hook_set",
    "info": "loaded.info",
    "load_hooks": "hooks.load",
    "load_modules": "modules.load",
    "module": "modules.__getitem__",
    "parameters": "parameter_shapes",
    "planner": "loaded.planner",
    "remove_module": "modules.__delitem__",
    "save_hooks": "hooks.save",
    "save_modules": "modules.save",
    "saved": "hooks.saved",
    "source": "loaded.source",
    "timeout_s": "engines.timeout_s",
}


def moved(name: str) -> str:
    """Where an attribute of Session is now; warns whoever still uses its old name."""
    now = MOVED[name]
    text = f"session.{name} is session.{now} now; the old name goes with the next version"
    warnings.warn(text, DeprecationWarning, stacklevel=3)
    return now


def code_of(loss: Callable[..., Any] | str | None) -> bytes | str | None:
    """A loss as it travels: a function as code, one of ours by its name."""
    return loss if loss is None or isinstance(loss, str) else pack(loss)
