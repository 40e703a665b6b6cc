"""What tests do to the processes that write checkpoints: stop them, wait for them, end them."""

import os
import signal
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path


def until(condition: Callable[[], object], timeout_s: float = 60.0) -> None:
    """Wait until ``condition`` holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


def gone(pid: int) -> bool:
    """Whether a process has ended."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return True
    return state == "Z"


@contextmanager
def held(pid: int):
    """Keep a process from doing anything."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def being_written(folder: Path, least: int = 1) -> bool:
    """Whether a file of an unfinished checkpoint has ``least`` bytes."""
    files = list(folder.glob("step-*.incomplete/*.distcp"))
    return any(path.stat().st_size >= least for path in files if path.exists())
