"""What to do next with a job: a function of what is known, without files, clocks or processes.

Whoever leads calls :func:`decide`; another leader with the same files comes to the same answer,
which is why a leader may die at any time.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hunyuan_train.resilience.board import Attempt, Member, Plan, is_loopback
from hunyuan_train.resilience.config import LaunchConfig
from hunyuan_train.resilience.crashes import (
    EXIT_BAD_INPUT,
    EXIT_PREEMPTED,
    Failure,
    Kind,
    culprits,
    repeated,
)
from hunyuan_train.resilience.layouts import Job, choose

CALM_S = 3600.0
"""An attempt that ran this long before it failed says nothing about the failures before it."""

_NO_PROGRESS: list[Any] = ["", -1, -1]

_REPEATEDLY = 2
"""Failures in a row that one machine has to cause before it is excluded."""


@dataclass(frozen=True, slots=True)
class Wait:
    """Nothing to do; ``why`` is for the user, empty while ranks run."""

    why: str = ""


@dataclass(frozen=True, slots=True)
class Alarm:
    """The attempt cannot go on: members are lost."""

    why: str
    tickets: list[int]


@dataclass(frozen=True, slots=True)
class Resize:
    """Ask the ranks to save and end: more of them can go on."""


@dataclass(frozen=True, slots=True)
class Stop:
    """The job is over."""

    code: int
    why: str


@dataclass(frozen=True, slots=True)
class Begin:
    """Start the next attempt after ``delay_s``."""

    plan: Plan
    delay_s: float = 0.0
    events: list[tuple[str, dict[str, object]]] = field(default_factory=list)


Decision = Wait | Alarm | Resize | Stop | Begin


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """All that a decision depends on."""

    cfg: LaunchConfig
    job: Job
    attempts: Sequence[Attempt]
    """Of this job, oldest first."""
    members: Mapping[int, Member]
    """Agents that live."""
    next_attempt: int
    patient: bool = True
    """Whether missing machines may still come before the first attempt."""

    @property
    def excluded(self) -> dict[str, str]:
        """Tickets that earlier plans excluded, and why."""
        return dict(self.attempts[-1].plan.excluded) if self.attempts else {}


def decide(facts: Facts) -> Decision:
    """Return what the leader has to do now."""
    if not facts.attempts:
        return _begin(facts, 0.0)
    last = facts.attempts[-1]
    lost = _lost(facts, last)
    reported = len(last.reports) + len(lost)
    if reported < len(last.plan.tickets):
        if lost and last.alarm is None:
            hosts = ", ".join(f"node {node} ({last.plan.hosts[node]})" for node in lost)
            return Alarm(f"{hosts} is gone", [last.plan.tickets[node] for node in lost])
        if last.alarm is None and not last.resize and _can_grow(facts):
            return Resize()
        return Wait()
    failures = failures_of(last)
    codes = [code for report in last.reports.values() for code in report.codes.values()]
    if not failures and not lost:
        if all(code == 0 for code in codes):
            return Stop(0, "done")
        if last.alarm is None and not last.resize:
            saved = all(code in (0, EXIT_PREEMPTED) for code in codes)
            how = "after saving" if saved else "and not every rank had saved in launch.grace_s"
            return Stop(EXIT_PREEMPTED, f"stopped by a signal {how}")
        return _begin(facts, 0.0)
    return _after_failure(facts, failures)


def failures_of(attempt: Attempt) -> list[Failure]:
    """Return what an attempt failed of, without the ranks that only lost a peer."""
    return culprits([f for node in sorted(attempt.reports) for f in attempt.reports[node].failures])


def backoff_s(cfg: LaunchConfig, attempts: Sequence[Attempt]) -> float:
    """Return the wait before the next attempt.

    None after an attempt that got further than all before it; else ``backoff_s``, doubled with each
    further attempt in a row that did not.
    """
    best = [_NO_PROGRESS, *map(_progress, attempts)]
    idle = 0
    while idle < len(attempts) and best[-1 - idle] <= max(best[: -1 - idle]):
        idle += 1
    return min(cfg.backoff_s * 2 ** (idle - 1), cfg.max_backoff_s) if idle else 0.0


def _progress(attempt: Attempt) -> list[Any]:
    return max((report.progress for report in attempt.reports.values()), default=_NO_PROGRESS)


def _lost(facts: Facts, attempt: Attempt) -> list[int]:
    return [
        node
        for node, ticket in enumerate(attempt.plan.tickets)
        if ticket not in facts.members and node not in attempt.reports
    ]


def _after_failure(facts: Facts, failures: Sequence[Failure]) -> Decision:
    cfg = facts.cfg
    if refused := [failure for failure in failures if failure.kind is Kind.refused]:
        return Stop(EXIT_BAD_INPUT, refused[0].message or refused[0].sentence())
    history = [failures_of(attempt) for attempt in facts.attempts]
    if (again := repeated(history, cfg.same_failure_limit)) is not None:
        return Stop(
            1,
            f"{again.sentence()}; that is the same failure at the same step for the "
            f"{_ordinal(cfg.same_failure_limit)} time, so it is an error of the code or the data, "
            f"not of a machine, and no restart helps\n{again.trace}".rstrip(),
        )
    restarts = sum(not attempt.resize for attempt in facts.attempts)
    if restarts > cfg.max_restarts:
        why = f"; the last: {failures[0].sentence()}" if failures else ""
        return Stop(1, f"launch.max_restarts={cfg.max_restarts} restarts are used up{why}")
    return _begin(facts, backoff_s(cfg, facts.attempts))


def _ordinal(number: int) -> str:
    return {2: "second", 3: "third"}.get(number, f"{number}th")


def _usable(facts: Facts, excluded: Mapping[str, str]) -> list[Member]:
    return [
        member
        for _, member in sorted(facts.members.items())
        if member.healthy and str(member.ticket) not in excluded
    ]


def _suspect(facts: Facts) -> tuple[int, str] | None:
    """Return the ticket that caused the last failures in a row, and the last one's sentence."""
    streak: set[int] | None = None
    for count, attempt in enumerate(reversed(facts.attempts), start=1):
        failed = [f for f in failures_of(attempt) if f.kind is not Kind.peer]
        tickets = {attempt.plan.tickets[failure.node] for failure in failed}
        streak = tickets if streak is None else streak & tickets
        if len(streak) != 1:  # nobody, or several at once: that is no machine's own fault
            return None
        if count == _REPEATEDLY:
            return next(iter(streak)), failures_of(facts.attempts[-1])[0].sentence()
        if max(report.seconds for report in attempt.reports.values()) > CALM_S:
            return None
    return None


def _begin(facts: Facts, delay_s: float) -> Decision:
    """Choose machines and layout of the next attempt."""
    cfg, excluded = facts.cfg, facts.excluded
    events: list[tuple[str, dict[str, object]]] = []
    if (suspect := _suspect(facts)) is not None:
        wider = {**excluded, str(suspect[0]): suspect[1]}
        if _layout(facts, len(_usable(facts, wider))) is not None:
            excluded = wider
            events.append(("excluded", {"why": suspect[1], "ticket": suspect[0]}))
    usable = _usable(facts, excluded)
    found = _layout(facts, len(usable))
    if found is None or (found[0] < cfg.nodes and not facts.attempts and facts.patient):
        return _waiting(facts, len(usable))
    nodes, overrides = found
    before = facts.attempts[-1].plan if facts.attempts else None
    tickets = place(usable, before.tickets if before else [], nodes)
    if hidden := _hidden([facts.members[ticket] for ticket in tickets]):
        return Stop(EXIT_BAD_INPUT, hidden)
    hosts = [facts.members[ticket].host for ticket in tickets]
    if before is not None:
        events += _changes(before, tickets, hosts, overrides)
    plan = Plan(
        attempt=facts.next_attempt,
        tickets=tickets,
        hosts=hosts,
        overrides=overrides,
        excluded=excluded,
    )
    return Begin(plan, delay_s, events)


def _hidden(members: Sequence[Member]) -> str:
    """Return a sentence about a machine that the others cannot reach, empty if there is none."""
    if len({member.network for member in members}) > 1:
        for member in members:
            if is_loopback(member.address):
                return (
                    f"{member.host} has no address that other machines reach, only "
                    f"{member.address}; set launch.rendezvous to the address of one of the machines"
                )
    return ""


def _layout(facts: Facts, usable: int) -> tuple[int, list[str]] | None:
    """Return the number of nodes to go on with and the overrides, None to wait for more."""
    cfg = facts.cfg
    if usable >= cfg.nodes:
        return cfg.nodes, []
    if not cfg.min_nodes:
        return None
    for nodes in range(usable, cfg.min_nodes - 1, -1):
        overrides = choose(facts.job, nodes * cfg.ranks_per_node, cfg.layouts)
        if overrides is not None:
            return nodes, overrides
    return None


def _can_grow(facts: Facts) -> bool:
    now = len(facts.attempts[-1].plan.tickets)
    found = _layout(facts, len(_usable(facts, facts.excluded)))
    return now < facts.cfg.nodes and found is not None and found[0] > now


def _waiting(facts: Facts, usable: int) -> Decision:
    sick = [m for m in facts.members.values() if not m.healthy]
    if sick and len(facts.members) >= facts.cfg.nodes + facts.cfg.spares:
        named = "; ".join(f"{member.host}: {member.why}" for member in sick)
        return Stop(1, f"the pre-flight check fails and no spare is left: {named}")
    enough = facts.cfg.min_nodes or facts.cfg.nodes
    least = f" (at least {enough})" if enough < facts.cfg.nodes else ""
    return Wait(f"waiting for machines: {usable} of {facts.cfg.nodes}{least} are here")


def place(usable: Sequence[Member], before: Sequence[int], nodes: int) -> list[int]:
    """Return a ticket for each node number: who had one keeps it, then wishes, then arrival."""
    there = {member.ticket for member in usable}
    kept = [ticket for ticket in before if ticket in there]
    slots: list[int | None] = [None] * nodes
    if len(before) == nodes:
        slots = [ticket if ticket in there else None for ticket in before]
    else:
        slots[: len(kept)] = kept[:nodes]
    rest = [member for member in usable if member.ticket not in slots]
    for member in rest:
        if 0 <= member.node_rank < nodes and slots[member.node_rank] is None:
            slots[member.node_rank] = member.ticket
    waiting = iter([member.ticket for member in rest if member.ticket not in slots])
    return [next(waiting) if slot is None else slot for slot in slots]


def _changes(
    before: Plan, tickets: Sequence[int], hosts: Sequence[str], overrides: Sequence[str]
) -> list[tuple[str, dict[str, object]]]:
    """Return the events that tell how an attempt differs from the one before."""
    old, new = len(before.tickets), len(tickets)
    if new != old:
        kind = "grow" if new > old else "shrink"
        return [(kind, {"nodes": new, "before": old, "layout": list(overrides)})]
    return [
        ("replaced", {"node": node, "by": hosts[node], "was": before.hosts[node]})
        for node in range(new)
        if tickets[node] != before.tickets[node]
    ]


def with_health(members: Mapping[int, Member], complaints: Mapping[int, str]) -> dict[int, Member]:
    """Return the members, those with a complaint marked as not healthy."""
    return {
        ticket: replace(member, healthy=False, why=complaints[ticket])
        if ticket in complaints
        else member
        for ticket, member in members.items()
    }
