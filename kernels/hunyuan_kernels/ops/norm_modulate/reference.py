"""The plain PyTorch form."""

import torch
from torch import Tensor
from torch.nn import functional


def norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """Return LayerNorm(x) * (1 + scale) + shift; see ``op.norm_modulate``."""
    if x.shape[0] == 1:
        # With one sample, scale and shift are an ordinary affine: one fused pass, and the
        # normalised tokens need not be kept for the backward.
        weight, bias = (1.0 + scale[0]).to(x.dtype), shift[0].to(x.dtype)
        return functional.layer_norm(x, x.shape[-1:], weight, bias, eps)
    normed = functional.layer_norm(x, x.shape[-1:], eps=eps)
    return torch.addcmul(shift[:, None], normed, 1.0 + scale[:, None])
