"""A key mask in the forms that kernels read: an additive bias, or sequences packed end to end.

One layout serves every block and both passes of a micro-batch. Nothing here waits for the device:
packed tensors keep the size of the padded ones, the rows behind the last sequence are ignored.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

# Efficient attention reads bias rows in vectors of 16.
_BIAS_ALIGNMENT = 16


@dataclass(frozen=True, slots=True)
class Ragged:
    """Where the sequences of packed queries and keys begin and end."""

    q_offsets: Tensor
    """int32 [B+1]: sequence ``b`` is the rows from entry ``b`` up to entry ``b + 1``."""
    k_offsets: Tensor
    """int32 [B+1]; rows behind the last entry belong to nobody."""
    q_longest: int
    """No sequence of queries is longer."""
    k_longest: int
    """No sequence of keys is longer; the padded length, as the true one is on the device."""


@dataclass(slots=True)
class KeyLayout:
    """A key mask; use :func:`key_layout` to get it.

    Kernels differ in what they make of a sample without any key (the one for CPU returns a
    log-sum-exp of 0), so such a sample sees every key here and its results are overwritten after.
    """

    absent: Tensor | None
    """bool [B], True for samples without any key; None where it is known that there is none."""
    real: Tensor
    """bool [B, Sk], True for keys that exist, everywhere in absent samples."""
    _biases: dict[torch.dtype, Tensor] = field(default_factory=dict)
    _order: tuple[Tensor, Tensor, Tensor] | None = None
    _q_offsets: dict[int, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, mask: Tensor) -> "KeyLayout":
        """Return the layout of a mask bool [B, Sk], True for keys that exist."""
        absent = ~mask.any(dim=1)
        # Only the host can look without waiting for a device.
        if type(mask) is Tensor and mask.device.type == "cpu" and not absent.any():
            return cls(None, mask.clone())
        return cls(absent, mask | absent[:, None])

    def bias(self, dtype: torch.dtype) -> Tensor:
        """Return the additive bias [B, 1, 1, Sk]: 0, or -inf for keys that do not exist."""
        if dtype not in self._biases:
            batch, keys = self.real.shape
            padded = -(-keys // _BIAS_ALIGNMENT) * _BIAS_ALIGNMENT
            shape = (batch, 1, 1, padded)
            rows = torch.full(shape, -torch.inf, dtype=dtype, device=self.real.device)
            self._biases[dtype] = rows[..., :keys].masked_fill_(self.real[:, None, None, :], 0)
        return self._biases[dtype]

    def ragged(self, queries: int) -> Ragged:
        """Return the boundaries for ``queries`` rows of every sample and the keys that exist."""
        batch, keys = self.real.shape
        if queries not in self._q_offsets:
            ends = torch.arange(batch + 1, dtype=torch.int32, device=self.real.device)
            self._q_offsets[queries] = ends * queries
        return Ragged(self._q_offsets[queries], self._packing()[2], queries, keys)

    def pack(self, rows: Tensor) -> Tensor:
        """Return [B, Sk, A, E] as [B*Sk, A, E] with the rows of keys that exist in front."""
        return rows.flatten(0, 1).index_select(0, self._packing()[0])

    def unpack(self, packed: Tensor) -> Tensor:
        """Undo ``pack``; rows of keys that do not exist become 0."""
        rows = packed.index_select(0, self._packing()[1]).unflatten(0, self.real.shape)
        return rows.masked_fill(~self.real[..., None, None], 0)

    def _packing(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the source row of each packed row, the reverse, and the boundaries."""
        if self._order is None:
            real = self.real.flatten()
            seen = real.cumsum(0)
            place = torch.where(real, seen - 1, seen[-1] + (~real).cumsum(0) - 1)
            rows = torch.arange(real.numel(), device=real.device)
            order = torch.empty_like(rows).scatter_(0, place, rows)
            ends = self.real.sum(dim=1).cumsum(0)
            offsets = torch.cat([ends.new_zeros(1), ends]).to(torch.int32)
            self._order = order, place, offsets
        return self._order


# By the mask object itself, held weakly, so that the number of a mask that is gone cannot be
# taken for that of a new one. The version tells a mask that was changed in place.
_layouts: WeakIdKeyDictionary = WeakIdKeyDictionary()


def key_layout(mask: Tensor | None) -> KeyLayout | None:
    """Return the layout of a mask bool [B, Sk], computed once per mask; None of None."""
    if mask is None:
        return None
    if mask.is_inference():  # keeps no version
        return KeyLayout.of(mask)
    known = _layouts.get(mask)
    if known is not None and known[0] == mask._version:
        return known[1]
    layout = KeyLayout.of(mask)
    _layouts[mask] = mask._version, layout
    return layout
