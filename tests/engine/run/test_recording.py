"""The way of one read in the hook: few files, and nobody's closure."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType

import pytest

import flexkernel as fk

IDS = [[5, 6, 7, 8, 9]]
ROOT = Path(fk.__file__).parent
MOST_FILES = 4


class Trace:
    """Our own functions that run within `fire` for one module, as "file:function"."""

    def __init__(self, name: str):
        self.name = name
        self.calls: list[str] = []
        self._fire: FrameType | None = None

    def __call__(self, frame: FrameType, event: str, _arg: object) -> None:
        code = frame.f_code
        if not code.co_filename.startswith(str(ROOT)):
            return
        begins = event == "call" and code.co_name == "fire" and self._fire is None
        if begins and frame.f_locals["tap"].name == self.name:
            self._fire = frame
        if event == "call" and self._fire is not None:
            self.calls.append(f"{Path(code.co_filename).relative_to(ROOT)}:{code.co_qualname}")
        if event == "return" and frame is self._fire:
            self._fire = None

    @property
    def files(self) -> set[str]:
        return {call.partition(":")[0] for call in self.calls}


def traced(run, name: str) -> Trace:
    run()  # what is decided once is decided here
    trace = Trace(name)
    sys.setprofile(trace)
    try:
        run()
    finally:
        sys.setprofile(None)
    return trace


@pytest.mark.skipif(sys.version_info < (3, 11), reason="functions have no qualified names")
@pytest.mark.parametrize(
    ("name", "at"),
    [
        ("model.layers.1.mlp", "output"),
        ("model.layers.1.self_attn", "output"),  # a tuple
        ("model.layers.1.mlp", "input"),
    ],
)
def test_a_read_crosses_few_files_and_calls_no_closure(session, tiny, name, at):
    session.load(tiny("llama"))
    session.hook(name, at=at)
    trace = traced(lambda: session.run(IDS), name)
    assert "engine/place/staging.py:Copies.write" in trace.calls, "the value was copied"
    assert trace.files <= {
        "engine/model/hooks.py",
        "engine/model/pytree.py",
        "engine/run/recording.py",
        "engine/place/staging.py",
    }
    assert len(trace.files) <= MOST_FILES
    closures = [call for call in trace.calls if "<lambda>" in call]
    assert not closures


def test_a_trace_sees_a_file_too_many(session, tiny):
    session.load(tiny("llama"))
    session.hook("model.layers.1.mlp", reduce="norm:-1")
    trace = traced(lambda: session.run(IDS), "model.layers.1.mlp")
    assert len(trace.files) > MOST_FILES
