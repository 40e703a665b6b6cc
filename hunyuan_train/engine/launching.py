"""From a config to a job that is kept going. Free of torch."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from hunyuan_train.config.root import RunConfig
from hunyuan_train.resilience.config import ResilienceConfig
from hunyuan_train.resilience.health import Health, preflight
from hunyuan_train.resilience.layouts import Job, heads_fit, parse
from hunyuan_train.resilience.supervisor import Launch, Supervisor

WATCHED = ("train", "curriculum")
"""Verbs whose ranks write heartbeats in lockstep; a watchdog would take the others for hung."""

PRELOAD = (
    "hunyuan_train.cli.train", "hunyuan_train.engine.curriculum", "hunyuan_train.data.table",
    "torch.utils.tensorboard",
)  # fmt: skip
"""What those verbs import late; without it every rank would at every restart."""

OWN_SECTION = "launch."
"""Fields for the launcher alone. They may differ between machines, so ranks do not get them."""


def launch_verb(
    verb: str, arguments: Sequence[str], cfg: RunConfig, job_folder: Path | None = None
) -> int:
    """Run a verb on the ranks that ``cfg.launch`` asks for until it ends; return its exit code.

    Args:
        verb: Of ``hunyuan-train``.
        arguments: Its options and overrides.
        cfg: What they compose to.
        job_folder: Where the machines of the job meet and say what happens; ``run.dir`` by default.

    Raises:
        ValueError: a layout in ``launch.layouts`` that this model cannot take, or an address that
            does not exist.
    """
    kept = [argument for argument in arguments if not argument.startswith(OWN_SECTION)]
    late = PRELOAD if verb in WATCHED else ()
    run_dir = job_folder or Path(cfg.run.dir)
    return Supervisor(
        Launch(
            cfg=cfg.launch,
            resilience=watched(verb, cfg.resilience),
            job=job_of(cfg),
            run_dir=run_dir,
            argv=("-m", "hunyuan_train", verb, *kept),
            preload=(f"hunyuan_train.cli.{verb.replace('-', '_')}", *late),
            preflight=partial(check_machine, cfg) if cfg.launch.preflight else None,
        )
    ).run()


def watched(verb: str, cfg: ResilienceConfig) -> ResilienceConfig:
    """Return ``cfg``, without a watchdog for a verb that it cannot watch."""
    return cfg if verb in WATCHED else replace(cfg, watchdog_s=0)


def check_machine(cfg: RunConfig) -> Health:
    """Check this machine for its part of the run."""
    return preflight(Path(cfg.run.dir), cfg.launch.ranks_per_node, cfg.run.device)


def job_of(cfg: RunConfig) -> Job:
    """Return what a choice of layout needs to know, and check the layouts that are allowed.

    Raises:
        ValueError: naming the layout and what is wrong with it.
    """
    job = Job(
        parallel=cfg.parallel,
        world_size=cfg.launch.nodes * cfg.launch.ranks_per_node,
        planned_ranks=cfg.data.planned_ranks,
        num_heads=cfg.model.num_heads,
    )
    for text in cfg.launch.layouts:
        layout = parse(text, cfg.parallel)
        if not heads_fit(job, layout):
            raise ValueError(
                f"launch.layouts has {text!r}: tp * cp_ulysses = {layout.tp * layout.cp_ulysses} "
                f"does not divide model.num_heads={cfg.model.num_heads}; remove it"
            )
    return job
