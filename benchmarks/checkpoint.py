"""Measure what a checkpoint costs training: asynchronous, by torch.save and by plain dcp.save.

Two ranks hold 1 GB of sharded float32 tensors each and train: matrix products that keep one core
per rank busy, and a small all-reduce per step. On this machine everything competes with that: the
copy for memory bandwidth, and the writer processes for the cores, since the ranks use as many as
there may be. So two costs are given: the stall, which is the time inside ``save`` and ``poll`` on
the slowest rank, and ``steps_slower_while_writing``, how much longer steps take meanwhile. A GPU
trains on while its cores write; there only the stall counts. Others who use the machine lengthen
the stall; ``stall_in_save_processor_s`` is the part of it that the rank itself computed. The three
ways save in turn.

    python benchmarks/checkpoint.py
    python benchmarks/checkpoint.py --quick
"""

import argparse
import json
import multiprocessing as mp
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from hunyuan_train.checkpoint.config import CheckpointConfig
from hunyuan_train.checkpoint.load import flatten
from hunyuan_train.checkpoint.manager import CheckpointManager
from hunyuan_train.checkpoint.tensor_digest import digest_box

RANKS = 2
STALL_TARGET_S, SHARE_TARGET = 0.2, 0.02
ROWS, COLUMNS = 2048, 4096
"""Of this rank's part of a tensor: 32 MiB."""


def timed(action: Callable[[], Any]) -> float:
    """Return the seconds of one call."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def slowest(seconds: float) -> float:
    """Return the largest of all ranks' seconds."""
    value = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return value.item()


class Training:
    """Steps that keep a core busy and change the state."""

    def __init__(self, parts: int) -> None:
        mesh = init_device_mesh("cpu", (RANKS,))
        self.local = [torch.randn(ROWS, COLUMNS) for _ in range(parts)]
        wrapped = [DTensor.from_local(t, mesh, [Shard(0)], run_check=False) for t in self.local]
        self.state = {"model": {f"w{i:02}": tensor for i, tensor in enumerate(wrapped)}}
        self._factor = torch.randn(640, 640)
        self._steps = 0

    def step(self) -> None:
        """Multiply for about a tenth of a second, change one tensor, agree with the other rank."""
        for _ in range(6):
            self._factor = torch.nn.functional.normalize(self._factor @ self._factor)
        self._steps += 1
        self.local[self._steps % len(self.local)][0] += 1.0
        dist.all_reduce(torch.ones(8))

    def run(self, seconds: float) -> list[float]:
        """Train for ``seconds`` by the first rank's clock and return the seconds of each step."""
        took: list[float] = []
        left = torch.ones(1)
        end = time.perf_counter() + seconds
        while left.item():
            took.append(timed(self.step))
            left.fill_(time.perf_counter() < end)
            dist.broadcast(left, 0)
        return took


def train_and_save(manager: CheckpointManager, training: Training, step: int, every: float) -> dict:
    """Save once and train on for ``every`` seconds, asking at each step whether it is there."""
    dist.barrier()
    computing = time.thread_time()
    stall = timed(lambda: manager.save(step, training.state, {}))
    computing = time.thread_time() - computing
    stall_all, busy, free = slowest(stall), [], []
    end, done = time.perf_counter() + every, None
    left = torch.ones(1)
    while left.item() or done is None:
        took = timed(training.step)
        asked = time.perf_counter()
        outcomes = manager.poll()
        stall += time.perf_counter() - asked
        (busy if done is None else free).append(took)
        if outcomes:
            done = outcomes[0]
        left.fill_(time.perf_counter() < end or done is None)
        dist.broadcast(left, 0)
        if not left.item():
            # The first rank knows; the others learn within the same step or the next.
            while done is None:
                done = next(iter(manager.finish()), None)
    assert done is not None
    assert not done.failure, done.failure
    return {
        "stall": slowest(stall),
        "in_save": stall_all,
        "computing": slowest(computing),
        "seconds": slowest(done.seconds),
        "slower": statistics.mean(busy) / statistics.median(free) - 1 if free else None,
        "lost": slowest(sum(busy) - len(busy) * statistics.median(free)) if free else None,
    }


def save_plainly(training: Training, folder: Path, rank: int) -> float:
    """Return the seconds of torch.save of this rank's part into a file of its own, with fsync."""

    def save() -> None:
        folder.mkdir(exist_ok=True)
        with (folder / f"{rank}.pt").open("wb") as stream:
            torch.save({str(i): t for i, t in enumerate(training.local)}, stream)
            stream.flush()
            os.fsync(stream.fileno())

    dist.barrier()
    return slowest(timed(save))


def save_by_dcp(training: Training, folder: Path) -> float:
    """Return the seconds of dcp.save of the same tensors."""
    dist.barrier()
    return slowest(timed(lambda: dcp.save(flatten(training.state), checkpoint_id=folder)))


def digest_speeds(tensor: Tensor) -> dict[str, float]:
    """Return GB/s of the digest on one core."""
    speeds = {}
    for dtype in (torch.float32, torch.bfloat16):
        values = tensor.to(dtype)
        best = min(timed(lambda values=values: digest_box(values, (0, 0))) for _ in range(5))
        speeds[str(dtype).removeprefix("torch.")] = values.nbytes / best / 1e9
    return speeds


def measure(rank: int, folder: Path, parts: int, every: float, repeats: int) -> dict[str, Any]:
    """Measure on one rank; figures of the slowest."""
    training = Training(parts)
    manager = CheckpointManager(folder / "ours", CheckpointConfig(keep_last=2), {})
    start = timed(lambda: manager.start(training.state))
    alone = training.run(max(every / 3, min(every, 4.0)))
    rounds: list[dict[str, Any]] = []
    for repeat in range(repeats):
        ours = train_and_save(manager, training, repeat + 1, every)
        ours["torch"] = save_plainly(training, folder / "torch", rank)
        ours["dcp"] = save_by_dcp(training, folder / f"dcp-{repeat}")
        rounds.append(ours)
        if rank == 0:
            shutil.rmtree(folder / f"dcp-{repeat}")
    manager.close()
    plain = CheckpointManager(folder / "ours", CheckpointConfig(digests=False), {})
    for tensor in training.local:
        tensor.zero_()
    with_digests = slowest(timed(lambda: manager.restore(training.state)))
    without = slowest(timed(lambda: plain.restore(training.state)))
    return {
        "rounds": rounds,
        "start": slowest(start),
        "step": statistics.median(alone),
        "restore": with_digests,
        "restore_without_digests": without,
        "digest": digest_speeds(training.local[0]) if rank == 0 else None,
        "gigabytes": sum(t.nbytes for t in training.local) / 1e9,
    }


def rank_main(rank: int, folder: str, parts: int, every: float, repeats: int) -> None:
    """Run as one rank and leave the figures in the folder."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "store"), RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    result = measure(rank, Path(folder), parts, every, repeats)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(result))
    dist.destroy_process_group()


def in_processes(folder: str, *args: Any) -> dict[str, Any]:
    """Run both ranks and return the first one's figures."""
    context = mp.get_context("spawn")
    processes = [context.Process(target=rank_main, args=(r, folder, *args)) for r in range(RANKS)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise RuntimeError("a rank failed; its traceback is above")
    return json.loads((Path(folder) / "0.json").read_text())


def at_most(value: float, target: float) -> dict[str, Any]:
    """Return a figure with its target."""
    return {"value": value, "target": f"<= {target}", "holds": value <= target}


def figures_of(found: dict[str, Any], every: float) -> dict[str, Any]:
    """Return medians over the rounds."""
    rounds = found["rounds"]

    def median(name: str) -> float | None:
        values = [row[name] for row in rounds if row[name] is not None]
        return statistics.median(values) if values else None

    stall = median("stall") or 0.0
    return {
        "stall_s": at_most(stall, STALL_TARGET_S),
        "stall_share_at_30_s": at_most(stall / 30, SHARE_TARGET),
        "stall_in_save_s": {"value": median("in_save")},
        "stall_in_save_processor_s": {"value": median("computing")},
        "stall_of_first_save_s": {"value": rounds[0]["stall"]},
        "stall_torch_save_s": {"value": median("torch")},
        "stall_dcp_save_s": {"value": median("dcp")},
        "start_s": {"value": found["start"]},
        "on_disk_after_s": {"value": median("seconds")},
        "steps_slower_while_writing": {"value": median("slower")},
        "lost_to_the_writer_s": {"value": median("lost")},
        "digest_gb_s": {"value": found["digest"]["float32"]},
        "digest_bfloat16_gb_s": {"value": found["digest"]["bfloat16"]},
        "restore_s": {"value": found["restore"]},
        "restore_without_digests_s": {"value": found["restore_without_digests"]},
        "step_s": {"value": found["step"]},
        "gigabytes_per_rank": {"value": found["gigabytes"]},
        "seconds_between_saves": {"value": every},
    }


def main() -> None:
    """Measure and print one JSON object last."""
    formatter = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--quick", action="store_true", help="32 MiB per rank, one round")
    parser.add_argument("--rounds", type=int, help="saves of each kind; 3, or 1 if quick")
    parser.add_argument("--parts", type=int, help="tensors of 32 MiB per rank; 30, or 1 if quick")
    parser.add_argument("--every", type=float, help="seconds from save to save; 30, or 1 if quick")
    parser.add_argument("--folder", help="where to write; a temporary folder by default")
    arguments = parser.parse_args()
    parts, every, repeats = (1, 1.0, 1) if arguments.quick else (30, 30.0, 3)
    parts, every = arguments.parts or parts, arguments.every or every
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        found = in_processes(folder, parts, every, arguments.rounds or repeats)
    machine = {
        "device": platform.machine(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "load_at_the_end": os.getloadavg()[0],
    }
    figures = figures_of(found, every)
    print(json.dumps({"benchmark": "checkpoint", "machine": machine, "figures": figures}))


if __name__ == "__main__":
    main()
