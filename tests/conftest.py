"""What several test files need: the real model, tiny ones, and one shared cluster of engines at a
time."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
# Engines import what tests send them by name, and one thread each is what two cores can carry.
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])
)
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if sys.version_info < (
    3,
    12,
):  # Megatron-core imports setuptools, which refuses if the library's distutils was met before
    os.environ.setdefault("SETUPTOOLS_USE_DISTUTILS", "stdlib")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
# nothing is fetched with it: test_security looks
os.environ.setdefault("HF_TOKEN", "hf_a-secret-that-no-log-may-hold")
# test_environment looks
os.environ.setdefault("OF_NO_ENGINE", "a key that engines are not to have")

from hypothesis import settings  # noqa: E402

from flexkernel.notebook import demo  # noqa: E402

# The same inputs every time; `make fuzz` draws others
settings.register_profile("fixed", derandomize=True)
settings.load_profile("fixed")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="run what takes long, too")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Engines are slow; what takes long waits for --long; tests of one number of engines run
    together, so that one cluster serves them all."""
    if not any("::" in name for name in config.args):
        refuse_unknown_parameters(items)
    for item in items:
        if num_engines(item) > 1:
            item.add_marker(pytest.mark.slow)
    if not config.getoption("--long"):
        config.hook.pytest_deselected(items=[item for item in items if is_long(item)])
        items[:] = [item for item in items if not is_long(item)]
    items.sort(key=group)


def group(item: pytest.Item) -> tuple[int, bool]:
    """Tests that run together: of one number of engines, and those in a browser, which start a
    JupyterLab each, after the others, when everything has been imported once."""
    return num_engines(item), item.get_closest_marker("browser") is not None


def is_long(item: pytest.Item) -> bool:
    return any(not mark.args or parameters(item) in mark.args for mark in item.iter_markers("long"))


def parameters(item: pytest.Item) -> str:
    """What stands in brackets behind the test's name."""
    callspec = getattr(item, "callspec", None)
    return "" if callspec is None else callspec.id


def refuse_unknown_parameters(items: list[pytest.Item]) -> None:
    """A parameter's new name must not bring what is long into the gate without a word."""
    here: dict[str, set[str]] = {}
    marked: dict[str, set[str]] = {}
    for item in items:
        name = item.nodeid.partition("[")[0]
        here.setdefault(name, set()).add(parameters(item))
        marked.setdefault(name, set()).update(*(m.args for m in item.iter_markers("long")))
    for name, ids in marked.items():
        if ids - here[name]:
            raise pytest.UsageError(
                f"{name} is marked long for {ids - here[name]}, which it has not"
            )


def num_engines(item: pytest.Item) -> int:
    marker = item.get_closest_marker("engines")
    return marker.args[0] if marker else 0


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of the real demo model; the first test run on a machine fetches it."""
    return demo.model()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory):
    """tiny(arch, vocab=256): the folder of a tiny random model."""
    from tests.support import models

    folder = tmp_path_factory.mktemp("tiny")
    return lambda arch, vocab=256: models.tiny(arch, folder, vocab)


class Clusters:
    """One session over n engines at a time; asking for another number ends the last."""

    def __init__(self) -> None:
        import flexkernel as fk

        self.n, self.session = 0, None
        fk.local().close()
        # each load collects garbage: what was imported, and the thousands of tests, is none
        gc.freeze()

    def get(self, n: int) -> Any:
        import flexkernel as fk

        if self.n != n or self.session is None or not all(self.session.engines.alive()):
            self.close()
            self.n, self.session = n, fk.local() if n == 1 else fk.start(n)
        return self.session

    def close(self) -> None:
        if self.session is not None:
            self.session.close()
        self.n, self.session = 0, None


@pytest.fixture(scope="session")
def _clusters() -> Iterator[Clusters]:
    clusters = Clusters()
    yield clusters
    clusters.close()


@pytest.fixture
def session(request: pytest.FixtureRequest, _clusters: Clusters) -> Iterator[Any]:
    """A session over as many engines as the test's `engines(n)` mark says (1: in this process). No
    hooks, no runs."""
    session = _clusters.get(num_engines(request.node) or 1)
    yield session
    if session.has_model:
        session.unhook()
        for run in session.runs:
            run.free()
