"""Tensors that stay in host memory and visit the device piece by piece.

Why the update is computed on the device and not by the CPU: for 12.8e9 parameters float32 moments
are 103 GB, which a PCIe 5 link of 50 GB/s moves in 2.1 s each way, both ways at once. The CPU would
read and write them and the gradients, 360 GB, at the 150 to 300 GB/s of a node, and needs its cores
for decoding meanwhile. The device runs the same kernel as without the host, so numbers are equal to
the last bit; and inside a backward the copies run beside it.

```text
copies up    piece 1 | piece 2 | piece 3 | ...
device               | piece 1 | piece 2 | ...
copies down                    | piece 1 | ...
```

The host runs ahead of the device, so a piece is on its way as soon as one of ``SLOTS`` is free. On
a CPU a copy is done at once, all else is the same code.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

SLOTS = 3
_ALIGN = 64
_SLAB_BYTES = 2**32
"""Pinned memory is taken in pieces of 4 GiB: torch rounds each up to a power of two."""


class HostMemory:
    """Host tensors without waste: pinned ones are cut from slabs."""

    def __init__(self, *, pinned: bool) -> None:
        self._pinned = pinned
        self._slab = torch.empty(0, dtype=torch.uint8, device="cpu")
        self._used = 0

    def zeros(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Return a tensor of zeros on the host."""
        if not self._pinned:
            return torch.zeros(shape, dtype=dtype, device="cpu")
        num_bytes = shape.numel() * dtype.itemsize
        if self._used + num_bytes > self._slab.numel():
            size = max(_SLAB_BYTES, num_bytes)
            self._slab = torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True)
            self._used = 0
        view = _carve(self._slab, self._used, shape, dtype).zero_()
        self._used += -(-num_bytes // _ALIGN) * _ALIGN
        return view


class Visits:
    """Brings host tensors to a device and takes them back when they were changed."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        cuda = device.type == "cuda"
        self._up = torch.cuda.Stream(device) if cuda else None
        self._down = torch.cuda.Stream(device) if cuda else None
        self._slots = [torch.empty(0, dtype=torch.uint8, device=device) for _ in range(SLOTS)]
        self._free: list[torch.Event | None] = [None] * SLOTS
        self._next = 0

    @contextmanager
    def here(self, tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        """Yield copies of ``tensors`` on the device and write them back after the block."""
        slot, self._next = self._next, (self._next + 1) % SLOTS
        copies = self._room(slot, tensors)
        if self._up is None:
            for copy, tensor in zip(copies, tensors, strict=True):
                copy.copy_(tensor)
            yield copies
            for copy, tensor in zip(copies, tensors, strict=True):
                tensor.copy_(copy)
            return
        assert self._down is not None
        computation = torch.cuda.current_stream(self._device)
        if (free := self._free[slot]) is not None:
            self._up.wait_event(free)
        _copy(self._up, copies, tensors)
        computation.wait_event(self._up.record_event())
        yield copies
        self._down.wait_event(computation.record_event())
        _copy(self._down, tensors, copies)
        self._free[slot] = self._down.record_event()

    def settle(self) -> None:
        """Wait until everything is back on the host, before the host reads it."""
        if self._down is not None:
            self._down.synchronize()

    def _room(self, slot: int, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return tensors like ``tensors`` in the memory of a slot, which grows if it must."""
        starts, end = [], 0
        for tensor in tensors:
            starts.append(end)
            end += -(-tensor.numel() * tensor.element_size() // _ALIGN) * _ALIGN
        if end > self._slots[slot].numel():
            self.settle()
            self._slots[slot] = torch.empty(end, dtype=torch.uint8, device=self._device)
            if self._up is not None:
                # The memory may have been another tensor's in the computation until now.
                self._up.wait_stream(torch.cuda.current_stream(self._device))
        return [
            _carve(self._slots[slot], start, tensor.shape, tensor.dtype)
            for start, tensor in zip(starts, tensors, strict=True)
        ]


def _carve(memory: Tensor, start: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    return memory[start : start + shape.numel() * dtype.itemsize].view(dtype).view(shape)


def _copy(stream: torch.cuda.Stream, to: Sequence[Tensor], source: Sequence[Tensor]) -> None:
    with torch.cuda.stream(stream):
        for target, tensor in zip(to, source, strict=True):
            target.copy_(tensor, non_blocking=True)
