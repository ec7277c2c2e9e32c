"""Who may import whom: one ordered list. If it objects, move the code, not the list."""

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

# The rooms, lowest first. A file may import its own room and the rows below it. An import inside a
# function or under `if TYPE_CHECKING:` counts like any other: a reader has to follow it, too.
ORDER = [
    "_version errors",
    "names boxes",
    "sites",
    "wire",
    "memory",
    "engine views",
    "cluster widgets",
    "session",
    "experiments",
    "notebook",
]
DOOR = {"", "__main__"}  # `import flexkernel` and `python -m flexkernel` stand above all rooms

# (importer, target) → why it may go up. A literal: tools/house.py reads it, too.
EXCEPTIONS: dict[tuple[str, str], str] = {
    ("session.session", "experiments"): "session.sweep() and the like import when called"
}

# The same within the engine: its files and rooms, lowest first. Its door, `engine`, is above them.
ENGINE = [
    "compat usercode",
    "place",
    "ranks",
    "model",
    "runtime",
    "failure",
    "run",
    "dataset fault_injection recover verify",
    "calls",
]

# Third parties that a room or a file keeps to itself.
ONLY = {
    "zmq": ("memory.channel", "memory.client", "memory.server"),
    "ipyparallel": ("cluster",),
    "IPython": ("notebook",),
    "ipykernel": ("notebook.kernel",),
    "ipywidgets": ("views",),
    "anywidget": ("views",),
    "plotly": ("views",),
}
# Files that must not need torch: they are imported by processes that only start others.
WITHOUT_TORCH = {
    "",
    "_version",
    "errors",
    "names",
    "boxes",
    "sites",
    "wire",
    "engine",
    "cluster.interrupts",
    "cluster.environment",
    "cluster.forkserver",
}
HEAVY = ["torch", "transformers", "IPython", "ipykernel", "ipyparallel", "zmq", "plotly"]
HEAVY += ["ipywidgets"]


@dataclass(frozen=True)
class Import:
    """One import of one file. ours: of flexkernel's own; lazy: it stands inside a function."""

    importer: str  # "session.session", "engine.run.hooks"; "" is flexkernel/__init__.py
    target: str  # the same within flexkernel, else the top name of a third party
    ours: bool
    line: int
    lazy: bool

    def __str__(self) -> str:
        target = self.target or "flexkernel"
        return f"{self.importer or '__init__'}:{self.line} imports {target}"


class Reader(ast.NodeVisitor):
    """Collects the imports of one file, wherever they stand."""

    def __init__(self, importer: str, is_package: bool, modules: set[str]):
        self.importer = importer
        self.modules = modules
        self.depth = 0
        self.type_checking = False
        parts = importer.split(".") if importer else []
        self.package = parts if is_package else parts[:-1]
        self.imports: list[Import] = []

    def visit_FunctionDef(self, node: ast.AST) -> None:
        self.depth += 1
        self.generic_visit(node)
        self.depth -= 1

    visit_AsyncFunctionDef = visit_Lambda = visit_FunctionDef

    def visit_If(self, node: ast.If) -> None:
        checking = ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        before = self.type_checking
        self.type_checking = before or checking
        for child in node.body:
            self.visit(child)
        self.type_checking = before
        for child in node.orelse:
            self.visit(child)

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self.add(alias.name, node.lineno)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        base = self.absolute("." * node.level + (node.module or ""))
        for alias in node.names:
            inner = f"{base}.{alias.name}"
            is_module = inner.removeprefix("flexkernel.") in self.modules
            self.add(inner if is_module else base, node.lineno)

    def visit_Call(self, node: ast.Call) -> None:
        imports = ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__")
        if imports and node.args and isinstance(node.args[0], ast.Constant):
            self.add(self.absolute(str(node.args[0].value)), node.lineno)
        self.generic_visit(node)

    def absolute(self, name: str) -> str:
        rest = name.lstrip(".")
        if rest == name:
            return name
        up = len(name) - len(rest) - 1
        home = self.package[: len(self.package) - up]
        return ".".join(["flexkernel", *home, *filter(None, [rest])])

    def add(self, name: str, line: int) -> None:
        top, _, rest = name.partition(".")
        ours = top == "flexkernel"
        if not ours and self.type_checking:
            return  # a third party that only the type checker reads
        while ours and rest and rest not in self.modules:  # a name within a module
            rest = rest.rpartition(".")[0]
        target = rest if ours else top
        self.imports.append(Import(self.importer, target, ours, line, self.depth > 0))


def sources() -> dict[str, str]:
    """module → source; "" is flexkernel/__init__.py."""
    return {module_of(path): path.read_text() for path in sorted(ROOT.rglob("*.py"))}


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(files: dict[str, str]) -> Iterator[Import]:
    for module, source in files.items():
        is_package = any(other.startswith(f"{module}.") for other in files) or module == ""
        reader = Reader(module, is_package, set(files))
        reader.visit(ast.parse(source))
        yield from reader.imports


def room(module: str) -> str:
    return module.split(".")[0]


def row(module: str) -> int | None:
    """Where the module's room stands in ORDER; None if it is not there."""
    return row_in(ORDER, room(module))


def row_in(order: list[str], name: str) -> int | None:
    return next((i for i, names in enumerate(order) if name in names.split()), None)


def violations(files: dict[str, str]) -> list[str]:
    wrong = [
        f"{module} has no place in the order"
        for module in files
        if module not in DOOR and row(module) is None
    ]
    for item in imports(files):
        why = against_the_order(item) if item.ours else against_a_monopoly(item)
        if why:
            wrong.append(f"{item}: {why}")
    return wrong


def against_the_order(item: Import) -> str | None:
    if item.importer == "":
        light = item.lazy or item.target in ("", "errors", "_version") or item.target == room("")
        return None if light or typed_only(item) else "the door imports it only when asked for it"
    if room(item.importer) == room(item.target) == "engine":
        return against_the_engines_order(item)
    if item.importer in DOOR or room(item.importer) == room(item.target):
        return None
    if (item.importer, item.target) in EXCEPTIONS:
        return None
    if item.target in DOOR:
        return "nobody imports the door"
    above = row(item.importer)
    below = row(item.target)
    if above is None or below is None or below < above:
        return engine_has_a_door(item)
    return "imports go down only"


def against_the_engines_order(item: Import) -> str | None:
    """The door stands above all of the engine, and nothing in it asks for the door."""
    importer = item.importer.partition(".")[2].split(".")[0]
    target = item.target.partition(".")[2].split(".")[0]
    if importer == target or not importer:
        return None
    above = row_in(ENGINE, importer)
    below = row_in(ENGINE, target)
    if above is None or (target and below is None):
        return f"{importer if above is None else target} has no place in the engine's order"
    down = below is not None and below < above
    return None if down else "imports within the engine go down only"


def typed_only(item: Import) -> bool:
    """Whether the door imports it for the type checker: those lines come before any other."""
    source = sources().get("", "").splitlines()
    before = source[: item.line - 1]
    outside = [line for line in before if line and not line.startswith(" ")]
    return outside[-1:] == ["if TYPE_CHECKING:"]


def engine_has_a_door(item: Import) -> str | None:
    """Whoever is above the engine names its door, no file behind it."""
    inside = item.target.startswith("engine.")
    return "others import flexkernel.engine, no file in it" if inside else None


def against_a_monopoly(item: Import) -> str | None:
    behind_the_door = item.importer == "engine" and item.lazy  # on an engine torch is there
    if item.target == "torch" and item.importer in WITHOUT_TORCH and not behind_the_door:
        return "it must not need torch"
    owners = ONLY.get(item.target, ())
    allowed = not owners or any(is_in(item.importer, owner) for owner in owners)
    return None if allowed else f"only {' and '.join(owners)} may"


def is_in(module: str, owner: str) -> bool:
    return module == owner or module.startswith(f"{owner}.")


def rings(files: dict[str, str]) -> list[str]:
    """Each ring of modules once. The door is left out."""
    graph: dict[str, set[str]] = {module: set() for module in files if module not in DOOR}
    for item in imports(files):
        inside = item.importer in graph and item.target in graph
        excepted = (item.importer, item.target) in EXCEPTIONS
        if item.ours and inside and item.target != item.importer and not excepted:
            graph[item.importer].add(item.target)
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


# --- the package keeps to the order -------------------------------------------------------


def test_there_is_something_to_check():
    assert len(sources()) > 20
    assert len(list(imports(sources()))) > 100


def test_imports_go_down_only():
    assert violations(sources()) == []


def test_no_module_is_part_of_a_ring():
    assert rings(sources()) == []


def test_every_exception_is_needed_and_has_a_reason():
    found = {(item.importer, item.target) for item in imports(sources())}
    for pair, reason in EXCEPTIONS.items():
        assert pair in found
        assert len(reason) > 10


# --- the check can fail, and says what and where ------------------------------------------

NAMES = ["", "errors", "wire", "memory", "memory.slab", "memory.server", "cluster"]
NAMES += ["cluster.cluster", "cluster.launchers", "session", "session.session", "session.capture"]
NAMES += [
    "engine",
    "engine.run",
    "engine.run.hooks",
    "engine.run.edits",
    "views",
    "views.tensormap",
]
NAMES += ["experiments", "experiments.sweep", "notebook", "notebook.magics", "notebook.kernel"]
MODULES = dict.fromkeys(NAMES, "")
DOWN = "imports go down only"
WITHIN = "imports within the engine go down only"


@pytest.mark.parametrize(
    ("module", "source", "says"),
    [
        ("wire", "import torch", "wire:1 imports torch: it must not need torch"),
        ("wire", "def f():\n    import torch.nn", "wire:2 imports torch: it must not need torch"),
        ("", "import torch", "__init__:1 imports torch: it must not need torch"),
        ("engine", "import torch", "engine:1 imports torch: it must not need torch"),
        ("", "from .session.session import start", "the door imports it only when asked for it"),
        ("errors", "from .memory.slab import Slab", f"errors:1 imports memory.slab: {DOWN}"),
        ("memory.slab", "from .. import session", f"memory.slab:1 imports session: {DOWN}"),
        ("memory.slab", "import flexkernel.session.session as s", DOWN),
        ("memory.slab", "from flexkernel.session import session", DOWN),
        (
            "session.session",
            "async def f():\n    from flexkernel.notebook.magics import x",
            f"session.session:2 imports notebook.magics: {DOWN}",
        ),
        (
            "session.capture",
            "if TYPE_CHECKING:\n    from flexkernel.experiments.sweep import Sweep",
            f"session.capture:2 imports experiments.sweep: {DOWN}",
        ),
        (
            "session.session",
            "import_module('flexkernel.notebook.magics')",
            f"session.session:1 imports notebook.magics: {DOWN}",
        ),
        (
            "session.session",
            "import zmq.asyncio",
            "imports zmq: only memory.channel and memory.client and memory.server may",
        ),
        (
            "session.session",
            "try:\n    import ipyparallel as ipp\nfinally:\n    pass",
            "session.session:2 imports ipyparallel: only cluster may",
        ),
        ("session.session", "from IPython.display import display", "only notebook may"),
        ("notebook.magics", "from ipykernel.comm import Comm", "only notebook.kernel may"),
        ("engine.run.hooks", "import zmq", "engine.run.hooks:1 imports zmq"),
        ("engine.run.hooks", "from flexkernel.session.capture import Capture", DOWN),
        ("engine", "from flexkernel.cluster.cluster import x", DOWN),
        ("session.session", "from flexkernel.engine.run.hooks import attach", "no file in it"),
        ("session.session", "from flexkernel.engine.run import hooks", "no file in it"),
        ("views.tensormap", "from flexkernel.session.session import Session", DOWN),
        ("views.tensormap", "from flexkernel.engine import call", DOWN),
        ("session.session", "import_module('plotly.graph_objects')", "only views may"),
        ("session.session", "if x:\n    import zmq\nelse:\n    pass", "session.session:2"),
        ("session.session", "import flexkernel", "nobody imports the door"),
        ("engine.model", "from .run.hooks import attach", WITHIN),
        ("engine.model", "def f():\n    from flexkernel.engine.run import hooks", WITHIN),
        ("engine.place", "import flexkernel.engine", WITHIN),
        ("engine.extra", "from .run import hooks", "extra has no place in the engine's order"),
        ("helpers", "", "helpers has no place in the order"),
    ],
)
def test_the_check_can_fail(module, source, says):
    wrong = violations(MODULES | {module: source})
    assert len(wrong) == 1
    assert says in wrong[0]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("", "from .errors import FlexError"),
        ("", "def __getattr__(name):\n    from .session.session import Session"),
        ("wire", "if TYPE_CHECKING:\n    import torch"),
        ("session.session", "from flexkernel.engine import call\nfrom flexkernel import errors"),
        ("session.capture", "def show():\n    from flexkernel.views import tensor_map"),
        ("notebook.magics", "from IPython.core.magic import magics_class"),
        ("views.tensormap", "import anywidget, plotly.express\nfrom . import x"),
        ("engine.run.hooks", "import torch\nfrom flexkernel.memory.server import Server"),
        ("engine", "def call():\n    import torch\n    from .run.hooks import attach"),
    ],
)
def test_the_check_lets_pass_what_the_order_allows(module, source):
    assert violations(MODULES | {module: source}) == []


def test_the_check_for_rings_can_fail():
    capture = {"session.capture": "def f():\n    from . import session"}
    files = MODULES | capture | {"session.session": "from .capture import x"}
    assert rings(files) == ["session.session -> session.capture -> session.session"]
    typed = "if TYPE_CHECKING:\n    from .edits import x"
    back = {"engine.run.hooks": typed, "engine.run.edits": "from . import hooks"}
    assert rings(MODULES | back)
    assert rings(MODULES | {"session.session": "from .capture import x"}) == []


# --- what the door lets in and shows ------------------------------------------------------


def python(code: str) -> list[str]:
    """What a fresh interpreter prints as JSON."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def heavy_after(module: str) -> list[str]:
    """The heavy libraries that importing a module brings in."""
    return python(
        f"import json, sys, {module}; print(json.dumps([m for m in {HEAVY} if m in sys.modules]))"
    )


@pytest.mark.parametrize(
    "module", ["flexkernel", "flexkernel.errors", "flexkernel.wire", "flexkernel.engine"]
)
def test_the_door_is_light(module):
    assert heavy_after(module) == []


def test_the_check_for_heavy_imports_can_fail():
    assert heavy_after("zmq") == ["zmq"]


@pytest.mark.slow
def test_the_public_list_is_what_is_there():
    """Every name of the list exists; every public name that is there is on the list."""
    code = """
import json, types, flexkernel
for name in flexkernel.__all__:
    getattr(flexkernel, name)
hidden = ("load_ipython_extension", "unload_ipython_extension", "annotations", "Any")
hidden += ("TYPE_CHECKING",)
shown = [n for n in dir(flexkernel) if not n.startswith("_") and n not in hidden]
modules = types.ModuleType
ours = [n for n in shown if n in flexkernel.__all__ or not isinstance(getattr(flexkernel, n), modules)]
print(json.dumps([sorted(set(ours)), sorted(flexkernel.__all__)]))
"""
    there, listed = python(code)
    assert there == listed
    assert len(listed) > 5


def test_a_name_that_is_not_there_is_an_attribute_error():
    import flexkernel

    with pytest.raises(AttributeError, match="module 'flexkernel' has no attribute 'no_such_name'"):
        flexkernel.no_such_name  # noqa: B018
