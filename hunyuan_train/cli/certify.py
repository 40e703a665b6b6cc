"""``hunyuan-train certify``: prove a layout; under torchrun on every rank."""

from collections.abc import Sequence

from hunyuan_train.cli.launching import composed, joined_world
from hunyuan_train.engine.certify import certify


def main(argv: Sequence[str]) -> int:
    """Compare the layout with one process; return 1 when it computes something else."""
    cfg = composed(argv)
    if cfg is None:
        return 0
    with joined_world(cfg) as world:
        certificates = certify(cfg, world)
        if world.rank == 0:
            print("\n".join(certificate.table() for certificate in certificates))
    return 0 if all(certificate.holds for certificate in certificates) else 1
