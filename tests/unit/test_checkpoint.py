"""One process saves, restores and keeps checkpoints."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from saved_states import IDENTITY, bits, manager_of, names_in, save_two, step_folder, tensors_of
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from hunyuan_train.checkpoint.config import CheckpointConfig
from hunyuan_train.checkpoint.load import load_weights, read_manifest, restore_into
from hunyuan_train.checkpoint.manager import CheckpointManager
from hunyuan_train.models.hunyuan.config import HunyuanConfig


@pytest.fixture
def two_saved(tmp_path: Path) -> Path:
    return save_two(tmp_path)


def test_a_restored_state_is_bitwise_the_saved_one(tmp_path: Path):
    extra = {"samples": 12, "loader": {"position": 3, "fingerprint": "ab"}, "third": 1 / 3}
    assert manager_of(tmp_path).save(7, tensors_of(1), extra)
    target = tensors_of(2)
    storages = [t.data_ptr() for t in target["model"].values()]
    restored = manager_of(tmp_path).restore(target)
    assert restored is not None
    assert (restored.step, restored.extra, restored.folder) == (7, extra, step_folder(tmp_path, 7))
    assert bits(target) == bits(tensors_of(1))
    assert storages == [t.data_ptr() for t in target["model"].values()]


def test_the_folder_holds_what_the_manifest_says(two_saved: Path):
    folder = step_folder(two_saved, 20)
    assert {p.name for p in folder.iterdir()} == {"__0_0.distcp", ".metadata", "manifest.json"}
    files = json.loads((folder / "manifest.json").read_text())["files"]
    for name, record in files.items():
        content = (folder / name).read_bytes()
        assert record == {"num_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert files.keys() == {"__0_0.distcp", ".metadata"}
    assert read_manifest(two_saved).extra == {"samples": 200}


def test_torch_reads_the_files_without_us(two_saved: Path, tmp_path: Path):
    dcp_to_torch_save(step_folder(two_saved, 10), tmp_path / "plain.pt")
    plain = torch.load(tmp_path / "plain.pt")
    assert torch.equal(plain["model/weight"], tensors_of(10)["model"]["weight"])


def test_without_any_checkpoint_restore_says_none(tmp_path: Path):
    manager = manager_of(tmp_path)
    assert manager.restore(tensors_of()) is None
    assert manager.latest() is None
    assert manager.saved() == []


def test_a_checkpoint_of_another_model_names_every_differing_field(two_saved: Path):
    other = {"kind": "hunyuan", "hidden_size": 256, "patch_size": [1, 2, 4], "guidance": True}
    manager = CheckpointManager(two_saved / "checkpoints", CheckpointConfig(), other)
    with pytest.raises(
        ValueError,
        match=r"checkpoint of another model: guidance is '\(absent\)' there and True here; "
        r"hidden_size is 192 there and 256 here; patch_size is \[1, 2, 2\] there "
        r"and \[1, 2, 4\] here",
    ):
        manager.restore(tensors_of())


def test_a_field_that_a_checkpoint_lacks_has_its_default(tmp_path: Path):
    """The checkpoint was written before there was image to video."""
    folder = tmp_path / "checkpoints"
    now = asdict(HunyuanConfig())
    then = {name: value for name, value in now.items() if name != "image_condition"}
    CheckpointManager(folder, CheckpointConfig(), then).save(1, tensors_of(), {})
    assert CheckpointManager(folder, CheckpointConfig(), now).restore(tensors_of())
    other = CheckpointManager(folder, CheckpointConfig(), now | {"image_condition": "concat"})
    with pytest.raises(ValueError, match=r"image_condition is 'none' there and 'concat' here"):
        other.restore(tensors_of())


def test_identities_are_compared_as_json(two_saved: Path):
    same = {**IDENTITY, "patch_size": (1, 2, 2)}
    assert CheckpointManager(two_saved / "checkpoints", CheckpointConfig(), same).restore(
        tensors_of()
    )


def test_tensors_that_do_not_fit_are_named(two_saved: Path):
    target = tensors_of()
    target["model"]["weight"] = torch.zeros(33, 8)
    target["model"]["half"] = target["model"]["half"].float()
    target["model"]["new"] = torch.zeros(1)
    del target["ema"]["half"]
    with pytest.raises(ValueError, match="do not fit the model") as caught:
        manager_of(two_saved).restore(target)
    message = str(caught.value)
    assert "1 missing there: model/new" in message
    assert "1 unknown here: ema/half" in message
    assert "model/weight is [33, 7] there and [33, 8] here" in message
    assert "model/half is torch.bfloat16 there and torch.float32 here" in message


def test_what_is_not_a_tensor_or_not_json_is_refused(tmp_path: Path):
    manager = manager_of(tmp_path)
    with pytest.raises(ValueError, match="model/step is a int, not a tensor"):
        manager.save(1, {"model": {"step": 3}}, {})
    with pytest.raises(ValueError, match="extra of the checkpoint of step 1 is not JSON"):
        manager.save(1, tensors_of(), {"bad": torch.zeros(1)})
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_who_goes_back_finds_no_later_checkpoint_and_no_replay(tmp_path: Path, asynchronous: bool):
    manager = manager_of(tmp_path, asynchronous=asynchronous, every_steps=10)
    manager.start()
    for step in (10, 20, 30):
        assert manager.save(step, tensors_of(step), {"step": step})
    manager.go_back(20)
    assert names_in(tmp_path) == ["step-00000010", *[f"step-000000{n}0.refused" for n in (2, 3)]]
    assert not manager.replay_due(31)
    assert not manager.replay_due(11)
    live = tensors_of(0)
    found = manager.restore(live, replay=False)
    assert found is not None
    assert found.step == 10
    assert bits(live) == bits(tensors_of(10))
    assert not manager.replay_due(11)
    assert manager.save(20, tensors_of(21), {})
    manager.finish()
    assert names_in(tmp_path) == ["step-00000010", "step-00000020", "step-00000030.refused"]
    manager.close()


def test_retention_keeps_the_newest_and_the_multiples(tmp_path: Path):
    manager = manager_of(tmp_path, keep_last=2, keep_every=30)
    for step in (10, 20, 30, 40, 50, 60, 70):
        assert manager.save(step, {"model": {"w": torch.ones(1)}}, {})
    assert [p.name for p in manager.saved()] == [f"step-{s:08d}" for s in (30, 60, 70)]


def test_keeping_all_deletes_nothing(tmp_path: Path):
    manager = manager_of(tmp_path, keep_last=0)
    for step in (1, 2, 3, 4):
        assert manager.save(step, {"model": {"w": torch.ones(1)}}, {})
    assert len(manager.saved()) == 4


def test_saving_the_same_step_twice_writes_once(tmp_path: Path):
    manager = manager_of(tmp_path)
    assert manager.save(5, tensors_of(1), {})
    written = (step_folder(tmp_path, 5) / "manifest.json").stat().st_mtime_ns
    assert manager.save(5, tensors_of(1), {})
    assert (step_folder(tmp_path, 5) / "manifest.json").stat().st_mtime_ns == written


def test_due_follows_the_cadence(tmp_path: Path):
    manager = manager_of(tmp_path, every_steps=3)
    assert [s for s in range(10) if manager.due(s)] == [3, 6, 9]
    assert not any(manager_of(tmp_path, every_steps=0).due(s) for s in range(10))


def test_one_section_is_read_without_the_model(two_saved: Path):
    for where in (two_saved, two_saved / "checkpoints", step_folder(two_saved, 20)):
        weights = load_weights(where, "ema")
        assert bits(weights) == bits(tensors_of(20)["ema"])
    assert bits(load_weights(two_saved, "model")) == bits(tensors_of(20)["model"])
    with pytest.raises(ValueError, match="has no section 'vae'; it has counters, ema, model, opti"):
        load_weights(two_saved, "vae")


def test_a_folder_without_checkpoints_says_what_to_give(tmp_path: Path):
    with pytest.raises(ValueError, match="holds no checkpoint: give a run folder or a step-"):
        load_weights(tmp_path)


def test_another_stage_takes_the_average_as_its_weights(two_saved: Path):
    average = tensors_of(20)["ema"]
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
        restore_into(two_saved, {"ema": {**tensors_of()["ema"], "weight": torch.zeros(7)}})
    with pytest.raises(ValueError, match=r"1 unknown here: ema/half"):
        restore_into(two_saved, {"ema": {"weight": torch.zeros(33, 7)}})


def test_a_negative_count_is_refused():
    with pytest.raises(ValueError, match=r"checkpoint\.keep_last=-1 must not be negative"):
        CheckpointConfig(keep_last=-1)
