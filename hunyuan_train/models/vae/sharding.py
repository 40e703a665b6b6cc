"""How the VAE is spread over devices, as data."""

from hunyuan_train.models.spec import ShardingPlan
from hunyuan_train.models.vae.config import VaeConfig


def vae_sharding_plan(cfg: VaeConfig) -> ShardingPlan:
    """Return the plan: every resolution of encoder and decoder, and both middles, is one unit.

    Nothing is cut over tensor-parallel ranks.
    """
    stages = range(len(cfg.block_channels))
    return ShardingPlan(
        units=(
            *(f"encoder.down_blocks.{i}" for i in stages),
            "encoder.mid_block",
            "decoder.mid_block",
            *(f"decoder.up_blocks.{i}" for i in stages),
        ),
        cuts=(),
        per_head=(),
        per_token=(),
        token_modules=(),
        core_modules=("encoder.*", "decoder.*"),
        divisors=(("the parts of a VAE layer", 1),),
    )
