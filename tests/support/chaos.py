"""Drills on real runs: ``hunyuan-train launch train`` with faults, and what came of them."""

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fake_job import ROOT, finish
from tiny_run import overrides, rows

from hunyuan_train.checkpoint.storage import Manifest, list_steps, step_folder
from hunyuan_train.resilience.events import read_events

QUICK = (
    "certify.at_start=false",
    "launch.preflight=false",
    "launch.backoff_s=0.1",
    "launch.max_backoff_s=0.1",
)
MEMORY = ("resilience.snapshot_every=1",)
WHOLE = ("parallel.zero_stage=0", "resilience.replica_every=1")
"""Every rank holds everything, and all compare it after every update."""


def start(data: Path, run: Path, *fields: str, faults: Sequence[str] = ()) -> subprocess.Popen[str]:
    """Start ``launch train`` in a process group of its own."""
    entries = ",".join(f'"{fault}"' for fault in faults)
    extra = [*QUICK, *fields, f"resilience.faults=[{entries}]"]
    return subprocess.Popen(
        [sys.executable, "-m", "hunyuan_train", "launch", "train", *overrides(data, run, *extra)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def train(
    data: Path, run: Path, *fields: str, faults: Sequence[str] = (), timeout_s: float = 240
) -> tuple[int, str]:
    """Run ``launch train`` to its end; return exit code and log."""
    return finish(start(data, run, *fields, faults=faults), timeout_s)


def kill_node(process: subprocess.Popen[str]) -> None:
    """Lose a machine: its supervisor at once; what it started goes with it."""
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def trace(run: Path) -> list[tuple[float, float, float]]:
    """Return (step, loss, gradient norm) of each update as they are in the metrics, unrounded."""
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows(run)]


def final(run: Path) -> dict[str, str]:
    """Return the digests of all tensors of the last checkpoint: weights, EMA, moments, counters."""
    folder = run / "checkpoints"
    digests = Manifest.read(step_folder(folder, list_steps(folder)[-1])).digests
    assert digests
    return digests


def assert_same(quiet: Path, broken: Path) -> None:
    """Compare losses, gradient norms and final state to the last bit."""
    assert trace(broken) == trace(quiet)
    one, two = final(quiet), final(broken)
    assert one.keys() == two.keys()
    assert [name for name in one if one[name] != two[name]] == []


@dataclass(frozen=True, kw_only=True)
class Strike:
    """One fault of a drill and what followed."""

    kind: str
    rank: int
    step: int
    attempt: int
    detected: dict[str, Any] | None
    """The first event that says which rank failed, or that something was refused or not saved."""
    detected_s: float
    restored: dict[str, Any] | None
    """The next restore, if the fault cost an attempt."""
    next_step_s: float
    """From the strike until the first update after the restore was done."""

    @property
    def lost(self) -> int:
        """Updates that were done and had to be done again."""
        # A strike while saving comes after its own update: going back to that one loses nothing.
        done = self.step - 1
        return 0 if self.restored is None else max(0, done - self.restored["step"])

    def line(self) -> str:
        told = (self.detected or {}).get("sentence") or (self.detected or {}).get("failure", "")
        return (
            f"{self.kind:15s} rank {self.rank} step {self.step:4d}  seen {self.detected_s:5.2f} s  "
            f"next step {self.next_step_s:5.2f} s  lost {self.lost:2d}  {str(told)[:90]}"
        )


def strikes(run: Path) -> list[Strike]:
    """Return what each fault of a run led to, in the order in which they struck."""
    events = read_events(run)
    done = {int(row["step"]): row["time"] for row in rows(run)}
    found = []
    for place, event in enumerate(events):
        if event["kind"] != "fault":
            continue
        later = [e for e in events[place + 1 :] if e["time"] >= event["time"]]
        now = [e for e in later if e["attempt"] == event["attempt"]]
        detected = next((e for e in now if _blames(e, event["rank"])), None)
        nexts = [e for e in later if e["kind"] == "restore"]
        ended = any(e["kind"] == "attempt_start" for e in later) and nexts
        restored = nexts[0] if ended and detected and detected["kind"] == "detected" else None
        step = restored["step"] + 1 if restored else -1
        found.append(
            Strike(
                kind=event["fault"],
                rank=event["rank"],
                step=event["step"],
                attempt=event["attempt"],
                detected=detected,
                detected_s=detected["time"] - event["time"] if detected else float("nan"),
                restored=restored,
                next_step_s=done.get(step, float("nan")) - event["time"],
            )
        )
    return found


def _blames(event: dict[str, Any], rank: int) -> bool:
    if event["kind"] == "detected":
        return event.get("rank") == rank or rank in event.get("ranks", ())
    return event["kind"] == "guard" or (event["kind"] == "save" and bool(event["failure"]))


def events_of(run: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_events(run) if event["kind"] == kind]


class Findings:
    """What the long drills measured, for the table at the end."""

    def __init__(self) -> None:
        self.strikes: list[Strike] = []
        self.figures: dict[str, float] = {}

    def report(self) -> None:
        """Print a table by kind, and everything as one line of JSON."""
        if not self.strikes and not self.figures:
            return
        table: dict[str, dict[str, float]] = {}
        print(f"\n{'fault':15s} {'times':>5s} {'seen s':>8s} {'next step s':>12s} {'lost':>5s}")
        for kind in dict.fromkeys(strike.kind for strike in self.strikes):
            mine = [strike for strike in self.strikes if strike.kind == kind]
            row = {
                "times": len(mine),
                "seen_s": _most(strike.detected_s for strike in mine),
                "next_step_s": _most(strike.next_step_s for strike in mine),
                "lost": max(strike.lost for strike in mine),
            }
            table[kind] = row
            seen, following = (
                "" if math.isnan(row[name]) else f"{row[name]:.2f}"
                for name in ("seen_s", "next_step_s")
            )
            print(f"{kind:15s} {len(mine):5d} {seen:>8s} {following:>12s} {row['lost']:5.0f}")
        seen = [s.detected_s for s in self.strikes if not math.isnan(s.detected_s)]
        if seen:
            self.figures["detection_p50_s"] = quantile(seen, 0.5)
            self.figures["detection_p99_s"] = quantile(seen, 0.99)
        clean = {
            kind: {k: None if math.isnan(v) else round(v, 3) for k, v in row.items()}
            for kind, row in table.items()
        }
        figures = {name: round(value, 3) for name, value in self.figures.items()}
        print(json.dumps({"faults": clean, **figures}))


def _most(values: Iterable[float]) -> float:
    return max((value for value in values if not math.isnan(value)), default=math.nan)


def quantile(values: Sequence[float], share: float) -> float:
    """Return the least value that ``share`` of all do not exceed."""
    ordered = sorted(values)
    return ordered[max(math.ceil(share * len(ordered)) - 1, 0)]
