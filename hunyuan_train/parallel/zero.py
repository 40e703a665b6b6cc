"""ZeRO sharding of parameters, gradients and optimizer state with ``fully_shard``."""

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from hunyuan_train.models.spec import ShardingPlan
from hunyuan_train.parallel.config import ParallelConfig, ReduceEvery
from hunyuan_train.parallel.mesh import Axes


def apply_zero(model: nn.Module, plan: ShardingPlan, axes: Axes, cfg: ParallelConfig) -> nn.Module:
    """Shard ``model`` over dp_shard x cp in place, each repeated unit on its own, and return it.

    One rank whose weights are what it computes with needs neither shards nor casts, so it is left
    as it is, and so is a model that every rank keeps whole (``zero_stage`` 0). Float32 parameters
    stay master weights; with ``compute_dtype`` bfloat16 the gathered copies are bfloat16.
    """
    compute = getattr(torch, cfg.compute_dtype)
    casts = compute is torch.bfloat16 and any(p.dtype is not compute for p in model.parameters())
    if cfg.zero_stage == 0 or (axes.size("grads") == 1 and not casts):
        return model
    reduce = getattr(torch, cfg.reduce_dtype)
    policy = MixedPrecisionPolicy(
        param_dtype=compute,
        reduce_dtype=compute if compute is torch.float64 else reduce,
        cast_forward_inputs=False,
    )
    assert axes.zero_mesh is not None
    hybrid = cfg.dp_replicate > 1
    where = axes.zero_mesh["dp_replicate", "zero"] if hybrid else axes.zero_mesh["zero"]
    reshard = cfg.zero_stage == 3
    for unit in () if plan.whole else plan.modules(model):
        fully_shard(unit, mesh=where, mp_policy=policy, reshard_after_forward=reshard)
    fully_shard(model, mesh=where, mp_policy=policy, reshard_after_forward=reshard)
    return model


def is_sharded(model: nn.Module) -> bool:
    """Return whether ``apply_zero`` sharded the model."""
    return isinstance(model, FSDPModule)


def set_micro_step(model: nn.Module, cfg: ParallelConfig, last: bool) -> None:
    """Say before a forward whether the backward after it is the last one of the update.

    Before the last one, gradients are added up on each rank without a reduction, unless
    ``reduce_every`` is micro_step; stage 1 also keeps the gathered parameters until then.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last or cfg.reduce_every is ReduceEvery.micro_step)
        model.set_reshard_after_backward(last or cfg.zero_stage > 1)
