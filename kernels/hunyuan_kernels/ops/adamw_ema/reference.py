"""The plain PyTorch form: torch.optim.AdamW, then one step of the moving average."""

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def adamw_ema(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    emas: Sequence[Tensor] = (),
    copies: Sequence[Tensor] = (),
    *,
    skip: Tensor | None = None,
    grad_factor: Tensor | None = None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    ema_decay: float = 0.0,
) -> None:
    """Update everything in place; see ``op.adamw_ema``."""
    for place, param in enumerate(params):
        first, second, step = exp_avgs[place], exp_avg_sqs[place], steps[place]
        grad = grads[place].to(param.dtype)
        if grad_factor is not None:
            grad = grad * grad_factor
        live = torch.ones_like(step) if skip is None else (skip == 0).to(step.dtype)
        step.add_(live)
        count = step.double()
        new_first = first.lerp(grad, 1 - beta1)
        new_second = second * beta2 + (1 - beta2) * grad * grad
        denominator = (new_second / (1 - beta2**count).to(param.dtype)).sqrt() + eps
        decayed = param * (1 - lr * weight_decay)
        new = decayed - lr / (1 - beta1**count).to(param.dtype) * new_first / denominator
        keep = live == 0
        param.copy_(torch.where(keep, param, new))
        first.copy_(torch.where(keep, first, new_first))
        second.copy_(torch.where(keep, second, new_second))
        if emas:
            average = emas[place]
            average.copy_(torch.where(keep, average, average.lerp(param, 1 - ema_decay)))
        if copies:
            copies[place].copy_(torch.where(keep, copies[place], param.to(copies[place].dtype)))
