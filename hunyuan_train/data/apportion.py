"""How many units each class gives to a round."""

import numpy as np

LIKE = 1.05
"""Largest ratio of unit costs inside a tier."""


def group_tiers(costs: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """Group classes of like unit cost: the tier of each class, and the classes of each tier."""
    tier = np.zeros(len(costs), np.int64)
    members: list[list[int]] = []
    lowest = 0.0
    for number in np.argsort(costs, kind="stable").tolist():
        if not members or costs[number] > LIKE * lowest:
            members.append([])
            lowest = costs[number]
        members[-1].append(number)
        tier[number] = len(members) - 1
    return tier, [np.array(numbers, np.int64) for numbers in members]


def apportion(owed: np.ndarray, rate: np.ndarray, units: float) -> np.ndarray:
    """Divide ``units`` among classes, int64 of that sum.

    Args:
        owed: Units that each class lags behind (negative: is ahead), float64 [classes].
        rate: Units per sample drawn at which each class keeps up.
        units: How many there are.

    Each gets ``owed + level * rate`` with the level at which that adds up, at least 0, rounded so
    that the largest remainders go up.
    """
    active = np.ones(len(owed), bool)
    while True:
        level = (units - owed[active].sum()) / rate[active].sum()
        exact = np.where(active, owed + level * rate, 0.0)
        if exact.min() >= 0:
            break
        active &= exact > 0
    counts = np.floor(exact).astype(np.int64)
    rest = int(units) - int(counts.sum())
    if rest > 0:
        counts[np.argsort(counts - exact, kind="stable")[:rest]] += 1
    return counts


def spread(counts: np.ndarray) -> np.ndarray:
    """Return each class as often as ``counts`` says, evenly interleaved; int64 [sum]."""
    classes = np.repeat(np.arange(len(counts)), counts)
    ends = np.cumsum(counts)
    turn = np.arange(len(classes)) - np.repeat(ends - counts, counts)
    return classes[np.argsort((turn + 0.5) / counts[classes], kind="stable")]
