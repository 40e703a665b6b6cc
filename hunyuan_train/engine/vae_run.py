"""A VAE training run from a config: pixels in, a VAE folder and its loss curve out."""

import json
import logging
from dataclasses import asdict
from pathlib import Path

import torch

from hunyuan_train.config.root import RunConfig
from hunyuan_train.engine.vae_data import PixelBatches
from hunyuan_train.engine.vae_training import VaeTrainingSummary, train_vae
from hunyuan_train.models.vae.build import build_vae
from hunyuan_train.models.vae.state_dict import save_vae
from hunyuan_train.runtime.dist import World

log = logging.getLogger(__name__)

SUMMARY_NAME = "training.json"


def train_vae_from_config(cfg: RunConfig, world: World) -> VaeTrainingSummary:
    """Train the VAE of ``vae`` by ``vae_training`` on ``data.source`` and write it to ``run.vae``.

    ``training.json`` beside the weights holds the loss curve and what was measured.

    Raises:
        ValueError: if ``run.vae`` is empty, there are several ranks, or no file can be decoded.
    """
    if not cfg.run.vae:
        raise ValueError("run.vae is empty; give it the folder the trained VAE is written to")
    if world.size > 1:
        raise ValueError(
            f"train-vae runs in one process, but {world.size} were started; leave torchrun out"
        )
    batches = PixelBatches(
        cfg.data, cfg.vae_training.files_per_media, cfg.vae_training.batch_size, cfg.run.seed
    )
    torch.manual_seed(cfg.run.seed)
    vae = build_vae(cfg.vae).to(world.device)
    total = cfg.vae_training.steps

    def on_step(row: dict[str, float]) -> None:
        step = int(row["step"]) + 1
        if step % max(1, total // 10) == 0 or step == total:
            log.info("vae %d/%d  loss %.4f  L1 %.4f", step, total, row["total"], row["absolute"])

    summary = train_vae(vae, cfg.vae_training, batches, seed=cfg.run.seed, on_step=on_step)
    save_vae(vae, cfg.run.vae)
    (Path(cfg.run.vae) / SUMMARY_NAME).write_text(json.dumps(asdict(summary)))
    return summary
