"""Memory that the trainer copies its tensors into and its writer process reads them from.

It is an anonymous file in memory (``memfd``) that both processes map. It has no name, so nothing is
left behind when they are killed, and it is used again for every save.
"""

import ctypes
import errno
import mmap
import os
import pickle
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hunyuan_train.checkpoint.tensor_digest import boxes
from hunyuan_train.parallel.view import WholeView

_ALIGN = 64
_MADV_POPULATE_WRITE = 23  # Linux 5.14; Python's mmap does not name it.


@dataclass(frozen=True, slots=True)
class StagedTensor:
    """Where the parts of one tensor lie in the memory."""

    shape: tuple[int, ...]
    """Of the whole tensor."""
    dtype: torch.dtype
    plain: bool
    """One box that is the whole, equal on all ranks."""
    places: tuple[tuple[tuple[int, ...], tuple[int, ...], int], ...]
    """(offset in the whole, sizes, first byte) of each box."""


def plan(flat: Mapping[str, Tensor]) -> tuple[dict[str, StagedTensor], list[Tensor], int]:
    """Place the parts of all tensors one after the other.

    Returns:
        The places by name, the live parts in the same order, and the bytes they take.
    """
    staged: dict[str, StagedTensor] = {}
    live: list[Tensor] = []
    end = 0
    for name, tensor in flat.items():
        places: list[tuple[tuple[int, ...], tuple[int, ...], int]] = []
        for offset, box in boxes(tensor).items():
            places.append((offset, tuple(box.shape), end))
            live.append(box)
            end += -(-box.numel() * box.element_size() // _ALIGN) * _ALIGN
        plain = not hasattr(tensor, "__create_chunk_list__")
        staged[name] = StagedTensor(tuple(tensor.shape), tensor.dtype, plain, tuple(places))
    return staged, live, end


class SharedMemory:
    """The trainer's side: tensors are copied in."""

    def __init__(self) -> None:
        """Make the memory, empty yet."""
        self.descriptor = os.memfd_create("checkpoint", os.MFD_CLOEXEC)
        self._bytes = 0
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._growing: threading.Thread | None = None
        self._problem: OSError | None = None
        self._stream: torch.cuda.Stream | None = None
        self._copied: torch.cuda.Event | None = None
        self._places: dict[str, StagedTensor] = {}
        self._views: list[Tensor] = []

    def grow(self, num_bytes: int, *, cuda: bool, wait: bool = True) -> None:
        """Make room for ``num_bytes`` and touch every page, so that no copy waits for the kernel.

        Args:
            num_bytes: Bytes that will be staged.
            cuda: Pin the memory for copies from the accelerator.
            wait: Return only when every page is there; else a thread sees to it.

        Raises:
            OSError: The system does not give the memory.
        """
        self._join()
        if num_bytes > self._bytes:
            self._release()
            size = -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
            if size - self._held() > (free := _available_bytes()):
                raise OSError(
                    errno.ENOMEM,
                    f"a copy of the state takes {size >> 20} MiB of memory, free are {free >> 20}",
                )
            os.ftruncate(self.descriptor, size)
            mapped = mmap.mmap(self.descriptor, size)
            self._memory, self._bytes = torch.frombuffer(mapped, dtype=torch.uint8), size
            self._growing = threading.Thread(target=self._populate, args=(cuda,), daemon=True)
            self._growing.start()
        if wait:
            self._join()

    def _held(self) -> int:
        return os.fstat(self.descriptor).st_size

    def _populate(self, cuda: bool) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        address, size = ctypes.c_void_p(self._memory.data_ptr()), ctypes.c_size_t(self._bytes)
        if libc.madvise(address, size, _MADV_POPULATE_WRITE):
            if ctypes.get_errno() != errno.EINVAL:
                self._problem = OSError(ctypes.get_errno(), "no memory for a copy of the state")
                return
            self._memory.zero_()  # An older kernel.
        if cuda:
            runtime: Any = torch.cuda.cudart()
            runtime.cudaHostRegister(self._memory.data_ptr(), self._bytes, 0)

    def _join(self) -> None:
        if self._growing is not None:
            self._growing.join()
            self._growing = None
        if self._problem is not None:
            problem, self._problem = self._problem, None
            self._release()
            raise problem

    def _release(self) -> None:
        if self._bytes and self._memory.is_pinned():
            runtime: Any = torch.cuda.cudart()
            runtime.cudaHostUnregister(self._memory.data_ptr())
        self._places, self._views, self._bytes = {}, [], 0

    def close(self) -> None:
        """Give the memory back; the writer process must be gone."""
        self._join()
        self._release()
        self._memory = torch.empty(0, dtype=torch.uint8)
        os.close(self.descriptor)

    def copy(self, places: dict[str, StagedTensor], live: list[Tensor]) -> None:
        """Copy all parts in.

        Copies from the accelerator run on a stream of their own. The present stream waits for them
        before whatever comes next, the host does not: see :meth:`copied`.
        """
        self._join()
        if places != self._places:
            flat = [
                (sizes, staged.dtype, begin)
                for staged in places.values()
                for _, sizes, begin in staged.places
            ]
            self._views = [view_bytes(self._memory, *place) for place in flat]
            self._places = places
        if any(part.is_cuda for part in live):
            self._stream = self._stream or torch.cuda.Stream()
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                for view, part in zip(self._views, live, strict=True):
                    view.copy_(part, non_blocking=True)
                self._copied = torch.cuda.Event()
                self._copied.record()
            torch.cuda.current_stream().wait_stream(self._stream)
            return
        torch._foreach_copy_(self._views, live)

    def copied(self, *, wait: bool = False) -> bool:
        """Return whether all copies are done."""
        if self._copied is None:
            return True
        if wait:
            self._copied.synchronize()
        elif not self._copied.query():
            return False
        self._copied = None
        return True


def _available_bytes() -> int:
    """Return what the system can still give without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return 1 << 62


def view_bytes(memory: Tensor, sizes: tuple[int, ...], dtype: torch.dtype, begin: int) -> Tensor:
    """Return a tensor over the bytes of ``memory`` from ``begin``."""
    num_bytes = torch.Size(sizes).numel() * dtype.itemsize
    return memory[begin : begin + num_bytes].view(dtype).view(sizes)


def open_tensors(descriptor: int, places: Mapping[str, StagedTensor]) -> dict[str, Tensor]:
    """Return the staged tensors in the writer process, as a checkpoint sees them."""
    size = os.fstat(descriptor).st_size
    memory = torch.empty(0, dtype=torch.uint8)
    if size:
        memory = torch.frombuffer(mmap.mmap(descriptor, size), dtype=torch.uint8)
    flat: dict[str, Tensor] = {}
    for name, staged in places.items():
        parts = {
            torch.Size(offset): view_bytes(memory, sizes, staged.dtype, begin)
            for offset, sizes, begin in staged.places
        }
        if staged.plain:
            (flat[name],) = parts.values()
        else:
            flat[name] = WholeView(staged.shape, parts, torch.empty(0, dtype=staged.dtype))
    return flat


def send_large(descriptor: int, value: Any) -> int:
    """Write a picklable value to the start of an anonymous file; return its size in bytes."""
    data = pickle.dumps(value)
    os.ftruncate(descriptor, len(data))
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], done)
    return len(data)


def receive_large(descriptor: int, num_bytes: int) -> Any:
    """Read what :func:`send_large` wrote."""
    data = b""
    while len(data) < num_bytes:
        data += os.pread(descriptor, num_bytes - len(data), len(data))
    return pickle.loads(data)
