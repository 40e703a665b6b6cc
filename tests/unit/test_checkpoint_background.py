"""Saving while training goes on, in one process: what is saved, what fails, what is waited for."""

import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from writers import being_written, gone, held, until

from hunyuan_train.checkpoint import background as background_module
from hunyuan_train.checkpoint import staging as staging_module
from hunyuan_train.checkpoint.config import CheckpointConfig
from hunyuan_train.checkpoint.load import load_weights
from hunyuan_train.checkpoint.manager import CheckpointManager, SaveOutcome
from hunyuan_train.checkpoint.storage import Manifest

pytestmark = pytest.mark.dist


def tensors(fill: float = 1.0, count: int = 300_000) -> dict:
    return {
        "model": {"w": torch.full((count // 3, 3), fill), "half": torch.ones(7).bfloat16() * fill},
        "counters": {"seen": torch.tensor(2**40)},
    }


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CheckpointManager]:
    """One manager for most tests: a writer takes seconds to start."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    manager = CheckpointManager(folder, CheckpointConfig(keep_last=0), {"a": 1})
    manager.start(tensors())
    yield manager
    manager.close()


@pytest.fixture
def started(shared: CheckpointManager) -> CheckpointManager:
    shared.finish()
    shutil.rmtree(shared.folder, ignore_errors=True)
    return shared


def names(manager: CheckpointManager) -> list[str]:
    return sorted(os.listdir(manager.folder))


def one(outcomes: list[SaveOutcome]) -> SaveOutcome:
    (outcome,) = outcomes
    return outcome


def test_values_are_those_at_the_save_although_training_goes_on(started: CheckpointManager):
    state = tensors(0.0)
    for step in (1, 2, 3):
        for tensor in state["model"].values():
            tensor.fill_(step)
        with held(started.writer_pid):
            assert started.save(step, state, {"at": step})
            for tensor in state["model"].values():
                tensor.fill_(-1.0)
            assert started.poll() == []
            assert not (started.folder / f"step-{step:08d}").exists()
        outcome = one(started.finish())
        assert (outcome.step, outcome.failure) == (step, "")
        assert outcome.seconds > outcome.stall_s > 0
    for step in (1, 2, 3):
        found = load_weights(started.folder / f"step-{step:08d}", "model")
        assert torch.equal(found["w"], torch.full((100_000, 3), float(step)))
        assert torch.equal(found["half"], torch.ones(7).bfloat16() * step)
    target = tensors(9.0)
    restored = started.restore(target)
    assert restored is not None
    assert (restored.step, restored.extra) == (3, {"at": 3})
    assert torch.equal(target["model"]["w"], torch.full((100_000, 3), 3.0))


def test_both_ways_write_the_same_files(started: CheckpointManager, tmp_path: Path):
    plain = CheckpointManager(tmp_path / "plain", CheckpointConfig(), {"a": 1})
    for manager in (plain, started):
        assert manager.save(4, tensors(2.0), {"x": 1}, score=0.5)
        assert one(manager.finish()).failure == ""
    left, right = plain.folder / "step-00000004", started.folder / "step-00000004"
    assert sorted(os.listdir(left)) == sorted(os.listdir(right))
    mine, theirs = (Manifest.read(folder) for folder in (left, right))
    # The archives hold a number that torch draws.
    assert replace(mine, files={}) == replace(theirs, files={})
    assert mine.files["__0_0.distcp"].num_bytes == theirs.files["__0_0.distcp"].num_bytes
    assert mine.digests.keys() == {"model/w", "model/half", "counters/seen"}


def test_starting_and_asking_take_no_time(started: CheckpointManager):
    begun = time.perf_counter()
    assert started.poll() == []
    assert time.perf_counter() - begun < 0.05
    with held(started.writer_pid):
        started.save(1, tensors(), {})
        begun = time.perf_counter()
        for _ in range(100):
            assert started.poll() == []
        assert time.perf_counter() - begun < 0.1
    until(lambda: started.poll())
    assert names(started) == ["step-00000001"]


def test_a_second_save_waits_for_the_first_and_counts_the_wait(started: CheckpointManager):
    started.save(1, tensors(1.0), {})
    started.finish()
    pid = started.writer_pid
    os.kill(pid, signal.SIGSTOP)
    started.save(2, tensors(2.0), {})
    waker = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"import os, time; time.sleep(0.5); os.kill({pid}, {signal.SIGCONT:d})",
        ]
    )
    started.save(3, tensors(3.0), {})
    waker.wait()
    second, third = started.finish()
    assert (second.step, second.failure, third.step, third.failure) == (2, "", 3, "")
    assert third.stall_s > 0.4 > second.stall_s
    for step in (1, 2, 3):
        found = load_weights(started.folder / f"step-{step:08d}", "model")
        assert torch.equal(found["w"], torch.full((100_000, 3), float(step)))


def test_a_writer_killed_while_writing_costs_that_checkpoint_only(
    started: CheckpointManager, caplog: pytest.LogCaptureFixture
):
    big = tensors(count=15_000_000)
    started.save(1, tensors(), {})
    started.finish()
    started.save(2, big, {})
    until(lambda: being_written(started.folder, 1 << 20))
    os.kill(started.writer_pid, signal.SIGKILL)
    outcome = one(started.finish())
    assert outcome.failure == "the writer process of rank 0 was killed by SIGKILL"
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert f"CHECKPOINT OF STEP 2 WAS NOT SAVED in {started.folder}: " in warning
    assert "killed by SIGKILL" in warning
    assert names(started) == ["step-00000001", "step-00000002.incomplete"]
    assert started.latest() == started.folder / "step-00000001"
    assert started.save(3, tensors(3.0), {})
    assert one(started.finish()).failure == ""
    assert names(started) == ["step-00000001", "step-00000003"]
    assert "removing " in caplog.text


def test_a_writer_that_died_between_two_saves_is_replaced(started: CheckpointManager):
    started.save(1, tensors(), {})
    started.finish()
    pid = started.writer_pid
    os.kill(pid, signal.SIGKILL)
    assert started._background is not None
    until(lambda: not started._background._writer.alive())
    assert started.save(2, tensors(), {})
    assert one(started.finish()).failure == ""
    assert started.writer_pid != pid


def test_a_failing_disk_in_the_writer_costs_that_checkpoint_only(
    started: CheckpointManager, caplog: pytest.LogCaptureFixture
):
    started.save(1, tensors(), {})
    started.finish()
    _, most = resource.prlimit(started.writer_pid, resource.RLIMIT_FSIZE, (100_000, -1))
    assert started.save(2, tensors(), {})
    outcome = one(started.finish())
    assert "File too large" in outcome.failure
    assert "CHECKPOINT OF STEP 2 WAS NOT SAVED" in caplog.text
    assert "It needs " in caplog.text
    assert names(started) == ["step-00000001"]
    pid = started.writer_pid
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (most, most))
    assert started.save(3, tensors(), {})
    assert one(started.finish()).failure == ""
    assert started.writer_pid == pid


@pytest.fixture
def small_disk(shared: CheckpointManager) -> Iterator[Path]:
    """Room for seven names, one of which is the root's."""
    shared.finish()
    shutil.rmtree(shared.folder, ignore_errors=True)
    shared.folder.mkdir()
    options = "size=4m,nr_inodes=7"
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(shared.folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this process may not mount a tmpfs")
    yield shared.folder
    subprocess.run(["umount", str(shared.folder)], check=True)


def test_a_full_disk_in_the_writer(
    small_disk: Path, shared: CheckpointManager, caplog: pytest.LogCaptureFixture
):
    assert shared.save(1, tensors(count=3000), {})
    assert one(shared.finish()).failure == ""
    assert shared.save(2, tensors(count=3000), {})  # A folder and two files are too many.
    assert "No space left on device" in one(shared.finish()).failure
    assert shared.save(3, tensors(count=3_000_000), {})
    assert "not enough free space, nothing was written" in one(shared.finish()).failure
    assert names(shared) == ["step-00000001"]
    assert caplog.text.count("make room before the next one") == 2
    shutil.rmtree(small_disk / "step-00000001")
    assert shared.save(4, tensors(count=3000), {})
    assert one(shared.finish()).failure == ""


def test_without_memory_for_a_copy_it_saves_while_training_waits(
    started: CheckpointManager,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    monkeypatch.setattr(staging_module, "_available_bytes", lambda: 1 << 20)
    assert started.save(1, tensors(count=18_000_000), {})
    assert names(started) == ["step-00000001"]
    assert "written while training waits" in caplog.text
    assert "a copy of the state takes 68 MiB of memory, free are 1" in caplog.text
    monkeypatch.undo()
    assert started.save(2, tensors(count=18_000_000), {})
    assert one(started.finish()[1:]).failure == ""


def test_an_unexpected_error_in_the_writer_never_ends_the_run(
    started: CheckpointManager, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    started.save(1, tensors(), {})
    started.finish()
    real = background_module.plan

    def spoilt(flat):
        places, live, size = real(flat)
        return {**places, "": None}, live, size

    monkeypatch.setattr(background_module, "plan", spoilt)
    monkeypatch.setattr(staging_module.SharedMemory, "copy", lambda self, places, live: None)
    assert started.save(2, tensors(), {})
    assert "AttributeError: 'NoneType'" in one(started.finish()).failure
    assert "CHECKPOINT OF STEP 2 WAS NOT SAVED" in caplog.text
    monkeypatch.undo()
    assert started.save(3, tensors(), {})
    assert one(started.finish()).failure == ""


def test_signals_to_the_group_are_left_to_the_trainer(started: CheckpointManager):
    started.save(1, tensors(), {})
    started.finish()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        os.kill(started.writer_pid, number)
    started.save(2, tensors(), {})
    assert one(started.finish()).failure == ""


TRAINER = """
import sys, time
from pathlib import Path
import torch
from hunyuan_train.checkpoint.config import CheckpointConfig
from hunyuan_train.checkpoint.manager import CheckpointManager

manager = CheckpointManager(Path(sys.argv[1]), CheckpointConfig(), {"a": 1})
state = {"model": {"w": torch.ones(10_000_000, 3)}}
manager.start(state)
manager.save(1, state, {})
manager.finish()
state["model"]["w"].fill_(2.0)
manager.save(2, state, {})
print(manager.writer_pid, flush=True)
time.sleep(600)
"""


def test_a_trainer_killed_while_its_writer_writes_leaves_the_one_before(tmp_path: Path):
    folder = tmp_path / "checkpoints"
    trainer = subprocess.Popen(
        [sys.executable, "-c", TRAINER, str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert trainer.stdout is not None
    writer = int(trainer.stdout.readline())
    until(lambda: being_written(folder, 1 << 20))
    trainer.kill()
    trainer.wait()
    until(lambda: gone(writer))
    assert sorted(os.listdir(folder)) == ["step-00000001", "step-00000002.incomplete"]
    manager = CheckpointManager(folder, CheckpointConfig(), {"a": 1})
    target = {"model": {"w": torch.zeros(10_000_000, 3)}}
    restored = manager.restore(target)
    assert restored is not None
    assert restored.step == 1
    assert target["model"]["w"].eq(1.0).all()
    manager.start()
    assert manager.save(2, {"model": {"w": torch.ones(3)}}, {})
    manager.close()
    assert names(manager) == ["step-00000001", "step-00000002"]


def test_asynchronous_false_starts_no_process(tmp_path: Path):
    manager = CheckpointManager(tmp_path, CheckpointConfig(asynchronous=False), {})
    manager.start(tensors())
    assert manager.writer_pid is None
    assert manager.save(1, tensors(), {})
    assert names(manager) == ["step-00000001"]
    assert one(manager.poll()).stall_s > 0


def test_the_writer_ends_with_the_manager(tmp_path: Path):
    manager = CheckpointManager(tmp_path, CheckpointConfig(), {})
    manager.start(tensors())
    pid = manager.writer_pid
    assert pid is not None
    manager.save(1, tensors(), {})
    manager.close()
    assert gone(pid)
    assert names(manager) == ["step-00000001"]
    assert one(manager.poll()).failure == ""
