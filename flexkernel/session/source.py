"""The source of a function: the function that a text defines, and the text that defines a
function."""

from __future__ import annotations

import ast
import importlib
import inspect
import linecache
import textwrap
import types
from collections.abc import Callable, Iterable
from typing import Any

__all__ = ["compiled", "modules_used", "namespace", "source_of"]


def namespace(imports: dict[str, str]) -> dict[str, Any]:
    """What an edit's text runs in: the modules it uses, under its names for them."""
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
    """Whether two functions use the same names and constants: the text has not changed since."""
    return uses(a) == uses(b)


def uses(code: types.CodeType) -> tuple[Any, ...]:
    """The arguments, variables, names and constants of a function and of those within it."""
    constants = [uses(c) if isinstance(c, types.CodeType) else c for c in code.co_consts]
    return code.co_argcount, code.co_varnames, code.co_names, constants
