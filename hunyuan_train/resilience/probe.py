"""What a pre-flight check can only measure with torch and other ranks; ``doctor`` runs it.

``python -m hunyuan_train.resilience.probe FILE`` on every rank: rank 0 writes what was measured.
"""

import json
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from hunyuan_train.runtime.device import synchronize
from hunyuan_train.runtime.dist import World, close_world, gather_objects, init_world
from hunyuan_train.runtime.env import read_node

_BYTES = 4 << 20
_LIMIT_S = 2.0
_TIMEOUT_S = 60.0


def measure(world: World) -> dict[str, float]:
    """Return the speed of this rank's matrix products and of an all-reduce over all ranks.

    ``allreduce_mib_s`` is the bus bandwidth: what each rank sends, 2 (n - 1) / n times the tensor,
    over the time.
    """
    size, dtype = (4096, torch.bfloat16) if world.device.type == "cuda" else (512, torch.float32)
    left = torch.ones(size, size, dtype=dtype, device=world.device)
    product_s = _fastest(lambda: left @ left, world, repeats=8)
    values = torch.ones(_BYTES // 4, device=world.device)
    reduce_s = _fastest(lambda: dist.all_reduce(values), world, repeats=8)
    share = 2 * (world.size - 1) / world.size
    return {
        "node": read_node(),
        "matmul_gflops": 2 * size**3 / product_s / 1e9,
        "allreduce_mib_s": share * _BYTES / (1 << 20) / reduce_s,
    }


def _fastest(work, world: World, repeats: int) -> float:  # pyright: ignore[reportMissingParameterType]
    """Return the seconds of the fastest of some repeats; all ranks do as many."""
    best, spent = float("inf"), 0.0
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        synchronize(world.device)
        seconds = time.perf_counter() - started
        best, spent = min(best, seconds), spent + seconds
        if max(gather_objects(spent)) > _LIMIT_S:
            break
    return best


def main(target: Path) -> None:
    """Measure, and write the rows of all ranks to ``target``."""
    world = init_world("auto", _TIMEOUT_S)
    rows = gather_objects(measure(world))
    if world.rank == 0:
        temporary = target.with_suffix(".tmp")
        temporary.write_text(json.dumps(rows))
        temporary.replace(target)
    close_world()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
