"""Who may import whom. The map is data; if it objects, move the code, not the map."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "flexkernel"

# A driver file may import its own layer and those above it in this list; nothing may be part of a cycle.
LAYERS = [
    {"errors", "wire", "names", "interrupts", "environment", "nursery"},
    {"slabs", "reduce", "reaper", "pulse", "vitals", "drift", "privacy", "files", "promises", "launchers"},
    {"channel", "cluster", "prompts", "capture", "run", "parameters", "hooks", "edits", "model", "status", "tree"}
    | {"generation", "hookfile", "preview", "spill", "others"},
    {"hooking", "recovery", "experiments", "training", "session", "door", "sweep", "dataset", "verify"},
    {"magics", "kernel", "demo", "__main__"},
]
PACKAGES = {"", "engine", "widgets"}
ENGINE_MAY = LAYERS[0] | LAYERS[1] | {"channel"}  # and each other; never a driver file
WIDGETS_MAY = LAYERS[0] | LAYERS[1] | {"capture"}  # and each other; never the session
DOOR_MAY = {"errors"}  # flexkernel/__init__.py when it is imported; the rest when it is asked for
NAME_THE_ENGINE = {"session", "cluster"}  # its door only: `flexkernel.engine`, no file behind it
SHOW_WIDGETS = LAYERS[4]
SHOW_WIDGETS_INSIDE_A_FUNCTION = {"capture", "tree"}

# Third parties that one file or folder keeps to itself; and who never sees torch at run time
ONLY = {
    "zmq": "channel",
    "ipyparallel": ("cluster", "launchers"),
    "IPython": "magics",
    "ipykernel": "kernel",
    "ipywidgets": "widgets",
    "anywidget": "widgets",
    "plotly": "widgets",
}
WITHOUT_TORCH = {"", "errors", "wire", "names", "interrupts", "environment", "nursery", "engine"}

MAX_LINES = {"session.py": 250, "engine/runtime.py": 250}
HEAVY = ["torch", "transformers", "IPython", "ipykernel", "ipyparallel", "zmq", "plotly", "ipywidgets"]


@dataclass(frozen=True)
class Import:
    importer: str  # "session", "engine.hooks"; "" is flexkernel/__init__.py
    target: str  # the same within flexkernel, else the top name of a third party
    ours: bool
    line: int
    lazy: bool  # inside a function

    def __str__(self) -> str:
        return f"{self.importer or '__init__'}:{self.line} imports {self.target or 'flexkernel'}"


class Reader(ast.NodeVisitor):
    """The run-time imports of one file. What stands under `if TYPE_CHECKING:` is none."""

    def __init__(self, importer: str, is_package: bool, modules: set[str]):
        self.importer, self.modules, self.depth = importer, modules, 0
        self.package = importer.split(".") if is_package and importer else importer.split(".")[:-1]
        self.found: list[Import] = []

    def visit_FunctionDef(self, node: ast.AST) -> None:
        self.depth += 1
        self.generic_visit(node)
        self.depth -= 1

    visit_AsyncFunctionDef = visit_Lambda = visit_FunctionDef

    def visit_If(self, node: ast.If) -> None:
        checking = ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        for child in node.orelse if checking else ast.iter_child_nodes(node):
            self.visit(child)

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self.add(alias.name, node.lineno)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        base = self.absolute("." * node.level + (node.module or ""))
        for alias in node.names:
            inner = f"{base}.{alias.name}"
            self.add(inner if inner.removeprefix("flexkernel.") in self.modules else base, node.lineno)

    def visit_Call(self, node: ast.Call) -> None:
        named = ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__")
        if named and node.args and isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str):
            self.add(self.absolute(node.args[0].value), node.lineno)
        self.generic_visit(node)

    def absolute(self, name: str) -> str:
        rest = name.lstrip(".")
        if rest == name:
            return name
        up = len(name) - len(rest) - 1
        return ".".join(["flexkernel", *self.package[: len(self.package) - up], *filter(None, [rest])])

    def add(self, name: str, line: int) -> None:
        top, _, rest = name.partition(".")
        ours = top == "flexkernel"
        while ours and rest and rest not in self.modules:  # a name within a module
            rest = rest.rpartition(".")[0]
        self.found.append(Import(self.importer, rest if ours else top, ours, line, self.depth > 0))


def sources() -> dict[str, str]:
    """module -> source, "" for flexkernel/__init__.py."""
    return {module_of(path): path.read_text() for path in sorted(ROOT.rglob("*.py"))}


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(files: dict[str, str]) -> Iterator[Import]:
    for module, source in files.items():
        reader = Reader(module, module in PACKAGES, set(files))
        reader.visit(ast.parse(source))
        yield from reader.found


def layer(module: str) -> int | None:
    return next((i for i, names in enumerate(LAYERS) if module in names), None)


def violations(files: dict[str, str]) -> list[str]:
    wrong = [f"{module} has no place on the map" for module in files if not has_a_place(module)]
    for found in imports(files):
        why = against_the_map(found) if found.ours else against_a_monopoly(found)
        if why:
            wrong.append(f"{found}: {why}")
    return wrong


def has_a_place(module: str) -> bool:
    return module == "" or module.split(".")[0] in ("engine", "widgets") or layer(module) is not None


def against_the_map(found: Import) -> str | None:
    importer, target = found.importer, found.target
    if target in ("", importer):  # __version__ is everybody's
        return None
    home, goal = importer.split(".")[0], target.split(".")[0]
    if home == "":
        return None if target in DOOR_MAY or found.lazy else "the door imports it only when it is asked for"
    if home in ("engine", "widgets"):
        may = ENGINE_MAY if home == "engine" else WIDGETS_MAY
        return None if goal == home or target in may else f"{home} may import {', '.join(sorted(may))} and itself"
    if goal == "engine":
        return None if importer in NAME_THE_ENGINE and target == "engine" else "session and cluster name engine's door"
    if goal == "widgets":
        lazily = found.lazy and importer in SHOW_WIDGETS_INSIDE_A_FUNCTION
        return None if lazily or importer in SHOW_WIDGETS else "only capture, inside a function, and the top layer may"
    above, below = layer(importer), layer(target)
    return "imports go down only" if above is not None and below is not None and below > above else None


def against_a_monopoly(found: Import) -> str | None:
    behind_the_door = found.importer == "engine" and found.lazy  # on an engine torch is there
    if found.target == "torch" and found.importer in WITHOUT_TORCH and not behind_the_door:
        return "it must not need torch"
    owners = ONLY.get(found.target, ())
    owners = (owners,) if isinstance(owners, str) else owners
    allowed = not owners or found.importer.split(".")[0] in owners
    return None if allowed else f"only {' and '.join(owners)} may"


def cycles(files: dict[str, str]) -> list[str]:
    """Each cycle once. The door is left out: everybody may ask it for the version."""
    graph: dict[str, set[str]] = {module: set() for module in files if module}
    for found in imports(files):
        if found.ours and found.importer and found.target not in ("", found.importer):
            graph[found.importer].add(found.target)
    seen: set[str] = set()
    rings: list[str] = []

    def walk(module: str, path: list[str]) -> None:
        if module in path:
            rings.append(" -> ".join([*path[path.index(module) :], module]))
        elif module not in seen:
            seen.add(module)
            for target in sorted(graph[module]):
                walk(target, [*path, module])

    for module in graph:
        walk(module, [])
    return rings


# The package keeps to the map


def test_there_is_something_to_check():
    assert len(sources()) > 20 and len(list(imports(sources()))) > 100


def test_imports_keep_to_the_map():
    assert violations(sources()) == []


def test_nothing_is_part_of_a_cycle():
    assert cycles(sources()) == []


@pytest.mark.parametrize("name", sorted(MAX_LINES))
def test_the_two_objects_that_only_delegate_stay_short(name):
    num_lines = len((ROOT / name).read_text().splitlines())
    assert num_lines <= MAX_LINES[name]


# The check can fail, and says what and where

MODULES = dict.fromkeys(["", "errors", "wire", "slabs", "channel", "cluster", "capture", "session", "magics"], "")
MODULES |= dict.fromkeys(["engine", "engine.hooks", "engine.load", "widgets", "widgets.tensor_map"], "")


@pytest.mark.parametrize(
    ("module", "source", "says"),
    [
        ("wire", "import torch", "wire:1 imports torch: it must not need torch"),
        ("wire", "def f():\n    import torch.nn", "wire:2 imports torch: it must not need torch"),
        ("", "import torch", "__init__:1 imports torch: it must not need torch"),
        ("engine", "import torch", "engine:1 imports torch: it must not need torch"),
        ("", "from .session import start", "__init__:1 imports session: the door imports it only when it is asked for"),
        ("errors", "from .slabs import Slab", "errors:1 imports slabs: imports go down only"),
        ("capture", "from . import errors, session", "capture:1 imports session: imports go down only"),
        ("capture", "import flexkernel.session.session as s", "capture:1 imports session: imports go down only"),
        ("capture", "from flexkernel import session", "capture:1 imports session: imports go down only"),
        ("session", "async def f():\n    from .magics import x", "session:2 imports magics: imports go down only"),
        ("session", "import zmq.asyncio", "session:1 imports zmq: only channel may"),
        (
            "session",
            "try:\n    import ipyparallel as ipp\nfinally:\n    pass",
            "imports ipyparallel: only cluster and launchers may",
        ),
        ("session", "from IPython.display import display", "session:1 imports IPython: only magics may"),
        ("magics", "from ipykernel.comm import Comm", "magics:1 imports ipykernel: only kernel may"),
        ("engine.hooks", "import zmq", "engine.hooks:1 imports zmq: only channel may"),
        ("engine.hooks", "from ..session import Session", "engine.hooks:1 imports session: engine may import"),
        ("engine.hooks", "from .. import capture", "engine.hooks:1 imports capture: engine may import"),
        ("engine", "from ..cluster import x", "engine:1 imports cluster: engine may import"),
        ("session", "from .engine.hooks import attach", "imports engine.hooks: session and cluster name engine's door"),
        ("session", "from .engine import hooks", "imports engine.hooks: session and cluster name engine's door"),
        ("capture", "from .engine import call", "capture:1 imports engine: session and cluster name engine's door"),
        (
            "session",
            "def f():\n    from .widgets import show",
            "session:2 imports widgets: only capture, inside a function",
        ),
        ("capture", "from .widgets import show", "capture:1 imports widgets: only capture, inside a function"),
        ("widgets.tensor_map", "from ..session import Session", "imports session: widgets may import"),
        (
            "session",
            "from importlib import import_module\nimport_module('.magics', __package__)",
            "session:2 imports magics",
        ),
        ("session", "import_module('plotly.graph_objects')", "session:1 imports plotly: only widgets may"),
        ("session", "if x:\n    import zmq\nelse:\n    pass", "session:2 imports zmq"),
        ("session", "if TYPE_CHECKING:\n    pass\nelse:\n    import zmq", "session:4 imports zmq"),
        ("helpers", "", "helpers has no place on the map"),
    ],
)
def test_the_check_can_fail(module, source, says):
    found = violations(MODULES | {module: source})
    assert len(found) == 1 and says in found[0]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("", "from .errors import FlexError"),
        ("", "def __getattr__(name):\n    from .door import start"),
        ("wire", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch"),
        ("session", "if typing.TYPE_CHECKING:\n    from .magics import x"),
        ("session", "from .engine import call\nfrom . import __version__, errors\nimport flexkernel"),
        ("capture", "def show():\n    from .widgets import tensor_map"),
        ("magics", "from IPython.core.magic import magics_class\nfrom .widgets import tree"),
        ("widgets.tensor_map", "import anywidget, plotly.express\nfrom ..capture import Capture\nfrom . import x"),
        ("engine.hooks", "import torch\nfrom .load import load\nfrom ..channel import Server\nfrom . import load"),
        ("engine", "def call():\n    import torch\n    from .hooks import attach"),
    ],
)
def test_the_check_lets_pass_what_the_map_allows(module, source):
    assert violations(MODULES | {module: source}) == []


def test_the_check_for_cycles_can_fail():
    files = MODULES | {"session": "from .run import x", "run": "def f():\n    from . import session"}
    assert cycles(files) == ["session -> run -> session"]
    assert cycles(MODULES | {"engine.hooks": "from .load import x", "engine.load": "from . import hooks"})
    assert cycles(MODULES | {"session": "from .run import x", "run": "from .errors import x"}) == []


# What the door lets in and shows


def python(code: str) -> list[str]:
    """What a fresh interpreter prints as JSON."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("module", ["flexkernel", "flexkernel.errors", "flexkernel.wire", "flexkernel.engine"])
def test_the_door_is_light(module):
    found = python(f"import json, sys, {module}; print(json.dumps([m for m in {HEAVY} if m in sys.modules]))")
    assert found == []


def test_the_check_for_heavy_imports_can_fail():
    assert python(f"import json, sys, zmq; print(json.dumps([m for m in {HEAVY} if m in sys.modules]))") == ["zmq"]


def test_the_public_list_is_what_is_there():
    """Every name of the list exists; every public name that is there is on the list."""
    code = """
import json, types, flexkernel
for name in flexkernel.__all__:
    getattr(flexkernel, name)
shown = [n for n in dir(flexkernel) if not n.startswith("_") and not n.endswith("load_ipython_extension")]
ours = [n for n in shown if n in flexkernel.__all__ or not isinstance(getattr(flexkernel, n), types.ModuleType)]
alien = {"annotations", "Any", "TYPE_CHECKING"}
print(json.dumps([sorted(set(ours) - alien), sorted(flexkernel.__all__)]))
"""
    there, listed = python(code)
    assert there == listed and len(listed) > 5


def test_a_name_that_is_not_there_is_an_attribute_error():
    import flexkernel

    with pytest.raises(AttributeError, match="module 'flexkernel' has no attribute 'no_such_name'"):
        flexkernel.no_such_name  # noqa: B018
