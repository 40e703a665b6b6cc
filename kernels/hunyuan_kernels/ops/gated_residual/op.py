"""x + gate * branch as one op."""

from typing import Any

import torch
from torch import Tensor

from hunyuan_kernels import dispatch, launch
from hunyuan_kernels.ops.gated_residual import reference

_BACKWARD_BLOCK = 1024


def gated_residual(x: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
    """Return x + gate * branch, the gate broadcast over the tokens of a sample.

    The backward keeps gate and branch; the gradient of x is the incoming one, not a copy. The
    gradient of the gate is summed in float32 in an order that depends on the shape alone.

    Args:
        x: [B, S, D], any strides of B and S.
        gate: [B, D].
        branch: [B, S, D].

    Returns:
        [B, S, D] in the dtype of x.
    """
    if dispatch.enabled("gated_residual", x):
        return _forward(x, gate, branch)
    return reference.gated_residual(x, gate, branch)


@torch.library.custom_op("hunyuan_kernels::gated_residual", mutates_args=())
def _forward(x: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
    from hunyuan_kernels.ops.gated_residual.kernel import gated_residual_fwd_kernel

    x, gate, branch = (launch.rows_first(t) for t in (x, gate, branch))
    batch, tokens, width = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block = launch.power_of_two(width)
    launch.on_grid(gated_residual_fwd_kernel, batch * tokens)(
        x, gate, branch, out,
        tokens, width, x.stride(0), x.stride(1), gate.stride(0), branch.stride(0),
        branch.stride(1), BLOCK=block, num_warps=launch.warps(block),
    )  # fmt: skip
    return out


@_forward.register_fake
def _(x: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@torch.library.custom_op("hunyuan_kernels::gated_residual_backward", mutates_args=())
def _backward(grad: Tensor, gate: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
    from hunyuan_kernels.ops.gated_residual.kernel import gated_residual_bwd_kernel

    grad, gate, branch = (launch.rows_first(t) for t in (grad, gate, branch))
    batch, tokens, width = branch.shape
    dbranch = torch.empty(branch.shape, dtype=branch.dtype, device=branch.device)
    programs, rows_each = launch.reduction(tokens)
    sums = launch.partials(batch, programs, width, like=branch)
    block = min(launch.power_of_two(width), _BACKWARD_BLOCK)
    launch.on_grid(gated_residual_bwd_kernel, programs, batch, -(-width // block))(
        grad, gate, branch, dbranch, sums,
        tokens, width, rows_each, grad.stride(0), grad.stride(1), gate.stride(0),
        branch.stride(0), branch.stride(1), BLOCK=block, num_warps=launch.warps(block),
    )  # fmt: skip
    return dbranch, sums.sum(dim=1).to(gate.dtype)


@_backward.register_fake
def _(grad: Tensor, gate: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
    dbranch = torch.empty(branch.shape, dtype=branch.dtype, device=branch.device)
    return dbranch, torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)


def _setup(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dbranch, dgate = _backward(grad, *ctx.saved_tensors)
    return grad, dgate, dbranch


_forward.register_autograd(_gradients, setup_context=_setup)
