"""Draws the units of every update."""

from collections.abc import Sequence
from typing import Any

from hunyuan_train.data.balance import StepPlan, Unit
from hunyuan_train.data.config import DataConfig
from hunyuan_train.data.mixture import Cell


class StepPlanner:
    """Draws the units of one update after the other; a pure function of its arguments and state."""

    def __init__(
        self,
        cells: Sequence[Cell],
        costs: Sequence[float],
        batches: Sequence[int],
        cfg: DataConfig,
        seed: int,
        planned_ranks: int,
        micro_steps: int,
    ) -> None:
        raise NotImplementedError

    def next_step(self) -> StepPlan:
        """Draw the next update."""
        raise NotImplementedError

    def rows(self, unit: Unit) -> list[tuple[int, int]]:
        """Return (row of the cell's store, epoch of keyed draws) of each sample of ``unit``."""
        raise NotImplementedError

    def replacement(self, unit: Unit, place: int, attempt: int) -> tuple[int, int]:
        """Return another row of the cell for the sample at ``place``, attempt 0, 1, ..."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, ready for JSON."""
        raise NotImplementedError

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after a saved update."""
        raise NotImplementedError
