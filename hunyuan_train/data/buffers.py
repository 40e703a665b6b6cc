"""Memory for large tensors that is used again, because new memory costs more than filling it."""

import weakref
from collections import defaultdict, deque

import numpy as np
import torch
from torch import Tensor

_CLASS = 1 << 18
"""Numbers by which the sizes of kept memory differ: 1 MiB."""


class Buffers:
    """Float32 tensors on memory that earlier ones have left; safe to use from several threads.

    A page that the kernel hands out is faulted in and zeroed first, which takes as long as reading,
    checking and converting what is put there. A tensor's memory comes back when the last tensor on
    it is gone.

    Args:
        keep: Free pieces of memory that are kept of each size.
    """

    def __init__(self, keep: int) -> None:
        # Appending to a full deque drops the other end; both ends are safe without a lock, which a
        # finaliser, called at any time, could not take.
        self._free: defaultdict[int, deque[np.ndarray]] = defaultdict(lambda: deque(maxlen=keep))

    def take(self, count: int) -> Tensor:
        """Return float32 [count], not initialised."""
        if count < _CLASS:
            return torch.empty(count)
        free = self._free[-(-count // _CLASS)]
        try:
            memory = free.pop()
        except IndexError:
            # numpy asks the kernel for huge pages, torch does not.
            memory = np.empty(-(-count // _CLASS) * _CLASS, np.float32)
        lease = memory.view(_Lease)
        weakref.finalize(lease, free.append, memory).atexit = False
        return torch.from_numpy(lease)[:count]


class _Lease(np.ndarray):
    """A view that lives as long as the tensors on it; plain arrays cannot be referred to weakly."""
