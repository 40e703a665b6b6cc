"""A restart leaves out the proof of its layout if an earlier attempt made the very same."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hunyuan_train.config.compose import compose_config
from hunyuan_train.config.root import RunConfig
from hunyuan_train.engine import certified
from hunyuan_train.engine.certified import is_certified, remember
from hunyuan_train.runtime.dist import World

WORLD = World(rank=0, local_rank=0, size=4, device=torch.device("cpu"))


def test_only_a_restart_with_the_very_same_proof_is_certified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HUNYUAN_JOB_FOLDER", str(tmp_path / "job"))
    cfg = compose_config(["run.dir=nowhere"])
    wider = compose_config(["run.dir=nowhere", "parallel.tp=2"])

    def known(attempt: int, of: RunConfig = cfg, world: World = WORLD) -> bool:
        monkeypatch.setenv("HUNYUAN_ATTEMPT", str(attempt))
        return is_certified(of, world)

    assert not known(1)
    remember(cfg, replace(WORLD, rank=1))
    assert not known(1), "rank 0 writes"
    remember(cfg, WORLD)
    assert known(1)
    assert not known(0), "the first attempt proves"
    assert not known(1, wider)
    assert not known(1, world=replace(WORLD, size=2))
    remember(wider, WORLD)
    assert known(2)
    assert known(2, wider)
    monkeypatch.setattr(torch, "__version__", "99")
    assert not known(2)
    monkeypatch.undo()
    monkeypatch.setenv("HUNYUAN_JOB_FOLDER", str(tmp_path / "job"))
    (tmp_path / "changed.py").touch()
    monkeypatch.setattr(certified, "_SOURCE", tmp_path)
    assert not known(2), "other code"


@pytest.mark.parametrize("content", [b"", b'["cut', b"\xff", b"{}", b"[1]"])
def test_a_damaged_file_is_no_proof_and_is_written_anew(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    content: bytes,
) -> None:
    monkeypatch.setenv("HUNYUAN_JOB_FOLDER", str(tmp_path))
    monkeypatch.setenv("HUNYUAN_ATTEMPT", "1")
    cfg = compose_config(["run.dir=nowhere"])
    (tmp_path / certified.FILE_NAME).write_bytes(content)
    assert not is_certified(cfg, WORLD)
    assert f"{tmp_path / certified.FILE_NAME} cannot be used" in caplog.text
    remember(cfg, WORLD)
    assert is_certified(cfg, WORLD)
