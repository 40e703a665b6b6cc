"""How often to save, and what share of the time is useful then: the arithmetic of failures.

Failures come at random, on average every ``mtbf_s`` seconds of training; each costs the time to
notice it, the time to start again and the work since the newest complete copy of the state. Copies
cost a stall each. Free of torch.
"""

import math
from dataclasses import dataclass, replace

GPUS_MTBF_H = {8: 1011.0, 128: 63.2, 1024: 7.9, 16384: 1.8}
"""Hours between failures of a job: measured at 1,024 and 16,384 GPUs (Meta's research clusters),
and below that in proportion to 1,024."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Copies:
    """One way to keep the state."""

    stall_s: float
    """Training stands still this long for each."""
    every_s: float = math.inf
    """Training time between two."""
    complete_s: float = 0.0
    """From its begin until it can be restored; a failure before that loses one interval more."""


def kept_share(mtbf_s: float, copies: Copies, down_s: float) -> float:
    """Return the expected share of the wall-clock whose work is kept.

    Exact for failures without memory that strike while training goes on. Of an attempt that lasts
    ``t``, the work before its last complete copy counts, so the mean is a geometric sum.

    Args:
        mtbf_s: Mean training time between two failures.
        copies: How the state is kept.
        down_s: From a failure until training goes on.
    """
    if math.isinf(copies.every_s):
        return 0.0
    cycle = copies.every_s + copies.stall_s
    kept = copies.every_s * math.exp(-copies.complete_s / mtbf_s) / math.expm1(cycle / mtbf_s)
    return kept / (mtbf_s + down_s)


def first_order(mtbf_s: float, copies: Copies, down_s: float) -> float:
    """Return the same by the formula that people use, right while all losses are small."""
    lost_s = copies.every_s / 2 + copies.complete_s + down_s
    return 1 - copies.stall_s / copies.every_s - lost_s / mtbf_s


def young_s(mtbf_s: float, stall_s: float) -> float:
    """Return the training time between two copies that loses least, to first order."""
    return math.sqrt(2 * stall_s * mtbf_s)


def best(mtbf_s: float, copies: Copies) -> Copies:
    """Return ``copies`` at the interval that keeps most, whatever the sizes (Daly's optimum).

    The optimum depends on the stall and the failures alone: what a failure costs besides, it costs
    at every interval.
    """
    low, high = 1e-3 * copies.stall_s + 1e-9, 100 * mtbf_s
    for _ in range(200):  # golden section on the logarithm: one maximum
        one = low * (high / low) ** 0.381966
        two = low * (high / low) ** 0.618034
        if _kept(mtbf_s, copies, one) < _kept(mtbf_s, copies, two):
            low = one
        else:
            high = two
    return replace(copies, every_s=math.sqrt(low * high))


def _kept(mtbf_s: float, copies: Copies, every_s: float) -> float:
    exponent = (every_s + copies.stall_s) / mtbf_s
    return every_s / math.expm1(exponent) if exponent < 700 else 0.0


def kept_by_both(
    mtbf_s: float, memory: Copies, disk: Copies, down_s: float, disk_down_s: float, share: float
) -> float:
    """Return the expected share with copies in memory and on disk, to first order.

    Args:
        mtbf_s: Mean training time between two failures.
        memory: Copies in memory.
        disk: Checkpoints.
        down_s: From a failure until training goes on, if memory has the state.
        disk_down_s: The same if only the disk has it.
        share: Of the failures that memory survives.
    """
    stalls = memory.stall_s / memory.every_s + disk.stall_s / disk.every_s
    lost_s = share * (memory.every_s / 2 + memory.complete_s + down_s)
    lost_s += (1 - share) * (disk.every_s / 2 + disk.complete_s + disk_down_s)
    return 1 - stalls - lost_s / mtbf_s
