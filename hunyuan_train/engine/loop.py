"""The training loop of one stage, on one screen."""

import enum
import logging
import time
from pathlib import Path

from hunyuan_train.config.compose import (
    CONFIG_NAME,
    config_difference,
    load_config,
    save_config,
)
from hunyuan_train.config.root import RunConfig
from hunyuan_train.config.run import Trains
from hunyuan_train.engine.build import TrainRun, build_run
from hunyuan_train.engine.certify import certify_start
from hunyuan_train.engine.evaluating import Evaluation
from hunyuan_train.engine.meter import StepMeter
from hunyuan_train.engine.step import train_step
from hunyuan_train.engine.supervision import Supervision, job_folder, open_clock
from hunyuan_train.engine.vae_export import export_vae
from hunyuan_train.resilience.heartbeat import Heartbeat
from hunyuan_train.resilience.preemption import Preemption
from hunyuan_train.runtime.dist import World, barrier
from hunyuan_train.runtime.env import read_attempt, read_node

log = logging.getLogger(__name__)

FREE_TO_CHANGE = (
    "run.device",
    "run.threads",
    "run.accept_changes",
    "logging.",
    "checkpoint.",
    "resilience.",
    "sample.",
    "evaluation.",
    "certify.",
    "cluster.",
    "curriculum.",
    "demo.",
    "launch.",
    *(
        f"memory.{field}"
        for field in (
            "recompute", "offload", "check_fit", "optimizer_device", "fused_backward",
        )
    ),
    *(
        f"data.{field}"
        for field in (
            "workers", "worker_timeout_s", "prefetch_gib", "retries", "local_cache", "verify",
            "max_bad_share", "service.",
        )
    ),
    *(
        f"parallel.{field}"
        for field in (
            "tp", "sp", "cp_ring", "cp_ulysses", "dp_replicate", "zero_stage", "zero_engine",
            "tensor_engine", "offload_optimizer", "reduce_every", "timeout_s",
        )
    ),
)  # fmt: skip
"""Fields a resumed run may change: they do not touch the numbers it computes, save for rounding."""
_SHOWN = ("sample_every", "prompts", "max_pending")
"""Fields of `evaluation` that decide about samples alone."""


def free_to_change(cfg: RunConfig) -> tuple[str, ...]:
    """Return what a resumed run may change, as starts of dotted fields.

    Where the held-out loss ends the stage (`stage.plateau`), how it is measured is not among them.
    """
    if not cfg.stage.plateau:
        return FREE_TO_CHANGE
    shown = tuple(f"evaluation.{name}" for name in _SHOWN)
    return (*(field for field in FREE_TO_CHANGE if field != "evaluation."), *shown)


class Outcome(enum.Enum):
    """How a stage ended."""

    DONE = "done"
    PREEMPTED = "preempted"


def train(cfg: RunConfig, world: World, preemption: Preemption) -> Outcome:
    """Train one stage to its end, from wherever the run's folder says it stopped.

    Raises:
        ValueError: for a config, data or checkpoint the run cannot go on with.
    """
    with Heartbeat(job_folder(cfg), read_attempt(), world.rank, node=read_node()) as heart:
        clock = open_clock(cfg, world)
        certify_start(cfg, world)
        clock.lap("certify")
        claim_folder(cfg, world)
        run = build_run(cfg, world)
        evaluation = Evaluation(run)
        clock.lap("build")
        log.info("%s", run.state.loader.describe())
        with StepMeter(run) as meter, Supervision(run, heart, clock) as watch, evaluation:
            try:
                outcome = run_steps(run, meter, watch, evaluation, preemption)
            finally:
                run.state.loader.end()
            if outcome is Outcome.DONE and cfg.stage.trains is Trains.vae:
                with watch.heart.phase("save"):
                    export_vae(run)
            return outcome


def run_steps(
    run: TrainRun,
    meter: StepMeter,
    watch: Supervision,
    evaluation: Evaluation,
    preemption: Preemption,
) -> Outcome:
    """Update until the stage is done or a signal asks to stop, saving on the way."""
    cfg, state = run.cfg, run.state
    evaluation.run(meter, watch)
    end = state.end(cfg)
    while end is None:
        watch.begin()
        started = time.perf_counter()
        batches = state.loader.next_step()
        waited_s = time.perf_counter() - started
        metrics = train_step(state, batches, cfg, run.world, run.scaling_factor, watch.heart)
        meter.add(metrics, waited_s)
        if watch.end(metrics, batches, waited_s):
            meter.go_back()
            continue
        if cfg.logging.due(state.step):
            meter.emit(watch.clock)
        stop = preemption.requested()
        if not stop:  # else there is no time, and the next start does it
            evaluation.run(meter, watch)
        end = state.end(cfg)
        if end:
            meter.emit(watch.clock)
        keep = stop or end or run.checkpoints.due(state.step)
        if keep and watch.save():
            meter.go_back()
            end = None
            continue
        if stop and end is None:
            log.warning("%s: stopped at step %d, saved", preemption.reason, state.step)
            return Outcome.PREEMPTED
    state.loader.close()
    log.info("stage %s is done after %d updates, by its %s", cfg.stage.name, state.step, end)
    return Outcome.DONE


def claim_folder(cfg: RunConfig, world: World) -> None:
    """Write the run's config on the first start; on a restart, refuse a config that differs.

    Where ``data.planned_ranks`` is 0 it becomes that of the first start, so that updates hold the
    same samples on any ranks, and ``stage.micro_steps`` need not change with their number.

    Raises:
        ValueError: listing each field that differs, unless ``run.accept_changes`` is set.
    """
    path = Path(cfg.run.dir) / CONFIG_NAME
    then = load_config(path) if path.is_file() else None
    if not cfg.data.planned_ranks:
        ranks = world.size // (cfg.parallel.tp * cfg.parallel.cp)
        cfg.data.planned_ranks = then.data.planned_ranks if then else ranks
    if then is not None:
        free = free_to_change(cfg)
        changes = [line for line in config_difference(then, cfg) if not line.startswith(free)]
        if changes and not cfg.run.accept_changes:
            raise ValueError(
                f"{path} is the config of another run:\n  "
                + "\n  ".join(changes)
                + "\nuse a new run.dir, or run.accept_changes=true to go on with these changes"
            )
    barrier()
    if world.rank == 0:
        save_config(cfg, path)
    barrier()
