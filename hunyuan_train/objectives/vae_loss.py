"""The pixel objective of the autoencoder: absolute error, squared error, edges and KL.

Every term is a mean over the pixel values of a sample. For the KL this means the sum over the
latents' channels, frames, height and width, divided by the number of pixel values: the same balance
as summing reconstruction and KL over a sample, whatever its size. A KL weight says nothing without
this convention.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hunyuan_train.objectives.vae_config import VaeTrainingConfig


@dataclass(frozen=True, slots=True)
class VaeLoss:
    """Scalar terms, unweighted, and their weighted sum; means over the batch."""

    total: Tensor
    """What is minimised."""

    absolute: Tensor
    """Mean absolute error of pixel values in [-1, 1]."""

    squared: Tensor
    """Mean squared error."""

    gradient: Tensor
    """Mean absolute error of the differences between neighbours along height and width."""

    kl: Tensor
    """Nats per pixel value."""

    def detached(self) -> "VaeLoss":
        """Return the terms without their graph."""
        return replace(self, total=self.total.detach())


def vae_loss(decoded: Tensor, pixels: Tensor, kl: Tensor, cfg: VaeTrainingConfig) -> VaeLoss:
    """Return the loss terms of a batch.

    Args:
        decoded: [B, 3, F, H, W], the reconstruction.
        pixels: [B, 3, F, H, W] in [-1, 1].
        kl: [B], summed over a sample's latents.
        cfg: Weights of the terms.
    """
    error = (decoded - pixels).float()
    absolute = error.abs().mean()
    squared = error.square().mean()
    gradient = torch.stack([error.diff(dim=dim).abs().mean() for dim in (-1, -2)]).mean()
    nats = kl.float().mean() / pixels[0].numel()
    total = (
        absolute + cfg.mse_weight * squared + cfg.gradient_weight * gradient + cfg.kl_weight * nats
    )
    return VaeLoss(total, absolute.detach(), squared.detach(), gradient.detach(), nats.detach())
