"""What every verb does first: compose the config, join the world, set up logging."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from hunyuan_train.config.compose import compose_config, config_text
from hunyuan_train.config.root import RunConfig
from hunyuan_train.observability.logging import setup_logging
from hunyuan_train.resilience.heartbeat import Heartbeat
from hunyuan_train.runtime.dist import World, close_world, init_world
from hunyuan_train.runtime.env import read_attempt, read_job_folder, read_launch_env, read_node

SHOW = "--show"


def composed(argv: Sequence[str]) -> RunConfig | None:
    """Compose the config from overrides; with ``--show`` print it and return ``None``."""
    cfg = compose_config([argument for argument in argv if argument != SHOW])
    if SHOW in argv:
        print(config_text(cfg), end="")
        return None
    return cfg


@contextmanager
def joined_world(cfg: RunConfig) -> Iterator[World]:
    """Join the other processes of the run for the body of a ``with`` statement."""
    if cfg.run.threads:
        torch.set_num_threads(cfg.run.threads)
    if folder := read_job_folder():
        heart = Heartbeat(folder, read_attempt(), read_launch_env().rank, node=read_node())
        heart.phase("collective")  # whoever has not come this far is behind
    world = init_world(cfg.run.device, cfg.parallel.timeout_s)
    setup_logging(cfg.logging, world.rank, world.size)
    try:
        yield world
    finally:
        close_world()


def run_folder(argv: Sequence[str]) -> str:
    """Return the ``run.dir`` among the overrides of a verb that needs an existing run.

    Raises:
        ValueError: if it is not there.
    """
    for argument in argv:
        if argument.startswith("run.dir="):
            return argument.removeprefix("run.dir=")
    raise ValueError("which run? give run.dir=FOLDER")
