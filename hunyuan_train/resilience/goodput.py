"""Where the wall-clock time of a run went, over all its attempts. Free of torch.

The events of a run (see ``events``) are laid out as spans of time that follow one another without
gap or overlap, so that they add up to the wall-clock time, whatever is missing. Time of which
nothing is known is never counted as useful.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from hunyuan_train.resilience.attempts import Event, Try, Visit, tries_of
from hunyuan_train.resilience.events import EventKind


class Use(StrEnum):
    """What time was used for."""

    useful = "useful"
    """Updates whose result is kept."""
    data = "data"
    """The slowest rank waited for its data."""
    save = "save"
    """Training stood still for a checkpoint."""
    snapshot = "snapshot"
    """Training stood still for a copy in memory."""
    evaluate = "evaluate"
    """Evaluation, comparison of the ranks."""
    start = "start"
    """Starting processes, imports, process group, proof of the layout, building the run."""
    restore = "restore"
    """Bringing the state back."""
    detection = "detection"
    """From a failure, or the last sign of life, until it was noticed."""
    restart = "restart"
    """From then on until all ranks had ended and could start again."""
    lost = "lost"
    """Updates that were done again, were not finished or were refused."""
    idle = "idle"
    """Between two attempts: back-off, waiting for machines, not started."""
    other = "other"
    """Metrics, agreement between ranks, closing."""
    unknown = "unknown"
    """Nothing was written about it."""


_OF_PART = {
    "step": Use.useful,
    "data": Use.data,
    "save": Use.save,
    "snapshot": Use.snapshot,
    "evaluate": Use.evaluate,
    "partial": Use.lost,
    "refused": Use.lost,
    "rewind": Use.restore,
}
_SLACK = 0.01
"""Share of a window that may be missing from its parts, since two clocks measured them."""
_SLACK_S = 0.02


@dataclass(slots=True)
class Span:
    """A piece of the wall-clock."""

    begin: float
    end: float
    uses: dict[Use, float]
    """Seconds; they add up to the span."""
    attempt: int
    """Place of the attempt among all, from 0."""
    stage: str = ""
    after: int = -1
    step: int = -1
    """The updates after ``after`` up to ``step`` were done in it; -1: none of the loop's time."""
    lost_steps: float = 0.0
    estimated: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Failed:
    """An attempt that a failure ended."""

    attempt: int
    fault: str
    time: float
    detection_s: float
    recovery_s: float | None
    """From its detection until training went on, None if it did not."""
    lost_s: float
    """Of this attempt's time, what was done again."""
    sentence: str


@dataclass(kw_only=True, slots=True)
class Goodput:
    """The account of a run."""

    begin: float
    """System time of its first sign of life."""
    wall_s: float
    seconds: dict[Use, float]
    """By use; they add up to ``wall_s``."""
    spans: list[Span]
    attempts: int
    failures: list[Failed]
    steps: int
    """Updates that are kept, over all stages."""
    lost_steps: float
    refused: int
    saves: int
    restores: dict[str, int]
    estimated_s: float
    """Split by the mean of the updates before, because a process that dies says no more."""
    notes: list[str] = field(default_factory=list)

    @property
    def share(self) -> float:
        """Useful time over wall-clock time."""
        return self.seconds[Use.useful] / self.wall_s if self.wall_s else 0.0

    def mean_s(self, name: str) -> float | None:
        """Return the mean of ``detection_s`` or ``recovery_s`` over the failures that have it."""
        values = [v for failed in self.failures if (v := getattr(failed, name)) is not None]
        return sum(values) / len(values) if values else None


def account(events: Iterable[Event]) -> Goodput:
    """Return where the time of a run went.

    Args:
        events: Of :func:`hunyuan_train.resilience.events.read_events`.

    Raises:
        ValueError: nothing in them says when a process trained.
    """
    told = sorted(events, key=lambda event: event["time"])
    tries = tries_of(told)
    if not any(attempt.visits for attempt in tries):
        raise ValueError(
            "this run's events.jsonl does not say when training began; it was written by an older "
            "version, is damaged, or no attempt came as far: see the logs of the attempts"
        )
    notes: list[str] = []
    layout = _Layout(tries, told[-1]["time"], notes)
    spans = layout.spans
    _take_back(spans, layout.turns)
    last = tries[-1]
    if not last.left and last.ended is None and last.detected is None:
        notes.append("The last attempt runs, or ended without a word: its last event is the end.")
    seconds = {use: sum(span.uses.get(use, 0.0) for span in spans) for use in Use}
    begin, end = tries[0].begin, max(told[-1]["time"], tries[0].begin)
    kept = sum(span.step - span.after - span.lost_steps for span in spans if span.step >= 0)
    count = Counter(event["kind"] for event in told)
    return Goodput(
        begin=begin,
        wall_s=end - begin,
        seconds=seconds,
        spans=spans,
        attempts=len(tries),
        failures=[_failed(number, tries, spans) for number in layout.failures],
        steps=round(kept),
        lost_steps=sum(span.lost_steps for span in spans),
        refused=count[EventKind.guard],
        saves=sum(e["kind"] == EventKind.save and not e.get("failure") for e in told),
        restores=dict(Counter(e.get("source", "") for e in told if e["kind"] == EventKind.restore)),
        estimated_s=sum(span.end - span.begin for span in spans if span.estimated),
        notes=notes,
    )


class _Layout:
    """Lays attempts out along the wall-clock; ``_fill`` alone moves on, so nothing overlaps."""

    def __init__(self, tries: Sequence[Try], end: float, notes: list[str]) -> None:
        self.spans: list[Span] = []
        self.turns: list[tuple[int, str, int]] = []
        """Where training went on from: number of spans before it, stage, step."""
        self.failures: list[int] = []
        self._notes = notes
        self._at = tries[0].begin
        for self._number, attempt in enumerate(tries):
            later = tries[self._number + 1 :]
            until = later[0].begin if later else end
            self._fill(attempt.begin, Use.idle)
            for place, visit in enumerate(attempt.visits):
                self._fill(visit.begin, Use.other if place else Use.start)
                self._loop(attempt, visit)
            if attempt.detected is not None:
                self._failure(attempt, attempt.detected, until, later)
            else:
                self._close(attempt, until, later)
        self._fill(end, Use.idle)

    def _fill(self, end: float, uses: Use | Mapping[Use, float], **fields: Any) -> None:
        """Go on to ``end``, with ``uses`` in proportion."""
        length = end - self._at
        if length <= 0:
            return
        if isinstance(uses, Use):
            uses = {uses: length}
        total = sum(uses.values())
        scaled = {use: seconds * (length / total) for use, seconds in uses.items() if seconds}
        self.spans.append(Span(self._at, end, scaled, self._number, **fields))
        self._at = end

    def _failure(self, attempt: Try, found: Event, until: float, later: Sequence[Try]) -> None:
        self.failures.append(self._number)
        failed_at = attempt.failed_at(self._at)
        if attempt.visits and attempt.visits[-1].ready is not None:
            self._done_unseen(attempt.visits[-1], found.get("step", -1), failed_at, later)
            self._fill(failed_at, Use.lost)
        else:
            self._fill(failed_at, Use.start)
        self._fill(found["time"], Use.detection)
        self._fill(until if attempt.ended is None else attempt.ended, Use.restart)

    def _close(self, attempt: Try, until: float, later: Sequence[Try]) -> None:
        """Lay out the end of an attempt of which no failure was noticed from outside."""
        if attempt.error:
            self.failures.append(self._number)
        if attempt.left:
            self._fill(attempt.last if attempt.ended is None else attempt.ended, Use.other)
            return
        until = until if attempt.ended is None else attempt.ended
        if attempt.visits and attempt.visits[-1].ready is not None:
            self._done_unseen(attempt.visits[-1], -1, until, later)
        silent_s = until - self._at
        self._fill(until, Use.unknown)
        if silent_s > _SLACK_S:
            self._notes.append(
                f"Attempt {self._number} ended without a word: of the {silent_s:,.1f} s from its "
                "last event to the next sign of life nothing is known."
            )

    def _loop(self, attempt: Try, visit: Visit) -> None:
        """Lay out one stage of one attempt up to its last event, or to the failure."""
        limit = attempt.failed_at(math.inf)
        if visit.ready is None:
            self._fill(min(visit.last, limit), Use.unknown if visit.windows else Use.start)
            return
        ready_at, at = visit.ready["time"], visit.ready["step"]
        self._fill(min(ready_at - visit.ready.get("restore_s", 0.0), limit), Use.start)
        self._fill(min(ready_at, limit), Use.restore)
        self.turns.append((len(self.spans), visit.stage, at))
        for event in visit.windows:
            after, step, parts = event["after"], event["step"], dict(event["parts"])
            whole = event["time"] - parts.pop("partial", 0.0)
            if after < at:
                self.turns.append((len(self.spans), visit.stage, after))
            elif after > at:
                self._fill(min(whole - sum(parts.values()), limit), Use.unknown)
                self._notes.append(
                    f"Attempt {self._number}: events of the updates {at} to {after} are missing."
                )
            place = {"stage": visit.stage, "after": after, "step": max(after, step)}
            self._fill(end := min(whole, limit), _uses(parts, end - self._at), **place)
            self._fill(min(event["time"], limit), Use.lost)
            at = max(after, step)

    def _done_unseen(self, visit: Visit, seen: int, end: float, later: Sequence[Try]) -> None:
        """Lay out updates after the last event that are known to be done, by the mean of others."""
        assert visit.ready is not None, "only a loop that began does updates"
        at = (visit.windows[-1] if visit.windows else visit.ready)["step"]
        again = [v.ready for t in later for v in t.visits if v.stage == visit.stage and v.ready]
        reached = max(seen, again[0]["step"] if again else -1)
        uses, done = _mean(self.spans, visit.stage)
        if reached > at and done:
            stop = self._at + (reached - at) * sum(uses.values()) / done
            place = {"stage": visit.stage, "after": at, "step": reached, "estimated": True}
            self._fill(min(stop, end), uses, **place)


def _uses(parts: Mapping[str, float], length: float) -> dict[Use, float]:
    """Return the uses of a window; what its parts leave open is unknown."""
    uses: dict[Use, float] = {}
    for name, seconds in parts.items():
        use = _OF_PART.get(name, Use.other)
        uses[use] = uses.get(use, 0.0) + seconds
    missing = length - sum(uses.values())
    if missing > 0:
        close = missing <= max(_SLACK * length, _SLACK_S)
        use = Use.other if close else Use.unknown
        uses[use] = uses.get(use, 0.0) + missing
    return uses


def _mean(spans: Sequence[Span], stage: str) -> tuple[dict[Use, float], int]:
    """Return the uses of the updates of a stage that were told, and how many these are."""
    uses: dict[Use, float] = {}
    done = 0
    for span in spans:
        if span.stage == stage and span.step > span.after and not span.estimated:
            done += span.step - span.after
            for use, seconds in span.uses.items():
                if use is not Use.unknown:
                    uses[use] = uses.get(use, 0.0) + seconds
    return uses, done


def _take_back(spans: Sequence[Span], turns: Sequence[tuple[int, str, int]]) -> None:
    """Count as lost what was done again: a later part that goes on from a step undoes all above."""
    limits: dict[str, float] = {}
    left = list(turns)
    for place in range(len(spans), -1, -1):
        if place < len(spans):
            span = spans[place]
            limit = limits.get(span.stage, math.inf)
            if span.step >= 0:
                _lose(span, limit)
                limits[span.stage] = min(limit, span.after)
        while left and left[-1][0] == place:
            _, stage, step = left.pop()
            limits[stage] = min(limits.get(stage, math.inf), step)


def _lose(span: Span, limit: float) -> None:
    """Move what a span did above ``limit`` to lost."""
    count = span.step - span.after
    span.lost_steps = span.step - max(min(span.step, limit), span.after)
    share = span.lost_steps / count if count else float(span.step > limit)
    if not share:
        return
    moved = 0.0
    for use, seconds in span.uses.items():
        if use not in (Use.unknown, Use.lost, Use.restore):
            span.uses[use] = seconds * (1 - share)
            moved += seconds * share
    span.uses[Use.lost] = span.uses.get(Use.lost, 0.0) + moved


def _failed(number: int, tries: Sequence[Try], spans: Sequence[Span]) -> Failed:
    attempt, own = tries[number], [span for span in spans if span.attempt == number]
    found = attempt.detected
    time = attempt.failed_at(attempt.last)
    noticed = attempt.last if found is None else found["time"]
    ready = [v.ready["time"] for t in tries[number + 1 :] for v in t.visits if v.ready]
    return Failed(
        attempt=number,
        fault=attempt.error if found is None else str(found.get("fault", "")),
        time=time,
        detection_s=sum(span.uses.get(Use.detection, 0.0) for span in own),
        recovery_s=max(ready[0] - noticed, 0.0) if ready else None,
        lost_s=sum(span.uses.get(Use.lost, 0.0) for span in own),
        sentence=str(found.get("sentence", "")) if found else f"the loop raised {attempt.error}",
    )
