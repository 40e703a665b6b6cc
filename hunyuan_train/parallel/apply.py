"""The order in which a single-device model becomes a distributed one."""

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from hunyuan_train.models.spec import ShardingPlan
from hunyuan_train.parallel.config import ParallelConfig
from hunyuan_train.parallel.zero import apply_zero


def parallelize(
    model: nn.Module, plan: ShardingPlan, mesh: DeviceMesh, cfg: ParallelConfig
) -> nn.Module:
    """Apply the layout to a single-device ``model`` in place and return it."""
    return apply_zero(model, plan, mesh, cfg)
