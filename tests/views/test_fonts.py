"""Fonts: each character of a label is drawn by a font that has it, and a box stands for none."""

from __future__ import annotations

import os
import warnings

import numpy as np
import pytest

from flexkernel.views import fonts

NOBODY = "\U0010fffe"  # a character that no font has


@pytest.fixture
def bare(monkeypatch):
    """A machine without fonts."""
    forget()
    monkeypatch.setattr(fonts, "FOLDERS", ())
    yield
    forget()


def forget():
    for remembered in (fonts.mask, fonts._font_of, fonts._ours, fonts._of_this_machine):
        remembered.cache_clear()


def test_every_printable_character_looks_different():
    glyphs = {chr(c): fonts.mask(chr(c)).tobytes() for c in range(33, 127)}
    assert len(set(glyphs.values())) == len(glyphs) == 94
    assert not fonts.mask(" ").any() and fonts.width(" ") > 2


def test_a_text_is_one_line_of_ink():
    drawn = fonts.mask("Paris gypsy")
    assert drawn.dtype == np.uint8 and drawn.shape == (fonts.HEIGHT, fonts.width("Paris gypsy"))
    assert drawn.max() == 255 and not drawn[0].any() and not drawn[-1].any()
    assert fonts.mask("").shape == (fonts.HEIGHT, 0)
    assert fonts.mask("a\nb").shape[0] == fonts.HEIGHT


@pytest.mark.filterwarnings("ignore:no font on this machine")
@pytest.mark.parametrize("text", ["привет", "ελληνικά", "שלום", "مرحبا", "café ßąń", "↵⇥→≈σ×–…·"])
def test_what_comes_along_draws_on_a_machine_without_fonts(text, bare):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = fonts.mask(text)
    assert drawn.any() and drawn.tobytes() != boxes(text)


def boxes(text: str) -> bytes:
    return fonts.mask(NOBODY * len(text)).tobytes()


@pytest.mark.filterwarnings("ignore:no font on this machine")
def test_what_no_font_has_is_a_box_and_the_rest_of_the_line_is_not(bare):
    line = fonts.mask(f"a{NOBODY}b")
    a, b = fonts.width("a"), fonts.width("b")
    assert np.array_equal(line[:, :a], fonts.mask("a"))
    assert np.array_equal(line[:, -b:], fonts.mask("b"))
    assert line[:, a:-b].tobytes() == boxes("x") == fonts.mask("字").tobytes()


def test_a_box_is_told_with_what_helps(bare):
    with pytest.warns(UserWarning, match="no font on this machine has some characters.*noto-cjk"):
        fonts.mask("世界")


def test_chinese_is_drawn_where_the_machine_has_a_font():
    if not any("wqy" in str(path) or "CJK" in str(path) for path in fonts._font_files()):
        assert not os.environ.get("CI"), "make chromium installs one"
        pytest.skip("no Chinese font here")
    glyphs = {c: fonts.mask(c).tobytes() for c in "你好世界"}
    assert len(set(glyphs.values())) == 4 and boxes("x") not in glyphs.values()
    assert fonts.width("你好 the") > fonts.width("你好") + fonts.width("the")


@pytest.mark.skipif(not fonts.SHAPED, reason="Pillow without raqm")
def test_arabic_letters_are_joined_and_the_words_of_a_label_keep_their_places():
    assert fonts.width("مرحبا") < sum(fonts.width(c) for c in "مرحبا")
    label, place = fonts.mask("[0, 3] مرحبا"), fonts.mask("[0, 3] ")
    assert np.array_equal(label[:, : place.shape[1] - 1], place[:, :-1])


def test_without_shaping_text_from_the_right_is_still_read_from_the_right(monkeypatch):
    forget()
    monkeypatch.setattr(fonts, "SHAPED", False)
    monkeypatch.setattr(fonts, "ENGINE", fonts.ImageFont.Layout.BASIC)
    aleph, bet = fonts.mask("א"), fonts.mask("ב")
    both = fonts.mask("אב")
    assert np.array_equal(both[:, : bet.shape[1] - 1], bet[:, :-1])
    assert np.array_equal(both[:, -aleph.shape[1] + 1 :], aleph[:, 1:])
    forget()


def test_fonts_with_many_characters_are_asked_first(tmp_path, monkeypatch):
    for name in (
        "Aa.ttf",
        "NotoSansCJK-Regular.ttc",
        "NotoSansCJK-Bold.ttc",
        "x.pfb",
        "unifont.otf",
    ):
        (tmp_path / name).write_bytes(b"no font")
    monkeypatch.setattr(fonts, "FOLDERS", (str(tmp_path),))
    names = [path.name for path in fonts._font_files()]
    assert names == ["NotoSansCJK-Regular.ttc", "unifont.otf", "Aa.ttf"]
    assert [fonts._opened(path) for path in fonts._font_files()] == [None] * 3
