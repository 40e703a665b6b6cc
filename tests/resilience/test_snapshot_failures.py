"""Kills, full memory and bad peers cost snapshots, never training or an older snapshot."""

import errno
import multiprocessing as mp
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import run_distributed
from snapshot_runs import folder, make, newest, resume, same, state, take_until, taken

from hunyuan_train.resilience import peers, slots
from hunyuan_train.resilience.config import ResilienceConfig
from hunyuan_train.resilience.slots import read_part, stored_parts
from hunyuan_train.resilience.snapshots import Snapshots

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
    return hung, failures, resume(rank, world, [(folders[1], 1, -1)])[0]


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
