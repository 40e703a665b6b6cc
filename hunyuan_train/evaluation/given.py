"""Frames that a video is sampled around: read, encoded alone, put at their places."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from hunyuan_train.data.buckets import Bucket
from hunyuan_train.encoders.latents import PosteriorLike, to_model_range
from hunyuan_train.evaluation.prompts import Prompt, read_picture
from hunyuan_train.models.hunyuan.config import ImageCondition
from hunyuan_train.models.vae.config import VaeConfig
from hunyuan_train.models.vae.tile_work import TileWork
from hunyuan_train.objectives.tasks import frame_mask, place_frames


@runtime_checkable
class SampleVae(Protocol):
    """What sampling needs of a VAE."""

    work: TileWork
    """How it runs the tiles of a large video."""

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

    def scale(self, latents: Tensor) -> Tensor:
        """Give latents the scaling that diffusion latents carry."""
        ...

    def encode(self, pixels: Tensor) -> PosteriorLike:
        """Turn pixels into unscaled latents; only asked for pictures that begin or end videos."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class GivenFrames:
    """Frames that videos are sampled around."""

    form: ImageCondition
    """How they enter the model."""
    latents: Tensor
    """[B, C, T, h, w] scaled latents at the given frames; elsewhere they do not matter."""
    mask: Tensor
    """[B, T] bool, True for given frames."""

    @property
    def replaced(self) -> Tensor | None:
        """Those of [B, T] that the model takes as they are and does not predict."""
        return self.mask if self.form is ImageCondition.token_replace else None


def check_pictures(prompts: Sequence[Prompt], form: ImageCondition) -> None:
    """Raise ValueError if a prompt has pictures and the model takes none."""
    for prompt in prompts:
        if prompt.pictures and form is ImageCondition.none:
            raise ValueError(
                f"image={prompt.image} needs a model that takes frames, but "
                "model.image_condition=none; sample a run that was trained with token_replace or "
                "concat, or leave the picture out"
            )


@torch.no_grad()
def encode_given(
    vae: SampleVae,
    prompts: Sequence[Prompt],
    bucket: Bucket,
    form: ImageCondition,
    device: torch.device,
) -> GivenFrames | None:
    """Encode the pictures of some prompts, each alone, to the means of their posteriors.

    Returns:
        The given frames of B videos on ``device``; None where the model needs not be told of them.
    """
    frames, *area = bucket.latent_shape
    mask = frame_mask([prompt.task for prompt in prompts], frames)
    if form is ImageCondition.none or (form is ImageCondition.token_replace and not mask.any()):
        return None
    latents = torch.zeros(len(prompts), vae.cfg.latent_channels, frames, *area, device=device)
    parameter = next(vae.parameters())
    for row, prompt in enumerate(prompts):
        if not prompt.pictures:
            continue
        clips = [read_picture(name, bucket) for name in prompt.pictures]
        pixels = to_model_range(clips, parameter.device).to(parameter.dtype)
        pictures = vae.scale(vae.encode(pixels).mean).float().transpose(0, 2)  # [1, C, K, h, w]
        latents[row] = place_frames(pictures, prompt.task.frames, frames)[0].to(device)
    return GivenFrames(form=form, latents=latents, mask=mask.to(device))
