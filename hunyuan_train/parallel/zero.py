"""ZeRO sharding of parameters, gradients and optimizer state with ``fully_shard``."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from hunyuan_train.models.spec import ShardingPlan
from hunyuan_train.parallel.config import ParallelConfig


def apply_zero(
    model: nn.Module, plan: ShardingPlan, mesh: DeviceMesh, cfg: ParallelConfig
) -> nn.Module:
    """Shard ``model`` in place, each repeated unit on its own, and return it.

    Float32 on one rank needs neither shards nor casts, so it is left as it is, and so is a model
    that every rank keeps whole (``zero_stage`` 0). Parameters stay float32 master weights; with
    ``compute_dtype`` bfloat16 the gathered copies are bfloat16.
    """
    compute = getattr(torch, cfg.compute_dtype)
    if cfg.zero_stage == 0 or (mesh.size() == 1 and compute is torch.float32):
        return model
    policy = MixedPrecisionPolicy(
        param_dtype=compute,
        reduce_dtype=getattr(torch, cfg.reduce_dtype),
        cast_forward_inputs=False,
    )
    where = mesh if cfg.dp_replicate > 1 else mesh["dp_shard"]
    reshard = cfg.zero_stage == 3
    for unit in plan.modules(model):
        fully_shard(unit, mesh=where, mp_policy=policy, reshard_after_forward=reshard)
    fully_shard(model, mesh=where, mp_policy=policy, reshard_after_forward=reshard)
    return model


def set_gradient_sync(model: nn.Module, sync: bool) -> None:
    """Reduce gradients over ranks in the next backward, or only accumulate them locally."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(sync)


@torch.no_grad()
def average_gradients(model: nn.Module) -> None:
    """Average the gradients of a model that every rank holds whole, in one reduction.

    A sharded model's gradients were averaged in its backward, so it is left alone.
    """
    if isinstance(model, FSDPModule) or dist.get_world_size() == 1:
        return
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    parts = flat.split([grad.numel() for grad in grads])
    torch._foreach_copy_(grads, [p.view_as(g) for p, g in zip(parts, grads, strict=True)])
