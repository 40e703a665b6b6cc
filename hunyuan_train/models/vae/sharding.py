"""How a VAE is spread over devices, as data."""

import torch

from hunyuan_train.models.spec import ShardingPlan
from hunyuan_train.models.vae.build import build_vae
from hunyuan_train.models.vae.config import VaeConfig


def vae_sharding_plan(cfg: VaeConfig) -> ShardingPlan:
    """Return the plan: every resolution of encoder and decoder, and both middles, is one unit.

    Nothing is cut over tensor-parallel ranks, and ZeRO gathers all of it: it is small beside what
    it computes, and ranks may have different numbers of tiles.
    """
    with torch.device("meta"):
        names = [name for name, _ in build_vae(cfg).named_modules()]
    middles = ("encoder.mid_block", "decoder.mid_block")
    units = [
        name for name in names if name in middles or name.rpartition(".")[0].endswith("_blocks")
    ]
    return ShardingPlan(
        units=tuple(units),
        whole=True,
        cuts=(),
        per_head=(),
        per_token=(),
        token_modules=(),
        core_modules=("encoder.*", "decoder.*"),
        divisors=(("the parts of a VAE layer", 1),),
    )
