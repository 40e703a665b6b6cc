"""Differentiable collectives of tensor and sequence parallelism, one autograd function each.

Tokens are [B, S, D] and sharded on dim 1. Every function says what its backward assumes of the
gradient it gets: *whole* (equal on all ranks) or *partial* (their sum is meant).
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

# The names since torch 2.13; 2.11 has only the old ones.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def gather_rows(x: Tensor, group: ProcessGroup) -> Tensor:
    """Return [B, size * s, D] from every rank's [B, s, D], in rank order."""
    return merge_rows(_gathered(x.contiguous(), group)[0])


def reduce_scatter_rows(x: Tensor, group: ProcessGroup) -> Tensor:
    """Return this rank's [B, s, D] of the sum over ranks of [B, size * s, D]."""
    out, work, _ = start_reduce_scatter_rows(x, group)
    work.wait()
    return out


def merge_rows(stacked: Tensor) -> Tensor:
    """Turn [size, B, s, ...] into [B, size * s, ...]; a view when B is 1."""
    return stacked.transpose(0, 1).flatten(1, 2)


def start_gather_rows(x: Tensor, group: ProcessGroup) -> tuple[Tensor, Any, Tensor]:
    """Start ``gather_rows``; after ``work.wait()`` call ``merge_rows`` on the first result.

    The last result must be kept until then: it is what is being sent.
    """
    x = x.contiguous()
    stacked, work = _gathered(x, group, async_op=True)
    return stacked, work, x


def start_reduce_scatter_rows(x: Tensor, group: ProcessGroup) -> tuple[Tensor, Any, Tensor]:
    """Start ``reduce_scatter_rows``; the last result must be kept until ``work.wait()``."""
    size = group.size()
    parts = x.unflatten(1, (size, -1)).transpose(0, 1).contiguous()  # [size, B, s, D]
    out = torch.empty_like(parts[0])
    work = _reduce_scatter(out, parts.flatten(0, 1), group=group, async_op=True)
    return out, work, parts


def _gathered(x: Tensor, group: ProcessGroup, async_op: bool = False) -> tuple[Tensor, Any]:
    stacked = x.new_empty((group.size(), *x.shape))
    work = _all_gather(stacked.flatten(0, 1), x, group=group, async_op=async_op)
    return stacked, work


class _SumToWhole(torch.autograd.Function):
    """All-reduce; the gradient is whole and passes unchanged."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        total = x.contiguous().clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad, None


class _SumToRows(torch.autograd.Function):
    """Reduce-scatter over rows; the gradients of the shards are gathered."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return reduce_scatter_rows(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return gather_rows(grad, ctx.group), None


class _GatherFeatures(torch.autograd.Function):
    """Concatenate the last dim; the gradient is whole (cut) or partial (summed, then cut)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup, partial: bool) -> Tensor:
        ctx.group, ctx.partial = group, partial
        stacked, _ = _gathered(x.contiguous(), group)
        return stacked.movedim(0, -2).flatten(-2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        parts = grad.unflatten(-1, (ctx.group.size(), -1)).movedim(-2, 0)
        if not ctx.partial:
            return parts[ctx.group.rank()].contiguous(), None, None
        parts = parts.contiguous()
        out = torch.empty_like(parts[0])
        _reduce_scatter(out, parts.flatten(0, 1), group=ctx.group)
        return out, None, None


class _GatherRowsOfWhole(torch.autograd.Function):
    """Gather rows for a result that every rank computes alike; the gradient is whole, and cut."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return gather_rows(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad.unflatten(1, (ctx.group.size(), -1))[:, ctx.group.rank()].contiguous(), None


class _GatherRuns(torch.autograd.Function):
    """Gather runs of different lengths; the gradient is whole (cut) or partial (summed)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dim: int, lengths: tuple[int, ...], group: ProcessGroup, partial: bool
    ) -> Tensor:
        ctx.dim, ctx.lengths, ctx.group, ctx.partial = dim, lengths, group, partial
        runs = x.movedim(dim, 0)
        padded = x.new_zeros((max(lengths), *runs.shape[1:]))
        padded[: len(runs)] = runs
        stacked, _ = _gathered(padded, group)
        whole = torch.cat([run[:length] for run, length in zip(stacked, lengths, strict=True)])
        return whole.movedim(0, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        lengths, rank = list(ctx.lengths), ctx.group.rank()
        if not ctx.partial:
            own = grad.split(lengths, ctx.dim)[rank].contiguous()
            return own, None, None, None, None
        parts = grad.movedim(ctx.dim, 0).contiguous()
        arriving = [lengths[rank]] * len(lengths)
        received = parts.new_empty((sum(arriving), *parts.shape[1:]))
        dist.all_to_all_single(received, parts, arriving, lengths, group=ctx.group)
        # Added in rank order, not by a reduction, so that the same layout repeats the same bits.
        own = received.unflatten(0, (len(lengths), -1)).sum(dim=0)
        return own.movedim(0, ctx.dim), None, None, None, None


def sum_to_whole(x: Tensor, group: ProcessGroup) -> Tensor:
    """Add up over ranks; every rank gets the sum. Takes a whole gradient."""
    return _SumToWhole.apply(x, group)  # pyright: ignore[reportReturnType]


def sum_to_rows(x: Tensor, group: ProcessGroup) -> Tensor:
    """Add up [B, S, D] over ranks; each rank gets its rows. Takes the gradient of those rows."""
    return _SumToRows.apply(x, group)  # pyright: ignore[reportReturnType]


def gather_features(x: Tensor, group: ProcessGroup, partial: bool) -> Tensor:
    """Concatenate the last dim over ranks; ``partial`` says that gradients have to be added up."""
    return _GatherFeatures.apply(x, group, partial)  # pyright: ignore[reportReturnType]


def gather_rows_of_whole(x: Tensor, group: ProcessGroup) -> Tensor:
    """Concatenate rows over ranks. Takes a whole gradient and returns that of the own rows."""
    return _GatherRowsOfWhole.apply(x, group)  # pyright: ignore[reportReturnType]


def gather_runs(
    x: Tensor, dim: int, lengths: tuple[int, ...], group: ProcessGroup, partial: bool
) -> Tensor:
    """Concatenate runs of ``lengths`` along ``dim`` over ranks, in rank order.

    ``partial`` says that gradients have to be added up; else they are whole, and cut.
    """
    return _GatherRuns.apply(x, dim, lengths, group, partial)  # pyright: ignore[reportReturnType]
