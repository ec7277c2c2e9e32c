"""The driver's view of edits: the presets and what they take, and a user's function as it travels
to engines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from flexkernel.errors import HookError
from flexkernel.names import nearest
from flexkernel.wire import Blob, EditSpec, HookSpec, SlabValue

from .capture import Capture

__all__ = ["PER", "PRESETS", "Held", "check", "defined", "value_of"]

PER = ("whole", "row", "element")
CAPTURES = ("after", "before", "both", "none")
# preset → what it takes: nothing, a number, a tensor (or a number), two numbers, or a capture
PRESETS = {
    "zero": "nothing",
    "mean": "nothing",
    "scale": "number",
    "noise": "number",
    "add": "tensor",
    "set": "tensor",
    "project_out": "tensor",
    "clamp": "two numbers",
    "patch": "capture",
}
# a value larger than this is a capture's business: it would travel with every hook
BLOB_BYTES = 16 << 20


def defined(
    name: str, per: str, function: Callable, packed: Callable[[Callable], bytes]
) -> EditSpec:
    """A user's edit. HookError: the name of a preset, or no such `per`."""
    if name in PRESETS:
        raise HookError(f"{name!r} is a preset; give your edit another name")
    if per not in PER:
        raise HookError(f"per={per!r} is not there; an edit is per {', '.join(PER)}")
    return EditSpec(name, per, packed(function))


def check(spec: HookSpec, known: Any) -> None:
    """HookError unless the hook's edit is there and everything about it goes together."""
    if spec.capture not in CAPTURES:
        raise HookError(f"capture={spec.capture!r} is not there; it is {', '.join(CAPTURES)}")
    if spec.edit is None:
        for what in ("value", "heads", "neurons"):
            if getattr(spec, what) is not None:
                raise HookError(f"{what}= belongs to an edit, and {spec.key!r} has none: edit=")
        if spec.capture != "after":
            raise HookError(
                f"capture={spec.capture!r} belongs to an edit, and {spec.key!r} has none: edit="
            )
        return
    if spec.edit not in PRESETS and spec.edit not in known:
        there = [*PRESETS, *known]
        raise HookError(
            f"no edit is called {spec.edit!r}; nearest: {', '.join(nearest(spec.edit, there)) or 'none'}; "
            f"there are {', '.join(there)}"
        )
    _check_value(spec)


def _check_value(spec: HookSpec) -> None:
    assert spec.edit is not None
    wants = PRESETS.get(spec.edit, "nothing")
    value = spec.value
    fits = {
        "nothing": value is None,
        "number": isinstance(value, float),
        "tensor": isinstance(value, float | Blob)
        and not (spec.edit == "project_out" and isinstance(value, float)),
        "two numbers": isinstance(value, tuple) and len(value) == 2,
        "capture": isinstance(value, SlabValue | Blob),
    }
    if not fits[wants]:
        raise HookError(f"edit {spec.edit!r} takes {wants}, not {type(value).__name__}: value=")


class Held:
    """Captures that edits patch in: their memory is not used again while a hook needs it."""

    def __init__(self) -> None:
        self._let_go: dict[str, Callable[[], None]] = {}

    def take(self, key: str, value: Any) -> None:
        """For the hook of that key, instead of what it had."""
        before = self._let_go.pop(key, None)
        if isinstance(value, Capture):
            self._let_go[key] = value.hold()
        if before is not None:
            before()

    def keep(self, keys: list[str]) -> None:
        """Let go of what no hook of these has."""
        for key in set(self._let_go) - set(keys):
            self._let_go.pop(key)()


def value_of(value: Any, near: bool = True) -> Any:
    """What the user gave an edit, as plain data: a number, two, a small tensor, or where a capture
    lies.

    near: every engine is on this host, where captures lie; elsewhere their numbers have to
    travel."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int | float):
        return float(value)
    if isinstance(value, Capture) and near:
        return value.as_value()
    value = value.tensor() if isinstance(value, Capture) else value
    if (
        isinstance(value, list | tuple)
        and len(value) == 2
        and all(isinstance(v, int | float) for v in value)
    ):
        return tuple(float(v) for v in value)
    tensor = torch.as_tensor(value).detach().cpu().contiguous()
    if tensor.nbytes > BLOB_BYTES:
        raise HookError(
            f"an edit's tensor has {tensor.nbytes:,} bytes; up to {BLOB_BYTES:,} travel, patch takes a capture"
        )
    data = tensor.view(-1).view(torch.uint8).numpy().tobytes()
    return Blob(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), data)
