"""Copies of the state in host memory, here and on another node, that outlive the processes.

Every rank copies its part of the state into a file in memory (see ``slots``); a thread computes the
digest, declares the file whole and sends it to a rank of the next node. The other of two files
holds the snapshot before, and is overwritten only when all ranks have the newer one: whenever the
job dies, all parts of one of the two are whole. Before each snapshot the ranks agree, with one tiny
reduction, whether all have finished the one before; if not, this one is left out.
"""

import hashlib
import logging
import math
import secrets
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hunyuan_train.resilience.config import ResilienceConfig
from hunyuan_train.resilience.peers import Address, Peer, PeerServer, host_towards
from hunyuan_train.resilience.slots import (
    Part,
    Slot,
    SlotPair,
    Stamp,
    digest_payload,
    node_folder,
    read_payload,
    remove_parts,
    run_identity,
    stored_parts,
)
from hunyuan_train.resilience.state_copy import (
    Copied,
    StateCopy,
    fill_state,
    state_bytes,
    state_plan,
)
from hunyuan_train.runtime.dist import barrier, gather_objects, max_over_ranks

log = logging.getLogger(__name__)


class _Last(IntEnum):
    """What has become of this rank's last snapshot; over ranks the largest counts."""

    good = 0
    failed = 1
    busy = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Restored:
    """What :meth:`Snapshots.restore` found, besides the tensors it filled."""

    step: int
    counters: dict[str, Any]
    fetched: tuple[int, ...]
    """Ranks whose part came from another node."""
    seconds: float


class Snapshots:
    """The snapshots of one attempt; every rank holds one and calls the same methods."""

    def __init__(
        self,
        run_dir: str | Path,
        cfg: ResilienceConfig,
        *,
        rank: int,
        world_size: int,
        ranks_per_node: int,
        layout: str,
        timeout_s: float = 60.0,
    ) -> None:
        """Meet the other ranks and open the way to the peer; without ``snapshot_every`` do nothing.

        Args:
            run_dir: Folder of the run, the same storage for all ranks.
            cfg: How often and where.
            rank: This rank.
            world_size: All ranks.
            ranks_per_node: Ranks that share a memory file system.
            layout: Whatever has to be the same for a snapshot to fit: mesh, engine, model.
            timeout_s: Longest silence of a peer before the snapshot is given up.
        """
        self._every, self._rank, self._world = cfg.snapshot_every, rank, world_size
        self._per_node, self._timeout_s = ranks_per_node, timeout_s
        self.folder = node_folder(run_dir, cfg.snapshot_dir, rank // ranks_per_node)
        """This node's."""
        self.stall_s = 0.0
        """Seconds the last :meth:`take` took from training."""
        self.seconds = 0.0
        """From the begin of the last finished snapshot until it was whole everywhere."""
        self._layout = hashlib.sha256(layout.encode()).hexdigest()
        self._own = SlotPair(self.folder, rank, copy=False)
        self._copy = StateCopy()
        self._keep: Stamp | None = None
        self._pending: Stamp | None = None
        self._last = _Last.good
        self._thread: threading.Thread | None = None
        self._left_out = 0
        self._server: PeerServer | None = None
        self._peers: dict[int, Peer] = {}
        self._addresses: list[Address] = []
        if self._every:
            self._meet(Path(run_dir))

    def _meet(self, run_dir: Path) -> None:
        """Agree on identities and addresses."""
        fresh = [secrets.token_hex(16) for _ in range(3)]
        identity = run_identity(run_dir, fresh[0]) if self._rank == 0 else ""
        self._run, self._lineage, self._token = gather_objects((identity, *fresh[1:]))[0]
        if self._world % self._per_node or self._world == self._per_node:
            if self._rank == 0:
                log.info("snapshots stay on this node: there is no other one to keep copies")
            return
        host = _own_host()
        self._server = PeerServer(self.folder, host, self._token, self._timeout_s)
        self._addresses = gather_objects(self._server.address)

    def due(self, step: int) -> bool:
        """Return whether a snapshot is wanted after ``step`` updates."""
        return self._every > 0 and step % self._every == 0

    def take(
        self,
        step: int,
        tensors: Mapping[str, Any],
        counters: Mapping[str, Any],
        *,
        fenced: bool = False,
    ) -> bool:
        """Copy the state; digest and peer follow on a thread. All ranks call it.

        It never waits for a peer, the digest or a disk. If a rank has not finished the snapshot
        before, or this one fails on a rank, that costs the snapshot and a warning says why.

        Args:
            step: Updates done.
            tensors: Nested mappings of plain tensors, DTensors and ``WholeView``.
            counters: Plain JSON values.
            fenced: Only for accelerators: the caller promises to call :meth:`fence` before the
                tensors change; else what it queues after this waits for the copy.

        Returns:
            Whether a snapshot has begun on this rank.
        """
        started = time.perf_counter()
        last = _Last(int(max_over_ranks(torch.tensor(self._state())).item()))
        if last is _Last.busy:
            self._left_out += 1
            if self._left_out == 1 and self._rank == 0:
                log.warning("no snapshot at step %d: the one before is not whole yet", step)
            return False
        if last is _Last.good and self._pending is not None:
            self._keep = self._pending
        self._pending, self._left_out = (self._lineage, step), 0
        try:
            slot = self._own.free(self._keep)
            copied = self._copy.into(slot, tensors, counters)
        except OSError as error:
            log.warning("no snapshot of rank %d at step %d: %s", self._rank, step, error)
            self._last = _Last.failed
            return False
        if not fenced:
            self.fence()
        job = (slot, copied, step, self._keep, started)
        self._last = _Last.busy
        self._thread = threading.Thread(target=self._make_whole, args=job, daemon=True)
        self._thread.start()
        self.stall_s = time.perf_counter() - started
        return True

    def fence(self) -> None:
        """Let what is queued on the device from now on wait for the copies of the last snapshot."""
        self._copy.fence()

    def _state(self) -> _Last:
        if self._thread is not None and not self._thread.is_alive():
            self._thread = None
        return self._last if self._thread is None else _Last.busy

    def _make_whole(
        self, slot: Slot, copied: Copied, step: int, keep: Stamp | None, started: float
    ) -> None:
        """Finish a snapshot, on its own thread."""
        self._last = _Last.failed
        try:
            copied.wait()
            payload = slot.payload(copied.tensor_bytes + copied.counter_bytes)
            part = Part(
                run=self._run,
                lineage=self._lineage,
                layout=self._layout,
                plan=copied.plan,
                world=self._world,
                rank=self._rank,
                step=step,
                tensor_bytes=copied.tensor_bytes,
                counter_bytes=copied.counter_bytes,
                digest=digest_payload(payload),
            )
            slot.complete(part)
            if self._server is not None:
                self._peer((self._rank + self._per_node) % self._world).store(part, payload, keep)
        except (OSError, ValueError, RuntimeError) as error:
            log.warning("the snapshot of rank %d at step %d failed: %s", self._rank, step, error)
            return
        self.seconds = time.perf_counter() - started
        self._last = _Last.good

    def _peer(self, rank: int) -> Peer:
        if rank not in self._peers:
            self._peers[rank] = Peer(self._addresses[rank], self._token, self._timeout_s)
        return self._peers[rank]

    def restore(
        self, tensors: Mapping[str, Any], *, least: int = 0, before: int | None = None
    ) -> Restored | None:
        """Fill ``tensors`` from the newest snapshot of which every part is somewhere.

        All ranks call it, before the first :meth:`take` or when the run goes back in time. Other
        snapshots are deleted: what comes later has nothing to do with them.

        Args:
            tensors: As for :meth:`take`; filled in place, by every rank or by none.
            least: Ignore snapshots of fewer updates, because the disk has a newer state.
            before: Ignore snapshots of this many updates or more.
        """
        if not self._every:
            return None
        started = time.perf_counter()
        self.finish()
        self._forget()
        mine = [
            (part.rank, part.stamp)
            for _, part in stored_parts(self.folder)
            if (part.run, part.layout, part.world) == (self._run, self._layout, self._world)
        ]
        held = [set(parts) for parts in gather_objects(mine)]
        everywhere = set[tuple[int, Stamp]]().union(*held)
        end = math.inf if before is None else before
        stamps = {stamp for _, stamp in everywhere if least <= stamp[1] < end}
        result = None
        for stamp in sorted(stamps, key=lambda stamp: (stamp[1], stamp[0]), reverse=True):
            if not all((rank, stamp) in everywhere for rank in range(self._world)):
                continue
            found = self._find(stamp, held, state_plan(tensors))
            if all(outcomes := gather_objects(found and found[2])):
                assert found is not None
                counters = fill_state(*found[:2], tensors)
                self._keep = stamp
                result = Restored(
                    step=stamp[1],
                    counters=counters,
                    fetched=tuple(r for r, how in enumerate(outcomes) if how == "fetched"),
                    seconds=time.perf_counter() - started,
                )
                break
        barrier()  # nobody reads any more
        remove_parts(self.folder, self._keep)
        barrier()  # nobody deletes what another rank has begun since
        try:
            self._own.reserve(state_bytes(tensors))
        except OSError as error:
            log.warning("no snapshots as long as this lasts: %s", error)
        return result

    def _find(
        self, stamp: Stamp, held: list[set[tuple[int, Stamp]]], plan: str
    ) -> tuple[Part, memoryview, str] | None:
        """Return this rank's part of a snapshot, checked, and how it was found."""
        for path, part in stored_parts(self.folder):
            if (part.rank, part.stamp) != (self._rank, stamp):
                continue
            try:
                payload = read_payload(path, part)
            except OSError as error:
                log.warning("%s", error)
                continue
            if part.plan == plan and digest_payload(payload) == part.digest:
                return part, payload, "local"
            log.warning("%s is damaged or of another model: it is not used", path)
        holders = [r for r, parts in enumerate(held) if (self._rank, stamp) in parts]
        for holder in holders:
            if self._server is None or holder // self._per_node == self._rank // self._per_node:
                continue
            try:
                answer = self._peer(holder).fetch(self._rank, stamp)
            except (OSError, ValueError) as error:
                log.warning("no part of rank %d from rank %d: %s", self._rank, holder, error)
                continue
            if answer and answer[0].plan == plan and digest_payload(answer[1]) == answer[0].digest:
                return *answer, "fetched"
            log.warning("the copy of rank %d on the node of rank %d is damaged", self._rank, holder)
        return None

    def finish(self) -> None:
        """Wait until the last snapshot is whole or given up, on all ranks, which all call it."""
        self._join()
        if self._every:
            barrier()  # whoever ends now can no longer take the copy of another rank

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join(4 * self._timeout_s)  # connecting, two answers, and the bytes
            self._state()

    def close(self) -> None:
        """End the threads; the snapshots stay, for the next attempt. See :meth:`finish`."""
        self._join()
        for peer in self._peers.values():
            peer.close()
        if self._server is not None:
            self._server.close()
        self._own.close()

    def remove(self) -> None:
        """Delete all snapshots of the run: at its clean end, or when it goes back in time.

        All ranks call it; taking more afterwards is fine.
        """
        self.finish()
        self._forget()
        remove_parts(self.folder)
        barrier()

    def _forget(self) -> None:
        """Close the own slots; what is in them becomes a snapshot like any other."""
        self._copy.release()
        self._own.close()
        self._keep = self._pending = None
        self._last = _Last.good


def _own_host() -> str:
    """Return the address at which the other ranks reach this machine: towards the store's host."""
    store: Any = dist.distributed_c10d._get_default_store()
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    # Ranks that meet in a file are on one machine.
    return host_towards(getattr(store, "host", "127.0.0.1"))
