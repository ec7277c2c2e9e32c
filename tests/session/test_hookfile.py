"""Hooks and edits to a file and back: equal, readable, and never half of it."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import flexkernel as fk
from flexkernel.cluster.packing import pack
from flexkernel.session import hookfile
from flexkernel.session.source import compiled
from flexkernel.wire import EditSpec, HookSet, HookSpec

IDS = [[5, 6, 7, 8, 9]]
NAME = "model.layers.1.mlp"
STEERING = torch.linspace(-1, 1, 64)


def fill(session) -> None:
    """A hook of every kind, groups of which one is off, and edits."""

    @session.edit("soft", per="row")
    def soft(x, ctx):
        """Its comment and its lines are kept."""
        y = F.softmax(x, -1)  # a comment
        return torch.where(x > math.pi, y, x)

    session.edit("double")(lambda x, ctx: x * 2.0)
    session.edit("steer")(lambda x, ctx: x + STEERING)
    session.hook("model.layers.*.mlp", groups=["a", "b"], positions=[0, -1])
    session.hook(NAME, at="input", index=0, name="in")
    session.hook(NAME, edit="add", value=STEERING, capture="both", name="steered", groups="b")
    session.hook("model.layers.2", edit="clamp", value=(-1, 1), neurons=[3, 5], name="clamped")
    session.hook(
        "model.layers.*.self_attn.@z", edit="scale", value=0.5, heads=[0, 2], capture="none"
    )
    session.hook("model.layers.3.mlp", edit="soft")
    session.hook("model.layers.3", edit="double")
    session.hook("model.layers.0", edit="steer")
    session.hooks.group("off", "a")


def text(path) -> dict:
    return json.loads(path.read_text())


@pytest.mark.parametrize(
    "layout", [{}, pytest.param({"tp": 2}, marks=pytest.mark.engines(2))], ids=["one", "tp"]
)
def test_a_file_of_hooks_gives_equal_hooks_and_edits_that_do_the_same(
    session, tiny, tmp_path, layout
):
    session.load(tiny("llama"), **layout)
    fill(session)
    before, logits = session.hooks.hook_set, session.run(IDS).logits.tensor()
    path = session.hooks.save(tmp_path / "hooks.json")
    session.load(tiny("llama"), **layout)
    session.hooks.edits = {}
    assert session.hooks.hook_set != before and len(before.hooks) == 8 and before.off == {"a"}
    shown = session.hooks.load(path)
    assert (
        session.hooks.hook_set == before
        and session.hooks.hook_set.digest == before.digest
        and len(shown) == 8
    )
    assert torch.equal(session.run(IDS).logits.tensor(), logits)
    again = session.hooks.save(tmp_path / "again.json")
    assert text(again)["hooks"] == text(path)["hooks"]
    assert {n: e.get("source") for n, e in text(again)["edits"].items()} == {
        n: e.get("source") for n, e in text(path)["edits"].items()
    }


def test_an_edit_is_text_where_its_text_is_all_of_it(session, tiny, tmp_path):
    session.load(tiny("llama"))
    fill(session)
    edits = text(session.hooks.save(tmp_path / "hooks.json"))["edits"]
    assert edits["soft"]["imports"] == {
        "F": "torch.nn.functional",
        "torch": "torch",
        "math": "math",
    }
    assert (
        edits["soft"]["source"].startswith("def soft(x, ctx):\n")
        and "# a comment" in edits["soft"]["source"]
    )
    assert edits["soft"]["per"] == "row"
    assert edits["double"]["source"] == "def double(x, ctx):\n    return x * 2.0\n"
    assert "source" not in edits["steer"] and edits["steer"]["warning"].startswith(
        "pickled code: loading this file"
    )


def test_the_body_of_a_cell_is_text_and_gives_its_last_line(tmp_path):
    function = compiled(
        "cell", "def cell(x, ctx):\n    y = x + 1\n    y * 2\n", {"__name__": "__main__"}
    )
    path = hookfile.write(
        tmp_path / "h.json", HookSet(), {"cell": EditSpec("cell", "whole", pack(function))}
    )
    assert text(path)["edits"]["cell"]["source"] == "def cell(x, ctx):\n    y = x + 1\n    y * 2\n"
    _, edits = hookfile.read(path, pack)
    import pickle

    assert pickle.loads(edits["cell"].code)(3, None) == 8


@pytest.mark.slow
def test_another_process_can_read_it(tmp_path):
    path = tmp_path / "h.json"
    edits = {}
    for name, function in {
        "text": lambda x, ctx: torch.relu(x),
        "pickled": lambda x, ctx: x + STEERING[0],
    }.items():
        edits[name] = EditSpec(name, "whole", pack(function))
    hookfile.write(path, HookSet((HookSpec("a.*", groups=("g",)),), frozenset("g")), edits)
    code = f"""
import pickle, torch
from flexkernel.session import hookfile
from flexkernel.cluster.packing import pack
hooks, edits = hookfile.read({str(path)!r}, pack)
x = torch.tensor([-1.0, 2.0])
print(hooks, [pickle.loads(e.code)(x, None).tolist() for e in edits.values()], flush=True)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert "off=frozenset({'g'})) [[0.0, 2.0], [-2.0, 1.0]]" in done.stdout, done.stderr


def test_a_text_that_is_not_the_code_any_more_is_not_taken(tmp_path):
    """The file that held the function has changed since: what it says now is another function."""
    source = tmp_path / "mine.py"
    source.write_text("def mine(x, ctx):\n    return x + 1\n")
    names: dict = {"__name__": "__main__"}
    exec(compile(source.read_text(), str(source), "exec"), names)
    edit = EditSpec("mine", "whole", pack(names["mine"]))
    assert "source" in hookfile.of_edit(edit)
    source.write_text("def mine(x, ctx):\n    return x + 2\n")
    import linecache

    linecache.checkcache()
    assert "source" not in hookfile.of_edit(edit) and "pickle" in hookfile.of_edit(edit)


def test_a_patched_capture_is_refused_by_name_and_nothing_is_written(session, tiny, tmp_path):
    session.load(tiny("llama"))
    session.hook(NAME)
    session.hook(NAME, edit="patch", value=session.run(IDS)[NAME], name="from Rome")
    with pytest.raises(
        fk.errors.HookError,
        match=r"hook 'from Rome' patches in a capture.*session\.unhook\('from Rome'",
    ):
        session.hooks.save(tmp_path / "hooks.json")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("no json", "cannot be read as a file of hooks"),
        ("[1]", "is no file of hooks"),
        ('{"cells": []}', "is no file of hooks"),
        ('{"flexkernel hooks": 2}', "has schema 2, this flexkernel reads 1"),
        ('{"flexkernel hooks": 1}', "is damaged: KeyError"),
        (
            '{"flexkernel hooks": 1, "hooks": [{"glob": "a", "colour": 1}], "off": [], "edits": '
            "{}}",
            "is damaged",
        ),
        (
            '{"flexkernel hooks": 1, "hooks": [], "off": [], "edits": {"e": {"per": "row", '
            '"imports": {}, '
            '"source": "import os"}}}',
            "is damaged: ValueError: the source of edit 'e' is not one function",
        ),
        (
            '{"flexkernel hooks": 1, "hooks": [{"glob": "nothing.*"}], "off": [], "edits": {}}',
            r"no module matches 'nothing\.\*'",
        ),
        (
            '{"flexkernel hooks": 1, "hooks": [{"glob": "lm_head", "edit": "mine"}], "off": [], '
            '"edits": {}}',
            "no edit is called 'mine'",
        ),
    ],
)
def test_what_cannot_be_loaded_is_said_and_changes_nothing(session, tiny, tmp_path, content, says):
    if not session.has_model or session.loaded.info.path != str(tiny("llama")):
        session.load(tiny("llama"))
    session.hooks.edits = {}
    session.hook(NAME)
    before = session.hooks.hook_set
    (tmp_path / "h.json").write_text(content)
    with pytest.raises(fk.errors.HookError, match=says):
        session.hooks.load(tmp_path / "h.json")
    assert session.hooks.hook_set == before and session.hooks.edits == {}


def test_a_file_that_is_not_there_is_said(session, tiny, tmp_path):
    session.load(tiny("llama"))
    with pytest.raises(fk.errors.HookError, match=r"nothing\.json cannot be read"):
        session.hooks.load(tmp_path / "nothing.json")
