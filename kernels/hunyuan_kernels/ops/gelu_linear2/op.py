"""A linear over [attn, gelu(mlp)] as one op, without the concatenated copy."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from hunyuan_kernels import dispatch, launch
from hunyuan_kernels.ops.gelu_linear2 import reference

_BLOCK = 2048


def gelu_linear2(attn: Tensor, mlp: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return attn @ weight[:, :D]^T + gelu_tanh(mlp) @ weight[:, D:]^T + bias.

    Two products into one output; the weight is cut by views. The backward keeps attn, mlp (before
    the GELU) and the weight, and computes the GELU again. The shorter product comes first: its
    rounding to the output dtype is the one that counts twice.

    Args:
        attn: [..., D].
        mlp: [..., M], any strides of the leading dimensions.
        weight: [F, D + M].
        bias: [F].

    Returns:
        [..., F] in the dtype of attn.
    """
    if dispatch.enabled("gelu_linear2", mlp) and attn.dtype == mlp.dtype == weight.dtype:
        return _forward(attn, mlp, weight, bias)
    return reference.gelu_linear2(attn, mlp, weight, bias)


def _rows(x: Tensor) -> Tensor:
    """Return [..., W] as [N, W], a view where strides allow it."""
    return launch.rows_first(x).flatten(0, -2)


@torch.library.custom_op("hunyuan_kernels::gelu_linear2", mutates_args=())
def _forward(attn: Tensor, mlp: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    from hunyuan_kernels.ops.gelu_linear2.kernel import gelu_fwd_kernel

    rows, width = _rows(mlp), mlp.shape[-1]
    activated = torch.empty(rows.shape, dtype=mlp.dtype, device=mlp.device)
    launch.on_grid(gelu_fwd_kernel, rows.shape[0], -(-width // _BLOCK))(
        rows, activated, width, rows.stride(0), BLOCK=_BLOCK, num_warps=launch.warps(_BLOCK)
    )
    out = torch.addmm(bias.to(attn.dtype), _rows(attn), weight[:, : attn.shape[-1]].t())
    out.addmm_(activated, weight[:, attn.shape[-1] :].t())
    return out.view(*attn.shape[:-1], weight.shape[0])


@_forward.register_fake
def _(attn: Tensor, mlp: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    shape = (*attn.shape[:-1], weight.shape[0])
    return torch.empty(shape, dtype=attn.dtype, device=attn.device)


@torch.library.custom_op("hunyuan_kernels::gelu_linear2_backward", mutates_args=())
def _backward(
    grad: Tensor, attn: Tensor, mlp: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from hunyuan_kernels.ops.gelu_linear2.kernel import gelu_bwd_kernel

    grad, rows, width = _rows(grad), _rows(mlp), mlp.shape[-1]
    near, far = weight[:, : attn.shape[-1]], weight[:, attn.shape[-1] :]
    dmlp = grad @ far  # the gradient of the activated values, for now
    activated = torch.empty_like(dmlp)
    launch.on_grid(gelu_bwd_kernel, rows.shape[0], -(-width // _BLOCK))(
        rows, dmlp, activated, width, rows.stride(0),
        BLOCK=_BLOCK, num_warps=launch.warps(_BLOCK),
    )  # fmt: skip
    dweight = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    torch.mm(grad.t(), activated, out=dweight[:, attn.shape[-1] :])
    del activated
    torch.mm(grad.t(), _rows(attn), out=dweight[:, : attn.shape[-1]])
    dattn = (grad @ near).view(attn.shape)
    return dattn, dmlp.view(mlp.shape), dweight, grad.sum(dim=0)


@_backward.register_fake
def _(
    grad: Tensor, attn: Tensor, mlp: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tensors = (attn, mlp, weight)
    dattn, dmlp, dweight = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in tensors)
    return dattn, dmlp, dweight, dweight.new_empty(weight.shape[:1])


def _setup(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    *kept, bias = inputs
    ctx.save_for_backward(*kept)
    ctx.bias_dtype = bias.dtype


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
    dattn, dmlp, dweight, dbias = _backward(grad, *ctx.saved_tensors)
    return dattn, dmlp, dweight, dbias.to(ctx.bias_dtype)


_forward.register_autograd(_gradients, setup_context=_setup)


@register_flop_formula(torch.ops.hunyuan_kernels.gelu_linear2)
def _forward_flops(attn: Any, mlp: Any, weight: Any, *_: Any, **__: Any) -> int:
    tokens = 1
    for size in attn[:-1]:
        tokens *= size
    return 2 * tokens * weight[0] * weight[1]


@register_flop_formula(torch.ops.hunyuan_kernels.gelu_linear2_backward)
def _backward_flops(grad: Any, attn: Any, mlp: Any, weight: Any, **__: Any) -> int:
    return 2 * _forward_flops(attn, mlp, weight)
