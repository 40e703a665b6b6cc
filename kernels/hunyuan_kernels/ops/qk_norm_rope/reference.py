"""The plain PyTorch form."""

import torch
from torch import Tensor
from torch.nn import functional


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Return normalised and rotated q and k; see ``op.qk_norm_rope``."""
    return (
        _rotate(functional.rms_norm(q, q.shape[-1:], q_weight, eps), cos, sin).to(q.dtype),
        _rotate(functional.rms_norm(k, k.shape[-1:], k_weight, eps), cos, sin).to(k.dtype),
    )


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    a, b = wide.unflatten(-1, (-1, 2)).unbind(-1)  # [B, S, A, E/2]
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
