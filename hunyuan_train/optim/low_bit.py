"""Moments of AdamW in float32, or as 8-bit codes with a float32 scale per block of a row.

The codes are those of torchao's and bitsandbytes' 8-bit AdamW: a map of 256 values, dense near
zero, times the largest absolute value of the block (Dettmers et al., "8-bit Optimizers via
Block-wise Quantization", 2021). Blocks lie within rows here. Sharding by rows then never cuts one,
so that codes and scales of one number of ranks are loaded on another as they are.
"""

from collections.abc import Mapping
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from hunyuan_train.memory.states import CODE_BLOCK

_SMALLEST_BLOCK = 32
"""Rows without a divisor from here to ``CODE_BLOCK`` stay float32."""
_TINIEST = 1e-12
"""Least scale, as in torchao: a block of zeros."""


def block_size(shape: torch.Size) -> int:
    """Return the values per scale, a divisor of a row; 0 where float32 is kept.

    Vectors are too small to be worth it, and sensitive: norm weights and biases.
    """
    if len(shape) < 2:
        return 0
    row = shape[1:].numel()
    largest = max(size for size in range(1, CODE_BLOCK + 1) if row % size == 0)
    return largest if largest >= _SMALLEST_BLOCK else 0


class Moment(Protocol):
    """How one moment of a parameter is stored."""

    def shapes(self, shape: torch.Size) -> dict[str, tuple[torch.Size, torch.dtype]]:
        """Return shape and dtype of what is stored, by suffix; all have the rows of ``shape``."""
        ...

    def read(self, stored: Mapping[str, Tensor]) -> Tensor:
        """Return the values of some rows in float32, the stored ones if they are."""
        ...

    def write(self, stored: Mapping[str, Tensor], values: Tensor, skipped: Tensor) -> None:
        """Store what :meth:`read` returned after it was updated, unless ``skipped`` is not 0."""
        ...


class Float32Moment:
    """Live float32 values; see ``Moment``."""

    def shapes(self, shape: torch.Size) -> dict[str, tuple[torch.Size, torch.dtype]]:
        """Return that of the values."""
        return {"": (shape, torch.float32)}

    def read(self, stored: Mapping[str, Tensor]) -> Tensor:
        """Return the live values."""
        return stored[""]

    def write(self, stored: Mapping[str, Tensor], values: Tensor, skipped: Tensor) -> None:
        """Do nothing: the values were updated where they are."""


class Int8Moment:
    """8-bit codes and scales; see ``Moment``."""

    def __init__(self, block: int, *, signed: bool) -> None:
        self._block, self._signed = block, signed

    def shapes(self, shape: torch.Size) -> dict[str, tuple[torch.Size, torch.dtype]]:
        """Return those of codes and scales; both are zero for moments of zero."""
        blocks = torch.Size([shape[0], shape[1:].numel() // self._block])
        return {"_codes": (shape, torch.uint8), "_scale": (blocks, torch.float32)}

    def read(self, stored: Mapping[str, Tensor]) -> Tensor:
        """Return new float32 values."""
        codes, scale = stored["_codes"], stored["_scale"]
        values = _table(self._signed, codes.device)[codes.view(-1).int()]
        values.view(-1, self._block).mul_(scale.reshape(-1, 1))
        return values.view(codes.shape)

    def write(self, stored: Mapping[str, Tensor], values: Tensor, skipped: Tensor) -> None:
        """Round to the nearest codes. What is skipped keeps its own: rounding again moves some."""
        codes, scale = stored["_codes"], stored["_scale"]
        blocks = values.reshape(-1, self._block)
        largest = blocks.abs().amax(dim=-1).clamp_(min=_TINIEST)
        middles = _middles(self._signed, codes.device)
        nearest = torch.bucketize(blocks / largest[:, None], middles, out_int32=True, right=True)
        new = nearest.to(torch.uint8).view(codes.shape)
        keep = skipped != 0
        codes.copy_(torch.where(keep, codes, new))
        scale.copy_(torch.where(keep, scale, largest.view(scale.shape)))


def moment_of(shape: torch.Size, *, int8: bool, signed: bool) -> Moment:
    """Return how a moment of a parameter of this shape is stored."""
    block = block_size(shape) if int8 else 0
    return Int8Moment(block, signed=signed) if block else Float32Moment()


@lru_cache
def _table(signed: bool, device: torch.device) -> Tensor:
    """Return the value of every code, ascending, float32 [256].

    0, 1, and for every power of ten from 1e-6 to 1 the middles of equal parts between its tenth and
    itself, twice as many as for the power below; if ``signed``, half as many and their negatives.
    """
    # The default device may be meta while a model is built.
    values = [torch.tensor([0.0, 1.0], device="cpu")]
    for power in range(7):
        parts = 2 ** (power if signed else power + 1)
        bounds = torch.linspace(0.1, 1, parts + 1, device="cpu")
        middles = 10.0 ** (power - 6) * ((bounds[:-1] + bounds[1:]) / 2)
        values += [middles, -middles] if signed else [middles]
    return torch.cat(values).sort().values.to(device)


@lru_cache
def _middles(signed: bool, device: torch.device) -> Tensor:
    """Return the bounds between the codes, float32 [255]; a value on one takes the upper code."""
    values = _table(signed, device)
    return (values[1:] + values[:-1]) / 2
