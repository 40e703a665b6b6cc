"""The VAE as the task of a stage: pixels in, the error of their reconstruction, and a rival.

The losses are computed on the reconstruction alone, cut off from the VAE; what they want of it, a
gradient in pixels, is then sent back through the VAE once. So neither the perceptual network nor
the discriminator is in memory while the VAE's backward runs, and the gradients of the verdict and
of the other terms can be weighed where both are plain tensors, in every layout alike.
"""

import json
from dataclasses import asdict
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from hunyuan_train.config.root import RunConfig
from hunyuan_train.data.collate import MicroBatch
from hunyuan_train.data.pixels import PixelBatch
from hunyuan_train.engine.rival import Rival
from hunyuan_train.engine.task import MicroStep, Work
from hunyuan_train.memory.config import Recompute
from hunyuan_train.memory.recompute import BucketMode
from hunyuan_train.models.vae.base import Posterior, Vae
from hunyuan_train.models.vae.build import build_vae
from hunyuan_train.models.vae.config import VaeConfig
from hunyuan_train.objectives.perceptual import build_perceptual
from hunyuan_train.objectives.vae_config import VaeTrainingConfig
from hunyuan_train.objectives.vae_loss import VaeLoss, reconstruction_loss
from hunyuan_train.parallel.mesh import Axes
from hunyuan_train.runtime.seed import keyed_generator, keyed_normal

TERMS = ("absolute", "squared", "gradient", "perceptual", "kl")


class Reconstruction:
    """See :class:`~hunyuan_train.engine.task.Task`.

    Every sample weighs the same, and all randomness is keyed by the sample: how it is cut, the
    noise of its posterior, whether its micro-batch is computed in tiles.

    Args:
        cfg: Of the run.
        vae: The network as laid out.
        axes: This rank's place.
        device: Where the network is.
    """

    def __init__(self, cfg: RunConfig, vae: Vae, axes: Axes, device: torch.device) -> None:
        self._cfg, self._vae, self._axes, self._device = cfg, vae, axes, device
        self._dtype = getattr(torch, cfg.parallel.compute_dtype)
        loss = cfg.vae_loss
        self.perceptual = build_perceptual(loss.perceptual_folder, device)
        self.rival = Rival(cfg, axes, device) if loss.adversarial else None
        self._sums = self._no_sums()

    def work(self, batch: MicroBatch, mode: BucketMode) -> Work:
        """Count a micro-batch: of the VAE alone, without discriminator and perceptual network."""
        cut = cut_size(batch.bucket.height, batch.bucket.width, self._cfg.vae_training)
        flops = len(batch.sample_ids) * forward_flops(frozen(self._cfg), batch.bucket.frames, *cut)
        again = 0.0 if mode.recompute is Recompute.none else flops
        return Work(
            counted=len(batch.sample_ids), flops=3.0 * flops, computed_flops=3.0 * flops + again
        )

    def forward(self, module: nn.Module, batch: MicroBatch, total: int) -> tuple[Tensor, MicroStep]:
        """Compute a micro-batch; the loss is summed over samples."""
        batch = cast(PixelBatch, batch)
        cfg, weight = self._cfg, batch.weight
        pixels = to_network(cut(batch, cfg), self._device, self._dtype)
        noise = self._noise(batch, pixels.shape).to(pixels)
        tiles = self._in_tiles(batch)
        seams = cfg.vae_training.tiling_consistency if tiles else 0.0
        decoded, mean, std, whole = module(pixels, noise, tiles=tiles, compare=seams > 0)
        kl = Posterior(mean, std).kl()
        leaf = decoded.detach().float().requires_grad_()
        parts = reconstruction_loss(
            leaf, pixels.float(), kl.detach(), cfg.vae_loss, self.perceptual_or_none
        )
        error = parts.total
        if whole is not None:
            error = error + seams * (leaf - whole.float()).abs().flatten(1).mean(dim=1)
        (wanted,) = torch.autograd.grad(error.sum() * weight, leaf)
        if self.rival is not None:
            wanted = wanted + self.rival.judge(leaf, pixels.float(), wanted, weight, total)
        # Its gradient is the wanted one; its value means nothing.
        nats = cfg.vae_loss.kl * kl.float().sum() * weight / pixels[0].numel()
        loss = (decoded.float() * wanted).sum() + nats
        ids = batch.sample_ids if weight else []
        self._count(parts, weight, len(ids))
        step = MicroStep(
            bucket=batch.bucket,
            source=batch.source,
            samples=len(ids),
            tokens=len(ids) * batch.bucket.tokens,
            loss_sums=(parts.total.detach() * weight)[: len(ids)],
            loss_tokens=len(ids),
            sample_ids=ids,
        )
        return loss, step

    @property
    def perceptual_or_none(self) -> Any:
        """The perceptual distance where it is part of the loss."""
        return self.perceptual if self._cfg.vae_loss.perceptual else None

    def finish(self, norm: Tensor) -> dict[str, Tensor]:
        """Update the discriminator; return the means of the terms over the update's samples."""
        sums = self._axes.sum(self._sums, "dp")
        means = sums[:-1] / sums[-1].clamp(min=1)
        self._sums = self._no_sums()
        terms: dict[str, Tensor] = dict(zip(TERMS, means.unbind(), strict=True))
        name = self.perceptual.name
        terms[name] = terms.pop("perceptual")
        if not self._cfg.vae_loss.perceptual:
            del terms[name]
        if self.rival is not None:
            terms |= self.rival.update(norm)
        return terms

    def tensors(self) -> dict[str, Any]:
        """Return the state of the discriminator."""
        return self.rival.tensors() if self.rival is not None else {}

    def reset(self) -> None:
        """Draw the discriminator anew."""
        if self.rival is not None:
            self.rival.reset()

    def start_update(self, step: int, rate: float) -> None:
        """Say how many updates are done, and the learning rate over its highest."""
        if self.rival is not None:
            self.rival.start_update(step, rate)

    def _no_sums(self) -> Tensor:
        return torch.zeros(len(TERMS) + 1, dtype=torch.float64, device=self._device)

    def _count(self, parts: VaeLoss, weight: float, samples: int) -> None:
        values = [getattr(parts, name).sum().double() * weight for name in TERMS]
        self._sums += torch.stack([*values, values[0].new_tensor(float(samples))])

    def _noise(self, batch: PixelBatch, shape: torch.Size) -> Tensor:
        one = latent_shape(self._vae.cfg, shape)
        keys = [f"{i}:{e}" for i, e in zip(batch.sample_ids, batch.epochs, strict=True)]
        rows = [keyed_normal(one, self._cfg.run.seed, "vae_posterior", key) for key in keys]
        return torch.stack(rows)

    def _in_tiles(self, batch: PixelBatch) -> bool:
        drawn = keyed_generator(self._cfg.run.seed, "vae_tiling", *_key(batch))
        return bool(drawn.random() < self._cfg.vae_training.tiling_share)


def latent_shape(cfg: VaeConfig, pixels: torch.Size) -> tuple[int, int, int, int]:
    """Return [C, T, h, w] of the latents of one sample of pixels [B, 3, F, H, W]."""
    frames, height, width = pixels[2:]
    ratio = cfg.spatial_ratio
    latent_frames = (frames - 1) // cfg.temporal_ratio + 1
    return cfg.latent_channels, latent_frames, height // ratio, width // ratio


def cut(batch: PixelBatch, cfg: RunConfig) -> Tensor:
    """Return the pixels of a batch, cut at random to ``vae_training.crop_px``; uint8 as they are.

    All samples of a micro-batch are cut alike.
    """
    pixels = batch.pixels
    height, width = pixels.shape[2:4]
    tall, wide = cut_size(height, width, cfg.vae_training)
    drawn = keyed_generator(cfg.run.seed, "vae_crop", *_key(batch))
    top, left = int(drawn.integers(height - tall + 1)), int(drawn.integers(width - wide + 1))
    return pixels[:, :, top : top + tall, left : left + wide]


def to_network(pixels: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return uint8 [B, F, H, W, 3] as [B, 3, F, H, W] in [-1, 1], channels last in memory."""
    moved = pixels.to(device, non_blocking=True).permute(0, 4, 1, 2, 3)
    scaled = (moved.float() / 127.5 - 1.0).to(dtype)
    return scaled.contiguous(memory_format=torch.channels_last_3d)


def _key(batch: PixelBatch) -> tuple[str, int]:
    return batch.sample_ids[0], batch.epochs[0]


def cut_size(height: int, width: int, cfg: VaeTrainingConfig) -> tuple[int, int]:
    most = cfg.crop_px or max(height, width)
    return min(height, most), min(width, most)


def frozen(cfg: RunConfig) -> str:
    """Return the VAE's config as something that can be a key."""
    return json.dumps(asdict(cfg.vae))


@lru_cache(maxsize=512)
def forward_flops(vae: str, frames: int, height: int, width: int) -> int:
    """Count the multiply-adds, twice each, of one sample through encoder and decoder, untiled.

    Args:
        vae: What :func:`frozen` returned.
        frames: Pixel frames.
        height: In pixels.
        width: In pixels.
    """
    with torch.device("meta"), torch.no_grad():
        model = build_vae(VaeConfig(**json.loads(vae)))
        pixels = torch.zeros(1, 3, frames, height, width)
        with FlopCounterMode(display=False) as counter, model.tiling(on=False):
            model.decode(model.encode(pixels).mode())
    return counter.get_total_flops()
