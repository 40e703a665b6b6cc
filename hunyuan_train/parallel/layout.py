"""Which part of a whole tensor a tensor-parallel rank holds, and as which boxes.

A rank's local tensor is the whole one cut along a single dim. A fused weight (q, k, v and MLP rows
in one matrix) is cut within each of its parts, so what is contiguous locally is several ``runs`` of
the whole tensor. ZeRO cuts the local tensor once more, by rows or in flattened order. Checkpoints
hold whole tensors, and their files are made of boxes: this module turns such a fragment of a local
tensor into boxes of the whole one. It is index arithmetic only; nothing here knows other ranks.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Slices:
    """The part of a whole tensor that one tensor-parallel rank holds."""

    shape: tuple[int, ...]
    """Of the whole tensor."""
    dim: int
    """The dim that is cut; 0 for a scalar, which cannot be cut."""
    runs: tuple[tuple[int, int], ...]
    """(start, length) along ``dim`` of the whole tensor, in local order; empty for a scalar."""

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of the local tensor."""
        if not self.shape:
            return ()
        length = sum(length for _, length in self.runs)
        return (*self.shape[: self.dim], length, *self.shape[self.dim + 1 :])

    def take(self, whole: Tensor) -> Tensor:
        """Cut the local tensor out of the whole one: a view if it is one run, else a copy.

        Raises:
            ValueError: ``whole`` has another shape.
        """
        if tuple(whole.shape) != self.shape:
            raise ValueError(
                f"the whole tensor has shape {list(whole.shape)}, expected {list(self.shape)}"
            )
        if not self.shape:
            return whole
        pieces = [whole.narrow(self.dim, start, length) for start, length in self.runs]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, self.dim)


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangular region that lies in one piece in both the local and the whole tensor."""

    local: tuple[int, ...]
    """Where it begins in the local tensor."""
    whole: tuple[int, ...]
    """Where it begins in the whole tensor."""
    sizes: tuple[int, ...]


def whole_slices(shape: Sequence[int]) -> Slices:
    """Return the slices of a rank that holds the whole tensor."""
    return Slices(tuple(shape), 0, ((0, shape[0]),) if shape else ())


def fused_slices(
    shape: Sequence[int], dim: int, parts: Sequence[int], rank: int, size: int
) -> Slices:
    """Return the slices of ``rank`` when every part of a fused dim is cut evenly.

    Args:
        shape: Shape of the whole tensor.
        dim: The dim to cut.
        parts: Lengths of the consecutive parts that make up ``dim``, e.g. q, k, v and MLP rows; a
            single one for a weight that is not fused.
        rank: Rank within the tensor-parallel group.
        size: Number of tensor-parallel ranks.

    Raises:
        ValueError: A part is not divisible by ``size``, the parts do not add up to ``shape[dim]``,
            or ``dim`` or ``rank`` is out of range.
    """
    shape = tuple(shape)
    if not 0 <= dim < len(shape):
        raise ValueError(f"cannot cut dim {dim} of a tensor of shape {list(shape)}")
    if not 0 <= rank < size:
        raise ValueError(f"tensor-parallel rank {rank} is not one of {size}")
    if sum(parts) != shape[dim]:
        raise ValueError(
            f"parts {list(parts)} add up to {sum(parts)}, but dim {dim} of {list(shape)} "
            f"has {shape[dim]}"
        )
    runs: list[tuple[int, int]] = []
    begin = 0
    for part in parts:
        if part % size:
            raise ValueError(
                f"a part of {part} rows in dim {dim} of {list(shape)} cannot be cut in {size}"
            )
        length = part // size
        runs.append((begin + rank * length, length))
        begin += part
    return Slices(shape, dim, _merged(runs))


def _merged(runs: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Join runs that follow each other, so that a tensor in one piece is one box."""
    merged: list[tuple[int, int]] = []
    for start, length in runs:
        if length == 0:
            continue
        if merged and sum(merged[-1]) == start:
            merged[-1] = (merged[-1][0], merged[-1][1] + length)
        else:
            merged.append((start, length))
    return tuple(merged) or ((0, 0),)


def assemble(pieces: Sequence[tuple[Slices, Tensor]]) -> Tensor:
    """Put the whole tensor together from the local tensors of all tensor-parallel ranks.

    Ranks that hold the same rows are taken to agree; the last one is kept.

    Args:
        pieces: (slices, local tensor) of each rank, in any order.

    Returns:
        A new tensor with type and device of the first piece.

    Raises:
        ValueError: The pieces belong to tensors of different shapes, a tensor does not have the
            shape of its slices, or rows are missing.
    """
    first, example = pieces[0]
    whole = example.new_empty(first.shape)
    covered: set[int] = set()
    for slices, local in pieces:
        if (slices.shape, slices.dim) != (first.shape, first.dim):
            raise ValueError(
                f"pieces cut from {list(first.shape)} in dim {first.dim} and from "
                f"{list(slices.shape)} in dim {slices.dim} do not belong together"
            )
        if tuple(local.shape) != slices.local_shape:
            raise ValueError(
                f"a piece has shape {list(local.shape)}, expected {list(slices.local_shape)}"
            )
        if not slices.shape:
            whole.copy_(local)
            continue
        begin = 0
        for start, length in slices.runs:
            target = whole.narrow(slices.dim, start, length)
            target.copy_(local.narrow(slices.dim, begin, length))
            covered.update(range(start, start + length))
            begin += length
    if first.shape and len(covered) != first.shape[first.dim]:
        raise ValueError(
            f"the pieces hold {len(covered)} of {first.shape[first.dim]} rows of dim {first.dim}"
        )
    return whole


def row_boxes(slices: Slices, start: int, stop: int) -> list[Box]:
    """Return the boxes of rows ``start`` to ``stop`` (dim 0) of a local tensor, in local order.

    A scalar counts as one row. An empty range has no boxes.
    """
    shape = slices.local_shape
    if stop <= start:
        return []
    local = (start, *(0 for _ in shape[1:])) if shape else ()
    sizes = (stop - start, *shape[1:]) if shape else ()
    return list(_cut_at_runs(slices, local, sizes))


def flat_boxes(slices: Slices, start: int, stop: int) -> list[Box]:
    """Return the boxes of elements ``start`` to ``stop`` of a flattened local tensor.

    Without runs there are at most ``2 * ndim - 1``; each is cut further where runs end. Each is
    contiguous before that cut, and together they follow the flattened order.
    """
    return [
        box
        for local, sizes in _flat_pieces(slices.local_shape, start, stop)
        for box in _cut_at_runs(slices, local, sizes)
    ]


def _flat_pieces(
    shape: tuple[int, ...], start: int, stop: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Yield (offset, sizes): the end of a row, whole rows, the beginning of a row."""
    if stop <= start:
        return
    if not shape:
        yield (), ()
        return
    row_size = math.prod(shape[1:])
    first, begin = divmod(start, row_size)
    last, end = divmod(stop, row_size)

    def within(row: int, start: int, stop: int):
        for offset, sizes in _flat_pieces(shape[1:], start, stop):
            yield (row, *offset), (1, *sizes)

    if first == last:
        yield from within(first, begin, end)
        return
    if begin:
        yield from within(first, begin, row_size)
        first += 1
    if first < last:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
    yield from within(last, 0, end)


def _cut_at_runs(slices: Slices, local: tuple[int, ...], sizes: tuple[int, ...]) -> Iterator[Box]:
    """Yield the non-empty intersections of a local box with the runs, placed in the whole."""
    if not slices.shape:
        yield Box((), (), ())
        return
    if 0 in sizes:
        return
    dim = slices.dim
    begin = 0
    for start, length in slices.runs:
        low = max(local[dim], begin)
        high = min(local[dim] + sizes[dim], begin + length)
        if low < high:
            yield Box(
                (*local[:dim], low, *local[dim + 1 :]),
                (*local[:dim], start + low - begin, *local[dim + 1 :]),
                (*sizes[:dim], high - low, *sizes[dim + 1 :]),
            )
        begin += length
