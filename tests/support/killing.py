"""End a command with all that it started, as a machine that loses its power does."""

import os
import signal
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path


def family(pid: int) -> list[int]:
    """Return a process and all its descendants, whatever sessions they are in."""
    children: dict[int, list[int]] = defaultdict(list)
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended meanwhile
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            children[parent].append(int(stat.parent.name))
    found = [pid]
    for member in found:
        found += children[member]
    return found


def kill_family(process: subprocess.Popen[str]) -> None:
    """Stop all at once, so that none sees another go, and kill them; torchrun's ranks too."""
    members: list[int] = []
    while (now := family(process.pid)) != members:  # until nothing new is started
        members = now
        for pid in members:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
    for pid in members:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.communicate()


def killed_when(
    command: Sequence[str], when: Callable[[], bool], timeout_s: float = 120.0
) -> float | None:
    """Start a command and kill it once ``when``; return after how long, None if it ended first.

    Raises:
        AssertionError: it failed, or nothing happened in time.
    """
    started = time.monotonic()
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        while not when():
            if process.poll() is not None:
                assert process.returncode == 0, process.communicate()[1]
                return None
            assert time.monotonic() - started < timeout_s, "nothing happened"
            time.sleep(0.005)
    finally:
        kill_family(process)
    return time.monotonic() - started
