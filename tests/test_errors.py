"""The tree of errors and how one looks in a notebook."""

from __future__ import annotations

import inspect
import pickle
import re

import pytest

from flexkernel import errors
from flexkernel.errors import EngineError, FlexError, HookError, named

CLASSES = {
    name: found
    for name, found in vars(errors).items()
    if inspect.isclass(found)
    and issubclass(found, FlexError)
    and found.__module__ == errors.__name__
}


def drawn_parents() -> dict[str, str]:
    """name -> parent, as the tree at the top of errors.py draws them."""
    path: list[str] = []
    parents = {}
    for line in (errors.__doc__ or "").splitlines():
        found = re.match(r"([│├└─ ]*)([A-Z]\w+)(?:\s{2,}|$)", line)
        if not found:
            continue
        depth, name = len(found[1]) // 4, found[2]
        path = [*path[:depth], name]
        if depth:
            parents[name] = path[depth - 1]
    return parents


def test_the_tree_that_is_drawn_is_the_tree_that_is_there():
    real = {
        name: found.__bases__[0].__name__
        for name, found in CLASSES.items()
        if found is not FlexError
    }
    assert len(real) >= 10
    assert drawn_parents() == real


def test_every_error_is_public():
    assert set(errors.__all__) == {*CLASSES, "first_line", "named"}


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_an_error_shows_as_its_sentence_without_our_insides(name):
    error = CLASSES[name]("no module matches 'x'")
    assert error._render_traceback_() == [f"{name}: no module matches 'x'"]


def test_an_engines_error_shows_its_rank_and_its_own_traceback():
    error = EngineError(
        "rank 2: ZeroDivisionError: division by zero", 2, 'File "edit.py", line 3\n  1 / 0\n'
    )
    assert error._render_traceback_() == [
        "EngineError: rank 2: ZeroDivisionError: division by zero",
        "--- traceback of rank 2 ---",
        'File "edit.py", line 3\n  1 / 0',
    ]


INSIDES = f"""Traceback (most recent call last):
  File "{errors.__file__.replace("errors.py", "engine/run/edits.py")}", line 260, in run
    return function(x, part.context)
           ^^^^^^^^^^^^^^^^^^^^^^^^^
  File "<edit mine>", line 2, in mine
    y = x.foo
        ^^^^^
"""
OWN = """  File "/home/me/probes.py", line 7, in helper
    return x.foo
"""
BELOW = """  File "/venv/lib/python3.11/site-packages/torch/nn/modules/module.py", line 1, in _call
    result = hook(self, args, result)
AttributeError: 'Tensor' object has no attribute 'foo'
"""


@pytest.mark.parametrize("name", ["EditError", "LossError"])
def test_an_error_in_a_users_function_shows_the_users_frames_only(name):
    message = "edit 'mine' raised AttributeError (line 2: y = x.foo)"
    one = CLASSES[name](message, 0, INSIDES + BELOW)
    assert one._render_traceback_() == [f"{name}: {message}"]
    _, head, frames = CLASSES[name](message, 1, INSIDES + OWN + BELOW)._render_traceback_()
    assert head == "--- traceback of rank 1 ---"
    assert '"<edit mine>", line 2' in frames and '"/home/me/probes.py", line 7' in frames
    assert "edits.py" not in frames and "torch" not in frames


def test_an_engines_error_without_a_traceback_shows_its_sentence_only():
    error = EngineError("rank 0 did not answer", 0)
    assert error.rank == 0 and error.remote_traceback == ""
    assert error._render_traceback_() == ["EngineError: rank 0 did not answer"]


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_an_error_gets_its_class_back_by_name(name):
    assert named(name) is CLASSES[name]


@pytest.mark.parametrize("name", ["ValueError", "named", "annotations", "no_such_name", ""])
def test_a_name_that_is_not_ours_is_an_engine_error(name):
    assert named(name) is EngineError


def test_errors_survive_pickling():
    error = pickle.loads(pickle.dumps(EngineError("boom", 3, "traceback")))
    assert (str(error), error.rank, error.remote_traceback) == ("boom", 3, "traceback")
    assert type(pickle.loads(pickle.dumps(HookError("x")))) is HookError
