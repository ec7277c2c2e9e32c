"""The book of hooks by itself: what it sends, and what it keeps while a rank is dead."""

from __future__ import annotations

import pytest

from flexkernel.errors import EngineDied, EngineError, HookError, LoadError
from flexkernel.session.hooks import HookBook

MLP = "model.layers.*.mlp"
HOW: dict = {"edit": None, "value": None, "near": True, "replace": False, "options": {}}


class Engines:
    """Notes the calls; while `dead` is set, raises that instead."""

    def __init__(self):
        self.calls: list[tuple] = []
        self.dead: BaseException | None = None

    def call(self, method, *args):
        if self.dead is not None:
            raise self.dead
        self.calls.append((method, *args))
        return [{"seen": 1}, {"by": 2}]

    @property
    def hook_set(self):
        return [args[0] for method, *args in self.calls if method == "set_hooks"][-1]


@pytest.fixture
def engines():
    return Engines()


@pytest.fixture
def book(engines, session, tiny):
    if not session.has_model or session.loaded.info.path != str(tiny("llama")):
        session.load(tiny("llama"))
    book = HookBook(engines.call)
    book.begin(session.loaded)
    return book


def test_without_a_model_there_are_no_hooks_and_none_can_be_made(engines):
    book = HookBook(engines.call)
    assert list(book) == [] and len(book) == 0 and repr(book) == "no hooks"
    for does in (lambda: book.hook(MLP, **HOW), book.remove, lambda: book.group("list")):
        with pytest.raises(LoadError, match=r"no model is loaded: session\.load\(path"):
            does()
    assert engines.calls == []


def test_a_change_is_sent_and_kept(engines, book):
    book.hook(MLP, **HOW)
    assert engines.hook_set == book.hook_set and [spec.key for spec in book] == [MLP]
    book.hook(MLP, **HOW)
    assert len(engines.calls) == 1, "nothing has changed"
    assert book.remove() == [MLP] and engines.hook_set.hooks == () == book.hook_set.hooks


def test_what_is_refused_is_not_sent(engines, book):
    with pytest.raises(HookError, match="no module matches"):
        book.hook("nothing", **HOW)
    assert engines.calls == [] and len(book) == 0


def test_a_change_while_a_rank_is_dead_is_sent_when_it_is_back(engines, book):
    book.hook("model.norm", **HOW)
    engines.dead = EngineDied("rank 1's engine is gone", 1)
    book.defining("double", "whole")(lambda x, ctx: x * 2)
    hook = book.hook(MLP, **HOW | {"edit": "double"})
    assert "a rank is dead: it gets the hook when it is back" in repr(hook)
    assert book.group("add", "g", MLP) == {"g": [MLP]} and len(book) == 2 and not book.sent
    with pytest.raises(EngineDied):
        book.send()
    engines.dead = None
    sent = len(engines.calls)
    book.send()
    assert [call[0] for call in engines.calls[sent:]] == ["define", "set_hooks"]
    assert engines.hook_set == book.hook_set and book.sent
    book.send()
    assert len(engines.calls) == sent + 2, "all is sent"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), EngineError("it cannot", 0)])
def test_a_change_that_breaks_off_leaves_the_hooks_and_is_made_good(error, engines, book):
    book.hook("model.norm", **HOW)
    before = book.hook_set
    engines.dead = error
    with pytest.raises(type(error)):
        book.hook(MLP, **HOW)
    assert book.hook_set == before and not book.sent
    engines.dead = None
    book.send()
    assert engines.hook_set == before and book.sent


def test_a_model_that_goes_takes_its_hooks_and_leaves_the_edits(engines, book, session):
    book.defining("double", "whole")(lambda x, ctx: x * 2)
    book.hook(MLP, **HOW | {"edit": "double"})
    book.end()
    assert len(book) == 0 and list(book.edits) == ["double"]
    book.begin(session.loaded)
    assert len(book) == 0


def test_what_edits_saved_is_put_together(book):
    assert book.saved("double") == {"seen": 1, "by": 2}
