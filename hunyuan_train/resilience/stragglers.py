"""Finds ranks that compute slower than the others, from what each took without waiting.

Free of torch. Ranks in lockstep all show the step time of the slowest; so the input is each rank's
own seconds per predicted cost of its work (``Beat.busy`` and ``Beat.cost``), and each is compared
with the other ranks in the same updates.
"""

import logging
import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from hunyuan_train.resilience.config import ResilienceConfig
from hunyuan_train.resilience.events import EventKind, Events
from hunyuan_train.resilience.watchdog import RankState

_DEVIATIONS = 3.0
"""Robust deviations among the ranks that a straggler is beyond, besides being slow enough. Few are
enough: they only speak for machines that differ by nature, the noise is in the medians over time.
Half of them once it is suspect."""

_ENTER, _LEAVE = 0.75, 0.5
"""Shares of the slowness asked for at which a rank becomes suspect, and at which it is well again.

A rank slower by exactly ``straggler_factor`` measures a little less half of the time."""

_LONG = 10
"""A straggler for this many times ``straggler_steps`` is not going to get well."""

_COMPARED = ("running", "blocked")

_NORMAL = 1.4826
"""Median absolute deviation to standard deviation, for a normal distribution."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Straggler:
    """A rank that stays slow."""

    rank: int
    node: int
    slowness: float
    """Seconds per cost, in those of the median rank."""
    steps: int
    """Updates for which it has been suspect."""
    sentence: str


class StragglerReport:
    """Tells of stragglers: of each when it begins and when it is over."""

    def __init__(self, cfg: ResilienceConfig, events: Events, attempt: int) -> None:
        """Start without history, with the ranks of a new attempt."""
        self._detector, self._events, self.attempt = StragglerDetector(cfg), events, attempt
        self._long = _LONG * cfg.straggler_steps
        self._slow: dict[int, Straggler] = {}
        self._named: set[int] = set()

    def follow(self, states: Sequence[RankState]) -> list[Straggler]:
        """Take what was observed of all ranks.

        Returns:
            One straggler of each node that has been slow for long, once.
        """
        if any(state.process not in _COMPARED for state in states):
            return []
        found = {straggler.rank: straggler for straggler in self._detector.observe(states)}
        for rank, straggler in found.items():
            if rank not in self._slow:
                log.warning("%s", straggler.sentence)
                self._events.emit(
                    EventKind.detected, attempt=self.attempt, fault="straggler", rank=rank,
                    node=straggler.node, slowness=round(straggler.slowness, 2),
                    sentence=straggler.sentence,
                )  # fmt: skip
        for rank in self._slow.keys() - found.keys():
            log.warning("rank %d is as fast as the others again", rank)
        self._slow = found
        long = {s.node: s for s in found.values() if s.steps > self._long}
        fresh = [s for node, s in long.items() if node not in self._named]
        self._named |= long.keys()
        return fresh


def lower_median(values: Sequence[float]) -> float:
    """Return the median, of an even number the lower one: of two ranks the faster one counts."""
    return sorted(values)[(len(values) - 1) // 2]


def robust_deviation(values: Sequence[float], middle: float) -> float:
    """Return the standard deviation that the median absolute deviation from ``middle`` stands for.

    Outliers do not move it, up to half of the values.
    """
    return _NORMAL * lower_median([abs(value - middle) for value in values])


def relative_slowness(busy: Sequence[float], cost: Sequence[float]) -> list[float]:
    """Return the log of each rank's seconds per cost over those of the median rank.

    Args:
        busy: Own seconds of each rank in the same updates.
        cost: Predicted cost of its work in them. Ranks without work, or without a measurement,
            come out as 0: neither slow nor fast.
    """
    rates = [
        math.log(b / c) if b > 0 and c > 0 else math.nan for b, c in zip(busy, cost, strict=True)
    ]
    known = [rate for rate in rates if not math.isnan(rate)]
    middle = lower_median(known) if known else 0.0
    return [0.0 if math.isnan(rate) else rate - middle for rate in rates]


def slow_ranks(
    slowness: Sequence[float], factor: float, deviations: float = _DEVIATIONS
) -> list[bool]:
    """Return which ranks are ``factor`` times slower than the median and odd among the others.

    Args:
        slowness: Log ratios, see :func:`relative_slowness`.
        factor: Ratio.
        deviations: Robust deviations among the ranks.
    """
    middle = lower_median(slowness)
    spread = robust_deviation(slowness, middle)
    least = max(math.log(factor), deviations * spread)
    return [value - middle >= least for value in slowness]


class StragglerDetector:
    """Follows all ranks over time; call :meth:`add` for every update or every few.

    A rank's slowness is the median over the last ``straggler_steps`` updates, so pauses and single
    slow updates do not count. It becomes suspect at three quarters of the slowness asked for, is
    called a straggler after half as many updates in which it stayed suspect, and is well again
    below half of it.
    """

    def __init__(self, cfg: ResilienceConfig) -> None:
        """Start without history."""
        self._steps = cfg.straggler_steps
        self._enter = 1 + _ENTER * (cfg.straggler_factor - 1)
        self._leave = 1 + _LEAVE * (cfg.straggler_factor - 1)
        self._recent: dict[int, deque[tuple[int, float]]] = {}
        self._suspect: dict[int, int] = {}
        self._last: dict[int, RankState] = {}

    def observe(self, states: Iterable[RankState]) -> list[Straggler]:
        """Take what a monitor observed, of all ranks or of some nodes; see :meth:`add`.

        Counts only once every rank did more updates than at the last count, so call it as often as
        you like.
        """
        now = {state.rank: state for state in states if state.process not in ("missing", "dead")}
        if now.keys() != self._last.keys() or any(
            state.cost < self._last[rank].cost for rank, state in now.items()
        ):  # other ranks, or another stage that counts from 0
            self._last = now
            return []
        steps = min((now[rank].step - self._last[rank].step for rank in now), default=0)
        if steps < 1:
            return self.stragglers()
        busy = {rank: now[rank].busy - self._last[rank].busy for rank in now}
        cost = {rank: now[rank].cost - self._last[rank].cost for rank in now}
        self._last = now
        return self.add(busy, cost, steps)

    def add(
        self, busy: Mapping[int, float], cost: Mapping[int, float], steps: int = 1
    ) -> list[Straggler]:
        """Count ``steps`` updates and return the stragglers as of now, the slowest first.

        Args:
            busy: Own seconds in these updates, by rank.
            cost: Predicted cost of its work in them.
            steps: Number of updates.
        """
        ranks = sorted(busy)
        found = relative_slowness([busy[r] for r in ranks], [cost[r] for r in ranks])
        for rank, value in zip(ranks, found, strict=True):
            recent = self._recent.setdefault(rank, deque())
            recent.append((steps, value))
            while sum(count for count, _ in recent) - recent[0][0] >= self._steps:
                recent.popleft()
        if sum(count for count, _ in self._recent[ranks[0]]) < self._steps:
            return []
        medians = [self._median(rank) for rank in ranks]
        slow = slow_ranks(medians, self._enter)
        still = slow_ranks(medians, self._leave, _DEVIATIONS / 2)
        for rank, is_slow, is_still in zip(ranks, slow, still, strict=True):
            if is_slow or (is_still and rank in self._suspect):
                self._suspect[rank] = self._suspect.get(rank, 0) + steps
            else:
                self._suspect.pop(rank, None)
        return self.stragglers()

    def stragglers(self) -> list[Straggler]:
        """Return the stragglers as of the last update counted, the slowest first."""
        found: list[Straggler] = []
        for rank, steps in self._suspect.items():
            if steps <= self._steps / 2:
                continue
            slowness = math.exp(self._median(rank))
            state = self._last.get(rank)
            text = f"rank {rank} takes {slowness:.2f} times as long as the median rank"
            text += f" for the same work, since {steps + self._steps // 2} steps or more"
            found.append(
                Straggler(
                    rank=rank, node=state.node if state else 0, slowness=slowness, steps=steps,
                    sentence=text,
                )
            )  # fmt: skip
        return sorted(found, key=lambda straggler: -straggler.slowness)

    def _median(self, rank: int) -> float:
        return lower_median([value for _, value in self._recent[rank]])
