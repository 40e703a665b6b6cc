"""The end of a stage that trains the VAE: its averaged weights and the scale of its latents."""

import logging
import math
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from hunyuan_train.data.mixture import cells_of
from hunyuan_train.data.pixels import PixelStore
from hunyuan_train.data.quarantine import SampleError
from hunyuan_train.engine.build import TrainRun
from hunyuan_train.engine.held_out import averaged
from hunyuan_train.engine.reconstruction import latent_shape
from hunyuan_train.engine.vae_held_out import pixels_of
from hunyuan_train.models.vae.base import Vae
from hunyuan_train.models.vae.build import build_vae
from hunyuan_train.models.vae.state_dict import save_vae
from hunyuan_train.parallel.whole import whole_tensor
from hunyuan_train.runtime.dist import barrier
from hunyuan_train.runtime.seed import keyed_normal, keyed_permutation

log = logging.getLogger(__name__)

FOLDER = "vae"
"""Where the VAE goes below ``run.dir`` if ``run.vae`` is not set."""


def export_vae(run: TrainRun) -> Path:
    """Write the averaged weights, with the scale of their latents, to ``run.vae``; return where.

    Every rank calls it.
    """
    state, cfg = run.state, run.cfg
    folder = Path(cfg.run.vae or run.folder / FOLDER)
    with averaged(state) if state.ema.state_dict() else nullcontext():
        deviation = latent_deviation(run)
        weights = {
            name: whole_tensor(parameter.detach()).float().cpu().clone()
            for name, parameter in state.model.module.named_parameters()
        }
    if run.world.rank == 0:
        scale = 1.0 / deviation if deviation > 0 else cfg.vae.scaling_factor
        with torch.device("meta"):
            vae = build_vae(replace(cfg.vae, scaling_factor=scale))
        vae.load_state_dict(weights, assign=True)
        save_vae(vae, folder)
        log.info("%s: VAE after %d updates, scaling factor %.4f", folder, state.step, scale)
    barrier()
    return folder


@torch.no_grad()
def latent_deviation(run: TrainRun) -> float:
    """Return the standard deviation of posterior samples over a few training samples.

    It is pooled over channels, as the one published factor is.
    """
    cfg, axes, state = run.cfg, run.state.model.axes, run.state
    store = PixelStore(cfg.data, cfg.data.latents or cfg.run.dir, cfg.run.seed)
    rows = [
        cell.first + place for cell in cells_of([store], cfg.data) for place in range(cell.count)
    ]
    order = keyed_permutation(len(rows), cfg.run.seed, "vae_scale")
    chosen = [rows[place] for place in order[: cfg.vae_training.scale_samples]]
    each = -(-len(chosen) // axes.size("dp"))
    mine = chosen[axes.rank("dp") :: axes.size("dp")]
    sums = torch.zeros(3, dtype=torch.float64)
    for number in range(each):
        counts = number < len(mine)
        sums += _moments(run, store, (mine[number] if counts else chosen[0])) * counts
    total = axes.sum(sums.to(run.world.device), "dp").tolist()
    count, linear, square = total
    if not count:
        return 0.0
    assert state.task is not None
    return math.sqrt(max(square / count - (linear / count) ** 2, 0.0))


def _moments(run: TrainRun, store: PixelStore, row: int) -> Tensor:
    """Return count, sum and sum of squares of one sample's latents; zeros for a bad sample."""
    vae = run.state.model.module
    assert isinstance(vae, Vae)
    bucket, bad = store.index.row(row).bucket, False
    try:
        clip = store.load(row, 0)
    except SampleError as error:
        log.warning("the latents' scale without a sample: %s", error)
        clip, bad = store.empty_batch(bucket, 1, 0.0).pixels[0].numpy(), True
    pixels = pixels_of(run, [clip])
    shape = latent_shape(vae.cfg, pixels.shape)
    noise = keyed_normal(shape, run.cfg.run.seed, "vae_scale", store.index.row(row).sample_id)
    _, mean, std, _ = run.state.updates.module(pixels, torch.zeros_like(noise)[None].to(pixels))
    latents = (mean + std * noise.to(mean)).double().cpu()
    if bad:
        return torch.zeros(3, dtype=torch.float64)
    count = torch.tensor(float(latents.numel()), dtype=torch.float64)
    return torch.stack([count, latents.sum(), latents.square().sum()])
