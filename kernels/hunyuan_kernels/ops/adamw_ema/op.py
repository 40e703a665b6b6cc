"""One update of weights, moments and moving average as one pass per parameter."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hunyuan_kernels import dispatch, launch
from hunyuan_kernels.ops.adamw_ema import reference

_BLOCK = 1024


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
    """Update as torch.optim.AdamW does, then move the averages, all in place.

    The lists run in parallel; what is skipped is decided on the device, without a host sync.

    Args:
        params: float32 weights, contiguous.
        grads: float32 or narrower, same shapes.
        exp_avgs: float32 first moments.
        exp_avg_sqs: float32 second moments.
        steps: float32 scalars on the device, the updates done so far; one is added.
        emas: float32 averages, or none.
        copies: narrower copies of the new weights, or none.
        skip: scalar; where it is not 0, nothing changes: no weight, moment, step or average.
        grad_factor: scalar every gradient is multiplied by, as clipping does; may be not finite
            if ``skip`` is set then.
        lr: learning rate.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled.
        ema_decay: share of the average that is kept.
    """
    hyper = (lr, beta1, beta2, eps, weight_decay, ema_decay)
    tensors = [*params, *grads, *exp_avgs, *exp_avg_sqs, *emas, *copies]
    plain = all(t.is_contiguous() for t in tensors)
    if plain and params and all(dispatch.enabled("adamw_ema", p) for p in params if p.numel()):
        lists = (params, grads, exp_avgs, exp_avg_sqs, steps, emas, copies)
        _update(*(list(tensors) for tensors in lists), skip, grad_factor, *hyper)
        return
    reference.adamw_ema(
        params, grads, exp_avgs, exp_avg_sqs, steps, emas, copies,
        skip=skip, grad_factor=grad_factor, lr=lr, beta1=beta1, beta2=beta2, eps=eps,
        weight_decay=weight_decay, ema_decay=ema_decay,
    )  # fmt: skip


@torch.library.custom_op(
    "hunyuan_kernels::adamw_ema",
    mutates_args={"params", "exp_avgs", "exp_avg_sqs", "steps", "emas", "copies"},
)
def _update(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    emas: list[Tensor],
    copies: list[Tensor],
    skip: Tensor | None,
    grad_factor: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    ema_decay: float,
) -> None:
    from hunyuan_kernels.ops.adamw_ema.kernel import adamw_ema_kernel

    if skip is None:
        torch._foreach_add_(steps, 1.0)
    else:
        torch._foreach_add_(steps, (skip == 0).to(torch.float32))
    corrections = _corrections(steps, beta1, beta2)
    for place, param in enumerate(params):
        if not param.numel():
            continue
        launch.on_grid(adamw_ema_kernel, -(-param.numel() // _BLOCK))(
            param, grads[place], exp_avgs[place], exp_avg_sqs[place],
            emas[place] if emas else None, copies[place] if copies else None,
            corrections[place], skip, grad_factor,
            param.numel(), 1.0 - lr * weight_decay, lr, 1.0 - beta1, beta2, 1.0 - beta2, eps,
            1.0 - ema_decay,
            HAS_EMA=bool(emas), HAS_COPY=bool(copies), HAS_SKIP=skip is not None,
            HAS_FACTOR=grad_factor is not None, BLOCK=_BLOCK, num_warps=launch.warps(_BLOCK),
        )  # fmt: skip


def _corrections(steps: Sequence[Tensor], beta1: float, beta2: float) -> Tensor:
    """Return 1 / (1 - beta1^t) and 1 / sqrt(1 - beta2^t) [N, 2] in float32.

    Computed in float64: 1 - 0.999 loses four digits in float32. A step count of 0, which only a
    skipped first update has, gives infinities that nothing reads.
    """
    count = torch.stack(list(steps)).double()
    one, two = (_one_minus_power(beta, count) for beta in (beta1, beta2))
    return torch.stack([1.0 / one, two.rsqrt()], dim=-1).float()


def _one_minus_power(beta: float, count: Tensor) -> Tensor:
    return -torch.expm1(count * math.log(beta)) if beta > 0 else torch.ones_like(count)
