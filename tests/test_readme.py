"""README and the pages say what is true: their tables are the code's, what they name exists.

`python -m tests.test_readme` writes the tables.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from IPython.core.inputtransformer2 import TransformerManager

import flexkernel as fk

from .support import models

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
BEGIN = "<!-- {}: written by tests/test_readme.py, from the code -->\n"
END = "<!-- end -->"
LAYER = "model.layers.1"  # what stands for layer i of the table of names


def tables() -> dict[str, tuple[Path, Callable[[], str]]]:
    """Name of a table → its page, and the function that makes it from the code."""
    from flexkernel.cluster.guarantees import guarantees_table
    from flexkernel.notebook.magics import magics_table

    return {
        "magics": (README, magics_table),
        "guarantees": (ROOT / "docs" / "clusters.md", guarantees_table),
    }


def written(name: str) -> str:
    """The page of a table, with the table as the code has it."""
    page, table = tables()[name]
    before, rest = page.read_text().split(BEGIN.format(name))
    return before + BEGIN.format(name) + table().strip() + "\n" + END + rest.split(END, 1)[1]


@pytest.mark.parametrize(
    ("name", "row"), [("magics", "| `%flex_hook"), ("guarantees", "| a dead engine |")]
)
def test_the_tables_are_the_codes(name, row):
    text = tables()[name][0].read_text()
    assert row in text, "there is a table"
    assert text == written(name), "run: python -m tests.test_readme"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_files_that_a_page_names_exist(page):
    text = page.read_text()
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)  # code has brackets of its own
    for name in re.findall(r"\]\(([^):]+)\)", prose):
        assert (page.parent / name.partition("#")[0]).exists(), name
    for name in re.findall(r"`((?:tests|tools|notebooks|flexkernel)/[\w./]+)`", text):
        assert (ROOT / name).exists(), name


def test_readme_names_files_and_every_page():
    text = README.read_text()
    assert len(re.findall(r"`((?:tests|notebooks)/[\w./]+)`", text)) >= 2
    for page in PAGES[1:]:
        assert f"docs/{page.name}" in text, page.name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_make_target_that_a_page_names_exists(page):
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)|`make (\w+)", page.read_text(), re.M):
        assert re.search(rf"^{target[0] or target[1]}:", makefile, re.M), target


def test_readme_names_make_targets():
    assert len(set(re.findall(r"^make (\w+)", README.read_text(), re.M))) >= 2


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_code_of_a_page_is_python_with_magics(page):
    for block in blocks(page):
        ast.parse(TransformerManager().transform_cell(block))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_magics_in_the_code_of_a_page_take_what_they_are_given(page):
    from flexkernel.notebook import lines
    from flexkernel.notebook.magics import FlexMagics

    for line in re.findall(r"%(flex_\w+.*?)(?:  +#.*)?$", "\n".join(blocks(page)), re.M):
        name, _, arguments = line.partition(" ")
        magic = getattr(FlexMagics, name)
        if name == "flex_run":
            arguments, _ = lines.split_prompt(arguments, lines.options_of(magic))
        lines.parse(magic, arguments)


# --- everything public is documented ------------------------------------------------------


def public_names() -> list[tuple[str, object]]:
    """(name, object) of what `flexkernel` shows, and of the attributes of its classes."""
    names = [(name, getattr(fk, name)) for name in fk.__all__]
    for cls in [thing for _, thing in names if inspect.isclass(thing)]:
        for name, thing in vars(cls).items():
            if not name.startswith("_") and (callable(thing) or isinstance(thing, property)):
                names.append((f"{cls.__name__}.{name}", thing))
    return names


def test_every_public_name_has_a_docstring_or_stands_on_a_page():
    names = public_names()
    assert len(names) > 60
    text = "\n".join(page.read_text() for page in PAGES)
    undocumented = [
        name
        for name, thing in names
        if not inspect.getdoc(thing) and not re.search(rf"\W{name.rpartition('.')[2]}\W", text)
    ]
    assert undocumented == []


def test_every_magic_stands_in_readme_and_has_a_docstring():
    from flexkernel.notebook.magics import FlexMagics

    text = README.read_text()
    magics = {name for kind in FlexMagics.magics.values() for name in kind}
    assert len(magics) >= 12
    for name in magics:
        assert re.search(rf"^\| `%%?{name}[ `]", text, re.M), name
        assert inspect.getdoc(getattr(FlexMagics, name)), name


# --- the words of the trade ---------------------------------------------------------------


def names_table() -> dict[str, tuple[str, str]]:
    """TransformerLens' name → (module, at), from README, for one layer."""
    table = README.read_text().partition("<!-- names:")[2].partition(END)[0]
    rows = re.findall(r"^\| `([\w.]+)`.*? \| `([^`]+)`", table, re.M)
    named = {}
    for name, hook in rows:
        module, _, at = hook.replace("model.layers.i", LAYER).partition(" --at ")
        named[name] = (module, at or "output")
    return named


def test_the_trades_names_are_what_readme_says(tmp_path):
    table = names_table()
    assert len(table) >= 10
    with fk.local() as session:
        session.load(models.reading_bytes("llama", tmp_path))
        for module, at in table.values():
            session.hook(module, at=at)
        run = session.run("abc")
        value = {name: run[module, at].tensor() for name, (module, at) in table.items()}

    def close(a: torch.Tensor, b: torch.Tensor) -> None:
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)

    close(value["resid_mid"], value["resid_pre"] + value["attn_out"])
    close(value["resid_post"], value["resid_mid"] + value["mlp_out"])
    pattern = value["attn.hook_pattern"]
    close(pattern.sum(-1), torch.ones(pattern.shape[:-1]))
    heads, positions = pattern.shape[1:3]
    assert value["attn.hook_z"].shape[:3] == (1, positions, heads)
    assert value["mlp.hook_post"].shape == value["mlp.hook_pre"].shape


if __name__ == "__main__":
    for name, (page, _) in tables().items():
        page.write_text(written(name))
