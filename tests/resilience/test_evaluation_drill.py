"""A run that dies or stands still while it evaluates goes on without that evaluation."""

import json
from pathlib import Path

import pytest
from chaos import MEMORY, assert_same, events_of, strikes, train
from tiny_run import make_data

FIELDS = (
    *MEMORY,
    "launch.ranks_per_node=2",
    "parallel.zero_stage=2",
    "evaluation.every_steps=3",
    "evaluation.samples_per_bucket=1",
    "evaluation.quantiles=[0.5]",
    "stage.steps=14",
)
PATIENT = ("resilience.watchdog_s=30", "resilience.watchdog_min_s=3")


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_evaluation_that_ended_the_run_is_left_out(tmp_path: Path) -> None:
    data = make_data(tmp_path / "data")
    fields = (*FIELDS, *PATIENT, f"evaluation.latents={data / 'latents'}")
    faults = ["sigstop@1:6:phase=evaluate", "sigkill@0:12:phase=evaluate:attempt=1"]
    quiet, broken = tmp_path / "quiet", tmp_path / "broken"
    code, text = train(data, quiet, *fields, timeout_s=300)
    assert code == 0, text
    code, text = train(data, broken, *fields, faults=faults, timeout_s=400)
    assert code == 0, text
    found = strikes(broken)
    assert [(s.kind, s.rank, s.step) for s in found] == [("sigstop", 1, 6), ("sigkill", 0, 12)]
    assert all(s.detected is not None and s.lost == 0 for s in found)
    assert len(events_of(broken, "attempt_start")) == 3
    for step in (6, 12):
        assert f"THE RUN ENDED WHILE EVALUATING (held-out losses after step {step})" in text
    one, two = (measured(run) for run in (quiet, broken))
    assert list(one) == [3, 6, 9, 12, 14]
    assert list(two) == [3, 9, 14]
    assert all(two[step] == one[step] for step in two)
    assert_same(quiet, broken)


def measured(run: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (run / "evaluation.jsonl").read_text().splitlines()]
    return {row["step"]: row["ema/loss"] for row in rows}
