"""The plain PyTorch form."""

import torch
from torch import Tensor


def lse_merge(out: Tensor, lse: Tensor, block: Tensor, block_lse: Tensor) -> Tensor:
    """Merge ``block`` into ``out`` in place and return the log-sum-exp; see ``op.lse_merge``."""
    merged = torch.logaddexp(lse, block_lse)
    base = merged.masked_fill(merged == -torch.inf, 0)  # else -inf - -inf = nan
    out.mul_(_row_weights(lse - base))
    out.addcmul_(block, _row_weights(block_lse - base))
    return merged


def _row_weights(log_weights: Tensor) -> Tensor:
    """[B, A, S] -> [B, S, A, 1], out of the logarithm."""
    return log_weights.exp().transpose(1, 2).unsqueeze(-1)
