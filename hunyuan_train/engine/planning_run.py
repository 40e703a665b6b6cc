"""What fits before a run starts: layouts for its buckets on a cluster, and the check of one layout.

The formulas are those of ``memory.estimate`` and ``memory.step_time``; docs/memory.md explains how
to read the answer.
"""

import dataclasses
import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hunyuan_train.config.root import RunConfig
from hunyuan_train.data.buckets import Bucket, BucketTable
from hunyuan_train.data.mixture import cells_of, shares
from hunyuan_train.data.store import META
from hunyuan_train.engine.data import open_stores
from hunyuan_train.engine.footprint import footprint
from hunyuan_train.memory.cluster import ClusterConfig
from hunyuan_train.memory.config import MemoryConfig, Recompute, Switch
from hunyuan_train.memory.estimate import Layout, Work
from hunyuan_train.memory.planner import CLOSE, MODES, Choice, LayoutPlan, Options, Planner, Shape
from hunyuan_train.memory.recompute import BucketMode
from hunyuan_train.parallel.config import ReduceEvery, ZeroEngine
from hunyuan_train.runtime.device import Machine

if TYPE_CHECKING:
    from hunyuan_train.engine.plan_report import RunPlan

log = logging.getLogger(__name__)


def plan_run(cfg: RunConfig) -> "RunPlan":
    """Plan the stage of ``cfg`` on ``cfg.cluster``.

    The buckets are those of the data where there are some, with their shares; else all of the
    table, in equal shares, scaled to ``data.media_shares`` and ``data.anchor_shares``.

    Raises:
        ValueError: no layout fits, or the settings contradict each other.
    """
    from hunyuan_train.engine.plan_report import RunPlan  # draws, which a training run does not

    origin, buckets = planned_buckets(cfg)
    classes = _classes(cfg, buckets)
    planner = Planner(cfg.model, cfg.cluster, search_options(cfg, len(buckets)))
    ranked = planner.rank(list(classes))
    if not ranked:
        raise ValueError(_nothing_fits(cfg, planner, max(classes, key=lambda s: s.img_tokens)))
    chosen = pick(ranked)
    choices = {}
    for choice, members in zip(chosen.choices, classes.values(), strict=True):
        # A class is planned for its largest member, so the others fit with its settings.
        choices |= dict.fromkeys(members, choice)
    return RunPlan(
        cluster=cfg.cluster,
        origin=origin,
        free_bytes=planner.free_bytes,
        classes={shape.name: len(members) for shape, members in classes.items()},
        ranked=ranked,
        chosen=chosen,
        choices=choices,
        overrides=overrides(cfg, chosen, choices),
    )


def pick(ranked: Sequence[LayoutPlan]) -> LayoutPlan:
    """Return the layout of a run: the fastest, or one as fast that offloads and divides less."""
    fastest = ranked[0].gpu_seconds

    def effort(plan: LayoutPlan) -> tuple[float, ...]:
        layout = plan.layout
        offloads = any(choice.work.offload_share for choice in plan.choices)
        return (
            offloads, layout.ranks_per_batch, layout.tp, layout.dp_replicate, plan.gpu_seconds
        )  # fmt: skip

    return min((p for p in ranked if p.gpu_seconds <= CLOSE * fastest), key=effort)


def planned_buckets(cfg: RunConfig) -> tuple[str, dict[Bucket, float]]:
    """Return where the buckets are from, and the share of each in the samples drawn."""
    data = cfg.data
    folders = [source.latents for source in data.sources.values()] or [data.latents]
    found: dict[Bucket, float] = defaultdict(float)
    if any("://" in folder or (folder and (Path(folder) / META).is_file()) for folder in folders):
        cells = cells_of(list(open_stores(cfg).values()), data)
        for cell, share in zip(cells, shares(cells, data), strict=True):
            found[cell.bucket] += float(share)
        return f"the samples in {', '.join(folders)}", dict(found)
    anchors = data.train_anchors or data.anchors
    durations = data.train_durations or data.durations
    wanted = {str(anchor): share for anchor, share in data.anchor_shares.items()}
    for anchor in anchors:
        table = BucketTable([anchor], durations, data.max_aspect, data.bucket_stride).buckets()
        for bucket in table:
            share = wanted.get(str(anchor), 0.0 if wanted else 1.0)
            same_media = sum(other.media == bucket.media for other in table)
            found[bucket] += share / same_media * data.media_shares.get(bucket.media, 1.0)
    return "the bucket table of the config", dict(found)


def search_options(cfg: RunConfig, grids: int) -> Options:
    """Return what a plan may choose from: what ``memory`` leaves open."""
    memory, parallel = cfg.memory, cfg.parallel
    moved = memory.offload_share
    return Options(
        modes=MODES if memory.recompute is Recompute.auto else (memory.recompute,),
        offload_shares=(moved,) if memory.offload is Switch.on else (0.0, moved),
        max_batch=cfg.data.max_batch,
        compute_bytes=_value_bytes(parallel.compute_dtype),
        reduce_bytes=_value_bytes(parallel.reduce_dtype),
        micro_steps=cfg.stage.micro_steps,
        grids=grids,
        kernel=memory.attention.value,
        fused=memory.kernels is not Switch.off,
        states=footprint(cfg),
    )


def layout_of(cfg: RunConfig, world_size: int) -> Layout:
    """Return the layout of ``parallel`` on a world."""
    parallel = cfg.parallel
    several = cfg.stage.micro_steps > 1 or bool(cfg.data.global_samples or cfg.data.global_tokens)
    return Layout(
        world=world_size,
        tp=parallel.tp,
        sp=parallel.sp,
        cp_ring=parallel.cp_ring,
        cp_ulysses=parallel.cp_ulysses,
        dp_replicate=parallel.dp_replicate,
        zero_stage=parallel.zero_stage,
        compute_bytes=_value_bytes(parallel.compute_dtype),
        reduce_bytes=_value_bytes(parallel.reduce_dtype),
        # Adapters are float32 whatever the rest is, so with them fully_shard always casts.
        weight_bytes=4 if cfg.lora.rank else int(footprint(cfg).weight),
        whole_gradients=several and parallel.reduce_every is not ReduceEvery.micro_step,
    )


def check_fits(
    cfg: RunConfig, world_size: int, device: Machine, buckets: Mapping[Bucket, int]
) -> dict[Bucket, BucketMode]:
    """Return how the activations of every bucket are kept: the cheapest that ``memory`` allows.

    Where ``memory`` leaves it open that is the least recompute that fits, and with
    ``memory.offload=auto`` nothing is moved to the host unless all of them are too large without.

    Args:
        cfg: Config of the run.
        world_size: Its ranks.
        device: What one rank has.
        buckets: Largest micro-batch of each bucket.

    Raises:
        ValueError: a bucket does not fit; the message names its size and the nearest that does.
            With ``memory.check_fit=false`` it is a warning, and the bucket keeps what it must.
    """
    options = search_options(cfg, len(buckets))
    planner = _planner_here(cfg, world_size, device, options)
    layout = layout_of(cfg, world_size)
    found: dict[Bucket, BucketMode] = {}
    for bucket, batch in sorted(buckets.items(), key=lambda item: -item[0].tokens * item[1]):
        shape = _shape(cfg, bucket)
        points = {
            mode: planner.measure(layout, shape, _work(cfg, bucket, batch, mode, len(buckets)))
            for mode in modes_allowed(cfg.memory, str(bucket))
        }
        mode = next((mode for mode in points if planner.fits(points[mode].memory)), None)
        if mode is None:
            options = dataclasses.replace(
                options, modes=MODES, offload_shares=(0.0, cfg.memory.offload_share)
            )
            free = _planner_here(cfg, world_size, device, options)
            least = min(points.values(), key=lambda point: point.memory.total)
            problem = _too_large(cfg, free, least, bucket, buckets, device.memory_bytes)
            if cfg.memory.check_fit:
                raise ValueError(problem)
            log.warning("memory.check_fit=false, so this run starts although %s", problem)
            mode = list(points)[-1]
        found[bucket] = mode
    if cfg.parallel.zero_engine is ZeroEngine.deepspeed and cfg.parallel.zero_stage == 3:
        # Its gathers depend on the mode, so that of the bucket that needs most is that of all.
        most = max(found.values(), key=lambda mode: MODES.index(mode.recompute))
        found = dict.fromkeys(found, most)
    return found


def modes_allowed(memory: MemoryConfig, bucket: str) -> list[BucketMode]:
    """Return the ways to keep the activations of ``bucket`` that ``memory`` allows, cheapest first.

    What keeps everything has nothing that could be moved.
    """
    wanted = Recompute(memory.recompute_of.get(bucket, memory.recompute))
    modes = MODES if wanted is Recompute.auto else (wanted,)
    still = [BucketMode(mode, offload=False) for mode in modes]
    moved = [BucketMode(mode, offload=True) for mode in modes if mode is not Recompute.none]
    match memory.offload:
        case Switch.off:
            return still
        case Switch.on:
            return [mode for mode in still if mode.recompute is Recompute.none] + moved
        case Switch.auto:
            return still + moved


def overrides(cfg: RunConfig, plan: LayoutPlan, choices: Mapping[Bucket, Choice]) -> list[str]:
    """Return what sets a run to ``plan``, as arguments of ``train``."""
    modes = [choice.work.recompute for choice in choices.values()]
    usual = max(MODES, key=modes.count)
    others = {
        str(bucket): choice.work.recompute.value
        for bucket, choice in choices.items()
        if choice.work.recompute is not usual
    }
    batches = {str(bucket): choice.work.batch for bucket, choice in choices.items()}
    moved = any(choice.work.offload_share for choice in choices.values())
    return [
        *layout_overrides(plan.layout),
        f"parallel.compute_dtype={cfg.parallel.compute_dtype}",
        f"memory.recompute={usual.value}",
        *([f"memory.recompute_of={_table(others)}"] if others else []),
        f"memory.offload={'auto' if moved else 'off'}",
        f"data.batches={_table(batches)}",
    ]


def layout_overrides(layout: Layout) -> list[str]:
    """Return the fields of ``parallel`` that make a layout."""
    fields = ["tp", "sp", "cp_ring", "cp_ulysses", "dp_replicate", "zero_stage"]
    values = [f"parallel.{name}={str(getattr(layout, name)).lower()}" for name in fields]
    every = "step" if layout.whole_gradients else "micro_step"
    return [*values, f"parallel.reduce_every={every}"]


def _planner_here(cfg: RunConfig, world_size: int, device: Machine, options: Options) -> Planner:
    """Return the search on the ranks that are here, whatever ``cluster`` says of them."""
    per_node = min(world_size, cfg.cluster.gpus_per_node)
    if world_size % per_node:
        per_node = world_size
    here: ClusterConfig = dataclasses.replace(
        cfg.cluster,
        nodes=world_size // per_node,
        gpus_per_node=per_node,
        memory_gib=device.memory_bytes / 2**30,
        host_gib=device.host_bytes / 2**30,
        context_gib=cfg.cluster.context_gib if device.is_gpu else 0.0,
    )
    return Planner(cfg.model, here, options)


def _work(cfg: RunConfig, bucket: Bucket, batch: int, mode: BucketMode, grids: int) -> Work:
    return Work(
        img_tokens=bucket.tokens,
        txt_tokens=cfg.text.length,
        batch=batch,
        recompute=mode.recompute,
        offload_share=cfg.memory.offload_share if mode.offload else 0.0,
        grids=grids,
    )


def _shape(cfg: RunConfig, bucket: Bucket, share: float = 1.0) -> Shape:
    return Shape(
        name=str(bucket), img_tokens=bucket.tokens, txt_tokens=cfg.text.length, share=share
    )


def _classes(cfg: RunConfig, buckets: Mapping[Bucket, float]) -> dict[Shape, list[Bucket]]:
    """Join buckets of like size and equal length; the largest stands for the others."""
    table: list[list[Bucket]] = []
    for bucket in sorted(buckets, key=lambda b: (b.frames, -b.tokens)):
        largest = table[-1][0] if table else None
        if (
            largest is not None
            and largest.frames == bucket.frames
            and bucket.tokens >= 0.8 * largest.tokens
        ):
            table[-1].append(bucket)
        else:
            table.append([bucket])
    return {
        _shape(cfg, members[0], sum(buckets[bucket] for bucket in members)): members
        for members in table
    }


def _too_large(
    cfg: RunConfig,
    planner: Planner,
    point: Choice,
    bucket: Bucket,
    buckets: Mapping[Bucket, int],
    gpu_bytes: float,
) -> str:
    """Say what does not fit and the nearest that does: fewest changes, then least time."""
    need, have = point.memory.total / 2**30, planner.free_bytes / 2**30
    head = (
        f"bucket {bucket} with {point.work.batch} samples needs {need:.1f} GiB per GPU with "
        f"recompute {point.work.recompute.value}, and {have:.1f} of its {gpu_bytes / 2**30:.1f} "
        "GiB can be planned"
    )
    shapes = [_shape(cfg, largest) for largest in {max(buckets, key=lambda b: b.tokens), bucket}]
    now = [*layout_overrides(layout_of(cfg, planner.world)), "memory.offload=off"]
    now.append(f"memory.recompute={cfg.memory.recompute.value}")
    best: tuple[int, float, list[str]] | None = None
    for plan in planner.rank(shapes):
        choice = next(c for c in plan.choices if c.shape.name == str(bucket))
        wanted = layout_overrides(plan.layout)
        if choice.work.offload_share:
            wanted.append("memory.offload=auto")
        if cfg.memory.recompute is not Recompute.auto:
            wanted.append(f"memory.recompute={choice.work.recompute.value}")
        changes = [change for change in wanted if change not in now]
        if choice.work.batch < point.work.batch:
            changes.append(f"data.batches.{bucket}={choice.work.batch}")
        if best is None or (len(changes), plan.gpu_seconds) < best[:2]:
            best = (len(changes), plan.gpu_seconds, changes)
    if best is None:
        return f"{head}; no layout of {planner.world} GPUs holds it, so use more of them"
    return f"{head}; the nearest that fits sets {' '.join(best[2])}"


def _nothing_fits(cfg: RunConfig, planner: Planner, largest: Shape) -> str:
    """Say how much the layout that needs least lacks."""
    work = Work(
        img_tokens=largest.img_tokens, txt_tokens=largest.txt_tokens, recompute=Recompute.full
    )
    points = [
        planner.measure(layout, largest, work).memory
        for layout in planner.layouts(largest.img_tokens)
    ]
    least = min(points, key=lambda memory: memory.total)
    return (
        f"no layout of {cfg.cluster.world} {cfg.cluster.gpu} holds bucket {largest.name}: the "
        f"least needs {least.total / 2**30:.1f} GiB per GPU, {least.states / 2**30:.1f} of them "
        f"model states, and {planner.free_bytes / 2**30:.1f} GiB can be planned; raise "
        "cluster.nodes or choose a cluster with more memory"
    )


def _table(entries: Mapping[str, object]) -> str:
    """Write a table as an override."""
    return "{" + ",".join(f"{name}:{value}" for name, value in entries.items()) + "}"


def _value_bytes(dtype: str) -> int:
    return {"bfloat16": 2, "float32": 4, "float64": 8}[dtype]
