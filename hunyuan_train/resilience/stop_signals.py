"""Signals that ask a launcher to end its part of a job."""

import time
from collections.abc import Sequence
from types import FrameType

from hunyuan_train.resilience.signals import SignalHandler

_AGAIN_S = 2.0
"""A second signal after this long means to end at once, without saving."""


class StopSignals(SignalHandler):
    """Counts the wishes to end between entering and leaving; a context manager."""

    def __init__(self, names: Sequence[str]) -> None:
        """Prepare to listen to ``names``, and to what a terminal or a scheduler sends."""
        super().__init__((*names, "SIGINT", "SIGTERM", "SIGHUP"))
        self.count = 0
        self._last_s = 0.0

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Count; a scheduler may signal the process, its group and its job at once: one wish."""
        if not self.count or time.monotonic() - self._last_s > _AGAIN_S:
            self.count += 1
            self._last_s = time.monotonic()
