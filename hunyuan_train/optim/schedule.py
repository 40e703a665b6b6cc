"""The learning rate as a pure function of the step, so a restart needs no scheduler state."""

import math

from torch.optim import Optimizer

from hunyuan_train.optim.config import OptimizerConfig, ScheduleKind


def learning_rate(step: int, cfg: OptimizerConfig, total_steps: int) -> float:
    """Return the rate of update number ``step`` (0 is the first) of ``total_steps``.

    The warm-up rises linearly and reaches ``cfg.lr`` at its last step. After it the cosine and
    linear schedules fall to ``cfg.min_lr_ratio * cfg.lr`` at the last step and stay there.
    """
    if step < cfg.warmup_steps:
        return cfg.lr * (step + 1) / cfg.warmup_steps
    if cfg.schedule is ScheduleKind.constant:
        return cfg.lr
    decay_steps = max(total_steps - 1 - cfg.warmup_steps, 1)
    progress = min((step - cfg.warmup_steps) / decay_steps, 1.0)
    if cfg.schedule is ScheduleKind.cosine:
        height = 0.5 * (1.0 + math.cos(math.pi * progress))
    else:
        height = 1.0 - progress
    return cfg.lr * (cfg.min_lr_ratio + (1.0 - cfg.min_lr_ratio) * height)


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    """Set the rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = lr
