"""Sampling: Euler integration of the learned flow from noise to latents, then decoding."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from hunyuan_train.encoders.features import TextFeatures, concatenate
from hunyuan_train.encoders.text import TextEncoder
from hunyuan_train.evaluation.config import SampleConfig
from hunyuan_train.models.hunyuan.config import HunyuanConfig
from hunyuan_train.models.vae.config import VaeConfig
from hunyuan_train.objectives.conditioning import guidance_input
from hunyuan_train.objectives.flow_matching import model_time
from hunyuan_train.objectives.timesteps import shift_sigmas
from hunyuan_train.runtime.seed import keyed_normal

Progress = Callable[[int, int], None]
"""Called with (model steps done, model steps in all)."""


@runtime_checkable
class LatentDecoder(Protocol):
    """What sampling needs of a VAE."""

    @property
    def cfg(self) -> VaeConfig:
        """Its configuration."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """Its parameters; they tell device and precision."""
        ...

    def unscale(self, latents: Tensor) -> Tensor:
        """Undo the scaling that diffusion latents carry."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Turn unscaled latents into pixels."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class SampledVideo:
    """One decoded sample."""

    prompt: str
    prompt_index: int
    """Position of the prompt in the list."""
    repeat: int
    """Which of the prompt's `num_per_prompt` samples this is."""
    pixels: Tensor
    """[3, F, H, W] float32 on the CPU, clamped to [-1, 1]."""


def default_shift(steps: int) -> float:
    """Return the published shift: 7 at 50 steps, 17 below 20 (arXiv 2412.03603, section 5.2)."""
    return 17.0 if steps < 20 else 7.0


def sigma_schedule(steps: int, shift: float) -> Tensor:
    """Return the noise levels of an Euler run, [steps + 1] float32 from 1 (noise) down to 0.

    Args:
        steps: Euler steps.
        shift: shift towards noise; 0 takes `default_shift(steps)`.
    """
    uniform = torch.linspace(1, 0, steps + 1, dtype=torch.float64).float()
    return shift_sigmas(uniform, shift or default_shift(steps))


@torch.no_grad()
def sample_latents(
    model: nn.Module,
    noise: Tensor,
    features: TextFeatures,
    negative: TextFeatures | None = None,
    *,
    steps: int,
    shift: float = 0.0,
    cfg_scale: float = 1.0,
    guidance: float | None = None,
    batched_cfg: bool = True,
    progress: Callable[[], None] | None = None,
) -> Tensor:
    """Integrate the flow from noise to scaled latents with Euler steps in float32.

    Args:
        model: predicts the velocity; called as `model(latents, time, text, text_mask, pooled,
            guidance)` in its own precision, with time and guidance in float32.
        noise: [B, C, T, H, W] float32, the start.
        features: text of the B samples, on the device of `noise`.
        negative: text of the unconditional branch, B rows or one row for all.
        steps: Euler steps.
        shift: see `sigma_schedule`.
        cfg_scale: classifier-free guidance `uncond + cfg_scale * (cond - uncond)` (arXiv
            2207.12598); 1 leaves `negative` out.
        guidance: scale for a model with embedded guidance, None for one without.
        batched_cfg: run [uncond, cond] as one batch instead of one after the other.
        progress: called after every step.

    Returns:
        [B, C, T, H, W] float32; divide by the VAE's scaling factor before decoding.

    Raises:
        ValueError: `cfg_scale` is not 1 and there is no negative text.
    """
    velocity = _Velocity(model, features, negative, cfg_scale, guidance, batched_cfg)
    sigmas = sigma_schedule(steps, shift).to(noise.device)
    latents = noise.float()
    for now, after in pairwise(sigmas):
        latents = latents + (after - now) * velocity(latents, now)
        if progress is not None:
            progress()
    return latents


class _Velocity:
    """The guided velocity at one noise level."""

    def __init__(
        self,
        model: nn.Module,
        features: TextFeatures,
        negative: TextFeatures | None,
        cfg_scale: float,
        guidance: float | None,
        batched_cfg: bool,
    ) -> None:
        self._model = model
        self._scale = cfg_scale
        self._guidance = guidance
        self._dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        if cfg_scale == 1:
            self._branches = [features]
            return
        if negative is None:
            raise ValueError(
                f"sample.cfg_scale={cfg_scale} needs the features of a negative prompt; encode "
                f'sample.negative_prompt (it may be "") or set sample.cfg_scale=1'
            )
        if len(negative) != len(features):
            negative = negative.select([0] * len(features))
        pair = [negative, features]
        self._branches = [concatenate(pair)] if batched_cfg else pair

    def __call__(self, latents: Tensor, sigma: Tensor) -> Tensor:
        """Return the velocity, [B, C, T, H, W] float32, at scalar `sigma`."""
        parts = [self._predict(latents, sigma, branch) for branch in self._branches]
        if self._scale == 1:
            return parts[0]
        uncond, cond = torch.cat(parts).chunk(2)
        return uncond + self._scale * (cond - uncond)

    def _predict(self, latents: Tensor, sigma: Tensor, text: TextFeatures) -> Tensor:
        batch = len(text)  # B, or 2B when both branches run at once
        inputs = latents.repeat(batch // latents.shape[0], 1, 1, 1, 1).to(self._dtype)
        guidance = None
        if self._guidance is not None:
            guidance = guidance_input(self._guidance, batch, latents.device)
        return self._model(
            inputs,
            model_time(sigma).expand(batch),
            text.states.to(self._dtype),
            text.mask,
            text.pooled.to(self._dtype),
            guidance,
        ).float()


@torch.no_grad()
def sample_videos(
    model: nn.Module,
    vae: LatentDecoder,
    text_encoder: TextEncoder,
    prompts: Sequence[str],
    cfg: SampleConfig,
    progress: Progress | None = None,
    items: Sequence[int] | None = None,
    decode_share: tuple[int, int] = (0, 1),
) -> Iterator[SampledVideo]:
    """Sample every prompt `cfg.num_per_prompt` times and yield the decoded videos one by one.

    Sample number `prompt_index * num_per_prompt + repeat` starts from noise keyed by (seed, prompt
    index, repeat), so it is the same in any batch and on any rank.

    Args:
        model: the diffusion model; `model.cfg.guidance_embed` decides whether guidance is fed.
        vae: turns latents into pixels, one video at a time.
        text_encoder: encodes the prompts and the negative prompt before sampling starts.
        prompts: texts; usually `cfg.prompts`.
        cfg: sizes and sampler settings; `cfg.prompts` is not read.
        progress: called with (steps done, steps in all).
        items: sample numbers to make, for a rank's share; all when None.
        decode_share: (rank, ranks) among those that sample the same items with one model spread
            over them; each decodes and yields every so many-th of them.

    Raises:
        ValueError: no prompts.
    """
    if not prompts:
        raise ValueError("there is nothing to sample; list prompts in sample.prompts")
    media = cfg.bucket.media
    device = next(model.parameters()).device
    guidance = cfg.guidance if cast(HunyuanConfig, model.cfg).guidance_embed else None
    features = text_encoder.encode(list(prompts), media).to(device)
    negative = None
    if cfg.cfg_scale != 1:
        negative = text_encoder.encode([cfg.negative_prompt], media).to(device)
    shape = (vae.cfg.latent_channels, *cfg.bucket.latent_shape)
    wanted = list(range(len(prompts) * cfg.num_per_prompt) if items is None else items)
    batches = [wanted[i : i + cfg.batch_size] for i in range(0, len(wanted), cfg.batch_size)]
    total, done = len(batches) * cfg.steps, 0

    def count_step() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    for batch in batches:
        keys = [divmod(item, cfg.num_per_prompt) for item in batch]
        noise = torch.stack(
            [keyed_normal(shape, cfg.seed, "sample", prompt, repeat) for prompt, repeat in keys]
        ).to(device)
        latents = sample_latents(
            model,
            noise,
            features.select([prompt for prompt, _ in keys]),
            negative,
            steps=cfg.steps,
            shift=cfg.shift,
            cfg_scale=cfg.cfg_scale,
            guidance=guidance,
            batched_cfg=cfg.batched_cfg,
            progress=count_step,
        )
        for row, (prompt, repeat) in enumerate(keys):
            if batch[row] % decode_share[1] != decode_share[0]:
                continue
            # One at a time: decoding needs several times the memory of sampling.
            yield SampledVideo(
                prompt=prompts[prompt],
                prompt_index=prompt,
                repeat=repeat,
                pixels=decode_latents(vae, latents[row : row + 1])[0],
            )


@torch.no_grad()
def decode_latents(vae: LatentDecoder, latents: Tensor) -> Tensor:
    """Decode scaled latents [B, C, T, h, w] to pixels [B, 3, F, H, W], float32 on the CPU."""
    parameter = next(vae.parameters())
    pixels = vae.decode(vae.unscale(latents).to(parameter.device, parameter.dtype))
    return pixels.float().clamp(-1, 1).cpu()
