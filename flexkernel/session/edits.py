"""The driver's view of edits: the presets and what they take, and a user's function as it travels
to engines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from flexkernel.errors import HookError
from flexkernel.memory.tensors import from_blob, to_blob
from flexkernel.names import display_name
from flexkernel.wire import Blob, EditSpec, HookSpec, SlabValue

from .capture import Capture

__all__ = [
    "PER",
    "PRESETS",
    "Edit",
    "Pins",
    "defined",
    "edit_text",
    "made_text",
    "value_of",
    "where_text",
]

Edit = Callable[[torch.Tensor, Any], torch.Tensor]  # (x, ctx) → x, changed

PER = ("whole", "row", "element")
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
        raise HookError(f"per={per!r} is not one of {', '.join(PER)}")
    return EditSpec(name, per, packed(function))


class Pins:
    """Captures that edits patch in: their memory is not used again while a hook needs it."""

    def __init__(self) -> None:
        self._let_go: dict[str, Callable[[], None]] = {}

    def take(self, key: str, value: Any) -> None:
        """For the hook of that key, instead of what it had."""
        before = self._let_go.pop(key, None)
        if isinstance(value, Capture):
            self._let_go[key] = value.pin()
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
    tensor = torch.as_tensor(value)
    if tensor.nbytes > BLOB_BYTES:
        raise HookError(
            f"an edit's tensor has {tensor.nbytes:,} bytes; up to {BLOB_BYTES:,} travel, patch "
            "takes a capture"
        )
    return to_blob(tensor)


# --- in words -------------------------------------------------------------------------


def edit_text(spec: HookSpec) -> str:
    """A hook's edit in words: "add (576,) norm 3.1", "zero heads 3, 5"; "" if it has none."""
    if spec.edit is None:
        return ""
    return " ".join(filter(None, [spec.edit, value_text(spec), where_text(spec)]))


def made_text(spec: HookSpec) -> str:
    """A hook's edit and where it is made: "zero heads 3 at model.layers.17.self_attn.@z"."""
    at = "" if spec.at == "output" else f" {spec.at}"
    return f"{edit_text(spec)} at {display_name(spec.glob)}{at}"


def value_text(spec: HookSpec) -> str:
    """What the edit takes: a number, the shape and norm of a tensor, the shape of a capture."""
    value = spec.value
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, tuple):
        return ", ".join(f"{number:g}" for number in value)
    if isinstance(value, Blob):
        return f"{value.shape} norm {from_blob(value).float().norm():.3g}"
    if isinstance(value, SlabValue):
        return f"capture {value.region.shape}"
    return ""


def where_text(spec: HookSpec) -> str:
    """Which parts of the value the hook is on: "heads 3, 5; positions -1"; "" for all of it."""
    parts = []
    for kind in ("heads", "neurons", "positions"):
        indices = getattr(spec, kind)
        if indices is not None:
            parts.append(f"{kind} {', '.join(map(str, indices))}")
    return "; ".join(parts)
