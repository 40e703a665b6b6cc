"""Attention over further keys merged into a running output, in place, as one op."""

import torch
from torch import Tensor

from hunyuan_kernels import dispatch, launch
from hunyuan_kernels.ops.lse_merge import reference

_TILE = 2048


def lse_merge(out: Tensor, lse: Tensor, block: Tensor, block_lse: Tensor) -> Tensor:
    """Merge the attention over further keys into ``out``, in place; not differentiable.

    With L = log(exp(lse) + exp(block_lse)), ``out`` becomes
    ``out * exp(lse - L) + block * exp(block_lse - L)``; zero where both are -inf.

    Args:
        out: running output [B, S, A, E], changed in place.
        lse: running log-sum-exp [B, A, S], any strides; -inf where no key has been seen.
        block: output over the further keys, any float dtype and strides.
        block_lse: their log-sum-exp.

    Returns:
        L, [B, A, S].
    """
    if dispatch.enabled("lse_merge", out) and out.stride(-1) == 1 and lse.dtype == torch.float32:
        return _merge(out, lse, block, block_lse)
    return reference.lse_merge(out, lse, block, block_lse)


@torch.library.custom_op("hunyuan_kernels::lse_merge", mutates_args={"out"})
def _merge(out: Tensor, lse: Tensor, block: Tensor, block_lse: Tensor) -> Tensor:
    from hunyuan_kernels.ops.lse_merge.kernel import lse_merge_kernel

    block = launch.rows_first(block)
    merged = torch.empty_like(lse)
    batch, tokens, heads, width = out.shape
    cols, rows = launch.power_of_two(width), tokens * heads
    tile = max(_TILE // cols, 1)
    launch.on_grid(lse_merge_kernel, -(-rows // tile), batch)(
        out, lse, block, block_lse, merged, rows, width,
        *out.stride()[:3], *block.stride()[:3], *lse.stride(), *block_lse.stride(),
        *merged.stride(), HEADS=heads, ROWS=tile, COLS=cols, num_warps=launch.warps(tile * cols),
    )  # fmt: skip
    return merged


@_merge.register_fake
def _(out: Tensor, lse: Tensor, block: Tensor, block_lse: Tensor) -> Tensor:
    return torch.empty_like(lse)
