"""What survives a restart."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from hunyuan_train.config.root import RunConfig
from hunyuan_train.data.buckets import Bucket
from hunyuan_train.data.loader import BucketLoader
from hunyuan_train.engine.ending import End, stage_end
from hunyuan_train.engine.task import Task
from hunyuan_train.engine.teacher import Teacher
from hunyuan_train.memory.recompute import BucketMode
from hunyuan_train.optim.ema import Ema
from hunyuan_train.optim.schedule import learning_rate
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
    lr: float = 0.0
    """Learning rate of the last update."""
    averaged_before: int = 0
    """Updates that the moving average had followed when this stage took it over."""
    scheduled_before: int = 0
    """Updates that the learning-rate schedule was on when this stage took it over."""
    evaluations: list[tuple[int, float]] = field(default_factory=list)
    """(step, held-out loss) of every evaluation of the stage."""
    modes: Mapping[Bucket, BucketMode] = field(default_factory=dict)
    """What blocks keep of each bucket's micro-batches, as planned for this device; no state."""
    trained: float = 1.0
    """Trained parameters over all; no state."""
    task: Task | None = None
    """What is trained where that is not the diffusion model."""
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
            **(self.task.tensors() if self.task is not None else {}),
        }

    def counters(self) -> dict[str, Any]:
        """Return everything that is not a tensor, ready for JSON."""
        return {
            "step": self.step,
            "samples": self.samples,
            "tokens": self.tokens,
            "lr": self.lr,
            "averaged_before": self.averaged_before,
            "scheduled_before": self.scheduled_before,
            "evaluations": [list(pair) for pair in self.evaluations],
            "loader": self.loader.state_dict(),
            "guard": self.guard.state_dict(),
        }

    def load_counters(self, counters: dict[str, Any]) -> None:
        """Take over what :meth:`counters` returned when the checkpoint was written."""
        self.step = counters["step"]
        self.samples = counters["samples"]
        self.tokens = counters["tokens"]
        # Checkpoints of earlier versions have none of these.
        self.lr = counters.get("lr", 0.0)
        self.averaged_before = counters.get("averaged_before", 0)
        self.scheduled_before = counters.get("scheduled_before", 0)
        self.evaluations = [(step, loss) for step, loss in counters.get("evaluations", [])]
        self.loader.load_state_dict(counters["loader"])
        self.guard.load_state_dict(counters["guard"])

    def end(self, cfg: RunConfig) -> End | None:
        """Return what ends the stage now, None if it goes on."""
        return stage_end(cfg.stage, self.step, self.samples, self.tokens, self.evaluations)

    def restart_counters(self) -> None:
        """Set everything that is not a tensor to what a fresh run has, save what was excluded."""
        self.step = self.samples = self.tokens = 0
        self.averaged_before = self.scheduled_before = 0
        self.lr, self.evaluations = 0.0, []
        self.loader.restart()
        self.guard.forget()


def scheduled_rate(state: TrainState, cfg: RunConfig) -> float:
    """Return the learning rate of the next update, updates of earlier stages counted if carried."""
    last = cfg.stage.schedule_steps or state.scheduled_before + cfg.stage.steps
    return learning_rate(state.scheduled_before + state.step, cfg.optimizer, last)
