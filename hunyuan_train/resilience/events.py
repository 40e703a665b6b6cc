"""What happened to a run, over all its attempts: one JSON object per line of events.jsonl.

Free of torch: launchers and reports import it.
"""

import json
import logging
import os
import time
from enum import StrEnum
from pathlib import Path
from typing import Any

from hunyuan_train.runtime.env import read_attempt, read_node

FILE_NAME = "events.jsonl"

log = logging.getLogger(__name__)


class EventKind(StrEnum):
    """The kinds that reports know; others are kept, too."""

    attempt_start = "attempt_start"
    """All ranks of an attempt are about to start; nodes, ranks, layout."""
    attempt_end = "attempt_end"
    """An attempt is over; exit_codes."""
    detected = "detected"
    """A rank is dead, stopped, hung or slow; fault, since (when it failed), sentence."""
    begin = "begin"
    """The first rank's process enters a stage; stage, process, started (when the process was)."""
    ready = "ready"
    """A stage's loop begins; step, restore_s, start (seconds by part)."""
    progress = "progress"
    """Updates from ``after`` to ``step`` are done; parts (where the seconds since the event before
    went)."""
    leave = "leave"
    """A stage's loop is over; after, step, parts, error."""
    restore = "restore"
    """The state came back; source (memory or disk), seconds."""
    save = "save"
    """A checkpoint; stall_s (the loop waited), seconds (until it was complete)."""
    snapshot = "snapshot"
    """A copy in memory; stall_s, seconds."""
    fault = "fault"
    """A drill is about to strike a rank; fault, step, phase."""
    guard = "guard"
    """A loss or gradient was refused; action, loss, norm, samples."""
    replaced = "replaced"
    """A spare took the place of a node."""
    shrink = "shrink"
    """The run goes on with fewer nodes; layout."""
    grow = "grow"
    """The run goes on with more nodes; layout."""
    excluded = "excluded"
    """A node is not used again; why."""
    stop = "stop"
    """The run ended, by itself or not; why."""


class Events:
    """Appends to the events of a run; any process of any attempt may, at the same time.

    A line is one ``write`` in append mode, which local file systems do not interleave. No lock is
    held, because a stopped process would stop all others with it: a writer that looks at the end
    while the line of another is on its way may leave an empty line, and on a network file system
    two nodes can damage each other's line. Readers skip both.
    """

    def __init__(
        self, run_dir: str | Path, attempt: int | None = None, rank: int | None = None
    ) -> None:
        """Prepare; the file is made by the first event.

        Args:
            run_dir: Folder of the run.
            attempt: Number of this start; None asks the environment of the launcher.
            rank: Rank that writes, None for a process above the ranks.
        """
        self.path = Path(run_dir) / FILE_NAME
        self._place = {
            "attempt": read_attempt() if attempt is None else attempt,
            "rank": rank,
            "node": read_node(),
        }

    def emit(self, kind: str, **fields: Any) -> None:
        """Append one event; ``fields`` win over the attempt, rank and node of this writer.

        A full disk costs the event, not the run: that is logged. ``fields`` must be fit for JSON.
        """
        event = {"time": time.time(), "kind": str(kind), **self._place, **fields}
        line = (json.dumps(event) + "\n").encode()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                size = os.fstat(descriptor).st_size
                if size and os.pread(descriptor, 1, size - 1) != b"\n":
                    line = b"\n" + line  # the line before was cut off: do not continue it
                os.write(descriptor, line)
            finally:
                os.close(descriptor)
        except OSError as error:
            log.warning("%s: event %s is lost: %s", self.path, kind, error)


def read_events(run_dir: str | Path) -> list[dict[str, Any]]:
    """Return all whole events of a run in the order they were written; none without a file.

    A line cut by a crash or damaged otherwise is left out, also the last one of a file that is
    being written.
    """
    try:
        data = (Path(run_dir) / FILE_NAME).read_bytes()
    except FileNotFoundError:
        return []
    events: list[dict[str, Any]] = []
    for line in data.split(b"\n"):
        try:
            event = json.loads(line)
        except ValueError:  # also of bytes that are no text
            continue
        if isinstance(event, dict) and {"time", "kind", "attempt"} <= event.keys():
            events.append(event)
    return events
