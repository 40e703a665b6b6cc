"""When a checkpoint is due, by steps and by the clock, with the same answer on every rank."""

import time
from collections.abc import Callable

from hunyuan_train.checkpoint.config import CheckpointConfig
from hunyuan_train.checkpoint.ranks import Ranks

_MOST_STEPS = 20
"""Steps between two questions at most: the next bucket may take many times as long."""


class Cadence:
    """Every so many steps, and every so many seconds by the first rank's clock.

    Clocks and paces differ, so the first rank decides. It is not asked after every step: it answers
    either "now" or after how many steps to ask again, half of those it expects to be left.
    """

    def __init__(
        self, cfg: CheckpointConfig, ranks: Ranks, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Start the clock."""
        self._cfg, self._ranks, self._clock = cfg, ranks, clock
        self._saved_at = clock()
        self._asked: tuple[int, float] | None = None
        self._ask_at = 0

    def due(self, step: int) -> bool:
        """Return whether a checkpoint is due after ``step`` updates; every rank asks each step."""
        by_steps = self._cfg.every_steps > 0 and step > 0 and step % self._cfg.every_steps == 0
        if self._cfg.every_s == 0 or by_steps or step < self._ask_at:
            return by_steps
        now, wait = self._clock(), 1
        left = self._saved_at + self._cfg.every_s - now
        if left > 0 and self._asked is not None and step > self._asked[0]:
            pace = (now - self._asked[1]) / (step - self._asked[0])
            wait = max(1, int(min(left / max(pace, 1e-9) / 2, _MOST_STEPS)))
        self._asked = (step, now)
        due, wait = self._ranks.from_first((left <= 0, wait))
        self._ask_at = step + wait
        return due

    def went_back(self) -> None:
        """Ask anew in the next step: the steps counted so far come again."""
        self._asked, self._ask_at = None, 0

    def saved(self) -> None:
        """Start the clock anew: a checkpoint has begun."""
        self._saved_at = self._clock()
        self._ask_at = 0
