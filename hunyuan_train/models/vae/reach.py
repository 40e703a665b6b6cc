"""What a layer sees beyond the positions it is given, and the seam where splitting replaces that.

On one device a layer gets the whole clip, so nothing lies beyond but the repeated border. Where a
clip is split over devices (``parallel.vae_split``), the borders, the norms' averages and the past
of the attention are partly elsewhere.
"""

from typing import Protocol

from torch import Tensor, nn
from torch.nn import functional as F


class Reach(Protocol):
    """How one layer gets at the rest of the clip; every method is differentiable."""

    @property
    def begins(self) -> bool:
        """Whether the first frame of the clip is here."""
        ...

    def clip_frames(self, x: Tensor) -> int:
        """Return the frames of the whole clip at the resolution of ``x`` [B, C, T, H, W]."""
        ...

    def padded(self, x: Tensor, pads: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
        """Return ``x`` with what lies around it: neighbours, or copies of the clip's edge.

        Args:
            x: [B, C, T, H, W], or [B, C, H, W] without time.
            pads: positions in the order of ``functional.pad``: last dimension first, before and
                after.
            stride: of the convolution that follows, one entry per padded dimension, first
                dimension first.
        """
        ...

    def normalised(self, x: Tensor, norm: nn.GroupNorm) -> Tensor:
        """Return the norm of ``x`` with averages over the whole clip."""
        ...

    def past(self, key: Tensor, value: Tensor, frames: int) -> tuple[Tensor, Tensor, int]:
        """Return the keys and values of all frames up to the last one here.

        Args:
            key: [B, 1, frames * positions here, C], time slowest.
            value: same shape.
            frames: frames here.

        Returns:
            Keys and values [B, 1, (earlier + frames) * positions of a frame, C], and ``earlier``.
        """
        ...


class WholeClip:
    """One device has the whole clip."""

    begins = True

    def clip_frames(self, x: Tensor) -> int:
        """See ``Reach``."""
        return x.shape[2]

    def padded(self, x: Tensor, pads: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
        """See ``Reach``."""
        return F.pad(x, pads, mode="replicate")

    def normalised(self, x: Tensor, norm: nn.GroupNorm) -> Tensor:
        """See ``Reach``."""
        return F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)

    def past(self, key: Tensor, value: Tensor, frames: int) -> tuple[Tensor, Tensor, int]:
        """See ``Reach``."""
        return key, value, 0


WHOLE = WholeClip()
