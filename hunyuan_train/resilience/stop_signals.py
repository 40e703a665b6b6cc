"""Signals that ask a launcher to end its part of a job."""

import signal
import time
from collections.abc import Sequence
from types import FrameType, TracebackType
from typing import Any

_AGAIN_S = 2.0
"""A second signal after this long means to end at once, without saving."""


class StopSignals:
    """Counts the wishes to end between entering and leaving; a context manager."""

    def __init__(self, names: Sequence[str]) -> None:
        """Prepare to listen to ``names``, and to what a terminal or a scheduler sends."""
        self.count = 0
        self._last_s = 0.0
        self._numbers = {signal.Signals[n] for n in (*names, "SIGINT", "SIGTERM", "SIGHUP")}
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        """Install the handlers."""
        for number in self._numbers:
            self._before[number] = signal.signal(number, self._asked)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Restore the handlers that were there before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _asked(self, number: int, frame: FrameType | None) -> None:
        # A scheduler may signal the process, its group and its job at once: that is one wish.
        if not self.count or time.monotonic() - self._last_s > _AGAIN_S:
            self.count += 1
            self._last_s = time.monotonic()
