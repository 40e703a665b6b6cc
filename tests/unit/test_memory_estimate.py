"""The closed forms of memory against what autograd keeps and what tensors take."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from traced_layout import Traced, traced

from hunyuan_train.memory.cluster import ClusterConfig
from hunyuan_train.memory.config import Recompute
from hunyuan_train.memory.estimate import (
    Layout,
    MemoryParts,
    Shards,
    Work,
    estimate,
    kept_ends_bytes,
    max_tokens,
)
from hunyuan_train.memory.parameters import parameters
from hunyuan_train.memory.states import StateBytes
from hunyuan_train.memory.step_time import TimeModel
from hunyuan_train.models.hunyuan.config import HunyuanConfig
from hunyuan_train.models.registry import build_model
from hunyuan_train.parallel.config import ParallelConfig

SIX = HunyuanConfig(
    num_double_blocks=2, num_single_blocks=4, hidden_size=768, num_heads=12, rope_axes=[16, 24, 24]
)
WIDE = HunyuanConfig(num_double_blocks=2, num_single_blocks=4)
NONE, SELECTIVE, FULL = Recompute.none, Recompute.selective, Recompute.full
CLIP, IMAGES = ((9, 64, 96), 1), ((1, 64, 64), 4)
"""Latent shape and samples."""
TEXT = 64

POINTS: list[tuple[dict[str, Any], int, tuple[tuple[int, int, int], int], Recompute]] = [
    ({}, 1, CLIP, NONE),
    ({}, 8, CLIP, FULL),
    ({}, 8, IMAGES, NONE),
    ({"tp": 4}, 4, CLIP, NONE),
    ({"tp": 2, "sp": True}, 4, CLIP, FULL),
    ({"tp": 2, "sp": True}, 4, IMAGES, NONE),
    ({"cp_ulysses": 4}, 4, CLIP, NONE),
    ({"cp_ulysses": 4}, 8, CLIP, SELECTIVE),
    ({"cp_ring": 4}, 8, CLIP, SELECTIVE),
    ({"cp_ring": 4}, 8, IMAGES, FULL),
    ({"cp_ring": 2, "cp_ulysses": 2, "tp": 2, "sp": True, "zero_stage": 2}, 16, CLIP, SELECTIVE),
    ({"dp_replicate": 2, "zero_stage": 2, "cp_ulysses": 2}, 8, IMAGES, NONE),
]


def both(
    model: HunyuanConfig,
    fields: dict[str, Any],
    world: int,
    shape: tuple[tuple[int, int, int], int],
    mode: Recompute,
    count_saved: bool = True,
) -> tuple[Traced, MemoryParts, float]:
    """Return what was traced, what is predicted, and the predicted bytes that autograd keeps."""
    grid, batch = shape
    parallel = ParallelConfig(**({"compute_dtype": "bfloat16"} | fields))
    found = traced(model, parallel, world, grid, TEXT, batch, mode, count_saved)
    layout = Layout(
        world=world,
        tp=parallel.tp,
        sp=parallel.sp,
        cp_ring=parallel.cp_ring,
        cp_ulysses=parallel.cp_ulysses,
        dp_replicate=parallel.dp_replicate,
        zero_stage=parallel.zero_stage,
    )
    img_tokens = grid[0] * grid[1] * grid[2] // 4
    work = Work(img_tokens=img_tokens, txt_tokens=TEXT, batch=batch, recompute=mode)
    parts = estimate(model, layout, work)
    return found, parts, parts.activations + kept_ends_bytes(model, layout, work)


@pytest.mark.parametrize(("fields", "world", "shape", "mode"), POINTS, ids=str)
def test_kept_and_states_are_what_tensors_take(
    fields: dict[str, Any],
    world: int,
    shape: tuple[tuple[int, int, int], int],
    mode: Recompute,
) -> None:
    found, parts, kept = both(SIX, fields, world, shape, mode)
    assert kept == pytest.approx(found.saved, rel=0.03)
    assert parts.states == pytest.approx(found.states, rel=0.05)
    assert kept + parts.states == pytest.approx(found.saved + found.states, rel=0.05)


@pytest.mark.parametrize(
    ("fields", "world", "shape", "mode"),
    [
        ({"cp_ulysses": 8}, 8, ((33, 90, 160), 1), FULL),
        ({"cp_ring": 4, "cp_ulysses": 2}, 8, ((33, 90, 160), 1), SELECTIVE),
        ({"cp_ring": 2}, 8, ((17, 46, 80), 1), NONE),
        ({"tp": 2, "sp": True, "zero_stage": 2}, 16, ((33, 46, 80), 1), FULL),
        ({"tp": 4}, 8, ((1, 128, 128), 2), NONE),
        ({}, 64, ((1, 64, 64), 16), NONE),
        ({}, 1, ((1, 64, 64), 2), FULL),
    ],
    ids=str,
)
def test_the_prediction_is_never_below_the_most_that_tensors_take(
    fields: dict[str, Any],
    world: int,
    shape: tuple[tuple[int, int, int], int],
    mode: Recompute,
) -> None:
    """At the widths of the released model, so that "fits" means it; fewer blocks, to be quick."""
    found, parts, _ = both(WIDE, fields, world, shape, mode, count_saved=False)
    assert found.peak <= parts.total <= found.peak + 6 * 2**30


def test_parameters_are_those_of_the_model() -> None:
    for guidance in (False, True):
        cfg = HunyuanConfig(guidance_embed=guidance, in_channels=33)
        with torch.device("meta"):
            model = build_model(cfg)
        found = parameters(cfg)
        assert found.total.on(1) == sum(p.numel() for p in model.parameters())
        for name, count in (("double_blocks.0", found.double), ("single_blocks.0", found.single)):
            block = model.get_submodule(name)
            assert count.on(1) == sum(p.numel() for p in block.parameters())


def test_offload_leaves_two_blocks_on_the_device() -> None:
    work = Work(img_tokens=118_800, txt_tokens=256, recompute=SELECTIVE)
    model, layout = HunyuanConfig(), Layout(world=8)
    stays = estimate(model, layout, work)
    moves = estimate(model, layout, replace(work, offload_share=1.0))
    assert stays.host == 0
    assert moves.host == pytest.approx(stays.activations)
    assert moves.activations == pytest.approx(stays.activations * 2 / 60)
    half = estimate(model, layout, replace(work, offload_share=0.5))
    assert moves.total < half.total < stays.total


def test_gradients_added_up_unsharded_are_whole() -> None:
    work = Work(img_tokens=256, txt_tokens=256)
    base = Layout(world=8)
    sharded, whole = (
        estimate(HunyuanConfig(), replace(base, whole_gradients=flag), work).gradients
        for flag in (False, True)
    )
    assert whole - sharded == 4 * parameters(HunyuanConfig()).total.on(1)


def test_narrow_states_take_less() -> None:
    states = StateBytes(weight=2, gradient=2, moments=2, average=0)
    work = Work(img_tokens=256, txt_tokens=256)
    wide, narrow = (
        estimate(HunyuanConfig(), Layout(), work, s).states for s in (StateBytes(), states)
    )
    assert narrow / wide == pytest.approx(6 / 20)


def test_a_teacher_is_sharded_by_stage_three_only() -> None:
    work, total = Work(img_tokens=256, txt_tokens=256), parameters(HunyuanConfig()).total.on(1)
    for stage, ranks in ((0, 1), (2, 1), (3, 8)):
        layout = Layout(world=8, zero_stage=stage)
        alone, taught = (
            estimate(HunyuanConfig(), layout, work, StateBytes(teacher=bytes_each))
            for bytes_each in (0.0, 2.0)
        )
        assert taught.teacher == 2 * total / ranks
        assert taught.states - alone.states == taught.teacher
        assert taught.total - alone.total == pytest.approx(taught.teacher)


def test_a_teacher_takes_two_forwards() -> None:
    """What it adds to the prediction is forwards alone, and it is work of the model."""
    cluster, model = ClusterConfig(), HunyuanConfig()
    work = Work(img_tokens=8192, txt_tokens=256, recompute=Recompute.none)
    alone, taught = (
        TimeModel(model, cluster, teacher_passes=n).predict(Layout(world=1, zero_stage=0), work)
        for n in (0, 2)
    )
    assert taught.parts.linear == pytest.approx(alone.parts.linear * 5 / 3)
    assert taught.parts.elementwise == pytest.approx(alone.parts.elementwise * 5 / 3)
    assert taught.parts.attention > alone.parts.attention
    assert taught.parts.optimizer == alone.parts.optimizer
    assert taught.mfu == pytest.approx(alone.mfu, rel=0.1)


def test_tokens_fill_what_the_states_leave() -> None:
    for shards in (Shards(), Shards(tp=2, sp=True, cp=2, states=4), Shards(cp=4)):
        for dtype_bytes in (2, 4):
            tokens = max_tokens(SIX, 0, 8 * 2**30, dtype_bytes, shards, reserve=0.1)
            layout = Layout(
                world=shards.tp * max(shards.states, shards.cp),
                tp=shards.tp,
                sp=shards.sp,
                cp_ring=shards.cp,
                zero_stage=3 if shards.states > 1 or dtype_bytes == 2 else 0,
                compute_bytes=dtype_bytes,
            )
            for count, fits in ((tokens, True), (tokens + 2 * shards.cp * shards.tp, False)):
                work = Work(img_tokens=count // 2, txt_tokens=0, batch=2)
                assert (estimate(SIX, layout, work).total <= 0.9 * 8 * 2**30) == fits
    assert max_tokens(SIX, 0, 2**33, 4, Shards(), recompute=FULL) > 2 * max_tokens(
        SIX, 0, 2**33, 4, Shards()
    )


def test_states_that_fill_the_device_leave_no_token() -> None:
    with pytest.raises(ValueError, match=r"12,810,782,784 parameters take 238\.6 GiB of the 79\.2"):
        max_tokens(HunyuanConfig(), 12_810_782_784, 79.2 * 2**30, 2, Shards())
