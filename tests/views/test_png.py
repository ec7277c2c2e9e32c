"""The picture writer: a valid PNG with its words drawn in, read back."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from flexkernel.views import png
from flexkernel.views.png import Axis, Scale


def decode(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Indices and palette of a palette PNG, every chunk's checksum checked."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    Image.open(BytesIO(data)).verify()
    image = Image.open(BytesIO(data))
    assert image.mode == "P"
    palette = image.getpalette()
    assert palette is not None
    return np.asarray(image), np.array(palette, np.uint8).reshape(-1, 3)


def test_what_is_encoded_can_be_read_back():
    index = np.random.default_rng(0).integers(0, 256, (37, 51)).astype(np.uint8)
    palette = png.colours(True)
    pixels, colours = decode(png.encode(index, palette))
    assert np.array_equal(pixels, index)
    assert np.array_equal(colours, palette)


def test_nan_has_an_index_of_its_own_and_the_ends_are_clipped():
    values = np.array([[np.nan, -np.inf, -9, -1, 0, 1, 9, np.inf]], np.float32)
    assert png.quantise(values, -1, 1).tolist() == [[0, 1, 1, 1, 128, 255, 255, 255]]
    assert png.quantise(values, -1, 1, levels=63).tolist() == [[0, 1, 1, 1, 32, 63, 63, 63]]


def test_zero_is_nearly_white_on_the_signed_map_and_its_ends_differ_in_hue():
    colours = png.colours(True).astype(int)
    assert colours[128].min() > 240
    blue, red = colours[1], colours[255]
    assert blue[2] - blue[0] > 80 and red[0] - red[2] > 80


@pytest.mark.parametrize("signed", [True, False])
def test_lightness_is_ordered_so_that_the_map_reads_without_hue(signed):
    light = png.colours(signed)[1:].astype(float) @ [0.299, 0.587, 0.114]
    if signed:
        assert (np.diff(light[:128]) > -0.8).all() and (np.diff(light[128:]) < 0.8).all()
    else:
        assert (np.diff(light) < 0.8).all()


def picture(values, rows=(), cols=(), **options) -> tuple[np.ndarray, np.ndarray]:
    height, width = values.shape
    scale = Scale(-1.0, 1.0, True, options.pop("bar", ()))
    data, wide, high = png.render(
        values, scale, Axis(0, height, rows), Axis(0, width, cols), **options
    )
    index, palette = decode(data)
    assert index.shape == (high, wide)
    return index, palette[index]


def ink(rgb: np.ndarray) -> np.ndarray:
    return (rgb == png.INK).all(-1)


def test_a_hot_cell_a_nan_and_a_label_are_all_in_the_picture():
    values = np.zeros((20, 40), np.float32)
    values[3, 4], values[5, 6] = 1.0, np.nan
    _, rgb = picture(
        values, rows=[(3, "tok")], cols=[(4, "4")], title="name", bar=[(1.0, "1"), (0.0, "0")]
    )
    assert (rgb == png.colours(True)[255]).all(-1).sum() >= 24 * 24
    assert (rgb == png.NAN).all(-1).sum() == 24 * 24
    assert (rgb < 128).all(-1).sum() > 200  # letters have soft edges


def test_words_change_the_picture_where_they_are():
    values = np.zeros((20, 40), np.float32)
    _, one = picture(values, rows=[(3, "aab")])
    _, other = picture(values, rows=[(3, "aba")])  # as wide as the other
    rows, _ = np.nonzero((one != other).any(-1))
    assert len(rows) and rows.max() - rows.min() < 16


def test_shard_strips_carry_their_ranks_and_the_cut_is_dotted():
    values = np.zeros((40, 60), np.float32)
    shards = [(0, 30, "rank 0"), (30, 60, "rank 1")]
    data, _, _ = png.render(values, Scale(-1, 1, True), Axis(0, 40), Axis(0, 60, (), shards))
    index, palette = decode(data)
    rgb = palette[index]
    for band in png.BANDS:
        assert (rgb == band).all(-1).sum() > 5000
    # the column of the cut has the most ink: a third of its pixels
    cut = ink(rgb).sum(axis=0).max()
    assert 130 < cut < 240


def test_letters_have_soft_edges_on_the_paper_and_on_a_strip():
    values = np.zeros((20, 40), np.float32)
    shards = [(0, 20, "rank 0"), (20, 40, "rank 1")]
    _, rgb = picture(values, caption="caption")
    shades = {tuple(colour) for colour in rgb[-30:].reshape(-1, 3).tolist()}
    assert {png.PAPER, png.SOFT} < shades and len(shades) == png.SHADES
    data, _, _ = png.render(values, Scale(-1, 1, True), Axis(0, 20), Axis(0, 40, (), shards))
    index, palette = decode(data)
    strip = palette[index][png.TITLE : png.TITLE + png.STRIP - 4, 30:490]
    shades = {tuple(colour) for colour in strip.reshape(-1, 3).tolist()}
    assert png.INK in shades and png.BANDS[0] in shades and png.PAPER not in shades
    assert len(shades) == png.SHADES


@pytest.mark.parametrize("shape", [(1, 1), (1, 900), (400, 1), (192, 384)])
def test_any_shape_makes_a_picture_of_readable_size(shape):
    _, rgb = picture(
        np.random.default_rng(0).normal(size=shape).astype(np.float32), title="t", caption="c"
    )
    assert 60 < rgb.shape[0] < 700 and 60 < rgb.shape[1] < 1300


def test_extremes_of_pure_noise_stay_small():
    rng = np.random.default_rng(0)
    values = (rng.choice([-1, 1], (192, 384)) * rng.normal(0.6, 0.13, (192, 384))).astype(
        np.float32
    )
    data, _, _ = png.render(values, Scale(-1, 1, True), Axis(0, 192), Axis(0, 384))
    assert len(data) < 70_000
