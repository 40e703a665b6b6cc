"""Ring attention: every rank keeps its queries while keys and values travel round the group.

Hop ``h`` shows rank ``r`` the chunk of rank ``(r - h) mod R``. The transfer of the next chunk is
issued before the compute of this one, so it hides behind it when a chunk is long enough. Every
key is visible to every query, so all hops cost the same and no reordering (zig-zag) is needed.

| pass | travels, elements per hop and rank | hops |
|---|---|---|
| forward | k, v: 2*B*s*A*E in their dtype | R - 1 |
| backward | k, v again, and dk, dv: 2*B*s*A*E in float32 | R - 1 each |

In the backward a chunk's gradients follow it one hop behind: the rank that held it adds its share
and passes them on while it computes the next hop. They start at the first rank that is not the
chunk's owner, who adds its own share when they come home; that saves one of R transfers.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from hunyuan_kernels import lse_merge
from hunyuan_train.models.kept import kept
from hunyuan_train.models.shapes import Heads
from hunyuan_train.parallel.local_attention import attend, attend_backward

# Gloo matches messages by tag; NCCL by order, which is the same on every rank.
_KEYS_TAG = 1
_GRADS_TAG = 2


@dataclass(frozen=True, slots=True)
class ChunkMasks:
    """Which keys of every rank's chunk exist; the same object on every rank of the ring.

    Chunks have the same number of rows. After Ulysses a chunk is the rows of its Ulysses ranks in
    rank order.
    """

    keep: tuple[Tensor | None, ...]
    """Per ring rank: int64 indices [S'] of the rows that are not padding in every sample, without
    repetition; None keeps all rows. May be empty."""
    masks: tuple[Tensor | None, ...]
    """Per ring rank: bool [B, S'] over the kept rows, True for keys that exist; None when all do.
    A sample may have no key in a chunk."""


class _Chunk(NamedTuple):
    """The keys of one hop, padding dropped."""

    k: Tensor  # [B, S', A, E]
    v: Tensor
    mask: Tensor | None  # [B, S']
    keep: Tensor | None  # [S']


class _Transfer:
    """A buffer on its way to the next rank while another arrives from the previous one."""

    def __init__(self, sent: Tensor, ring: "_Ring", tag: int) -> None:
        self._sent = sent  # must live until the send is done
        self._arriving = torch.empty_like(sent)
        following, previous = (ring.rank + 1) % ring.size, (ring.rank - 1) % ring.size
        group = ring.group
        # Both at once: a ring in which everybody sends before receiving would wait for ever.
        self._works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, sent, group=group, group_peer=following, tag=tag),
                dist.P2POp(dist.irecv, self._arriving, group=group, group_peer=previous, tag=tag),
            ]
        )

    def wait(self) -> Tensor:
        """Return the buffer of the previous rank once it is here and ours has left."""
        for work in self._works:
            work.wait()
        return self._arriving


@dataclass(frozen=True, slots=True)
class _Ring:
    """This rank's place in the ring; a group of None is a ring of one."""

    group: dist.ProcessGroup | None
    rank: int
    size: int

    @classmethod
    def of(cls, group: dist.ProcessGroup | None) -> "_Ring":
        return cls(None, 0, 1) if group is None else cls(group, group.rank(), group.size())

    def shift(self, buffer: Tensor, tag: int) -> _Transfer:
        """Start sending ``buffer`` to the next rank; it must not be written until waited for."""
        return _Transfer(buffer, self, tag)


def ring_attention(
    q: Heads, k: Heads, v: Heads, masks: ChunkMasks | None, group: dist.ProcessGroup | None
) -> Heads:
    """Attend with this rank's queries to the keys of every rank of ``group``.

    Partial results are merged in float32 (float64 for float64 inputs). The backward keeps q, k, v,
    the output and the log-sum-exp, and sends the keys round again. A group of one, or None, does
    not communicate. Every rank must call this in the same order.

    Args:
        q: this rank's queries [B, s, A, E].
        k: this rank's keys, same shape on every rank.
        v: this rank's values.
        masks: which keys exist, for all ranks; None when all do.
        group: the ring, in rank order.

    Returns:
        [B, s, A, E]. A sample without any key gets zeros.
    """
    ring = _Ring.of(group)
    if masks is not None:
        sizes = (len(masks.keep), len(masks.masks))
        assert sizes == (ring.size, ring.size), f"{sizes} masks for a ring of {ring.size}"
    return cast(Tensor, _apply(q, k, v, masks, ring))


# Transfers cannot be traced, so a compiled block breaks here.
@torch.compiler.disable()
def _apply(q: Tensor, k: Tensor, v: Tensor, masks: ChunkMasks | None, ring: _Ring) -> Any:
    return _RingAttention.apply(q, k, v, masks, ring)


def _keys_of_hop(arrived: tuple[Tensor, Tensor], masks: ChunkMasks | None, chunk: int) -> _Chunk:
    """Return the keys to attend to in the hop in which the chunk of rank ``chunk`` is here."""
    k, v = arrived
    keep = None if masks is None else masks.keep[chunk]
    mask = None if masks is None else masks.masks[chunk]
    if keep is not None:
        k, v = k.index_select(1, keep), v.index_select(1, keep)
    return _Chunk(k, v, mask, keep)


def _hops(ring: _Ring, k: Tensor, v: Tensor, masks: ChunkMasks | None) -> Iterator[_Chunk]:
    """Yield every chunk of the ring, own first; the next one is on its way meanwhile."""
    arrived = (k, v)
    travelling = torch.stack(arrived) if ring.size > 1 else None  # one contiguous buffer
    for hop in range(ring.size):
        last = hop + 1 == ring.size
        transfer = None if last or travelling is None else ring.shift(travelling, _KEYS_TAG)
        yield _keys_of_hop(arrived, masks, (ring.rank - hop) % ring.size)
        if transfer is not None:
            travelling = transfer.wait()
            arrived = (travelling[0], travelling[1])


def _forward(
    ring: _Ring, q: Tensor, k: Tensor, v: Tensor, masks: ChunkMasks | None
) -> tuple[Tensor, Tensor]:
    """Return the output [B, s, A, E] in the dtype of ``q`` and the log-sum-exp [B, A, s]."""
    out = lse = None
    for chunk in _hops(ring, k, v, masks):
        block, block_lse = attend(q, chunk.k, chunk.v, chunk.mask)
        if out is None or lse is None:
            # A ring of one merges nothing and needs no copy.
            out = block.to(block_lse.dtype) if ring.size > 1 else block
            lse = block_lse
        else:
            lse = lse_merge(out, lse, block, block_lse)
    assert out is not None, "a ring has at least one hop"
    assert lse is not None
    return out.to(q.dtype), lse


def _add_rows(total: Tensor, dk: Tensor, dv: Tensor, keep: Tensor | None) -> None:
    """Add gradients of the kept rows [B, S', A, E] to ``total`` [2, B, s, A, E]."""
    for rows, grad in zip(total, (dk, dv), strict=True):
        if keep is None:
            rows.add_(grad)
        else:
            rows.index_add_(1, keep, grad.to(rows.dtype))


def _backward(
    ring: _Ring, grad_out: Tensor, saved: tuple[Tensor, ...], masks: ChunkMasks | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk and dv of this rank's rows."""
    q, k, v, out, lse = saved

    def share(chunk: _Chunk) -> tuple[Tensor, Tensor, Tensor]:
        return attend_backward(grad_out, q, chunk.k, chunk.v, chunk.mask, out, lse)

    hops = _hops(ring, k, v, masks)
    first = next(hops)
    dq, own_dk, own_dv = share(first)
    if ring.size == 1 and first.keep is None:
        return dq, own_dk, own_dv
    dq = dq.to(lse.dtype)
    total = torch.zeros((2, *k.shape), dtype=lse.dtype, device=k.device)
    homeward = None
    for chunk in hops:
        part, dk, dv = share(chunk)
        dq.add_(part)
        if homeward is not None:
            total = homeward.wait()  # this chunk's gradients, from the rank it came from
        _add_rows(total, dk, dv, chunk.keep)
        homeward = ring.shift(total, _GRADS_TAG)
    if homeward is not None:
        total = homeward.wait()  # home
    _add_rows(total, own_dk, own_dv, first.keep)
    return dq.to(q.dtype), total[0].to(k.dtype), total[1].to(v.dtype)


class _RingAttention(torch.autograd.Function):
    """Forward and backward as two walks round the ring."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, masks: ChunkMasks | None, ring: _Ring
    ) -> Tensor:
        out, lse = kept(lambda: _forward(ring, q, k, v, masks))
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.masks, ctx.ring = masks, ring
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        grads = _backward(ctx.ring, grad_outputs[0], ctx.saved_tensors, ctx.masks)
        return *grads, None, None
