"""Checkpoints of several ranks: any layout reads any other, and all ranks decide the same."""

import errno
import logging
import os
from pathlib import Path

import pytest
import torch
from distributed import run_distributed
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from hunyuan_train.checkpoint.config import CheckpointConfig
from hunyuan_train.checkpoint.digest import HashingStream
from hunyuan_train.checkpoint.load import load_weights, restore_into
from hunyuan_train.checkpoint.manager import CheckpointManager
from hunyuan_train.optim.clip import clip_grad_norm
from hunyuan_train.optim.config import OptimizerConfig
from hunyuan_train.optim.ema import Ema
from hunyuan_train.optim.groups import build_optimizer, optimizer_tensors, step_if_finite

pytestmark = pytest.mark.dist

IDENTITY = {"hidden_size": 8}


def _values(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "matrix": torch.randn(10, 6, generator=generator),
        "short": torch.randn(3, generator=generator),
        "half": torch.randn(9, 4, generator=generator).to(torch.bfloat16),
    }


def _layout(name: str, world: int):
    if name == "zero":
        return init_device_mesh("cpu", (world,)), [Shard(0)]
    if name == "tp_zero":
        return init_device_mesh("cpu", (world // 2, 2)), [Shard(0), Shard(0)]
    return init_device_mesh("cpu", (2, world // 2)), [Replicate(), Shard(0)]


def _sharded(values: dict[str, torch.Tensor], layout: str, world: int) -> dict:
    if layout == "single":
        tensors = {name: value.clone() for name, value in values.items()}
    else:
        mesh, placements = _layout(layout, world)
        tensors = {n: distribute_tensor(v.clone(), mesh, placements) for n, v in values.items()}
    return {"model": tensors, "counters": {"step": torch.tensor(5.0)}}


def _full(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


def _manager(folder: str) -> CheckpointManager:
    return CheckpointManager(Path(folder) / "checkpoints", CheckpointConfig(), IDENTITY)


def _save(rank: int, world: int, folder: str, layout: str, step: int) -> bool:
    return _manager(folder).save(step, _sharded(_values(step), layout, world), {"step": step})


def _restore(rank: int, world: int, folder: str, layout: str) -> tuple:
    target = _sharded({n: torch.zeros_like(v) for n, v in _values(0).items()}, layout, world)
    restored = _manager(folder).restore(target)
    assert restored is not None
    return restored.step, restored.extra, {n: _full(t) for n, t in target["model"].items()}


def _assert_values(found: dict[str, torch.Tensor], step: int) -> None:
    for name, value in _values(step).items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name


def _save_each(rank: int, world: int, folder: str, layouts: list[str]) -> None:
    for layout in layouts:
        assert _save(rank, world, f"{folder}/{layout}", layout, 7)


def _restore_each(
    rank: int, world: int, folder: str, sources: list[str], layouts: list[str]
) -> None:
    for source in sources:
        for layout in layouts:
            step, extra, found = _restore(rank, world, f"{folder}/{source}", layout)
            assert (step, extra) == (7, {"step": 7})
            _assert_values(found, 7)


def test_any_layout_reads_any_other_bitwise(tmp_path: Path):
    sources = ["single", "zero", "tp_zero", "hsdp"]
    _save_each(0, 1, str(tmp_path), ["single"])
    run_distributed(_save_each, 2, str(tmp_path), ["zero"])
    run_distributed(_save_each, 4, str(tmp_path), ["tp_zero", "hsdp"])
    _restore_each(0, 1, str(tmp_path), sources, ["single"])
    run_distributed(_restore_each, 2, str(tmp_path), sources, ["zero"])
    run_distributed(_restore_each, 4, str(tmp_path), sources, ["single", "zero", "tp_zero", "hsdp"])
    for source in sources:
        _assert_values(load_weights(tmp_path / source, "model"), 7)


def test_replicas_are_written_once(tmp_path: Path):
    run_distributed(_save, 4, str(tmp_path), "hsdp", 7)
    values = _values(7)
    held = sum(v.numel() * v.element_size() for v in values.values())
    files = list((tmp_path / "checkpoints" / "step-00000007").glob("*.distcp"))
    # Each stored tensor has about 1.2 KB of framing; a second copy of all shards would double the
    # count.
    num_chunks = 2 * len(values) + 1
    assert sum(f.stat().st_size for f in files) < held + num_chunks * 1700


def _save_with_a_full_disk(rank: int, world: int, folder: str) -> tuple:
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logging.getLogger("hunyuan_train").addHandler(handler)
    manager = _manager(folder)
    first = manager.save(10, _sharded(_values(10), "zero", world), {})
    real = HashingStream.write

    def full(self: HashingStream, data) -> int:
        if rank == 1:
            self.error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            raise self.error
        return real(self, data)

    HashingStream.write = full
    second = manager.save(20, _sharded(_values(20), "zero", world), {})
    names = sorted(os.listdir(manager.folder))
    HashingStream.write = real
    third = manager.save(30, _sharded(_values(30), "zero", world), {})
    return first, second, third, names, records


def test_a_full_disk_on_one_rank_is_the_answer_of_all(tmp_path: Path):
    results = run_distributed(_save_with_a_full_disk, 2, str(tmp_path))
    for first, second, third, names, _ in results:
        assert (first, second, third) == (True, False, True)
        assert "step-00000010" in names
        assert "step-00000020" not in names
    assert "step-00000020.incomplete" not in results[0][3]
    warnings = [m for m in results[0][4] if "STEP 20 WAS NOT SAVED" in m]
    assert len(warnings) == 1
    assert "No space left on device" in warnings[0]
    assert not any("NOT SAVED" in message for message in results[1][4])
    for step, _, found in run_distributed(_restore, 2, str(tmp_path), "zero"):
        assert step == 30
        _assert_values(found, 30)


def _save_steps(rank: int, world: int, folder: str, steps: list[int]) -> None:
    for step in steps:
        assert _save(rank, world, folder, "zero", step)


def test_all_ranks_pass_over_a_shard_that_only_one_of_them_checks(tmp_path: Path):
    run_distributed(_save_steps, 2, str(tmp_path), [10, 20])
    shard = tmp_path / "checkpoints" / "step-00000020" / "__1_0.distcp"
    os.truncate(shard, 100)
    for step, _, found in run_distributed(_restore, 2, str(tmp_path), "zero"):
        assert step == 10
        _assert_values(found, 10)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == [
        "step-00000010",
        "step-00000020.damaged",
    ]


def _restore_other_model(rank: int, world: int, folder: str) -> str:
    manager = CheckpointManager(
        Path(folder) / "checkpoints", CheckpointConfig(), {"hidden_size": 9}
    )
    try:
        manager.restore(_sharded(_values(0), "zero", world))
    except ValueError as error:
        return str(error)
    return ""


def test_another_model_is_refused_on_every_rank(tmp_path: Path):
    _save(0, 1, str(tmp_path), "single", 10)
    for message in run_distributed(_restore_other_model, 2, str(tmp_path)):
        assert "checkpoint of another model: hidden_size is 8 there and 9 here" in message


def _carry_over(rank: int, world: int, folder: str) -> dict[str, torch.Tensor]:
    target = _sharded({n: torch.zeros_like(v) for n, v in _values(0).items()}, "zero", world)
    restore_into(folder, {"model": target["model"]}, identity=IDENTITY)
    assert target["counters"]["step"].item() == 5.0
    return {n: _full(t) for n, t in target["model"].items()}


def _carry_over_from_nothing(rank: int, world: int, folder: str) -> str:
    try:
        restore_into(folder, {"model": {}})
    except ValueError as error:
        return str(error)
    return ""


def test_weights_are_carried_over_into_a_sharded_model(tmp_path: Path):
    _save(0, 1, str(tmp_path), "single", 4)
    for found in run_distributed(_carry_over, 2, str(tmp_path)):
        _assert_values(found, 4)
    for message in run_distributed(
        _carry_over_from_nothing, 2, str(tmp_path / "checkpoints" / "no")
    ):
        assert "holds no checkpoint" in message


def _resume(rank: int, world: int, folder: str, stops: list[int]) -> dict[str, torch.Tensor]:
    """Train to the last of ``stops``, building everything anew after each one."""
    for stop in stops:
        torch.manual_seed(11)
        model = nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 3), nn.LayerNorm(3))
        fully_shard(model[0])
        fully_shard(model)
        cfg = OptimizerConfig(lr=1e-2)
        optimizer, ema = build_optimizer(model, cfg), Ema(model, cfg)
        tensors = {
            "model": dict(model.named_parameters()),
            "ema": ema.state_dict(),
            "optimizer": optimizer_tensors(optimizer),
        }
        manager = _manager(folder)
        restored = manager.restore(tensors)
        for step in range(restored.step if restored else 0, stop):
            generator = torch.Generator().manual_seed(100 * step + rank)
            optimizer.zero_grad()
            model(torch.randn(4, 5, generator=generator)).square().mean().backward()
            step_if_finite(optimizer, clip_grad_norm(model.parameters(), 0.5))
            ema.update(step)
        assert manager.save(stop, tensors, {})
    return {
        **{f"model/{n}": _full(p) for n, p in model.named_parameters()},
        **{f"ema/{n}": _full(t) for n, t in ema.state_dict().items()},
        **{f"m/{n}": _full(s["exp_avg"]) for n, s in optimizer_tensors(optimizer).items()},
    }


def test_a_resumed_run_ends_bitwise_where_a_straight_one_does(tmp_path: Path):
    straight = run_distributed(_resume, 2, str(tmp_path / "a"), [8])[0]
    resumed = run_distributed(_resume, 2, str(tmp_path / "b"), [3, 8])[0]
    assert straight.keys() == resumed.keys()
    for name, tensor in straight.items():
        assert torch.equal(tensor, resumed[name]), name
