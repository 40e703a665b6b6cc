"""Runs that encoders of their own feed: the losses of one that encodes by itself, whatever dies."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from forked import Job
from tiny_run import make_data, overrides, rows, run_verb

from hunyuan_train.data.service_board import Board, Entry

pytestmark = [pytest.mark.dist, pytest.mark.slow]

SHAPE = [
    "data.anchors=[64]", "data.durations=[1,5]", "data.assign=every", "data.bucket_stride=32",
    "data.max_batch=1", "data.global_samples=4", "data.storage_dtype=float32", "stage.steps=14",
    "data.workers=1", "data.prefetch_gib=0.0001",
]  # fmt: skip
SERVICE = ["data.encode=service", "data.service.cache_gib=0", "data.service.in_flight=2",
           "data.service.nice=0"]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def losses(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Of two ranks that encode by themselves."""
    run = tmp_path_factory.mktemp("online")
    done = run_verb("train", arguments(data, run, "data.encode=online"), 2)
    assert done.returncode == 0, done.stderr
    return [row["loss"] for row in rows(run)]


def arguments(data: Path, run: Path, *extra: str) -> list[str]:
    source = [f"data.source={data / 'clips'}", f"data.latents={data / 'index'}"]
    return overrides(data, run, *SHAPE, *source, *extra)


def done_steps(run: Path) -> int:
    path = run / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def until(what: Callable[[], bool], job: Job) -> None:
    deadline = time.monotonic() + 200
    while not what():
        assert job.running(), job.said()[-3000:]
        assert time.monotonic() < deadline, job.said()[-3000:]
        time.sleep(0.01)


def encoders(folder: Path) -> list[Entry]:
    return [entry for entry, _ in Board(folder).entries() if alive(entry.pid)]


def alive(pid: int) -> bool:
    path = Path(f"/proc/{pid}/stat")
    return path.exists() and path.read_text().rpartition(")")[2].split()[0] != "Z"


def test_killed_encoders_cost_no_step_and_no_bit(
    data: Path, tmp_path: Path, losses: list[float]
) -> None:
    folder, run = tmp_path / "service", tmp_path / "run"
    service = [*SERVICE, f"data.service.folder={folder}", "data.service.processes=2",
               "data.service.devices=[cpu]", "data.service.fallback_s=0"]  # fmt: skip
    job = Job("train", arguments(data, run, *service), 2, tmp_path / "log")
    try:
        until(lambda: done_steps(run) >= 2 and len(encoders(folder)) == 2, job)
        os.kill(encoders(folder)[0].pid, signal.SIGKILL)
        killed_at = done_steps(run)
        until(lambda: done_steps(run) >= killed_at + 4, job)
        pids = [entry.pid for entry in encoders(folder)]
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        job.wait()
    finally:
        job.kill()
    assert pids
    assert [row["step"] for row in rows(run)] == list(range(1, 15))
    assert [row["loss"] for row in rows(run)] == losses
    last = rows(run)[-1]
    assert last["service_lost_encoders"] >= 3
    assert last["service_encoded"] > 0
    assert last["service_fallback"] > 0
    assert last["replaced_samples"] == 0
    assert "ended with exit code -9" in job.said()
    assert "encodes by itself" in job.said()
    assert encoders(folder) == [], "they ended with training"


def test_serve_feeds_a_run_and_may_hang_for_a_while(
    data: Path, tmp_path: Path, losses: list[float]
) -> None:
    folder, run = tmp_path / "service", tmp_path / "run"
    service = [*SERVICE, f"data.service.folder={folder}", "data.service.fallback_s=0",
               "data.service.silence_s=3"]  # fmt: skip
    served = Job("serve", [*arguments(data, run, *service), "data.service.host=127.0.0.1"], 1,
                 tmp_path / "served")  # fmt: skip
    job = Job("train", arguments(data, run, *service), 2, tmp_path / "log")
    try:
        until(lambda: done_steps(run) >= 3, job)
        (entry,) = encoders(folder)
        os.kill(entry.pid, signal.SIGSTOP)
        until(lambda: "gave no sign of life" in job.said(), job)
        os.kill(entry.pid, signal.SIGCONT)
        job.wait()
        os.kill(entry.pid, signal.SIGTERM)
        served.wait()
    finally:
        job.kill()
        served.kill()
    assert [row["loss"] for row in rows(run)] == losses
    assert rows(run)[-1]["service_encoded"] > 0
    assert f"encoder {entry.id} serves on 127.0.0.1:{entry.port}" in served.said()
    assert " samples encoded, " in served.said()
    assert Board(folder).entries() == [], "it has taken its entry away"
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 14
