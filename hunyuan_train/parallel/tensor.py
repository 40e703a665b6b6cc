"""Tensor and sequence parallelism: linears that hold their share of a weight.

The shards are plain local parameters; ``Slices`` says which part of the whole each one is, so fused
weights are cut by head and by hidden unit and still convert back to the released layout. Sharding
with ``fully_shard`` or DeepSpeed comes on top.

Source: Megatron-LM (arXiv 1909.08053) for the column-row pair, Korthikanti et al. (arXiv
2205.05198) for sequence parallelism.
"""

from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional

from hunyuan_train.models.spec import Cut, LinearCut, ShardingPlan
from hunyuan_train.parallel.collectives import (
    gather_features,
    gather_rows,
    merge_rows,
    start_gather_rows,
    start_reduce_scatter_rows,
    sum_to_rows,
    sum_to_whole,
)
from hunyuan_train.parallel.config import ParallelConfig, TensorEngine
from hunyuan_train.parallel.layout import Slices, fused_slices
from hunyuan_train.parallel.mesh import Axes


class ColumnLinear(nn.Module):
    """Rows of a linear: whole input, or its sequence shards, to this rank's output features.

    Args:
        linear: the whole linear, possibly on ``meta``.
        slices: which rows are this rank's.
        group: tensor-parallel ranks.
        rows: whether the input [B, S / size, D] is in sequence shards; the output never is.
        gather: concatenate the output features on every rank.
        partial: whether gradients of a gathered output have to be added up over ranks.
    """

    def __init__(
        self,
        linear: nn.Linear,
        slices: Slices,
        group: ProcessGroup,
        *,
        rows: bool = False,
        gather: bool = False,
        partial: bool = False,
    ) -> None:
        super().__init__()
        bias = Slices(slices.shape[:1], 0, slices.runs)
        self.weight = nn.Parameter(slices.take(linear.weight.detach()).clone())
        self.bias = nn.Parameter(bias.take(linear.bias.detach()).clone())
        self.group, self.rows, self.gather, self.partial = group, rows, gather, partial

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., D] to this rank's [..., F / size], or to [..., F] when gathered."""
        out: Tensor = _ColumnProduct.apply(x, self.weight, self.bias, self.group, self.rows)  # pyright: ignore[reportAssignmentType]
        return gather_features(out, self.group, self.partial) if self.gather else out


class RowLinear(nn.Module):
    """Columns of a linear: this rank's input features to the sum over ranks, whole or in rows.

    The bias is added once, after the sum.
    """

    def __init__(
        self, linear: nn.Linear, slices: Slices, group: ProcessGroup, *, rows: bool = False
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(slices.take(linear.weight.detach()).clone())
        self.bias = nn.Parameter(linear.bias.detach().clone())
        self.group, self.rows = group, rows

    def forward(self, x: Tensor) -> Tensor:
        """Map this rank's [..., F / size] to [..., D], or to its rows of it."""
        out = functional.linear(x, self.weight)
        summed = sum_to_rows(out, self.group) if self.rows else sum_to_whole(out, self.group)
        return summed + self.bias


class _ColumnProduct(torch.autograd.Function):
    """x W^T + b whose input gradient is added up over ranks while the weight's is computed.

    With sequence shards only the shard is kept for the backward; the rows are gathered again there,
    behind the product that needs none of them.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, group: ProcessGroup, rows: bool
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.group, ctx.rows = group, rows
        return functional.linear(gather_rows(x, group) if rows else x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        gathering = start_gather_rows(x, ctx.group) if ctx.rows else None
        d_x, summing, kept = None, None, None
        if ctx.needs_input_grad[0]:
            d_x = grad @ weight
            if ctx.rows:
                d_x, summing, kept = start_reduce_scatter_rows(d_x, ctx.group)
            else:
                d_x = d_x.contiguous()
                summing = dist.all_reduce(d_x, group=ctx.group, async_op=True)
        if gathering is not None:
            stacked, work, _ = gathering
            work.wait()
            x = merge_rows(stacked)
        flat = grad.flatten(0, -2)
        d_weight = flat.t() @ x.flatten(0, -2)
        d_bias = flat.sum(dim=0)
        if summing is not None:
            summing.wait()
        del kept
        return d_x, d_weight, d_bias, None, None


def apply_tensor(
    model: nn.Module, plan: ShardingPlan, axes: Axes, cfg: ParallelConfig
) -> tuple[dict[str, Slices], frozenset[str]]:
    """Cut the linears of ``model`` in place as the plan says.

    Returns:
        The part of the whole that each cut parameter is, by name, and the names of the parameters
        whose gradients have to be added up over tensor-parallel ranks.

    Raises:
        ValueError: the ranks do not divide the heads or hidden units, or a package is missing.
    """
    slices: dict[str, Slices] = {}
    partial: set[str] = set()
    size, rank = axes.size("tp"), axes.rank("tp")
    if size == 1:
        return slices, frozenset()
    for name, module in list(model.named_modules()):
        rule = plan.cut_of(name) if isinstance(module, nn.Linear) else None
        if rule is None or not isinstance(module, nn.Linear):
            continue
        by_column = rule.cut in (Cut.ROW, Cut.VECTOR_ROW)
        shape = tuple(module.weight.shape)
        dim = 1 if by_column else 0
        cut = fused_slices(shape, dim, rule.parts or (shape[dim],), rank, size)
        slices[f"{name}.weight"] = cut
        if not by_column:
            slices[f"{name}.bias"] = Slices(shape[:1], 0, cut.runs)
        elif cfg.sp and rule.cut is Cut.ROW:
            partial.add(f"{name}.bias")
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, _cut_linear(module, rule, cut, axes, cfg))
    whole = plan.per_head + (plan.per_token if cfg.sp else ())
    for name, _ in model.named_parameters():
        if any(fnmatchcase(name, pattern) for pattern in whole):
            partial.add(name)
    return slices, frozenset(partial)


def _cut_linear(
    linear: nn.Linear, rule: LinearCut, cut: Slices, axes: Axes, cfg: ParallelConfig
) -> nn.Module:
    group = axes.group("tp")
    megatron = cfg.tensor_engine is TensorEngine.megatron
    match rule.cut:
        case Cut.COLUMN | Cut.ROW if megatron:
            from hunyuan_train.parallel.engines.megatron import megatron_linear

            return megatron_linear(linear, rule.cut.value, cut, group, cfg.sp)
        case Cut.COLUMN:
            return ColumnLinear(linear, cut, group, rows=cfg.sp)
        case Cut.ROW:
            return RowLinear(linear, cut, group, rows=cfg.sp)
        case Cut.VECTOR_COLUMN:
            return ColumnLinear(linear, cut, group)
        case Cut.VECTOR_ROW:
            return RowLinear(linear, cut, group)
        case Cut.GATHERED:
            return ColumnLinear(linear, cut, group, gather=True, partial=cfg.sp)
