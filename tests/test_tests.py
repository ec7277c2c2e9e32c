"""The tests themselves: none leans on another, and every helper is named by its room."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
TOOLS = TESTS.parent / "tools"
FILES = sorted([*TESTS.rglob("*.py"), *TOOLS.rglob("*.py")])


def imported(source: str) -> Iterator[str]:
    """Each module, or name of a module, that the text imports, in functions too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def of_tests(names: Iterator[str]) -> list[str]:
    return [name for name in names if any(part.startswith("test_") for part in name.split("."))]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(TESTS.parent)))
def test_nothing_imports_a_test_module(path):
    """What two of them need is in tests/support."""
    own = ".".join(path.relative_to(TESTS.parent).with_suffix("").parts)
    assert [name for name in of_tests(imported(path.read_text())) if name != own] == []


def test_an_import_of_a_test_module_is_found():
    found = of_tests(imported("def f():\n    from tests.views import test_grid\nimport os"))
    assert found == ["tests.views.test_grid"]
    assert of_tests(imported("from tests.views.test_grid import Source")) == [
        "tests.views.test_grid.Source"
    ]


def test_every_folder_is_a_package():
    """So that engines import a test's functions by the same name as this process."""
    folders = {path.parent for path in FILES}
    assert {TESTS, TESTS / "support", TESTS / "engine" / "run", TOOLS} <= folders
    assert [folder for folder in folders if not (folder / "__init__.py").exists()] == []
