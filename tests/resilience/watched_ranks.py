"""Ranks that train nothing but mark their phases and meet in gloo collectives, with faults."""

import multiprocessing as mp
import os
import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from hunyuan_train.resilience.config import ResilienceConfig
from hunyuan_train.resilience.heartbeat import Heartbeat, beat_path, read_beat

BUCKET = "17x256x256"
SETTINGS = ResilienceConfig(watchdog_s=2, watchdog_min_s=1, stall_factor=10)


def hang(fault: str) -> None:
    """Never return."""
    if fault == "loop":
        while True:
            pass
    if fault == "gil":
        sum(range(10**15))  # one C call: no other thread gets the interpreter's lock
    if fault == "sleep":
        while True:
            time.sleep(1000)


def burn(seconds: float) -> None:
    """Compute for some processor time."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def _main(rank: int, world: int, run_dir: str, fault: str, culprit: int, at: int) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    with Heartbeat(run_dir, 0, rank) as heart:
        store = dist.FileStore(f"{run_dir}/store", world)
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=120)
        )
        values, started = torch.ones(8), time.monotonic()
        for step in range(1, 10**9):
            heart.phase("data")
            for _ in range(2):
                heart.phase("forward", BUCKET)
                values = values / values.norm()
                if rank == culprit and step == at:
                    hang(fault)
                dist.all_reduce(values)
                heart.phase("backward", BUCKET)
                dist.all_reduce(values)
            heart.phase("update")
            time.sleep(0.002)
            burn(0.008 if fault == "slow" and rank == culprit else 0.004)
            if rank == culprit and step == at and fault == "raise":
                raise RuntimeError("on purpose")
            heart.beat(step, time.monotonic() - started)
            started = time.monotonic()
            if fault == "save" and step == at and rank == culprit:
                with heart.phase("save"):
                    time.sleep(3)
            if fault == "end" and step == at:
                break
        dist.barrier()
    os._exit(0)


class Ranks:
    """Some ranks in processes of their own; a context manager that ends them."""

    def __init__(
        self, run_dir: Path, world: int, fault: str = "", culprit: int = -1, at: int = 0
    ) -> None:
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(["torch", "torch.distributed"])
        self.run_dir = run_dir
        self.processes: list[Any] = [
            context.Process(
                target=_main, args=(rank, world, str(run_dir), fault, culprit, at), daemon=True
            )
            for rank in range(world)
        ]

    def __enter__(self) -> "Ranks":
        for process in self.processes:
            process.start()
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
            process.join(10)

    def send(self, rank: int, number: signal.Signals) -> None:
        os.kill(self.processes[rank].pid, number)

    def wait_for_step(self, rank: int, step: int, timeout_s: float = 60) -> None:
        """Wait until a rank has done ``step`` updates."""
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            beat = read_beat(beat_path(self.run_dir, 0, rank))
            if beat is not None and beat.step >= step:
                return
            time.sleep(0.005)
        raise AssertionError(f"rank {rank} did not get to step {step}: {beat}")
