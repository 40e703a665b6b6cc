"""Snapshots in memory survive what they are for, and are never wrong."""

import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import RankError, run_distributed
from snapshot_runs import folder, make, newest, resume, same, state, take_until, taken

from hunyuan_train.resilience import slots
from hunyuan_train.resilience.config import ResilienceConfig
from hunyuan_train.resilience.slots import read_part, stored_parts
from hunyuan_train.resilience.snapshots import Restored, Snapshots
from hunyuan_train.resilience.state_copy import local_parts


def _die_after(rank: int, world: int, run: str, per_node: int, last: int) -> None:
    snapshots = make(Path(run), rank, world, per_node)
    assert snapshots.restore(state(rank, world, 0)) is None
    take_until(snapshots, rank, world, 1, last)
    os.kill(os.getpid(), signal.SIGKILL)


STEPS = 3


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], Path]:
    """Runs by (ranks, ranks per node) whose ranks all died after three steps."""
    runs = {}
    for world, per_node in ((2, 2), (2, 1), (4, 2)):
        runs[world, per_node] = run = tmp_path_factory.mktemp("killed")
        with pytest.raises(RankError, match="died with exit code -9"):
            run_distributed(_die_after, world, str(run), per_node, STEPS)
    return runs


def clone(run: Path, to: Path) -> Path:
    """Copy a run and the memory of its nodes."""
    to.mkdir()
    shutil.copy(run / "run_id", to)
    for node in (0, 1):
        if folder(run, node).exists():
            shutil.copytree(folder(run, node), folder(to, node))
    return to


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def of_another_attempt(path: Path) -> None:
    """Make a part one of the same step, but of another course of events."""
    part = read_part(path)
    assert part is not None
    slot = slots.Slot(path)
    slot.reserve(part.payload_bytes)
    slot.complete(replace(part, lineage="another"))
    slot.close()


def _go_back(rank: int, world: int, run: str) -> list[tuple[int, bool]]:
    """Restore snapshots below a bound while more are being taken; return steps and exactness."""
    snapshots = make(Path(run), rank, world)
    found = []

    def back(before: int) -> None:
        live = state(rank, world, 0)
        restored = snapshots.restore(live, before=before)
        step = restored.step if restored else 0
        found.append((step, same(live, state(rank, world, step))))

    take_until(snapshots, rank, world, 1, 4)
    assert snapshots.take(5, state(rank, world, 5), {"step": 5})
    back(5)  # 5 is on its way, 4 is there
    assert {part.step for _, part in stored_parts(folder(Path(run), rank))} == {4}
    take_until(snapshots, rank, world, 5, 6)
    back(6)
    back(5)  # the other ones are gone
    take_until(snapshots, rank, world, 2, 3)
    back(4)
    snapshots.close()
    return found


@pytest.mark.dist
def test_a_run_that_goes_back_takes_the_newest_snapshot_before(tmp_path: Path) -> None:
    expected = [(4, True), (5, True), (0, True), (3, True)]
    assert run_distributed(_go_back, 2, str(tmp_path)) == [expected] * 2


VALUES, HEADER = slots.PAGE + 8, 40


@pytest.mark.dist
def test_killed_ranks_get_every_bit_back_and_lost_nodes_come_from_peers(
    tmp_path: Path, killed: dict[tuple[int, int], Path]
) -> None:
    def two(name: str, per_node: int) -> Path:
        return clone(killed[2, per_node], tmp_path / name)

    expected: dict[str, list[tuple[int, tuple[int, ...], bool]]] = {}
    runs = []

    def case(run: Path, per_node: int, *outcome: tuple[int, tuple[int, ...]], lose: int = -1):
        runs.append((str(run), per_node, lose))
        expected[run.name] = [(*what, True) for what in outcome]

    case(two("one node", 2), 2, (3, ()))
    case(two("two nodes", 1), 1, (3, ()))
    run = two("lost node, then the other", 1)
    shutil.rmtree(folder(run, 1))
    case(run, 1, (3, (1,)), (4, (0,)), lose=0)
    run = two("both copies gone", 1)
    shutil.rmtree(folder(run, 1))
    for path in folder(run, 0).glob("rank-1.copy.*"):
        path.unlink()
    case(run, 1, (0, ()))
    for name, offset in (("values", VALUES), ("header", HEADER)):
        run = two(f"{name}, one node", 2)
        flip(newest(folder(run, 0), 1), offset)
        case(run, 2, (2, ()))
        run = two(f"{name}, two nodes", 1)
        flip(newest(folder(run, 1), 1), offset)
        case(run, 1, (3, (1,)))
    run = two("both copies damaged", 1)
    flip(newest(folder(run, 1), 1), VALUES)
    flip(newest(folder(run, 0), 1, copy=True), VALUES)
    case(run, 1, (2, ()))
    run = two("parts of two attempts", 2)
    of_another_attempt(newest(folder(run, 0), 0))
    case(run, 2, (2, ()))
    taken(tmp_path / "other world")
    case(tmp_path / "other world", 2, (0, ()))

    for outcomes in run_distributed(resume, 2, runs):
        assert dict(zip(expected, outcomes, strict=True)) == expected
    assert not list(stored_parts(folder(tmp_path / "both copies gone", 0))), "useless: deleted"


@pytest.mark.dist
def test_nodes_of_several_ranks(tmp_path: Path, killed: dict[tuple[int, int], Path]) -> None:
    whole, lost = (clone(killed[4, 2], tmp_path / name) for name in ("whole", "lost"))
    shutil.rmtree(folder(lost, 0))
    for outcomes in run_distributed(resume, 4, [(str(whole), 2, -1), (str(lost), 2, 1)]):
        assert outcomes[0] == [(3, (), True)]
        assert outcomes[1] == [(3, (0, 1), True), (4, (2, 3), True)]


def test_what_belongs_to_something_else_is_refused(tmp_path: Path) -> None:
    def found(run: Path, live: dict[str, Any] | None = None, **other: Any) -> Restored | None:
        least = other.pop("least", 0)
        snapshots = make(run, **other)
        live = live or state(0, 1, 0)
        before = [part.clone() for _, part in local_parts(live)]
        restored = snapshots.restore(live, least=least)
        snapshots.close()
        if restored is None:
            after = [part for _, part in local_parts(live)]
            assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        return restored

    for case in ("same", "layout", "run", "tensors", "least", "off"):
        run = tmp_path / case
        taken(run)
        if case == "same":
            assert found(run, least=2) is not None
            continue
        if case == "layout":
            assert found(run, layout="tp=2") is None
        if case == "run":  # somebody emptied the run's folder and started anew
            (run / "run_id").unlink()
            assert found(run) is None
        if case == "tensors":
            other = state(0, 1, 0)
            other["model"]["plain"] = torch.zeros(8)
            assert found(run, other) is None
        if case == "least":
            assert found(run, least=3) is None
        if case == "off":
            off = Snapshots(
                run, ResilienceConfig(), rank=0, world_size=1, ranks_per_node=1, layout="plain"
            )
            assert not off.due(1)
            assert off.restore(state(0, 1, 0)) is None
            off.close()
            continue
        assert not list(stored_parts(folder(run, 0))), "and deleted"
