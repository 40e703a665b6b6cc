"""The digest of a tensor: the same however it is cut, and different as soon as a bit is."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hunyuan_train.checkpoint import tensor_digest
from hunyuan_train.checkpoint.tensor_digest import (
    boxes,
    digest_box,
    digest_boxes,
    from_hex,
    to_hex,
)
from hunyuan_train.parallel.layout import fused_slices, row_boxes
from hunyuan_train.parallel.view import WholeView

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool]
MODULUS = 1 << 64


def whole(tensor: torch.Tensor) -> str:
    return to_hex(digest_boxes(boxes(tensor)))


def draw(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    count = math.prod(shape) * dtype.itemsize
    data = torch.randint(0, 2 if dtype == torch.bool else 256, (count,), generator=generator)
    return data.to(torch.uint8).view(dtype).view(shape)


def one_by_one(tensor: torch.Tensor) -> str:
    """The definition, in plain integers: the product of the weights of all coordinates."""
    sums = []
    for lane in range(2):
        total = 0
        for index in itertools.product(*map(range, tensor.shape)):
            weight = 1
            for dim, i in enumerate(index):
                weight *= int(tensor_digest._coordinate_weights(lane, dim, i, 1)[0])
            halves = tensor[index].view(1).view(torch.int32 if tensor.itemsize == 4 else torch.int8)
            total += weight * int(halves[0])
        sums.append(total % MODULUS)
    return "".join(f"{value:016x}" for value in sums)


@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 3, 2, 2)])
def test_it_is_the_sum_it_says(shape: tuple[int, ...]):
    for dtype in (torch.float32, torch.uint8):
        tensor = draw(shape, dtype)
        padded = tensor.reshape(1) if not shape else tensor
        assert whole(tensor) == one_by_one(padded)


@st.composite
def cut_tensors(draw_from: st.DrawFn):
    """A fused tensor, the slices of all tensor-parallel ranks, and cuts of each into shards."""
    size = draw_from(st.sampled_from([1, 2, 3]))
    ndim = draw_from(st.integers(1, 3))
    dim = draw_from(st.integers(0, ndim - 1))
    parts = draw_from(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    parts = [part * size for part in parts]
    shape = [draw_from(st.integers(1, 5)) for _ in range(ndim)]
    shape[dim] = sum(parts)
    slices = [fused_slices(shape, dim, parts, rank, size) for rank in range(size)]
    numel = math.prod(slices[0].local_shape)
    flat = draw_from(st.booleans())
    end = numel if flat else slices[0].local_shape[0]
    cuts = sorted(draw_from(st.lists(st.integers(0, end), max_size=3)))
    dtype = draw_from(st.sampled_from(DTYPES))
    return tuple(shape), slices, [0, *cuts, end], flat, dtype


@settings(max_examples=150, deadline=None)
@given(cut_tensors(), st.sampled_from([2, 7, 1 << 16]), st.sampled_from([2, 1 << 20]))
def test_any_cut_adds_up_to_the_whole(case, piece: int, rows: int):
    shape, slices, cuts, flat, dtype = case
    tensor = draw(shape, dtype)
    expected = whole(tensor)
    before = tensor_digest._PIECE, tensor_digest._ROWS
    tensor_digest._PIECE, tensor_digest._ROWS = piece, rows
    try:
        total = torch.zeros(2, dtype=torch.int64)
        for cut in slices:
            local = cut.take(tensor).contiguous()
            for begin, end in itertools.pairwise(cuts):
                if flat:
                    view = WholeView.of(local.reshape(-1)[begin:end], cut, flat_start=begin)
                    total += digest_boxes(boxes(view))
                    continue
                for box in row_boxes(cut, begin, end):
                    index = tuple(
                        slice(o, o + n) for o, n in zip(box.local, box.sizes, strict=True)
                    )
                    total += digest_box(local[index], box.whole)
        assert to_hex(total) == expected
    finally:
        tensor_digest._PIECE, tensor_digest._ROWS = before


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_any_wrong_bit_and_any_two_swapped_values_show(data: st.DataObject):
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
    shape = tuple(data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    tensor = draw(shape, dtype, seed=data.draw(st.integers(0, 9)))
    before = whole(tensor)
    raw = tensor.view(-1).view(torch.uint8)
    wrong = data.draw(st.lists(st.integers(0, 8 * raw.numel() - 1), min_size=1, max_size=4))
    flipped = raw.clone()
    for bit in set(wrong):
        flipped[bit // 8] ^= 1 << bit % 8
    assert whole(flipped.view(dtype).view(shape)) != before
    i, j = (data.draw(st.integers(0, tensor.numel() - 1)) for _ in range(2))
    swapped = tensor.clone().view(-1)
    swapped[[i, j]] = swapped[[j, i]]
    same = torch.equal(swapped.view(torch.uint8), raw)
    assert (whole(swapped.view(shape)) == before) == same


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.bfloat16])
def test_all_signs_turned_show(dtype: torch.dtype):
    tensor = draw((16, 8), dtype)
    top = tensor.view(torch.uint8).view(-1, dtype.itemsize).clone()
    top[:, -1] ^= 0x80
    assert whole(top.view(-1).view(dtype).view(16, 8)) != whole(tensor)


def test_strides_nans_and_zeros_are_bits():
    tensor = draw((6, 7), torch.float32)
    assert whole(tensor.t().contiguous().t()) == whole(tensor)
    assert whole(torch.tensor([0.0])) != whole(torch.tensor([-0.0]))
    assert whole(torch.tensor([float("nan")])) == whole(torch.tensor([float("nan")]))
    assert whole(torch.zeros(0, 3)) == "0" * 32
    assert whole(torch.zeros(3)) == "0" * 32


def test_the_way_without_numpy_gives_the_same(monkeypatch: pytest.MonkeyPatch):
    tensor = draw((70, 90), torch.float32)
    expected = whole(tensor)
    monkeypatch.setattr(tensor_digest, "_row_sums", lambda rows, weights: (rows * weights).sum(1))
    assert whole(tensor) == expected


def test_weights_are_odd_and_differ():
    for lane, dim in itertools.product(range(2), range(3)):
        weights = tensor_digest._coordinate_weights(lane, dim, 5, 1000)
        assert (weights % 2 == 1).all()
        assert len(set(weights.tolist())) == 1000


def test_hex_holds_every_sum():
    for values in ([0, 1], [-1, 2**63 - 1], [-(2**63), 5]):
        sums = torch.tensor(values)
        assert torch.equal(from_hex(to_hex(sums)), sums)
