"""Sizes of launches, from shapes alone: the same shapes are always reduced in the same order."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

MAX_PARTIALS = 528
"""Programs of a reduction per sample: four per multiprocessor of an H100."""
MIN_ROWS = 16
"""Rows per program below which the partial sums would cost more than the tensors."""


def power_of_two(size: int) -> int:
    """Return the smallest power of two that is at least ``size``."""
    return 1 << (size - 1).bit_length()


def warps(elements: int) -> int:
    """Return the warps for a program that holds ``elements`` values of each tensor at a time.

    Eight values per thread are one load of 16 bytes in bfloat16; with sixteen the kernels that hold
    six tensors need more registers than an H100 has for two programs.
    """
    return min(max(power_of_two(elements) // 256, 1), 16)


def reduction(rows: int) -> tuple[int, int]:
    """Cut ``rows`` into (programs, rows of each) for a reduction in two stages."""
    each = max(-(-rows // MAX_PARTIALS), min(MIN_ROWS, rows))
    return -(-rows // each), each


def rows_first(x: Tensor) -> Tensor:
    """Return x, or a contiguous copy where neighbours of the last dimension are not adjacent."""
    return x if x.stride(-1) == 1 else x.contiguous()


def partials(*shape: int, like: Tensor) -> Tensor:
    """Return float32 scratch, uninitialised, on the device of ``like``."""
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def on_grid(kernel: Any, *grid: int) -> Callable[..., None]:
    """Return the launch of a kernel: call it with the kernel's arguments and ``num_warps``."""
    return kernel[grid]
