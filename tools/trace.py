"""The path of one activation, one edit, one gradient and one generated token: each function of
flexkernel that is entered, in order, as file:function. `python -m tools.trace` prints them.

A tiny model runs in this process, so that the driver's calls and the engine's are in one list. A
function is named once, where it is entered first; comprehensions and lambdas are left out.
"""

from __future__ import annotations

import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import flexkernel as fk
from tests.support import models

__all__ = ["PATHS", "paths"]

ROOT = Path(fk.__file__).parent
MLP = "model.layers.1.mlp"
IDS = [[5, 6, 7, 8]]


@contextmanager
def entered() -> Iterator[list[str]]:
    """The functions of flexkernel that are entered within, on this thread, as file:function."""
    seen: dict[str, None] = {}
    found: list[str] = []

    def note(frame: FrameType, event: str, _arg: Any) -> None:
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(str(ROOT)):
            return
        if code.co_name.startswith(("<", "__")):
            return
        name = code.co_qualname.rpartition("<locals>.")[2]
        seen.setdefault(f"{Path(code.co_filename).relative_to(ROOT)}:{name}")

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        yield found
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
        found.extend(seen)


def activation(session: Any) -> None:
    session.hook(MLP)
    session.run(IDS)[MLP].tensor()


def edit(session: Any) -> None:
    session.hook(MLP, edit="scale", value=2.0)
    session.run(IDS)[MLP].tensor()


def gradient(session: Any) -> None:
    session.hook(MLP, at="grad_output")
    session.run(IDS, loss="next_token")[MLP, "grad_output"].tensor()


def token(session: Any) -> None:
    session.hook(MLP)
    session.generate(IDS, max_new_tokens=2)[MLP].tensor()


PATHS: dict[str, Callable[[Any], None]] = {
    "activation": activation,
    "edit": edit,
    "gradient": gradient,
    "generated token": token,
}


def paths() -> dict[str, list[str]]:
    """title -> file:function of each step, below flexkernel/. Each is warm: names are resolved."""
    found = {}
    with tempfile.TemporaryDirectory() as folder, fk.local() as session:
        session.load(models.tiny("llama", folder))
        for title, make in PATHS.items():
            make(session)
            session.unhook()
            with entered() as steps:
                make(session)
            session.unhook()
            found[title] = steps
    return found


def main() -> None:
    for title, steps in paths().items():
        print(f"one {title}: {len(steps)} functions")
        print("\n".join(f"    {step}" for step in steps))


if __name__ == "__main__":
    main()
