"""The flow-matching loss as a sum and a token count.

Buckets differ in tokens and ranks in buckets, so a mean of means would weight tokens unequally.
Sums and counts add up over micro-batches and ranks; whoever holds the global count divides once.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

PATCH_CELLS = 4
"""Latent positions per token: the model's patch is 1 x 2 x 2 (frames, height, width)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LossSum:
    """A loss that has not been divided yet."""

    samples: Tensor
    """[B], float32 at least: mean squared error of each token, summed over a sample's tokens."""
    count: int
    """Latent tokens in the sums."""

    @property
    def sum(self) -> Tensor:
        """The sum over samples, a scalar."""
        return self.samples.sum()

    @property
    def mean(self) -> Tensor:
        """Mean squared error per element of this micro-batch alone, scalar float32."""
        return self.sum / self.count


def flow_matching_loss(
    pred: Tensor, target: Tensor, weights: Tensor | None = None, given: Tensor | None = None
) -> LossSum:
    """Compare predicted and true velocity.

    Args:
        pred: [B, C, T, H, W] in any precision; H and W even.
        target: same shape.
        weights: [B] what the loss of each sample is multiplied by; None for 1.
        given: [B, T] bool on the CPU, True for frames that are left out; None for none.

    Returns:
        Sums over tokens of the mean squared error over the token's C * 4 values, in float32.
    """
    assert pred.shape == target.shape, (pred.shape, target.shape)
    batch, channels, frames, height, width = pred.shape
    dtype = torch.promote_types(pred.dtype, torch.float32)
    squared = (pred.to(dtype) - target.to(dtype)).square()
    counted = batch * frames
    if given is not None:
        counted -= int(given.sum())
        squared = squared * ~given.to(squared.device)[:, None, :, None, None]
    samples = squared.flatten(1).sum(dim=1) / (channels * PATCH_CELLS)
    if weights is not None:
        samples = samples * weights.to(samples)
    return LossSum(samples=samples, count=counted * height * width // PATCH_CELLS)
