"""``hunyuan-train precompute``: clips and captions in, latents and text features out."""

from collections.abc import Sequence

from hunyuan_train.cli.launching import composed, joined_world
from hunyuan_train.engine.precompute import precompute_from_config


def main(argv: Sequence[str]) -> int:
    """Precompute the data of a config; under torchrun the processes share the work."""
    cfg = composed(argv)
    if cfg is None:
        return 0
    with joined_world(cfg) as world:
        summary = precompute_from_config(cfg, world)
    if world.rank == 0:
        print(summary)
    return 0
