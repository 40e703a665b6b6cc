"""Signal handlers that stay for the body of a ``with`` block."""

import logging
import signal
import threading
from collections.abc import Iterable
from types import FrameType, TracebackType
from typing import Any, Self

log = logging.getLogger(__name__)


class SignalHandler:
    """Calls :meth:`on_signal` for some signals between entering and leaving."""

    def __init__(self, names: Iterable[str]) -> None:
        """Prepare to handle the signals ``names``, like SIGTERM."""
        self._numbers = {signal.Signals[name] for name in names}
        self._before: dict[signal.Signals, Any] = {}

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Note that signal ``number`` came; it may interrupt any line of the main thread."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        """Install the handler; outside the main thread Python allows none."""
        if threading.current_thread() is not threading.main_thread():
            log.warning("not in the main thread: preemption signals are not caught")
            return self
        for number in self._numbers:
            self._before[number] = signal.signal(number, self.on_signal)
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
        self._before.clear()
