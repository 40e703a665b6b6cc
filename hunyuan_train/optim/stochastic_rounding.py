"""Rounding float32 to bfloat16 up or down at random, so that small updates count on average.

Between two neighbouring bfloat16 values a float32 value is rounded up with a probability of its
distance from the lower one. An update of a thousandth of that gap, which rounding to nearest would
lose every time, then happens once in a thousand updates (Zamirai et al., "Revisiting BFloat16
Training", 2020).

The random numbers are a hash of run seed, parameter name, number of the update and position of the
element. There is no generator: a resumed run, another order of updates, or another number of data-
or context-parallel ranks draws the same numbers. Ranks of a tensor-parallel group draw by position
in their own part of a parameter, and the same numbers where they all hold the whole of it.
"""

import torch
from torch import Tensor

from hunyuan_train.runtime.seed import keyed_generator

_TO_PLACES = -1640531535
_MIX = (-2048144789, -1028477379)
"""2654435761 (Knuth's multiplicative hash), 2246822507 (MurmurHash3) and 3266489917 (xxHash) as
signed 32-bit integers."""


class RoundingKey:
    """The random numbers of one parameter."""

    def __init__(self, seed: int, name: str, device: torch.device) -> None:
        """Derive its key, which stays on ``device``."""
        draws = keyed_generator(seed, "rounding", name).integers(-(2**31), 2**31, size=2)
        self._first, self._second = torch.tensor(draws, dtype=torch.int32, device=device)

    def at(self, count: Tensor) -> tuple[Tensor, Tensor]:
        """Return the key of the update that makes ``count`` updates: two int32 scalars.

        No host sync: ``count`` is a scalar on the device.
        """
        number = _mixed(count.to(torch.int32) * _TO_PLACES ^ self._first)
        return number, _mixed(number + self._second)


def stochastic_round(values: Tensor, key: tuple[Tensor, Tensor], start: int = 0) -> Tensor:
    """Round to bfloat16, each value by the random number of its position.

    Values that bfloat16 holds exactly, infinities and NaN stay as they are.

    Args:
        values: float32, any shape, contiguous.
        key: From :meth:`RoundingKey.at`.
        start: Position of the first value in the whole parameter, in row-major order; the others
            follow.
    """
    draws = torch.arange(start, start + values.numel(), dtype=torch.int32, device=values.device)
    draws = _mixed(draws.mul_(_TO_PLACES).bitwise_xor_(key[0]), key[1])
    draws.bitwise_right_shift_(16).bitwise_and_(0xFFFF)
    # In the bits of a float32, one step of bfloat16 is 2^16 away from zero: the carry rounds up.
    bits = values.view(torch.int32).view(-1) + draws
    return bits.bitwise_and_(-0x10000).view(torch.float32).view(values.shape).bfloat16()


def _mixed(bits: Tensor, key: Tensor | int = 0) -> Tensor:
    """Spread every bit of an int32 over all others, in place; MurmurHash3's finalizer, keyed."""
    bits.bitwise_xor_(bits.bitwise_right_shift(16).bitwise_and_(0xFFFF)).mul_(_MIX[0]).add_(key)
    bits.bitwise_xor_(bits.bitwise_right_shift(13).bitwise_and_(0x7FFFF)).mul_(_MIX[1])
    return bits.bitwise_xor_(bits.bitwise_right_shift(16).bitwise_and_(0xFFFF))
