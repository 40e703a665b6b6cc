"""What a run measures and shows of itself between two updates, on the layout it trains on.

Everything here happens in the phase ``evaluate`` of the heartbeat and is not training time. No
draw, weight or counter of training depends on it, save for the list of held-out losses that may end
a stage.
"""

import logging
import math
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

from hunyuan_train.config.run import Trains
from hunyuan_train.engine.build import TrainRun
from hunyuan_train.engine.evaluation_notes import EvaluationNotes
from hunyuan_train.engine.held_out import HeldOut, averaged
from hunyuan_train.engine.meter import StepMeter
from hunyuan_train.engine.supervision import Supervision
from hunyuan_train.evaluation.loss import FILE_NAME
from hunyuan_train.observability.background import Background
from hunyuan_train.observability.trackers import JsonlTracker
from hunyuan_train.resilience.clock import STEP
from hunyuan_train.runtime.device import synchronize
from hunyuan_train.runtime.dist import gather_objects

if TYPE_CHECKING:
    from hunyuan_train.engine.showing import Showing
    from hunyuan_train.engine.vae_held_out import Comparisons, HeldOutClips

log = logging.getLogger(__name__)

LOSS, SAMPLES = "held-out losses", "samples"
EMA = "ema/"
"""Before the names of what was measured with averaged weights."""


def open_held_out(run: TrainRun) -> "HeldOut | HeldOutClips":
    """Return what measures a run's model on held-out data."""
    if run.cfg.stage.trains is not Trains.vae:
        return HeldOut(run)
    from hunyuan_train.engine.vae_held_out import HeldOutClips

    return HeldOutClips(run)


def open_showing(run: TrainRun) -> "Showing | Comparisons":
    """Return what makes a run's samples."""
    # Imported here because writing pictures and videos takes packages that training, which is
    # started again and again, does without.
    if run.cfg.stage.trains is Trains.vae:
        from hunyuan_train.engine.vae_held_out import Comparisons

        return Comparisons(run)
    from hunyuan_train.engine.showing import Showing

    return Showing(run)


class Evaluation:
    """The held-out loss and the samples of one stage; every rank makes the same calls."""

    def __init__(self, run: TrainRun) -> None:
        """Open what is needed; nothing at all where both are off.

        Raises:
            ValueError: held-out latents, prompts, VAE or text encoder are missing or do not fit.
        """
        self._run, self._cfg = run, run.cfg.evaluation
        on = bool(self._cfg.every_steps or self._cfg.sample_every)
        self._notes = EvaluationNotes(run.folder) if on and run.world.rank == 0 else None
        self._held_out = open_held_out(run) if self._cfg.every_steps else None
        self._showing = open_showing(run) if self._cfg.sample_every else None
        self._background = Background(self._cfg.max_pending)

    def __enter__(self) -> Self:
        """Do nothing: the thread starts with its first work."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Finish what is being written; not after an error, which other ranks wait to see."""
        if error is None:
            self._background.close()

    def run(self, meter: StepMeter, watch: Supervision) -> None:
        """Measure and show what is due after the present update, unless that is done already.

        The loop calls it before its first update, too: a state that was copied between an update
        and its evaluation goes on here.
        """
        if self._held_out is not None and self._due(self._cfg.every_steps):
            self._part(LOSS, meter, watch)
        if self._showing is not None and self._due(self._cfg.sample_every):
            self._part(SAMPLES, meter, watch)

    def _due(self, every: int) -> bool:
        state = self._run.state
        ends = state.end(self._run.cfg) is not None
        return state.step > 0 and (state.step % every == 0 or ends)

    def _part(self, part: str, meter: StepMeter, watch: Supervision) -> None:
        """Evaluate one part, noted on disk and outside the time of training."""
        run, step = self._run, self._run.state.step
        synchronize(run.world.device)
        watch.clock.lap(STEP)
        started = time.perf_counter()
        if not self._agreed(part, step):
            return
        with watch.heart.phase("evaluate"):
            if part == LOSS:
                self._measure(meter, watch, started)
            else:
                self._show(meter, watch)
            synchronize(run.world.device)
            if self._notes is not None:
                self._notes.finish(part)
        meter.leave_out(time.perf_counter() - started)
        watch.clock.lap("evaluate")

    def _agreed(self, part: str, step: int) -> bool:
        """Return whether to do it, as the first rank says; it is noted before any rank begins."""
        wanted = False
        if self._notes is not None:
            wanted = self._notes.allows(part, step) and not self._done(part, step)
            if wanted:
                self._notes.begin(part, step)
        return gather_objects(wanted)[0]

    def _done(self, part: str, step: int) -> bool:
        if part == LOSS:
            return any(number == step for number, _ in self._run.state.evaluations)
        return self._showing is not None and self._showing.shown(step)

    def _measure(self, meter: StepMeter, watch: Supervision, started: float) -> None:
        run, state = self._run, self._run.state
        assert self._held_out is not None

        def mark(bucket: str) -> None:
            watch.heart.phase("evaluate", bucket)

        table = self._held_out.measure(state, mark)
        row, loss = table.row(), table.mean
        if state.ema.state_dict():
            with averaged(state):
                table = self._held_out.measure(state, mark)
            row |= table.row(EMA)
            loss = table.mean
        if not math.isnan(loss):
            state.evaluations.append((state.step, loss))
        if run.world.rank:
            return
        row["seconds"] = time.perf_counter() - started
        # Opened anew: rows of this step and later ones, of a run that went back, are dropped.
        file = JsonlTracker(run.folder / FILE_NAME, state.step - 1)
        file.log(state.step, row)
        file.close()
        meter.show(state.step, {f"evaluation/{name}": value for name, value in row.items()})
        log.info(
            "held-out loss after step %d: %.4f%s, in %.1f s",
            *(state.step, row.get("loss", math.nan)),
            f", averaged weights {row['ema/loss']:.4f}" if "ema/loss" in row else "",
            row["seconds"],
        )

    def _show(self, meter: StepMeter, watch: Supervision) -> None:
        assert self._showing is not None
        step = self._run.state.step

        def mark() -> None:
            watch.heart.phase("evaluate", "sampling")

        work = self._showing.sample(step, mark, meter)
        self._background.submit(f"samples of step {step}", work)
        meter.show(step, {"evaluation/dropped_samples": self._background.dropped})
