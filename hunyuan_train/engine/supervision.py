"""What watches over a running stage: heartbeat, guard, replay after a restore, saves, events."""

import logging
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

import torch

from hunyuan_train.checkpoint.manager import SaveOutcome
from hunyuan_train.checkpoint.replay import ReplayToken, samples_digest, samples_text
from hunyuan_train.data.collate import Batch
from hunyuan_train.engine.build import TrainRun
from hunyuan_train.engine.certify import describe_layout
from hunyuan_train.engine.step import StepMetrics
from hunyuan_train.resilience.events import EventKind, Events
from hunyuan_train.resilience.guard import Outcome as Verdict
from hunyuan_train.resilience.heartbeat import Heartbeat

log = logging.getLogger(__name__)


class Supervision:
    """Follows the steps of one stage on one rank; every rank makes the same calls."""

    def __init__(self, run: TrainRun, heart: Heartbeat) -> None:
        """Start watching.

        Args:
            run: The run, restored.
            heart: Where this rank says what it does.
        """
        self.heart = heart
        self._run = run
        self._events = Events(run.cfg.run.dir, rank=run.world.rank)
        self._first = run.world.rank == 0
        self._started = time.perf_counter()

    def __enter__(self) -> Self:
        """Prepare the background writer of checkpoints."""
        self._run.checkpoints.start(self._run.state.tensors())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Finish what is being saved, unless the run failed: then another rank may be gone."""
        if error is None:
            with self.heart.phase("save"):
                self._report(self._run.checkpoints.finish())
        self._run.checkpoints.close()

    def begin(self) -> None:
        """Mark the begin of an update: it waits for its data first."""
        self._started = time.perf_counter()
        self.heart.phase("data")

    def end(self, metrics: StepMetrics, batches: Sequence[Batch]) -> None:
        """Take the numbers of an update: compare a replayed one, judge the one before.

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
        if judged.outcome is not Verdict.ok:
            self._refused(judged.outcome, judged.sentence)
        self._report(run.checkpoints.poll())
        self.heart.beat(state.step, time.perf_counter() - self._started)

    def save(self) -> None:
        """Save a checkpoint of the present state."""
        run, state = self._run, self._run.state
        with self.heart.phase("save"):
            run.checkpoints.save(state.step, state.tensors(), state.counters())
        self._report(run.checkpoints.poll())

    def _refused(self, outcome: Verdict, sentence: str) -> None:
        if self._first:
            log.warning("%s: %s", outcome.value, sentence)
            self._events.emit(EventKind.guard, action=outcome.value, detail=sentence)
        if outcome is Verdict.stop:
            raise ValueError(
                f"{sentence}; look at these samples and at the learning rate, or set "
                "resilience.guard=skip and raise resilience.max_skipped"
            )

    def _report(self, outcomes: Sequence[SaveOutcome]) -> None:
        for outcome in outcomes if self._first else ():
            self._events.emit(
                EventKind.save,
                step=outcome.step,
                failure=outcome.failure,
                stall_s=outcome.stall_s,
                seconds=outcome.seconds,
            )

    def _token(self, metrics: StepMetrics, batches: Sequence[Batch]) -> ReplayToken:
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
            layout=f"{describe_layout(run.cfg, run.world.size)} on {run.world.size} ranks",
            versions=f"{device} torch {torch.__version__}",
            exact=device == "cpu" or torch.are_deterministic_algorithms_enabled(),
        )
