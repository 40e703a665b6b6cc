"""The noise levels that the steps of a sampler go through."""

import torch
from torch import Tensor

from hunyuan_train.evaluation.config import Schedule
from hunyuan_train.objectives.timesteps import shift_sigmas

LINEAR_END = 0.025
"""Share of the way that the first half of a linear-quadratic schedule goes."""


def default_shift(steps: int) -> float:
    """Return the published shift: 7 at 50 steps, 17 below 20 (arXiv 2412.03603, section 5.2)."""
    return 17.0 if steps < 20 else 7.0


def sigma_schedule(steps: int, shift: float = 0.0, schedule: Schedule = Schedule.shifted) -> Tensor:
    """Return the noise levels of an Euler run, [steps + 1] float32 from 1 (noise) down to 0.

    Args:
        steps: Euler steps.
        shift: shift towards noise; 0 takes `default_shift(steps)`; of `shifted` alone.
        schedule: how the steps are spread.
    """
    if schedule is Schedule.linear_quadratic and steps > 1:
        return _linear_quadratic(steps)
    uniform = torch.linspace(1, 0, steps + 1, dtype=torch.float64).float()
    if schedule is not Schedule.shifted:
        return uniform
    return shift_sigmas(uniform, shift or default_shift(steps))


def _linear_quadratic(steps: int) -> Tensor:
    """Return 1 - x: x is linear up to LINEAR_END, then a parabola of the same slope up to 1."""
    linear = steps // 2
    slope, rest = LINEAR_END / linear, steps - linear
    done = torch.arange(steps + 1, dtype=torch.float64)
    beyond = (done - linear).clamp(min=0)
    curve = (1 - LINEAR_END - slope * rest) / rest**2
    return (1 - slope * done - curve * beyond.square()).float()
