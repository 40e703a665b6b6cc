"""Frozen parameters under every layout: what one process trains, and no more."""

from dataclasses import replace

import pytest
from distributed import run_distributed

pytestmark = pytest.mark.dist

LAYOUTS = {
    "zero0": "zero_stage=0",
    "zero2": "zero_stage=2",
    "zero3": "zero_stage=3",
    "zero3, gradients sharded at once": "zero_stage=3 reduce_every=micro_step",
    "tp2+sp": "tp=2 sp=true",
    "ring2": "cp_ring=2",
}
FIELDS = [
    # Whole blocks at both ends, and parts of one, are never trained; others begin later.
    "optimizer.trainable=[double_blocks.1.img*,single_blocks.0.*,final_layer.*,txt_in.*,img_in.*]",
    "optimizer.unfreeze={single_blocks.0.linear1.*: 2, txt_in.*: 3}",
]


def climb(rank: int, world: int, recompute: str) -> dict[str, dict[str, float]]:
    """Return the errors of each layout against one process after two updates."""
    import torch

    from hunyuan_train.config.compose import compose_config
    from hunyuan_train.data.buckets import Bucket
    from hunyuan_train.engine.certify import compare, train_alone
    from hunyuan_train.engine.trial import MicroBatch
    from hunyuan_train.runtime.dist import World

    shapes = [MicroBatch(Bucket(9, 64, 64), (8, 4)), MicroBatch(Bucket(1, 64, 64), (6,))] * 2
    base = compose_config(
        [
            "model.num_double_blocks=2", "model.num_single_blocks=2", "model.mlp_ratio=2",
            "model.num_heads=4", "model.hidden_size=32", "model.rope_axes=[2,2,4]",
            "optimizer.warmup_steps=0", "certify.steps=2", "parallel.zero_stage=0",
            f"memory.recompute={recompute}", *FIELDS,
        ]
    )  # fmt: skip
    here = World(rank=rank, local_rank=rank, size=world, device=torch.device("cpu"))
    alone = train_alone(base, here, shapes)
    found = {}
    for name, fields in LAYOUTS.items():
        parallel = compose_config([f"parallel.{field}" for field in fields.split()]).parallel
        found[name] = compare(replace(base, parallel=parallel), here, shapes, alone).errors
    return found


@pytest.mark.parametrize(
    "recompute",
    ["selective", *(pytest.param(mode, marks=pytest.mark.again) for mode in ("none", "full"))],
)
def test_every_layout_trains_what_one_process_trains(recompute: str) -> None:
    for layout, errors in run_distributed(climb, 2, recompute)[0].items():
        over = {name: error for name, error in errors.items() if not error <= 1e-5}
        assert not over, f"{layout}: {over}"
        groups = {name.removeprefix("gradient ") for name in errors if name.startswith("grad")}
        assert "single_blocks.*.linear1" in groups, "trained from the second update on"
        assert "double_blocks.*.img_attn_qkv" in groups
        assert not any(group.startswith(("txt_in", "time_in", "vector_in")) for group in groups)
        assert any(name.startswith("weight time_in") for name in errors)
