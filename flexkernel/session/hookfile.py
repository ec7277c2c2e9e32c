"""Hooks and edits as a JSON file: to read, to keep beside a paper, to load into another session.

A file of edits is code. Where an edit's source is all that it needs, the file holds the source as
text; else pickled code, which no reader can judge. Load only files that you trust.
"""

from __future__ import annotations

import ast
import base64
import dataclasses
import dis
import inspect
import json
import linecache
import os
import pickle
import textwrap
import types
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from flexkernel.errors import HookError
from flexkernel.wire import Blob, EditSpec, HookSet, HookSpec, SlabValue

from .files import whole_file
from .hooks import reduction

__all__ = ["compiled", "read", "write"]

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
        raise HookError(f"{path} is no file of hooks; session.save_hooks(path) writes one")
    if schema != SCHEMA:
        raise HookError(
            f"{path} has schema {schema!r}, this flexkernel reads {SCHEMA}: it was written by another version"
        )
    try:
        edits = {name: to_edit(name, entry, packed) for name, entry in content["edits"].items()}
        return HookSet(tuple(map(to_hook, content["hooks"])), frozenset(content["off"])), edits
    except Exception as error:  # its edits are code, which can raise anything where it is made
        raise HookError(f"{path} is not whole: {type(error).__name__}: {error}") from error


# --- hooks ----------------------------------------------------------------------------


def of_hook(hook: HookSpec) -> dict[str, Any]:
    """What differs from a hook's defaults, as JSON has it."""
    if isinstance(hook.value, SlabValue):
        raise HookError(
            f"hook {hook.key!r} patches in a capture, which lies in this session's memory and not in a file: "
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
    hash(spec)  # TypeError: a list or an object where there is text or a number
    for name in ("glob", "at", "name", "capture"):
        if not isinstance(getattr(spec, name), str):
            raise TypeError(f"a hook's {name} is text, not {getattr(spec, name)!r}")
    for name, kind in (("groups", str), ("positions", int), ("heads", int), ("neurons", int)):
        if not all(isinstance(each, kind) for each in getattr(spec, name) or ()):
            raise TypeError(f"a hook's {name} are not {getattr(spec, name)!r}")
    for name in ("index", "edit"):
        if not isinstance(getattr(spec, name), str | None):
            raise TypeError(f"a hook's {name} is text, not {getattr(spec, name)!r}")
    return spec


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


def namespace(imports: dict[str, str]) -> dict[str, Any]:
    """What an edit's text runs in: the modules it uses, under its names for them."""
    import importlib

    return {
        "__name__": "__main__",
        **{name: importlib.import_module(module) for name, module in imports.items()},
    }


def compiled(name: str, source: str, names: dict[str, Any]) -> Callable:
    """The function of that name which the text defines. A last line that is an expression is what
    it gives.

    Its lines show in tracebacks, and it can be saved again."""
    file = f"<edit {name}>"
    tree = ast.parse(source, file)
    function = tree.body[0]
    if not isinstance(function, ast.FunctionDef) or function.name != name or len(tree.body) > 1:
        raise ValueError(f"the source of edit {name!r} is not one function of that name")
    last = function.body[-1]
    if isinstance(last, ast.Expr):
        function.body[-1] = ast.copy_location(ast.Return(last.value), last)
    linecache.cache[file] = (len(source), None, source.splitlines(True), file)
    made: dict[str, Any] = {}
    exec(compile(ast.fix_missing_locations(tree), file, "exec"), names, made)
    return made[name]


def modules_used(function: Any) -> dict[str, str]:
    """The function's name for each module that it uses → the module."""
    there = getattr(function, "__globals__", {})
    code = getattr(function, "__code__", None)
    found = {
        name: there[name]
        for name in names_in(code)
        if isinstance(there.get(name), types.ModuleType)
    }
    return {name: module.__name__ for name, module in found.items()}


def names_in(code: types.CodeType | None) -> Iterable[str]:
    """The names that the code looks up, and the functions within it."""
    if code is None:
        return
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from names_in(inner)


def source_of(name: str, function: Any, imports: dict[str, str]) -> str | None:
    """The text of a function that needs nothing but these modules, as a function of that name;
    None for any other.

    It is compiled again and compared: a text that has changed since, or is not all of it, is not
    taken for it."""
    there = getattr(function, "__globals__", {})
    if (
        not isinstance(function, types.FunctionType)
        or function.__closure__
        or function.__defaults__
    ):
        return None
    if any(used in there and used not in imports for used in names_in(function.__code__)):
        return None  # it uses a variable or a function of the notebook
    try:
        source = written(name, textwrap.dedent(inspect.getsource(function)))
        again = compiled(name, source, namespace(imports))
    except (OSError, TypeError, ValueError, SyntaxError, NameError):
        return None  # no source is there, as of a function typed into a plain interpreter
    return source if alike(function.__code__, again.__code__) else None


def written(name: str, source: str) -> str:
    """The function in a piece of source, under its edit's name: a def without decorators, or the
    only lambda."""
    tree = ast.parse(source)
    node = tree.body[0]
    if isinstance(node, ast.FunctionDef):
        lines = source.splitlines(True)[node.lineno - 1 : node.end_lineno]
        return "".join(lines).replace(f"def {node.name}", f"def {name}", 1)
    lambdas = [inner for inner in ast.walk(tree) if isinstance(inner, ast.Lambda)]
    if len(lambdas) != 1:
        raise ValueError("no def, and not one lambda")
    (found,) = lambdas
    return f"def {name}({ast.unparse(found.args)}):\n    return {ast.unparse(found.body)}\n"


def alike(a: types.CodeType, b: types.CodeType) -> bool:
    """Whether two functions do the same, by their instructions."""
    if (a.co_varnames, a.co_argcount, len(a.co_consts)) != (
        b.co_varnames,
        b.co_argcount,
        len(b.co_consts),
    ):
        return False
    inner = [
        [const for const in code.co_consts if isinstance(const, types.CodeType)] for code in (a, b)
    ]
    if len(inner[0]) != len(inner[1]) or not all(map(alike, *inner)):
        return False
    return steps(a) == steps(b)


def steps(code: types.CodeType) -> list[tuple[str, Any]]:
    """Its instructions, but for how a method is called: that differs with what the file imports
    above the function."""
    kinds = {"LOAD_METHOD": "LOAD_ATTR"}
    left_out = ("PUSH_NULL", "PRECALL", "RESUME", "NOP")
    found = [step for step in dis.get_instructions(code) if step.opname not in left_out]
    jumps = {*dis.hasjrel, *dis.hasjabs}
    return [
        (
            kinds.get(s.opname, s.opname),
            "" if isinstance(s.argval, types.CodeType) or s.opcode in jumps else s.argval,
        )
        for s in found
    ]
