"""README says what is true: its tables of magics and guarantees are the code's, its files exist.

`python tests/test_readme.py` writes the tables.
"""

from __future__ import annotations

import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"
BEGIN = "<!-- {}: written by tests/test_readme.py, from the code -->\n"
END = "<!-- end -->"


def written(text: str) -> str:
    """README with its tables as the code has them."""
    from flexkernel.cluster.guarantees import guarantees_table
    from flexkernel.notebook.magics import magics_table

    for name, table in (("magics", magics_table), ("guarantees", guarantees_table)):
        before, rest = text.split(BEGIN.format(name))
        text = before + BEGIN.format(name) + table().strip() + "\n" + END + rest.split(END, 1)[1]
    return text


def test_the_tables_are_the_codes():
    text = README.read_text()
    assert "| `%flex_hook" in text and "| a dead engine |" in text, "there are tables"
    assert text == written(text), "run: python tests/test_readme.py"


def test_the_files_that_readme_names_exist():
    text = README.read_text()
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)  # code has brackets of its own
    named = re.findall(r"\]\(([^):]+)\)", prose) + re.findall(
        r"`((?:tests|notebooks)/[\w./]+)`", text
    )
    assert len(named) >= 2
    for name in named:
        assert (README.parent / name).exists(), name


def test_every_make_target_that_readme_names_exists():
    targets = set(re.findall(r"^make (\w+)|`make (\w+)`", README.read_text(), re.M))
    makefile = (README.parent / "Makefile").read_text()
    assert len(targets) >= 3
    for target in {a or b for a, b in targets}:
        assert re.search(rf"^{target}:", makefile, re.M), target


if __name__ == "__main__":
    README.write_text(written(README.read_text()))
