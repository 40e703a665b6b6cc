"""A digest of a tensor's bits that is the same however the tensor is cut and wherever it lies.

Every element counts with a weight of its position in the whole tensor: the sum over all elements of
``weight(position) * bits`` modulo 2^64, twice with other weights. Sums over disjoint boxes add up
to the digest of the whole, in any order and on any device. A weight is the product of one odd
pseudorandom number per coordinate, so a box needs as many of them as it has rows and columns, and
the rest is a matrix-vector product.

One wrong element is always found, because an odd weight cannot cancel it. Several are missed with a
probability of about 2^-64. It is no defence against intent; the SHA-256 of the files is.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex

LANES = 2
_PIECE = 1 << 16
"""Elements widened to 64 bits at a time: half a megabyte, which stays in the cache."""
_ROWS = 1 << 20
"""Rows whose sums are kept at a time."""
_INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int32}
_SEEDS = (0x243F6A8885A308D3, 0x13198A2E03707344)
_GOLDEN = 0x9E3779B97F4A7C15
_MODULUS = 1 << 64


def boxes(tensor: Tensor) -> dict[tuple[int, ...], Tensor]:
    """Return what this rank stores of a tensor: {offset in the whole: live part}.

    A plain tensor is one box; a DTensor or a ``WholeView`` says itself which it has. Boxes without
    elements are left out, unless the whole has none.
    """
    tensor = tensor.detach()
    if not hasattr(tensor, "__create_chunk_list__"):
        return {(0,) * tensor.ndim: tensor}
    chunks = tensor.__create_chunk_list__()  # pyright: ignore[reportAttributeAccessIssue]
    return {
        tuple(chunk.offsets): tensor.__get_tensor_shard__(MetadataIndex("", chunk.offsets))  # pyright: ignore[reportAttributeAccessIssue]
        for chunk in chunks
        if chunk.sizes.numel() or not tensor.numel()
    }


def digest_boxes(parts: Mapping[tuple[int, ...], Tensor]) -> Tensor:
    """Return the sum of the digests of disjoint boxes: int64 [2], on their device."""
    sums = [digest_box(box, offset) for offset, box in parts.items()]
    return torch.stack(sums).sum(0) if sums else torch.zeros(LANES, dtype=torch.int64)


def digest_box(box: Tensor, offset: Sequence[int]) -> Tensor:
    """Return what a box adds to the digest of the whole tensor.

    Args:
        box: Values; any type, any strides.
        offset: Where it begins in the whole tensor, one number per dim.

    Returns:
        Both sums as int64 [2] on the device of ``box``, to be read modulo 2^64.
    """
    total = torch.zeros(LANES, dtype=torch.int64, device=box.device)
    if box.ndim == 0:
        box, offset = box.reshape(1), (0,)
    for piece, start in _pieces(box.detach(), tuple(offset)):
        total += _digest_rows(piece, start)
    return total


def to_hex(sums: Tensor) -> str:
    """Return a digest as 32 hexadecimal digits."""
    return "".join(f"{value % _MODULUS:016x}" for value in sums.tolist())


def from_hex(text: str) -> Tensor:
    """Return the int64 [2] that :func:`to_hex` made ``text`` of."""
    values = [int(text[i : i + 16], 16) for i in range(0, 16 * LANES, 16)]
    return torch.tensor([v - _MODULUS if v >= _MODULUS // 2 else v for v in values])


def _pieces(box: Tensor, offset: tuple[int, ...]) -> Iterator[tuple[Tensor, tuple[int, ...]]]:
    """Cut a box until its rows, and the weights of its columns, are few enough to be kept."""
    if box.numel() == 0:
        return
    last = box.ndim - 1
    limits = {last: _PIECE} if box.numel() <= _ROWS * box.shape[last] else {last: _PIECE, 0: _ROWS}
    dim = next((d for d, limit in limits.items() if box.shape[d] > limit), None)
    if dim is None:
        yield box, offset
        return
    for begin in range(0, box.shape[dim], limits[dim]):
        part = box.narrow(dim, begin, min(limits[dim], box.shape[dim] - begin))
        yield from _pieces(part, (*offset[:dim], offset[dim] + begin, *offset[dim + 1 :]))


def _digest_rows(box: Tensor, offset: tuple[int, ...]) -> Tensor:
    """Reduce a box as a matrix: trailing dims that are small together are its columns."""
    wide = box.element_size() == 8
    split, inner = box.ndim - 1, box.shape[-1]
    while split > 0 and inner * box.shape[split - 1] <= _PIECE // 4:
        split -= 1
        inner *= box.shape[split]
    # The halves of 8 bytes count one by one: the top bits of two values would cancel.
    sizes, starts = ((*box.shape, 2), (*offset, 0)) if wide else (tuple(box.shape), offset)
    rows = box.reshape(-1, inner)
    columns = inner * (2 if wide else 1)
    device = box.device
    inner_weights = [
        _weights(lane, split, starts[split:], sizes[split:], device) for lane in (0, 1)
    ]
    sums = torch.empty(LANES, rows.shape[0], dtype=torch.int64, device=device)
    count = max(1, _PIECE // inner)
    for begin in range(0, rows.shape[0], count):
        bits = rows[begin : begin + count].contiguous().view(_INTEGER[box.element_size()])
        bits = bits.to(torch.int64).view(-1, columns)
        for lane in range(LANES):
            sums[lane, begin : begin + count] = _row_sums(bits, inner_weights[lane])
    for lane in range(LANES):
        sums[lane] *= _weights(lane, 0, starts[:split], sizes[:split], device)
    return sums.sum(1)


def _row_sums(rows: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted sum of each row [R, C] -> [R], modulo 2^64."""
    if rows.device.type == "cpu":  # Half again as fast as torch, which has no integer product.
        return torch.from_numpy(np.einsum("ij,j->i", rows.numpy(), weights.numpy()))
    return (rows * weights).sum(1)


@lru_cache(maxsize=64)
def _weights(
    lane: int, dim: int, offset: tuple[int, ...], sizes: tuple[int, ...], device: torch.device
) -> Tensor:
    """Return the product of the weights of dims ``dim`` and following, flattened."""
    product = np.ones(1, dtype=np.uint64)
    for d, (begin, size) in enumerate(zip(offset, sizes, strict=True), start=dim):
        product = (product[:, None] * _coordinate_weights(lane, d, begin, size)).reshape(-1)
    return torch.from_numpy(product.view(np.int64)).to(device)


def _coordinate_weights(lane: int, dim: int, begin: int, size: int) -> np.ndarray:
    """Return the odd numbers of coordinates ``begin`` and following: the finaliser of SplitMix64.

    Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators" (2014).
    """
    seed = np.uint64((_SEEDS[lane] + (dim + 1) * 0xD1B54A32D192ED03) % _MODULUS)
    x = np.arange(begin + 1, begin + size + 1, dtype=np.uint64) * np.uint64(_GOLDEN) + seed
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x ^ (x >> np.uint64(31))) | np.uint64(1)
