"""What survives a restart."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from hunyuan_train.data.buckets import Bucket
from hunyuan_train.data.loader import BucketLoader
from hunyuan_train.engine.teacher import Teacher
from hunyuan_train.memory.recompute import BucketMode
from hunyuan_train.optim.ema import Ema
from hunyuan_train.optim.updates import Updates, viewed
from hunyuan_train.parallel.apply import ParallelModel
from hunyuan_train.resilience.guard import Guard


@dataclass(kw_only=True)
class TrainState:
    """The state of one training stage. All randomness is keyed, so no generator state is here."""

    model: ParallelModel
    updates: Updates
    ema: Ema
    loader: BucketLoader
    guard: Guard
    skipped_updates: Tensor
    """Updates left out because a gradient was not finite: a float32 scalar on the device."""
    step: int = 0
    """Optimizer updates done, skipped ones included."""
    samples: int = 0
    tokens: int = 0
    modes: Mapping[Bucket, BucketMode] = field(default_factory=dict)
    """What blocks keep of each bucket's micro-batches, as planned for this device; no state."""
    teacher: Teacher | None = None
    """Who says what to predict, instead of the data; frozen, so no state."""

    def weights(self) -> dict[str, dict[str, Tensor]]:
        """Return the live weights and their average, if any, as parts of the whole model."""
        weights = {"model": viewed(self.updates, self.updates.local_weights())}
        if average := self.ema.state_dict():
            weights["ema"] = viewed(self.updates, average)
        return weights

    def tensors(self) -> dict[str, Any]:
        """Return all live tensors to save; filling them in place restores the state."""
        return {
            **self.weights(),
            "optimizer": {
                name: {key: self.updates.view(name, tensor) for key, tensor in moments.items()}
                for name, moments in self.updates.local_moments().items()
            },
            "counters": {"skipped_updates": self.skipped_updates},
        }

    def counters(self) -> dict[str, Any]:
        """Return everything that is not a tensor, ready for JSON."""
        return {
            "step": self.step,
            "samples": self.samples,
            "tokens": self.tokens,
            "loader": self.loader.state_dict(),
            "guard": self.guard.state_dict(),
        }

    def load_counters(self, counters: dict[str, Any]) -> None:
        """Take over what :meth:`counters` returned when the checkpoint was written."""
        self.step = counters["step"]
        self.samples = counters["samples"]
        self.tokens = counters["tokens"]
        self.loader.load_state_dict(counters["loader"])
        self.guard.load_state_dict(counters["guard"])

    def restart_counters(self) -> None:
        """Set everything that is not a tensor to what a fresh run has, save what was excluded."""
        self.step = self.samples = self.tokens = 0
        self.loader.restart()
        self.guard.forget()
