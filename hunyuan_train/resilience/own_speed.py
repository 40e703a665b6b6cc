"""How fast this rank's device is now: a fixed piece of work, timed without waiting for it.

On a GPU neither the host's clock nor the stream's tells own work from waiting in a collective. A
matrix product of a fixed size does: a chip that is throttled or broken takes longer for it.
"""

from collections import deque

import torch

_SIZE, _REPEATS = 2048, 16


class OwnSpeed:
    """Times the same matrix products again and again, on a GPU."""

    def __init__(self, device: torch.device) -> None:
        """Allocate the matrices: 16 MiB."""
        self._a = torch.ones(_SIZE, _SIZE, dtype=torch.bfloat16, device=device)
        self._out = torch.empty_like(self._a)
        self._running: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque(maxlen=8)
        self._seconds: float | None = None

    @torch.no_grad()
    def run(self) -> None:
        """Queue the work; call it once per update, where no collective is under way."""
        begin = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(_REPEATS):
            torch.mm(self._a, self._a, out=self._out)
        end.record()
        self._running.append((begin, end))

    def seconds(self) -> float | None:
        """Return what the newest finished run took; None before there is one. Does not wait."""
        while self._running and self._running[0][1].query():
            begin, end = self._running.popleft()
            self._seconds = begin.elapsed_time(end) / 1000
        return self._seconds
