"""Gradient clipping over the global norm, for plain, sharded and mixed parameters."""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor


def _layout(grad: Tensor) -> object:
    """Return a key that is equal for gradients a single foreach operation may take together."""
    mesh = getattr(grad, "device_mesh", None)
    return (mesh, tuple(grad.placements)) if mesh is not None else (grad.device, None)  # pyright: ignore[reportAttributeAccessIssue]


@torch.no_grad()
def clip_grad_norm(params: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale the gradients in place to a global norm of at most ``max_norm``.

    Gradients are grouped by mesh and placements, because torch takes one mesh per call and fails on
    a mix of plain and DTensor gradients. Every rank must call it; there is no host sync.

    Args:
        params: Parameters; those without a gradient are left out.
        max_norm: Largest norm; 0 measures only.

    Returns:
        The 2-norm over all shards of all ranks, a float32 scalar on the device, equal on every
        rank. It is NaN or infinite if any gradient is; the gradients are then not usable and the
        update has to be skipped.
    """
    groups: dict[object, list[Tensor]] = defaultdict(list)
    for param in params:
        if param.grad is not None:
            groups[_layout(param.grad)].append(param)
    squares: list[Tensor] = []
    for members in groups.values():
        norm = torch.nn.utils.get_total_norm([p.grad for p in members if p.grad is not None])
        # torch may return the norm of shards as a pending reduction; full_tensor() completes it.
        full = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
        squares.append(full.float().square())
    if not squares:
        return torch.zeros(())
    total = torch.stack(squares).sum().sqrt()
    if max_norm > 0:
        for members in groups.values():
            torch.nn.utils.clip_grads_with_norm_(members, max_norm, total)
    return total
