"""Where the time of a training process goes: a few events that the goodput accounting reads.

Free of torch. Time is booked in laps: whatever passed since the lap before belongs to the named
part, so the parts add up to the whole. Only the first rank writes.
"""

import os
import time
from pathlib import Path

from hunyuan_train.resilience.events import EventKind, Events
from hunyuan_train.resilience.heartbeat import process_start

EVERY_S = 10.0
"""Least seconds between two progress events while nothing else asks for one."""

STEP, DATA, PARTIAL, REFUSED, OTHER = "step", "data", "partial", "refused", "other"
"""Parts of the loop: computing, waiting for data, an update that was not finished or not kept."""


class Clock:
    """Books the time of one stage in one process."""

    def __init__(
        self, run_dir: str | Path, stage: str, rank: int, *, every_s: float = EVERY_S
    ) -> None:
        """Say that the stage begins, and when this process did.

        Args:
            run_dir: Folder of the job, where its events are.
            stage: What tells this stage from the job's others; empty for a job of one.
            rank: Of this process.
            every_s: Least seconds between two progress events.
        """
        self._events = Events(run_dir, rank=rank) if rank == 0 else None
        self._stage, self._every_s = stage, every_s
        self._step = self._after = 0
        self._parts: dict[str, float] = {}
        self._last = self._told = time.perf_counter()
        pid = os.getpid()
        ticks = process_start(pid)[1]
        hertz = os.sysconf("SC_CLK_TCK")
        age_s = max(time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / hertz, 0.0)
        self._emit(EventKind.begin, process=f"{pid}.{ticks}", started=time.time() - age_s)

    def ready(self, step: int, restore_s: float = 0.0) -> None:
        """Training goes on: what was booked so far, apart from the restore, was the start.

        Args:
            step: Updates done.
            restore_s: Part of the start that brought the state back.
        """
        self.lap(OTHER)
        self._emit(EventKind.ready, step=step, restore_s=restore_s, start=self._take())
        self._step = self._after = step
        self._told = self._last

    def lap(self, part: str) -> None:
        """Book the time since the last lap under ``part``."""
        now = time.perf_counter()
        self._parts[part] = self._parts.get(part, 0.0) + now - self._last
        self._last = now

    def move(self, source: str, part: str, seconds: float) -> None:
        """Book up to ``seconds`` of what is under ``source`` under ``part`` instead."""
        seconds = min(max(seconds, 0.0), self._parts.get(source, 0.0))
        self._parts[source] = self._parts.get(source, 0.0) - seconds
        self._parts[part] = self._parts.get(part, 0.0) + seconds

    def done(self, step: int, *, tell: bool = False) -> None:
        """Take note of a finished update; with ``tell``, or after ``every_s``, write an event."""
        self._step = step
        if tell or self._last - self._told >= self._every_s:
            self.tell()

    def rewound(self, step: int) -> None:
        """Take note that the updates after ``step`` will be done again."""
        self.tell()
        self._step = self._after = step
        self.tell()

    def tell(self) -> None:
        """Write what was booked since the last event."""
        self._told = self._last
        self._advance(EventKind.progress)

    def leave(self, error: BaseException | None) -> None:
        """Say that this stage's loop is over, by itself or by an exception."""
        self.lap(PARTIAL if error is not None else OTHER)
        name = type(error).__name__ if error is not None else ""
        self._advance(EventKind.leave, error=name)

    def _advance(self, kind: EventKind, **fields: object) -> None:
        self._emit(kind, after=self._after, step=self._step, parts=self._take(), **fields)
        self._after = self._step

    def _take(self) -> dict[str, float]:
        parts, self._parts = self._parts, {}
        return {name: round(seconds, 6) for name, seconds in parts.items() if seconds > 0}

    def _emit(self, kind: EventKind, **fields: object) -> None:
        if self._events is not None:
            self._events.emit(kind, stage=self._stage, **fields)
