"""The promises: each follows from the facts of how the engines came to be."""

from __future__ import annotations

import itertools

import pytest

from flexkernel.cluster.guarantees import EXAMPLES, PROMISES, How, promises, promises_table


def test_every_way_to_come_to_engines_has_every_promise_in_words():
    for facts in itertools.product(("", "local", "slurm", "other"), *[(True, False)] * 3):
        found = promises(How(*facts))
        assert [what for what, _ in found] == list(PROMISES) and all(
            len(said) > 4 for _, said in found
        )


@pytest.mark.parametrize(
    ("how", "may"),
    [
        (How("local"), True),
        (How("local", owned=False), True),
        (How("local", owned=False, controller=False), False),
        (How("other"), True),
        (How("other", owned=False), False),
        (How(""), False),
    ],
)
def test_who_may_not_start_an_engine_is_told_to_start_one_by_hand(how, may):
    said = dict(promises(how))["a dead engine"]
    assert how.may_start is may and ("by `ipcluster engines`" in said) is (
        how.launcher != "" and not may
    )


def test_the_session_says_what_is_promised_for_its_engines(session):
    rows = dict(session.status().rows)
    assert rows["engines end"] == "with the session: they are this process"


@pytest.mark.engines(2)
def test_a_session_that_started_its_engines_knows_that(session):
    assert session.cluster.how == How("local", owned=True, kept=False, controller=True)
    assert promises(session.cluster.how)[0] in session.status().rows


def test_the_table_has_a_column_for_each_way():
    lines = promises_table().splitlines()
    assert len(lines) == len(PROMISES) + 2 and {line.count(" | ") for line in lines[2:]} == {
        len(EXAMPLES)
    }
