"""Where the time of a run went: hand-made events whose answer is known, and a real run."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fake_job import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_run import make_data, overrides

from hunyuan_train.cli.goodput import main
from hunyuan_train.resilience.clock import OTHER, REFUSED, STEP, Clock
from hunyuan_train.resilience.events import Events, read_events
from hunyuan_train.resilience.goodput import Goodput, Use, account
from hunyuan_train.resilience.interval import Copies, best, first_order, kept_share, young_s


def event(time: float, kind: str, attempt: int = 0, **fields: Any) -> dict[str, Any]:
    return {"time": 1000.0 + time, "kind": kind, "attempt": attempt, "rank": 0, "node": 0, **fields}


def begin(time: float, started: float, attempt: int = 0, process: str = "1", stage: str = ""):
    at = 1000.0 + started
    return event(time, "begin", attempt, started=at, process=process, stage=stage)


def progress(
    time: float, after: int, to: int, attempt: int = 0, stage: str = "", **parts: float
) -> dict[str, Any]:
    return event(time, "progress", attempt, after=after, step=to, stage=stage, parts=parts)


def ready(time: float, step: int, attempt: int = 0, stage: str = "", restore_s: float = 0.0):
    return event(time, "ready", attempt, step=step, stage=stage, restore_s=restore_s)


def leave(time: float, after: int, to: int, attempt: int = 0, error: str = "", **parts: float):
    told = {"after": after, "step": to, "parts": parts, "error": error}
    return event(time, "leave", attempt, stage="", **told)


def uses(found: Goodput) -> dict[str, float]:
    """Return the seconds that are not 0, checked to add up to the wall-clock."""
    assert sum(found.seconds.values()) == pytest.approx(found.wall_s, abs=1e-6)
    return {use.value: round(s, 6) for use, s in found.seconds.items() if abs(s) > 1e-9}


def launched_run() -> list[dict[str, Any]]:
    """Two attempts: killed at update 30, restored at 25, back-off of 2 s."""
    return [
        event(0, "attempt_start"),
        begin(4, started=1),
        ready(10, 0),
        progress(20, 0, 10, step=7.0, data=2.0, save=0.5, snapshot=0.25, evaluate=0.25),
        progress(40, 10, 30, step=20.0),
        event(43, "detected", fault="signal", step=30, since=1041.0, sentence="killed"),
        event(44, "attempt_end", exit_codes={}),
        event(46, "attempt_start", 1),
        begin(48, started=46.5, attempt=1, process="2"),
        ready(53, 25, attempt=1, restore_s=1.5),
        event(53, "restore", 1, source="memory", step=25, seconds=1.5),
        progress(63, 25, 35, attempt=1, step=9.5, other=0.5),
        event(63, "save", 1, step=35, failure="", stall_s=0.5, seconds=2.0),
        leave(64, 35, 35, attempt=1, save=1.0),
        event(65, "attempt_end", 1, exit_codes={}),
        event(65, "stop", 1, why="done"),
    ]


def test_every_second_of_a_launched_run_has_its_place() -> None:
    found = account(launched_run())
    assert uses(found) == {
        "useful": 7.0 + 15.0 + 9.5,  # of 20 updates in 20 s, 5 are done again
        "data": 2.0,
        "save": 0.5 + 1.0,
        "snapshot": 0.25,
        "evaluate": 0.25,
        "start": 10.0 + 7.0 - 1.5,
        "restore": 1.5,
        "detection": 2.0,
        "restart": 1.0,
        "lost": 5.0 + 1.0,  # 5 updates, and one that was not finished
        "idle": 2.0,
        "other": 0.5 + 1.0,
    }
    assert (found.steps, found.lost_steps, found.attempts, found.saves) == (35, 5, 2, 1)
    assert found.restores == {"memory": 1}
    assert found.share == pytest.approx(31.5 / 65)
    (failed,) = found.failures
    assert (failed.fault, failed.sentence) == ("signal", "killed")
    assert failed.detection_s == pytest.approx(2)
    assert failed.recovery_s == pytest.approx(10)
    assert failed.lost_s == pytest.approx(6)
    assert not found.notes


def test_a_hang_counts_as_detection_from_the_last_sign_of_life() -> None:
    told = [e for e in launched_run() if e["kind"] != "detected"]
    told.append(event(43, "detected", fault="hang", step=20, since=1030.0))
    found = account(told)
    # The window that ends at 40 is cut where the rank stood still; 5 of its 20 updates are undone.
    assert found.seconds[Use.detection] == pytest.approx(13)
    assert uses(found)["useful"] == pytest.approx(7 + 10 * 15 / 20 + 9.5)


def test_a_struck_rank_of_a_drill_counts_from_the_strike() -> None:
    told = [*launched_run(), event(40.5, "fault", fault="sigkill", step=30)]
    assert account(told).seconds[Use.detection] == pytest.approx(2.5)
    told[-1]["fault"] = "flip_parameter"  # the rank goes on
    assert account(told).seconds[Use.detection] == pytest.approx(2)


def test_a_slow_rank_ends_nothing() -> None:
    told = [*launched_run(), event(30, "detected", fault="slow", step=12)]
    assert uses(account(told)) == uses(account(launched_run()))
    assert len(account(told).failures) == 1


def test_updates_done_after_the_last_event_are_estimated_and_said_to_be() -> None:
    told = [e for e in launched_run() if not (e["kind"] == "progress" and e["step"] == 30)]
    found = account(told)
    # Updates 11 to 25 count as useful at the mean of the first 10, the others as lost.
    assert found.seconds[Use.useful] == pytest.approx(7 + 15 * 0.7 + 9.5)
    assert found.estimated_s == pytest.approx(20)
    assert found.steps == 35


def test_a_plain_run_that_was_killed_leaves_time_unknown() -> None:
    found = account(
        [
            begin(2, started=0),
            ready(3, 0),
            progress(13, 0, 10, step=10.0),
            begin(102, started=100, process="2"),
            ready(104, 10, restore_s=1.0),
            progress(114, 10, 20, step=10.0),
            leave(114, 20, 20),
        ]
    )
    assert uses(found) == {"useful": 20, "start": 3 + 3, "restore": 1, "unknown": 87}
    assert "87.0 s" in found.notes[0]
    assert found.attempts == 2, "both have number 0"


def test_a_plain_run_that_raised_is_idle_until_the_next() -> None:
    found = account(
        [
            begin(1, started=0),
            ready(1, 0),
            leave(6, 0, 4, error="OSError", step=4.0, partial=1.0),
            begin(20, started=20, process="2"),
            ready(21, 0),
            leave(26, 0, 5, step=5.0),
        ]
    )
    assert uses(found) == {"useful": 5, "lost": 5, "start": 2, "idle": 14}
    assert [failed.fault for failed in found.failures] == ["OSError"]


def test_a_rewind_within_an_attempt_takes_its_updates_back() -> None:
    told = [
        begin(0, started=0),
        ready(0, 0),
        progress(10, 0, 10, step=10.0),
        progress(13, 10, 12, step=1.5, refused=0.5, rewind=1.0),
        progress(13, 8, 8),
        leave(20, 8, 15, step=7.0),
        event(12, "guard", action="rewind"),
    ]
    found = account(told)
    assert uses(found) == {"useful": 8 + 7, "lost": 2 + 2, "restore": 1}
    assert (found.steps, found.lost_steps, found.refused) == (15, 4, 1)


def test_stages_are_counted_apart_and_the_time_between_them_is_not_training() -> None:
    found = account(
        [
            begin(1, started=0, stage="stages/01"),
            ready(2, 0, stage="stages/01"),
            {**leave(12, 0, 10, step=10.0), "stage": "stages/01"},
            begin(13, started=0, stage="stages/02"),
            ready(15, 0, stage="stages/02"),
            {**leave(20, 0, 5, step=5.0), "stage": "stages/02"},
        ]
    )
    assert uses(found) == {"useful": 15, "start": 2 + 2, "other": 1}
    assert (found.steps, found.attempts) == (15, 1)


def test_what_is_missing_is_unknown_and_never_useful() -> None:
    whole = launched_run()
    told = [e for e in whole if not (e["kind"] == "progress" and e["step"] == 10)]
    found = account(told)
    assert found.seconds[Use.unknown] == pytest.approx(10)
    assert "updates 0 to 10" in found.notes[0]
    told = [e for e in whole if e["kind"] != "ready"]
    assert account(told).seconds[Use.useful] == 0
    short = [begin(0, started=0), ready(0, 0), leave(10, 0, 5, step=4.0)]
    assert uses(account(short)) == {"useful": 4, "unknown": 6}
    with pytest.raises(ValueError, match="does not say when training began"):
        account([event(0, "attempt_start"), event(1, "attempt_end")])


@settings(max_examples=60, deadline=None)
@given(
    keep=st.lists(st.booleans(), min_size=17, max_size=17),
    shift=st.lists(st.floats(-15, 15), min_size=17, max_size=17),
)
def test_all_uses_add_up_whatever_is_missing_or_out_of_order(
    keep: list[bool], shift: list[float]
) -> None:
    told = [*launched_run(), event(12, "fault", fault="gil")]
    told = [
        {**e, "time": e["time"] + moved}
        for e, moved, kept in zip(told, shift, keep, strict=True)
        if kept
    ]
    try:
        found = account(told)
    except ValueError:
        return
    assert sum(found.seconds.values()) == pytest.approx(found.wall_s, abs=1e-5)
    assert all(seconds >= 0 for seconds in found.seconds.values())
    assert found.lost_steps >= 0
    booked = sum(e.get("parts", {}).get("step", 0.0) for e in told)
    assert found.seconds[Use.useful] <= booked + found.estimated_s + 1e-5


def test_the_clock_books_every_second_once(tmp_path: Path) -> None:
    clock = Clock(tmp_path, "", 0, every_s=0)
    clock.lap("build")
    clock.ready(3, 0.0)
    for step in range(4, 7):
        clock.lap(OTHER)
        clock.lap(STEP)
        clock.move(STEP, REFUSED, 1e9)  # no more than there is
        clock.done(step)
    clock.rewound(5)
    clock.leave(RuntimeError("x"))
    Clock(tmp_path, "", 1).leave(None)  # another rank is silent
    told = read_events(tmp_path)
    assert [e["kind"] for e in told] == [
        *("begin", "ready", "progress", "progress", "progress", "progress", "progress", "leave"),
    ]
    assert [(e["after"], e["step"]) for e in told[2:]] == [
        *((3, 4), (4, 5), (5, 6), (6, 6), (5, 5), (5, 5)),
    ]
    assert "step" not in told[2]["parts"]
    assert told[-1]["error"] == "RuntimeError"
    assert told[0]["started"] <= told[0]["time"]
    booked = sum(sum(e["parts"].values()) for e in told[2:])
    assert booked == pytest.approx(told[-1]["time"] - told[1]["time"], abs=0.05)


def test_a_quiet_clock_writes_few_events(tmp_path: Path) -> None:
    clock = Clock(tmp_path, "", 0, every_s=1000)
    clock.ready(0)
    for step in range(1, 1000):
        clock.lap(STEP)
        clock.done(step)
    clock.done(1000, tell=True)
    assert [e["kind"] for e in read_events(tmp_path)] == ["begin", "ready", "progress"]


def test_the_model_gives_the_published_table() -> None:
    hour = 3600.0
    for mtbf_h, stall_s, down_s, share in (
        (7.9, 30, 600, 0.933), (7.9, 1, 600, 0.9705), (7.9, 0.2, 120, 0.992),
        (7.9, 0.2, 30, 0.9952), (1.8, 30, 600, 0.811), (1.8, 0.2, 30, 0.988),
    ):  # fmt: skip
        copies = Copies(stall_s=stall_s, every_s=young_s(mtbf_h * hour, stall_s))
        assert first_order(mtbf_h * hour, copies, down_s) == pytest.approx(share, abs=6e-4)
    exact = kept_share(7.9 * hour, Copies(stall_s=0.2, every_s=106.0), 30)
    assert exact == pytest.approx(0.9952, abs=1e-4)
    late = Copies(stall_s=0.2, every_s=106.0, complete_s=60)
    assert kept_share(7.9 * hour, late, 30) == pytest.approx(exact * (1 - 60 / 28440), abs=1e-4)


@settings(max_examples=50, deadline=None)
@given(mtbf_s=st.floats(1, 1e6), stall=st.floats(1e-6, 1), factor=st.floats(0.05, 20))
def test_no_interval_beats_the_best(mtbf_s: float, stall: float, factor: float) -> None:
    chosen = best(mtbf_s, Copies(stall_s=stall * mtbf_s))
    other = Copies(stall_s=stall * mtbf_s, every_s=chosen.every_s * factor)
    assert kept_share(mtbf_s, chosen, 0) >= kept_share(mtbf_s, other, 0) - 1e-9


def test_the_verb_writes_text_json_and_chart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = Events(tmp_path)
    for told in launched_run():
        log.emit(**told)
    assert main([f"run.dir={tmp_path}"]) == 0
    text = capsys.readouterr().out
    assert "lost work" in text
    assert "1 signal" in text
    found = json.loads((tmp_path / "goodput.json").read_text())
    assert sum(found["seconds"].values()) == pytest.approx(found["wall_s"])
    assert found["failures_by_kind"] == {"signal": 1}
    assert (tmp_path / "goodput.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match="has no events"):
        main([f"run.dir={tmp_path / 'nothing'}"])


@pytest.mark.dist
def test_a_real_run_with_a_killed_rank_is_accounted_whole(tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = overrides(
        make_data(tmp_path / "data"), run, "stage.steps=12", "checkpoint.every_steps=5",
        "checkpoint.asynchronous=false", "resilience.faults=[sigkill@1:8]",
        "launch.ranks_per_node=2", "launch.preflight=false",
        "certify.at_start=false",
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "hunyuan_train", "launch", "train", *arguments],
        capture_output=True, text=True, timeout=240, check=False, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = account(read_events(run))
    seconds = uses(found)
    assert found.seconds[Use.unknown] == 0
    assert not found.notes
    assert [failed.fault for failed in found.failures] == ["signal"]
    assert (found.steps, found.attempts, found.restores) == (12, 2, {"disk": 1})
    assert found.lost_steps == 2, "updates 6 and 7 are done again"
    assert {"useful", "start", "restore", "lost", "restart", "save", "detection"} <= seconds.keys()
