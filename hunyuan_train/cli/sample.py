"""``hunyuan-train sample``: videos from a run's weights and prompts."""

from collections.abc import Sequence
from pathlib import Path

from hunyuan_train.cli.launching import joined_world, run_folder
from hunyuan_train.config.compose import load_config
from hunyuan_train.engine.sampling import newest_weights, sample_run


def main(argv: Sequence[str]) -> int:
    """Sample from the newest weights of the run in ``run.dir``, with that run's own config."""
    run = newest_weights(Path(run_folder(argv)))
    cfg = load_config(run.config, argv)
    with joined_world(cfg) as world:
        folder = sample_run(cfg, run.checkpoint, world)
        if world.rank == 0:
            print(folder)
    return 0
