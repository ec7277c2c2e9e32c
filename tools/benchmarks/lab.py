"""Lab: the engines and models that rows share. One cluster at a time; asking for another ends the
last."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import flexkernel as fk
from tests.support import models

__all__ = ["Lab"]


class Lab:
    """quick: everything as small as it can be, to see that it runs; the figures mean nothing then.
    runs: of one cell, to see that nothing grows."""

    def __init__(self, quick: bool = False, repeats: int = 9, runs: int = 1000):
        self.runs = runs
        self.quick, self.repeats = quick, 2 if quick else repeats
        self._folder = tempfile.TemporaryDirectory(prefix="flexkernel-bench-")
        self._asked: tuple[int, str] | None = None
        self._session: Any = None
        self._loaded: tuple[Any, dict[str, int]] | None = None

    def __enter__(self) -> Lab:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
        self._folder.cleanup()

    def end(self) -> None:
        """End the cluster there is."""
        if self._session is not None:
            self._session.close()
        self._session = self._asked = self._loaded = None

    def tiny(self, arch: str) -> Path:
        """The folder of a random model; in a quick run of the smallest there is."""
        return models.tiny(
            "llama" if self.quick and arch == "llama_deep" else arch, self._folder.name
        )

    def real(self) -> Path:
        """SmolLM2-135M-Instruct, if it is there already or can be fetched."""
        from flexkernel.notebook import demo

        return self.tiny("llama") if self.quick else demo.model()

    def session(self, path: Path | None = None, n: int = 2, host: str = "", **layout: int) -> Any:
        """A session over n engines (1: in this process) without hooks and runs, with that model
        loaded so.

        host: where the engines say that they are; with a name, their data comes over sockets."""
        if self._asked != (n, host) or not all(self._session.engines.alive()):
            self.end()
            self._session, self._asked = started(n, host), (n, host)
        session = self._session
        if path is not None and self._loaded != (path, layout):
            session.load(path, **layout)
            self._loaded = path, layout
        if session.has_model:
            session.unhook()
            for run in session.runs:
                run.free()
        return session


def started(n: int, host: str = "") -> Any:
    """Engines under that host's name; the driver is not there."""
    if n == 1:
        return fk.local()
    before = os.environ.pop("FLEX_HOST", None)
    if host:
        os.environ["FLEX_HOST"] = host
    try:
        return fk.start(n)
    finally:
        os.environ.pop("FLEX_HOST", None)
        if before is not None:
            os.environ["FLEX_HOST"] = before
