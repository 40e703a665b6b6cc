"""Guidance distillation: one forward learns what classifier-free guidance takes two for.

The teacher predicts with the caption and with the empty one; the student, which is told w, learns
`uncond + w * (cond - uncond)` (Meng et al., arXiv 2210.03142, stage one; HunyuanVideo, arXiv
2412.03603, section 5.3: w uniform from 1 to 8).
"""

import torch
from torch import Tensor


def guided_velocity(cond: Tensor, uncond: Tensor, scale: Tensor) -> Tensor:
    """Return the velocity that guidance with `scale` makes of two predictions.

    Args:
        cond: [B, C, T, H, W] with the caption, in any precision.
        uncond: same shape, with the empty caption.
        scale: [B], 1 = the prediction with the caption.

    Returns:
        Same shape, in float32 at least.
    """
    dtype = torch.promote_types(cond.dtype, torch.float32)
    cond, uncond = cond.to(dtype), uncond.to(dtype)
    weight = scale.to(uncond).view(-1, *[1] * (cond.ndim - 1))  # [B, 1, 1, 1, 1]
    return uncond + weight * (cond - uncond)
