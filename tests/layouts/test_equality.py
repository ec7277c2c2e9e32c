"""The table that tools/equality.py prints: the layouts that no other test has, each cell of it."""

from __future__ import annotations

import pytest

from tools import equality


@pytest.mark.long("tp2xpp2xdp2")
@pytest.mark.parametrize(
    "layout",
    [
        pytest.param({"tp": 3}, marks=pytest.mark.engines(3), id="tp3"),
        pytest.param({"tp": 2, "pp": 2, "dp": 2}, marks=pytest.mark.engines(8), id="tp2xpp2xdp2"),
    ],
)
def test_every_cell_is_the_unsharded_model(session, tiny, layout, record_property):
    found = equality.column(session, tiny(equality.ARCH), layout)
    print(equality.table({equality.title(layout): found}))
    record_property("column", str(found))
    assert list(found) == list(equality.ROWS_OF_TABLE)
    wrong = {
        row: cell
        for row, cell in found.items()
        if isinstance(cell, str) or not cell < equality.TOLERANCE
    }
    assert not wrong


def test_a_cell_is_never_empty_and_a_refusal_names_its_reason(session, tiny, monkeypatch):
    def refused(session, folder):
        raise ValueError("for this reason")

    monkeypatch.setattr(
        equality, "ROWS_OF_TABLE", {"parameters read": equality.parameters, "another": refused}
    )
    found = equality.column(session, tiny(equality.ARCH), {})
    assert found == {"parameters read": 0.0, "another": "ValueError: for this reason"}
    assert (
        equality.table({"one": found}).splitlines()[-1]
        == "| another | ValueError: for this reason |"
    )
