"""Sampling with a first frame against HunyuanVideoImageToVideoPipeline, text features given."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, HunyuanVideoImageToVideoPipeline
from PIL import Image
from test_sampler_pipeline import (
    FRAMES,
    HEIGHT,
    LATENT_SHAPE,
    SHIFT,
    STEPS,
    WIDTH,
    build_models,
    build_vaes,
    random_features,
    relative_error,
)

from hunyuan_train.data.buckets import Bucket
from hunyuan_train.evaluation.given import encode_given
from hunyuan_train.evaluation.prompts import Prompt
from hunyuan_train.evaluation.sample import sample_latents
from hunyuan_train.models.hunyuan.config import ImageCondition

BUCKET = Bucket(FRAMES, HEIGHT, WIDTH)
THEIR_IMAGE = 0.001
"""Share of the picture in every frame of the pipeline's initial noise."""


@pytest.mark.parametrize("cfg_scale", [1.0, 4.5])
@pytest.mark.parametrize("form", [ImageCondition.token_replace, ImageCondition.concat])
def test_latents_equal_the_pipeline(form: ImageCondition, cfg_scale: float, tmp_path: Path) -> None:
    channels = {ImageCondition.concat: {"in_channels": 9}}.get(form, {})
    ours, theirs = build_models(cfg_scale == 1, image_condition=form, **channels)
    our_vae, their_vae = build_vaes()
    picture = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    Image.fromarray(picture).save(tmp_path / "first.png")
    prompt = Prompt(prompt="", image=str(tmp_path / "first.png"))
    given = encode_given(our_vae, [prompt] * 2, BUCKET, form, torch.device("cpu"))
    assert given is not None
    noise = torch.randn(2, *LATENT_SHAPE, generator=torch.Generator().manual_seed(5))
    features, negative = random_features(2, [7, 3]), random_features(3, [1, 5])

    pipeline = HunyuanVideoImageToVideoPipeline(
        text_encoder=None,
        tokenizer=None,
        transformer=theirs,
        vae=their_vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        text_encoder_2=None,
        tokenizer_2=None,
        image_processor=None,
    )
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        image=[Image.open(tmp_path / "first.png")] * 2,
        prompt_embeds=features.states,
        prompt_attention_mask=features.mask,
        pooled_prompt_embeds=features.pooled,
        negative_prompt_embeds=negative.states,
        negative_prompt_attention_mask=negative.mask,
        negative_pooled_prompt_embeds=negative.pooled,
        true_cfg_scale=cfg_scale,
        guidance_scale=6.0,
        num_inference_steps=STEPS,
        height=HEIGHT,
        width=WIDTH,
        num_frames=FRAMES,
        latents=noise.clone(),
        output_type="latent",
        return_dict=False,
    )[0]

    first = given.latents[:, :, :1]
    start = (1 - THEIR_IMAGE) * noise + THEIR_IMAGE * first
    latents = sample_latents(
        ours,
        start,
        features,
        negative,
        steps=STEPS,
        shift=SHIFT,
        cfg_scale=cfg_scale,
        guidance=6.0 if cfg_scale == 1 else None,
        given=given,
    )
    if form is ImageCondition.token_replace:
        assert torch.equal(latents[:, :, :1], first)
    else:
        latents = latents[:, :, 1:]  # the pipeline drops it
    assert relative_error(latents, expected) <= 1e-5
    assert relative_error(start[:, :, -latents.shape[2] :], expected) > 0.1
