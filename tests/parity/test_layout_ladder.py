"""The ladder: every layout trains what one process trains, after three updates."""

from dataclasses import replace

import pytest
from distributed import run_distributed

pytestmark = pytest.mark.dist

TWO = {
    "tp2": "tp=2",
    "tp2+sp": "tp=2 sp=true",
    "ring2": "cp_ring=2",
    "ulysses2": "cp_ulysses=2",
    "zero0": "zero_stage=0",
    "zero1": "zero_stage=1",
    "zero2": "zero_stage=2",
    "zero2 reducing every micro-step": "zero_stage=2 reduce_every=micro_step",
    "zero3": "zero_stage=3",
}
FOUR = {
    "tp4": "tp=4",
    "ring4": "cp_ring=4",
    "ulysses2 x ring2": "cp_ulysses=2 cp_ring=2",
    "dp_replicate2 x dp_shard2": "dp_replicate=2",
    "tp2 x ring2": "tp=2 cp_ring=2",
    "tp2+sp x ulysses2": "tp=2 sp=true cp_ulysses=2",
    "tp2 x dp_shard2": "tp=2",
    "ring2 x dp_shard2": "cp_ring=2 reduce_every=micro_step",
    "tp2+sp, zero0": "tp=2 sp=true zero_stage=0",
}
ENGINES = {
    "deepspeed1": "zero_engine=deepspeed zero_stage=1",
    "deepspeed2": "zero_engine=deepspeed zero_stage=2",
    "deepspeed3": "zero_engine=deepspeed zero_stage=3",
    "deepspeed2, offloaded": "zero_engine=deepspeed zero_stage=2 offload_optimizer=cpu",
    "megatron tp2": "tensor_engine=megatron tp=2",
    "megatron tp2+sp": "tensor_engine=megatron tp=2 sp=true",
}
"""On two ranks and in float32: DeepSpeed takes no float64."""
BOTH_ENGINES = {
    "deepspeed2 x ring2": "zero_engine=deepspeed zero_stage=2 cp_ring=2",
    "deepspeed3 x megatron tp2+sp": (
        "zero_engine=deepspeed zero_stage=3 tensor_engine=megatron tp=2 sp=true"
    ),
}
EIGHT = {"tp2+sp x ring2 x dp_shard2": "tp=2 sp=true cp_ring=2"}
LAYOUTS = {2: TWO, 4: FOUR, 8: EIGHT}

MODEL = ["model.num_double_blocks=2", "model.num_single_blocks=2", "model.mlp_ratio=2"]
DIVIDES = [*MODEL, "model.num_heads=4", "model.hidden_size=32", "model.rope_axes=[2,2,4]"]
UNEVEN = [*MODEL, "model.num_heads=6", "model.hidden_size=60", "model.rope_axes=[2,4,4]"]
"""Six heads of ten channels; 105 or 35 image tokens and 13 of text leave a rest on every axis."""
NOT_SIX = {"tp4", "ulysses2 x ring2 x tp2", "tp2+sp x ulysses2"}
"""Layouts that four does not divide six heads for."""

TASKS = "objective.tasks={text:1,first:1,first_last:1}"
REPLACED = ("model.image_condition=token_replace",)
GIVEN = {
    "token_replace": REPLACED,
    "concat": ("model.image_condition=concat", "model.in_channels=33"),
    "by DeepSpeed": REPLACED,
}
GIVEN_LAYOUTS = {name: TWO[name] for name in ("tp2+sp", "ring2", "ulysses2", "zero3")}
GIVEN_BY = {name: ENGINES[name] for name in ("deepspeed3", "megatron tp2+sp")}

FIRST = {
    (2, "uneven", "float64"), (4, "uneven", "float64"), (8, "uneven", "float64"),
    (8, "divides", "float64"), (2, "divides", "float32"),
}  # fmt: skip
CASES = [
    pytest.param(
        world,
        kind,
        dtype,
        id=f"{world} ranks, {kind}, {dtype}",
        marks=[] if (world, kind, dtype) in FIRST else [pytest.mark.again],
    )
    for world in LAYOUTS
    for kind in ("divides", "uneven")
    for dtype in ("float32", "float64")
]


def climb(
    rank: int,
    world: int,
    layouts: dict[str, str],
    kind: str,
    dtype: str,
    device: str = "cpu",
    extra: tuple[str, ...] = (),
) -> dict[str, dict[str, float] | str]:
    """Return the errors of each layout against one process, or what it says when impossible."""
    import torch

    from hunyuan_train.config.compose import compose_config
    from hunyuan_train.data.buckets import Bucket
    from hunyuan_train.engine.certify import compare, train_alone
    from hunyuan_train.engine.trial import MicroBatch
    from hunyuan_train.runtime.dist import World

    divides = kind == "divides"
    video, image = (
        (9, 64, 64) if divides else (9, 80, 112),
        (1, 64, 64) if divides else (1, 80, 112),
    )
    shapes = [
        MicroBatch(Bucket(*video), (8, 4, 6) if divides else (13, 4, 7)),
        MicroBatch(Bucket(*image), (8,)),
        MicroBatch(Bucket(*video), (5,)),
        MicroBatch(Bucket(*image), (3, 8, 8)),
    ]
    base = compose_config(
        [
            *(DIVIDES if divides else UNEVEN),
            "optimizer.warmup_steps=0",
            "certify.steps=3",
            "objective.text_drop=0.3",
            f"run.device={device}",
            "parallel.zero_stage=0",
            f"parallel.compute_dtype={dtype}",
            *extra,
        ]
    )
    place = torch.device("cpu") if device == "cpu" else torch.device(device, rank)
    here = World(rank=rank, local_rank=rank, size=world, device=place)
    alone = train_alone(base, here, shapes)
    if device == "cpu" and any("megatron" in fields for fields in layouts.values()):
        from megatron_shim import run_megatron_on_cpu

        run_megatron_on_cpu()
    results: dict[str, dict[str, float] | str] = {}
    for name, fields in layouts.items():
        overrides = [f"parallel.{field}" for field in fields.split()]
        parallel = compose_config([*overrides, f"parallel.compute_dtype={dtype}"]).parallel
        try:
            results[name] = compare(replace(base, parallel=parallel), here, shapes, alone).errors
        except ValueError as error:
            results[name] = str(error)
    return results


@pytest.mark.parametrize(("world", "kind", "dtype"), CASES)
def test_every_layout_trains_what_one_process_trains(world: int, kind: str, dtype: str):
    results = run_distributed(climb, world, LAYOUTS[world], kind, dtype, timeout_s=240)[0]
    tolerance = 1e-10 if dtype == "float64" else 1e-5
    for layout, errors in results.items():
        if kind == "uneven" and layout in NOT_SIX:
            assert "does not divide model.num_heads=6; choose a product from 1 2 3 6" in errors
            continue
        assert isinstance(errors, dict), f"{layout}: {errors}"
        over = {name: error for name, error in errors.items() if not error <= tolerance}
        assert not over, f"{layout}: {over}"
        assert len(errors) > 70


@pytest.mark.parametrize("world", [2, 4])
def test_other_engines_train_what_one_process_trains(world: int):
    layouts = ENGINES if world == 2 else BOTH_ENGINES
    results = run_distributed(climb, world, layouts, "uneven", "float32", timeout_s=240)[0]
    for layout, errors in results.items():
        assert isinstance(errors, dict), f"{layout}: {errors}"
        over = {name: error for name, error in errors.items() if not error <= 1e-5}
        assert not over, f"{layout}: {over}"


@pytest.mark.parametrize("form", GIVEN)
def test_given_frames_in_every_kind_of_layout(form: str):
    """Videos have some of their frames given and images none, so that ranks differ in that too."""
    layouts, dtype = (GIVEN_LAYOUTS, "float64") if form != "by DeepSpeed" else (GIVEN_BY, "float32")
    arguments = (layouts, "uneven", dtype, "cpu", (*GIVEN[form], TASKS))
    results = run_distributed(climb, 2, *arguments, timeout_s=240)[0]
    for layout, errors in results.items():
        assert isinstance(errors, dict), f"{layout}: {errors}"
        tolerance = 1e-10 if dtype == "float64" else 1e-5
        over = {name: error for name, error in errors.items() if not error <= tolerance}
        assert not over, f"{layout}: {over}"


@pytest.mark.multigpu
@pytest.mark.parametrize("world", [2, 4, 8])
@pytest.mark.parametrize("kind", ["divides", "uneven"])
def test_every_layout_does_so_over_nccl(world: int, kind: str):
    import torch

    if torch.cuda.device_count() < world:
        pytest.skip(f"needs {world} GPUs, {torch.cuda.device_count()} here")
    layouts = LAYOUTS[world] | {2: ENGINES, 4: BOTH_ENGINES, 8: {}}[world]
    backend = "cpu:gloo,cuda:nccl"
    arguments = (layouts, kind, "float32", "cuda")
    results = run_distributed(climb, world, *arguments, timeout_s=280, backend=backend)[0]
    for layout, errors in results.items():
        if kind == "uneven" and layout in NOT_SIX:
            continue
        assert isinstance(errors, dict), f"{layout}: {errors}"
        over = {name: error for name, error in errors.items() if not error <= 1e-5}
        assert not over, f"{layout}: {over}"
