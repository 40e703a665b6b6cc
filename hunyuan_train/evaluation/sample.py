"""Sampling: Euler integration of the learned flow from noise to latents, then decoding."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn

from hunyuan_train.data.buckets import Bucket
from hunyuan_train.encoders.features import TextFeatures, concatenate
from hunyuan_train.encoders.text import TextEncoder
from hunyuan_train.evaluation.config import SampleConfig, Schedule
from hunyuan_train.evaluation.given import GivenFrames, SampleVae, check_pictures, encode_given
from hunyuan_train.evaluation.prompts import (
    Prompt,
    captions_of,
    encode_captions,
    negative,
    positive,
)
from hunyuan_train.evaluation.schedules import sigma_schedule
from hunyuan_train.models.hunyuan.config import HunyuanConfig
from hunyuan_train.models.vae.tile_work import TileSpread
from hunyuan_train.objectives.conditioning import guidance_input
from hunyuan_train.objectives.flow_matching import model_time
from hunyuan_train.objectives.tasks import give_frames
from hunyuan_train.runtime.seed import keyed_normal

Progress = Callable[[int, int], None]
"""Called with (model steps done, model steps in all)."""


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
    schedule: Schedule = Schedule.shifted,
    given: GivenFrames | None = None,
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
        schedule: see `sigma_schedule`.
        given: frames to sample around, on the device of `noise`; a model with
            `image_condition=concat` always takes them, none of them True for text to video.
        progress: called after every step.

    Returns:
        [B, C, T, H, W] float32; divide by the VAE's scaling factor before decoding.

    Raises:
        ValueError: `cfg_scale` is not 1 and there is no negative text.
    """
    velocity = _Velocity(model, features, negative, cfg_scale, guidance, batched_cfg, given)
    sigmas = sigma_schedule(steps, shift, schedule).to(noise.device)
    latents = noise.float()
    kept = None if given is None else given.replaced
    for now, after in pairwise(sigmas):
        latents = latents + (after - now) * velocity(latents, now)
        if given is not None and kept is not None:
            latents = give_frames(given.form, latents, given.latents, kept)
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
        given: GivenFrames | None,
    ) -> None:
        self._model = model
        self._given = given
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
        times, given = batch // latents.shape[0], self._given
        if given is not None:
            latents = give_frames(given.form, latents, given.latents, given.mask)
        inputs = latents.repeat(times, 1, 1, 1, 1).to(self._dtype)
        more = () if given is None or given.replaced is None else (given.mask.repeat(times, 1),)
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
            *more,
        ).float()


@torch.no_grad()
def sample_videos(
    model: nn.Module,
    vae: SampleVae,
    text_encoder: TextEncoder,
    prompts: Sequence[Prompt],
    cfg: SampleConfig,
    progress: Progress | None = None,
    items: Sequence[int] | None = None,
    decode_share: tuple[int, int] = (0, 1),
    spread: TileSpread | None = None,
) -> Iterator[SampledVideo]:
    """Sample every prompt `cfg.num_per_prompt` times and yield the decoded videos one by one.

    Sample number `prompt_index * num_per_prompt + repeat` starts from noise keyed by the prompt's
    seed, text and pictures and by the repeat, so it is the same in any list, batch and layout.

    Args:
        model: the diffusion model; `model.cfg.guidance_embed` decides whether guidance is fed.
        vae: turns latents into pixels, one video at a time.
        text_encoder: encodes the prompts and the negative prompts before sampling starts.
        prompts: of `read_prompts(cfg)`.
        cfg: sizes and sampler settings; prompts, pictures and seed are not read.
        progress: called with (steps done, steps in all).
        items: sample numbers to make, for a rank's share; all when None.
        decode_share: (rank, ranks) among those that sample the same items with one model spread
            over them; each decodes and yields every so many-th of them.
        spread: those ranks again: where a batch has fewer videos than there are ranks, they share
            the tiles of each video.

    Raises:
        ValueError: no prompts, or pictures for a model that takes none.
    """
    if not prompts:
        raise ValueError("there is nothing to sample; list prompts in sample.prompts")
    check_pictures(prompts, cast(HunyuanConfig, model.cfg).image_condition)
    texts = _Texts(text_encoder, prompts, cfg.bucket)
    numbers = list(range(len(prompts) * cfg.num_per_prompt) if items is None else items)
    batches = [numbers[i : i + cfg.batch_size] for i in range(0, len(numbers), cfg.batch_size)]
    total, done = len(batches) * cfg.steps, 0

    def count_step() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    for batch in batches:
        places = [divmod(number, cfg.num_per_prompt) for number in batch]
        wanted = [(prompts[place], repeat) for place, repeat in places]
        latents = _sample_batch(model, vae, texts, wanted, cfg, count_step)
        together = spread if _share_tiles(vae, cfg, len(batch), spread) else None
        for row, (place, repeat) in enumerate(places):
            mine = batch[row] % decode_share[1] == decode_share[0]
            if not mine and together is None:
                continue
            # One at a time: decoding needs several times the memory of sampling.
            pixels = decode_latents(vae, latents[row : row + 1], together)[0]
            if mine:
                yield SampledVideo(
                    prompt=prompts[place].prompt, prompt_index=place, repeat=repeat, pixels=pixels
                )


def _share_tiles(vae: SampleVae, cfg: SampleConfig, videos: int, spread: TileSpread | None) -> bool:
    """Tell whether sharing the tiles of a video beats sharing the videos."""
    bucket = cfg.bucket
    cut = vae.cfg.cuts(bucket.frames, bucket.height, bucket.width)
    return spread is not None and cut and videos < spread.size


class _Texts:
    """Features of all captions and negative captions of a list of prompts."""

    def __init__(self, encoder: TextEncoder, prompts: Sequence[Prompt], bucket: Bucket) -> None:
        captions = captions_of(prompts)
        self._rows = {text: row for row, text in enumerate(captions)}
        self._features = concatenate(encode_captions(encoder, captions, bucket))

    def of(self, captions: Sequence[tuple[str, str]], device: torch.device) -> TextFeatures:
        """Return the features of some of them."""
        return self._features.select([self._rows[text] for text in captions]).to(device)


def _sample_batch(
    model: nn.Module,
    vae: SampleVae,
    texts: _Texts,
    wanted: Sequence[tuple[Prompt, int]],
    cfg: SampleConfig,
    progress: Callable[[], None],
) -> Tensor:
    """Return the latents [B, C, T, h, w] of some prompts, each in one of its repeats."""
    device = next(model.parameters()).device
    model_cfg = cast(HunyuanConfig, model.cfg)
    shape = (vae.cfg.latent_channels, *cfg.bucket.latent_shape)
    noise = [keyed_normal(shape, p.seed, "sample", p.key(), repeat) for p, repeat in wanted]
    prompts = [prompt for prompt, _ in wanted]
    return sample_latents(
        model,
        torch.stack(noise).to(device),
        texts.of([positive(prompt) for prompt in prompts], device),
        texts.of([negative(prompt) for prompt in prompts], device),
        steps=cfg.steps,
        shift=cfg.shift,
        cfg_scale=cfg.cfg_scale,
        guidance=cfg.guidance if model_cfg.guidance_embed else None,
        batched_cfg=cfg.batched_cfg,
        schedule=cfg.schedule,
        given=encode_given(vae, prompts, cfg.bucket, model_cfg.image_condition, device),
        progress=progress,
    )


@torch.no_grad()
def decode_latents(vae: SampleVae, latents: Tensor, spread: TileSpread | None = None) -> Tensor:
    """Decode scaled latents [B, C, T, h, w] to pixels [B, 3, F, H, W], float32 on the CPU.

    With ``spread`` all its ranks call this with the same latents and get the same pixels.
    """
    parameter = next(vae.parameters())
    alone, vae.work = vae.work, replace(vae.work, spread=spread)
    try:
        pixels = vae.decode(vae.unscale(latents).to(parameter.device, parameter.dtype))
    finally:
        vae.work = alone
    return pixels.float().clamp(-1, 1).cpu()
