"""The whole tensor, as torch.distributed.checkpoint sees what one rank stores of it.

Checkpoints hold whole tensors in the released row order, whatever the layout. A plain tensor or a
DTensor cannot say that its rows are several pieces of a bigger tensor; a :class:`WholeView` does.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import accumulate
from operator import mul
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from hunyuan_train.parallel.layout import Box, Slices, flat_boxes, row_boxes, whole_slices


class WholeView(Tensor):
    """A tensor of the whole shape, of which this rank stores some boxes, maybe none.

    Saving writes the boxes and loading fills them in place, converting types. It has no values of
    its own: only shape, type and ``detach`` work. It refers to the storage the tensor had when the
    view was made, so make it anew for each save or load. Ranks may hold the same boxes, of which
    one is written, but never boxes that overlap in part.
    """

    _boxes: dict[torch.Size, Tensor]

    @staticmethod
    def __new__(
        cls, shape: Sequence[int], boxes: dict[torch.Size, Tensor], like: Tensor
    ) -> "WholeView":
        """Make a view of ``boxes`` ({offset in the whole: live tensor}); use :meth:`of`."""
        view = Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device)
        view._boxes = boxes
        return view

    @classmethod
    def of(
        cls, tensor: Tensor, slices: Slices | None = None, flat_start: int | None = None
    ) -> "WholeView":
        """View what this rank stores as a part of the whole tensor.

        Args:
            tensor: The tensor-parallel local tensor; or a DTensor over it, sharded by rows or
                replicated in each mesh dim; or, with ``flat_start``, a contiguous 1-D fragment
                [n] of it flattened, where n may be 0.
            slices: Which part of the whole the local tensor is; all of it by default.
            flat_start: Where in the flattened local tensor the fragment begins.

        Raises:
            ValueError: The tensor does not have the shape that ``slices`` says, a fragment has no
                slices or is not contiguous or not within the local tensor, or a DTensor is placed
                otherwise.
        """
        if slices is None:
            if flat_start is not None:
                raise ValueError("a flat fragment needs the slices of the tensor it belongs to")
            slices = whole_slices(tensor.shape)
        if flat_start is not None:
            local, boxes = _fragment_boxes(tensor.detach(), slices, flat_start)
        else:
            local, boxes = _shard_boxes(tensor.detach(), slices)
        if math.prod(slices.shape) == 0:
            # No rank has a box, but the checkpoint needs an entry: all name the same empty one.
            boxes = {torch.Size([0] * len(slices.shape)): local.new_empty(slices.shape)}
        return cls(slices.shape, boxes, local)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        """Return shape, type and boxes."""
        boxes = ", ".join(f"{list(o)}+{list(b.shape)}" for o, b in self._boxes.items())
        return f"WholeView({list(self.shape)}, {self.dtype}, boxes: {boxes or 'none'})"

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Allow ``detach`` and nothing else, so that no value is ever made up.

        Raises:
            NotImplementedError: For every other operation.
        """
        if func is torch.ops.aten.detach.default:
            return cls(args[0].shape, args[0]._boxes, args[0])
        raise NotImplementedError(
            f"{func} on a WholeView, which has no values of its own; use the tensor it was made of"
        )

    @property
    def is_empty(self) -> bool:
        """Whether this rank stores nothing of the tensor."""
        return not self._boxes

    def beside(self, whole: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield each live box with the region of ``whole`` (a plain tensor) that it stands for."""
        for offset, box in self._boxes.items():
            index = tuple(slice(o, o + n) for o, n in zip(offset, box.shape, strict=True))
            yield box, whole[index]

    def __create_write_items__(self, fqn: str, object: Any) -> list[WriteItem]:
        """Return what this rank can write, for torch.distributed.checkpoint."""
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=chunk,
                    properties=TensorProperties(dtype=self.dtype),
                    size=self.shape,
                ),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        """Return the boxes this rank wants to read, for torch.distributed.checkpoint."""
        return [
            ChunkStorageMetadata(offsets=offset, sizes=box.shape)
            for offset, box in self._boxes.items()
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        """Return the live tensor of one box, for torch.distributed.checkpoint.

        Raises:
            ValueError: This rank has no such box.
        """
        box = self._boxes.get(index.offset) if index.offset is not None else None
        if box is None:
            raise ValueError(f"{index.fqn} has no box at {index.offset} on this rank")
        return box


def _shard_boxes(tensor: Tensor, slices: Slices) -> tuple[Tensor, dict[torch.Size, Tensor]]:
    """Return this rank's local tensor and its boxes by their offset in the whole."""
    if tuple(tensor.shape) != slices.local_shape:
        raise ValueError(
            f"the tensor has shape {list(tensor.shape)}, but its slices of {list(slices.shape)} "
            f"have {list(slices.local_shape)}"
        )
    local, start = tensor, 0
    if isinstance(tensor, DTensor):
        if not all(_cuts_rows_only(placement) for placement in tensor.placements):
            raise ValueError(
                f"a DTensor placed {tensor.placements} is not cut by rows alone, "
                "so its boxes are unknown"
            )
        _, offset = compute_local_shape_and_global_offset(
            tensor.shape, tensor.device_mesh, tensor.placements
        )
        local, start = tensor.to_local(), (offset[0] if offset else 0)
    stop = start + (local.shape[0] if local.ndim else 1)

    def live(box: Box) -> Tensor:
        view = local
        for dim, (begin, size) in enumerate(zip(box.local, box.sizes, strict=True)):
            view = view.narrow(dim, begin - start if dim == 0 else begin, size)
        return view

    return local, {torch.Size(box.whole): live(box) for box in row_boxes(slices, start, stop)}


def first_row(param: Tensor) -> int:
    """Return which row of a parameter this rank's part begins with; 0 for a plain tensor.

    Raises:
        ValueError: A DTensor is not cut by rows alone.
    """
    if not isinstance(param, DTensor) or not param.ndim:
        return 0
    if not all(_cuts_rows_only(placement) for placement in param.placements):
        raise ValueError(f"a DTensor placed {param.placements} is not cut by rows alone")
    _, offset = compute_local_shape_and_global_offset(
        param.shape, param.device_mesh, param.placements
    )
    return offset[0]


def rows_view(rows: Tensor, param: Tensor) -> Tensor:
    """View a plain tensor that has a row for every row of ``param`` on this rank as the whole.

    It may lie on another device and have other columns. What belongs to a plain parameter, and
    scalars, are whole as they are.
    """
    if not isinstance(param, DTensor) or isinstance(rows, DTensor) or not rows.ndim:
        return rows
    shape = torch.Size([param.shape[0], *rows.shape[1:]])
    offset = torch.Size([first_row(param)] + [0] * (rows.ndim - 1))
    empty = shape.numel() == 0
    if rows.numel() or empty:
        boxes = {torch.Size([0] * rows.ndim) if empty else offset: rows.detach()}
    else:
        boxes = {}
    return WholeView(shape, boxes, rows.detach())


def _cuts_rows_only(placement: Any) -> bool:
    # Subclasses of Shard deal the rows out in another order.
    return isinstance(placement, Replicate) or (type(placement) is Shard and placement.dim == 0)


def _fragment_boxes(
    fragment: Tensor, slices: Slices, flat_start: int
) -> tuple[Tensor, dict[torch.Size, Tensor]]:
    """Return the fragment and its boxes by their offset in the whole."""
    if fragment.ndim != 1 or not fragment.is_contiguous() or isinstance(fragment, DTensor):
        raise ValueError(
            "a flat fragment is a plain contiguous 1-D tensor, not a "
            f"{type(fragment).__name__} of shape {list(fragment.shape)}"
        )
    shape, stop = slices.local_shape, flat_start + fragment.numel()
    if flat_start < 0 or stop > math.prod(shape):
        raise ValueError(
            f"a fragment from {flat_start} to {stop} is not within a tensor of shape {list(shape)}"
        )
    strides = (*accumulate(shape[:0:-1], mul, initial=1),)[::-1] if shape else ()

    def live(box: Box) -> Tensor:
        position = sum(map(mul, box.local, strides)) - flat_start
        return fragment.as_strided(box.sizes, strides, fragment.storage_offset() + position)

    boxes = flat_boxes(slices, flat_start, stop)
    return fragment, {torch.Size(box.whole): live(box) for box in boxes}


@torch.no_grad()
def parts_beside(part: Tensor, whole: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return what this rank stores of a tensor, piece by piece, beside the same of ``whole``.

    Args:
        part: A plain tensor, which is the whole, a DTensor cut by rows, or a :class:`WholeView`.
        whole: All values, on the same device for comparing or on any for copying.
    """
    view = part if isinstance(part, WholeView) else WholeView.of(part)
    return list(view.beside(whole))


@torch.no_grad()
def fill_part(part: Tensor, whole: Tensor) -> None:
    """Overwrite what this rank stores of a tensor from all values."""
    for mine, theirs in parts_beside(part, whole):
        mine.copy_(theirs)
