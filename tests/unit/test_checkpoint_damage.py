"""Damaged checkpoints, full disks and kills while saving."""

import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from distributed import RankError, run_distributed
from saved_states import bits, manager_of, names_in, save_two, step_folder, tensors_of

from hunyuan_train.checkpoint import writing as writing_module
from hunyuan_train.checkpoint.digest import HashingStream
from hunyuan_train.checkpoint.load import load_weights


@pytest.fixture
def two_saved(tmp_path: Path) -> Path:
    return save_two(tmp_path)


def _truncate(folder: Path) -> None:
    os.truncate(folder / "__0_0.distcp", (folder / "__0_0.distcp").stat().st_size - 10)


def _flip(folder: Path) -> None:
    content = bytearray((folder / "__0_0.distcp").read_bytes())
    content[len(content) // 2] ^= 4
    (folder / "__0_0.distcp").write_bytes(content)


def _lengthen(folder: Path) -> None:
    with (folder / "__0_0.distcp").open("ab") as stream:
        stream.write(b"xx")


def _edit_manifest(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"samples": 200', '"samples": 201'))


def _cut_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text((folder / "manifest.json").read_text()[:40])


DAMAGE = [
    pytest.param(_truncate, r"__0_0\.distcp is truncated: \d+ of \d+ bytes", id="truncated"),
    pytest.param(_flip, r"__0_0\.distcp has changed content: its SHA-256", id="flipped-bit"),
    pytest.param(_lengthen, r"__0_0\.distcp has \d+ bytes instead of", id="lengthened"),
    pytest.param(lambda f: (f / "__0_0.distcp").unlink(), r"__0_0\.distcp is missing", id="shard"),
    pytest.param(lambda f: (f / ".metadata").unlink(), r"\.metadata is missing", id="metadata"),
    pytest.param(
        lambda f: (f / "manifest.json").unlink(), r"manifest\.json is missing", id="manifest"
    ),
    pytest.param(_edit_manifest, r"manifest\.json was changed: its own hash", id="edited-manifest"),
    pytest.param(_cut_manifest, r"manifest\.json is not a manifest", id="cut-manifest"),
]


@pytest.mark.parametrize(("damage", "reason"), DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    two_saved: Path, damage, reason: str, caplog: pytest.LogCaptureFixture
):
    damage(step_folder(two_saved, 20))
    target = tensors_of(0)
    manager = manager_of(two_saved)
    restored = manager.restore(target)
    assert restored is not None
    assert restored.step == 10
    assert restored.extra == {"samples": 100}
    assert bits(target) == bits(tensors_of(10))
    (message,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert f"skipping the damaged checkpoint {step_folder(two_saved, 20)}: " in message
    assert pytest.raises(ValueError, match=reason).matches(ValueError(message))
    assert names_in(two_saved) == ["step-00000010", "step-00000020.damaged"]
    assert manager.latest() == step_folder(two_saved, 10)
    assert manager.save(20, tensors_of(20), {})
    assert names_in(two_saved) == ["step-00000010", "step-00000020"]


@pytest.mark.parametrize(("damage", "reason"), DAMAGE)
def test_if_none_is_good_all_are_listed_and_left_as_they_are(two_saved: Path, damage, reason: str):
    shutil.rmtree(step_folder(two_saved, 10))
    damage(step_folder(two_saved, 20))
    with pytest.raises(
        ValueError, match=rf"no checkpoint in .* is good: step-00000020: .*{reason}"
    ):
        manager_of(two_saved).restore(tensors_of())
    assert names_in(two_saved) == ["step-00000020"]


def test_the_hash_check_can_be_left_out(two_saved: Path):
    _flip(step_folder(two_saved, 20))
    restored = manager_of(two_saved, verify_hashes=False, digests=False).restore(tensors_of())
    assert restored is not None
    assert restored.step == 20


def test_without_hashes_the_digest_still_names_the_tensor(two_saved: Path):
    _flip(step_folder(two_saved, 20))
    with pytest.raises(
        ValueError,
        match=r"step-00000020 was restored wrongly: 1 of 9 tensors do not have the digest they "
        r"were saved with: \w+/\S+ in the files themselves; start again",
    ):
        manager_of(two_saved, verify_hashes=False).restore(tensors_of())


def test_without_hashes_an_unreadable_file_is_still_passed_over(
    two_saved: Path, caplog: pytest.LogCaptureFixture
):
    file = step_folder(two_saved, 20) / "__0_0.distcp"
    file.write_bytes(bytes(file.stat().st_size))
    target = tensors_of(0)
    restored = manager_of(two_saved, verify_hashes=False).restore(target)
    assert restored is not None
    assert restored.step == 10
    assert bits(target) == bits(tensors_of(10))
    assert (
        f"skipping a checkpoint: {step_folder(two_saved, 20)} cannot be read: rank 0: "
        in caplog.text
    )


def _assert_not_saved(folder: Path, caplog: pytest.LogCaptureFixture, reason: str) -> None:
    warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert len(warnings) == 1
    assert f"CHECKPOINT OF STEP 30 WAS NOT SAVED in {folder / 'checkpoints'}: " in warnings[0]
    assert reason in warnings[0]
    assert "It needs " in warnings[0]
    assert "free are " in warnings[0]
    assert names_in(folder) == ["step-00000010", "step-00000020"]


def test_too_little_space_is_noticed_before_anything_is_written(
    two_saved: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    usage = shutil.disk_usage(two_saved)
    monkeypatch.setattr(writing_module.shutil, "disk_usage", lambda path: usage._replace(free=9000))
    manager = manager_of(two_saved)
    assert manager.save(30, tensors_of(), {}) is False
    _assert_not_saved(two_saved, caplog, "not enough free space, nothing was written")
    assert "free are 0.0 MiB" in caplog.text
    assert manager.latest() == step_folder(two_saved, 20)
    monkeypatch.undo()
    assert manager.save(30, tensors_of(), {}) is True


def test_a_disk_that_fills_up_while_writing_costs_only_that_checkpoint(
    two_saved: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    real = HashingStream.write

    def full_after_a_while(self: HashingStream, data) -> int:
        if self.num_bytes > 3000:
            self.error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            raise self.error
        return real(self, data)

    monkeypatch.setattr(HashingStream, "write", full_after_a_while)
    manager = manager_of(two_saved)
    assert manager.save(30, tensors_of(), {}) is False
    _assert_not_saved(two_saved, caplog, "No space left on device")
    monkeypatch.undo()
    assert manager.save(30, tensors_of(), {}) is True
    assert manager.latest() == step_folder(two_saved, 30)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1200k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this process may not mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_really_full(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    usage = shutil.disk_usage(small_disk)._replace(free=1 << 40)
    monkeypatch.setattr(writing_module.shutil, "disk_usage", lambda path: usage)
    manager = manager_of(small_disk)
    assert manager.save(1, tensors_of(), {})
    assert manager.save(2, {"model": {"w": torch.ones(500_000)}}, {}) is False
    assert "CHECKPOINT OF STEP 2 WAS NOT SAVED" in caplog.text
    assert "No space left on device" in caplog.text
    assert names_in(small_disk) == ["step-00000001"]


def test_a_failure_that_is_not_the_storage_is_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def broken(self: HashingStream, data) -> int:
        raise RuntimeError("our own bug")

    monkeypatch.setattr(HashingStream, "write", broken)
    with pytest.raises(RuntimeError, match=r"saving .* failed: rank 0: RuntimeError: our own bug"):
        manager_of(tmp_path).save(1, tensors_of(), {})


def _die_while_saving(rank: int, world: int, folder: str) -> None:
    real = HashingStream.write

    def die(self: HashingStream, data) -> int:
        if self.num_bytes > 3000:
            os._exit(9)
        return real(self, data)

    HashingStream.write = die  # This process ends here anyway.
    manager_of(Path(folder)).save(30, tensors_of(), {})


@pytest.mark.dist
def test_a_process_killed_while_saving_leaves_the_last_one_the_latest(two_saved: Path):
    with pytest.raises(RankError, match="died with exit code 9"):
        run_distributed(_die_while_saving, 1, str(two_saved))
    assert names_in(two_saved) == ["step-00000010", "step-00000020", "step-00000030.incomplete"]
    manager = manager_of(two_saved)
    restored = manager.restore(tensors_of())
    assert restored is not None
    assert restored.step == 20
    assert manager.save(30, tensors_of(), {})
    assert names_in(two_saved) == ["step-00000010", "step-00000020", "step-00000030"]


def test_reading_a_run_passes_over_a_truncated_checkpoint_but_not_if_asked_for_it(two_saved: Path):
    _truncate(step_folder(two_saved, 20))
    assert bits(load_weights(two_saved, "ema")) == bits(tensors_of(10)["ema"])
    with pytest.raises(ValueError, match=r"step-00000020 is damaged: __0_0\.distcp is truncated"):
        load_weights(step_folder(two_saved, 20), "ema")
