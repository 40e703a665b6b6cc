"""The ranks of one node in one attempt: started, watched, stopped as one.

Free of torch, so that it runs within a second of the command.
"""

import signal
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TextIO

from hunyuan_train.resilience.crashes import (
    CRASH_FILE,
    EXIT_PREEMPTED,
    Failure,
    Kind,
    crash_path,
    read_failure,
)
from hunyuan_train.resilience.heartbeat import beat_path, health_folder, read_beat
from hunyuan_train.resilience.standby import Standby
from hunyuan_train.runtime.env import child_environment

GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"
"""Variable that names gloo's network interface; what the user set stays."""

STOP_GRACE_S = 0.5
"""Seconds between SIGTERM and SIGKILL once a rank has failed: the others hang in a collective and
cannot save, so waiting longer only costs time."""

_ASK_AGAIN_S = 1.0
_SETTLE_S = 1.0
"""Longest wait for the rank that a failure really began with."""
_CHUNK_BYTES = 1 << 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """What one node has to run in one attempt."""

    attempt: int
    node: int
    nodes: int
    ranks: int
    """Ranks on this node; every node has as many."""
    address: str
    """Where rank 0 listens."""
    port: int
    interface: str = ""
    """Network interface for gloo, which else takes the one of the machine's name."""
    argv: tuple[str, ...]
    """Arguments of Python: ``-m hunyuan_train VERB ...`` or a script."""

    @property
    def global_ranks(self) -> range:
        """Numbers of this node's ranks in the world."""
        return range(self.node * self.ranks, (self.node + 1) * self.ranks)

    def environment(self, local_rank: int, run_dir: Path) -> dict[str, str]:
        """Return the variables of a rank: those of torchrun, and our own."""
        rank = self.node * self.ranks + local_rank
        values = {
            "RANK": rank,
            "LOCAL_RANK": local_rank,
            "WORLD_SIZE": self.nodes * self.ranks,
            "LOCAL_WORLD_SIZE": self.ranks,
            "GROUP_RANK": self.node,
            "GROUP_WORLD_SIZE": self.nodes,
            "MASTER_ADDR": self.address,
            "MASTER_PORT": self.port,
            "TORCHELASTIC_RESTART_COUNT": self.attempt,
            "HUNYUAN_ATTEMPT": self.attempt,
            "HUNYUAN_JOB_FOLDER": run_dir.resolve(),
            CRASH_FILE: crash_path(run_dir, self.attempt, rank).resolve(),
        }
        if self.interface and GLOO_INTERFACE not in child_environment():
            values[GLOO_INTERFACE] = self.interface
        return {name: str(value) for name, value in values.items()}


class Agent:
    """Runs the ranks of one :class:`Order`; never blocks, :meth:`poll` moves it on."""

    def __init__(self, order: Order, run_dir: Path, standby: Standby, out: TextIO = sys.stderr):
        """Start the ranks.

        Args:
            order: What to run.
            run_dir: Folder of the run: output goes to ``logs/``, exceptions to ``health/``.
            standby: Starts them.
            out: Where the output of the ranks is shown, each line with its rank in front.
        """
        self.order = order
        self.codes: dict[int, int] = {}
        """Exit codes so far, by global rank; minus the number of a signal."""
        self.failures: list[Failure] = []
        self.started_s = time.monotonic()
        self._run_dir, self._standby, self._out = run_dir, standby, out
        self.ranks = order.global_ranks
        self._hung: dict[int, str] = {}
        self._stopped_at = self._asked_at = self._failed_at = self._reminded_at = 0.0
        self._grace_s = STOP_GRACE_S
        self._asked: signal.Signals | None = None
        logs = run_dir / "logs" / f"attempt-{order.attempt}"
        logs.mkdir(parents=True, exist_ok=True)
        health_folder(run_dir, order.attempt).mkdir(parents=True, exist_ok=True)
        self._tails = [_Tail(logs / f"rank-{rank}.log", rank) for rank in self.ranks]
        for local_rank, (rank, tail) in enumerate(zip(self.ranks, self._tails, strict=True)):
            standby.start(rank, order.argv, order.environment(local_rank, run_dir), tail.path)

    @property
    def ended(self) -> bool:
        """Whether no rank runs any more."""
        return len(self.codes) == self.order.ranks

    @property
    def failed(self) -> bool:
        """Whether a rank failed, and those that may have made it fail had time to show."""
        causes = [failure for failure in self.failures if failure.kind is not Kind.peer]
        settled = time.monotonic() - self._failed_at > _SETTLE_S
        return bool(causes) or (bool(self.failures) and (settled or self.ended))

    def poll(self) -> list[Failure]:
        """Take note of what happened since the last call and return the new failures."""
        now = time.monotonic()
        fresh: list[Failure] = []
        for rank, code in self._standby.ended().items():
            if rank not in self.ranks:
                continue
            self.codes[rank] = code
            by_us = code < 0 and self._stopped_at and rank not in self._hung
            if code not in (0, EXIT_PREEMPTED) and not by_us:
                fresh.append(self._failure(rank, code))
        if fresh and not self.failures:
            self._failed_at = now
        self.failures += fresh
        self._remind(now)
        for tail in self._tails:
            tail.show(self._out)
        return fresh

    def ask(self, number: signal.Signals, grace_s: float) -> None:
        """Ask every rank to save and end, again each second, and kill after ``grace_s``."""
        if self._asked is None:
            self._asked, self._grace_s = number, grace_s
            self._asked_at = time.monotonic()
            self._remind(self._asked_at)

    def stop(self) -> None:
        """End all ranks: their work since the last save is lost already."""
        if not self._stopped_at and not self.ended:
            self._stopped_at = time.monotonic()
            self._signal(signal.SIGTERM)

    def kill(self, rank: int, why: str) -> None:
        """Kill a rank that the watchdog says hangs; it counts as failed."""
        if rank in self.ranks and rank not in self.codes and not self._stopped_at:
            self._hung[rank] = why
            if rank in self._standby.pids:
                self._standby.signal(rank, signal.SIGKILL, group=True)
            else:
                self._standby.kill()

    def _failure(self, rank: int, code: int) -> Failure:
        attempt, node = self.order.attempt, self.order.node
        beat = read_beat(beat_path(self._run_dir, attempt, rank))
        step = -1 if beat is None else beat.step
        if rank in self._hung:
            since = 0.0 if beat is None else time.time() - time.monotonic() + beat.time
            return Failure(
                rank=rank, node=node, code=code, step=step, message=self._hung[rank], hung=True,
                since=since,
            )  # fmt: skip
        failure = read_failure(self._run_dir, attempt, rank, node, code, step)
        return replace(failure, since=self._standby.ended_at.get(rank, 0.0))

    def _remind(self, now: float) -> None:
        """Repeat requests, and kill what had its time."""
        if self._stopped_at:
            if now - max(self._stopped_at, self._reminded_at) > STOP_GRACE_S:
                self._reminded_at = now
                self._signal(signal.SIGKILL, group=True)
        elif self._asked is not None:
            if now - self._asked_at > self._grace_s:
                self.stop()
            elif now - self._reminded_at > _ASK_AGAIN_S:
                self._reminded_at = now
                self._signal(self._asked)

    def _signal(self, number: signal.Signals, *, group: bool = False) -> None:
        for rank in self.ranks:
            if rank not in self.codes:
                self._standby.signal(rank, number, group=group)


class _Tail:
    """Shows what a rank adds to its log.

    The rank writes the file itself: nothing is lost, and nothing waits, when nobody reads.
    """

    def __init__(self, path: Path, rank: int) -> None:
        self.path = path
        self._prefix = f"[{rank}] "
        self._read = path.stat().st_size if path.exists() else 0

    def show(self, out: TextIO) -> None:
        try:
            with self.path.open("rb") as file:
                file.seek(self._read)
                data = file.read(_CHUNK_BYTES)
        except FileNotFoundError:
            return
        whole = data[: data.rfind(b"\n") + 1] if len(data) < _CHUNK_BYTES else data
        if whole:
            self._read += len(whole)
            lines = whole.decode(errors="replace").splitlines()
            out.write("".join(f"{self._prefix}{line}\n" for line in lines))
            out.flush()
