"""The trainable modules by themselves: a mapping whose weights the engines have."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save
from torch import nn

from flexkernel.errors import CaptureError, HookError, LoadError
from flexkernel.session.modules import Modules


class Engines:
    """Two ranks that keep what they are given. weights: name → what each has."""

    def __init__(self):
        self.weights: dict[str, list[dict[str, torch.Tensor]]] = {}
        self.loaded = True

    def ready(self):
        if not self.loaded:
            raise LoadError("no model is loaded")

    def call(self, method, name, *args):
        if method == "train.add":
            self.weights[name] = [{"weight": torch.ones(2, 3)}, {"weight": torch.ones(2, 3)}]
        if method == "train.remove":
            del self.weights[name]
        if method != "train.state":
            return [None, None]
        return [(save(w), float(w["weight"].sum())) for w in self.weights[name]]


@pytest.fixture
def engines():
    return Engines()


@pytest.fixture
def modules(engines):
    return Modules(engines.call, engines.ready)


def lens() -> nn.Module:
    return nn.Linear(3, 2, bias=False)


def test_before_a_load_there_are_none_and_nothing_breaks(engines, modules, tmp_path):
    engines.loaded = False
    assert list(modules) == [] and len(modules) == 0 and "lens" not in modules
    assert modules.get("lens") is None and repr(modules) == "<Modules none>"
    assert modules.save(tmp_path / "none.safetensors").exists()
    with pytest.raises(HookError, match="no trainable module is called 'lens'; there are none"):
        modules["lens"]
    with pytest.raises(LoadError):
        modules["lens"] = lens()


def test_a_module_is_read_with_the_weights_that_the_engines_have(modules):
    modules["lens"] = mine = lens()
    assert list(modules) == ["lens"] and "lens" in modules
    assert modules["lens"] is mine and torch.equal(mine.weight, torch.ones(2, 3))
    assert modules.shapes() == {"lens.weight": (2, 3)}


def test_a_module_that_is_deleted_is_gone_everywhere(engines, modules):
    modules["lens"] = lens()
    del modules["lens"]
    assert engines.weights == {} and list(modules) == []
    with pytest.raises(HookError, match="no trainable module"):
        del modules["lens"]


def test_ranks_that_differ_are_an_error(engines, modules):
    modules["lens"] = lens()
    engines.weights["lens"][1]["weight"] = torch.zeros(2, 3)
    with pytest.raises(CaptureError, match="the copies of 'lens' on the ranks have diverged"):
        modules["lens"]


@pytest.mark.parametrize(("name", "module"), [("a b", lens()), ("lens", len)])
def test_what_is_no_module_is_refused(name, module, modules):
    with pytest.raises(HookError, match=r"a trainable module has a name and is an nn\.Module"):
        modules[name] = module


def test_which_are_trained(modules):
    modules["a"] = lens()
    modules["b"] = lens()
    assert modules.trained() == ("a", "b") and modules.trained(["b"]) == ("b",)
    with pytest.raises(HookError, match="'c'; there are a, b"):
        modules.trained(["c"])


def test_before_a_load_a_session_has_an_empty_mapping():
    import flexkernel as fk

    with fk.local() as session:
        assert dict(session.modules) == {} and len(session.hooks) == 0
        with pytest.raises(HookError, match="there are none"):
            session.modules["lens"]
