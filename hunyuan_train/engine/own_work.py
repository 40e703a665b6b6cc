"""What a rank's own part of an update took and should take: slow ranks are told by it."""

from collections.abc import Sequence
from typing import cast

import torch

from hunyuan_train.config.root import RunConfig
from hunyuan_train.data.collate import Batch, MicroBatch
from hunyuan_train.engine.denoising import training_flops
from hunyuan_train.engine.task import Task
from hunyuan_train.memory.config import Recompute
from hunyuan_train.memory.recompute import BucketMode
from hunyuan_train.resilience.own_speed import OwnSpeed

_CALLS = 1e8
"""FLOPs of a core in the time that it takes to call the operations of one block and micro-step.

On a small model that is most of the time, whatever the sizes of its batches."""

_PLAIN = BucketMode(Recompute.none, offload=False)


class OwnWork:
    """Own seconds and predicted cost of each update on one rank, in units alike on all ranks.

    On a CPU processor time and FLOPs; on a GPU the time of a fixed piece of work, which costs 1.
    """

    def __init__(self, cfg: RunConfig, device: torch.device, task: Task | None = None) -> None:
        """Prepare; on a GPU allocate the fixed piece of work. Without a task: denoising."""
        model = cfg.model
        blocks = model.num_double_blocks + model.num_single_blocks + model.refiner_depth
        self._cfg, self._task, self._calls = cfg, task, _CALLS * (blocks + 1)
        self._speed = OwnSpeed(device) if device.type == "cuda" else None

    def begin(self) -> None:
        """Call it before an update, when no collective is under way."""
        if self._speed is not None:
            self._speed.run()

    def measure(self, batches: Sequence[MicroBatch]) -> tuple[float | None, float]:
        """Return own seconds (None: take the processor time) and cost of an update.

        Args:
            batches: What this rank computed, also what only kept ranks in step.
        """
        if self._speed is None:
            return None, sum(self._calls + self._flops(batch) for batch in batches)
        seconds = self._speed.seconds()
        return (0.0, 0.0) if seconds is None else (seconds, 1.0)

    def _flops(self, batch: MicroBatch) -> float:
        if self._task is None:
            return training_flops(cast(Batch, batch), self._cfg)
        return self._task.work(batch, _PLAIN).flops
