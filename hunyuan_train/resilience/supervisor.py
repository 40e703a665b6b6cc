"""Keeps a job going: what ``hunyuan-train launch`` runs on every machine.

Every supervisor starts and watches the ranks of its own machine, and does what the newest plan on
the :class:`Board` says. One of them, the one that came first of those alive, also decides; when it
is gone the next one does. None has state of its own that the job needs. Free of torch.
"""

import logging
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

from hunyuan_train.resilience.agent import Agent, Order
from hunyuan_train.resilience.board import (
    Attempt,
    Board,
    Member,
    Report,
    free_port,
    interface_of,
    is_loopback,
    newest_checkpoint,
    own_address,
)
from hunyuan_train.resilience.config import LaunchConfig, ResilienceConfig
from hunyuan_train.resilience.crashes import EXIT_PREEMPTED, Failure, Kind, culprits
from hunyuan_train.resilience.decisions import (
    Alarm,
    Begin,
    Facts,
    Resize,
    Stop,
    Wait,
    decide,
    failures_of,
    with_health,
)
from hunyuan_train.resilience.events import EventKind, Events
from hunyuan_train.resilience.health import Health, compare
from hunyuan_train.resilience.layouts import Job
from hunyuan_train.resilience.standby import Standby
from hunyuan_train.resilience.stop_signals import StopSignals
from hunyuan_train.resilience.stragglers import StragglerReport
from hunyuan_train.resilience.watchdog import POLL_S, Fault, Monitor, RankState, judge

TICK_S = 0.03
_SCAN_S = 0.1
_SCAN_PER_MEMBER_S = 0.02
"""Keeps the reads of all agents together below some thousand a second at 128 machines."""
_DUMP_AGAIN_S = 5.0

_VERDICT_S = 3.0
"""Wait, once asked to end, for the others to end and the leader to say that the job is over."""

_PATIENCE_S = 300.0
"""Wait for missing machines before the first attempt of a job that may also run on fewer."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """What to keep going."""

    cfg: LaunchConfig
    resilience: ResilienceConfig
    job: Job
    run_dir: Path
    argv: tuple[str, ...]
    """Arguments of Python for every rank; a plan's overrides are added."""
    preload: tuple[str, ...] = ()
    """Modules that ranks need, imported once."""
    preflight: Callable[[], Health] | None = None
    """Checks this machine."""
    out: TextIO = field(default_factory=lambda: sys.stderr)


class Supervisor:
    """One machine's part of a job."""

    def __init__(self, launch: Launch) -> None:
        """Prepare; :meth:`run` does the work."""
        self._launch, self._cfg = launch, launch.cfg
        self._events = Events(launch.run_dir)
        self._agent: Agent | None = None
        self._monitor: Monitor | None = None
        self._pace: StragglerReport | None = None
        self._done_attempt = -1  # the last one this node has reported
        self._told = ""
        self.planned: dict[int, Member] = {}
        """The members of the last attempt, by ticket in the order of their nodes."""
        self._ended = -1  # the last attempt whose end this leader has told
        self._begin_at: dict[int, float] = {}
        self._next_beat = self._next_scan = self._next_check = self._leave_at = 0.0
        self._next_dump = 0.0

    def run(self) -> int:
        """Take part until the job is over.

        Returns:
            0 done, 75 stopped by a signal after saving, 2 bad input, 1 given up.
        """
        launch = self._launch
        with StopSignals(launch.resilience.preemption_signals) as self._signals:
            self._standby = Standby(launch.preload)
            try:
                health = launch.preflight() if launch.preflight else Health()
                alone = self._cfg.nodes + self._cfg.spares == 1
                self._board = Board(
                    launch.run_dir,
                    lease_s=self._cfg.lease_s,
                    address=own_address(self._cfg.rendezvous, alone),
                    node_rank=self._cfg.node_rank,
                )
                self._board.me.health = health.to_dict()
                self._board.me.healthy, self._board.me.why = not health.complaints, health.text()
                self._since = time.monotonic()
                code = self._loop()
                self._board.beat(left=True)
            finally:
                self._standby.close()
        return code

    def _loop(self) -> int:
        while True:
            now = time.monotonic()
            if now >= self._next_beat:
                self._next_beat = now + self._cfg.lease_s / 10
                self._board.beat()
            if now >= self._next_scan:
                members = len(self._board.members)
                self._next_scan = now + max(_SCAN_S, _SCAN_PER_MEMBER_S * members)
                self._board.scan()
                self._board.rejoin()
                self._follow()
            self._watch(now)
            over = [stop for n, stop in self._board.stops.items() if n > self._board.joined]
            if over and self._agent is None:
                level = logging.INFO if over[-1]["code"] == 0 else logging.ERROR
                log.log(level, "%s", over[-1]["why"])
                return over[-1]["code"]
            if self._board.leads and not over:
                self._lead(now)
            if self._signals.count and self._agent is None and not over and self._may_leave(now):
                return EXIT_PREEMPTED
            time.sleep(TICK_S)

    @property
    def skew_s(self) -> dict[int, float]:
        """By how much this machine's clock is ahead of each member's."""
        return self._board.skew_s

    def _may_leave(self, now: float) -> bool:
        """Whether a machine that was asked to end need not wait for the verdict on the job."""
        last = self._last()
        self._leave_at = self._leave_at or now + _VERDICT_S
        spare = last is None or self._board.me.ticket not in last.plan.tickets
        return spare or now > self._leave_at

    # This machine's ranks.

    def _follow(self) -> None:
        """Start, ask or stop the ranks as the newest attempt wants it."""
        last = self._last()
        if last is not None and all(t in self._board.members for t in last.plan.tickets):
            self.planned = {t: self._board.members[t] for t in last.plan.tickets}
        if self._agent is not None:
            if last is None or last.plan.attempt != self._agent.order.attempt or last.alarm:
                self._kill_hung(last)
                self._agent.stop()
            elif last.resize or self._signals.count:
                self._agent.ask(self._ask_signal(), self._cfg.grace_s)
                if self._signals.count > 1:
                    self._agent.stop()
        elif last is not None and not self._signals.count:
            self._start(last)

    def _start(self, attempt: Attempt) -> None:
        """Start what is planned here, once rank 0's machine has said where it listens."""
        plan, board = attempt.plan, self._board
        if board.me.ticket not in plan.tickets or plan.attempt <= self._done_attempt:
            return
        node = plan.tickets.index(board.me.ticket)
        if attempt.alarm:
            self._report(node, attempt, None)
            return
        if node == 0 and attempt.meet is None:
            here = {"address": board.me.address, "port": free_port(plan.attempt)}
            board.put(f"meet-{plan.attempt}", here)
        if attempt.meet is None:
            return
        if not self._standby.alive:
            self._standby.close()
            self._standby = Standby(self._launch.preload)
        order = Order(
            attempt=plan.attempt,
            node=node,
            nodes=len(plan.tickets),
            ranks=self._cfg.ranks_per_node,
            interface="" if is_loopback(board.me.address) else interface_of(board.me.address),
            argv=(*self._launch.argv, *plan.overrides),
            **attempt.meet,
        )
        run_dir = self._launch.run_dir
        self._monitor = None
        if self._launch.resilience.watchdog_s:
            cfg = self._launch.resilience
            self._monitor = Monitor(run_dir, plan.attempt, order.global_ranks, cfg)
        self._agent = Agent(order, run_dir, self._standby, self._launch.out)

    def _watch(self, now: float) -> None:
        """Look after the ranks; tell the others of a failure, and how the attempt ended here."""
        agent = self._agent
        if agent is None:
            return
        attempt, node = agent.order.attempt, agent.order.node
        for failure in agent.poll():
            if failure.kind is Kind.peer:
                log.debug("%s", failure.sentence())
            else:
                self._tell_failure(attempt, failure)
        if agent.failed:
            cause = culprits(agent.failures)[0]
            first = self._board.put(f"alarm-{attempt}", {"node": node, "why": cause.sentence()})
            if first and cause.kind is Kind.peer:
                self._tell_failure(attempt, cause)
            agent.stop()
        elif self._monitor is not None and now >= self._next_check and not agent.ended:
            self._next_check = now + POLL_S
            self._check_progress(agent, self._monitor)
        if agent.ended:
            self._report(node, self._board.attempts.get(attempt), agent)
            self._agent = None

    def _tell_failure(self, attempt: int, failure: Failure) -> None:
        if failure.kind is not Kind.refused:  # that is told once, as the job's end
            log.warning("%s", failure.sentence())
        self._events.emit(
            EventKind.detected, attempt=attempt, rank=failure.rank, node=failure.node,
            fault=failure.kind, step=failure.step, sentence=failure.sentence(),
            since=failure.since,
        )  # fmt: skip

    def _report(self, node: int, attempt: Attempt | None, agent: Agent | None) -> None:
        number = attempt.plan.attempt if attempt is not None else -1
        self._done_attempt = max(self._done_attempt, number)
        if number < 0:
            return
        steps = [failure.step for failure in agent.failures] if agent else []
        report = Report(
            attempt=number,
            node=node,
            codes={str(rank): code for rank, code in (agent.codes if agent else {}).items()},
            failures=agent.failures if agent else [],
            seconds=time.monotonic() - agent.started_s if agent else 0.0,
            progress=[*newest_checkpoint(self._launch.run_dir), max(steps, default=-1)],
        )
        self._board.put(f"report-{number}-{node}", asdict(report))

    def _check_progress(self, agent: Agent, monitor: Monitor) -> None:
        """Kill what hangs; with several machines, tell the leader what is seen here."""
        if agent.order.nodes == 1:
            self._compare(agent.order.attempt, monitor.states)
            for verdict in monitor.check():
                if verdict.kind in (Fault.hung, Fault.stopped):
                    agent.kill(verdict.rank, verdict.sentence)
            return
        states = monitor.observe()
        unclear = any(s.overdue and s.process == "running" and not s.waits for s in states)
        if unclear and time.monotonic() > self._next_dump:
            monitor.dump()
            self._next_dump = time.monotonic() + _DUMP_AGAIN_S
            states = monitor.observe()
        self._board.me.states = [asdict(state) for state in states]
        self._board.me.attempt = agent.order.attempt
        self._next_beat = 0.0

    def _kill_hung(self, last: Attempt | None) -> None:
        if self._agent is not None and last is not None and last.alarm:
            for rank, sentence in last.alarm.get("hung", {}).items():
                self._agent.kill(int(rank), sentence)

    def _ask_signal(self) -> signal.Signals:
        names = self._launch.resilience.preemption_signals
        return signal.Signals[names[0]] if names else signal.SIGTERM

    def _last(self) -> Attempt | None:
        attempts = self._board.attempts
        return attempts[max(attempts)] if attempts else None

    # The job, where this supervisor leads.

    def _lead(self, now: float) -> None:
        """Do what the facts ask for."""
        board, last = self._board, self._last()
        facts = Facts(
            cfg=self._cfg,
            job=self._launch.job,
            attempts=[board.attempts[n] for n in sorted(board.attempts)],
            members=with_health(board.members, compare(board.members)),
            next_attempt=board.next_attempt,
            patient=now - self._since < _PATIENCE_S,
        )
        decision = decide(facts)
        if isinstance(decision, Wait):
            if decision.why and decision.why != self._told:
                log.info("%s", decision.why)
            self._told = decision.why
            if last is not None and last.alarm is None:
                self._judge(last)
        elif isinstance(decision, Alarm):
            assert last is not None, "only a running attempt can be alarmed"
            for ticket in decision.tickets:
                board.give_up(ticket)
            self._alarm(last, {"why": decision.why})
        elif isinstance(decision, Resize):
            assert last is not None, "only a running attempt can grow"
            if board.put(f"resize-{last.plan.attempt}", {}):
                log.info("more machines are here: the ranks save and start again on them")
        elif isinstance(decision, Stop):
            self._tell_end(last)
            if board.put(f"stop-{board.next_attempt - 1 if last else board.next_attempt}",
                         {"code": decision.code, "why": decision.why}):  # fmt: skip
                self._events.emit(
                    EventKind.stop, attempt=last.plan.attempt if last else -1, why=decision.why,
                    code=decision.code,
                )  # fmt: skip
        else:
            self._begin(decision, last, now)

    def _begin(self, decision: Begin, last: Attempt | None, now: float) -> None:
        """Write the next plan once its delay is over, and tell what is new about it."""
        plan, board = decision.plan, self._board
        if self._signals.count:
            return
        if plan.attempt not in self._begin_at:
            self._tell_end(last)
            if decision.delay_s:
                log.info("the next attempt starts in %.1f s", decision.delay_s)
        if now < self._begin_at.setdefault(plan.attempt, now + decision.delay_s):
            return
        if not board.put(f"plan-{plan.attempt}", asdict(plan)):
            return
        for kind, fields in decision.events:
            log.warning("%s: %s", kind, ", ".join(f"{k} {v}" for k, v in fields.items()))
            self._events.emit(kind, **{"attempt": plan.attempt, **fields})
        ranks = len(plan.tickets) * self._cfg.ranks_per_node
        layout = f" with {' '.join(plan.overrides)}" if plan.overrides else ""
        log.info("attempt %d: %d ranks on %s%s", plan.attempt, ranks, " ".join(plan.hosts), layout)
        self._events.emit(
            EventKind.attempt_start, attempt=plan.attempt, nodes=len(plan.tickets), ranks=ranks,
            hosts=plan.hosts, layout=plan.overrides,
        )  # fmt: skip

    def _judge(self, last: Attempt) -> None:
        """Compare the ranks of all machines, where there are several."""
        told = [m for m in self._board.members.values() if m.attempt == last.plan.attempt]
        states = [RankState.received(state) for member in told for state in member.states]
        if len(told) == len(last.plan.tickets):
            self._compare(last.plan.attempt, states)
        faults = [v for v in judge(states) if v.kind in (Fault.hung, Fault.stopped)]
        if faults and len(told) == len(last.plan.tickets):
            hung = {str(verdict.rank): verdict.sentence for verdict in faults}
            self._alarm(last, {"why": faults[0].sentence, "hung": hung})

    def _compare(self, attempt: int, states: list[RankState]) -> None:
        """Tell of slow ranks, and how to go on without a machine that stays slow."""
        if self._pace is None or self._pace.attempt != attempt:
            self._pace = StragglerReport(self._launch.resilience, self._events, attempt)
        for slow in self._pace.follow(states):
            last = self._board.attempts.get(attempt)
            if last is not None and len(last.plan.tickets) > 1:
                member = self.planned[last.plan.tickets[slow.node]]
                log.warning(
                    "node %d stays slow; to go on without it run `kill -9 %d` on %s: its launcher "
                    "ends, and a spare takes its place or the job shrinks, as after any loss",
                    slow.node, member.pid, member.host,
                )  # fmt: skip

    def _alarm(self, last: Attempt, content: dict[str, Any]) -> None:
        if self._board.put(f"alarm-{last.plan.attempt}", content):
            log.warning("%s", content["why"])
            fields = {"fault": "hung" if "hung" in content else "lost", "sentence": content["why"]}
            self._events.emit(EventKind.detected, attempt=last.plan.attempt, **fields)

    def _tell_end(self, last: Attempt | None) -> None:
        if last is None or last.plan.attempt <= self._ended:
            return
        self._ended = last.plan.attempt
        codes = {rank: c for report in last.reports.values() for rank, c in report.codes.items()}
        self._events.emit(
            EventKind.attempt_end,
            attempt=last.plan.attempt,
            exit_codes=codes,
            failures=[failure.sentence() for failure in failures_of(last)],
        )
