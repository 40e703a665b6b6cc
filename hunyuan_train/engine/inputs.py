"""From a micro-batch to what the model takes: every draw keyed by its sample."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from hunyuan_train.config.root import RunConfig
from hunyuan_train.data.collate import Batch
from hunyuan_train.models.hunyuan.config import ImageCondition
from hunyuan_train.models.hunyuan.text_refiner import trim_text
from hunyuan_train.objectives.conditioning import (
    apply_text_drop,
    check_text_mask,
    guidance_input,
    keyed_scales,
    text_drop_mask,
)
from hunyuan_train.objectives.flow_matching import (
    TIME_SCALE,
    interpolate,
    keyed_noise,
    model_time,
    velocity_target,
)
from hunyuan_train.objectives.loss import PATCH_CELLS
from hunyuan_train.objectives.tasks import draw_tasks, frame_mask, give_frames, place_frames
from hunyuan_train.objectives.timesteps import loss_weights, sample_sigmas


@dataclass(frozen=True, kw_only=True, slots=True)
class Caption:
    """Text features of some samples as the model takes them."""

    text: Tensor
    """[B, L, D]."""
    text_mask: Tensor | None
    """[B, L] bool; None where every token is valid."""
    pooled: Tensor
    """[B, P]."""

    @classmethod
    def of(cls, text: Tensor, mask: Tensor, pooled: Tensor, like: Tensor) -> Self:
        """Trim features on the CPU and bring them to device and type of ``like``."""
        text, kept = trim_text(text, mask)
        return cls(
            text=text.to(like),
            text_mask=None if kept is None else kept.to(like.device),
            pooled=pooled.to(like),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelInputs:
    """One micro-batch as the model takes it, with the target of its prediction."""

    noisy: Tensor
    time: Tensor
    text: Tensor
    text_mask: Tensor | None
    pooled: Tensor
    guidance: Tensor | None
    target: Tensor
    sigma: Tensor
    """[B] float32 on the CPU: the noise level of each sample."""
    weights: Tensor | None
    """[B] float32: what the loss of each sample is multiplied by; None for 1."""
    empty: Caption | None = None
    """Of a distillation: what the teacher's prediction without a caption takes."""
    given: Tensor | None = None
    """[B, T] bool on the CPU: latent frames that replace noisy ones and are not learned."""

    def arguments(self) -> tuple[Tensor | None, ...]:
        """Return the arguments of the model's forward, in order."""
        given = None if self.given is None else self.given.to(self.noisy.device)
        plain = (self.noisy, self.time, self.text, self.text_mask, self.pooled, self.guidance)
        return (*plain, given)

    def counted(self, tokens: int) -> Tensor:
        """Return how many of its ``tokens`` the loss of each sample counts: [B] float64."""
        if self.given is None:
            return torch.full((len(self.sigma),), tokens, dtype=torch.float64)
        return tokens * (~self.given).double().mean(dim=1)


def build_inputs(
    batch: Batch,
    cfg: RunConfig,
    scaling_factor: float,
    device: torch.device,
    sigma: Tensor | None = None,
) -> ModelInputs:
    """Draw posterior, noise, time and text drop, each keyed by its sample, and mix them.

    Latents are ``(mean + std * draw) * scaling_factor``; the draws do not depend on rank or order.
    An evaluation gives ``sigma``, [B] float32 on the CPU, instead of having it drawn.
    """
    seed, ids, epochs = cfg.run.seed, batch.sample_ids, batch.epochs
    shape = tuple(batch.mean.shape[1:])
    draw = keyed_noise(shape, seed, "posterior", ids, epochs)
    latents = (batch.mean + batch.std * draw) * scaling_factor
    noise = keyed_noise(shape, seed, "noise", ids, epochs)
    if sigma is None:
        sigma = sample_sigmas(cfg.objective, seed, ids, epochs, batch.bucket.tokens)
    weights = loss_weights(cfg.objective.weighting, sigma)
    check_text_mask(batch.text_mask, ids)
    text, mask, pooled = apply_text_drop(
        text_drop_mask(seed, ids, epochs, cfg.objective.text_drop * (not cfg.objective.distill)),
        batch.text,
        batch.text_mask,
        batch.pooled,
        batch.empty_text,
        batch.empty_mask,
        batch.empty_pooled,
    )
    guidance, empty = None, None
    noisy, given = with_given_frames(interpolate(latents, noise, sigma), batch, cfg, scaling_factor)
    noisy = noisy.to(device, getattr(torch, cfg.parallel.compute_dtype))
    if cfg.model.guidance_embed:
        guidance = guidance_input(cfg.objective.train_guidance, len(ids), device)
    if cfg.objective.distill:
        guidance = (keyed_scales(cfg.objective, seed, ids, epochs) * TIME_SCALE).to(device)
        empty = empty_caption(batch, noisy)
    caption = Caption.of(text, mask, pooled, noisy)
    return ModelInputs(
        noisy=noisy,
        time=model_time(sigma).to(device),
        text=caption.text,
        text_mask=caption.text_mask,
        pooled=caption.pooled,
        guidance=guidance,
        target=velocity_target(latents, noise).to(device),
        sigma=sigma,
        weights=None if weights is None else weights.to(device),
        empty=empty,
        given=given,
    )


def with_given_frames(
    noisy: Tensor, batch: Batch, cfg: RunConfig, scaling_factor: float
) -> tuple[Tensor, Tensor | None]:
    """Return the model's latents, and the mask [B, T] of frames it must not learn, if any.

    Given frames are drawn from their own posterior, as ``latents`` are.

    Raises:
        ValueError: a frame that a task gives was not encoded alone.
    """
    form, frames = cfg.model.image_condition, noisy.shape[2]
    if form is ImageCondition.none:
        return noisy, None
    given = given_frames(batch, cfg)
    clean = torch.zeros_like(noisy)
    if given.any():
        names = cfg.objective.given_frames
        check_stills(cfg, batch.still_frames, f"bucket {batch.bucket}")
        assert batch.stills is not None
        mean, std = batch.stills.unbind(dim=1)  # [B, C, K, h, w]
        shape = tuple(mean.shape[1:])
        draw = keyed_noise(shape, cfg.run.seed, "stills", batch.sample_ids, batch.epochs)
        pictures = (mean + std * draw) * scaling_factor
        columns = [batch.still_frames.index(name) for name in names]
        clean = place_frames(pictures[:, :, columns], names, frames)
    elif form is ImageCondition.token_replace:
        return noisy, None
    learned = form is ImageCondition.concat
    return give_frames(form, noisy, clean, given), None if learned else given


def given_frames(batch: Batch, cfg: RunConfig) -> Tensor:
    """Return [B, T] bool, the latent frames that the tasks drawn for a batch give."""
    frames = batch.bucket.latent_shape[0]
    tasks = draw_tasks(cfg.objective, cfg.run.seed, batch.sample_ids, batch.epochs, frames)
    return frame_mask(tasks, frames)


def check_stills(cfg: RunConfig, stored: list[str], where: str) -> None:
    """Check that the frames which the tasks give were encoded alone.

    Args:
        cfg: tasks.
        stored: names of the frames that were.
        where: what has them, for the message.

    Raises:
        ValueError: one was not.
    """
    needed = cfg.objective.given_frames
    missing = [name for name in needed if name not in stored]
    if missing:
        raise ValueError(
            f"objective.tasks gives the model the {missing[0]} frame of clips, but {where} has no "
            f"latents of it alone; precompute again with data.condition_frames="
            f"[{','.join(needed)}]"
        )


def empty_caption(batch: Batch, like: Tensor) -> Caption:
    """Return the empty caption for every sample of ``batch``, with device and type of ``like``."""
    size = len(batch.sample_ids)
    parts = batch.empty_text, batch.empty_mask, batch.empty_pooled
    text, mask, pooled = (part.expand(size, *part.shape) for part in parts)
    return Caption.of(text, mask, pooled, like)


def loss_tokens(batch: Batch, cfg: RunConfig) -> int:
    """Return how many tokens of a batch its loss counts."""
    frames, height, width = batch.bucket.latent_shape
    counted = len(batch.sample_ids) * frames
    if cfg.model.image_condition is ImageCondition.token_replace:
        counted -= int(given_frames(batch, cfg).sum())
    return counted * height * width // PATCH_CELLS
