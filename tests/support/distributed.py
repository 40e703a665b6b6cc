"""Run a function in several processes that form a gloo group.

The processes are forked from a server that has imported torch and our code once, so a job of four
ranks starts in about half a second. They find each other through a file, so no port can be taken.
"""

import multiprocessing as mp
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from forked import PRELOAD


class RankError(AssertionError):
    """A rank failed; the message holds its traceback."""


def _rank_main(
    fn: Callable[..., Any],
    rank: int,
    world: int,
    store_file: str,
    args: tuple[Any, ...],
    pipe: Connection,
    backend: str,
) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        store = dist.FileStore(store_file, world)
        if "nccl" in backend:
            torch.cuda.set_device(rank)
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=world, timeout=timedelta(seconds=60)
        )
        result = fn(rank, world, *args)
        dist.barrier()
        dist.destroy_process_group()
        pipe.send_bytes(pickle.dumps((True, result)))
    except BaseException:
        pipe.send_bytes(pickle.dumps((False, traceback.format_exc())))


def run_distributed(
    fn: Callable[..., Any],
    world: int,
    *args: Any,
    timeout_s: float = 120.0,
    backend: str = "gloo",
) -> list[Any]:
    """Call ``fn(rank, world, *args)`` in ``world`` processes and return the results in rank order.

    ``fn`` must be defined at the top of a module and ``args`` and results must be picklable. The
    first rank that raises ends the others, and its traceback is raised here as :class:`RankError`.
    """
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    results: dict[int, Any] = {}
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        store_file = str(Path(folder) / "store")
        processes: list[Any] = []
        pipes: dict[Connection, int] = {}
        for rank in range(world):
            mine, theirs = context.Pipe(duplex=False)
            process = context.Process(
                target=_rank_main,
                args=(fn, rank, world, store_file, args, theirs, backend),
                daemon=True,
            )
            process.start()
            theirs.close()
            processes.append(process)
            pipes[mine] = rank
        deadline = time.monotonic() + timeout_s
        try:
            while pipes:
                ready = wait(list(pipes), timeout=max(deadline - time.monotonic(), 0))
                if not ready:
                    waiting = sorted(pipes.values())
                    raise RankError(f"ranks {waiting} did not finish in {timeout_s} s")
                for pipe in ready:
                    rank = pipes.pop(pipe)
                    try:
                        good, result = pickle.loads(pipe.recv_bytes())
                    except EOFError:
                        processes[rank].join(5)
                        code = processes[rank].exitcode
                        raise RankError(f"rank {rank} died with exit code {code}") from None
                    if not good:
                        raise RankError(f"rank {rank} of {world} failed:\n{result}")
                    results[rank] = result
        finally:
            for process in processes:
                if len(results) < world:
                    process.terminate()
                process.join(5)
                if process.is_alive():
                    process.kill()
    return [results[rank] for rank in range(world)]
