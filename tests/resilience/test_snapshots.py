"""Snapshots in memory survive what they are for, and are never wrong."""

import errno
import multiprocessing as mp
import os
import shutil
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import RankError, run_distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from hunyuan_train.parallel.layout import fused_slices
from hunyuan_train.parallel.view import WholeView
from hunyuan_train.resilience import peers, slots
from hunyuan_train.resilience.config import ResilienceConfig
from hunyuan_train.resilience.slots import node_folder, read_part, stored_parts
from hunyuan_train.resilience.snapshots import Restored, Snapshots
from hunyuan_train.resilience.state_copy import local_parts


def make(run: Path, rank: int = 0, world: int = 1, per_node: int = 1, **other: Any) -> Snapshots:
    """Return the snapshots of a run whose nodes have folders of their own below ``run``."""
    cfg = ResilienceConfig(snapshot_every=1, snapshot_dir=f"{run}/node{{node}}")
    fixed = {"rank": rank, "world_size": world, "ranks_per_node": per_node, "layout": "plain"}
    return Snapshots(run, cfg, **{**fixed, **other})


def folder(run: Path, node: int) -> Path:
    return node_folder(run, f"{run}/node{{node}}", node)


def state(rank: int, world: int, seed: int) -> dict[str, Any]:
    """Return every kind of tensor a state has, with values of rank and seed."""
    draw = torch.Generator().manual_seed(1000 * rank + seed)
    whole = torch.randn(5, 3, generator=torch.Generator().manual_seed(seed))
    cut = fused_slices((4 * world, 3), 0, (2 * world, 2 * world), rank, world)
    sharded = whole
    if world > 1:
        sharded = distribute_tensor(whole, init_device_mesh("cpu", (world,)), [Shard(0)])
    return {
        "model": {
            "plain": torch.randn(7, generator=draw),
            "sharded": sharded,
            "cut": WholeView.of(torch.randn(4, 3, generator=draw), cut),
            "empty": torch.zeros(0, 4),
        },
        "optimizer": {
            "plain": {
                "step": torch.tensor(float(seed)),
                "exp_avg": torch.randn(9, 3, generator=draw).bfloat16().t(),
            }
        },
    }


def same(left: dict[str, Any], right: dict[str, Any]) -> bool:
    pairs = zip(local_parts(left), local_parts(right), strict=True)
    return all(a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in pairs)


def take_until(snapshots: Snapshots, rank: int, world: int, first: int, last: int) -> None:
    for step in range(first, last + 1):
        assert snapshots.take(step, state(rank, world, step), {"step": step, "rank": rank})
        snapshots.finish()
        dist.barrier() if world > 1 else None


def _die_after(rank: int, world: int, run: str, per_node: int, last: int) -> None:
    snapshots = make(Path(run), rank, world, per_node)
    assert snapshots.restore(state(rank, world, 0)) is None
    take_until(snapshots, rank, world, 1, last)
    os.kill(os.getpid(), signal.SIGKILL)


def _resume(
    rank: int, world: int, runs: list[tuple[str, int, int]]
) -> list[list[tuple[int, tuple[int, ...], bool]]]:
    """Restore each run (folder, ranks per node, node to lose afterwards) into zeros.

    Returns the step (0: none), whose parts were fetched, and whether all values are those of the
    step. A run that loses a node takes one more snapshot first and is restored again.
    """
    outcomes = []
    for run, per_node, lose in runs:
        outcomes.append([])
        for again in (False, True):
            snapshots = make(Path(run), rank, world, per_node)
            live = state(rank, world, 0)
            restored = snapshots.restore(live)
            step = restored.step if restored else 0
            good = same(live, state(rank, world, step))
            good &= restored is None or restored.counters == {"step": step, "rank": rank}
            outcomes[-1].append((step, restored.fetched if restored else (), good))
            if again or lose < 0:
                snapshots.close()
                break
            take_until(snapshots, rank, world, step + 1, step + 1)
            snapshots.close()
            dist.barrier()
            if rank == 0:
                shutil.rmtree(folder(Path(run), lose))
            dist.barrier()
    return outcomes


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


def newest(where: Path, rank: int, copy: bool = False) -> Path:
    name = f"rank-{rank}.copy." if copy else f"rank-{rank}."
    found = [p for p in stored_parts(where) if p[0].name[:-1] == name]
    return max(found, key=lambda entry: entry[1].step)[0]


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

    for outcomes in run_distributed(_resume, 2, runs):
        assert dict(zip(expected, outcomes, strict=True)) == expected
    assert not list(stored_parts(folder(tmp_path / "both copies gone", 0))), "useless: deleted"


@pytest.mark.dist
def test_nodes_of_several_ranks(tmp_path: Path, killed: dict[tuple[int, int], Path]) -> None:
    whole, lost = (clone(killed[4, 2], tmp_path / name) for name in ("whole", "lost"))
    shutil.rmtree(folder(lost, 0))
    for outcomes in run_distributed(_resume, 4, [(str(whole), 2, -1), (str(lost), 2, 1)]):
        assert outcomes[0] == [(3, (), True)]
        assert outcomes[1] == [(3, (0, 1), True), (4, (2, 3), True)]


def taken(run: Path, last: int = 2) -> None:
    snapshots = make(run)
    snapshots.restore(state(0, 1, 0))
    take_until(snapshots, 0, 1, 1, last)
    snapshots.close()


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


SIZE = 300_000


def big(step: int) -> dict[str, Any]:
    return {"model": {f"w{i}": torch.full((SIZE,), float(step)) for i in range(3)}}


def _take_for_ever(run: str, first: int, told: Any) -> None:
    torch.set_num_threads(1)
    snapshots = make(Path(run))
    snapshots.restore(big(0))
    for step in range(first, 10**9):
        if snapshots.take(step, big(step), {"step": step}):
            snapshots.finish()
            told.value = step


def test_a_kill_at_any_moment_leaves_a_whole_snapshot(tmp_path: Path) -> None:
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["hunyuan_train.resilience.snapshots", "pytest"])
    torn = last = 0
    for attempt in range(20):
        told = context.Value("q", 0, lock=False)
        child = context.Process(target=_take_for_ever, args=(str(tmp_path), last + 1, told))
        child.start()
        deadline = time.monotonic() + 60
        while told.value < last + 2 and time.monotonic() < deadline:
            time.sleep(0.0005)
        time.sleep(0.0007 * attempt)
        os.kill(child.pid, signal.SIGKILL)  # pyright: ignore[reportArgumentType]
        child.join()
        whole = [part.step for _, part in stored_parts(folder(tmp_path, 0))]
        torn += len(whole) < 2
        live = big(0)
        snapshots = make(tmp_path)
        restored = snapshots.restore(live)
        snapshots.close()
        assert restored is not None
        assert restored.step >= told.value >= last + 2, "at most the one in flight is lost"
        assert restored.counters == {"step": restored.step}
        assert same(live, big(restored.step)), "nothing of another step"
        last = restored.step
    assert torn >= 3, "the kills never hit a write, so this shows nothing"


def test_training_pays_for_the_copy_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Time of the training thread for 200 MB; the digest takes as long as it wants."""
    cfg = ResilienceConfig(snapshot_every=1)  # in the real memory file system
    snapshots = Snapshots(
        tmp_path, cfg, rank=0, world_size=1, ranks_per_node=1, layout="plain", timeout_s=60
    )
    live = {"model": {f"w{i}": torch.ones(5_000_000) for i in range(10)}}
    snapshots.restore(live)
    used: list[float] = []
    go_on = threading.Event()
    real = slots.digest_payload
    module = "hunyuan_train.resilience.snapshots.digest_payload"
    monkeypatch.setattr(module, lambda payload: (go_on.wait(60), real(payload))[1])
    try:
        for step in range(1, 6):
            go_on.clear()
            before = time.thread_time()
            assert snapshots.take(step, live, {})
            used.append(time.thread_time() - before)
            if step == 1:
                assert not snapshots.take(step, live, {}), "one in flight"
            go_on.set()
            snapshots.finish()
    finally:
        go_on.set()
        snapshots.remove()
    assert not snapshots.folder.exists()
    print(f"200 MB: {[round(1e3 * seconds) for seconds in used]} ms of the training thread")
    assert min(used) < 0.3


def _with_hung_peer(rank: int, world: int, run: str) -> dict[str, Any]:
    go_on = threading.Event()
    store = peers.PeerServer._store
    if rank == 1:
        peers.PeerServer._store = lambda *args: (go_on.wait(60), store(*args))[1]  # pyright: ignore[reportAttributeAccessIssue]
    snapshots = make(Path(run), rank, world)
    live = state(rank, world, 0)
    snapshots.restore(live)
    begun, longest = [], 0.0
    for step in range(1, 6):
        started = time.perf_counter()
        begun.append(snapshots.take(step, state(rank, world, step), {}))
        longest = max(longest, time.perf_counter() - started)
        dist.barrier()
    go_on.set()
    snapshots.finish()
    dist.barrier()
    peers.PeerServer._store = store
    begun.append(snapshots.take(6, state(rank, world, 6), {}))
    snapshots.finish()
    snapshots.close()
    parts = [part.step for _, part in stored_parts(snapshots.folder)]
    return {"begun": begun, "longest": longest, "parts": sorted(parts)}


def _with_failures(rank: int, world: int, run: str) -> list[tuple[list[bool], int]]:
    """One rank fails in several ways; nobody may overwrite the last good snapshot."""
    snapshots = make(Path(run), rank, world, timeout_s=0.5)
    snapshots.restore(state(rank, world, 0))
    take_until(snapshots, rank, world, 1, 2)
    outcomes = []

    def attempt(steps: range) -> None:
        begun = []
        for step in steps:
            begun.append(snapshots.take(step, state(rank, world, step), {}))
            snapshots.finish()
            dist.barrier()
        everywhere = [part.step for _, part in stored_parts(folder(Path(run), 1 - rank))]
        outcomes.append((begun, everywhere.count(2)))

    reserve, store = slots.Slot.begin, peers.PeerServer._store

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "no room")

    if rank == 1:
        slots.Slot.begin = full  # pyright: ignore[reportAttributeAccessIssue]
    attempt(range(3, 6))  # no room on a node, for its own and for copies
    slots.Slot.begin = reserve
    if rank == 1:
        peers.PeerServer._store = lambda *args: time.sleep(2)  # pyright: ignore[reportAttributeAccessIssue]
    attempt(range(6, 8))  # silent for longer than the limit
    peers.PeerServer._store = store
    take_until(snapshots, rank, world, 8, 9)
    dist.barrier()
    attempt(range(10, 10))
    snapshots.close()
    return outcomes


def _hung_then_failing(rank: int, world: int, folders: list[str]) -> tuple[Any, Any, Any]:
    hung = _with_hung_peer(rank, world, folders[0])
    failures = _with_failures(rank, world, folders[1])
    return hung, failures, _resume(rank, world, [(folders[1], 1, -1)])[0]


@pytest.mark.dist
def test_a_bad_peer_costs_snapshots_but_no_training_and_no_older_one(tmp_path: Path) -> None:
    folders = [str(tmp_path / name) for name in ("hung", "failing")]
    first, second = run_distributed(_hung_then_failing, 2, folders)
    for hung, _, resumed in (first, second):
        assert hung["begun"] == [True, False, False, False, False, True]
        assert hung["longest"] < 5
        assert hung["parts"] == [1, 1, 6, 6], "own and copy"
        assert resumed == [(9, (), True)]
    assert first[1] == [([True] * 3, 2), ([True] * 2, 2), ([], 0)]
    assert second[1] == [([False] * 3, 2), ([True] * 2, 2), ([], 0)]


def test_no_room_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        snapshots = make(tmp_path)
        snapshots.restore(state(0, 1, 0))
        assert not snapshots.take(1, state(0, 1, 1), {})
    assert "no snapshot of rank 0 at step 1: " in caplog.text
    assert "has no room for" in caplog.text
    take_until(snapshots, 0, 1, 2, 2)
    assert [part.step for _, part in stored_parts(folder(tmp_path, 0))] == [2]
    snapshots.remove()
    take_until(snapshots, 0, 1, 1, 1)
    snapshots.close()
    assert [part.step for _, part in stored_parts(folder(tmp_path, 0))] == [1]


def test_a_stranger_is_not_served(tmp_path: Path) -> None:
    taken(tmp_path)
    server = peers.PeerServer(folder(tmp_path, 0), "127.0.0.1", "secret", 5)
    part = read_part(newest(folder(tmp_path, 0), 0))
    assert part is not None
    try:
        friend = peers.Peer(server.address, "secret", 5)
        assert friend.fetch(0, part.stamp) is not None
        assert friend.fetch(1, part.stamp) is None
        friend.close()
        with pytest.raises(ConnectionError):
            peers.Peer(server.address, "guess", 5).fetch(0, part.stamp)
    finally:
        server.close()
