"""RMSNorm over the channels of a head, then rotary positions, for q and k as one op."""

from typing import Any

import torch
from torch import Tensor

from hunyuan_kernels import dispatch, launch
from hunyuan_kernels.ops.qk_norm_rope import reference

_TILE = 1024
"""Values of a program's tile: 8 heads of 128 channels."""


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Normalise every head of q and k, then rotate its adjacent channel pairs, in float32.

    ``(a, b) -> (a cos - b sin, b cos + a sin)``. Tokens without a position are rows of the table
    that rotate by zero. The backward keeps q and k as they were given, which may be views of a
    packed projection, and computes their norms again.

    Args:
        q: [B, S, A, E], any strides of B, S and A.
        k: the same shape and dtype.
        q_weight: [E].
        k_weight: [E].
        cos: float32 [S, E / 2], not differentiated.
        sin: the same.
        eps: added to the mean square.

    Returns:
        q and k, [B, S, A, E], contiguous, in the dtype of q.
    """
    if dispatch.enabled("qk_norm_rope", q) and q.shape == k.shape and q.shape[-1] % 2 == 0:
        return _forward(q, k, q_weight, k_weight, cos, sin, eps)
    return reference.qk_norm_rope(q, k, q_weight, k_weight, cos, sin, eps)


def _tile(q: Tensor) -> tuple[int, int, int]:
    """Return the rows [E] of a sample, the rows of a tile, and the channel pairs of a tile."""
    pairs = launch.power_of_two(q.shape[-1] // 2)
    return q.shape[1] * q.shape[2], max(_TILE // (2 * pairs), 1), pairs


@torch.library.custom_op("hunyuan_kernels::qk_norm_rope", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    from hunyuan_kernels.ops.qk_norm_rope.kernel import qk_norm_rope_fwd_kernel

    q, k = launch.rows_first(q), launch.rows_first(k)
    batch, _, heads, width = q.shape
    q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    k_out = torch.empty_like(q_out)
    rows, tile, pairs = _tile(q)
    launch.on_grid(qk_norm_rope_fwd_kernel, -(-rows // tile), batch)(
        q, k, q_weight, k_weight, cos.contiguous(), sin.contiguous(), q_out, k_out,
        rows, width, eps, *q.stride()[:3], *k.stride()[:3], width // 2,
        HEADS=heads, ROWS=tile, PAIRS=pairs, num_warps=launch.warps(2 * tile * pairs),
    )  # fmt: skip
    return q_out, k_out


@_forward.register_fake
def _(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    return out, torch.empty_like(out)


@torch.library.custom_op("hunyuan_kernels::qk_norm_rope_backward", mutates_args=())
def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    from hunyuan_kernels.ops.qk_norm_rope.kernel import qk_norm_rope_bwd_kernel

    grad, x = launch.rows_first(grad), launch.rows_first(x)
    batch, _, heads, width = x.shape
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows, tile, pairs = _tile(x)
    programs, tiles_each = launch.reduction(-(-rows // tile))
    dweight = launch.partials(batch * programs, width, like=x)
    launch.on_grid(qk_norm_rope_bwd_kernel, programs, batch)(
        x, grad, weight, cos.contiguous(), sin.contiguous(), dx, dweight,
        rows, width, eps, tiles_each, *x.stride()[:3], *grad.stride()[:3],
        width // 2, HEADS=heads, ROWS=tile, PAIRS=pairs, num_warps=launch.warps(2 * tile * pairs),
    )  # fmt: skip
    return dx, dweight.sum(dim=0).to(weight.dtype)


@_backward.register_fake
def _(
    grad: Tensor, x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.empty_like(weight)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
    q, k, q_weight, k_weight, cos, sin = ctx.saved_tensors
    dq, dq_weight = _backward(dq, q, q_weight, cos, sin, ctx.eps)
    dk, dk_weight = _backward(dk, k, k_weight, cos, sin, ctx.eps)
    return dq, dk, dq_weight, dk_weight, None, None, None


_forward.register_autograd(_gradients, setup_context=_setup)
