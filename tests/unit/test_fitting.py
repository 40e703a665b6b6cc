"""What a run decides for its devices before the first step."""

import contextlib
import json
import logging
from pathlib import Path

import pytest
import torch

from hunyuan_kernels import dispatch
from hunyuan_train.config.compose import compose_config
from hunyuan_train.config.root import RunConfig
from hunyuan_train.data.buckets import Bucket
from hunyuan_train.engine import fitting
from hunyuan_train.engine.fitting import ATTENTION_NAME, fit_kernels, fit_memory
from hunyuan_train.memory.config import Recompute
from hunyuan_train.parallel.attention_choice import AttentionChoice, AttentionInputs, use_attention
from hunyuan_train.parallel.config import ZeroEngine
from hunyuan_train.runtime.device import Machine
from hunyuan_train.runtime.dist import World

BUCKETS = [Bucket(1, 64, 64), Bucket(5, 64, 64)]
WORLD = World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))


@pytest.fixture(autouse=True)
def _as_before():
    yield
    use_attention(None)
    dispatch.set_mode("auto")


def tiny(run: Path, *extra: str) -> RunConfig:
    return compose_config(["model=tiny", f"run.dir={run}", *extra])


def choosing(monkeypatch: pytest.MonkeyPatch) -> list[AttentionInputs]:
    """Return what attention is chosen for from now on; every choice is another kernel."""
    asked: list[AttentionInputs] = []

    def choose(kernel: object, inputs: AttentionInputs) -> AttentionChoice:
        asked.append(inputs)
        name = "cpu" if len(asked) == 1 else "reference"
        return AttentionChoice({False: name, True: name})

    monkeypatch.setattr(fitting, "choose_attention", choose)
    return asked


def test_a_restart_takes_the_attention_kernel_that_was_measured_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked = choosing(monkeypatch)
    cfg, path = tiny(tmp_path), tmp_path / ATTENTION_NAME
    fit_kernels(cfg, WORLD, BUCKETS)
    fit_kernels(cfg, WORLD, BUCKETS)
    assert len(asked) == 1
    assert asked[0].tokens == BUCKETS[1].tokens + cfg.text.max_length
    assert asked[0].heads == cfg.model.num_heads
    assert json.loads(path.read_text())["kernels"] == {"whole": "cpu", "padded": "cpu"}
    fit_kernels(cfg, WORLD, [*BUCKETS, Bucket(9, 64, 64)])
    assert len(asked) == 2, "another length is measured for itself"
    path.write_text('{"of": ')
    fit_kernels(cfg, WORLD, BUCKETS)
    assert len(asked) == 3
    assert f"{path} cannot be used" in caplog.text


def test_heads_and_rows_are_those_of_a_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = choosing(monkeypatch)
    cfg = tiny(tmp_path, "parallel.cp_ulysses=2", "parallel.cp_ring=3", "memory.kernels=off")
    fit_kernels(cfg, WORLD, BUCKETS)
    rows = BUCKETS[1].tokens + cfg.text.max_length
    assert (asked[0].heads, asked[0].tokens) == (cfg.model.num_heads // 2, -(-rows // 3))
    with dispatch.also_on("cpu"):
        assert not dispatch.enabled("norm_modulate", torch.zeros(1, 2, 64)), "switched off"


def test_a_kernel_that_cannot_run_here_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"memory\.attention=cudnn cannot run here: .*choose auto"):
        fit_kernels(tiny(tmp_path, "memory.attention=cudnn"), WORLD, BUCKETS)


def test_recompute_follows_the_memory_that_is_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    big = Bucket(129, 720, 1280)
    cfg = tiny(tmp_path, "data.max_batch=1")

    def modes(gib: float) -> dict[Bucket, Recompute]:
        machine = Machine(memory_bytes=gib * 2**30, host_bytes=2**36, is_gpu=False)
        monkeypatch.setattr(Machine, "here", lambda *_: machine)
        found = fit_memory(cfg, WORLD, [BUCKETS[0], big], tokens=256)
        return {bucket: mode.recompute for bucket, mode in found.items()}

    with caplog.at_level(logging.INFO):
        roomy = modes(64)
    assert set(roomy.values()) == {Recompute.none}
    assert "recompute of 2 buckets: 2 none" in caplog.text
    seen: list[Recompute] = []
    for sixteenths in range(128, 2, -1):
        with contextlib.suppress(ValueError):
            found = modes(sixteenths / 16)
            assert found[BUCKETS[0]] is Recompute.none
            seen.append(found[big])
    assert seen == sorted(seen, key=list(Recompute).index)
    assert set(seen) == {Recompute.none, Recompute.selective, Recompute.full}
    with pytest.raises(ValueError, match=r"bucket 129x720x1280 with 1 samples needs .* GiB"):
        modes(0.125)
    cfg.memory.check_fit = False
    assert modes(0.125) == {BUCKETS[0]: Recompute.none, big: Recompute.full}
    assert "this run starts although bucket 129x720x1280" in caplog.text
    cfg.parallel.zero_engine, cfg.parallel.zero_stage = ZeroEngine.deepspeed, 3
    assert set(modes(0.125).values()) == {Recompute.full}, "its gathers depend on the mode"
