"""The plain PyTorch form."""

import torch
from torch import Tensor


def gated_residual(x: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
    """Return x + gate * branch; see ``op.gated_residual``."""
    return torch.addcmul(x, gate[:, None], branch)
