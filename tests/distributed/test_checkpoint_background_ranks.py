"""Saving while training goes on, on several ranks; and a wrong copy on one of them."""

import logging
import os
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from distributed import run_distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from writers import being_written, held, until

from hunyuan_train.checkpoint import manager as manager_module
from hunyuan_train.checkpoint.config import CheckpointConfig
from hunyuan_train.checkpoint.load import read_manifest
from hunyuan_train.checkpoint.manager import CheckpointManager
from hunyuan_train.parallel.layout import Slices
from hunyuan_train.parallel.view import WholeView

pytestmark = pytest.mark.dist


def whole_values(fill: float) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "sharded": torch.randn(401, 300, generator=generator) + fill,
        "copied": torch.randn(40, 30, generator=generator) + fill,
        "columns": torch.randn(6, 8, generator=generator) + fill,
        "half": torch.randn(9, 5, generator=generator).bfloat16() + fill,
    }


def held_by(rank: int, world: int, fill: float) -> tuple[dict, dict[str, torch.Tensor]]:
    """State as a tensor-parallel run with ZeRO holds it, and this rank's live tensors."""
    values = whole_values(fill)
    mesh = init_device_mesh("cpu", (world,))
    columns = Slices((6, 8), 1, ((8 // world * rank, 8 // world),))
    live = {
        "sharded": distribute_tensor(values["sharded"], mesh, [Shard(0)]),
        "copied": distribute_tensor(values["copied"], mesh, [Replicate()]),
        "columns": columns.take(values["columns"]).clone(),
        "half": distribute_tensor(values["half"], mesh, [Shard(0)]),
        "plain": torch.full((5,), fill),
    }
    state = {**live, "columns": WholeView.of(live["columns"], columns)}
    return {"model": state}, live


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def check(rank: int, world: int, live: dict[str, torch.Tensor], fill: float) -> None:
    _, expected = held_by(rank, world, fill)
    for name, tensor in live.items():
        assert torch.equal(local(tensor), local(expected[name])), name


def started(folder: str, state: dict, **changes) -> CheckpointManager:
    manager = CheckpointManager(Path(folder) / "checkpoints", CheckpointConfig(**changes), {})
    manager.start(state)
    return manager


def warnings_of() -> list[str]:
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("hunyuan_train").addHandler(handler)
    return said


def go_on_while_saving(rank: int, world: int, folder: str) -> dict[str, str]:
    state, live = held_by(rank, world, 1.0)
    manager = started(folder, state)
    with held(manager.writer_pid):
        assert manager.save(1, state, {"rank": rank})
        for tensor in live.values():
            local(tensor).fill_(-7.0)
        assert manager.poll() == []
    (outcome,) = manager.finish()
    assert not outcome.failure
    assert (manager.folder / "step-00000001").is_dir()
    state, live = held_by(rank, world, 0.0)
    restored = manager.restore(state)
    assert restored is not None
    assert restored.extra == {"rank": 0}
    check(rank, world, live, 1.0)
    manager.close()
    return read_manifest(folder).digests


def save_alone(folder: str) -> dict[str, str]:
    state = {"model": {**whole_values(1.0), "plain": torch.full((5,), 1.0)}}
    manager = CheckpointManager(Path(folder) / "checkpoints", CheckpointConfig(), {})
    manager.save(1, state, {})
    return read_manifest(folder).digests


def test_two_ranks_save_in_the_background_what_they_had(tmp_path: Path):
    digests = run_distributed(go_on_while_saving, 2, str(tmp_path / "two"))
    assert digests[0] == digests[1] == save_alone(str(tmp_path / "one"))
    assert len(set(digests[0].values())) == 5


def kill_one_writer(rank: int, world: int, folder: str) -> tuple[list[str], list[str]]:
    said = warnings_of()
    state, _ = held_by(rank, world, 1.0)
    state["model"]["large"] = torch.ones(2_000_000, world) * rank  # Only to take some time.
    manager = started(folder, state)
    manager.save(1, state, {})
    manager.finish()
    manager.save(2, state, {})
    if rank == 1:
        until(lambda: being_written(manager.folder))
        os.kill(manager.writer_pid, signal.SIGKILL)
    (outcome,) = manager.finish()
    assert outcome.failure
    # The next one works again, with new writers on both ranks.
    state, _ = held_by(rank, world, 3.0)
    assert manager.save(3, state, {})
    (outcome,) = manager.finish()
    assert not outcome.failure
    state, live = held_by(rank, world, 0.0)
    restored = manager.restore(state)
    assert restored is not None
    assert restored.step == 3
    check(rank, world, live, 3.0)
    manager.close()
    return sorted(os.listdir(manager.folder)), said


def test_a_writer_killed_on_one_rank_costs_that_checkpoint_only(tmp_path: Path):
    (names, first), (_, second) = run_distributed(kill_one_writer, 2, str(tmp_path))
    assert names == ["step-00000001", "step-00000003"]
    (loud,) = [line for line in first if "CHECKPOINT OF STEP 2 WAS NOT SAVED" in line]
    assert "the next one is tried as usual" in loud
    assert not any("WAS NOT SAVED" in line for line in second)
    assert any("the writer process of rank 1 was killed by SIGKILL" in line for line in second)


def fill_one_disk(rank: int, world: int, folder: str) -> tuple[list[str], list[str]]:
    import resource

    said = warnings_of()
    state, _ = held_by(rank, world, 1.0)
    manager = started(folder, state)
    manager.save(1, state, {})
    manager.finish()
    if rank == 1:
        resource.prlimit(manager.writer_pid, resource.RLIMIT_FSIZE, (50_000, -1))
    manager.save(2, state, {})
    (outcome,) = manager.finish()
    assert "File too large" in outcome.failure
    if rank == 1:
        resource.prlimit(manager.writer_pid, resource.RLIMIT_FSIZE, (-1, -1))
    before = manager.writer_pid
    manager.save(3, state, {})
    (outcome,) = manager.finish()
    assert not outcome.failure
    assert manager.writer_pid == before
    manager.close()
    return sorted(os.listdir(manager.folder)), said


def test_a_failing_disk_of_one_writer_is_the_answer_of_all(tmp_path: Path):
    (names, first), (_, second) = run_distributed(fill_one_disk, 2, str(tmp_path))
    assert names == ["step-00000001", "step-00000003"]
    assert sum("CHECKPOINT OF STEP 2 WAS NOT SAVED" in line for line in first) == 1
    assert not any("WAS NOT SAVED" in line for line in second)


def restore_wrongly(rank: int, world: int, folder: str, wrong: list[tuple[str, int]]) -> str:
    state, live = held_by(rank, world, 0.0)
    real = manager_module.read_tensors

    def spoilt(path, flat, ranks):
        real(path, flat, ranks)
        for name, where in wrong:
            if rank == where:
                values = local(live[name])
                values.view(-1).view(torch.uint8)[3] ^= 1

    manager_module.read_tensors = spoilt
    try:
        CheckpointManager(Path(folder) / "checkpoints", CheckpointConfig(), {}).restore(state)
    except ValueError as error:
        return str(error)
    finally:
        manager_module.read_tensors = real
    return ""


WRONG = [
    [],
    [("plain", 0)],
    [("plain", 2)],
    [("copied", 1)],
    [("copied", 0), ("copied", 1)],
    [("sharded", 3)],
    [("columns", 1), ("half", 0), ("plain", 3)],
    [("plain", rank) for rank in range(4)],
]


def restore_each_wrongly(rank: int, world: int, folder: str) -> list[str]:
    return [restore_wrongly(rank, world, folder, wrong) for wrong in WRONG]


def test_a_wrong_copy_on_any_rank_is_named(tmp_path: Path):
    save_alone(str(tmp_path))
    ranks = run_distributed(restore_each_wrongly, 4, str(tmp_path))
    assert ranks[0] == ranks[1] == ranks[2] == ranks[3]
    for wrong, message in zip(WRONG, ranks[0], strict=True):
        expected: dict[str, list[int]] = {}
        for name, rank in wrong:
            expected.setdefault(f"model/{name}", []).append(rank)
        if not expected:
            assert message == ""
            continue
        assert f"was restored wrongly: {len(expected)} of 5 tensors" in message
        clauses = [
            f"{name} on rank {', '.join(map(str, where))}"
            for name, where in sorted(expected.items())
        ]
        assert f"saved with: {'; '.join(clauses)}; start again" in message


def unequal_copies(rank: int, world: int, folder: str) -> list[str]:
    """Rows 0-1 on three ranks and rows 2-3 on one: sums of copies do not fit by themselves."""
    rows = slice(0, 2) if rank < 3 else slice(2, 4)
    found = []
    for spoilt in (-1, 1):
        target = torch.zeros(2, 3)
        view = WholeView((4, 3), {torch.Size([rows.start, 0]): target}, target)
        real = manager_module.read_tensors

        def read(path, flat, ranks, real=real, target=target, spoilt=spoilt):
            real(path, flat, ranks)
            if rank == spoilt:
                target[0, 0] += 1

        manager_module.read_tensors = read
        try:
            CheckpointManager(Path(folder), CheckpointConfig(), {}).restore({"model": {"w": view}})
            found.append("")
        except ValueError as error:
            found.append(str(error))
        finally:
            manager_module.read_tensors = real
    return found


def test_copies_on_unequal_numbers_of_ranks_are_checked_too(tmp_path: Path):
    values = torch.arange(12.0).view(4, 3)
    CheckpointManager(tmp_path, CheckpointConfig(), {}).save(1, {"model": {"w": values}}, {})
    for good, bad in run_distributed(unequal_copies, 4, str(tmp_path)):
        assert good == ""
        assert "model/w on rank 1; start again" in bad


def due_by_the_clock(rank: int, world: int, folder: str) -> list[int]:
    import time

    manager = CheckpointManager(folder, CheckpointConfig(every_steps=0, every_s=0.2), {})
    due = []
    for step in range(1, 60):
        time.sleep(0.01 if rank else 0.012)
        if manager.due(step):
            due.append(step)
            manager._cadence.saved()
    dist.barrier()
    return due


def test_ranks_with_other_clocks_agree_on_the_step(tmp_path: Path):
    first, second = run_distributed(due_by_the_clock, 2, str(tmp_path))
    assert first == second
    assert 1 <= len(first) <= 5
