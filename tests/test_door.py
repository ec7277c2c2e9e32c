"""The door: the public names, the old ones for one version, and the types."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import flexkernel as fk


def test_a_tensor_of_ones_own_is_drawn_from_the_door():
    from flexkernel.views import tensor_map

    assert fk.tensor_map is tensor_map and "tensor_map" in fk.__all__


def test_the_old_name_of_the_views_warns():
    sys.modules.pop("flexkernel.widgets", None)
    with pytest.warns(DeprecationWarning, match="from flexkernel import tensor_map"):
        from flexkernel.widgets import tensor_map
    assert tensor_map is fk.tensor_map


def test_type_checkers_are_told_that_there_are_types():
    assert (Path(fk.__file__).parent / "py.typed").exists()


def test_old_names_of_a_session_warn_and_work():
    with fk.local() as session:
        with pytest.warns(DeprecationWarning, match=r"session\.cluster is session\.engines now"):
            assert session.cluster is session.engines
        with pytest.warns(DeprecationWarning, match=r"session\.timeout_s is session\.engines"):
            session.timeout_s = 7.0
        assert session.engines.timeout_s == 7.0
        with pytest.raises(AttributeError, match="'Session' object has no attribute 'nothing'"):
            session.nothing  # noqa: B018
