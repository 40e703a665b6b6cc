"""What watches over a running stage: heartbeat, guard, replay after a restore, saves, events."""

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from hunyuan_train.checkpoint.manager import SaveOutcome
from hunyuan_train.checkpoint.replay import ReplayToken, samples_digest, samples_text
from hunyuan_train.config.root import RunConfig
from hunyuan_train.data.collate import MicroBatch
from hunyuan_train.engine.build import TrainRun
from hunyuan_train.engine.certify import describe_layout
from hunyuan_train.engine.own_work import OwnWork
from hunyuan_train.engine.rewind import guard_event, rewind
from hunyuan_train.engine.step import StepMetrics
from hunyuan_train.resilience.clock import DATA, OTHER, REFUSED, STEP, Clock
from hunyuan_train.resilience.drill import drilled
from hunyuan_train.resilience.events import EventKind, Events
from hunyuan_train.resilience.guard import Judgement
from hunyuan_train.resilience.guard import Outcome as Verdict
from hunyuan_train.resilience.heartbeat import Heartbeat
from hunyuan_train.runtime.dist import World
from hunyuan_train.runtime.env import read_job_folder

log = logging.getLogger(__name__)


class SilentCorruptionError(RuntimeError):
    """This rank's state is not what the other ranks computed from the same numbers."""


class Supervision:
    """Follows the steps of one stage on one rank; every rank makes the same calls."""

    def __init__(self, run: TrainRun, heart: Heartbeat, clock: Clock) -> None:
        """Start watching.

        Args:
            run: The run, restored.
            heart: Where this rank says what it does.
            clock: Where it says what its time went into.
        """
        self.heart = drilled(heart, run)
        self.clock = clock
        self._run = run
        self._events = Events(job_folder(run.cfg), rank=run.world.rank)
        self._first = run.world.rank == 0
        self._own = OwnWork(run.cfg, run.world.device, run.state.task)
        self._compared = -1
        self._started = time.perf_counter()

    def __enter__(self) -> Self:
        """Prepare the background writer of checkpoints; say where the state came from."""
        run = self._run
        run.checkpoints.start(run.state.tensors())
        if run.restored is not None and self._first:
            found = run.restored
            log.info("step %d restored from %s in %.1f s", found.step, found.source, found.seconds)
            self._events.emit(
                EventKind.restore, source=found.source, step=found.step, seconds=found.seconds
            )
        self.heart.resume(run.state.step)
        self.clock.ready(run.state.step, run.restored.seconds if run.restored else 0.0)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Finish what is being saved, unless the run failed: then another rank may be gone."""
        run = self._run
        if error is None:
            with self.heart.phase("save"):
                self._report(run.checkpoints.finish())
                if run.state.end(run.cfg):
                    run.snapshots.remove()
                else:
                    run.snapshots.finish()
                self.clock.lap("save")
        self.clock.leave(error)
        run.snapshots.close()
        # A rank that fails alone must show it at once. Bad input is met by all, and ends the job.
        run.checkpoints.close(abandon=error is not None and not isinstance(error, ValueError))

    def begin(self) -> None:
        """Mark the begin of an update: it waits for its data first."""
        self._own.begin()
        self.clock.lap(OTHER)
        self._started = time.perf_counter()
        self.heart.phase("data")

    def end(self, metrics: StepMetrics, batches: Sequence[MicroBatch], waited_s: float) -> bool:
        """Take the numbers of an update: compare a replayed one, judge the one before.

        Args:
            metrics: Of the update.
            batches: What it was computed from.
            waited_s: Seconds it waited for them.

        Returns:
            Whether the run went back to before a refused update.

        Raises:
            ValueError: the first update after a restore differs from the one the checkpoint keeps;
                or updates were refused and ``resilience.guard`` asks to stop.
        """
        run, state = self._run, self._run.state
        if run.checkpoints.replay_due(state.step):
            token = self._token(metrics, batches)
            run.checkpoints.check_replay(token)
            run.checkpoints.record_replay(state.step - 1, token)
        ids = [name for batch in batches if batch.weight for name in batch.sample_ids]
        judged = state.guard.check(state.step, metrics.loss, metrics.grad_norm, ids, metrics.kind)
        if judged.outcome is Verdict.ok and run.snapshots.due(state.step):
            judged = state.guard.settle()
        self.clock.lap(STEP)  # with the replay and the guard, which wait for the device
        self.clock.move(STEP, DATA, waited_s)
        if judged.outcome is not Verdict.ok:
            self.clock.move(STEP, REFUSED, time.perf_counter() - self._started)
            if self._refused(judged):
                return True
        self._report(run.checkpoints.poll())
        self.clock.lap("save")
        if run.replicas.due(state.step):
            self._compare()
        if run.snapshots.due(state.step):
            run.snapshots.take(state.step, state.tensors(), state.counters())
            self.clock.lap("snapshot")
        busy_s, cost = self._own.measure(batches)
        self.heart.beat(state.step, time.perf_counter() - self._started, busy_s=busy_s, cost=cost)
        self.clock.done(state.step)
        return False

    def save(self) -> bool:
        """Save a checkpoint of the present state, compared with the other ranks if that is asked.

        Returns:
            Whether the run went back instead, because the last update is refused.

        Raises:
            SilentCorruptionError: this rank's state differs from that of the others.
            ConnectionError: another rank's does.
        """
        run, state = self._run, self._run.state
        self.clock.lap(OTHER)
        judged = state.guard.settle()
        self.clock.lap(STEP)
        if judged.outcome is not Verdict.ok and self._refused(judged):
            return True
        if run.cfg.resilience.replica_every:
            self._compare()
        with self.heart.phase("save"):
            run.checkpoints.save(state.step, state.tensors(), state.counters())
        self._report(run.checkpoints.poll())
        self.clock.lap("save")
        self.clock.done(state.step, tell=True)
        return False

    def _compare(self) -> None:
        """Raise if the ranks disagree: on those to blame as their own failure, else as a peer's."""
        run, step = self._run, self._run.state.step
        if self._compared == step:
            return
        self._compared = step
        with self.heart.phase("evaluate"):
            verdict = run.replicas.check(step, run.state.tensors())
        self.clock.lap("evaluate")
        if verdict is None:
            return
        if self._first:
            self._events.emit(
                EventKind.detected, fault="corruption", step=step, ranks=list(verdict.ranks),
                sentence=verdict.sentence,
            )  # fmt: skip
        cfg = run.cfg.resilience
        if not cfg.replica_every or cfg.snapshot_every % cfg.replica_every:
            run.snapshots.remove()  # they may hold what is wrong; what is on disk was compared
        if run.world.rank in verdict.ranks:
            raise SilentCorruptionError(verdict.sentence)
        raise ConnectionError(f"{verdict.sentence}; this rank ends for it")

    def _refused(self, judged: Judgement) -> bool:
        """Do what the guard asks about an update, say so, and return whether the run went back."""
        done = None
        if judged.outcome is Verdict.rewind:
            with self.heart.phase("start"):
                self._report(self._run.checkpoints.finish())
                done = rewind(self._run, judged)
            self._compared = -1
            self.clock.lap("rewind")
            self.clock.rewound(done.restored.step)
        if self._first:
            where = f"; back to step {done.restored.step}, {done.restored.source}" if done else ""
            log.warning("%s: %s%s", judged.outcome.value, judged.sentence, where)
            self._events.emit(EventKind.guard, **guard_event(judged, done))
        if judged.outcome is Verdict.stop:
            raise ValueError(
                f"{judged.sentence}; look at these samples and at the learning rate, or set "
                "resilience.guard=skip and raise resilience.max_skipped"
            )
        return done is not None

    def _report(self, outcomes: Sequence[SaveOutcome]) -> None:
        for outcome in outcomes if self._first else ():
            self._events.emit(
                EventKind.save,
                step=outcome.step,
                failure=outcome.failure,
                stall_s=outcome.stall_s,
                seconds=outcome.seconds,
            )

    def _token(self, metrics: StepMetrics, batches: Sequence[MicroBatch]) -> ReplayToken:
        run = self._run
        drawn = [
            pair
            for batch in batches
            if batch.weight
            for pair in zip(batch.sample_ids, batch.epochs, strict=True)
        ]
        total = torch.tensor([samples_digest(drawn), len(drawn)], dtype=torch.int64)
        digest, count = run.state.model.axes.sum(total.to(run.world.device), "dp").tolist()
        device = run.world.device.type
        return ReplayToken(
            samples=samples_text(digest),
            num_samples=count,
            loss=metrics.loss.item(),
            grad_norm=metrics.grad_norm.item(),
            dealing=f"{run.state.model.axes.size('dp')} ranks, {len(batches)} micro-batches each",
            layout=f"{describe_layout(run.cfg, run.world.size)} on {run.world.size} ranks",
            versions=f"{device} torch {torch.__version__}",
            exact=device == "cpu" or torch.are_deterministic_algorithms_enabled(),
        )


def job_folder(cfg: RunConfig) -> str:
    """Return where heartbeats and events go: the launcher's ``run.dir``, of a stage its parent."""
    return read_job_folder() or cfg.run.dir


def open_clock(cfg: RunConfig, world: World) -> Clock:
    """Return the clock of a stage; a curriculum's stages are told apart by their folders."""
    job = Path(job_folder(cfg)).resolve()
    folder = Path(cfg.run.dir).resolve()
    stage = str(folder.relative_to(job)) if folder.is_relative_to(job) else str(folder)
    return Clock(job, "" if stage == "." else stage, world.rank)
