"""``hunyuan-train train-vae``: a VAE of the sizes in ``vae``, trained on ``data.source``."""

from collections.abc import Sequence

from hunyuan_train.cli.launching import composed, joined_world
from hunyuan_train.engine.vae_run import train_vae_from_config


def main(argv: Sequence[str]) -> int:
    """Train the VAE in this process and write it to ``run.vae``."""
    cfg = composed(argv)
    if cfg is None:
        return 0
    with joined_world(cfg) as world:
        summary = train_vae_from_config(cfg, world)
    print(f"{cfg.run.vae}: PSNR {summary.psnr_db:.1f} dB after {summary.steps} steps")
    return 0
