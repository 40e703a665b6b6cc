"""The sums over ranks that a backward leaves to be done."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from hunyuan_train.parallel.apply import ParallelModel
from hunyuan_train.parallel.zero import is_sharded


@torch.no_grad()
def finish_gradients(model: ParallelModel) -> None:
    """Add up over ranks what the backward left partial, in at most two reductions.

    ``fully_shard`` has added up over data- and context-parallel ranks already; a model that every
    rank holds whole has not. The gradients of ``model.partial`` are partial over tensor-parallel
    ranks besides.
    """
    axes = model.axes
    grads = {
        name: p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad
        for name, p in model.module.named_parameters()
        if p.grad is not None
    }
    if axes.size("grads") > 1 and not is_sharded(model.module):
        sum_in_place(list(grads.values()), axes.group("grads"))
    if axes.size("tp") > 1:
        partial = [grad for name, grad in grads.items() if name in model.partial]
        sum_in_place(partial, axes.group("tp"))


def sum_in_place(tensors: list[Tensor], group: ProcessGroup) -> None:
    """Add tensors of one dtype up over ``group`` in one reduction."""
    if not tensors:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat, group=group)
    parts = flat.split([tensor.numel() for tensor in tensors])
    torch._foreach_copy_(tensors, [p.view_as(t) for p, t in zip(parts, tensors, strict=True)])
