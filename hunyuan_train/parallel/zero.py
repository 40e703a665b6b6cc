"""ZeRO sharding of parameters, gradients and optimizer state with ``fully_shard``."""

from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from hunyuan_train.models.spec import ShardingPlan
from hunyuan_train.parallel.config import ParallelConfig


def apply_zero(
    model: nn.Module, plan: ShardingPlan, mesh: DeviceMesh, cfg: ParallelConfig
) -> nn.Module:
    """Shard ``model`` in place, each repeated unit on its own, and return it.

    Float32 on one rank needs neither shards nor casts, so it is left as it is. Parameters stay
    float32 master weights; with ``compute_dtype`` bfloat16 the gathered copies are bfloat16.
    """
    compute = getattr(torch, cfg.compute_dtype)
    if mesh.size() == 1 and compute is torch.float32:
        return model
    policy = MixedPrecisionPolicy(
        param_dtype=compute,
        reduce_dtype=getattr(torch, cfg.reduce_dtype),
        cast_forward_inputs=False,
    )
    where = mesh if cfg.dp_replicate > 1 else mesh["dp_shard"]
    reshard = cfg.zero_stage == 3
    for unit in plan.units:
        module = model.get_submodule(unit)
        members = module if isinstance(module, nn.ModuleList) else [module]
        for member in members:
            fully_shard(member, mesh=where, mp_policy=policy, reshard_after_forward=reshard)
    fully_shard(model, mesh=where, mp_policy=policy, reshard_after_forward=reshard)
    return model


def set_gradient_sync(model: nn.Module, sync: bool) -> None:
    """Reduce gradients over ranks in the next backward, or only accumulate them locally."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(sync)


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the optimizer's state by parameter name, sharded as the parameters are."""
    return get_optimizer_state_dict(model, optimizer)


def load_optimizer_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> None:
    """Give the optimizer a state that :func:`optimizer_state` returned."""
    set_optimizer_state_dict(model, optimizer, state)
