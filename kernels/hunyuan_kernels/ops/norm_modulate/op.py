"""LayerNorm(x) * (1 + scale) + shift as one op."""

from typing import Any

import torch
from torch import Tensor

from hunyuan_kernels import dispatch, launch
from hunyuan_kernels.ops.norm_modulate import reference


def norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """Return LayerNorm(x) * (1 + scale) + shift, the same affine for all tokens of a sample.

    The backward keeps x and two float32 numbers per token. Gradients of shift and scale are summed
    in float32 in an order that depends on the shape alone.

    Args:
        x: [B, S, D], any strides of B and S.
        shift: [B, D].
        scale: [B, D].
        eps: added to the variance.

    Returns:
        [B, S, D] in the dtype of x.
    """
    if dispatch.enabled("norm_modulate", x):
        return _forward(x, shift, scale, eps)[0]
    return reference.norm_modulate(x, shift, scale, eps)


@torch.library.custom_op("hunyuan_kernels::norm_modulate", mutates_args=())
def _forward(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    from hunyuan_kernels.ops.norm_modulate.kernel import norm_modulate_fwd_kernel

    x, shift, scale = (launch.rows_first(t) for t in (x, shift, scale))
    batch, tokens, width = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    mean, rstd = (launch.partials(batch, tokens, like=x) for _ in range(2))
    block = launch.power_of_two(width)
    launch.on_grid(norm_modulate_fwd_kernel, batch * tokens)(
        x, shift, scale, y, mean, rstd,
        tokens, width, x.stride(0), x.stride(1), shift.stride(0), scale.stride(0), eps,
        BLOCK=block, num_warps=launch.warps(block),
    )  # fmt: skip
    return y, mean, rstd


@_forward.register_fake
def _(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    row = torch.empty(x.shape[:2], dtype=torch.float32, device=x.device)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), row, torch.empty_like(row)


@torch.library.custom_op("hunyuan_kernels::norm_modulate_backward", mutates_args=())
def _backward(
    grad: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    from hunyuan_kernels.ops.norm_modulate.kernel import norm_modulate_bwd_kernel

    grad, x, scale = (launch.rows_first(t) for t in (grad, x, scale))
    batch, tokens, width = x.shape
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    programs, rows_each = launch.reduction(tokens)
    sums = launch.partials(2, batch, programs, width, like=x)
    block = launch.power_of_two(width)
    launch.on_grid(norm_modulate_bwd_kernel, programs, batch)(
        grad, x, scale, mean, rstd, dx, sums[0], sums[1],
        tokens, width, rows_each,
        grad.stride(0), grad.stride(1), x.stride(0), x.stride(1), scale.stride(0),
        BLOCK=block, num_warps=launch.warps(block),
    )  # fmt: skip
    # Outputs of one op must not share storage.
    return dx, sums[0].sum(dim=1).to(scale.dtype), sums[1].sum(dim=1).to(scale.dtype)


@_backward.register_fake
def _(
    grad: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    row = torch.empty(scale.shape, dtype=scale.dtype, device=x.device)
    return dx, row, torch.empty_like(row)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, shift, scale, _ = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, scale, mean, rstd)
    ctx.shift_dtype = shift.dtype


def _gradients(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, None]:
    dx, dshift, dscale = _backward(grad, *ctx.saved_tensors)
    return dx, dshift.to(ctx.shift_dtype), dscale, None


_forward.register_autograd(_gradients, setup_context=_setup)
