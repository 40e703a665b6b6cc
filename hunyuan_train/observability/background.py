"""A thread for slow work that training must not wait for: encoding samples, uploading them."""

import logging
import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress

log = logging.getLogger(__name__)


class Background:
    """Runs jobs one after the other on a thread of its own; too many are dropped, never waited for.

    A job that raises costs what it would have written, not the run. The thread is a daemon: it
    never keeps a process alive.
    """

    def __init__(self, most: int) -> None:
        """Start the thread with the first job.

        Args:
            most: Jobs that may wait.
        """
        self._jobs: queue.Queue[tuple[str, Callable[[], None]] | None] = queue.Queue(most)
        self._thread: threading.Thread | None = None
        self.dropped = 0
        """Jobs that found no room."""
        self.failed = 0
        """Jobs that raised."""

    def submit(self, what: str, job: Callable[[], None]) -> bool:
        """Have ``job`` run; return False, with a warning, if there is no room for it.

        Args:
            what: What is lost without it, for messages.
            job: Called once, on the thread.
        """
        try:
            self._jobs.put_nowait((what, job))
        except queue.Full:
            self.dropped += 1
            log.warning(
                "%s DROPPED: %d sets of work wait already, the disk or the network is too slow "
                "(%d dropped so far); write fewer, or raise evaluation.max_pending",
                *(what.upper(), self._jobs.maxsize, self.dropped),
            )
            return False
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="evaluation", daemon=True)
            self._thread.start()
        return True

    def close(self, wait_s: float = 60.0) -> None:
        """Finish what waits, for at most ``wait_s``; what is left then is lost, with a warning."""
        if self._thread is None:
            return
        end = time.monotonic() + wait_s
        with suppress(queue.Full):
            self._jobs.put(None, timeout=wait_s)
        self._thread.join(max(end - time.monotonic(), 0.0))
        if self._thread.is_alive():
            log.warning("samples are still being written after %g s; they are given up", wait_s)
        self._thread = None

    def _run(self) -> None:
        while (task := self._jobs.get()) is not None:
            what, job = task
            try:
                job()
            except Exception as error:
                self.failed += 1
                log.warning("%s were not written: %s: %s", what, type(error).__name__, error)
