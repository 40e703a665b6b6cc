"""Going back to before a refused update, inside the running processes, without its samples."""

from dataclasses import dataclass
from typing import Any

from hunyuan_train.engine.build import Restored, TrainRun, restore, start_fresh
from hunyuan_train.resilience.guard import Judgement
from hunyuan_train.runtime.dist import gather_objects

_SHOWN = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Rewound:
    """What a rewind did."""

    restored: Restored
    """The state the run goes on from."""
    samples: list[str]
    """What is not drawn any more, of all ranks."""


def rewind(run: TrainRun, judged: Judgement) -> Rewound:
    """Take the newest state older than the refused update, and never draw its samples again.

    All ranks call it in the same step; nothing may be on its way to the disk. That the samples are
    excluded is kept with the next state that is saved. Until then nothing is lost if the run dies:
    it meets the same update again, and comes back here.

    Raises:
        ValueError: too much would be excluded.
    """
    state = run.state
    samples = sorted(set[str]().union(*gather_objects(judged.samples)))
    state.loader.exclude(samples, f"{judged.reason} at step {judged.step}")
    run.checkpoints.go_back(judged.step)
    found = restore(run, before=judged.step)
    if found is None:
        start_fresh(run)
        found = Restored(source="the beginning", step=0, seconds=0.0)
    return Rewound(restored=found, samples=samples)


def guard_event(judged: Judgement, done: Rewound | None) -> dict[str, Any]:
    """Return the fields of the event about a refused update; without a rewind, as rank 0 saw it."""
    samples = list(judged.samples) if done is None else done.samples
    event: dict[str, Any] = {
        "action": judged.outcome.value,
        "step": judged.step,
        "loss": judged.loss,
        "norm": judged.norm,
        "samples": samples[:_SHOWN],
        "num_samples": len(samples),
        "detail": judged.sentence,
    }
    if done is not None:
        found = done.restored
        event |= {"source": found.source, "restored_step": found.step, "seconds": found.seconds}
    return event
