"""Errors of layouts against one process, for configs that train only some parameters."""

from dataclasses import replace

SMALL = [
    "model.num_double_blocks=2", "model.num_single_blocks=2", "model.mlp_ratio=2",
    "model.num_heads=4", "model.hidden_size=32", "model.rope_axes=[2,2,4]",
    "optimizer.warmup_steps=0", "certify.steps=2", "parallel.zero_stage=0",
]  # fmt: skip


def layout_errors(
    rank: int, world: int, layouts: dict[str, str], fields: list[str]
) -> dict[str, dict[str, float]]:
    """Return the errors of each layout against one process after two updates."""
    import torch

    from hunyuan_train.config.compose import compose_config
    from hunyuan_train.data.buckets import Bucket
    from hunyuan_train.engine.certify import compare, train_alone
    from hunyuan_train.engine.trial import MicroBatch
    from hunyuan_train.runtime.dist import World

    shapes = [MicroBatch(Bucket(9, 64, 64), (8, 4)), MicroBatch(Bucket(1, 64, 64), (6,))] * 2
    base = compose_config([*SMALL, *fields])
    here = World(rank=rank, local_rank=rank, size=world, device=torch.device("cpu"))
    alone = train_alone(base, here, shapes)
    found = {}
    for name, parallel in layouts.items():
        chosen = compose_config([f"parallel.{field}" for field in parallel.split()]).parallel
        found[name] = compare(replace(base, parallel=chosen), here, shapes, alone).errors
    return found
