"""The update after a checkpoint, retention by score, and saving by the clock."""

import json
import logging
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from writers import held

from hunyuan_train.checkpoint.cadence import Cadence
from hunyuan_train.checkpoint.config import CheckpointConfig
from hunyuan_train.checkpoint.manager import CheckpointManager
from hunyuan_train.checkpoint.ranks import Ranks
from hunyuan_train.checkpoint.replay import ReplayToken, samples_digest, samples_text
from hunyuan_train.checkpoint.writing import kept_steps

TOKEN = ReplayToken(
    samples="00ab",
    num_samples=4,
    loss=0.1234567,
    grad_norm=2.5,
    dealing="2 x 1",
    layout="tp=1 world=2",
    versions="cpu, torch 2.13",
    exact=True,
)
STATE = {"model": {"w": torch.ones(3)}}


def manager(folder: Path, **changes) -> CheckpointManager:
    return CheckpointManager(folder, CheckpointConfig(**changes), {})


def saved_with(folder: Path, token: ReplayToken | None) -> None:
    run = manager(folder)
    assert not run.replay_due(11)
    run.save(10, STATE, {})
    assert run.replay_due(11)
    assert not run.replay_due(10)
    if token is not None:
        run.record_replay(10, token)
        assert not run.replay_due(11)


def resumed(folder: Path, **changes) -> CheckpointManager:
    run = manager(folder, **changes)
    assert run.restore(STATE) is not None
    return run


def test_the_same_update_passes_once(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    saved_with(tmp_path, TOKEN)
    caplog.set_level(logging.INFO)
    run = resumed(tmp_path)
    assert run.replay_due(11)
    run.check_replay(TOKEN)
    assert "the update after step 10 was computed again as it was before" in caplog.text
    assert not run.replay_due(11)
    run.check_replay(replace(TOKEN, loss=7.0))


CHANGES = [
    ({"loss": 0.1234568}, "loss is 0.1234568 here and was 0.1234567 there, on the same samples"),
    ({"grad_norm": 2.5000001}, "grad_norm is 2.5000001 here and was 2.5 there"),
    ({"grad_norm": float("nan")}, "grad_norm is nan here and was 2.5 there"),
    ({"samples": "00ac"}, "trained on other samples .digest 00ac of 4 .* here, 00ab of 4 there"),
    ({"num_samples": 5}, "trained on other samples"),
    (
        {"layout": "tp=2 world=2", "loss": 0.12346},
        r"loss is 0.12346 here \(tp=2 world=2\) and was 0.1234567 there \(tp=1 world=2\), more "
        r"than checkpoint.replay_tolerance=1e-05 apart",
    ),
    ({"versions": "cuda", "loss": 0.12346}, "more than checkpoint.replay_tolerance"),
    ({"layout": "tp=2", "loss": float("nan")}, "more than checkpoint.replay_tolerance"),
    ({"layout": "tp=2 world=2", "samples": "00ac"}, "trained on other samples"),
]


@pytest.mark.parametrize(("change", "message"), CHANGES)
def test_another_update_is_an_error_that_says_what_differs(tmp_path: Path, change, message: str):
    saved_with(tmp_path, TOKEN)
    run = resumed(tmp_path)
    with pytest.raises(ValueError, match=f"the update after step 10 is not the one .*{message}"):
        run.check_replay(replace(TOKEN, **change))


@pytest.mark.parametrize(
    "change",
    [
        {"layout": "tp=2 world=2", "loss": 0.12345671, "grad_norm": 2.500001},
        {"versions": "cuda", "loss": 0.12345671},
        {"exact": False, "loss": 0.12345671},
    ],
)
def test_rounding_passes_where_it_may_differ(tmp_path: Path, change):
    saved_with(tmp_path, TOKEN)
    resumed(tmp_path).check_replay(replace(TOKEN, **change))


def test_other_samples_are_another_update_where_they_are_dealt_otherwise(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    saved_with(tmp_path, TOKEN)
    other = replace(TOKEN, dealing="4 x 1", num_samples=8, samples="77", loss=3.0)
    resumed(tmp_path).check_replay(other)
    assert "has other samples with 4 x 1 than it had with 2 x 1" in caplog.text
    # Dealt otherwise, but the same samples: then the numbers count.
    with pytest.raises(ValueError, match=r"loss is 3\.0 here"):
        resumed(tmp_path).check_replay(replace(TOKEN, dealing="1 x 2", loss=3.0))


def test_a_nan_is_the_same_nan(tmp_path: Path):
    saved_with(tmp_path, replace(TOKEN, loss=float("nan")))
    resumed(tmp_path).check_replay(replace(TOKEN, loss=float("nan")))


def test_without_a_token_the_log_says_so_and_the_update_is_kept_now(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    saved_with(tmp_path, None)
    caplog.set_level(logging.INFO)
    run = resumed(tmp_path)
    assert "the run ended before the update after step 10 was done" in caplog.text
    assert run.replay_due(11)
    run.check_replay(replace(TOKEN, loss=9.0))
    run.record_replay(10, TOKEN)
    with pytest.raises(ValueError, match=r"loss is 3\.0 here"):
        resumed(tmp_path).check_replay(replace(TOKEN, loss=3.0))


@pytest.mark.parametrize("damage", ["", '{"step": 10}', "{", "[]"])
def test_a_damaged_token_is_left_aside(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
):
    saved_with(tmp_path, TOKEN)
    (tmp_path / "step-00000010" / "replay.json").write_text(damage)
    resumed(tmp_path).check_replay(replace(TOKEN, loss=9.0))
    assert "replay.json cannot be used" in caplog.text


def test_an_edited_token_is_left_aside(tmp_path: Path):
    saved_with(tmp_path, TOKEN)
    path = tmp_path / "step-00000010" / "replay.json"
    path.write_text(path.read_text().replace("2.5", "2.6"))
    resumed(tmp_path).check_replay(TOKEN)


def test_it_can_be_left_out(tmp_path: Path):
    saved_with(tmp_path, TOKEN)
    other = replace(TOKEN, loss=9.0)
    for run in (resumed(tmp_path, replay=False), manager(tmp_path)):
        run.restore(STATE, replay=False)
        assert not run.replay_due(11)
        run.check_replay(other)
    run = manager(tmp_path / "none", replay=False)
    run.save(10, STATE, {})
    assert not run.replay_due(11)


@pytest.mark.dist
def test_a_token_known_before_its_checkpoint_is_there_is_written_after_it(tmp_path: Path):
    run = manager(tmp_path)
    run.start(STATE)
    run.save(10, STATE, {})
    with held(run.writer_pid):
        run.record_replay(10, TOKEN)
        assert not (tmp_path / "step-00000010").exists()
    run.finish()
    body = json.loads((tmp_path / "step-00000010" / "replay.json").read_text())
    assert (body["step"], body["loss"]) == (10, TOKEN.loss)
    # And with a checkpoint that fails, it is dropped.
    run.save(20, STATE, {})
    run.record_replay(20, TOKEN)
    run.finish()
    run.save(30, STATE, {})
    with held(run.writer_pid):
        run.record_replay(30, TOKEN)
        os.kill(run.writer_pid, signal.SIGKILL)
    assert run.finish()[-1].failure
    run.close()
    assert sorted(p.name for p in tmp_path.glob("step-*/replay.json")) == ["replay.json"] * 2
    assert not (tmp_path / "step-00000030").exists()


def test_samples_add_up_however_they_are_dealt():
    pairs = [(f"clip-{i}", i % 3) for i in range(20)]
    whole = samples_text(samples_digest(pairs))
    assert whole == samples_text(samples_digest(pairs[::2]) + samples_digest(pairs[1::2]))
    assert whole == samples_text(sum(samples_digest([pair]) for pair in reversed(pairs)))
    assert whole != samples_text(samples_digest([*pairs[:-1], ("clip-19", 2)]))
    assert whole != samples_text(samples_digest(pairs[:-1]))


def test_retention_keeps_newest_multiples_and_best():
    cfg = CheckpointConfig(keep_last=2, keep_every=30, keep_best=2)
    steps = [10, 20, 30, 40, 50, 60, 70]
    scores = {10: 0.5, 20: 0.9, 30: None, 40: 0.4, 50: 0.6, 60: None, 70: 0.8}
    assert kept_steps(steps, scores, cfg) == {10, 30, 40, 60, 70}
    assert kept_steps(steps, {}, cfg) == {30, 60, 70}
    assert kept_steps(steps, scores, replace(cfg, keep_last=0)) == set(steps)


def test_the_best_survive_a_restart_and_a_score_that_is_none(tmp_path: Path):
    scores = {1: 3.0, 2: 1.0, 3: 2.0, 4: float("nan"), 5: None, 6: 4.0}
    for step, score in scores.items():
        run = manager(tmp_path, keep_last=1, keep_best=2)
        assert run.save(step, STATE, {}, score=score)
    assert [p.name for p in run.saved()] == [f"step-{s:08d}" for s in (2, 3, 6)]


def test_every_so_many_seconds_as_well_as_steps():
    now = [100.0]
    cadence = Cadence(
        CheckpointConfig(every_steps=50, every_s=10), Ranks(alone=True), lambda: now[0]
    )
    asked, due = 0, []
    real = cadence._ranks.from_first

    def counted(value):
        nonlocal asked
        asked += 1
        return real(value)

    cadence._ranks.from_first = counted
    for step in range(1, 121):
        now[0] += 0.5
        if cadence.due(step):
            due.append(step)
            cadence.saved()
    # Every 20 steps by the clock, which starts anew at step 50 and 100.
    assert due == [20, 40, 50, 70, 90, 100, 120]
    assert asked < 60


def test_the_clock_alone(tmp_path: Path):
    now = [0.0]
    cadence = Cadence(CheckpointConfig(every_steps=0, every_s=5), Ranks(alone=True), lambda: now[0])
    for step in range(1, 5):
        assert not cadence.due(step)
    now[0] = 5.0
    assert any(cadence.due(step) for step in range(5, 30))
    off = Cadence(CheckpointConfig(every_steps=0), Ranks(alone=True), lambda: 1e9)
    assert not any(off.due(step) for step in range(100))
