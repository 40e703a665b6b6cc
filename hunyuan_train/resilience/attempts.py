"""The events of a run put together to its attempts, as far as they are there. Free of torch."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hunyuan_train.resilience.events import EventKind

Event = dict[str, Any]

HARMLESS = ("slow", "straggler")
"""Verdicts that end no attempt."""

_ENDS_AT_ONCE = ("sigkill", "sigsegv", "abort", "exception", "sigstop", "gil", "loop")
"""Faults of a drill after which the rank gets no further; others are noticed later, or never."""

_FIELDS = {
    EventKind.begin: ("stage", "process", "started"),
    EventKind.ready: ("stage", "step"),
    EventKind.progress: ("stage", "after", "step", "parts"),
    EventKind.leave: ("stage", "after", "step", "parts"),
}


@dataclass(slots=True)
class Visit:
    """One stage in one process."""

    stage: str
    begin: float
    last: float
    """Time of its last event."""
    ready: Event | None = None
    windows: list[Event] = field(default_factory=list)
    """Events of kind progress and leave."""
    left: bool = False
    error: str = ""


@dataclass(slots=True)
class Try:
    """One start of all ranks."""

    attempt: int
    """Its number; without a launcher every start may have the same."""
    begin: float
    last: float
    """Time of its last event."""
    launched: bool = False
    process: str = ""
    ended: float | None = None
    """When a launcher saw the last rank end."""
    detected: Event | None = None
    """The first failure that was noticed."""
    struck: float | None = None
    """When a drill ended a rank."""
    visits: list[Visit] = field(default_factory=list)

    @property
    def left(self) -> bool:
        """Whether its last stage's loop said that it is over."""
        return bool(self.visits) and self.visits[-1].left

    @property
    def error(self) -> str:
        """Class of the exception that ended the loop of the first rank."""
        return self.visits[-1].error if self.visits else ""

    def failed_at(self, unknown: float) -> float:
        """Return when the failure happened that was noticed, or else ended the loop."""
        known = [self.struck] if self.struck is not None else []
        if self.detected is not None and self.detected.get("since"):
            known.append(self.detected["since"])
        if self.error:
            known.append(self.visits[-1].last)
        if self.detected is None:
            return min(known, default=unknown)
        return min(*known, self.detected["time"]) if known else unknown


def tries_of(events: Sequence[Event]) -> list[Try]:
    """Return the attempts that events tell of, in the order of their begin.

    Args:
        events: In the order of their times.
    """
    tries: list[Try] = []
    for event in events:
        kind = event["kind"]
        if any(name not in event for name in _FIELDS.get(kind, ())):
            continue
        attempt = _find(tries, event)
        if attempt is None:
            attempt = Try(event["attempt"], event["time"], event["time"])
            tries.append(attempt)
        attempt.last = max(attempt.last, event["time"])
        if kind == EventKind.attempt_start:
            attempt.launched = True
        elif kind == EventKind.attempt_end and attempt.ended is None:
            attempt.ended = event["time"]
        elif kind == EventKind.detected and event.get("fault") not in HARMLESS:
            attempt.detected = attempt.detected or event
        elif kind == EventKind.fault and event.get("fault") in _ENDS_AT_ONCE:
            attempt.struck = event["time"]
        else:
            _visit(attempt, event)
    return sorted((t for t in tries if t.launched or t.visits), key=lambda t: t.begin)


def _find(tries: Sequence[Try], event: Event) -> Try | None:
    """Return the attempt that an event belongs to, None for that of a new one."""
    same = [t for t in tries if t.attempt == event["attempt"]]
    if event["kind"] == EventKind.begin:
        known = [t for t in same if t.process == event["process"]]
        fresh = [t for t in same if t.launched and not t.process]
        return (known or fresh or [None])[-1]
    if event["kind"] == EventKind.attempt_start:
        # A process of this attempt may have written before, on a machine whose clock is behind.
        return next((t for t in same if not t.launched and t.ended is None), None)
    return same[-1] if same else None


def _visit(attempt: Try, event: Event) -> None:
    """Take note of an event of the first rank's clock."""
    kind, time = event["kind"], event["time"]
    if kind not in _FIELDS:
        return
    if kind == EventKind.begin:
        if not attempt.process and not attempt.launched:
            attempt.begin = min(event["started"], time)
        attempt.process = event["process"]
        attempt.visits.append(Visit(event["stage"], time, time))
        return
    if not attempt.visits or attempt.visits[-1].stage != event["stage"]:
        attempt.visits.append(Visit(event["stage"], time, time))  # its begin was not written
    visit = attempt.visits[-1]
    visit.last = max(visit.last, time)
    if kind == EventKind.ready:
        visit.ready = event
    else:
        visit.windows.append(event)
        visit.left = kind == EventKind.leave
        visit.error = event.get("error", "")
