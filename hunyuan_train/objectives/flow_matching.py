"""The flow-matching path between data and noise.

Released convention: `x = (1 - sigma) * latents + sigma * noise`, so sigma = 1 is noise, the target
`velocity = dx / dsigma = noise - latents`, and the model reads time as 1000 * sigma (Lipman et al.,
arXiv 2210.02747, in the reverse direction that the published weights follow).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from hunyuan_train.runtime.seed import keyed_normal

TIME_SCALE = 1000.0
"""Model time at pure noise; the guidance scale is multiplied by the same number."""


def keyed_noise(
    shape: tuple[int, ...],
    seed: int,
    purpose: str,
    sample_ids: Sequence[str | int],
    epochs: Sequence[int],
) -> Tensor:
    """Draw standard normal noise per sample, the same on any rank.

    Args:
        shape: of one sample, for example [C, T, H, W].
        seed: of the run.
        purpose: "noise" for the flow, "posterior" for sampling the VAE latents.
        sample_ids: B ids.
        epochs: B epochs.

    Returns:
        [B, *shape] float32 on the CPU.
    """
    return torch.stack(
        [
            keyed_normal(shape, seed, purpose, sample_id, epoch)
            for sample_id, epoch in zip(sample_ids, epochs, strict=True)
        ]
    )


def interpolate(latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """Return the noisy latents at `sigma`.

    Args:
        latents: [B, C, T, H, W] scaled latents.
        noise: same shape, standard normal.
        sigma: [B], 1 = noise.
    """
    weight = sigma.view(-1, *[1] * (latents.ndim - 1))  # [B, 1, 1, 1, 1]
    return (1 - weight) * latents + weight * noise


def velocity_target(latents: Tensor, noise: Tensor) -> Tensor:
    """Return what the model learns to predict, `noise - latents`, same shape as both."""
    return noise - latents


def model_time(sigma: Tensor) -> Tensor:
    """Return the time input of the model, [B] float32 in 0..1000.

    Kept in float32 until after the sinusoid: in bfloat16 986.38 becomes 988, and the embeddings of
    the two have a cosine similarity of only 0.93.
    """
    return TIME_SCALE * sigma.float()
