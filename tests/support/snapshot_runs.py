"""Runs that take snapshots of a made-up state on nodes that are folders."""

import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from hunyuan_train.parallel.layout import fused_slices
from hunyuan_train.parallel.view import WholeView
from hunyuan_train.resilience.config import ResilienceConfig
from hunyuan_train.resilience.slots import node_folder, stored_parts
from hunyuan_train.resilience.snapshots import Snapshots
from hunyuan_train.resilience.state_copy import local_parts


def make(run: Path, rank: int = 0, world: int = 1, per_node: int = 1, **other: Any) -> Snapshots:
    """Return the snapshots of a run whose nodes have folders of their own below ``run``."""
    cfg = ResilienceConfig(snapshot_every=1, snapshot_dir=f"{run}/node{{node}}")
    fixed = {"rank": rank, "world_size": world, "ranks_per_node": per_node, "layout": "plain"}
    return Snapshots(run, cfg, **{**fixed, **other})


def folder(run: Path, node: int) -> Path:
    return node_folder(run, f"{run}/node{{node}}", node)


def state(rank: int, world: int, seed: int) -> dict[str, Any]:
    """Return every kind of tensor a state has, with values of rank and seed."""
    draw = torch.Generator().manual_seed(1000 * rank + seed)
    whole = torch.randn(5, 3, generator=torch.Generator().manual_seed(seed))
    cut = fused_slices((4 * world, 3), 0, (2 * world, 2 * world), rank, world)
    sharded = whole
    if world > 1:
        sharded = distribute_tensor(whole, init_device_mesh("cpu", (world,)), [Shard(0)])
    return {
        "model": {
            "plain": torch.randn(7, generator=draw),
            "sharded": sharded,
            "cut": WholeView.of(torch.randn(4, 3, generator=draw), cut),
            "empty": torch.zeros(0, 4),
        },
        "optimizer": {
            "plain": {
                "step": torch.tensor(float(seed)),
                "exp_avg": torch.randn(9, 3, generator=draw).bfloat16().t(),
            }
        },
    }


def same(left: dict[str, Any], right: dict[str, Any]) -> bool:
    pairs = zip(local_parts(left), local_parts(right), strict=True)
    return all(a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in pairs)


def take_until(snapshots: Snapshots, rank: int, world: int, first: int, last: int) -> None:
    for step in range(first, last + 1):
        assert snapshots.take(step, state(rank, world, step), {"step": step, "rank": rank})
        snapshots.finish()
        dist.barrier() if world > 1 else None


def newest(where: Path, rank: int, copy: bool = False) -> Path:
    name = f"rank-{rank}.copy." if copy else f"rank-{rank}."
    found = [p for p in stored_parts(where) if p[0].name[:-1] == name]
    return max(found, key=lambda entry: entry[1].step)[0]


def taken(run: Path, last: int = 2) -> None:
    snapshots = make(run)
    snapshots.restore(state(0, 1, 0))
    take_until(snapshots, 0, 1, 1, last)
    snapshots.close()


def resume(
    rank: int, world: int, runs: list[tuple[str, int, int]]
) -> list[list[tuple[int, tuple[int, ...], bool]]]:
    """Restore each run (folder, ranks per node, node to lose afterwards) into zeros.

    Returns the step (0: none), whose parts were fetched, and whether all values are those of the
    step. A run that loses a node takes one more snapshot first and is restored again.
    """
    outcomes = []
    for run, per_node, lose in runs:
        outcomes.append([])
        for again in (False, True):
            snapshots = make(Path(run), rank, world, per_node)
            live = state(rank, world, 0)
            restored = snapshots.restore(live)
            step = restored.step if restored else 0
            good = same(live, state(rank, world, step))
            good &= restored is None or restored.counters == {"step": step, "rank": rank}
            outcomes[-1].append((step, restored.fetched if restored else (), good))
            if again or lose < 0:
                snapshots.close()
                break
            take_until(snapshots, rank, world, step + 1, step + 1)
            snapshots.close()
            dist.barrier()
            if rank == 0:
                shutil.rmtree(folder(Path(run), lose))
            dist.barrier()
    return outcomes
