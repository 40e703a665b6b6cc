"""Ulysses: trade a shard of the sequence for a shard of the heads, and back.

For U ranks, before attention each rank gives every other rank one group of heads of its rows and
receives its own group of heads of everybody's rows. Together with the ring this is the attention
core of context parallelism: Ulysses inside (cheap within a node), the ring outside.
"""

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hunyuan_train.models.shapes import Heads, JointTokens
from hunyuan_train.parallel.ring import ChunkMasks, ring_attention


class _AllToAll(torch.autograd.Function):
    """Block ``i`` of dim 0 goes to rank ``i``; what arrives from rank ``j`` becomes block ``j``.

    As a matrix this is symmetric, so it is its own backward.
    """

    @staticmethod
    def forward(ctx: Any, blocks: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        received = torch.empty_like(blocks)
        dist.all_to_all_single(received, blocks, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        return _all_to_all(grad_outputs[0], ctx.group), None


def _all_to_all(blocks: Tensor, group: dist.ProcessGroup) -> Tensor:
    return cast(Tensor, _AllToAll.apply(blocks.contiguous(), group))


def gather_sequence(
    q: Heads, k: Heads, v: Heads, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """Exchange [B, s, A, E] of all heads for [B, U*s, A/U, E] of all rows, in one all-to-all.

    Args:
        q: this rank's queries [B, s, A, E].
        k: keys, same shape.
        v: values, same shape.
        group: the U ranks; rank ``u`` gets heads ``u*A/U`` to ``(u+1)*A/U``.

    Returns:
        q, k and v with the rows of all ranks in rank order.

    Raises:
        ValueError: if U does not divide the heads; lists the sizes that do.
    """
    size, (batch, rows, heads, width) = group.size(), q.shape
    if heads % size:
        legal = " ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        raise ValueError(
            f"a Ulysses group of {size} does not divide {heads} local heads; choose from {legal}"
        )
    blocks = torch.stack((q, k, v)).view(3, batch, rows, size, heads // size, width)
    blocks = _all_to_all(blocks.permute(3, 0, 1, 2, 4, 5), group)  # [U, 3, B, s, A/U, E]
    whole = blocks.permute(1, 2, 0, 3, 4, 5).flatten(2, 3)  # [3, B, U*s, A/U, E]
    return whole[0], whole[1], whole[2]


def gather_heads(out: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Exchange [B, U*s, A/U, E] for [B, s, A, E]: the inverse of ``gather_sequence``."""
    blocks = out.unflatten(1, (group.size(), -1))  # [B, U, s, A/U, E]
    blocks = _all_to_all(blocks.transpose(0, 1), group)  # [U, B, s, A/U, E], U counts head groups
    return blocks.permute(1, 2, 0, 3, 4).flatten(2, 3)


class ContextCore(nn.Module):
    """Attention over a sequence that is sharded over ``ring`` x ``ulysses``, Ulysses innermost.

    Replaces ``models.attention.SdpaCore``; with neither group it attends on this device.
    """

    def __init__(self, ring: dist.ProcessGroup | None, ulysses: dist.ProcessGroup | None) -> None:
        super().__init__()
        self.ring = ring
        self.ulysses = ulysses if ulysses is not None and ulysses.size() > 1 else None

    def forward(
        self, q: Heads, k: Heads, v: Heads, key_mask: ChunkMasks | Tensor | None
    ) -> JointTokens:
        """Attend to the keys of all ranks.

        Args:
            q: this rank's rows [B, s, A, E]; A counts the heads local to tensor parallelism.
            k: keys, same shape.
            v: values, same shape.
            key_mask: which keys exist, per ring rank, or [B, s] on a rank that has all of them;
                None when all do.

        Returns:
            [B, s, A*E], heads merged head-major as by ``models.attention.attention``.

        Raises:
            ValueError: if the Ulysses group does not divide the heads.
        """
        if isinstance(key_mask, Tensor):
            key_mask = ChunkMasks((None,), (key_mask,))
        if self.ulysses is None:
            return ring_attention(q, k, v, key_mask, self.ring).flatten(2)
        q, k, v = gather_sequence(q, k, v, self.ulysses)
        out = ring_attention(q, k, v, key_mask, self.ring)
        return gather_heads(out, self.ulysses).flatten(2)
