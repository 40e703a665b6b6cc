"""Where each rank is, line by line: dumps of Python stacks, and what they have in common.

Free of torch. The dump is made by a C-level signal handler, so it also comes from a rank whose main
thread holds the interpreter's lock or sits in a collective.
"""

import faulthandler
import re
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

DUMP_SIGNAL = signal.SIGRTMIN + 7
"""A real-time signal: schedulers, CUDA tools and Python itself leave those alone."""

_files: list[IO[bytes]] = []  # the handler writes to the descriptor: it must stay open

_THREAD = re.compile(r"(?:Current thread|Thread) 0x([0-9a-f]+) .*\(most recent call first\):")
_FRAME = re.compile(r'  File "(.*)", line (\d+|\?\?\?) in (.*)')
_ENGINE = ("torch/autograd/graph.py", "_engine_run_backward")
_LOOK = 6  # frames from the innermost one that may belong to a collective call


def dump_on_signal(path: Path) -> int:
    """Have :data:`DUMP_SIGNAL` append the stacks of all threads to ``path``; return the signal."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("wb", buffering=0)
    faulthandler.register(DUMP_SIGNAL, file=file, all_threads=True, chain=False)
    _files[:] = [file]
    return DUMP_SIGNAL


class Frame(NamedTuple):
    """One call: where it is."""

    file: str
    line: str
    function: str

    def __str__(self) -> str:
        """Return it as tracebacks do."""
        return f"{self.file}:{self.line} in {self.function}"


@dataclass(frozen=True, slots=True)
class Stack:
    """The innermost call first, and what it says the rank is doing."""

    frames: tuple[Frame, ...]
    waits: str
    """``collective``: waits for other ranks; ``backward``: in the autograd engine, which may wait
    for them; ``device``: waits for a GPU; ``code``: in any other code; empty without frames."""


def parse_dump(text: str, main_thread: int = 0) -> Stack:
    """Return the main thread's stack.

    Args:
        text: What one signal wrote; of several, the last one counts.
        main_thread: Identity of the thread; 0 takes the oldest thread, which comes last.
    """
    threads: list[tuple[int, list[Frame]]] = []
    for line in text.splitlines():
        thread, frame = _THREAD.match(line), _FRAME.match(line)
        if thread:
            threads.append((int(thread[1], 16), []))
        elif frame and threads:
            threads[-1][1].append(Frame(*frame.groups()))
    mine = [frames for name, frames in threads if name == main_thread] or [f for _, f in threads]
    if not mine:
        return Stack((), "")
    frames = mine[-1]
    waits = _waits(frames)
    if waits == "backward":  # on a GPU the hooks of backward run in threads of the engine
        others = [_waits(frames) for _, frames in threads]
        waits = "collective" if "collective" in others else waits
    return Stack(tuple(frames), waits)


def _waits(frames: list[Frame]) -> str:
    for depth, frame in enumerate(frames[:_LOOK]):
        if "torch/distributed/" in frame.file:
            return "collective"
        if depth == 0 and frame.file.endswith(_ENGINE[0]) and frame.function == _ENGINE[1]:
            return "backward"
        if depth == 0 and "torch/cuda/" in frame.file:
            return "device"
        if "/torch/" not in frame.file:
            break
    return "code" if frames else ""


def summary(stacks: Mapping[int, Stack], *, depth: int = 12) -> str:
    """Return the stacks of many ranks as text: equal ones once, the rarest first.

    Args:
        stacks: By rank.
        depth: Innermost calls to show of each.
    """
    groups: dict[Stack, list[int]] = {}
    for rank in sorted(stacks):
        groups.setdefault(stacks[rank], []).append(rank)
    parts: list[str] = []
    for stack, ranks in sorted(groups.items(), key=lambda item: (len(item[1]), item[1])):
        lines = [f"  {frame}" for frame in stack.frames[:depth]] or ["  no stack was written"]
        more = len(stack.frames) - depth
        lines += [f"  and {more} outer calls"] if more > 0 else []
        parts.append("\n".join([f"{name_ranks(ranks)}:", *lines]))
    return "\n".join(parts)


def name_ranks(ranks: list[int]) -> str:
    """Return ``rank 3`` or ``ranks 0 1 2``, long lists as ``ranks 0-63 65``."""
    ranges: list[list[int]] = []
    for rank in sorted(ranks):
        if ranges and rank == ranges[-1][-1] + 1:
            ranges[-1].append(rank)
        else:
            ranges.append([rank])
    names = [f"{run[0]}-{run[-1]}" if len(run) > 3 else " ".join(map(str, run)) for run in ranges]
    return ("rank " if len(ranks) == 1 else "ranks ") + " ".join(names)
