"""Names: a rank's modules are called as the unsharded model calls them."""

from __future__ import annotations

import pickle

import pytest
from torch import nn

from flexkernel.engine.model.part import modules_of, renamed
from flexkernel.errors import LoadError


class Holder(nn.Module):
    def __init__(self, **children: nn.Module):
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


def model() -> nn.Module:
    return Holder(
        stage=Holder(layers=nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])), head=nn.Linear(2, 2)
    )


def names(mapping) -> list[str]:
    return sorted(modules_of(model(), pickle.dumps(mapping)))


def third(name: str) -> str | None:
    """As a pipeline's stage would: its layers are the third and fourth; its container is
    nothing."""
    if name == "stage":
        return None
    return (
        name.replace("stage.layers.0", "layers.2")
        .replace("stage.layers.1", "layers.3")
        .removeprefix("stage.")
    )


def wrong(name: str) -> int:
    return 3


def test_without_names_they_are_the_modules_own():
    assert sorted(modules_of(model())) == [
        "",
        "head",
        "stage",
        "stage.layers",
        "stage.layers.0",
        "stage.layers.1",
    ]


def test_a_mapping_replaces_the_longest_prefix():
    found = names({"stage": "model", "stage.layers.1": "model.layers.7"})
    assert found == ["", "head", "model", "model.layers", "model.layers.0", "model.layers.7"]
    rename = renamed(pickle.dumps({"a": "b"}))
    assert (rename("a"), rename("a.c"), rename("ab"), rename("c.a")) == ("b", "b.c", "ab", "c.a")


def test_an_empty_prefix_is_put_before_every_name_but_the_roots():
    assert names({"": "model"}) == ["", *(f"model.{n}" for n in sorted(modules_of(model())) if n)]


def test_a_function_renames_and_leaves_out():
    assert names(third) == ["", "head", "layers", "layers.2", "layers.3"]


def test_a_wrappers_inner_model_can_take_the_roots_name():
    whole = Holder(inner=nn.Sequential(nn.Linear(2, 2)), extra=nn.Identity())
    found = modules_of(whole, pickle.dumps({"inner": ""}))
    assert sorted(found) == ["", "0", "extra"] and found[""] is whole.inner


def test_two_modules_of_one_name_are_refused():
    with pytest.raises(
        LoadError, match=r"names= calls both 'stage.layers.0' and 'stage.layers.1' 'layer'"
    ):
        names({"stage.layers.0": "layer", "stage.layers.1": "layer"})


@pytest.mark.parametrize("what", [3, ["a"], {"a": 1}, wrong])
def test_what_gives_no_names_is_refused(what):
    with pytest.raises(
        LoadError, match=r"names= (is a function of a module's name|gave 3 for '(head|stage))"
    ):
        names(what)


def test_a_module_that_is_there_twice_is_found_under_both_names():
    shared = nn.Linear(2, 2)
    whole = Holder(a=shared, b=shared)
    assert sorted(modules_of(whole)) == ["", "a"]
    assert sorted(modules_of(whole, twice=True)) == ["", "a", "b"]
