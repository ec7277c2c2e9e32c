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

from flexkernel.notebook import demo  # noqa: E402

AXES = ("tp", "pp", "fsdp", "dp")
SMALL = ("mixtral", "qwen3", "llama_untied")
# What `make long` runs beside the rest: continuous integration has two cores and 25 minutes
LONG = (
    "test_74_random_bytes_to_every_port",
    "test_six_gigabytes_are",
    "real_model_equals_the_unsharded_one[fsdp2-sdpa",
    "test_edits_of_the_real_model_give_the_unsharded_next_token[fsdp2]",
    "test_a_dead_rank_comes_back_alone[{'pp': 2}-1]",
    "test_a_dead_rank_comes_back_alone[{'fsdp': 2}-1]",
    "test_a_builders_model_comes_back_too",
    "test_an_engine_that_was_stopped_is_ended_before_its_rank",
    "test_an_engine_that_was_stopped_is_named_and_another_takes_its_rank",
    "of_a_kept_cluster_says_how_its_controller",
    "test_a_kept_cluster_outlives_its_driver",
    "test_a_loss_sees_captures_of_any_stage[tp2xfsdp2]",
    "test_a_cluster_that_another_ended",
    "test_a_session_whose_engines_another_took",
    "64-once",
    "test_a_large_map_in_jupyterlab_from_drawing",
    "test_a_notebook_runs_and_says_nothing_aside[tuned_lens]",
    "real_model_equals_the_unsharded_one[tp3-eager",
    *(
        f"unsharded_one[{arch}-{layout}2-eager]"
        for arch in ("mistral", "mixtral", "gpt2", "gemma2")
        for layout in AXES
    ),
    *(
        f"two_engines_it_is_the_unsharded_ones[{arch}-256-{{'{axis}'"
        for arch in SMALL
        for axis in ("dp", "fsdp")
    ),
    "tp3xpp2",
    "tp2xpp2xdp2",
    "test_autograd.py::test_gradients_go_through_edits[pp2xfsdp2]",
    "test_autograd.py::test_a_loss_sees_captures_of_any_stage[pp2xfsdp2]",
    "real_model_equals_the_unsharded_one[pp2-eager]",
    "real_model_equals_the_unsharded_one[fsdp2-eager]",
    "real_model_equals_the_unsharded_one[dp2-",
    "test_edits.py::test_noise_does_not_depend_on_the_layout[pp2xfsdp2]",
    "test_edits.py::test_noise_does_not_depend_on_the_layout[tp2xpp2]",
    "test_edits.py::test_a_capture_is_patched_into_another_run[pp2xfsdp2]",
    "test_edits.py::test_a_capture_of_an_edited_activation_is_after_or_before_it[pp2xfsdp2]",
    "test_edits.py::test_both_sides_of_an_edit_are_captured_apart[pp2xfsdp2]",
    "four_engines_it_is_the_unsharded_ones[llama_untied",
    "four_engines_it_is_the_unsharded_ones[mixtral",
    "test_gradients.py::test_a_step_is_made_of_the_edited_gradients[tp2xpp2]",
    "test_gradients.py::test_a_step_is_made_of_the_edited_gradients[pp2xfsdp2]",
    "test_gradients.py::test_an_edit_sees_the_whole_gradient[tp2xfsdp2]",
    "test_gradients.py::test_an_edit_sees_the_whole_gradient[pp2xfsdp2]",
    "test_edits.py::test_every_edit_does_what_it_does_to_the_unsharded_model[pp2xfsdp2]",
    "test_train.py::test_modules_train_as_beside_the_unsharded_model[pp2xfsdp2]",
    "test_train.py::test_a_lens_on_the_real_model_learns_the_same",
    "test_generate.py::test_an_edit_is_made_at_every_step[tp2xpp2]",
    "-slow]",
    "test_watch.py::test_an_engine_that_wakes_up_again_keeps_its_rank",
    "04-ten-thousand",
    "test_24_a_tensor_of_more_than_two_gigabytes",
    "48-ten",
    "test_67_68_a_host_without",
    "test_69_few_open_files",
    "test_a_cluster_that_encrypts",
    "70-five-times",
    "71-hundred",
    "test_spill.py::test_a_killed_driver_leaves_nothing_on_disk",
    "test_jobs_are_cancelled_when_their_driver_is_killed",
    "test_a_dead_engine_of_an_attached_cluster",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="run what takes long, too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests of one number of engines run together, so that one cluster serves them all."""
    if not config.getoption("--long"):
        long = [item for item in items if any(part in item.nodeid for part in LONG)]
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if item not in set(long)]
    items.sort(key=num_engines)


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

        if self.n != n or self.session is None or not all(self.session.cluster.alive()):
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
    if session.info is not None:
        session.unhook()
        for run in session.runs:
            run.free()
