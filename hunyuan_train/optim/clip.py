"""Gradient clipping over the global norm, whatever the parameters are sharded over."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from hunyuan_train.runtime.dist import ranks_in_world, sum_over_ranks


def local_part(tensor: Tensor) -> Tensor:
    """Return what this rank stores of a DTensor; a plain tensor is returned as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]


def _shards(grad: Tensor) -> int:
    """Return the number of different parts a DTensor is divided into, 1 for a plain tensor."""
    shards = 1
    for dim, placement in enumerate(getattr(grad, "placements", ())):
        assert not placement.is_partial(), "gradients must be summed before they are clipped"
        if placement.is_shard():
            shards *= grad.device_mesh.size(dim)  # pyright: ignore[reportAttributeAccessIssue]
    return shards


@torch.no_grad()
def clip_grad_norm(
    params: Iterable[Tensor], max_norm: float, cuts: Sequence[int] | None = None
) -> Tensor:
    """Scale the gradients in place to a global norm of at most ``max_norm``.

    Each rank adds up the squares of its parts, each over the number of ranks that hold a copy of
    it, and one reduction of a scalar over all ranks gives the norm. Every rank must call it; there
    is no host sync.

    Args:
        params: Parameters, plain or DTensor; those without a gradient are left out.
        max_norm: Largest norm; 0 measures only.
        cuts: Into how many different plain tensors the ranks divide each parameter (tensor
            parallelism), besides what its DTensor says; 1 for all by default.

    Returns:
        The 2-norm over all shards of all ranks, a scalar on the device, at least float32, equal on
        every rank. It is NaN or infinite if any gradient is; the gradients are then not usable and
        the update has to be skipped.
    """
    given = list(params)
    parts = [
        (param.grad, cut)
        for param, cut in zip(given, cuts or [1] * len(given), strict=True)
        if param.grad is not None
    ]
    if not parts:
        return torch.zeros(())
    grads = [local_part(grad) for grad, _ in parts]
    shards = [_shards(grad) * cut for grad, cut in parts]
    norms = torch.stack(torch._foreach_norm(grads, 2))
    norms = norms.to(torch.promote_types(norms.dtype, torch.float32))
    if max(shards) > 1:
        copies = torch.tensor([ranks_in_world() / n for n in shards], dtype=norms.dtype)
        squares = norms.square() / copies.to(norms.device, non_blocking=True)
        total = sum_over_ranks(squares.sum()).sqrt()
    else:
        total = norms.square().sum().sqrt()
    if max_norm > 0:
        factor = torch.clamp(max_norm / (total + 1e-6), max=1.0)
        torch._foreach_mul_(grads, factor.to(grads[0].dtype))
    return total
