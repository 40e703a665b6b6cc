"""Group norm over a clip of which every rank has a run.

Each rank centres its run on its own mean, and the few numbers of all ranks are combined in float64
in rank order. So nothing is lost to cancellation, and every rank gets the same bits every time.
"""

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hunyuan_train.parallel.collectives import gather_rows

SPACE = (2, 3, 4)


def split_group_norm(
    x: Tensor, norm: nn.GroupNorm, shares: tuple[int, ...], group: dist.ProcessGroup
) -> Tensor:
    """Return the norm of this rank's run with averages over the runs of all ranks.

    Every rank of the group must call this in the same order.

    Args:
        x: [B, C, T, H, W], differs between ranks in one of T and H only.
        norm: groups, epsilon, weight and bias; its gradients are those of this rank's run.
        shares: length of each rank's run along the divided dimension.
        group: the ranks.

    Returns:
        Same shape and dtype as ``x``. Computes in float32, or in float64 for such input.
    """
    own = x[0].numel() // norm.num_groups
    counts = (own, own // shares[group.rank()] * sum(shares))
    return cast(Tensor, _SplitNorm.apply(x, norm.weight, norm.bias, norm, counts, group))


class _SplitNorm(torch.autograd.Function):
    """Keeps the input and two numbers per group, as the norm of one device does."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        norm: nn.GroupNorm,
        counts: tuple[int, int],
        group: dist.ProcessGroup,
    ) -> Tensor:
        centred = _computed(x)
        own_mean = centred.mean(dim=SPACE).unflatten(1, (norm.num_groups, -1)).mean(dim=2)
        centred = centred - _spread(own_mean, x)
        squares = centred.square().sum(dim=SPACE)
        squares = squares.unflatten(1, (norm.num_groups, -1)).sum(dim=2)
        mean, variance = _combined(own_mean, squares, counts, group)
        rstd = torch.rsqrt(variance + norm.eps)
        # What the own mean misses is added together with the bias.
        scale = _per_channel(rstd, x) * weight
        shift = bias - scale * _per_channel(mean - own_mean, x)
        ctx.save_for_backward(x, weight, mean.to(centred.dtype), rstd.to(centred.dtype))
        ctx.total, ctx.group = counts[1], group
        scale, shift = (_whole_space(each.to(centred.dtype)) for each in (scale, shift))
        return centred.mul_(scale).add_(shift).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, mean, rstd = ctx.saved_tensors
        grad = _computed(grad_outputs[0])
        normed = _computed(x) - _whole_space(_per_channel(mean, x))
        normed.mul_(_whole_space(_per_channel(rstd, x)))
        grad_bias = grad.sum(dim=SPACE)  # [B, C]
        grad_weight = (grad * normed).sum(dim=SPACE)
        sums = torch.stack([grad_bias * weight, grad_weight * weight], dim=2).double()
        sums = sums.unflatten(1, (rstd.shape[1], -1)).sum(dim=2)  # [B, G, 2]
        averages = _by_rank(sums, ctx.group).sum(dim=0) / ctx.total
        shift, slope = (-averages * rstd.unsqueeze(2)).to(normed.dtype).unbind(2)
        normed.mul_(_whole_space(_per_channel(slope, x)))
        normed.add_(_whole_space(_per_channel(shift, x)))
        normed.addcmul_(grad, _whole_space(_per_channel(rstd, x) * weight))
        dtype = weight.dtype
        by_channel = (grad_weight.sum(dim=0).to(dtype), grad_bias.sum(dim=0).to(dtype))
        return normed.to(x.dtype), *by_channel, None, None, None


def _combined(
    own_mean: Tensor, squares: Tensor, counts: tuple[int, int], group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Return mean and variance [B, G] of the clip from each run's mean and squared deviations.

    Args:
        own_mean: [B, G] of this rank's run.
        squares: [B, G], its sum of squared deviations from that mean.
        counts: values of a group in this run and in the clip.
        group: the ranks.
    """
    own_count, total = counts
    own = torch.stack([own_mean, squares], dim=2).double()
    # Sent along although known: making a tensor of it on a GPU would wait for all work before.
    own = torch.cat([own, torch.full_like(own[..., :1], own_count)], dim=2)
    means, deviations, weights = _by_rank(own, group).unbind(3)  # [R, B, G]
    mean = (means * weights).sum(dim=0) / total
    between = weights * (means - mean).square()
    return mean, (deviations + between).sum(dim=0) / total


def _by_rank(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return [R, ...] from every rank's ``values``, whose sum in this order repeats exactly."""
    rows = gather_rows(values.reshape(1, 1, -1), group)
    return rows.view(group.size(), *values.shape)


def _computed(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _per_channel(by_group: Tensor, x: Tensor) -> Tensor:
    """Return [B, C] from [B, G]."""
    return by_group.repeat_interleave(x.shape[1] // by_group.shape[1], dim=1)


def _whole_space(by_channel: Tensor) -> Tensor:
    return by_channel[:, :, None, None, None]


def _spread(by_group: Tensor, x: Tensor) -> Tensor:
    return _whole_space(_per_channel(by_group, x))
