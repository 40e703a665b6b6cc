"""Slow ranks are found, noise is not."""

import random
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from tiny_run import MODEL
from watched_ranks import SETTINGS, Ranks

from hunyuan_train.config.compose import compose_config
from hunyuan_train.data.buckets import Bucket
from hunyuan_train.data.collate import Batch
from hunyuan_train.engine.denoising import training_flops
from hunyuan_train.engine.own_work import OwnWork
from hunyuan_train.engine.trial import MicroBatch, make_batch
from hunyuan_train.resilience.config import ResilienceConfig
from hunyuan_train.resilience.events import Events, read_events
from hunyuan_train.resilience.own_speed import OwnSpeed
from hunyuan_train.resilience.stragglers import (
    StragglerDetector,
    StragglerReport,
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


def test_a_straggler_is_told_once_when_it_begins_and_when_it_is_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("WARNING", "hunyuan_train")
    simulation = Simulation(1, 4)
    report = StragglerReport(CFG, Events(tmp_path), attempt=3)
    busy, cost, named = [0.0] * 4, [0.0] * 4, []

    def follow(steps: range) -> None:
        for step in steps:
            more, work = simulation.step()
            for rank in range(4):
                busy[rank] += more[rank]
                cost[rank] += work[rank]
            states = [
                RankState(rank=rank, node=rank // 2, step=step, busy=busy[rank], cost=cost[rank])
                for rank in range(4)
            ]
            named.extend(report.follow(states))
            assert report.follow([replace(states[0], process="dead"), *states[1:]]) == []

    simulation.factor[2] = 2.0
    follow(range(1, 150))
    (event,) = read_events(tmp_path)
    assert (event["kind"], event["fault"], event["attempt"]) == ("detected", "straggler", 3)
    assert (event["rank"], event["node"]) == (2, 1)
    assert 1.5 < event["slowness"] < 2.5
    assert named == [], "not for long yet"
    follow(range(150, 300))
    assert [slow.node for slow in named] == [1], "once"
    simulation.factor[2] = 1.0
    follow(range(300, 400))
    busy, cost = [0.0] * 4, [0.0] * 4  # the next stage counts from 0
    simulation.factor[2] = 2.0
    follow(range(1, 60))
    assert len(caplog.messages) == 3, caplog.messages
    assert caplog.messages[0].startswith("rank 2 takes")
    assert caplog.messages[1] == "rank 2 is as fast as the others again"


def micro_batch(bucket: Bucket, samples: int) -> Batch:
    return make_batch(compose_config(MODEL), MicroBatch(bucket, (3,) * samples), 0, 3)


def test_work_costs_its_flops_and_the_calls_which_are_most_of_a_small_model() -> None:
    small, large = micro_batch(Bucket(1, 64, 64), 1), micro_batch(Bucket(5, 64, 64), 3)
    tiny = OwnWork(compose_config(MODEL), torch.device("cpu"))
    seconds, cost = tiny.measure([small, small])
    assert seconds is None, "the processor time of the rank"
    assert cost == 2 * tiny.measure([small])[1]
    assert tiny.measure([large])[1] == pytest.approx(cost / 2, rel=0.1)
    cfg = compose_config(["model=hunyuan_video_13b", "model.text_dim=64", "model.pooled_dim=64"])
    full = OwnWork(cfg, torch.device("cpu"))
    flops = [training_flops(batch, cfg) for batch in (small, large)]
    costs = [full.measure([batch])[1] for batch in (small, large)]
    assert costs == pytest.approx(flops, rel=0.05)


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


@pytest.mark.gpu
def test_own_speed_times_the_same_work_again_and_again() -> None:
    probe = OwnSpeed(torch.device("cuda"))
    assert probe.seconds() is None
    times = []
    for _ in range(20):
        probe.run()
        torch.cuda.synchronize()
        times.append(probe.seconds())
    print([f"{1e3 * seconds:.3f} ms" for seconds in times])
    assert 0 < min(times) <= max(times[1:]) < 0.1
