"""The mesh: every rank in one group per axis, and impossible sizes refused with what would do.

Worlds of many ranks are made with torch's fake process group, in a process of their own.
"""

import math
import multiprocessing as mp
import re
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from hunyuan_train.models.hunyuan.config import HunyuanConfig
from hunyuan_train.models.hunyuan.sharding import hunyuan_sharding_plan
from hunyuan_train.parallel.apply import check_divisors
from hunyuan_train.parallel.config import Offload, ParallelConfig, ReduceEvery, ZeroEngine
from hunyuan_train.parallel.mesh import DIMS, JOINED, Axes, build_axes, mesh_shape

# Written out again: neither the order of the dims nor what acts as one may change unnoticed.
ORDER = ("dp_replicate", "dp_shard", "cp_ring", "cp_ulysses", "tp")
SPANS = {
    **{name: (name, name) for name in ORDER},
    "dp": ("dp_replicate", "dp_shard"),
    "cp": ("cp_ring", "cp_ulysses"),
    "zero": ("dp_shard", "cp_ulysses"),
    "grads": ("dp_replicate", "cp_ulysses"),
    "model": ("cp_ring", "tp"),
}
AXES = tuple(SPANS)
WORLDS = [
    (512, {"tp": 8, "sp": True, "cp_ring": 2, "cp_ulysses": 2, "dp_replicate": 2}),
    (512, {"cp_ring": 8}),
    (4096, {"tp": 2, "cp_ring": 4, "cp_ulysses": 8, "dp_replicate": 8}),
    (16384, {"tp": 4, "sp": True, "cp_ring": 8, "cp_ulysses": 2, "dp_replicate": 16}),
    (4096, {}),
]


def stride_and_size(axis: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """Return how far apart neighbours on an axis are, and how many ranks it has."""
    first, last = (ORDER.index(name) for name in SPANS[axis])
    return math.prod(shape[last + 1 :]), math.prod(shape[first : last + 1])


def expected_group(axis: str, shape: tuple[int, ...], rank: int) -> tuple[int, list[int]]:
    """Return the position of ``rank`` on an axis and the ranks that share the others with it."""
    stride, size = stride_and_size(axis, shape)
    place = rank // stride % size
    first = rank - place * stride
    return place, list(range(first, first + size * stride, stride))


def _seen_by(world: int, fields: dict[str, Any], ranks: list[int]) -> list[dict[str, Any]]:
    """Build the axes as each of ``ranks`` and return what it is told; runs in a child."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    seen = []
    for rank in ranks:
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
        axes = build_axes(ParallelConfig(**fields), "cpu", world)
        assert axes.mesh is not None
        assert axes.zero_mesh is not None
        groups = {name: dist.get_process_group_ranks(axes.group(name)) for name in AXES}
        zero = axes.zero_mesh["dp_replicate", "zero"]
        seen.append(
            {
                "shape": tuple(axes.mesh.mesh.shape),
                "all_ranks": axes.mesh.mesh.flatten().tolist() if rank == ranks[0] else None,
                "joined": {name: mesh.mesh.tolist() for name, mesh in axes.joined.items()},
                "groups": groups,
                "group_rank": {name: axes.group(name).rank() for name in AXES},
                "sizes": {name: axes.size(name) for name in AXES},
                "ranks": {name: axes.rank(name) for name in AXES},
                "zero": dist.get_process_group_ranks(zero.get_group("zero")),
                "replicas": dist.get_process_group_ranks(zero.get_group("dp_replicate")),
                "sequence_axis": axes.sequence_axis,
                "is_writer": axes.is_writer,
            }
        )
        dist.destroy_process_group()
    return seen


def seen_by(world: int, fields: dict[str, Any], ranks: list[int]) -> list[dict[str, Any]]:
    with ProcessPoolExecutor(1, mp_context=mp.get_context("forkserver")) as pool:
        return pool.submit(_seen_by, world, fields, ranks).result(timeout=120)


@pytest.mark.dist
@pytest.mark.parametrize(("world", "fields"), WORLDS, ids=lambda value: str(value))
def test_ranks_of_a_big_world_find_their_groups(world: int, fields: dict[str, Any]) -> None:
    sample = [0, 37, world // 2, world - 1]
    shape = mesh_shape(ParallelConfig(**fields), world)
    seen = seen_by(world, fields, sample)
    assert DIMS == ORDER
    assert set(AXES) == {*DIMS, *JOINED}
    assert seen[0]["all_ranks"] == list(range(world))  # in order: the last axis is innermost
    for rank, found in zip(sample, seen, strict=True):
        assert found["shape"] == shape
        for axis in AXES:
            place, group = expected_group(axis, shape, rank)
            assert found["groups"][axis] == group, axis
            assert found["sizes"][axis] == len(group), axis
            assert found["ranks"][axis] == found["group_rank"][axis] == place, axis
        assert found["joined"] == {name: found["groups"][name] for name in JOINED}
        assert found["zero"] == found["groups"]["zero"]
        assert found["replicas"] == found["groups"]["dp_replicate"]
        assert found["sequence_axis"] == ("model" if fields.get("sp") else "cp")
        assert found["is_writer"] == (found["ranks"]["model"] == 0)


@pytest.mark.parametrize(("world", "fields"), WORLDS, ids=lambda value: str(value))
@pytest.mark.parametrize("axis", AXES)
def test_groups_of_an_axis_partition_the_world(
    world: int, fields: dict[str, Any], axis: str
) -> None:
    """The groups that the ranks above find are the rows of one regrouping of all ranks."""
    shape = mesh_shape(ParallelConfig(**fields), world)
    first, last = (ORDER.index(name) for name in SPANS[axis])
    inside = list(range(first, last + 1))
    rest = [dim for dim in range(len(ORDER)) if dim not in inside]
    stride, size = stride_and_size(axis, shape)
    groups = torch.arange(world).view(shape).permute(*rest, *inside).reshape(-1, size)
    assert torch.equal(groups, groups[:, :1] + stride * torch.arange(size))
    assert torch.equal(groups.flatten().sort().values, torch.arange(world))
    for row in groups[:: max(1, len(groups) // 8)].tolist():
        assert all(expected_group(axis, shape, rank)[1] == row for rank in row[:3])


@pytest.mark.dist
def test_all_ranks_of_a_small_world_agree_on_who_is_with_whom() -> None:
    fields = {"tp": 2, "sp": True, "cp_ring": 2, "cp_ulysses": 3, "dp_replicate": 2}
    world = 48  # dp_shard is 2
    seen = seen_by(world, fields, list(range(world)))
    for axis in AXES:
        groups = [found["groups"][axis] for found in seen]
        assert sorted(r for group in {tuple(g) for g in groups} for r in group) == [*range(world)]
        for rank, group in enumerate(groups):
            assert rank in group
            assert all(groups[other] == group for other in group)
    places = {tuple(found["ranks"][axis] for axis in DIMS) for found in seen}
    assert len(places) == world
    assert sum(found["is_writer"] for found in seen) == world // (2 * 2 * 3)


def test_a_process_alone_has_one_rank_on_every_axis() -> None:
    axes = Axes.alone()
    assert [axes.size(axis) for axis in AXES] == [1] * len(AXES)
    assert [axes.rank(axis) for axis in AXES] == [0] * len(AXES)
    assert axes.is_writer
    assert axes.sequence_axis == "cp"
    with pytest.raises(AssertionError, match="has no groups"):
        axes.group("tp")


@pytest.mark.parametrize(
    ("world", "fields", "message"),
    [
        (
            8,
            {"tp": 3},
            "parallel: tp=3 is 3, which does not divide the world size 8; "
            "choose parallel.tp in 1 2 4 8",
        ),
        (
            12,
            {"tp": 2, "cp_ring": 4},
            "parallel: cp_ring=4 * tp=2 is 8, which does not divide the world size 12; "
            "choose parallel.cp_ring in 1 2 3 6, or parallel.tp in 1 3",
        ),
        (
            4,
            {"dp_replicate": 2, "cp_ulysses": 4},
            "parallel: dp_replicate=2 * cp_ulysses=4 is 8, which does not divide the world size "
            "4; choose parallel.dp_replicate in 1, or parallel.cp_ulysses in 1 2",
        ),
        (
            4,
            {"tp": 3, "cp_ring": 3},
            "parallel: cp_ring=3 * tp=3 is 9, which does not divide the world size 4; "
            "choose sizes whose product is in 1 2 4",
        ),
        (
            1,
            {"tp": 2},
            "parallel: tp=2 is 2, which does not divide the world size 1; choose parallel.tp in 1",
        ),
    ],
)
def test_axes_that_do_not_divide_the_world(
    world: int, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        mesh_shape(ParallelConfig(**fields), world)


SIZES = st.fixed_dictionaries(
    {name: st.integers(1, 6) for name in ("dp_replicate", "cp_ring", "cp_ulysses", "tp")}
)


@settings(max_examples=150, deadline=None)
@given(sizes=SIZES, shard=st.integers(1, 9))
def test_the_shape_is_the_factors_and_its_product_the_world(
    sizes: dict[str, Any], shard: int
) -> None:
    world = math.prod(sizes.values()) * shard
    shape = mesh_shape(ParallelConfig(**sizes), world)
    assert dict(zip(DIMS, shape, strict=True)) == sizes | {"dp_shard": shard}
    assert math.prod(shape) == world


@settings(max_examples=150, deadline=None)
@given(sizes=SIZES, world=st.integers(1, 64))
def test_an_impossible_world_is_told_every_size_that_works(
    sizes: dict[str, Any], world: int
) -> None:
    cfg = ParallelConfig(**sizes)
    if world % math.prod(sizes.values()) == 0:
        assert math.prod(mesh_shape(cfg, world)) == world
        return
    with pytest.raises(ValueError, match="does not divide the world size") as caught:
        mesh_shape(cfg, world)
    offered = dict(re.findall(r"parallel\.(\w+) in ([\d ]+)", str(caught.value)))
    for axis in (name for name, size in sizes.items() if size > 1):
        working = []
        for size in range(1, world + 1):
            others = math.prod(n for name, n in sizes.items() if name != axis)
            if world % (size * others) == 0:
                working.append(size)
                mesh_shape(replace(cfg, **{axis: size}), world)
        assert offered.get(axis, "") == " ".join(map(str, working))


@pytest.mark.parametrize(
    ("model", "fields", "message"),
    [
        (
            {},
            {"tp": 5},
            "parallel.tp=5 * parallel.cp_ulysses=1 is 5, which does not divide model.num_heads=24; "
            "choose a product from 1 2 3 4 6 8 12 24",
        ),
        (
            {},
            {"tp": 8, "cp_ulysses": 2},
            "parallel.tp=8 * parallel.cp_ulysses=2 is 16, which does not divide "
            "model.num_heads=24; choose a product from 1 2 3 4 6 8 12 24",
        ),
        (
            {},
            {"cp_ulysses": 48},
            "parallel.tp=1 * parallel.cp_ulysses=48 is 48, which does not divide "
            "model.num_heads=24; choose a product from 1 2 3 4 6 8 12 24",
        ),
        (
            {"mlp_ratio": 3.34},  # 10260 hidden units
            {"tp": 8},
            "parallel.tp=8 does not divide model.hidden_size * mlp_ratio=10260; "
            "choose from 1 2 3 4 6 12",
        ),
    ],
)
def test_ranks_that_do_not_divide_heads_or_hidden_units(
    model: dict[str, Any], fields: dict[str, Any], message: str
) -> None:
    plan = hunyuan_sharding_plan(HunyuanConfig(**model))
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check_divisors(plan, ParallelConfig(**fields))


@pytest.mark.parametrize("fields", [{"tp": 24}, {"tp": 3, "cp_ulysses": 8}, {"cp_ring": 7}])
def test_what_divides_is_accepted(fields: dict[str, Any]) -> None:
    check_divisors(hunyuan_sharding_plan(HunyuanConfig()), ParallelConfig(**fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"zero_stage": 4}, "parallel.zero_stage=4 is unknown; choose 0 1 2 3"),
        ({"zero_stage": -1}, "parallel.zero_stage=-1 is unknown; choose 0 1 2 3"),
        ({"tp": 0}, "parallel.tp=0 must be at least 1"),
        ({"cp_ring": -2}, "parallel.cp_ring=-2 must be at least 1"),
        ({"cp_ulysses": 0}, "parallel.cp_ulysses=0 must be at least 1"),
        ({"dp_replicate": 0}, "parallel.dp_replicate=0 must be at least 1"),
        (
            {"sp": True},
            "parallel.sp=true works inside tensor parallelism, but parallel.tp=1; "
            "set parallel.tp above 1 or parallel.sp=false",
        ),
        (
            {"compute_dtype": "float16"},
            "parallel.compute_dtype=float16 is unknown; choose float32 bfloat16 float64",
        ),
        (
            {"reduce_dtype": "float64"},
            "parallel.reduce_dtype=float64 is unknown; choose float32 bfloat16",
        ),
        (
            {"zero_stage": 0, "compute_dtype": "bfloat16"},
            "parallel.zero_stage=0 keeps no float32 master weights, so it cannot be combined with "
            "parallel.compute_dtype=bfloat16; choose zero_stage 1 2 3",
        ),
        (
            {"zero_stage": 1, "reduce_every": ReduceEvery.micro_step},
            "parallel.reduce_every=micro_step keeps gradient shards, which parallel.zero_stage=1 "
            "does not have; choose zero_stage 2 3",
        ),
        (
            {"zero_stage": 0, "zero_engine": ZeroEngine.deepspeed},
            "parallel.zero_engine=deepspeed shards at least the optimizer; choose "
            "parallel.zero_stage 1 2 3, or zero_engine=torch for stage 0",
        ),
        (
            {"dp_replicate": 2, "zero_engine": ZeroEngine.deepspeed},
            "parallel.dp_replicate=2 (HSDP) is not offered with parallel.zero_engine=deepspeed; "
            "choose dp_replicate=1 or zero_engine=torch",
        ),
        (
            {"compute_dtype": "float64", "zero_engine": ZeroEngine.deepspeed},
            "parallel.compute_dtype=float64 is not offered with parallel.zero_engine=deepspeed; "
            "choose float32 bfloat16",
        ),
        (
            {"reduce_every": ReduceEvery.step, "zero_engine": ZeroEngine.deepspeed},
            "parallel.reduce_every=step is not what parallel.zero_engine=deepspeed does in "
            "parallel.zero_stage=3; choose auto micro_step",
        ),
        (
            {"offload_optimizer": Offload.cpu},
            "parallel.offload_optimizer=cpu needs parallel.zero_engine=deepspeed; set it, or "
            "offload_optimizer=none",
        ),
    ],
)
def test_settings_that_contradict_each_other(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        ParallelConfig(**fields)
