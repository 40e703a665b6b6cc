"""Real runs with faults: each ends by itself, with the result of a run in which nothing happened.

A few faults for every test run; ``make chaos`` strikes with all of them and prints what they cost.
"""

import json
import math
import subprocess
import time
from pathlib import Path

import pytest
from chaos import (
    MEMORY,
    WHOLE,
    Findings,
    assert_same,
    events_of,
    final,
    kill_node,
    quantile,
    start,
    strikes,
    trace,
    train,
)
from fake_job import finish, poll
from tiny_run import make_data, rows

from hunyuan_train.checkpoint.load import load_weights

SEEN_AS = {
    "sigkill": ("signal", "SIGKILL"),
    "sigsegv": ("signal", "SIGSEGV"),
    "abort": ("signal", "SIGABRT"),
    "exception": ("exception", "DrillError"),
    "sigstop": ("hang", "is stopped"),
    "gil": ("hang", "is hung|is behind"),
    "loop": ("hang", "is hung|is behind"),
    "flip_parameter": ("corruption", "silent corruption"),
    "flip_moment": ("corruption", "exp_avg"),
    "flip_wire": ("corruption", "silent corruption"),
}
"""What a fault is to be detected as, and words of the sentence."""

FOUR = "launch.ranks_per_node=4"
TWO = "launch.ranks_per_node=2"
PATIENT = ("resilience.watchdog_s=30", "resilience.watchdog_min_s=3")
STRICT = ("resilience.watchdog_s=4", "resilience.watchdog_min_s=2.5")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def findings(request: pytest.FixtureRequest) -> Findings:
    """What the long drills measure, printed when all is over."""
    found = Findings()
    request.config.add_cleanup(found.report)
    return found


def check_strikes(run: Path, planned: int, most_lost: int = 1) -> None:
    """Each fault was seen, called what it is, blamed on its rank, and cost no more than it may."""
    found = strikes(run)
    print("", *(strike.line() for strike in found), sep="\n")
    assert len(found) == planned
    for strike in found:
        assert strike.detected is not None, strike
        kind, words = SEEN_AS[strike.kind]
        assert strike.detected["fault"] == kind, strike
        assert any(word in strike.detected["sentence"] for word in words.split("|")), strike
        assert strike.detected["step"] in (strike.step - 1, strike.step), strike
        assert 0 <= strike.lost <= most_lost, strike
        assert math.isfinite(strike.next_step_s)
    assert len(events_of(run, "attempt_start")) == planned + 1, "each cost one attempt"


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_crashes_hangs_and_wrong_bits_on_four_ranks(data: Path, tmp_path: Path) -> None:
    faults = [
        "sigkill@2:4",
        "exception@1:7:phase=backward:attempt=1",
        "flip_moment@3:10:attempt=2",
        "sigstop@0:13:phase=update:attempt=3",
    ]
    fields = (*MEMORY, *WHOLE, FOUR, "stage.steps=15")
    assert train(data, tmp_path / "quiet", *fields, timeout_s=400)[0] == 0
    broken = tmp_path / "broken"
    code, text = train(data, broken, *fields, *PATIENT, faults=faults, timeout_s=450)
    assert code == 0, text
    check_strikes(broken, len(faults))
    assert "drill: sigkill strikes rank 2 in forward of step 4" in text
    assert_same(tmp_path / "quiet", broken)


DISK = (TWO, "checkpoint.every_steps=4", "checkpoint.keep_last=0", "stage.steps=22")


def check_storage(run: Path, text: str, planned: dict[int, tuple[int, str]]) -> None:
    """Each attempt went on from the step and named the damage that ``planned`` says."""
    restored = {event["attempt"]: event for event in events_of(run, "restore")}
    assert {n: e["step"] for n, e in restored.items()} == {n: s for n, (s, _) in planned.items()}
    assert all(event["source"] == "disk" for event in restored.values())
    for _, words in planned.values():
        assert words in text


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_damaged_checkpoints_are_passed_over_and_failed_saves_cost_nothing(
    data: Path, tmp_path: Path
) -> None:
    faults = [
        *("corrupt@1:10", "sigkill@0:10:phase=backward"),
        *("enospc@1:12:attempt=1", "missing@0:18:attempt=1"),
        *("stale_pointer@0:18:attempt=1", "sigkill@1:18:attempt=1"),
    ]
    assert train(data, tmp_path / "quiet", *DISK, timeout_s=400)[0] == 0
    broken = tmp_path / "broken"
    code, text = train(data, broken, *DISK, faults=faults, timeout_s=450)
    assert code == 0, text
    # In attempt 1 the save of step 12 fails, 17 is a copy of 4, and 16 lacks a shard.
    planned = {
        1: (4, "skipping the damaged checkpoint"),
        2: (8, "holds step 4: it was copied or renamed"),
    }
    check_storage(broken, text, planned)
    assert "CHECKPOINT OF STEP 12 WAS NOT SAVED" in text
    assert "__0_0.distcp is missing" in text
    assert_same(tmp_path / "quiet", broken)


# What follows takes longer and runs by ``make chaos``.

LONG = [pytest.mark.dist, pytest.mark.chaos, pytest.mark.timeout(3600)]


def long(test):
    for mark in LONG:
        test = mark(test)
    return test


@long
@pytest.mark.parametrize("round_", [0, 1])
def test_every_death_hang_and_wrong_bit(
    data: Path, tmp_path: Path, findings: Findings, round_: int
) -> None:
    plan = [
        [
            *("sigkill@2:30", "sigkill@0:33:phase=update", "sigkill@1:36:phase=data"),
            *("sigsegv@1:39:phase=backward", "abort@3:42", "exception@0:45:phase=backward"),
            *("exception@3:48:phase=update", "exception@2:51:phase=data", "exception@1:54"),
            *("flip_parameter@1:57", "flip_moment@0:60", "flip_wire@3:63", "flip_parameter@2:66"),
        ],
        [
            *("sigstop@0:20", "sigstop@3:23:phase=data", "gil@1:63", "loop@2:103"),
            *("loop@0:143:phase=backward", "gil@3:183:phase=update", "sigkill@1:186:phase=save"),
        ],
    ][round_]
    faults = [f"{entry}:attempt={attempt}" for attempt, entry in enumerate(plan)]
    fields = (*MEMORY, *WHOLE, FOUR, "stage.steps=190", "checkpoint.every_steps=31")
    assert train(data, tmp_path / "quiet", *fields, timeout_s=1200)[0] == 0
    broken = tmp_path / "broken"
    code, text = train(data, broken, *fields, *STRICT, faults=faults, timeout_s=2000)
    assert code == 0, text
    findings.strikes += strikes(broken)
    check_strikes(broken, len(faults))
    assert_same(tmp_path / "quiet", broken)
    crashes = [s.next_step_s for s in strikes(broken) if SEEN_AS[s.kind][0] == "signal"]
    findings.figures[f"kill_to_next_step_s_{round_}"] = quantile(crashes, 1.0)
    assert quantile([s.detected_s for s in strikes(broken)], 0.99) <= 5
    assert max(crashes) <= 10


@long
@pytest.mark.parametrize("layout", ["cp_ring=2", "tp=2", "zero_stage=3"])
def test_a_peer_that_dies_or_stands_still_inside_a_layout(
    data: Path, tmp_path: Path, findings: Findings, layout: str
) -> None:
    """In the ring the others wait in a hop for it, under tensor parallelism in a reduction."""
    plan = ["sigkill@1:8", "sigkill@0:11:phase=backward", "sigstop@1:14", "sigkill@0:17:phase=save"]
    faults = [f"{entry}:attempt={attempt}" for attempt, entry in enumerate(plan)]
    fields = (*MEMORY, TWO, f"parallel.{layout}", "stage.steps=20", "checkpoint.every_steps=17")
    assert train(data, tmp_path / "quiet", *fields)[0] == 0
    broken = tmp_path / "broken"
    code, text = train(data, broken, *fields, *STRICT, faults=faults)
    assert code == 0, text
    found = strikes(broken)
    findings.strikes += found
    assert [strike.step for strike in found] == [8, 11, 14, 17]
    assert all(strike.detected is not None for strike in found)
    assert [strike.lost for strike in found] == [0, 0, 0, -1], "saved after its update"
    assert_same(tmp_path / "quiet", broken)


@long
@pytest.mark.parametrize("damage", ["torn", "corrupt", "missing", "stale_pointer"])
def test_a_damaged_checkpoint_is_named_and_passed_over(
    data: Path, tmp_path: Path, damage: str
) -> None:
    words = {
        "torn": "is truncated",
        "corrupt": "has changed content",
        "missing": "is missing",
        "stale_pointer": "it was copied or renamed",
    }
    assert train(data, tmp_path / "quiet", *DISK)[0] == 0
    faults = [f"{damage}@1:15", "sigkill@1:15:phase=backward"]
    code, text = train(data, tmp_path / "broken", *DISK, faults=faults)
    assert code == 0, text
    step = 12 if damage == "stale_pointer" else 8
    check_storage(tmp_path / "broken", text, {1: (step, words[damage])})
    assert_same(tmp_path / "quiet", tmp_path / "broken")


@long
@pytest.mark.parametrize("background", [True, False])
def test_a_death_while_saving_leaves_the_checkpoint_before(
    data: Path, tmp_path: Path, background: bool
) -> None:
    fields = (*DISK, f"checkpoint.asynchronous={background}")
    assert train(data, tmp_path / "quiet", *fields)[0] == 0
    faults = ["sigkill@1:8:phase=save", "sigkill@0:13:phase=data:attempt=1"]
    code, text = train(data, tmp_path / "broken", *fields, faults=faults)
    assert code == 0, text
    restored = [event["step"] for event in events_of(tmp_path / "broken", "restore")]
    assert restored == sorted(restored)
    assert set(restored) <= {4, 8, 12}, "what was on its way is there whole or not at all"
    assert len(events_of(tmp_path / "broken", "attempt_start")) == 3
    assert_same(tmp_path / "quiet", tmp_path / "broken")


@long
def test_failed_saves_and_dead_writers_cost_nothing_but_the_checkpoint(
    data: Path, tmp_path: Path, findings: Findings
) -> None:
    assert train(data, tmp_path / "quiet", *DISK)[0] == 0
    faults = ["enospc@0:4", "enospc@1:12", "writer_death@0:17"]
    code, text = train(data, tmp_path / "broken", *DISK, faults=faults)
    assert code == 0, text
    findings.strikes += strikes(tmp_path / "broken")
    saves = {event["step"]: event["failure"] for event in events_of(tmp_path / "broken", "save")}
    assert [step for step, failure in saves.items() if failure][:2] == [4, 12]
    assert saves[22] == "", "and the next ones are there"
    assert "CHECKPOINT OF STEP 12 WAS NOT SAVED" in text
    assert len(events_of(tmp_path / "broken", "attempt_start")) == 1
    assert_same(tmp_path / "quiet", tmp_path / "broken")


@long
def test_a_worker_of_the_loader_that_dies_is_replaced(data: Path, tmp_path: Path) -> None:
    """Once a thread that reads latents, once a process that decodes clips."""
    fields = (TWO, "stage.steps=40", "data.worker_timeout_s=2")
    assert train(data, tmp_path / "quiet", *fields)[0] == 0
    faults = ["loader_death@1:5", "loader_death@0:9"]
    code, text = train(data, tmp_path / "broken", *fields, faults=faults)
    assert code == 0, text
    assert "took more than 2 s" in text
    assert_same(tmp_path / "quiet", tmp_path / "broken")

    online = (
        TWO, "data.encode=online", f"data.source={data / 'clips'}", "data.anchors=[64]",
        "data.durations=[1,5]", "data.assign=every", "data.bucket_stride=32",
        "stage.steps=40", f"data.latents={tmp_path / 'index'}",
    )  # fmt: skip
    assert train(data, tmp_path / "quiet online", *online)[0] == 0
    code, text = train(data, tmp_path / "broken online", *online, faults=faults)
    assert code == 0, text
    assert "was killed by SIGKILL" in text
    assert len(events_of(tmp_path / "broken online", "attempt_start")) == 1
    assert_same(tmp_path / "quiet online", tmp_path / "broken online")


@long
def test_a_gradient_that_is_no_number_is_refused(data: Path, tmp_path: Path) -> None:
    fields = (TWO, "stage.steps=20")
    skip, stop = tmp_path / "skip", tmp_path / "stop"
    code, text = train(data, skip, *fields, faults=["nan@1:15"])
    assert code == 0, text
    (event,) = events_of(skip, "guard")
    assert "step 15: gradient norm nan is not finite" in event["detail"]
    assert rows(skip)[-1]["skipped_updates"] == 1
    code, text = train(data, stop, *fields, "resilience.guard=stop", faults=["nan@1:15"])
    assert code != 0
    assert "step 15: gradient norm nan is not finite" in text
    assert len(events_of(stop, "attempt_start")) <= 2


@long
def test_a_crash_in_every_attempt_is_called_an_error_of_the_code(
    data: Path, tmp_path: Path
) -> None:
    fields = (TWO, *MEMORY, "stage.steps=20")
    code, text = train(data, tmp_path, *fields, faults=["exception@1:6:attempt=*"])
    assert code == 1
    assert "it is an error of the code or the data" in text
    assert len(events_of(tmp_path, "attempt_start")) == 2


@long
def test_what_replicas_cannot_show(data: Path, tmp_path: Path) -> None:
    """A bit that flips where no other rank holds the same, or before the sum, goes unnoticed.

    Not a wish but what is: the page on fault tolerance says it.
    """
    fields = (TWO, "stage.steps=12", "resilience.replica_every=1")
    for name, layout, fault in (
        ("shard", "parallel.zero_stage=3", "flip_parameter@1:6"),
        ("gradient", "parallel.zero_stage=0", "flip_gradient@1:6"),
    ):
        quiet, broken = tmp_path / f"quiet {name}", tmp_path / name
        assert train(data, quiet, *fields, layout)[0] == 0
        code, text = train(data, broken, *fields, layout, faults=[fault])
        assert code == 0, text
        assert not events_of(broken, "detected")
        assert final(broken) != final(quiet)


@long
def test_a_slow_rank_is_named(data: Path, tmp_path: Path, findings: Findings) -> None:
    fields = (FOUR, "stage.steps=300", *STRICT, "checkpoint.every_steps=0")
    code, text = train(data, tmp_path, *fields, faults=["slow@2:60:factor=4"], timeout_s=900)
    assert code == 0, text
    findings.strikes += strikes(tmp_path)
    found = [event for event in events_of(tmp_path, "detected") if event["fault"] == "straggler"]
    assert [event["rank"] for event in found[:1]] == [2], text
    assert len(events_of(tmp_path, "attempt_start")) == 1


NODES = ("launch.nodes=2", "launch.ranks_per_node=1", *MEMORY, "stage.steps=200")


def reached(run: Path, step: int) -> None:
    poll(
        lambda: (run / "metrics.jsonl").is_file() and any(r["step"] >= step for r in rows(run)),
        f"step {step}",
        240,
    )


def pair(data: Path, run: Path, *fields: str) -> list[subprocess.Popen[str]]:
    """Start two machines, the first of which leads and hosts the meeting of the ranks."""
    first = start(data, run, *NODES, *fields)
    poll((run / "launch/members/000001.json").exists, "the first machine", 60)
    return [first, start(data, run, *NODES, *fields)]


@long
@pytest.mark.parametrize("lost", [(1,), (0,), (0, 1)], ids=["one", "host", "both"])
def test_lost_machines_come_back(
    data: Path, tmp_path: Path, findings: Findings, lost: tuple[int, ...]
) -> None:
    quiet, broken = tmp_path / "quiet", tmp_path / "broken"
    assert [finish(node, 600)[0] for node in pair(data, quiet)] == [0, 0]
    nodes = pair(data, broken)
    reached(broken, 20)
    killed = time.time()
    for number in lost:
        kill_node(nodes[number])
    before = max(int(row["step"]) for row in rows(broken))
    for number in lost:
        nodes[number] = start(data, broken, *NODES)
    assert [finish(node, 600)[0] for node in nodes] == [0, 0]
    (restored,) = events_of(broken, "restore")
    assert restored["source"] == "memory"
    assert restored["step"] >= before - 1
    after = min(row["time"] for row in rows(broken) if row["step"] > restored["step"])
    findings.figures[f"lost_{len(lost)}_{lost[0]}_to_next_step_s"] = after - killed
    assert_same(quiet, broken)


@long
def test_fewer_machines_come_to_the_same_within_rounding(data: Path, tmp_path: Path) -> None:
    shape = ("launch.nodes=2", "launch.ranks_per_node=1", "launch.min_nodes=1", "stage.steps=60")
    shape += ("data.global_samples=4", "checkpoint.every_steps=5")
    quiet, broken = tmp_path / "quiet", tmp_path / "broken"
    both = [start(data, quiet, *shape) for _ in range(2)]
    assert [finish(node, 400)[0] for node in both] == [0, 0]
    stays, goes = (start(data, broken, *shape) for _ in range(2))
    reached(broken, 7)
    kill_node(goes)
    code, text = finish(stays, 400)
    assert code == 0, text
    assert [event["nodes"] for event in events_of(broken, "shrink")] == [1]
    for (step, loss, _), (same, other, _) in zip(trace(quiet), trace(broken), strict=True):
        assert step == same
        assert other == pytest.approx(loss, rel=1e-6), step
    one, two = load_weights(quiet, "model"), load_weights(broken, "model")
    gap = math.sqrt(sum(float((one[n] - two[n]).double().square().sum()) for n in one))
    size = math.sqrt(sum(float(t.double().square().sum()) for t in one.values()))
    print(f"weights after the shrink differ by {gap / size:.1e} of their norm")
    assert gap / size <= 1e-6


@long
def test_a_killed_supervisor_is_started_again_and_goes_on(data: Path, tmp_path: Path) -> None:
    fields = (TWO, *MEMORY, "stage.steps=150")
    quiet, broken = tmp_path / "quiet", tmp_path / "broken"
    assert train(data, quiet, *fields)[0] == 0
    process = start(data, broken, *fields)
    reached(broken, 20)
    process.kill()
    process.communicate()
    before = max(int(row["step"]) for row in rows(broken))
    code, text = train(data, broken, *fields)
    assert code == 0, text
    (restored,) = events_of(broken, "restore")
    assert restored["source"] == "memory"
    assert restored["step"] >= before - 1
    assert_same(quiet, broken)


@long
def test_ten_thousand_quiet_steps_raise_no_alarm(
    data: Path, tmp_path: Path, findings: Findings
) -> None:
    fields = (TWO, *MEMORY, *WHOLE, *STRICT, "stage.steps=10000", "logging.every_steps=50")
    code, text = train(data, tmp_path, *fields, "checkpoint.every_steps=1000", timeout_s=3000)
    assert code == 0, text
    assert rows(tmp_path)[-1]["step"] == 10000
    alarms = events_of(tmp_path, "detected") + events_of(tmp_path, "guard")
    findings.figures["false_alarms_in_10000_steps"] = len(alarms)
    assert alarms == [], json.dumps(alarms)
    assert len(events_of(tmp_path, "attempt_start")) == 1
