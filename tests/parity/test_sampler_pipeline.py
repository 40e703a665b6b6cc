"""Whole sampling runs against HunyuanVideoPipeline of diffusers, with given text features."""

import pytest
import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)

from hunyuan_train.encoders.features import TextFeatures
from hunyuan_train.evaluation.sample import decode_latents, sample_latents
from hunyuan_train.models.hunyuan.config import HunyuanConfig, ImageCondition
from hunyuan_train.models.hunyuan.model import HunyuanVideo
from hunyuan_train.models.hunyuan.state_dict import diffusers_config, hunyuan_links
from hunyuan_train.models.vae.base import Vae
from hunyuan_train.models.vae.build import build_vae
from hunyuan_train.models.vae.config import VaeConfig

FRAMES, HEIGHT, WIDTH = 9, 32, 48
LATENT_SHAPE = (4, 3, 4, 6)
TEXT_LENGTH, TEXT_DIM, POOLED_DIM = 7, 24, 12
STEPS, SHIFT = 6, 7.0


def randomise(module: torch.nn.Module, seed: int, std: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data.normal_(0, std, generator=generator)


def build_models(
    guidance_embed: bool,
    image_condition: ImageCondition = ImageCondition.none,
    in_channels: int = 4,
) -> tuple[HunyuanVideo, HunyuanVideoTransformer3DModel]:
    """Return our model and the diffusers one with the same random weights, zero-free."""
    cfg = HunyuanConfig(
        hidden_size=64,
        num_heads=4,
        num_double_blocks=2,
        num_single_blocks=2,
        in_channels=in_channels,
        out_channels=4,
        image_condition=image_condition,
        rope_axes=[4, 6, 6],
        text_dim=TEXT_DIM,
        pooled_dim=POOLED_DIM,
        refiner_depth=2,
        guidance_embed=guidance_embed,
    )
    ours = HunyuanVideo(cfg).eval()
    randomise(ours, 0, 0.1)
    tensors = ours.state_dict()
    converted = {}
    for link in hunyuan_links(cfg):
        parts = link.to_diffusers(tensors[link.ours])
        converted.update(zip(link.diffusers, parts, strict=True))
    arguments = {k: v for k, v in diffusers_config(cfg).items() if not k.startswith("_")}
    theirs = HunyuanVideoTransformer3DModel(**arguments).eval()
    theirs.load_state_dict(converted, strict=True)
    return ours, theirs


def build_vaes() -> tuple[Vae, AutoencoderKLHunyuanVideo]:
    sizes = {"latent_channels": 4, "layers_per_block": 1}
    ours = build_vae(VaeConfig(block_channels=[8, 8, 8, 8], norm_groups=4, **sizes)).eval()
    randomise(ours, 1, 0.2)
    theirs = AutoencoderKLHunyuanVideo(
        block_out_channels=(8, 8, 8, 8), norm_num_groups=4, **sizes
    ).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    theirs.use_framewise_decoding = False  # on by default there from the fifth latent frame
    return ours, theirs


def random_features(seed: int, lengths: list[int]) -> TextFeatures:
    generator = torch.Generator().manual_seed(seed)
    batch = len(lengths)
    return TextFeatures(
        states=torch.randn(batch, TEXT_LENGTH, TEXT_DIM, generator=generator),
        mask=torch.arange(TEXT_LENGTH)[None] < torch.tensor(lengths)[:, None],
        pooled=torch.randn(batch, POOLED_DIM, generator=generator),
    )


def run_pipeline(
    transformer: HunyuanVideoTransformer3DModel,
    vae: AutoencoderKLHunyuanVideo,
    noise: torch.Tensor,
    features: TextFeatures,
    negative: TextFeatures | None,
    cfg_scale: float,
    guidance: float,
    output_type: str,
) -> torch.Tensor:
    pipeline = HunyuanVideoPipeline(
        text_encoder=None,
        tokenizer=None,
        transformer=transformer,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        text_encoder_2=None,
        tokenizer_2=None,
    )
    pipeline.set_progress_bar_config(disable=True)
    if negative is not None:
        negative_arguments = {
            "negative_prompt_embeds": negative.states,
            "negative_prompt_attention_mask": negative.mask,
            "negative_pooled_prompt_embeds": negative.pooled,
        }
    else:
        negative_arguments = {}
    return pipeline(
        prompt_embeds=features.states,
        prompt_attention_mask=features.mask,
        pooled_prompt_embeds=features.pooled,
        **negative_arguments,
        true_cfg_scale=cfg_scale,
        guidance_scale=guidance,
        num_inference_steps=STEPS,
        height=HEIGHT,
        width=WIDTH,
        num_frames=FRAMES,
        latents=noise.clone(),
        output_type=output_type,
        return_dict=False,
    )[0]


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("batched_cfg", [True, False])
@pytest.mark.parametrize("cfg_scale", [1.0, 4.5])
@pytest.mark.parametrize("guidance_embed", [True, False])
def test_latents_equal_the_pipeline(
    guidance_embed: bool, cfg_scale: float, batched_cfg: bool
) -> None:
    ours, theirs = build_models(guidance_embed)
    _, their_vae = build_vaes()
    noise = torch.randn(2, *LATENT_SHAPE, generator=torch.Generator().manual_seed(5))
    features = random_features(2, [7, 3])
    negative = random_features(3, [1, 5]) if cfg_scale != 1 else None
    expected = run_pipeline(theirs, their_vae, noise, features, negative, cfg_scale, 6.0, "latent")
    latents = sample_latents(
        ours,
        noise,
        features,
        negative,
        steps=STEPS,
        shift=SHIFT,
        cfg_scale=cfg_scale,
        guidance=6.0 if guidance_embed else None,
        batched_cfg=batched_cfg,
    )
    assert relative_error(latents, expected) <= 1e-5
    # The run went somewhere: text and guidance would be invisible in a result that is still noise.
    assert relative_error(noise, expected) > 0.1


def test_text_guidance_and_scale_change_the_result() -> None:
    """Guards the test above: each input must matter far more than its tolerance."""
    ours, _ = build_models(guidance_embed=True)
    noise = torch.randn(1, *LATENT_SHAPE, generator=torch.Generator().manual_seed(5))
    features, other = random_features(2, [7]), random_features(3, [5])

    def run(text: TextFeatures, guidance: float = 6.0, cfg_scale: float = 1.0) -> torch.Tensor:
        return sample_latents(
            ours,
            noise,
            text,
            other,
            steps=STEPS,
            shift=SHIFT,
            cfg_scale=cfg_scale,
            guidance=guidance,
        )

    base = run(features)
    for changed in (run(other), run(features, guidance=6.016), run(features, cfg_scale=2.0)):
        assert relative_error(changed, base) > 1e-3


def test_decoded_pixels_equal_the_pipeline() -> None:
    ours, theirs = build_models(guidance_embed=True)
    our_vae, their_vae = build_vaes()
    noise = torch.randn(1, *LATENT_SHAPE, generator=torch.Generator().manual_seed(5))
    features = random_features(2, [4])
    expected = run_pipeline(theirs, their_vae, noise, features, None, 1.0, 6.0, "pt")
    latents = sample_latents(ours, noise, features, steps=STEPS, shift=SHIFT, guidance=6.0)
    pixels = decode_latents(our_vae, latents)
    assert pixels.shape == (1, 3, FRAMES, HEIGHT, WIDTH)
    ours_unit = (pixels / 2 + 0.5).transpose(1, 2)  # [B, F, 3, H, W] in [0, 1], as the pipeline
    assert expected.std() > 0.05
    torch.testing.assert_close(ours_unit, expected, rtol=0, atol=2e-5)
