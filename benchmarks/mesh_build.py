"""Time how long one rank needs to lay a big world out on the mesh, with a fake process group.

Nothing is sent: the figure is what every rank computes by itself to learn who is in which group.
The communicators themselves, which NCCL makes when a group first talks, are not in it.

    python benchmarks/mesh_build.py
"""

import argparse
import json
import multiprocessing as mp
import platform
import resource
import statistics
import time
from concurrent.futures import ProcessPoolExecutor

import torch
import torch.distributed as dist

from hunyuan_train.parallel.config import ParallelConfig
from hunyuan_train.parallel.mesh import build_axes

WORLDS = (512, 4096, 16384)
LAYOUT = ParallelConfig(tp=2, sp=True, cp_ring=2, cp_ulysses=4, dp_replicate=4)


def build_once(world: int) -> tuple[float, float]:
    """Return the seconds one middle rank builds its axes in, and the peak memory in GiB."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.set_num_threads(1)
    dist.init_process_group("fake", store=FakeStore(), rank=world // 2 + 5, world_size=world)
    started = time.perf_counter()
    axes = build_axes(LAYOUT, "cpu", world)
    seconds = time.perf_counter() - started
    assert axes.size("grads") == world // 2
    dist.destroy_process_group()
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def measure(world: int, repeats: int) -> tuple[float, float]:
    """Return the median seconds and the largest memory of some fresh processes."""
    results = []
    for _ in range(repeats):
        with ProcessPoolExecutor(1, mp_context=mp.get_context("spawn")) as pool:
            results.append(pool.submit(build_once, world).result())
    return statistics.median(seconds for seconds, _ in results), max(gib for _, gib in results)


def main() -> None:
    """Measure and print one JSON object last."""
    formatter = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--device", default="cpu", choices=["cpu"])
    parser.add_argument("--quick", action="store_true", help="one process per world")
    arguments = parser.parse_args()
    figures: dict[str, dict[str, object]] = {}
    for world in WORLDS:
        seconds, gib = measure(world, 1 if arguments.quick else 5)
        print(f"{world:6d} ranks: {seconds:.3f} s, process at {gib:.2f} GiB")
        figures[f"build_s_{world}"] = {"value": seconds}
        figures[f"peak_gib_{world}"] = {"value": gib}
    machine = {"device": platform.machine(), "torch": torch.__version__, "threads": 1}
    print(json.dumps({"benchmark": "mesh_build", "machine": machine, "figures": figures}))


if __name__ == "__main__":
    main()
