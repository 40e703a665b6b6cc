"""How HunyuanVideo is spread over devices, as data."""

from hunyuan_train.models.hunyuan.config import HunyuanConfig
from hunyuan_train.models.spec import ShardingPlan


def hunyuan_sharding_plan(cfg: HunyuanConfig) -> ShardingPlan:
    """Return the plan: every refiner, double and single block is one unit."""
    refiner = (f"txt_in.individual_token_refiner.blocks.{r}" for r in range(cfg.refiner_depth))
    double = (f"double_blocks.{i}" for i in range(cfg.num_double_blocks))
    single = (f"single_blocks.{j}" for j in range(cfg.num_single_blocks))
    return ShardingPlan(units=(*refiner, *double, *single))
