"""Hooks and edits as a JSON file: to read, to keep beside a paper, to load into another session.

A file of edits is code. Where an edit's source is all that it needs, the file holds the source as
text; else pickled code, which no reader can judge. Load only files that you trust.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flexkernel.errors import HookError
from flexkernel.wire import Blob, EditSpec, HookSet, HookSpec, SlabValue

from .files import whole_file
from .source import compiled, modules_used, namespace, source_of
from .spec import reduction

__all__ = ["read", "write"]

SCHEMA = 1
WARNING = "pickled code: loading this file lets it run on your engines, and you cannot read it here"
TUPLES = ("groups", "positions", "heads", "neurons")


def write(path: str | os.PathLike[str], hook_set: HookSet, edits: dict[str, EditSpec]) -> Path:
    """Write the hooks, their groups, which of these are off, and the edits. The file appears whole
    or not at all.

    HookError: a hook patches in a capture, which is in this session's memory only; nothing is
    written."""
    path = Path(path)
    content = {
        "flexkernel hooks": SCHEMA,
        "hooks": [of_hook(hook) for hook in hook_set.hooks],
        "off": sorted(hook_set.off),
        "edits": {name: of_edit(edit) for name, edit in edits.items()},
    }
    with whole_file(path, HookError) as part, open(part, "w") as file:
        json.dump(content, file, indent=1)
    return path


def read(
    path: str | os.PathLike[str], packed: Callable[[Callable], bytes]
) -> tuple[HookSet, dict[str, EditSpec]]:
    """The hooks and edits of a file. HookError: it is no such file, or of a later flexkernel."""
    try:
        content = json.loads(Path(path).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise HookError(f"{path} cannot be read as a file of hooks: {error}") from None
    schema = content.get("flexkernel hooks") if isinstance(content, dict) else None
    if schema is None:
        raise HookError(f"{path} is no file of hooks; session.hooks.save(path) writes one")
    if schema != SCHEMA:
        raise HookError(
            f"{path} has schema {schema!r}, this flexkernel reads {SCHEMA}: it was written by "
            "another version"
        )
    try:
        edits = {name: to_edit(name, entry, packed) for name, entry in content["edits"].items()}
        return HookSet(tuple(map(to_hook, content["hooks"])), frozenset(content["off"])), edits
    except Exception as error:  # its edits are code, which can raise anything where it is made
        raise HookError(f"{path} is damaged: {type(error).__name__}: {error}") from error


# --- hooks ----------------------------------------------------------------------------


def of_hook(hook: HookSpec) -> dict[str, Any]:
    """What differs from a hook's defaults, as JSON has it."""
    if isinstance(hook.value, SlabValue):
        raise HookError(
            f"hook {hook.key!r} patches in a capture, which lies in this session's memory and not "
            "in a file: "
            f"session.unhook({hook.key!r}) first, and hook it again after loading"
        )
    defaults = HookSpec(hook.glob)
    fields = [field.name for field in dataclasses.fields(hook)]
    given = {
        name: getattr(hook, name)
        for name in fields
        if getattr(hook, name) != getattr(defaults, name)
    }
    if hook.reduce is not None:
        given["reduce"] = str(hook.reduce)
    if "value" in given:
        given["value"] = of_value(hook.value)
    return {"glob": hook.glob, **given}


def of_value(value: Any) -> Any:
    if isinstance(value, Blob):
        return {
            "shape": value.shape,
            "dtype": value.dtype,
            "data": base64.b64encode(value.data).decode(),
        }
    return value


def to_hook(entry: dict[str, Any]) -> HookSpec:
    given = dict(entry)
    for name in TUPLES:
        if given.get(name) is not None:
            given[name] = tuple(given[name])
    if given.get("reduce") is not None:
        given["reduce"] = reduction(given["reduce"])
    value = given.get("value")
    if isinstance(value, dict):
        given["value"] = Blob(
            tuple(value["shape"]), value["dtype"], base64.b64decode(value["data"], validate=True)
        )
    elif isinstance(value, list):
        given["value"] = tuple(map(float, value))
    spec = HookSpec(**given)
    check_kinds(spec)
    return spec


# The fields of a hook, and what each holds
TEXTS = ("glob", "at", "name", "capture")
TEXTS_IF_ANY = ("index", "edit")
LISTS = {"groups": str, "positions": int, "heads": int, "neurons": int}


def check_kinds(spec: HookSpec) -> None:
    """TypeError: a field holds something of another kind."""
    hash(spec)  # TypeError: a list or an object where there is text or a number
    wrong = [name for name in TEXTS if not isinstance(getattr(spec, name), str)]
    wrong += [name for name in TEXTS_IF_ANY if not isinstance(getattr(spec, name), str | None)]
    if wrong:
        raise TypeError(f"a hook's {wrong[0]} is text, not {getattr(spec, wrong[0])!r}")
    for name, kind in LISTS.items():
        if not all(isinstance(each, kind) for each in getattr(spec, name) or ()):
            raise TypeError(f"a hook's {name} are not {getattr(spec, name)!r}")


# --- edits ----------------------------------------------------------------------------


def of_edit(edit: EditSpec) -> dict[str, Any]:
    """An edit as text and the modules it uses; as pickled code where its text is not all of it."""
    function = pickle.loads(edit.code)
    imports = modules_used(function)
    source = source_of(edit.name, function, imports)
    if source is not None:
        return {"per": edit.per, "imports": imports, "source": source}
    return {"per": edit.per, "warning": WARNING, "pickle": base64.b64encode(edit.code).decode()}


def to_edit(name: str, entry: dict[str, Any], packed: Callable[[Callable], bytes]) -> EditSpec:
    if "pickle" in entry:
        return EditSpec(name, entry["per"], base64.b64decode(entry["pickle"], validate=True))
    return EditSpec(
        name, entry["per"], packed(compiled(name, entry["source"], namespace(entry["imports"])))
    )
