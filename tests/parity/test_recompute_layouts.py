"""In every layout and with every engine the gradients of all recompute modes are the same bits."""

import pytest
from distributed import run_distributed
from test_layout_ladder import DIVIDES, UNEVEN

pytestmark = pytest.mark.dist

TWO = {
    "tp2": "tp=2",
    "tp2+sp": "tp=2 sp=true",
    "ring2": "cp_ring=2",
    "ulysses2": "cp_ulysses=2",
    "zero2": "zero_stage=2 reduce_every=micro_step",
    "zero3": "zero_stage=3",
    "deepspeed2": "zero_engine=deepspeed zero_stage=2",
    "deepspeed3": "zero_engine=deepspeed zero_stage=3",
    "megatron tp2+sp": "tensor_engine=megatron tp=2 sp=true",
}
EIGHT = {"tp2+sp x ring2 x dp_shard2": "tp=2 sp=true cp_ring=2"}
KEEPS = {
    "none": "recompute=none",
    "selective": "recompute=selective",
    "full": "recompute=full",
    "selective, offloaded": "recompute=selective offload=on offload_min_mib=0",
    "full, half offloaded": "recompute=full offload=on offload_min_mib=0 offload_share=0.5",
    "by bucket": "recompute=selective recompute_of={1x80x112:none}",
}
BOTH = ("none", "selective, offloaded", "full, half offloaded")


def compute(
    rank: int, world: int, layouts: dict[str, str], keeps: dict[str, str], kind: str
) -> dict[tuple[str, str], list[str]]:
    """Return for each layout and way to keep the gradients that differ from those of none."""
    from dataclasses import replace

    import torch

    from hunyuan_train.config.compose import compose_config
    from hunyuan_train.data.buckets import Bucket
    from hunyuan_train.engine.trial import MicroBatch, run_trial
    from hunyuan_train.parallel.mesh import build_axes
    from hunyuan_train.runtime.dist import World

    here = World(rank=rank, local_rank=rank, size=world, device=torch.device("cpu"))
    if any("megatron" in fields for fields in layouts.values()):
        from megatron_shim import run_megatron_on_cpu

        run_megatron_on_cpu()
    video, image = Bucket(9, 80, 112), Bucket(1, 80, 112)
    shapes = [MicroBatch(video, (13, 4)), MicroBatch(image, (3, 8, 8))]
    found: dict[tuple[str, str], list[str]] = {}
    for layout, fields in layouts.items():
        truth: dict[str, torch.Tensor] = {}
        for keep, memory in keeps.items():
            cfg = compose_config(
                [
                    *(DIVIDES if kind == "divides" else UNEVEN),
                    "optimizer.warmup_steps=0",
                    "run.device=cpu",
                    "parallel.zero_stage=0",
                    *(f"parallel.{field}" for field in fields.split()),
                    *(f"memory.{field}" for field in memory.split()),
                ]
            )
            axes = build_axes(cfg.parallel, "cpu", world)
            stage = replace(cfg.stage, micro_steps=len(shapes) // axes.size("dp"))
            trial = run_trial(replace(cfg, stage=stage), axes, here, shapes, 1)
            grads = {n: getattr(g, "_local_tensor", g) for n, g in trial.gradients.items()}
            truth = truth or grads
            assert len(grads) == len(truth) > 80
            found[layout, keep] = [n for n in truth if not torch.equal(grads[n], truth[n])]
    return found


def assert_equal(world: int, layouts: dict[str, str], keeps: dict[str, str]) -> None:
    for ranks in run_distributed(compute, world, layouts, keeps, "uneven", timeout_s=280):
        assert len(ranks) == len(layouts) * len(keeps)
        assert {point: names for point, names in ranks.items() if names} == {}


@pytest.mark.parametrize("layout", ["tp2+sp", "ring2", "ulysses2", "zero3"])
def test_every_way_to_keep_gives_the_same_gradients(layout: str) -> None:
    assert_equal(2, {layout: TWO[layout]}, KEEPS)


def test_in_other_layouts_and_engines() -> None:
    others = ("tp2", "zero2", "deepspeed2", "deepspeed3", "megatron tp2+sp")
    assert_equal(2, {name: TWO[name] for name in others}, {k: KEEPS[k] for k in BOTH})


@pytest.mark.slow
def test_on_eight_ranks() -> None:
    assert_equal(8, EIGHT, {k: KEEPS[k] for k in BOTH})
