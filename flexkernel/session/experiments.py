"""The half of a session that runs experiments: many runs, none at all, or another model beside the
loaded one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

from flexkernel.experiments import dataset as collecting
from flexkernel.experiments import preview as previewing
from flexkernel.experiments import verify as verifying
from flexkernel.experiments.dataset import Dataset
from flexkernel.experiments.preview import Preview
from flexkernel.experiments.sweep import Sweep, modules_of
from flexkernel.experiments.verify import Verification

from .run import Run

if TYPE_CHECKING:
    from .session import Session

__all__ = ["Experiments", "Progress"]

Progress = Callable[[str, int, int], None]  # is told (stage, how many, of how many)


class Experiments:
    """Experiments over a session. bar: how a notebook shows progress; the magics give it."""

    bar: Callable[..., Any] | None = None

    def preview(
        self,
        prompts_or_ids: Any,
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
        session = cast("Session", self)
        batch = session._batch(prompts_or_ids, chat)
        where, _ = session._plan(batch, groups, complement, max_new_tokens, loss)
        assert session.store is not None and session.info is not None
        size = len(batch.ids), len(batch.ids[0]), max_new_tokens
        return previewing.preview(
            session.cluster, session.store, session.info, where, size, bandwidth
        )

    def verify(
        self,
        prompt: Any = None,
        hooks: str | Sequence[str] | None = None,
        stream: bool | None = None,
        progress: Progress | None = None,
    ) -> Verification:
        """Compare every module's input and output with the unsharded model's, on a few short rows.

        prompt: rows of your own. hooks: only the modules of these globs. Your hooks and edits stay
        out of it. What is equal has the evidence "verified" in later runs. In half precision the
        drift is measured by the unsharded model's own from float32. stream: run the unsharded
        model one layer at a time; None: where it does not fit."""
        with self._telling(progress, "verify", "value") as told:
            return verifying.verify(cast("Session", self), prompt, hooks, stream, told)

    def sweep(
        self,
        prompt: Any,
        modules: str | Sequence[str],
        positions: Sequence[int] | None = None,
        *,
        metric: Callable[[Run], Any],
        edit: str,
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
        session = cast("Session", self)
        batch = session._batch(prompt)
        found = modules_of(session.planner, modules, at)
        options = {"edit": edit, "at": at}
        return Sweep(session, batch, found, positions, metric, options, value).resume(progress)

    def collect(
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
        options = {"at": at, "positions": positions, "reduce": reduce}
        with self._telling(progress, "collect", "prompt") as told:
            return collecting.collect(
                cast("Session", self), prompts, hooks, path, batch_size, chat, options, told
            )

    @contextlib.contextmanager
    def _telling(self, progress: Progress | None, name: str, unit: str) -> Iterator[Progress]:
        """Whom to tell how far something is: who was given, else the notebook's bar, else
        nobody."""
        if progress is not None or self.bar is None:
            yield progress or (lambda *_: None)
            return
        with self.bar(name, 1, unit) as shown:
            yield shown
