"""Training runs as users start them: killed and resumed, on one rank and on two."""

import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from forked import Job
from tiny_run import command, make_data, overrides, rows, run_verb

from hunyuan_train.checkpoint.load import load_weights

STEPS, EVERY = 40, 20
COMPARED = ("step", "loss", "grad_norm", "lr", "tokens", "samples")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def single(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process on the global batches of two."""
    run = tmp_path_factory.mktemp("single")
    done = run_verb("train", overrides(data, run, "data.planned_ranks=2"))
    assert done.returncode == 0, done.stderr
    return run


def kill_after_step(arguments: list[str], ranks: int, run: Path, step: int) -> None:
    """Start training and kill all its processes with SIGKILL once it has logged ``step``."""
    metrics = run / "metrics.jsonl"

    def logged() -> bool:
        return metrics.exists() and any(f'"step": {step}' in line for line in metrics.open())

    job = Job("train", arguments, ranks, run.parent / "broken-log")
    assert job.kill_when(logged), "the run ended before it could be killed"


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_and_resumed_run_is_bitwise_the_straight_one(
    data: Path, tmp_path: Path, ranks: int
) -> None:
    extra = (f"stage.steps={STEPS}", f"checkpoint.every_steps={EVERY}")
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    done = run_verb("train", overrides(data, straight, *extra), ranks)
    assert done.returncode == 0, done.stderr
    kill_after_step(overrides(data, broken, *extra), ranks, broken, EVERY + 3)
    assert rows(broken)[-1]["step"] < STEPS
    resumed = run_verb("train", overrides(data, broken, *extra), ranks)
    assert resumed.returncode == 0, resumed.stderr

    left, right = rows(straight), rows(broken)
    assert [row["step"] for row in right] == list(range(1, STEPS + 1))
    assert [[r[k] for k in COMPARED] for r in left] == [[r[k] for k in COMPARED] for r in right]
    for which in ("model", "ema"):
        one, two = load_weights(straight, which), load_weights(broken, which)
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one), which


@pytest.mark.dist
@pytest.mark.slow
def test_sigterm_saves_and_exits_with_its_own_code_then_goes_on(data: Path, tmp_path: Path) -> None:
    arguments = overrides(data, tmp_path, "stage.steps=5000", "checkpoint.every_steps=0")
    process = subprocess.Popen(command("train", arguments), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (tmp_path / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 75, errors
    last = int(rows(tmp_path)[-1]["step"])
    assert (tmp_path / "checkpoints" / f"step-{last:08d}").is_dir()
    again = run_verb(
        "train", [*arguments[:-2], f"stage.steps={last + 2}", "run.accept_changes=true"]
    )
    assert again.returncode == 0, again.stderr
    assert [int(row["step"]) for row in rows(tmp_path)] == list(range(1, last + 3))


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [
        "parallel.zero_stage=0",
        "parallel.zero_stage=2",
        "parallel.zero_stage=3",
        "parallel.dp_replicate=2",
    ],
)
def test_two_ranks_train_what_one_rank_trains(
    data: Path, single: Path, tmp_path: Path, layout: str
) -> None:
    """The same global batches on one and on two ranks: equal losses, norms and weights."""
    double = run_verb("train", overrides(data, tmp_path, layout), ranks=2)
    assert double.returncode == 0, double.stderr
    for left, right in zip(rows(single), rows(tmp_path), strict=True):
        assert left["samples"] == right["samples"]
        assert left["loss"] == pytest.approx(right["loss"], rel=1e-5)
        assert left["grad_norm"] == pytest.approx(right["grad_norm"], rel=1e-4)
    mine, theirs = load_weights(single, "model"), load_weights(tmp_path, "model")
    for name, tensor in mine.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=1e-3, atol=2e-5, msg=name)
