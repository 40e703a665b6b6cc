"""The plain PyTorch form, with the concatenated copy."""

import torch
from torch import Tensor
from torch.nn import functional


def gelu_linear2(attn: Tensor, mlp: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return [attn, gelu(mlp)] @ weight^T + bias; see ``op.gelu_linear2``."""
    joint = torch.cat([attn, functional.gelu(mlp, approximate="tanh")], dim=-1)
    return functional.linear(joint, weight, bias)
