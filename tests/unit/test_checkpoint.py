"""Checkpoints of a single process: exactness, damage, identity, full disks, retention."""

import errno
import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from distributed import RankError, run_distributed
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from hunyuan_train.checkpoint import writing as writing_module
from hunyuan_train.checkpoint.config import CheckpointConfig
from hunyuan_train.checkpoint.digest import HashingStream
from hunyuan_train.checkpoint.load import load_weights, read_manifest, restore_into
from hunyuan_train.checkpoint.manager import CheckpointManager

IDENTITY = {"kind": "hunyuan", "hidden_size": 192, "patch_size": [1, 2, 2]}


def _tensors(seed: int = 0) -> dict:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "model": {
            "weight": draw(33, 7),
            "transposed": draw(5, 9).t(),
            "half": draw(11).to(torch.bfloat16),
            "strange": torch.tensor([float("nan"), float("inf"), -0.0, 1e-45]),
        },
        "ema": {"weight": draw(33, 7), "half": draw(11)},
        "optimizer": {"weight": {"step": torch.tensor(float(seed)), "exp_avg": draw(33, 7)}},
        "counters": {"seen": torch.tensor([2**40 + seed])},
    }


def _bits(tensors: dict) -> dict:
    return {
        name: _bits(value)
        if isinstance(value, dict)
        else (
            value.dtype,
            tuple(value.shape),
            value.contiguous().view(-1).view(torch.uint8).tolist(),
        )
        for name, value in tensors.items()
    }


def _manager(folder: Path, **changes) -> CheckpointManager:
    return CheckpointManager(folder / "checkpoints", CheckpointConfig(**changes), IDENTITY)


def _step(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / f"step-{step:08d}"


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


@pytest.fixture
def two_saved(tmp_path: Path) -> Path:
    manager = _manager(tmp_path)
    assert manager.save(10, _tensors(10), {"samples": 100})
    assert manager.save(20, _tensors(20), {"samples": 200})
    return tmp_path


def test_a_restored_state_is_bitwise_the_saved_one(tmp_path: Path):
    extra = {"samples": 12, "loader": {"position": 3, "fingerprint": "ab"}, "third": 1 / 3}
    assert _manager(tmp_path).save(7, _tensors(1), extra)
    target = _tensors(2)
    storages = [t.data_ptr() for t in target["model"].values()]
    restored = _manager(tmp_path).restore(target)
    assert restored is not None
    assert (restored.step, restored.extra, restored.folder) == (7, extra, _step(tmp_path, 7))
    assert _bits(target) == _bits(_tensors(1))
    assert storages == [t.data_ptr() for t in target["model"].values()]


def test_the_folder_holds_what_the_manifest_says(two_saved: Path):
    folder = _step(two_saved, 20)
    assert {p.name for p in folder.iterdir()} == {"__0_0.distcp", ".metadata", "manifest.json"}
    files = json.loads((folder / "manifest.json").read_text())["files"]
    for name, record in files.items():
        content = (folder / name).read_bytes()
        assert record == {"num_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert files.keys() == {"__0_0.distcp", ".metadata"}
    assert read_manifest(two_saved).extra == {"samples": 200}


def test_torch_reads_the_files_without_us(two_saved: Path, tmp_path: Path):
    dcp_to_torch_save(_step(two_saved, 10), tmp_path / "plain.pt")
    plain = torch.load(tmp_path / "plain.pt")
    assert torch.equal(plain["model/weight"], _tensors(10)["model"]["weight"])


def test_without_any_checkpoint_restore_says_none(tmp_path: Path):
    manager = _manager(tmp_path)
    assert manager.restore(_tensors()) is None
    assert manager.latest() is None
    assert manager.saved() == []


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
    damage(_step(two_saved, 20))
    target = _tensors(0)
    manager = _manager(two_saved)
    restored = manager.restore(target)
    assert restored is not None
    assert restored.step == 10
    assert restored.extra == {"samples": 100}
    assert _bits(target) == _bits(_tensors(10))
    (message,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert f"skipping the damaged checkpoint {_step(two_saved, 20)}: " in message
    assert pytest.raises(ValueError, match=reason).matches(ValueError(message))
    assert _names(two_saved) == ["step-00000010", "step-00000020.damaged"]
    assert manager.latest() == _step(two_saved, 10)
    assert manager.save(20, _tensors(20), {})
    assert _names(two_saved) == ["step-00000010", "step-00000020"]


@pytest.mark.parametrize(("damage", "reason"), DAMAGE)
def test_if_none_is_good_all_are_listed_and_left_as_they_are(two_saved: Path, damage, reason: str):
    shutil.rmtree(_step(two_saved, 10))
    damage(_step(two_saved, 20))
    with pytest.raises(
        ValueError, match=rf"no checkpoint in .* is good: step-00000020: .*{reason}"
    ):
        _manager(two_saved).restore(_tensors())
    assert _names(two_saved) == ["step-00000020"]


def test_the_hash_check_can_be_left_out(two_saved: Path):
    _flip(_step(two_saved, 20))
    restored = _manager(two_saved, verify_hashes=False, digests=False).restore(_tensors())
    assert restored is not None
    assert restored.step == 20


def test_without_hashes_the_digest_still_names_the_tensor(two_saved: Path):
    _flip(_step(two_saved, 20))
    with pytest.raises(
        ValueError,
        match=r"step-00000020 was restored wrongly: 1 of 9 tensors do not have the digest they "
        r"were saved with: \w+/\S+ in the files themselves; start again",
    ):
        _manager(two_saved, verify_hashes=False).restore(_tensors())


def test_without_hashes_an_unreadable_file_is_still_passed_over(
    two_saved: Path, caplog: pytest.LogCaptureFixture
):
    file = _step(two_saved, 20) / "__0_0.distcp"
    file.write_bytes(bytes(file.stat().st_size))
    target = _tensors(0)
    restored = _manager(two_saved, verify_hashes=False).restore(target)
    assert restored is not None
    assert restored.step == 10
    assert _bits(target) == _bits(_tensors(10))
    assert f"skipping a checkpoint: {_step(two_saved, 20)} cannot be read: rank 0: " in caplog.text


def test_a_checkpoint_of_another_model_names_every_differing_field(two_saved: Path):
    other = {"kind": "hunyuan", "hidden_size": 256, "patch_size": [1, 2, 4], "guidance": True}
    manager = CheckpointManager(two_saved / "checkpoints", CheckpointConfig(), other)
    with pytest.raises(
        ValueError,
        match=r"checkpoint of another model: guidance is '\(absent\)' there and True here; "
        r"hidden_size is 192 there and 256 here; patch_size is \[1, 2, 2\] there "
        r"and \[1, 2, 4\] here",
    ):
        manager.restore(_tensors())


def test_identities_are_compared_as_json(two_saved: Path):
    same = {**IDENTITY, "patch_size": (1, 2, 2)}
    assert CheckpointManager(two_saved / "checkpoints", CheckpointConfig(), same).restore(
        _tensors()
    )


def test_tensors_that_do_not_fit_are_named(two_saved: Path):
    target = _tensors()
    target["model"]["weight"] = torch.zeros(33, 8)
    target["model"]["half"] = target["model"]["half"].float()
    target["model"]["new"] = torch.zeros(1)
    del target["ema"]["half"]
    with pytest.raises(ValueError, match="do not fit the model") as caught:
        _manager(two_saved).restore(target)
    message = str(caught.value)
    assert "1 missing there: model/new" in message
    assert "1 unknown here: ema/half" in message
    assert "model/weight is [33, 7] there and [33, 8] here" in message
    assert "model/half is torch.bfloat16 there and torch.float32 here" in message


def test_what_is_not_a_tensor_or_not_json_is_refused(tmp_path: Path):
    manager = _manager(tmp_path)
    with pytest.raises(ValueError, match="model/step is a int, not a tensor"):
        manager.save(1, {"model": {"step": 3}}, {})
    with pytest.raises(ValueError, match="extra of the checkpoint of step 1 is not JSON"):
        manager.save(1, _tensors(), {"bad": torch.zeros(1)})
    assert not (tmp_path / "checkpoints").exists()


def _assert_not_saved(folder: Path, caplog: pytest.LogCaptureFixture, reason: str) -> None:
    warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert len(warnings) == 1
    assert f"CHECKPOINT OF STEP 30 WAS NOT SAVED in {folder / 'checkpoints'}: " in warnings[0]
    assert reason in warnings[0]
    assert "It needs " in warnings[0]
    assert "free are " in warnings[0]
    assert _names(folder) == ["step-00000010", "step-00000020"]


def test_too_little_space_is_noticed_before_anything_is_written(
    two_saved: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    usage = shutil.disk_usage(two_saved)
    monkeypatch.setattr(writing_module.shutil, "disk_usage", lambda path: usage._replace(free=9000))
    manager = _manager(two_saved)
    assert manager.save(30, _tensors(), {}) is False
    _assert_not_saved(two_saved, caplog, "not enough free space, nothing was written")
    assert "free are 0.0 MiB" in caplog.text
    assert manager.latest() == _step(two_saved, 20)
    monkeypatch.undo()
    assert manager.save(30, _tensors(), {}) is True


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
    manager = _manager(two_saved)
    assert manager.save(30, _tensors(), {}) is False
    _assert_not_saved(two_saved, caplog, "No space left on device")
    monkeypatch.undo()
    assert manager.save(30, _tensors(), {}) is True
    assert manager.latest() == _step(two_saved, 30)


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
    manager = _manager(small_disk)
    assert manager.save(1, _tensors(), {})
    assert manager.save(2, {"model": {"w": torch.ones(500_000)}}, {}) is False
    assert "CHECKPOINT OF STEP 2 WAS NOT SAVED" in caplog.text
    assert "No space left on device" in caplog.text
    assert _names(small_disk) == ["step-00000001"]


def test_a_failure_that_is_not_the_storage_is_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def broken(self: HashingStream, data) -> int:
        raise RuntimeError("our own bug")

    monkeypatch.setattr(HashingStream, "write", broken)
    with pytest.raises(RuntimeError, match=r"saving .* failed: rank 0: RuntimeError: our own bug"):
        _manager(tmp_path).save(1, _tensors(), {})


def _die_while_saving(rank: int, world: int, folder: str) -> None:
    real = HashingStream.write

    def die(self: HashingStream, data) -> int:
        if self.num_bytes > 3000:
            os._exit(9)
        return real(self, data)

    HashingStream.write = die  # This process ends here anyway.
    _manager(Path(folder)).save(30, _tensors(), {})


@pytest.mark.dist
def test_a_process_killed_while_saving_leaves_the_last_one_the_latest(two_saved: Path):
    with pytest.raises(RankError, match="died with exit code 9"):
        run_distributed(_die_while_saving, 1, str(two_saved))
    assert _names(two_saved) == ["step-00000010", "step-00000020", "step-00000030.incomplete"]
    manager = _manager(two_saved)
    restored = manager.restore(_tensors())
    assert restored is not None
    assert restored.step == 20
    assert manager.save(30, _tensors(), {})
    assert _names(two_saved) == ["step-00000010", "step-00000020", "step-00000030"]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_who_goes_back_finds_no_later_checkpoint_and_no_replay(tmp_path: Path, asynchronous: bool):
    manager = _manager(tmp_path, asynchronous=asynchronous, every_steps=10)
    manager.start()
    for step in (10, 20, 30):
        assert manager.save(step, _tensors(step), {"step": step})
    manager.go_back(20)
    assert _names(tmp_path) == ["step-00000010", *[f"step-000000{n}0.refused" for n in (2, 3)]]
    assert not manager.replay_due(31)
    assert not manager.replay_due(11)
    live = _tensors(0)
    found = manager.restore(live, replay=False)
    assert found is not None
    assert found.step == 10
    assert _bits(live) == _bits(_tensors(10))
    assert not manager.replay_due(11)
    assert manager.save(20, _tensors(21), {})
    manager.finish()
    assert _names(tmp_path) == ["step-00000010", "step-00000020", "step-00000030.refused"]
    manager.close()


def test_retention_keeps_the_newest_and_the_multiples(tmp_path: Path):
    manager = _manager(tmp_path, keep_last=2, keep_every=30)
    for step in (10, 20, 30, 40, 50, 60, 70):
        assert manager.save(step, {"model": {"w": torch.ones(1)}}, {})
    assert [p.name for p in manager.saved()] == [f"step-{s:08d}" for s in (30, 60, 70)]


def test_keeping_all_deletes_nothing(tmp_path: Path):
    manager = _manager(tmp_path, keep_last=0)
    for step in (1, 2, 3, 4):
        assert manager.save(step, {"model": {"w": torch.ones(1)}}, {})
    assert len(manager.saved()) == 4


def test_saving_the_same_step_twice_writes_once(tmp_path: Path):
    manager = _manager(tmp_path)
    assert manager.save(5, _tensors(1), {})
    written = (_step(tmp_path, 5) / "manifest.json").stat().st_mtime_ns
    assert manager.save(5, _tensors(1), {})
    assert (_step(tmp_path, 5) / "manifest.json").stat().st_mtime_ns == written


def test_due_follows_the_cadence(tmp_path: Path):
    manager = _manager(tmp_path, every_steps=3)
    assert [s for s in range(10) if manager.due(s)] == [3, 6, 9]
    assert not any(_manager(tmp_path, every_steps=0).due(s) for s in range(10))


def test_one_section_is_read_without_the_model(two_saved: Path):
    for where in (two_saved, two_saved / "checkpoints", _step(two_saved, 20)):
        weights = load_weights(where, "ema")
        assert _bits(weights) == _bits(_tensors(20)["ema"])
    assert _bits(load_weights(two_saved, "model")) == _bits(_tensors(20)["model"])
    with pytest.raises(ValueError, match="has no section 'vae'; it has counters, ema, model, opti"):
        load_weights(two_saved, "vae")


def test_reading_a_run_passes_over_a_truncated_checkpoint_but_not_if_asked_for_it(two_saved: Path):
    _truncate(_step(two_saved, 20))
    assert _bits(load_weights(two_saved, "ema")) == _bits(_tensors(10)["ema"])
    with pytest.raises(ValueError, match=r"step-00000020 is damaged: __0_0\.distcp is truncated"):
        load_weights(_step(two_saved, 20), "ema")


def test_a_folder_without_checkpoints_says_what_to_give(tmp_path: Path):
    with pytest.raises(ValueError, match="holds no checkpoint: give a run folder or a step-"):
        load_weights(tmp_path)


def test_another_stage_takes_the_average_as_its_weights(two_saved: Path):
    average = _tensors(20)["ema"]
    target = {"weight": torch.zeros(33, 7), "half": torch.zeros(11, dtype=torch.bfloat16)}
    manifest = restore_into(
        two_saved, {"model": target}, sections={"model": "ema"}, identity=IDENTITY
    )
    assert manifest.step == 20
    assert torch.equal(target["weight"], average["weight"])
    assert torch.equal(target["half"], average["half"].to(torch.bfloat16))


def test_carrying_over_into_another_model_is_refused(two_saved: Path):
    with pytest.raises(ValueError, match="checkpoint of another model: hidden_size is 192 there"):
        restore_into(two_saved, {}, identity={**IDENTITY, "hidden_size": 8})
    with pytest.raises(ValueError, match=r"ema/weight is \[33, 7\] there and \[7\] here"):
        restore_into(two_saved, {"ema": {**_tensors()["ema"], "weight": torch.zeros(7)}})
    with pytest.raises(ValueError, match=r"1 unknown here: ema/half"):
        restore_into(two_saved, {"ema": {"weight": torch.zeros(33, 7)}})


def test_a_negative_count_is_refused():
    with pytest.raises(ValueError, match=r"checkpoint\.keep_last=-1 must not be negative"):
        CheckpointConfig(keep_last=-1)
