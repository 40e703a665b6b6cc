"""Which noise levels a run trains on."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hunyuan_train.objectives.config import FlowMatchingConfig
from hunyuan_train.runtime.seed import keyed_generator


def shift_sigmas(sigmas: Tensor, shift: float) -> Tensor:
    """Move sigmas in [0, 1] towards 1 (noise) for `shift` > 1, keeping both ends.

    `s t / (1 + (s - 1) t)`, the resolution-dependent shift of Stable Diffusion 3 (arXiv 2403.03206,
    section 5.3.2). On the logit scale it adds ln(s).
    """
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def sample_sigmas(
    cfg: FlowMatchingConfig, seed: int, sample_ids: Sequence[str | int], epochs: Sequence[int]
) -> Tensor:
    """Draw one training sigma per sample: logit-normal, then shifted.

    Keyed by (seed, sample, epoch), so a sample has the same sigma on any rank.

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
    return shift_sigmas(uniform, cfg.shift).float()
