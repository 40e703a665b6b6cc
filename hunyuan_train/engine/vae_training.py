"""Training of an autoencoder on pixel batches, and the latent scale it ends up with."""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from hunyuan_train.engine.vae_optimizer import VaeOptimizer
from hunyuan_train.models.vae.base import Vae
from hunyuan_train.models.vae.config import TEMPORAL_RATIO
from hunyuan_train.objectives.vae_config import VaeTrainingConfig
from hunyuan_train.objectives.vae_loss import VaeLoss, vae_loss
from hunyuan_train.optim.ema import Ema
from hunyuan_train.runtime.seed import keyed_generator, keyed_normal

NextBatch = Callable[[int], Tensor]
"""Step number to pixels [B, 3, F, H, W] in [-1, 1]; sizes may differ from step to step."""


@dataclass(kw_only=True, slots=True)
class VaeTrainingSummary:
    """What a VAE training run did and measured."""

    steps: int
    """Optimizer updates."""

    seconds: float
    """Wall time of the updates, measuring aside."""

    skipped: int
    """Updates left out because a gradient was not finite."""

    psnr_db: float
    """Peak signal-to-noise ratio of decode(encode(x)) with the posterior's mode, peak 2."""

    latent_std: float
    """Standard deviation of unscaled posterior samples over all their values."""

    scaling_factor: float
    """1 / latent_std."""

    curve: list[dict[str, float]] = field(default_factory=list)
    """Per step: step, total, absolute, squared, gradient, kl."""


def train_vae(
    vae: Vae,
    cfg: VaeTrainingConfig,
    next_batch: NextBatch,
    *,
    seed: int,
    on_step: Callable[[dict[str, float]], None] | None = None,
) -> VaeTrainingSummary:
    """Train a VAE in place, leave the averaged weights in it and set its scaling factor.

    Batches are cropped in time and space for training. Batches ``cfg.steps`` and up are taken for
    measuring, after training, and not cropped.

    Args:
        vae: The network, on the device to train on.
        cfg: Losses, optimizer, number of steps.
        next_batch: Gives the pixels of a step.
        seed: Keys the posterior noise by step and row.
        on_step: Called with each row of the curve.

    Returns:
        The loss curve, the reconstruction error and the latents' scale.
    """
    vae.channels_last()
    vae.train()
    optimizer = VaeOptimizer(vae, cfg)
    ema = Ema(vae, optimizer.recipe)
    losses: list[VaeLoss] = []
    skipped = 0
    started = time.perf_counter()
    for step in range(cfg.steps):
        loss = _forward(vae, cfg, crop(next_batch(step), cfg, seed, step), seed, step)
        vae.zero_grad(set_to_none=True)
        loss.total.backward()
        skipped += not optimizer.step(step)
        ema.update(step)
        losses.append(loss.detached())
        if on_step is not None:
            on_step(_row(step, losses[-1]))
    seconds = time.perf_counter() - started
    vae.load_state_dict(ema.state_dict())
    psnr_db, latent_std = measure(vae, cfg, next_batch, seed)
    vae.cfg.scaling_factor = 1.0 / latent_std
    return VaeTrainingSummary(
        steps=cfg.steps,
        seconds=seconds,
        skipped=skipped,
        psnr_db=psnr_db,
        latent_std=latent_std,
        scaling_factor=vae.cfg.scaling_factor,
        curve=[_row(step, loss) for step, loss in enumerate(losses)],
    )


def crop(batch: Tensor, cfg: VaeTrainingConfig, seed: int, step: int) -> Tensor:
    """Return a random part of a batch that costs about ``cfg.batch_pixels``.

    Clips lose frames before samples are left out; two samples always stay if there are two, because
    torch convolves a batch of one several times slower on a CPU.

    Args:
        batch: [B, 3, F, H, W].
        cfg: Largest sizes.
        seed: Seed of the run.
        step: Keys the choice together with the seed.
    """
    generator = keyed_generator(seed, "vae_crop", step)
    frames, height, width = batch.shape[2:]
    if frames > 1:
        most = (min(frames, cfg.crop_frames) - 1) // TEMPORAL_RATIO
        length = TEMPORAL_RATIO * int(generator.integers(min(1, most), most + 1)) + 1
        batch = batch.narrow(2, int(generator.integers(frames - length + 1)), length)
    for dim, size in ((3, height), (4, width)):
        if size > cfg.crop_px:
            start = int(generator.integers(size - cfg.crop_px + 1))
            batch = batch.narrow(dim, start, cfg.crop_px)
    rows = max(2, cfg.batch_pixels // batch[0, 0].numel())
    return batch[:rows]


@torch.no_grad()
def measure(
    vae: Vae, cfg: VaeTrainingConfig, next_batch: NextBatch, seed: int
) -> tuple[float, float]:
    """Return (PSNR in dB, standard deviation of latents) over batches that follow the training.

    The deviation is of posterior samples, pooled over channels as the one published factor is.
    """
    vae.eval()
    squared_error, latent_sum, latent_squares = (0.0, 0.0, 0.0)
    num_pixels = num_latents = 0
    for step in range(cfg.steps, cfg.steps + cfg.measure_batches):
        pixels = _to_network(vae, next_batch(step))
        posterior = vae.encode(pixels)
        error = (vae.decode(posterior.mode()).clamp(-1, 1) - pixels).double()
        latents = posterior.sample(_noise(posterior.mean, seed, step)).double()
        squared_error += error.square().sum().item()
        latent_sum += latents.sum().item()
        latent_squares += latents.square().sum().item()
        num_pixels += error.numel()
        num_latents += latents.numel()
    mean = latent_sum / num_latents
    std = math.sqrt(latent_squares / num_latents - mean**2)
    return 10 * math.log10(4.0 * num_pixels / max(squared_error, 1e-12)), std


def _forward(vae: Vae, cfg: VaeTrainingConfig, batch: Tensor, seed: int, step: int) -> VaeLoss:
    pixels = _to_network(vae, batch)
    posterior = vae.encode(pixels)
    decoded = vae.decode(posterior.sample(_noise(posterior.mean, seed, step)))
    return vae_loss(decoded, pixels, posterior.kl(), cfg)


def _to_network(vae: Vae, batch: Tensor) -> Tensor:
    parameter = next(vae.parameters())
    pixels = batch.to(parameter.device, parameter.dtype)
    return pixels.contiguous(memory_format=torch.channels_last_3d)


def _noise(like: Tensor, seed: int, step: int) -> Tensor:
    shape = tuple(like.shape[1:])
    rows = [keyed_normal(shape, seed, "vae_posterior", f"{step}:{row}") for row in range(len(like))]
    return torch.stack(rows).to(like)


def _row(step: int, loss: VaeLoss) -> dict[str, float]:
    return {"step": float(step), **{name: value.item() for name, value in asdict(loss).items()}}
