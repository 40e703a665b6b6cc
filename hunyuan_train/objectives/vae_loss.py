"""What an autoencoder minimises: error of pixels, perceptual distance, KL and a verdict.

Every term of :func:`reconstruction_loss` is a mean over the pixel values of a sample, one number
per sample. For the KL this means the sum over the latents' channels, frames, height and width,
divided by the number of pixel values: the same balance as summing reconstruction and KL over a
sample, whatever its size. A KL weight says nothing without this convention.

Samples weigh the same. Ranks with distinct samples divide by the global number of samples; ranks
that hold parts of one clip weigh theirs by the part's share of the clip's pixel values.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hunyuan_train.objectives.perceptual import Perceptual
from hunyuan_train.objectives.vae_loss_config import VaeLossConfig

SMALLEST_NORM = 1e-6
"""Added to the norm that :func:`adaptive_ratio` divides by (arXiv 2012.09841, equation 7)."""


@dataclass(frozen=True, slots=True)
class VaeLoss:
    """Terms, unweighted and without a graph, and their weighted sum with it; each [B] or scalar."""

    total: Tensor
    """What is minimised."""

    absolute: Tensor
    """Mean absolute error of pixel values in [-1, 1]."""

    squared: Tensor
    """Mean squared error."""

    gradient: Tensor
    """Mean absolute error of the differences between neighbours along height and width."""

    perceptual: Tensor
    """Perceptual distance, the mean over frames; 0 where it is not computed."""

    kl: Tensor
    """Nats per pixel value."""

    def mean(self) -> "VaeLoss":
        """Return scalars: the means over samples."""
        return VaeLoss(*(getattr(self, term.name).mean() for term in fields(self)))

    def detached(self) -> "VaeLoss":
        """Return the terms without their graph."""
        return VaeLoss(*(getattr(self, term.name).detach() for term in fields(self)))


def reconstruction_loss(
    decoded: Tensor,
    pixels: Tensor,
    kl: Tensor,
    cfg: VaeLossConfig,
    perceptual: Perceptual | None = None,
) -> VaeLoss:
    """Return the loss of every sample, the discriminator's verdict aside.

    Args:
        decoded: [B, 3, F, H, W], the reconstruction.
        pixels: [B, 3, F, H, W] in [-1, 1].
        kl: [B], summed over a sample's latents.
        cfg: Weights of the terms.
        perceptual: The distance; needed unless ``cfg.perceptual`` is 0.

    Returns:
        Tensors [B], float32.
    """
    assert decoded.shape == pixels.shape, (decoded.shape, pixels.shape)
    assert kl.shape == decoded.shape[:1], kl.shape
    assert perceptual is not None or not cfg.perceptual, "a weight but no perceptual distance"
    error = (decoded - pixels).float().flatten(1, 2)  # [B, 3 * F, H, W]
    absolute = error.abs().mean(dim=(1, 2, 3))
    squared = error.square().mean(dim=(1, 2, 3))
    gradient = _edges(error)
    nats = kl.float() / pixels[0].numel()
    total = (
        cfg.absolute * absolute + cfg.squared * squared + cfg.gradient * gradient + cfg.kl * nats
    )
    distance = torch.zeros_like(absolute)
    if perceptual is not None and cfg.perceptual:
        distance = perceptual(decoded, pixels)
        total = total + cfg.perceptual * distance
    return VaeLoss(
        total,
        absolute.detach(),
        squared.detach(),
        gradient.detach(),
        distance.detach(),
        nats.detach(),
    )


def adversarial_term(logits_fake: Tensor) -> Tensor:
    """Return what the VAE minimises of the verdict on its reconstructions.

    Args:
        logits_fake: [B, 1, f, h, w], with the graph of the reconstruction.

    Returns:
        [B], minus the mean logit.
    """
    return -logits_fake.float().flatten(1).mean(dim=1)


def discriminator_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """Return the hinge loss that the discriminator minimises (arXiv 1705.02894).

    Args:
        logits_real: [B, 1, f, h, w] of recordings.
        logits_fake: [B, 1, f, h, w] of reconstructions without their graph.

    Returns:
        [B], half the mean of relu(1 - real) plus half that of relu(1 + fake): 1 at logits of 0.
    """
    real = F.relu(1 - logits_real.float()).flatten(1).mean(dim=1)
    fake = F.relu(1 + logits_fake.float()).flatten(1).mean(dim=1)
    return 0.5 * (real + fake)


def gradient_penalty(discriminator: nn.Module, pixels: Tensor) -> Tensor:
    """Return the squared gradient of the mean logit of recordings (R1, arXiv 1801.04406).

    Args:
        discriminator: Pixels to logits.
        pixels: [B, 3, F, H, W], recordings.

    Returns:
        [B], summed over a sample's pixel values; differentiable in the discriminator's weights.
    """
    pixels = pixels.detach().requires_grad_()
    logits = discriminator(pixels).flatten(1).mean(dim=1)
    (slope,) = torch.autograd.grad(logits.sum(), pixels, create_graph=True)
    return slope.float().square().flatten(1).sum(dim=1)


def adaptive_ratio(squares: Tensor, most: float) -> Tensor:
    """Return how much louder the verdict must be to match the other terms (arXiv 2012.09841).

    There the gradients are those at the decoder's last kernel; here they are those of the
    reconstruction itself, which every layout of the VAE has in the same form.

    Args:
        squares: [2], the sums of squares of the gradients of the other terms and of the verdict.
        most: Largest weight.

    Returns:
        Scalar in [0, most].
    """
    return (squares[0].sqrt() / (squares[1].sqrt() + SMALLEST_NORM)).clamp(0, most)


def _edges(error: Tensor) -> Tensor:
    # A side of one pixel has no neighbours: its direction counts as 0.
    means = [
        error.diff(dim=dim).abs().mean(dim=(1, 2, 3)) for dim in (-1, -2) if error.shape[dim] > 1
    ]
    return torch.stack(means).sum(dim=0) / 2 if means else error.new_zeros(len(error))
