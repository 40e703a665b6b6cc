"""Who is to blame when ranks stop getting on: real processes, real faults."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from watched_ranks import BUCKET, SETTINGS, Ranks

from hunyuan_train.resilience.config import ResilienceConfig
from hunyuan_train.resilience.heartbeat import Heartbeat, beat_path, read_beat, stacks_path
from hunyuan_train.resilience.watchdog import (
    POLL_S,
    Fault,
    Monitor,
    RankState,
    Verdict,
    allowance,
    judge,
)

WORLD, CULPRIT, AT = 3, 1, 12


def watch(monitor: Monitor, seconds: float) -> list[Verdict]:
    """Poll until there is a verdict or the time is over."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if verdicts := monitor.check():
            return verdicts
        time.sleep(POLL_S)
    return []


@pytest.mark.dist
@pytest.mark.parametrize(
    ("fault", "kind", "line"),
    [
        ("loop", Fault.hung, "watched_ranks.py"),
        ("gil", Fault.hung, "sum(range(10**15))"),
        ("sleep", Fault.hung, "time.sleep(1000)"),
        ("stop", Fault.stopped, ""),
        ("kill", Fault.dead, ""),
        ("raise", Fault.failed, ""),
    ],
)
def test_the_culprit_of_a_fault_is_found(
    tmp_path: Path, fault: str, kind: Fault, line: str
) -> None:
    monitor = Monitor(tmp_path, 0, range(WORLD), SETTINGS)
    with Ranks(tmp_path, WORLD, fault, CULPRIT, AT) as ranks:
        ranks.wait_for_step(CULPRIT, AT - 1)
        begun = time.monotonic()
        if fault in ("stop", "kill"):
            ranks.send(CULPRIT, signal.SIGSTOP if fault == "stop" else signal.SIGKILL)
        verdicts = watch(monitor, 10)
        delay = time.monotonic() - begun
    print(f"{fault}: {delay:.2f} s, {verdicts[0].sentence}\n{monitor.stacks}")
    assert delay <= 5
    first, *others = verdicts
    assert (first.kind, first.rank) == (kind, CULPRIT)
    assert {verdict.rank for verdict in others} == {0, 2}
    blamed = (
        {Fault.waiting, Fault.failed} if kind in (Fault.dead, Fault.failed) else {Fault.waiting}
    )
    assert {verdict.kind for verdict in others} <= blamed
    assert f"rank {CULPRIT} is" in first.sentence or "failed" in first.sentence
    if kind is Fault.hung:
        assert (first.step, first.phase, first.bucket) == (AT - 1, "forward", BUCKET)
        assert "ranks 0 2 wait for it" in first.sentence
        assert "no collective" in first.sentence
        assert monitor.stacks.startswith(f"rank {CULPRIT}:"), "odd ones first"
        dumped = monitor.stacks.split("ranks 0 2:")
        assert "watched_ranks.py" in dumped[0]
        assert "in hang" in dumped[0]
        assert "in all_reduce" in dumped[1]
        for rank in range(WORLD):
            assert "watched_ranks.py" in stacks_path(tmp_path, 0, rank).read_text()
    if line.endswith(")"):
        source = (Path(__file__).parent / "watched_ranks.py").read_text().splitlines()
        number = next(n for n, text in enumerate(source, start=1) if line in text)
        assert f"watched_ranks.py:{number} in hang" in monitor.stacks


@pytest.mark.dist
def test_clean_runs_with_long_pauses_raise_no_alarm(tmp_path: Path) -> None:
    """The others wait in a collective for a rank that saves, six times as long as a hang takes."""
    monitor = Monitor(tmp_path, 0, range(2), SETTINGS)
    with Ranks(tmp_path, 2, "save", CULPRIT, AT) as ranks:
        ranks.wait_for_step(CULPRIT, AT)
        assert watch(monitor, 2.5) == []
        ranks.wait_for_step(CULPRIT, AT + 3)
        assert watch(monitor, 0.5) == []


@pytest.mark.dist
def test_ranks_that_end_as_they_should_are_not_dead(tmp_path: Path) -> None:
    monitor = Monitor(tmp_path, 0, range(2), SETTINGS)
    with Ranks(tmp_path, 2, "end", CULPRIT, AT) as ranks:
        while any(process.is_alive() for process in ranks.processes):
            assert monitor.check() == []
            time.sleep(0.02)
        assert monitor.check() == []


def test_ten_thousand_fast_updates_raise_no_alarm(tmp_path: Path) -> None:
    cfg = replace(SETTINGS, watchdog_s=0.2, watchdog_min_s=0.02, stall_factor=3)
    heart, monitor = Heartbeat(tmp_path, 0, 0, stacks=False), Monitor(tmp_path, 0, [0], cfg)
    for step in range(1, 10_001):
        for name in ("data", "forward", "backward", "update"):
            heart.phase(name, "1x64x64")
        heart.beat(step, 1e-5)
        if step % 10 == 0:
            assert monitor.check() == []
    assert monitor.observe()[0].step == 10_000


def marked(tmp_path: Path, phase: str, times: int, seconds: float = 0.0) -> Heartbeat:
    """A rank in ``phase`` that has been in it ``times`` times, for ``seconds`` each."""
    heart = Heartbeat(tmp_path, 0, 0, stacks=False)
    for _ in range(times):
        heart.phase(phase, BUCKET)
        time.sleep(seconds)
        heart.phase("update")
    heart.phase(phase, BUCKET)
    return heart


@pytest.mark.parametrize(
    ("phase", "times", "least", "most"),
    [
        ("start", 0, 20, 20),
        ("forward", 0, 20, 20),  # a compiler may be at work
        ("forward", 1, 20, 20),
        ("forward", 2, 2, 2),  # nothing is usual yet
        ("forward", 5, 0.5, 0.9),  # ten times the usual 0.05 s
        ("save", 0, 10, 10),
        ("evaluate", 0, 20, 20),
        ("data", 5, 4, 4),
    ],
)
def test_phases_have_their_own_allowance(
    tmp_path: Path, phase: str, times: int, least: float, most: float
) -> None:
    marked(tmp_path, phase, times, 0.05 if times == 5 else 0.0)
    beat = read_beat(beat_path(tmp_path, 0, 0))
    assert beat is not None
    assert least <= allowance(beat, replace(SETTINGS, watchdog_min_s=0.1)) <= most


def test_allowances_follow_updates_that_are_rare_and_long(tmp_path: Path) -> None:
    """A video step of 60 s among image steps of 1 s is usual; watchdog_s is no limit to it."""
    heart = Heartbeat(tmp_path, 0, 0, stacks=False)
    for step in range(100):
        for _ in range(2):
            heart.phase("forward")
        heart.beat(step, 60.0 if step % 20 == 10 else 1.0)
    heart.phase("forward")
    beat = read_beat(beat_path(tmp_path, 0, 0))
    assert beat is not None
    assert 30 < beat.typical_step_s <= 60
    assert allowance(beat, replace(SETTINGS, watchdog_s=50)) > 60
    assert 300 < allowance(beat, replace(SETTINGS, watchdog_s=1e6)) <= 600
    assert allowance(None, replace(SETTINGS, watchdog_s=50)) == 500


def test_a_rank_that_never_shows_up_is_to_blame_and_not_those_that_wait_for_it(
    tmp_path: Path,
) -> None:
    """It has a minute for its imports, however small ``watchdog_s`` is."""
    monitor = Monitor(tmp_path, 0, range(2), SETTINGS)
    Heartbeat(tmp_path, 0, 0, stacks=False).phase("collective")
    now, verdicts = 0.0, []
    while not verdicts and now < 100:
        now += 0.5
        verdicts = monitor.check(now)
    assert 60 <= now <= 61
    assert [(v.rank, v.kind) for v in verdicts] == [(1, Fault.hung), (0, Fault.waiting)]
    assert "It has not shown up since it was started." in verdicts[0].sentence


def test_stillness_does_not_count_while_the_monitor_itself_did_not_run(tmp_path: Path) -> None:
    marked(tmp_path, "forward", 5)
    monitor = Monitor(tmp_path, 0, [0], SETTINGS)
    assert monitor.check(now=0.0) == []
    assert monitor.observe(now=1000.0)[0].still_s == 2.0


def test_records_of_an_earlier_run_are_forgotten(tmp_path: Path) -> None:
    code = "from hunyuan_train.resilience.heartbeat import Heartbeat\n"
    code += f"Heartbeat({str(tmp_path)!r}, 0, "
    for rank, end in ((0, ")"), (1, ").__exit__(None, None, None)")):
        subprocess.run([sys.executable, "-c", f"{code}{rank}{end}"], check=True)
    monitor = Monitor(tmp_path, 0, [0, 1], SETTINGS)
    assert [state.process for state in monitor.observe()] == ["missing", "missing"]
    assert monitor.check() == []


def test_a_pid_that_belongs_to_another_process_now_is_a_dead_rank(tmp_path: Path) -> None:
    marked(tmp_path, "forward", 1)
    monitor, path = Monitor(tmp_path, 0, [0], SETTINGS), beat_path(tmp_path, 0, 0)
    data = bytearray(path.read_bytes())
    beat = read_beat(path)
    assert beat is not None
    at = data.index(beat.started.to_bytes(8, "little"))
    data[at] ^= 1
    path.write_bytes(data)
    assert [verdict.kind for verdict in monitor.check()] == [Fault.dead]  # and was sent no signal


def test_nothing_is_watched_without_watchdog_s(tmp_path: Path) -> None:
    monitor = Monitor(tmp_path, 0, [0], ResilienceConfig())
    assert [monitor.check(now) for now in (0, 1e3, 1e6)] == [[], [], []]
    assert [judge(monitor.observe(now)) for now in (2e6, 3e6)] == [[], []]


def state(rank: int, step: int, place: int, still: float, **changes: Any) -> RankState:
    base = RankState(
        rank=rank, progress=(step, 1, place, False), step=step, phase="forward", bucket=BUCKET,
        still_s=still, limit_s=5.0,
    )  # fmt: skip
    return replace(base, **changes)


def blamed(states: list[RankState]) -> list[int]:
    return [v.rank for v in judge(states) if v.kind is not Fault.waiting]


def test_only_ranks_furthest_behind_are_judged_by_their_own_allowance() -> None:
    behind = state(2, 7, 4, 6.0)
    ahead = [state(rank, 7, 5, 9.0) for rank in (0, 1)]
    assert blamed([*ahead, behind]) == [2]
    assert blamed([*ahead, replace(behind, limit_s=60.0)]) == []
    assert blamed([*ahead, replace(behind, still_s=4.0)]) == []
    assert blamed([*ahead, replace(behind, process="done")]) == [0, 1]
    assert blamed([*ahead, replace(behind, process="missing", progress=(-1, 0, 0, False))]) == [2]


def test_of_equally_far_ranks_those_outside_collectives_are_to_blame() -> None:
    far = [state(rank, 7, 4, 6.0, waits="collective") for rank in range(4)]
    assert blamed(far) == [0, 1, 2, 3]
    far[3] = replace(far[3], waits="code")
    assert blamed(far) == [3]
    # The stacks of another node may come later, or never.
    assert blamed([*far[:3], replace(far[3], waits="")]) == []
    assert blamed([*far[:3], replace(far[3], waits="silent")]) == [3]
    # A rank further on, but in other code, blames itself rather than those that wait for it.
    far[3] = replace(far[3], progress=(7, 1, 5, False))
    assert blamed(far) == [3]
    # One rank of the same step that may still take its time is reason enough to wait.
    far[3] = replace(far[3], progress=(7, 1, 4, False), limit_s=60.0)
    assert blamed(far) == []


def test_gone_and_stopped_ranks_are_to_blame_wherever_they_are() -> None:
    behind = state(0, 7, 4, 6.0)
    assert blamed([behind, state(1, 8, 5, 0.1, process="dead")]) == [1]
    assert blamed([behind, state(1, 8, 5, 9.0, process="stopped")]) == [1]
    assert blamed([behind, state(1, 8, 5, 1.0, process="stopped")]) == [0], "not for long"
    failed = [state(r, 8, 5, 0.1, process="failed", when=10.0 - r) for r in range(3)]
    assert [v.rank for v in judge(failed)] == [2, 0, 1], "the first exception comes first"
    first = judge([*failed, state(3, 8, 5, 0.1, process="dead")])[0]
    assert (first.rank, first.kind) == (3, Fault.dead)


def test_states_of_several_nodes_are_judged_together() -> None:
    """As JSON brings them to the supervisor; a node that only waits is not to blame."""
    near = [state(rank, 7, 5, 9.0, node=0) for rank in (0, 1)]
    far = [state(2, 7, 5, 9.0, node=1), state(3, 7, 4, 9.0, node=1)]
    sent = json.loads(json.dumps([asdict(each) for each in near + far]))
    verdicts = judge([RankState.received(values) for values in sent])
    assert [(v.rank, v.node, v.kind) for v in verdicts[:2]] == [
        (3, 1, Fault.hung),
        (0, 0, Fault.waiting),
    ]
    assert blamed(near) == [0, 1]


def test_the_sentence_names_rank_place_time_and_who_waits() -> None:
    ranks = [state(rank, 120, 6, 12.0) for rank in (0, 1, 2)]
    slow = state(3, 120, 5, 12.1, phase="backward", bucket="65x256x256")
    assert judge([*ranks, slow])[0].sentence == (
        "rank 3 is behind: step 120, in backward of bucket 65x256x256 for 12.1 s; "
        "ranks 0 1 2 wait for it."
    )
