"""``hunyuan-train launch`` with real ranks: gloo meets anew, and training goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from fake_job import ROOT, descendants, events, finish, notes, poll, run
from tiny_run import make_data, overrides, rows, run_verb

from hunyuan_train.checkpoint.load import load_weights
from hunyuan_train.cli.launch import VERBS
from hunyuan_train.engine import launching
from hunyuan_train.resilience.config import ResilienceConfig

MEETING = """
import torch, torch.distributed as dist
from hunyuan_train.runtime.dist import init_world
w = init_world("cpu", 20.0)
total = torch.full((4,), float(rank + 1))
dist.all_reduce(total)
assert total[0].item() == world * (world + 1) / 2
note("met")
save(attempt + 1)
dist.barrier()
if attempt < {restarts}:
    if rank == attempt % world:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(total)
    time.sleep(100)
"""


def meet_again_and_again(run_dir: Path, restarts: int) -> float:
    """Every attempt is killed after its first collective; return the seconds of all."""
    started = time.monotonic()
    code, text = run(
        run_dir,
        MEETING.format(restarts=restarts),
        "ranks_per_node=2",
        'preload=["torch","torch.distributed","hunyuan_train.runtime.dist"]',
        timeout_s=240,
    )
    assert code == 0, text
    assert len(events(run_dir, "attempt_start")) == restarts + 1, "no restart was in vain"
    assert len(notes(run_dir, "met")) == 2 * (restarts + 1)
    return time.monotonic() - started


@pytest.mark.dist
def test_ten_restarts_of_ten_meet_cleanly(tmp_path: Path) -> None:
    meet_again_and_again(tmp_path, 10)


@pytest.mark.dist
@pytest.mark.chaos
def test_fifty_restarts_of_fifty_meet_cleanly(tmp_path: Path) -> None:
    seconds = meet_again_and_again(tmp_path, 50)
    print(f"50 restarts in {seconds:.0f} s")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


def launch_train(arguments: list[str], *fields: str) -> subprocess.Popen[str]:
    return launch_verb("train", arguments, *fields)


STARTED: list[subprocess.Popen[str]] = []


@pytest.fixture(autouse=True)
def _no_job_outlives_a_failed_test():
    yield
    for process in STARTED:
        if process.poll() is None:
            process.kill()
            process.communicate()
    STARTED.clear()


def launch_verb(verb: str, arguments: list[str], *fields: str) -> subprocess.Popen[str]:
    # How fast a disk writes beside other tests is not what these are about; one says otherwise.
    calm = ["launch.preflight=false", *arguments, *fields]
    process = subprocess.Popen(
        [sys.executable, "-m", "hunyuan_train", "launch", verb, *calm],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    STARTED.append(process)
    return process


def reached(run_dir: Path, step: int) -> bool:
    path = run_dir / "metrics.jsonl"
    return path.is_file() and any(f'"step": {step},' in line for line in path.open())


def ranks_of(process: subprocess.Popen[str]) -> list[int]:
    """Return the ranks: the children of the forking process, which is the first child."""
    forking = min(descendants(process.pid))
    text = Path(f"/proc/{forking}/task/{forking}/children").read_text()
    return sorted(int(pid) for pid in text.split())


@pytest.mark.dist
@pytest.mark.slow
def test_a_killed_rank_costs_seconds_and_the_result_is_that_of_a_quiet_run(
    data: Path, tmp_path: Path
) -> None:
    extra = ("stage.steps=24", "checkpoint.every_steps=6")
    quiet, broken = tmp_path / "quiet", tmp_path / "broken"
    done = run_verb("train", overrides(data, quiet, *extra), ranks=4)
    assert done.returncode == 0, done.stderr
    process = launch_train(
        overrides(data, broken, *extra), "launch.ranks_per_node=4", "launch.preflight=true"
    )
    poll(lambda: reached(broken, 8), "step 8", 120)
    killed_at = time.time()
    os.kill(ranks_of(process)[2], signal.SIGKILL)
    poll(lambda: any(r["time"] > killed_at + 1 for r in rows(broken)), "the next step", 60)
    seconds = next(r["time"] for r in rows(broken) if r["time"] > killed_at + 1) - killed_at
    print(f"kill to the next step of 4 ranks: {seconds:.1f} s")
    code, text = finish(process, 120)
    assert code == 0, text
    assert seconds < 25, "on two busy cores; see docs/launch.md for the figure"
    assert "certified by an earlier attempt" in (broken / "logs/attempt-1/rank-0.log").read_text()
    assert [row["step"] for row in rows(broken)] == list(range(1, 25))
    for which in ("model", "ema"):
        one, two = load_weights(quiet, which), load_weights(broken, which)
        assert all(torch.equal(one[name], two[name]) for name in one), which


@pytest.mark.dist
@pytest.mark.slow
def test_training_shrinks_to_one_node_and_grows_back(data: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    arguments = overrides(
        data, run_dir, "stage.steps=100000", "checkpoint.every_steps=5", "certify.at_start=false"
    )
    fields = ("launch.nodes=2", "launch.ranks_per_node=1", "launch.min_nodes=1")
    first, second = launch_train(arguments, *fields), launch_train(arguments, *fields)
    poll(lambda: reached(run_dir, 6), "step 6", 120)
    second.kill()
    second.communicate()
    step = poll(lambda: events(run_dir, "shrink") and rows(run_dir)[-1]["step"], "fewer", 60)
    poll(lambda: reached(run_dir, int(step) + 6), "steps on one node", 60)
    plan = json.loads((run_dir / "launch/plan-1.json").read_text())
    assert plan["overrides"] == ["data.planned_ranks=2"]
    second = launch_train(arguments, *fields)
    poll(lambda: events(run_dir, "grow"), "the return", 60)
    step = int(rows(run_dir)[-1]["step"])
    poll(lambda: reached(run_dir, step + 3), "steps on two nodes", 60)
    first.send_signal(signal.SIGTERM)
    assert [finish(process, 60)[0] for process in (first, second)] == [75, 75]


@pytest.mark.dist
@pytest.mark.slow
def test_data_that_is_not_there_is_said_once_and_ends_with_2(data: Path, tmp_path: Path) -> None:
    arguments = overrides(data, tmp_path / "run", f"data.latents={tmp_path / 'nothing'}")
    code, text = finish(launch_train(arguments, "launch.ranks_per_node=2"), 120)
    assert code == 2
    assert text.count(str(tmp_path / "nothing")) == 1, text
    assert len(events(tmp_path / "run", "attempt_start")) == 1


@pytest.mark.dist
@pytest.mark.slow
def test_the_gap_between_two_stages_is_no_hang(data: Path, tmp_path: Path) -> None:
    stages = "curriculum.stages={demo_image:{},demo_video_short:{after:demo_image}}"
    fields = ("launch.ranks_per_node=2", "resilience.watchdog_s=5", "certify.at_start=false")
    arguments = overrides(data, tmp_path, stages, "data.train_anchors=[64]", "stage.steps=3")
    code, text = finish(launch_verb("curriculum", arguments, *fields), 120)
    assert code == 0, text
    assert [len(rows(stage)) for stage in sorted((tmp_path / "stages").iterdir())] == [3, 3]
    assert not events(tmp_path, "detected")


def test_only_verbs_that_write_heartbeats_are_watched() -> None:
    cfg = ResilienceConfig(watchdog_s=5)
    found = {verb: launching.watched(verb, cfg).watchdog_s for verb in VERBS}
    assert found == {"train": 5, "curriculum": 5, "precompute": 0, "certify": 0}


def test_a_layout_that_the_model_cannot_take_is_refused_at_once(tmp_path: Path) -> None:
    arguments = [f"run.dir={tmp_path}", "launch.layouts=['tp=5']"]
    code, text = finish(launch_train(arguments), 30)
    assert code == 2
    assert "launch.layouts has 'tp=5': tp * cp_ulysses = 5 does not divide" in text
    assert not any(tmp_path.iterdir())
