"""Which noise levels a run trains on, and how much each counts."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hunyuan_train.objectives.config import FlowMatchingConfig, Weighting
from hunyuan_train.runtime.seed import keyed_generator

MOST_WEIGHT = 25.0
"""Largest factor of ``sigma_sqrt``: that of sigma = 0.2."""


def shift_sigmas(sigmas: Tensor, shift: float) -> Tensor:
    """Move sigmas in [0, 1] towards 1 (noise) for `shift` > 1, keeping both ends.

    `s t / (1 + (s - 1) t)`, the resolution-dependent shift of Stable Diffusion 3 (arXiv 2403.03206,
    section 5.3.2). On the logit scale it adds ln(s).
    """
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def shift_of(cfg: FlowMatchingConfig, tokens: int) -> float:
    """Return the shift of samples with ``tokens`` image tokens; see ``objective.shift_tokens``.

    Twice as many values of one picture carry twice the signal, so they need sqrt(2) times the noise
    to be as uncertain (arXiv 2403.03206, section 5.3.2).
    """
    return cfg.shift * (math.sqrt(tokens / cfg.shift_tokens) if cfg.shift_tokens else 1.0)


def sample_sigmas(
    cfg: FlowMatchingConfig,
    seed: int,
    sample_ids: Sequence[str | int],
    epochs: Sequence[int],
    tokens: int,
) -> Tensor:
    """Draw one training sigma per sample: logit-normal, then shifted.

    Keyed by (seed, sample, epoch), so a sample has the same sigma on any rank. The draw does not
    depend on its size, only the shift does.

    Args:
        cfg: Distribution.
        seed: Of the run.
        sample_ids: B ids.
        epochs: B epochs.
        tokens: Image tokens of each of these samples.

    Returns:
        [B] float32 on the CPU, in (0, 1) with 1 = noise.
    """
    normal = np.array(
        [
            keyed_generator(seed, "time", sample_id, epoch).standard_normal()
            for sample_id, epoch in zip(sample_ids, epochs, strict=True)
        ]
    )
    # float64 until the end: near 1 a float32 sigmoid has steps of 6e-8 that a large shift widens.
    uniform = torch.sigmoid(torch.from_numpy(cfg.time_mean + cfg.time_std * normal))
    return shift_sigmas(uniform, shift_of(cfg, tokens)).float()


def loss_weights(weighting: Weighting, sigma: Tensor) -> Tensor | None:
    """Return what the loss of each sample is multiplied by, [B] like ``sigma``; None for 1."""
    match weighting:
        case Weighting.none:
            return None
        case Weighting.cosmap:
            return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma.square()))
        case Weighting.sigma_sqrt:
            return sigma.square().reciprocal().clamp(max=MOST_WEIGHT)
