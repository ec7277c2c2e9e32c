"""Boxes: the arithmetic of parts of a whole. Wrong here is wrong everywhere, without a word."""

from __future__ import annotations

import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexkernel.boxes import WHOLE, Box, chunk, share, share_of
from flexkernel.errors import EngineError

SHAPE = (6, 5, 4)


@st.composite
def boxes(draw) -> Box:
    """A box in SHAPE; dim 0 may have two runs."""
    runs = []
    for dim, size in enumerate(SHAPE):
        ends = sorted(draw(st.lists(st.integers(0, size), min_size=4, max_size=4)))
        several = draw(st.integers(0, 2)) if dim == 0 else draw(st.integers(0, 1))
        runs += [(dim, ends[2 * i], ends[2 * i + 1]) for i in range(several)]
        if several == 2 and (ends[0] == ends[2] or ends[1] == ends[2]):
            runs.pop()  # two runs never begin alike, and never touch
    return Box(runs)


def elements(box: Box) -> set[int]:
    numbers = torch.arange(120).view(SHAPE)
    return {int(n) for part in box.parts() for n in part.cut(numbers).flatten()}


@given(boxes())
def test_put_is_the_way_back_of_take(box):
    whole = torch.randn(SHAPE)
    local = box.take(whole)
    assert local.shape == box.shape_in(SHAPE) and local.numel() == box.volume(SHAPE)
    other = torch.zeros(SHAPE)
    box.put(local, other)
    inside = torch.zeros(SHAPE, dtype=torch.bool).flatten()
    inside[sorted(elements(box))] = True
    assert torch.equal(other, torch.where(inside.view(SHAPE), whole, 0))


@given(boxes(), boxes())
def test_parts_overlap_if_they_have_an_element_in_common(a, b):
    for one in a.parts():
        for other in b.parts():
            if one.volume(SHAPE) and other.volume(SHAPE):
                assert one.overlaps(other) == bool(elements(one) & elements(other))


@given(boxes())
def test_slices_name_what_cut_cuts(box):
    whole = torch.arange(120).view(SHAPE)
    for part in box.parts():
        assert torch.equal(whole[part.slices(3)], part.cut(whole))


@given(boxes(), boxes())
def test_a_piece_of_a_part_is_a_part_of_the_whole(box, piece):
    whole = torch.arange(120).view(SHAPE)
    for part in box.parts():
        held = part.cut(whole)
        within = [(d, min(a, held.shape[d]), min(b, held.shape[d])) for d, a, b in piece.parts()[0]]
        inner = Box(within)
        assert torch.equal(part.within(inner).cut(whole), inner.cut(held))


@given(boxes())
def test_a_box_crosses_processes_as_itself(box):
    again = pickle.loads(pickle.dumps(box))
    assert type(again) is Box and again == box and hash(again) == hash(box)
    assert Box.from_numbers(box.numbers()) == box


def test_a_box_in_too_many_runs_is_not_sent():
    with pytest.raises(EngineError, match="in 9 runs cannot be sent: at most 8"):
        Box((0, 2 * i, 2 * i + 1) for i in range(9)).numbers()


def test_indices_become_runs():
    packed = torch.tensor([0, 1, 4, 5])
    assert Box.of_indices((6, 3), [packed, torch.arange(3)]) == ((0, 0, 2), (0, 4, 6))
    assert Box.of_indices((3,), [torch.tensor([], dtype=torch.long)]) == Box.nothing(1)
    assert Box.of_indices((3,), [torch.arange(3)]) == WHOLE


def test_equal_boxes_are_one_object():
    """So that a report that names one a thousand times is pickled quickly."""
    piece = Box(((1, 0, 2),))
    assert WHOLE.plus(0, 4, 8).within(piece) is WHOLE.plus(0, 4, 8).within(Box(((1, 0, 2),)))
    assert WHOLE.plus(0, 4, 8) is WHOLE.plus(0, 4, 8)


# --- who has which part ---------------------------------------------------------------


@given(st.integers(0, 50), st.integers(1, 9))
def test_chunks_are_those_of_torch(size, parts):
    ours = [chunk(size, parts, i) for i in range(parts)]
    theirs = [len(piece) for piece in torch.zeros(size).chunk(parts)] if size else []
    assert [b - a for a, b in ours if b > a] == [n for n in theirs if n] and ours[-1][1] == size


@given(st.lists(st.integers(0, 5), max_size=4), st.integers(1, 7))
def test_the_pieces_that_copies_write_make_up_what_they_hold(shape, copies):
    written = torch.zeros(shape, dtype=torch.int64)
    for index in range(copies):
        piece = share_of(shape, copies, index)
        if piece is not None:
            piece.cut(written).add_(1)
    assert (written == 1).all()


@given(st.integers(0, 40), st.integers(1, 9))
def test_shares_are_whole_even_and_in_order(total, parts):
    shares = [share(total, parts, i) for i in range(parts)]
    assert [a for a, _ in shares] == [0, *(b for _, b in shares[:-1])] and shares[-1][1] == total
    sizes = [b - a for a, b in shares]
    assert max(sizes) - min(sizes) <= 1 and sizes == sorted(sizes, reverse=True)
