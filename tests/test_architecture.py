"""docs/architecture.md: the rooms, files and names that it names are there, and its paths are what
a trace of the calls prints."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tools import trace

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "architecture.md").read_text()
STEP = re.compile(r"`([\w/]+\.py):([\w.]+)`")


def section(title: str) -> list[str]:
    """The steps under this title, as file:function."""
    text = TEXT.partition(f"### {title}\n")[2]
    return [":".join(step) for step in STEP.findall(re.split(r"\n##", text)[0])]


def names_in(path: Path) -> set[str]:
    """Functions, inner ones too, classes with their methods, and constants of a file."""
    tree = ast.parse(path.read_text())
    names = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    for node in tree.body:
        if isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
        if isinstance(node, ast.ClassDef):
            inner = [n for n in node.body if isinstance(n, ast.FunctionDef)]
            names |= {node.name} | {f"{node.name}.{n.name}" for n in inner}
    return names


def missing_step(steps: list[str], printed: list[str]) -> str | None:
    """The first step that the trace does not print behind those before it."""
    rest = iter(printed)
    return next((step for step in steps if step not in rest), None)


def test_every_file_and_name_is_there():
    found = STEP.findall(TEXT)
    assert len(found) > 80
    for file, name in found:
        assert name in names_in(ROOT / "flexkernel" / file), f"{file}:{name}"


def test_every_path_is_there_and_every_room_is_named():
    named = set(re.findall(r"`((?:flexkernel|tests)/[\w/]*(?:\.py)?)`", TEXT))
    assert [path for path in named if not (ROOT / path).exists()] == []
    rooms = {f"flexkernel/{p.parent.name}/" for p in (ROOT / "flexkernel").glob("*/__init__.py")}
    rooms |= {f"flexkernel/engine/{n}/" for n in ("run", "model", "ranks", "place")}
    assert rooms <= named


@pytest.fixture(scope="module")
def printed() -> dict[str, list[str]]:
    return trace.paths()


@pytest.mark.parametrize("title", trace.PATHS)
def test_a_path_is_what_a_trace_of_the_calls_prints(title, printed):
    steps = section(f"One {title}")
    assert len(steps) > 10
    assert missing_step(steps, printed[title]) is None


def test_a_step_that_is_not_made_or_out_of_order_is_found():
    assert missing_step(["a", "c"], ["a", "b", "c"]) is None
    assert missing_step(["a", "x"], ["a", "b", "c"]) == "x"
    assert missing_step(["c", "a"], ["a", "b", "c"]) == "a"
