"""The guarantees: each follows from the facts of how the engines came to be."""

from __future__ import annotations

import itertools

import pytest

from flexkernel.cluster.guarantees import EXAMPLES, GUARANTEES, Origin, guarantees, guarantees_table


def test_every_way_to_come_to_engines_has_every_promise_in_words():
    for facts in itertools.product(("", "local", "slurm", "other"), *[(True, False)] * 3):
        found = guarantees(Origin(*facts))
        assert [what for what, _ in found] == list(GUARANTEES) and all(
            len(said) > 4 for _, said in found
        )


def test_a_launcher_of_a_new_kind_is_promised_no_more_than_another():
    new = dict(guarantees(Origin("kubernetes")))
    assert new == dict(guarantees(Origin("other")))
    assert new != dict(guarantees(Origin("local")))


@pytest.mark.parametrize(
    ("origin", "may"),
    [
        (Origin("local"), True),
        (Origin("local", owned=False), True),
        (Origin("local", owned=False, controller=False), False),
        (Origin("other"), True),
        (Origin("other", owned=False), False),
        (Origin(""), False),
    ],
)
def test_who_may_not_start_an_engine_is_told_to_start_one_by_hand(origin, may):
    said = dict(guarantees(origin))["a dead engine"]
    assert origin.may_start is may and ("`ipcluster engines`" in said) is (
        origin.launcher != "" and not may
    )


def test_the_session_says_what_is_promised_for_its_engines(session):
    rows = dict(session.guarantees().rows)
    assert rows["engines end"] == "They are this process."


@pytest.mark.engines(2)
def test_a_session_that_started_its_engines_knows_that(session):
    assert session.engines.origin == Origin("local", owned=True, kept=False, controller=True)
    assert guarantees(session.engines.origin)[0] in session.guarantees().rows


def test_the_table_has_a_column_for_each_way():
    lines = guarantees_table().splitlines()
    assert len(lines) == len(GUARANTEES) + 2 and {line.count(" | ") for line in lines[2:]} == {
        len(EXAMPLES)
    }
