"""Finds ranks that are dead, stopped or hung, from outside the ranks.

Free of torch. One :class:`Monitor` per node reads the heartbeats and process states of its ranks;
:func:`judge` compares ranks, also those of several nodes.

The rule. In a hang most ranks wait for few, so only the ranks that are furthest behind are judged,
each by its own allowance since it last got on:

- between two updates and in forward, backward and update: ``stall_factor`` times what is usual,
  at least ``watchdog_min_s``, at most ``watchdog_s`` or twice the usual time. Usual is what a whole
  update took lately, or this phase in this bucket if that is more; "lately" is an upper envelope
  that sinks slowly, as a mixture has rare updates that take a hundred times the median;
- ten times ``watchdog_s`` for the first two times of a phase in a bucket (compilation, first
  buffers), for the start and for evaluation, five times for a checkpoint, and twice for data. Of
  the last three never less than twice the usual time. ``watchdog_s`` while nothing is usual yet.
  A rank that has not shown up yet imports what it needs: it gets a minute at least.

On a GPU the host marks phases ahead of the device; a kernel that hangs stops the host in the next
phase that waits for the device, on all ranks in the same one.

Ranks that are equally far are told apart by their stacks: those in other code than a collective
are to blame. A process that is gone or stopped is to blame wherever it is.
"""

import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from hunyuan_train.resilience.config import ResilienceConfig
from hunyuan_train.resilience.heartbeat import (
    UNUSUAL,
    Beat,
    beat_path,
    process_start,
    read_beat,
    stacks_path,
)
from hunyuan_train.resilience.stacks import Stack, name_ranks, parse_dump, summary

POLL_S = 0.25
"""How often to call :meth:`Monitor.check`."""

_LONGEST_GAP_S = 2.0
_IMPORTS_S = 60.0
_PATIENCE = {"start": 10, "evaluate": 10, "save": 5, "data": 2}
_FIRST = 10
_USUAL = 2


class Fault(StrEnum):
    """What is wrong with a rank."""

    dead = "dead"
    """Its process is gone."""
    stopped = "stopped"
    """Its process does not run: SIGSTOP, a debugger."""
    failed = "failed"
    """It ended with an exception, maybe because another rank is gone."""
    hung = "hung"
    """It runs and does not get on."""
    waiting = "waiting"
    """It is well and waits for a rank that is not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankState:
    """What a node knows about one of its ranks; plain values, to be sent to a supervisor."""

    rank: int
    node: int = 0
    pid: int = 0
    process: str = "running"
    """``missing`` (no sign yet), ``running``, ``stopped``, ``blocked`` (in the kernel), ``dead``,
    ``failed`` or ``done``."""
    progress: tuple[int, int, int, bool] = (-1, 0, 0, False)
    """Updates, micro-steps, phase, and whether it waits on purpose; the least is behind."""
    step: int = 0
    phase: str = "start"
    bucket: str = ""
    when: float = 0.0
    """Wall-clock time at which it last got on."""
    still_s: float = 0.0
    """Seconds since it last got on."""
    limit_s: float = 0.0
    """Its allowance for that."""
    waits: str = ""
    """What its stack says, see ``Stack.waits``; empty before a dump, ``silent`` if none came."""
    busy: float = 0.0
    cost: float = 0.0

    @classmethod
    def received(cls, values: Mapping[str, Any]) -> "RankState":
        """Return the state that ``dataclasses.asdict`` and JSON carried here."""
        return cls(**{**values, "progress": tuple(values["progress"])})

    @property
    def overdue(self) -> bool:
        """Whether it used up its allowance."""
        return self.still_s > self.limit_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One rank that is not well, or waits for one."""

    kind: Fault
    rank: int
    node: int
    step: int
    phase: str
    bucket: str
    seconds: float
    waits: str
    """What its stack says, see ``Stack.waits``."""
    sentence: str


def allowance(beat: Beat | None, cfg: ResilienceConfig) -> float:
    """Return the seconds a rank may take to get on from where it is."""
    if not cfg.watchdog_s:
        return math.inf
    if beat is None:
        return max(_PATIENCE["start"] * cfg.watchdog_s, _IMPORTS_S)
    usual_s = max(beat.typical_s, beat.typical_step_s)
    patience = _PATIENCE.get(beat.phase)
    if patience is not None:
        return max(patience * cfg.watchdog_s, _USUAL * beat.typical_s)
    if beat.count < UNUSUAL:
        return _FIRST * cfg.watchdog_s
    if not usual_s:
        return cfg.watchdog_s
    stall_s = max(cfg.stall_factor * usual_s, cfg.watchdog_min_s)
    return max(min(stall_s, cfg.watchdog_s), _USUAL * usual_s)


def judge(states: Sequence[RankState]) -> list[Verdict]:
    """Return who is to blame and who waits for them, the culprits first; empty if all is well.

    Args:
        states: Of all ranks, or of those one knows about.
    """
    active = [state for state in states if state.process != "done"]
    failed = [state for state in active if state.process == "failed"]
    culprits = [state for state in active if state.process == "dead"]
    culprits += [state for state in active if state.process == "stopped" and state.overdue]
    if not culprits and failed:
        culprits = [min(failed, key=lambda state: state.when)]  # the first
    if not culprits:
        culprits = _hung(active)
    if not culprits:
        return []
    blamed = [state.rank for state in culprits]
    rest = [s for s in active if s.rank not in blamed and s.process != "missing"]
    waiting = [state.rank for state in rest if state.process != "failed"]
    verdicts = [_verdict(state, waiting, together=len(culprits) > 1) for state in culprits]
    names = name_ranks(blamed)
    for state in rest:
        if state.process == "failed":
            verdicts.append(_verdict(state, [], together=False))
        else:
            text = f"rank {state.rank} waits for {names}"
            verdicts.append(_as_verdict(Fault.waiting, state, text))
    return verdicts


def _hung(active: Sequence[RankState]) -> list[RankState]:
    if not active:
        return []
    least = min(state.progress for state in active)
    last = [state for state in active if state.progress == least]
    if not all(state.overdue for state in last):
        return []
    dumped = {bool(s.waits) for s in last if s.process in ("running", "blocked")}
    if len(dumped) == 2:  # the stacks of another node are still to come
        return []
    busy = [state for state in last if state.waits in ("code", "silent", "")]
    if not busy:  # those behind wait, too: for a rank further on that does not
        busy = [state for state in active if state.waits == "code" and state.overdue]
    return busy or last


_PROCESS = {
    "blocked": " It is blocked in the kernel: by a disk, a network file system or a driver.",
    "missing": " It has not shown up since it was started.",
}
_WAITS = {
    "collective": " It waits in a collective itself, as do all that are behind.",
    "backward": " It is inside backward, computing or waiting for others.",
    "device": " It waits for its GPU.",
    "code": " It is in code that is no collective.",
    "silent": " It did not write its stack.",
}


def _verdict(state: RankState, waiting: list[int], *, together: bool) -> Verdict:
    kind = Fault.hung
    where = f"step {state.step}, in {state.phase}"
    where += f" of bucket {state.bucket}" if state.bucket else ""
    where += f" for {state.still_s:.1f} s"
    if state.process == "dead":
        kind, text = Fault.dead, f"rank {state.rank} is dead: process {state.pid} is gone; {where}"
    elif state.process == "failed":
        kind, text = (
            Fault.failed,
            f"rank {state.rank} failed with an exception in step {state.step}",
        )
    elif state.process == "stopped":
        kind, text = Fault.stopped, f"rank {state.rank} is stopped: process {state.pid}; {where}"
    elif waiting and not together:
        text = f"rank {state.rank} is behind: {where}"
    else:
        text = f"rank {state.rank} is hung: {where}"
    if waiting:
        wait = "waits" if len(waiting) == 1 else "wait"
        text += f"; {name_ranks(waiting)} {wait} for it"
    hint = _PROCESS.get(state.process) or (_WAITS.get(state.waits) if kind is Fault.hung else None)
    return _as_verdict(kind, state, f"{text}.{hint or ''}")


def _as_verdict(kind: Fault, state: RankState, sentence: str) -> Verdict:
    return Verdict(
        kind=kind, rank=state.rank, node=state.node, step=state.step, phase=state.phase,
        bucket=state.bucket, seconds=state.still_s, waits=state.waits, sentence=sentence,
    )  # fmt: skip


class Monitor:
    """Watches the ranks of one node in one attempt.

    Call :meth:`check` every :data:`POLL_S` seconds. What it returns is what is wrong at the moment:
    the same fault comes again at the next call, first the culprits and then those who wait for
    them. Where ranks run on several nodes, send :meth:`observe` to the supervisor, let it
    :func:`judge` all of them, and call :meth:`dump` here when it finds a fault; after that the
    states say who waits in a collective. Alone, a node whose ranks all wait blames them all.
    """

    def __init__(
        self, run_dir: str | Path, attempt: int, ranks: Iterable[int], cfg: ResilienceConfig
    ) -> None:
        """Start to watch, before the ranks start: records of processes that are gone are removed.

        Args:
            run_dir: Folder of the run.
            attempt: Number of this start of all ranks.
            ranks: Those on this node.
            cfg: Allowances; nothing is watched if ``watchdog_s`` is 0.
        """
        self._run_dir, self._attempt, self._cfg = Path(run_dir), attempt, cfg
        self._ranks = sorted(ranks)
        self._beats: dict[int, Beat | None] = dict.fromkeys(self._ranks)
        self._still_s = dict.fromkeys(self._ranks, 0.0)
        self._waits: dict[int, tuple[int, str]] = {}
        for rank in self._ranks:
            path = beat_path(run_dir, attempt, rank)
            old = read_beat(path)
            if old is not None and _process(replace(old, phase="")) == "dead":
                path.unlink()
        self._dumped: list[tuple[int, Beat | None]] = []
        self._last: float | None = None
        self.states: list[RankState] = []
        """What was observed last."""
        self.stacks = ""
        """What the last :meth:`dump` found: equal stacks once, the rarest first."""

    def check(self, now: float | None = None) -> list[Verdict]:
        """Return the ranks that are at fault and those that wait for them; empty if all is well.

        Before it blames a rank for the first time it dumps the stacks of all ranks, which takes up
        to a second.

        Args:
            now: Monotonic clock; None reads it.
        """
        if not self._cfg.watchdog_s:
            return []
        states = self.observe(now)
        verdicts = judge(states)
        if verdicts and self._blamed(verdicts) != self._dumped:
            self.dump()
            verdicts = judge([replace(state, waits=self._class_of(state.rank)) for state in states])
            self._dumped = self._blamed(verdicts)
        return verdicts

    def _blamed(self, verdicts: list[Verdict]) -> list[tuple[int, Beat | None]]:
        return [(v.rank, self._beats[v.rank]) for v in verdicts if v.kind is not Fault.waiting]

    def observe(self, now: float | None = None) -> list[RankState]:
        """Read the records and process states of this node's ranks.

        A rank's stillness adds up from call to call, at most 2 s each: if this process itself did
        not run for a while, nobody is blamed for that while.
        """
        now = time.monotonic() if now is None else now
        gap = min(now - self._last, _LONGEST_GAP_S) if self._last is not None else 0.0
        self._last = now
        self.states = [self._observe(rank, gap) for rank in self._ranks]
        return self.states

    def _observe(self, rank: int, gap: float) -> RankState:
        beat, before = read_beat(beat_path(self._run_dir, self._attempt, rank)), self._beats[rank]
        self._still_s[rank] += gap
        if beat is not None and (before is None or before.marks != beat.marks):
            self._still_s[rank] = 0.0
            self._waits.pop(rank, None)
        self._beats[rank] = beat
        still_s, limit_s = self._still_s[rank], allowance(beat, self._cfg)
        if beat is None:
            return RankState(rank=rank, process="missing", still_s=still_s, limit_s=limit_s)
        process = _process(beat)
        if process == "stopped":
            limit_s = min(self._cfg.watchdog_min_s, self._cfg.watchdog_s)
        return RankState(
            rank=rank, node=beat.node, pid=beat.pid, process=process, progress=beat.progress,
            step=beat.step, phase=beat.phase, bucket=beat.bucket, still_s=still_s, limit_s=limit_s,
            when=time.time() - time.monotonic() + beat.time, waits=self._class_of(rank),
            busy=beat.busy, cost=beat.cost,
        )  # fmt: skip

    def _class_of(self, rank: int) -> str:
        marks, waits = self._waits.get(rank, (-1, ""))
        beat = self._beats[rank]
        return waits if beat is not None and beat.marks == marks else ""

    def dump(self, wait_s: float = 1.0) -> dict[int, Stack]:
        """Have all ranks of this node write their stacks, and return those that came.

        A stopped or dead rank writes none. The files stay in the health folder of the attempt.

        Args:
            wait_s: Longest wait for the slowest rank.
        """
        asked: dict[int, tuple[Path, int]] = {}
        for rank, beat in self._beats.items():
            path = stacks_path(self._run_dir, self._attempt, rank)
            if beat is None or not beat.signal or _process(beat) not in ("running", "blocked"):
                continue
            asked[rank] = path, path.stat().st_size if path.exists() else 0
            try:
                os.kill(beat.pid, beat.signal)
            except ProcessLookupError:
                del asked[rank]
        _wait_for_dumps(asked, wait_s)
        found = {rank: Stack((), "") for rank in self._ranks}
        for rank, (path, begin) in asked.items():
            beat = self._beats[rank]
            assert beat is not None, "only ranks with a record are asked"
            text = path.read_bytes()[begin:].decode(errors="replace")
            found[rank] = parse_dump(text, beat.main_thread)
        for rank, stack in found.items():
            beat = self._beats[rank]
            self._waits[rank] = (-1 if beat is None else beat.marks), stack.waits or "silent"
        self.stacks = summary(found)
        return found


def _process(beat: Beat) -> str:
    """Return the state of the process that wrote ``beat``, see ``RankState.process``."""
    if beat.phase in ("done", "failed"):
        return beat.phase
    try:
        letter, started = process_start(beat.pid)
    except ProcessLookupError:
        return "dead"
    if started != beat.started or letter in "ZX":
        return "dead"
    return {"T": "stopped", "t": "stopped", "D": "blocked"}.get(letter, "running")


def _wait_for_dumps(asked: dict[int, tuple[Path, int]], wait_s: float) -> None:
    """Wait until each file grew and then stayed as it is for 50 ms."""
    end = time.monotonic() + wait_s
    sizes: list[int] = []
    since = time.monotonic()
    while (now := time.monotonic()) < end:
        new = [path.stat().st_size if path.exists() else 0 for path, _ in asked.values()]
        if new != sizes:
            sizes, since = new, now
        grown = all(n > begin for n, (_, begin) in zip(new, asked.values(), strict=True))
        if grown and now - since > 0.05:
            return
        time.sleep(0.01)
