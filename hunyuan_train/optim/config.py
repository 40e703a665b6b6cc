"""Options of the optimizer, its schedule, clipping and the moving average of the weights."""

from dataclasses import dataclass, field
from enum import StrEnum


class ScheduleKind(StrEnum):
    """Shape of the learning rate after the warm-up."""

    constant = "constant"
    cosine = "cosine"
    linear = "linear"


class Implementation(StrEnum):
    """Whose AdamW computes updates."""

    auto = "auto"
    torch = "torch"
    apex = "apex"


class Rule(StrEnum):
    """How gradients become updates."""

    adamw = "adamw"
    muon = "muon"


@dataclass(kw_only=True, slots=True)
class OptimizerConfig:
    """AdamW or Muon, learning-rate schedule, gradient clipping and EMA."""

    rule: Rule = Rule.adamw
    """adamw; or muon: Muon for parameters with two or more dimensions, AdamW for the others."""
    muon_lr: float = 0.02
    """Muon's learning rate after the warm-up, on the schedule of `lr`: the length of a step along
    every direction of a matrix."""
    muon_momentum: float = 0.95
    """Decay of Muon's momentum."""

    lr: float = 1e-4
    """Learning rate after the warm-up."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.01
    """Decoupled weight decay of parameters with two or more dimensions; the others have none."""
    warmup_steps: int = 100
    """Steps over which the rate rises linearly from lr / warmup_steps to lr; 0 starts at lr."""
    schedule: ScheduleKind = ScheduleKind.constant
    """What the rate does after the warm-up."""
    min_lr_ratio: float = 0.1
    """The rate at the last step over lr, for the cosine and linear schedules."""
    trainable: list[str] = field(default_factory=list)
    """Name patterns (`*` stands for anything) of the parameters to train; empty trains all. The
    others have no gradient, no moments, and no part in the norm."""
    unfreeze: dict[str, int] = field(default_factory=dict)
    """First update, counted from 1, in which the parameters of a name pattern are trained; of
    several patterns the latest counts. What no pattern names is trained from the start."""
    clip_norm: float = 1.0
    """Largest global gradient norm of an update; 0 only measures the norm."""
    ema_decay: float = 0.999
    """Decay of the moving average of the weights, once warmed up."""
    ema_warmup: bool = True
    """Use min(ema_decay, (1 + n) / (10 + n)) after n updates, so early weights are forgotten
    soon."""

    implementation: Implementation = Implementation.auto
    """Whose AdamW: auto takes the fused kernel where there is one, else torch's; torch always that;
    apex that of NVIDIA's package, whose updates wait for the gradient norm on the host."""

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for a value outside its range."""
        for name in ("lr", "eps", "muon_lr"):
            if not getattr(self, name) > 0:
                raise ValueError(f"optimizer.{name}={getattr(self, name)} must be above 0")
        for name in ("beta1", "beta2", "ema_decay", "muon_momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optimizer.{name}={getattr(self, name)} must be in [0, 1)")
        for name in ("weight_decay", "warmup_steps", "clip_norm"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"optimizer.{name}={getattr(self, name)} must not be negative")
        for pattern, first in self.unfreeze.items():
            if first < 1:
                raise ValueError(
                    f"optimizer.unfreeze.{pattern}={first} must be at least 1, the first update"
                )
        if not 0 <= self.min_lr_ratio <= 1:
            raise ValueError(f"optimizer.min_lr_ratio={self.min_lr_ratio} must be in [0, 1]")
