"""A few rounds of chaos; `make chaos N=200` makes more."""

from __future__ import annotations

import pytest

from tools import chaos


@pytest.mark.engines(2)
def test_after_any_fault_everything_is_as_it_was(session, tiny):
    # which takes half a minute; test_watch has one
    kinds = [kind for kind in chaos.KINDS if kind != "stop"]
    assert len(chaos.rounds(session, tiny("llama"), 7, 5, kinds=kinds)) == 5


def test_a_fault_that_means_nothing_is_refused(monkeypatch):
    from flexkernel.engine import fault_injection
    from flexkernel.errors import HookError

    for text in ("kill", "rank=0,at=a,kind=eat", "rank=x,at=a,kind=kill", "rank=0,kind=kill"):
        monkeypatch.setenv(fault_injection.FAULT, text)
        with (
            pytest.raises(HookError, match=r"is not rank=R,at=MODULE,kind=kill\|"),
            fault_injection.fault(0, {}),
        ):
            pass
