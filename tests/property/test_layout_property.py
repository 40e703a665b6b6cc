import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hunyuan_train.parallel.layout import (
    Box,
    Slices,
    assemble,
    flat_boxes,
    fused_slices,
    row_boxes,
    whole_slices,
)


@st.composite
def cuts(draw) -> tuple[torch.Tensor, list[Slices]]:
    """A whole tensor of distinct values with the slices of every tensor-parallel rank."""
    ndim = draw(st.integers(1, 5))
    dim = draw(st.integers(0, min(ndim - 1, 1)))
    size = draw(st.integers(1, 4))
    parts = [size * n for n in draw(st.lists(st.integers(0, 3), min_size=1, max_size=4))]
    shape = draw(st.lists(st.integers(1, 4), min_size=ndim, max_size=ndim))
    shape[dim] = sum(parts)
    whole = torch.arange(math.prod(shape)).reshape(shape)
    if draw(st.booleans()):
        return whole, [whole_slices(shape)]
    return whole, [fused_slices(shape, dim, parts, rank, size) for rank in range(size)]


def _region(tensor: torch.Tensor, offset: tuple[int, ...], sizes: tuple[int, ...]) -> torch.Tensor:
    return tensor[tuple(slice(o, o + n) for o, n in zip(offset, sizes, strict=True))]


def _count(seen: torch.Tensor, whole: torch.Tensor, local: torch.Tensor, box: Box) -> None:
    """Check one box and mark the elements of the whole tensor it covers."""
    assert 0 not in box.sizes
    region = _region(whole, box.whole, box.sizes)
    assert tuple(region.shape) == box.sizes
    assert torch.equal(region, _region(local, box.local, box.sizes))
    _region(seen, box.whole, box.sizes).add_(1)


@settings(max_examples=150, deadline=None)
@given(cut=cuts())
def test_taking_and_assembling_gives_the_whole_back(cut):
    whole, slices = cut
    pieces = [(s, s.take(whole)) for s in slices]
    for one, local in pieces:
        assert tuple(local.shape) == one.local_shape
        assert len(one.runs) > 1 or local.untyped_storage().data_ptr() == (
            whole.untyped_storage().data_ptr()
        )
    again = assemble(pieces[::-1])
    assert torch.equal(again, whole)
    assert again.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr() or not (
        whole.numel()
    )


@settings(max_examples=150, deadline=None)
@given(cut=cuts(), ranks=st.integers(1, 5))
def test_row_boxes_of_all_ranks_tile_the_whole(cut, ranks):
    whole, slices = cut
    seen = torch.zeros_like(whole)
    for one in slices:
        local = one.take(whole)
        rows = -(-local.shape[0] // ranks)
        for rank in range(ranks):
            start = min(rank * rows, local.shape[0])
            for box in row_boxes(one, start, min(start + rows, local.shape[0])):
                _count(seen, whole, local, box)
    assert bool((seen == 1).all())


@settings(max_examples=200, deadline=None)
@given(cut=cuts(), data=st.data())
def test_flat_boxes_of_all_fragments_tile_the_whole(cut, data):
    whole, slices = cut
    seen = torch.zeros_like(whole)
    for one in slices:
        local = one.take(whole)
        ends = sorted(data.draw(st.lists(st.integers(0, local.numel()), max_size=4)))
        for start, stop in zip([0, *ends], [*ends, local.numel()], strict=True):
            boxes = flat_boxes(one, start, stop)
            assert len(boxes) <= (2 * whole.ndim - 1) * len(one.runs)
            found = [_region(local, box.local, box.sizes).flatten() for box in boxes]
            if len(one.runs) == 1:
                flat = torch.cat([*found, local.new_empty(0)])
                assert torch.equal(flat, local.flatten()[start:stop])
            for box in boxes:
                _count(seen, whole, local, box)
    assert bool((seen == 1).all())


def test_the_parts_of_a_fused_weight_are_cut_one_by_one():
    slices = fused_slices((14, 3), 0, (4, 4, 6), rank=1, size=2)
    assert slices.runs == ((2, 2), (6, 2), (11, 3))
    assert slices.local_shape == (7, 3)
    assert fused_slices((14, 3), 0, (4, 4, 6), rank=0, size=1) == whole_slices((14, 3))


def test_a_scalar_is_one_box():
    scalar = torch.tensor(3.0)
    slices = whole_slices(())
    assert slices.take(scalar) is scalar
    assert assemble([(slices, scalar)]) == 3.0
    assert row_boxes(slices, 0, 1) == flat_boxes(slices, 0, 1) == [Box((), (), ())]
    assert row_boxes(slices, 0, 0) == flat_boxes(slices, 1, 1) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((14, 3), 0, (4, 5, 5), 0, 2), r"part of 5 rows in dim 0 of \[14, 3\] .* cut in 2"),
        (((14, 3), 0, (4, 4), 0, 2), r"parts \[4, 4\] add up to 8"),
        (((14, 3), 2, (3,), 0, 1), "cannot cut dim 2"),
        (((14, 3), 0, (14,), 2, 2), "rank 2 is not one of 2"),
    ],
)
def test_impossible_cuts_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        fused_slices(*arguments)


def test_pieces_that_do_not_fit_are_refused():
    left, right = (fused_slices((4, 2), 0, (4,), rank, 2) for rank in range(2))
    piece = torch.zeros(2, 2)
    with pytest.raises(ValueError, match="hold 2 of 4 rows of dim 0"):
        assemble([(left, piece)])
    with pytest.raises(ValueError, match=r"shape \[3, 2\], expected \[2, 2\]"):
        assemble([(left, piece), (right, torch.zeros(3, 2))])
    with pytest.raises(ValueError, match="do not belong together"):
        assemble([(left, piece), (whole_slices((5, 2)), torch.zeros(5, 2))])
    with pytest.raises(ValueError, match=r"whole tensor has shape \[5, 2\], expected \[4, 2\]"):
        left.take(torch.zeros(5, 2))
