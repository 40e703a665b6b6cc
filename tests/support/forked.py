"""A verb on several ranks without a launcher, started in a moment and killed at any."""

import multiprocessing as mp
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

PRELOAD = [
    "pytest",
    "torch",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.distributed.checkpoint",
    "distributed",
    "hunyuan_train.cli.main",
    "hunyuan_train.engine.curriculum",
]
"""What the server imports once; every process that is forked from it has it."""


def _rank(verb: str, arguments: list[str], rank: int, ranks: int, port: int, log: str) -> None:
    os.setsid()  # its children, such as writers of checkpoints, are found by its session
    with Path(log).open("a") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    if ranks > 1:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        os.environ |= {name: str(value) for name, value in place.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    from hunyuan_train.cli.main import main

    sys.exit(main([verb, *arguments]))


class Job:
    """The ranks of one verb, each the first of a session."""

    def __init__(self, verb: str, arguments: Sequence[str], ranks: int, log: Path) -> None:
        """Start them; what they print goes to ``log``-RANK."""
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._logs = [Path(f"{log}-{rank}") for rank in range(ranks)]
        log.parent.mkdir(parents=True, exist_ok=True)
        self._ranks: list[Any] = [
            context.Process(
                target=_rank, args=(verb, list(arguments), rank, ranks, port, str(self._logs[rank]))
            )
            for rank in range(ranks)
        ]
        for process in self._ranks:
            process.start()

    @property
    def pids(self) -> list[int]:
        """The process ids of the ranks, in their order."""
        return [process.pid for process in self._ranks]

    def running(self) -> bool:
        """Whether any rank still is."""
        return any(process.is_alive() for process in self._ranks)

    def kill(self) -> None:
        """End all ranks and what they started; all are stopped first, so none sees another go."""
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for process in self._ranks:
                with suppress(ProcessLookupError):  # it has ended, or is not yet a session
                    os.killpg(process.pid, number)
                with suppress(ProcessLookupError):
                    os.kill(process.pid, number)
        for process in self._ranks:
            process.join()

    def end(self, timeout_s: float = 240.0) -> int:
        """Wait until all have ended; return the exit code of the first that failed, or 0.

        When one has failed, the others have a while to do so too.

        Raises:
            AssertionError: they take too long; the message is what was printed.
        """
        deadline = time.monotonic() + timeout_s
        while self.running() and time.monotonic() < deadline:
            wait([process.sentinel for process in self._ranks if process.is_alive()], 1.0)
            if any(process.exitcode for process in self._ranks):
                deadline = min(deadline, time.monotonic() + 20.0)
        failed = [process.exitcode for process in self._ranks if process.exitcode]
        late = self.running()
        if late:
            self.kill()
        assert failed or not late, f"not done after {timeout_s} s\n{self.said()}"
        return failed[0] if failed else 0

    def said(self) -> str:
        """Return what all ranks printed, one after the other."""
        return "\n".join(path.read_text() for path in self._logs if path.exists())

    def wait(self, timeout_s: float = 240.0) -> None:
        """Wait until all have ended well.

        Raises:
            AssertionError: one failed, or they take too long; the message is what was printed.
        """
        code = self.end(timeout_s)
        assert code == 0, f"exit code {code}\n{self.said()[-6000:]}"

    def kill_when(self, when: Callable[[], bool], timeout_s: float = 120.0) -> bool:
        """Kill them once ``when``; return whether they were still running.

        Raises:
            AssertionError: they failed before, or nothing happens.
        """
        deadline = time.monotonic() + timeout_s
        while not when():
            if not self.running():
                self.wait()
                return False
            assert time.monotonic() < deadline, "nothing happened"
            time.sleep(0.002)
        running = self.running()
        self.kill()
        return running
