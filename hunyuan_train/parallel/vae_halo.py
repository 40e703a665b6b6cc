"""Padding of a convolution whose neighbouring positions are on other ranks.

| pass | sends |
|---|---|
| forward | to the next rank its last frames, or to both neighbours its outermost row |
| backward | the gradients of what was received, to where it came from |
"""

from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from hunyuan_train.parallel.vae_parts import Border

# Gloo matches messages by tag; NCCL by order, which is the same on every rank.
_TAG = 3


class Halo(NamedTuple):
    """How one convolution's input is padded on this rank."""

    dim: int
    """The divided dimension of [B, C, T, H, W]."""
    border: Border
    copies: tuple[tuple[int, int], ...]
    """Per dimension from 2 on: copies of the edge in front and behind."""
    group: dist.ProcessGroup


def pad_with_neighbours(x: Tensor, halo: Halo) -> Tensor:
    """Return ``x`` with what other ranks have around it, and copies of the clip's edges.

    Every rank of the group must call this in the same order.

    Args:
        x: this rank's run, [B, C, T, H, W].
        halo: what surrounds it.

    Returns:
        The padded run in the memory format of ``x``. The gradient is that of this rank's use of it;
        the other ranks' gradients are added.
    """
    return cast(Tensor, _Padded.apply(x, halo))


class _Padded(torch.autograd.Function):
    """Keeps nothing for the backward, so that only the convolution's input stays alive."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, halo: Halo) -> Tensor:
        ctx.halo = halo
        border = halo.border
        sent = [(rank, _run(x, halo.dim, first, end)) for rank, first, end in border.lent]
        places = [(rank, first, end - first) for rank, first, end in border.fetched]
        empty = [(rank, _run(x, halo.dim, 0, 1, length)) for rank, _, length in places]
        transfer = _Transfer(sent, empty, halo.group)
        out = _enlarged(x, halo)
        inner = _without_copies(out, halo)
        front = border.before - halo.copies[halo.dim - 2][0]
        inner.narrow(halo.dim, front, x.shape[halo.dim]).copy_(x)
        for (_, first, length), piece in zip(places, transfer.wait(), strict=True):
            inner.narrow(halo.dim, front + first, length).copy_(piece)
        for dim, copies in enumerate(halo.copies, start=2):
            _repeat_edges(out, dim, *copies)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        halo: Halo = ctx.halo
        grad = _fold_copies(grad_outputs[0], halo)
        border, front = halo.border, halo.border.before - halo.copies[halo.dim - 2][0]
        behind = border.after - halo.copies[halo.dim - 2][1]
        own = grad.narrow(halo.dim, front, grad.shape[halo.dim] - front - behind)
        sent = [(r, _run(grad, halo.dim, front + a, front + b)) for r, a, b in border.fetched]
        empty = [(r, _run(own, halo.dim, 0, 1, b - a)) for r, a, b in border.lent]
        transfer = _Transfer(sent, empty, halo.group)
        for (_, first, end), piece in zip(border.lent, transfer.wait(), strict=True):
            own.narrow(halo.dim, first, end - first).add_(piece)
        return own, None


class _Transfer:
    """Runs of positions on their way between ranks."""

    def __init__(
        self,
        sent: list[tuple[int, Tensor]],
        arriving: list[tuple[int, Tensor]],
        group: dist.ProcessGroup,
    ) -> None:
        self._sent, self._arriving = sent, arriving  # must live until the transfer is done
        operations = [
            dist.P2POp(kind, buffer, group=group, group_peer=rank, tag=_TAG)
            for kind, runs in ((dist.isend, sent), (dist.irecv, arriving))
            for rank, buffer in runs
        ]
        self._works = dist.batch_isend_irecv(operations) if operations else []

    def wait(self) -> list[Tensor]:
        """Return what has arrived once it is here and ours has left."""
        for work in self._works:
            work.wait()
        return [buffer for _, buffer in self._arriving]


def _run(x: Tensor, dim: int, first: int, end: int, length: int | None = None) -> Tensor:
    """Return a contiguous copy of a run along ``dim``, or an empty one of another length."""
    if length is None:
        return x.narrow(dim, first, end - first).contiguous()
    return x.new_empty((*x.shape[:dim], length, *x.shape[dim + 1 :]))


def _enlarged(x: Tensor, halo: Halo) -> Tensor:
    shape = list(x.shape)
    for dim, copies in enumerate(halo.copies, start=2):
        around = sum(copies)
        if dim == halo.dim:
            around = halo.border.before + halo.border.after
        shape[dim] += around
    channels_last = x.is_contiguous(memory_format=torch.channels_last_3d) and not x.is_contiguous()
    layout = torch.channels_last_3d if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)


def _without_copies(padded: Tensor, halo: Halo) -> Tensor:
    for dim, (front, back) in enumerate(halo.copies, start=2):
        padded = padded.narrow(dim, front, padded.shape[dim] - front - back)
    return padded


def _repeat_edges(padded: Tensor, dim: int, front: int, back: int) -> None:
    size = padded.shape[dim]
    if front:
        padded.narrow(dim, 0, front).copy_(padded.narrow(dim, front, 1))
    if back:
        padded.narrow(dim, size - back, back).copy_(padded.narrow(dim, size - back - 1, 1))


def _fold_copies(grad: Tensor, halo: Halo) -> Tensor:
    """Return a new gradient without copies, those of the copies added to what was copied."""
    whole = grad
    for dim, (front, back) in reversed(list(enumerate(halo.copies, start=2))):
        size = grad.shape[dim]
        inner = grad.narrow(dim, front, size - front - back)
        if grad is whole:
            inner = inner.clone()
        for start, length, edge in ((0, front, 0), (size - back, back, -1)):
            if length:
                copies = grad.narrow(dim, start, length).sum(dim, keepdim=True)
                inner.narrow(dim, edge % inner.shape[dim], 1).add_(copies)
        grad = inner
    return grad
