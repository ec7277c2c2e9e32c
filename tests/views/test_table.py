"""Tables: one way to draw rows of cells, as text and as HTML that needs no style sheet."""

from __future__ import annotations

import subprocess
import sys

from flexkernel.views.table import Cell, Table, page

TABLE = Table([("mlp", "30"), ("<b>", "4")], ("captures", "n"), right=(1,), code=(0,))


def test_text_has_its_columns_in_line():
    assert TABLE.text("  ") == "  captures   n\n  mlp       30\n  <b>        4"


def test_rows_may_be_short_and_there_may_be_none():
    assert Table([("a",), ("bb", "c")]).text() == "a\nbb  c"
    assert Table([]).text() == ""
    assert "<tr" not in Table([]).html()


def test_html_brings_its_own_padding_and_its_text_is_no_markup():
    drawn = TABLE.html()
    assert "<code>&lt;b&gt;</code>" in drawn and "<b>" not in drawn
    cells = drawn.count("<td") + drawn.count("<th")
    assert cells == 6 == drawn.count("padding:")
    assert drawn.count("text-align:right") == 3 == drawn.count("text-align:left")


def test_it_takes_its_colours_from_the_page():
    drawn = TABLE.html()
    assert "background:none" in drawn and "#" not in drawn and "color:inherit" in drawn


def test_a_cell_may_be_drawn_in_its_own_way():
    table = Table([(Cell("x", html="<i>x</i>", style="color:red", span=2),)])
    assert table.text() == "x"
    assert '<td colspan="2"' in table.html() and "color:red" in table.html()
    assert "<i>x</i>" in table.html()


def test_a_page_is_a_title_above_its_parts():
    assert page("a < b", "<p>c</p>") == "<div><b>a &lt; b</b><p>c</p></div>"


def test_a_table_needs_no_widgets():
    code = "import sys, flexkernel.views.table; print('anywidget' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
