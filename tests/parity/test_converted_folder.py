"""A run's folder, converted whole, samples in diffusers' pipelines what our sampler samples."""

import warnings
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    HunyuanVideoImageToVideoPipeline,
    HunyuanVideoPipeline,
)
from PIL import Image
from safetensors.torch import load_file
from test_sampler_pipeline import (
    FRAMES,
    HEIGHT,
    LATENT_SHAPE,
    STEPS,
    WIDTH,
    random_features,
    randomise,
    relative_error,
)
from torch import nn

from hunyuan_train.checkpoint.config import CheckpointConfig
from hunyuan_train.checkpoint.manager import CheckpointManager
from hunyuan_train.cli.convert import main
from hunyuan_train.config.compose import compose_config, config_dict, save_config
from hunyuan_train.data.buckets import Bucket
from hunyuan_train.evaluation.given import encode_given
from hunyuan_train.evaluation.prompts import Prompt
from hunyuan_train.evaluation.sample import decode_latents, sample_latents
from hunyuan_train.models.hunyuan.config import HunyuanConfig, ImageCondition
from hunyuan_train.models.hunyuan.model import HunyuanVideo
from hunyuan_train.models.lora_config import LoraConfig
from hunyuan_train.models.vae.config import VaeConfig
from hunyuan_train.models.vae.model import CausalVae3D
from hunyuan_train.models.vae.state_dict import save_vae

SHIFT = 5.0
BUCKET = Bucket(FRAMES, HEIGHT, WIDTH)
SIZES = {
    "hidden_size": 64,
    "num_heads": 4,
    "num_double_blocks": 2,
    "num_single_blocks": 2,
    "out_channels": 4,
    "rope_axes": [4, 6, 6],
    "text_dim": 24,
    "pooled_dim": 12,
    "refiner_depth": 2,
    "guidance_embed": True,
}


def write_run(
    folder: Path, form: ImageCondition, lora: LoraConfig | None = None
) -> tuple[HunyuanVideo, CausalVae3D]:
    """Write config, VAE and a checkpoint with weights and average; return average and VAE.

    With adapters these are the average, and the frozen weights are those of the average without.
    """
    channels = 9 if form is ImageCondition.concat else 4
    cfg = HunyuanConfig(in_channels=channels, image_condition=form, **SIZES)
    last, average = HunyuanVideo(cfg).eval(), HunyuanVideo(cfg).eval()
    randomise(last, 3, 0.1)
    randomise(average, 4, 0.1)
    vae = CausalVae3D(
        VaeConfig(
            latent_channels=4,
            block_channels=[8, 8, 8, 8],
            layers_per_block=1,
            norm_groups=4,
            scaling_factor=0.7,
        )
    ).eval()
    randomise(vae, 1, 0.2)
    save_vae(vae, folder / "vae")
    fields = {**SIZES, "in_channels": channels, "image_condition": form.value}
    texts = [f"model.{k}={str(v).replace(' ', '')}" for k, v in fields.items()]
    extra = [f"sample.shift={SHIFT}", f"run.vae={folder / 'vae'}", "vae.latent_channels=4"]
    extra += ["text.text_dim=24", "text.pooled_dim=12"]
    save_config(compose_config([*texts, *extra]), folder / "config.yaml")
    sections = {"model": last.state_dict(), "ema": average.state_dict()}
    identity = config_dict(cfg)
    if lora is not None:
        adapters = random_adapters(average, lora)
        sections = {"model": {**average.state_dict(), **adapters}, "ema": adapters}
        identity["lora"] = asdict(lora)
    manager = CheckpointManager(folder / "checkpoints", CheckpointConfig(), identity=identity)
    assert manager.save(2, sections, extra={})
    return average, vae


def random_adapters(model: HunyuanVideo, lora: LoraConfig) -> dict[str, torch.Tensor]:
    """Return both halves of an adapter for each linear that the config names."""
    generator = torch.Generator().manual_seed(7)
    adapters = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and any(fnmatchcase(name, p) for p in lora.targets):
            shapes = {"A": (lora.rank, module.in_features), "B": (module.out_features, lora.rank)}
            for half, shape in shapes.items():
                tensor = 0.1 * torch.randn(shape, generator=generator)
                adapters[f"{name}.lora_{half}.weight"] = tensor
    return adapters


def convert(source: str, target: str, path: Path, output: Path, *extra: str) -> None:
    arguments = [f"from={source}", f"to={target}", "model=pipeline", f"input={path}"]
    assert main([*arguments, f"output={output}", *extra]) == 0


def load_pipeline(folder: Path, expected: type) -> DiffusionPipeline:
    """Load by the general class, which finds the kind of pipeline in ``model_index.json``."""
    absent = ["text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"]
    absent += ["image_processor"] if expected is HunyuanVideoImageToVideoPipeline else []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline = DiffusionPipeline.from_pretrained(
            folder, torch_dtype=torch.float32, **dict.fromkeys(absent)
        )
    assert type(pipeline) is expected
    assert pipeline.scheduler.config.shift == SHIFT
    assert pipeline.vae.config.scaling_factor == 0.7
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def run_pipeline(pipeline: DiffusionPipeline, noise: torch.Tensor, **extra) -> torch.Tensor:
    features = random_features(2, [4] * len(noise))
    return pipeline(
        prompt_embeds=features.states,
        prompt_attention_mask=features.mask,
        pooled_prompt_embeds=features.pooled,
        guidance_scale=6.0,
        num_inference_steps=STEPS,
        height=HEIGHT,
        width=WIDTH,
        num_frames=FRAMES,
        latents=noise.clone(),
        return_dict=False,
        **extra,
    )[0]


def test_text_to_video(tmp_path: Path) -> None:
    ours, vae = write_run(tmp_path / "run", ImageCondition.none)
    convert("ours", "diffusers", tmp_path / "run", tmp_path / "theirs", "ema=true")
    pipeline = load_pipeline(tmp_path / "theirs", HunyuanVideoPipeline)
    noise = torch.randn(1, *LATENT_SHAPE, generator=torch.Generator().manual_seed(5))
    latents = sample_latents(
        ours, noise, random_features(2, [4]), steps=STEPS, shift=SHIFT, guidance=6.0
    )
    assert relative_error(latents, run_pipeline(pipeline, noise, output_type="latent")) <= 1e-5
    assert relative_error(noise, latents) > 0.1
    expected = run_pipeline(pipeline, noise, output_type="pt")
    pixels = (decode_latents(vae, latents) / 2 + 0.5).transpose(1, 2)
    assert expected.std() > 0.05
    torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("form", [ImageCondition.token_replace, ImageCondition.concat])
def test_image_to_video(form: ImageCondition, tmp_path: Path) -> None:
    ours, vae = write_run(tmp_path / "run", form)
    convert("ours", "diffusers", tmp_path / "run", tmp_path / "theirs", "ema=true")
    pipeline = load_pipeline(tmp_path / "theirs", HunyuanVideoImageToVideoPipeline)
    picture = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    Image.fromarray(picture).save(tmp_path / "first.png")
    prompt = Prompt(prompt="", image=str(tmp_path / "first.png"))
    given = encode_given(vae, [prompt], BUCKET, form, torch.device("cpu"))
    assert given is not None
    noise = torch.randn(1, *LATENT_SHAPE, generator=torch.Generator().manual_seed(5))
    image = Image.open(tmp_path / "first.png")
    start = 0.999 * noise + 0.001 * given.latents[:, :, :1]  # as the pipeline starts
    latents = sample_latents(
        ours, start, random_features(2, [4]), steps=STEPS, shift=SHIFT, guidance=6.0, given=given
    )
    expected = run_pipeline(pipeline, noise, image=[image], output_type="pt")
    kept = 1 if form is ImageCondition.concat else 0  # latent frames the pipeline drops
    shown = run_pipeline(pipeline, noise, image=[image], output_type="latent")
    assert relative_error(latents[:, :, kept:], shown) <= 1e-5
    pixels = (decode_latents(vae, latents) / 2 + 0.5).transpose(1, 2)[:, 4 * kept :]
    assert expected.std() > 0.05
    torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-4)


def test_adapters_for_a_pipeline_are_those_that_are_merged(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    lora = LoraConfig(rank=3, alpha=6, targets=["*.linear1", "*.linear2", "*qkv", "*proj", "*.fc?",
                                                "*adaLN_modulation.1", "*mod.linear"])  # fmt: skip
    write_run(tmp_path / "base", ImageCondition.none)
    write_run(tmp_path / "run", ImageCondition.none, lora)
    for name in ("base", "run"):
        convert("ours", "diffusers", tmp_path / name, tmp_path / f"{name}_theirs", "ema=true")
    arguments = ["from=ours", "to=diffusers-lora", "model=transformer", "ema=true"]
    assert main([*arguments, f"input={tmp_path / 'run'}", f"output={tmp_path / 'lora'}"]) == 0
    keys = load_file(tmp_path / "lora" / "pytorch_lora_weights.safetensors").keys()
    assert "transformer.single_transformer_blocks.1.proj_mlp.lora_B.weight" in keys
    assert "transformer.norm_out.linear.lora_B.weight" in keys

    base = load_pipeline(tmp_path / "base_theirs", HunyuanVideoPipeline)
    merged = load_pipeline(tmp_path / "run_theirs", HunyuanVideoPipeline)
    noise = torch.randn(1, *LATENT_SHAPE, generator=torch.Generator().manual_seed(5))
    without = run_pipeline(base, noise, output_type="latent")
    wanted = run_pipeline(merged, noise, output_type="latent")
    base.load_lora_weights(tmp_path / "lora")
    found = run_pipeline(base, noise, output_type="latent")
    assert relative_error(without, wanted) > 0.05
    assert relative_error(found, wanted) <= 1e-4
