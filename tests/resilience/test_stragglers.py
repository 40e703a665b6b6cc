"""Slow ranks are found, noise is not."""

import random
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from watched_ranks import SETTINGS, Ranks

from hunyuan_train.resilience.config import ResilienceConfig
from hunyuan_train.resilience.own_speed import OwnSpeed
from hunyuan_train.resilience.stragglers import (
    StragglerDetector,
    relative_slowness,
    robust_deviation,
    slow_ranks,
)
from hunyuan_train.resilience.watchdog import Monitor, RankState

COSTS = {"1x256x256": 1.0, "17x256x256": 12.0, "65x256x256": 60.0, "129x544x960": 1700.0}
BIAS = {"1x256x256": 1.2, "17x256x256": 0.95, "65x256x256": 0.9, "129x544x960": 1.1}
"""How wrong the cost model is."""
CFG = ResilienceConfig()


class Simulation:
    """Own seconds of ranks with jitter, garbage collection, slow reads and changing buckets."""

    def __init__(self, seed: int, ranks: int, jitter: float = 0.12) -> None:
        self.random, self.ranks, self.jitter = random.Random(seed), ranks, jitter
        # Chips of one kind differ by a few percent, for good.
        self.speed = [self.random.lognormvariate(0, 0.03) for _ in range(ranks)]
        self.factor = [1.0] * ranks

    def step(self) -> tuple[dict[int, float], dict[int, float]]:
        busy, cost = {}, {}
        level = 1.0
        if self.random.random() < 0.01:
            level = self.random.uniform(1, 3)  # the file system of all
        for rank in range(self.ranks):
            bucket = self.random.choice(list(COSTS))
            cost[rank] = COSTS[bucket] * self.random.randint(1, 4)
            seconds = 0.01 * cost[rank] * BIAS[bucket] * self.speed[rank] * level
            seconds *= self.random.lognormvariate(0, self.jitter) * self.factor[rank]
            if self.random.random() < 0.02:
                seconds += self.random.expovariate(1 / seconds)  # garbage collection
            busy[rank] = seconds
        return busy, cost


@pytest.mark.parametrize(("ranks", "steps"), [(2, 2500), (8, 2500), (16, 2500), (64, 2500)])
def test_ten_thousand_clean_steps_raise_no_alarm(ranks: int, steps: int) -> None:
    simulation, detector = Simulation(ranks, ranks), StragglerDetector(CFG)
    alarms = [step for step in range(steps) if detector.add(*simulation.step())]
    assert alarms == []


@pytest.mark.parametrize(("factor", "ranks"), [(1.5, 8), (2.0, 8), (1.5, 2), (2.0, 3), (2.0, 64)])
def test_a_slow_rank_is_found_within_twice_the_steps_asked_for(factor: float, ranks: int) -> None:
    delays = []
    for seed in range(10):
        simulation, detector = Simulation(seed, ranks), StragglerDetector(CFG)
        simulation.speed[1] = 1.0
        for _ in range(60):
            assert detector.add(*simulation.step()) == []
        simulation.factor[1] = factor
        for step in range(1, 101):
            if found := detector.add(*simulation.step()):
                assert [straggler.rank for straggler in found] == [1]
                assert found[0].slowness == pytest.approx(factor, rel=0.25)
                assert "rank 1 takes" in found[0].sentence
                delays.append(step)
                break
        assert len(delays) == seed + 1, f"not found in 100 steps, seed {seed}"
        simulation.factor[1] = 1.0
        for _ in range(40):
            found = detector.add(*simulation.step())
        assert found == [], "well again"
    print(f"{factor}x of {ranks}: after {sorted(delays)} steps")
    assert CFG.straggler_steps * 0.75 <= min(delays)
    assert sorted(delays)[len(delays) // 2] <= 1.5 * CFG.straggler_steps


def test_a_slow_rank_does_not_flicker() -> None:
    simulation, detector = Simulation(5, 8), StragglerDetector(CFG)
    simulation.factor[3] = 1.5
    said = [bool(detector.add(*simulation.step())) for _ in range(1000)]
    assert sum(a != b for a, b in pairwise(said)) == 1


def test_more_work_is_not_slowness_and_unknown_ranks_are_left_out() -> None:
    assert relative_slowness([1.0, 10.0, 100.0], [1.0, 10.0, 100.0]) == pytest.approx([0, 0, 0])
    assert relative_slowness([1.0, 0.0, 1.0], [1.0, 1.0, 0.0]) == [0, 0, 0]
    assert slow_ranks([0.0, 0.0, 0.5, 0.01], 1.5) == [False, False, True, False]
    assert slow_ranks([0.0, 0.5], 1.5) == [False, True]
    spread = [0.5 * rank for rank in range(8)]
    assert not any(slow_ranks(spread, 1.5)), "no rank is odd where all differ"
    assert robust_deviation([0.0, 0.0, 0.0, 99.0], 0.0) == 0.0


def test_observations_count_each_update_once_however_often_they_come() -> None:
    detector, simulation = StragglerDetector(CFG), Simulation(1, 4)
    simulation.factor[2] = 2.0
    busy, cost, found = [0.0] * 4, [0.0] * 4, []
    steps = 0
    for step in range(1, 200):
        more, work = simulation.step()
        for rank in range(4):
            busy[rank] += more[rank]
            cost[rank] += work[rank]
        states = [
            RankState(rank=rank, node=rank // 2, step=step, busy=busy[rank], cost=cost[rank])
            for rank in range(4)
        ]
        if step % 3 == 0:  # an observer may miss some
            for _ in range(5):
                found = detector.observe(states)
            if found:
                steps = step
                break
    assert [(straggler.rank, straggler.node) for straggler in found] == [(2, 1)]
    assert 20 <= steps <= 50
    assert detector.observe(states[:3]) == [], "other ranks: a new start"


@pytest.mark.dist
def test_the_slow_one_of_ranks_in_lockstep_is_found_from_its_heartbeats(tmp_path: Path) -> None:
    """All ranks show the same step time; what tells them apart is their own processor time."""
    monitor, detector = Monitor(tmp_path, 0, range(3), SETTINGS), StragglerDetector(CFG)
    with Ranks(tmp_path, 3, "slow", culprit=2) as ranks:
        ranks.wait_for_step(0, 3)
        end, found = time.monotonic() + 30, []
        while not found and time.monotonic() < end:
            found = detector.observe(states := monitor.observe())
            time.sleep(0.05)
    assert [straggler.rank for straggler in found] == [2]
    assert 1.3 < found[0].slowness < 2.5
    assert max(state.step for state in states) - min(state.step for state in states) <= 1


def test_own_speed_times_the_same_work_again_and_again() -> None:
    probe = OwnSpeed(torch.device("cpu"))
    assert probe.seconds() is None
    times = []
    for _ in range(20):
        probe.run()
        times.append(probe.seconds())
    assert 0 < min(times) <= max(times) < 1  # type: ignore[type-var]
