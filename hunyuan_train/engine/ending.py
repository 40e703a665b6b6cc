"""When a stage is over: a pure function of what survives a restart, the same on every rank."""

from collections.abc import Sequence
from enum import StrEnum

from hunyuan_train.config.run import StageConfig


class End(StrEnum):
    """What ended a stage."""

    steps = "steps"
    samples = "samples"
    tokens = "tokens"
    plateau = "plateau"


def stage_end(
    stage: StageConfig,
    step: int,
    samples: int,
    tokens: int,
    evaluations: Sequence[tuple[int, float]] = (),
) -> End | None:
    """Return what ends the stage after ``step`` updates; None if it goes on.

    Args:
        stage: Its limits.
        step: Updates done.
        samples: Trained on so far, over all ranks.
        tokens: Image tokens of these.
        evaluations: (step, held-out loss) of those so far, in order.
    """
    if stage.samples and samples >= stage.samples:
        return End.samples
    if stage.tokens and tokens >= stage.tokens:
        return End.tokens
    if stage.plateau and since_best(evaluations, stage.plateau_gain) >= stage.plateau:
        return End.plateau
    return End.steps if step >= stage.steps else None


def since_best(evaluations: Sequence[tuple[int, float]], gain: float) -> int:
    """Return how many evaluations there were since the last that was better than all before.

    Better is lower by more than ``gain`` of the lowest loss, so many small gains count once they
    add up. A loss that is not a number is not better.
    """
    best, since = float("inf"), 0
    for _, loss in evaluations:
        if loss < best * (1 - gain):
            best, since = loss, 0
        else:
            since += 1
    return since
