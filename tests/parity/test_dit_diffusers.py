"""Our transformer against diffusers' HunyuanVideoTransformer3DModel, float32, every weight random.

Zero-initialised gates would hide most mistakes, so all weights, modulations included, are drawn
from N(0, 0.1^2) around their neutral value.
"""

import pytest
import torch
from diffusers import HunyuanVideoTransformer3DModel
from torch import Tensor

from hunyuan_train.models.hunyuan.config import HunyuanConfig, ImageCondition
from hunyuan_train.models.hunyuan.model import HunyuanVideo
from hunyuan_train.models.hunyuan.state_dict import diffusers_config, hunyuan_links

RELATIVE_ERROR = 1e-5
LENGTHS = {"one": [5], "ragged": [7, 3, 1], "full": [7, 7]}


def tiny(guidance: bool, **changes) -> HunyuanConfig:
    sizes = {
        "hidden_size": 64,
        "num_heads": 4,
        "num_double_blocks": 2,
        "num_single_blocks": 2,
        "in_channels": 16,
        "out_channels": 16,
        "rope_axes": [4, 6, 6],
        "text_dim": 24,
        "pooled_dim": 12,
        "refiner_depth": 2,
        "guidance_embed": guidance,
    }
    return HunyuanConfig(**(sizes | changes))


def randomised(cfg: HunyuanConfig, seed: int = 0) -> HunyuanVideo:
    model = HunyuanVideo(cfg)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            neutral = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.normal_(neutral, 0.1, generator=generator)
    return model


def as_diffusers(cfg: HunyuanConfig, model: HunyuanVideo) -> HunyuanVideoTransformer3DModel:
    arguments = {k: v for k, v in diffusers_config(cfg).items() if not k.startswith("_")}
    theirs = HunyuanVideoTransformer3DModel(**arguments)
    ours = model.state_dict()
    state: dict[str, Tensor] = {}
    for link in hunyuan_links(cfg):
        state |= dict(zip(link.diffusers, link.to_diffusers(ours[link.ours]), strict=True))
    theirs.load_state_dict(state, strict=True)
    return theirs


def inputs(cfg: HunyuanConfig, lengths: list[int], seed: int = 1) -> dict[str, Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    batch, text_tokens = len(lengths), 7
    mask = torch.arange(text_tokens)[None] < torch.tensor(lengths)[:, None]
    return {
        "latents": torch.randn(batch, cfg.in_channels, 3, 6, 4, generator=generator),
        "time": torch.rand(batch, generator=generator) * 1000,
        "text": torch.randn(batch, text_tokens, cfg.text_dim, generator=generator),
        "text_mask": mask,
        "pooled": torch.randn(batch, cfg.pooled_dim, generator=generator),
        "guidance": torch.rand(batch, generator=generator) * 8000 if cfg.guidance_embed else None,
    }


def run_diffusers(theirs: HunyuanVideoTransformer3DModel, batch: dict) -> Tensor:
    return theirs(
        hidden_states=batch["latents"],
        timestep=batch["time"],
        encoder_hidden_states=batch["text"],
        encoder_attention_mask=batch["text_mask"],
        pooled_projections=batch["pooled"],
        guidance=batch["guidance"],
        return_dict=False,
    )[0]


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


def check_output_and_every_gradient(cfg: HunyuanConfig, lengths: list[int], **more: Tensor):
    model = randomised(cfg)
    theirs = as_diffusers(cfg, model)
    batch = inputs(cfg, lengths)
    out, expected = model(**batch, **more), run_diffusers(theirs, batch)
    assert out.shape == expected.shape
    assert relative(out, expected) <= RELATIVE_ERROR

    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    their_grads = {name: p.grad for name, p in theirs.named_parameters()}
    for link in hunyuan_links(cfg):
        grad = model.get_parameter(link.ours).grad
        joined = link.from_diffusers([their_grads[name] for name in link.diffusers])
        assert joined.abs().max() > 0, link.ours
        assert relative(grad, joined) <= RELATIVE_ERROR, link.ours


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("guidance", [False, True], ids=["plain", "guidance"])
def test_output_and_every_gradient(guidance, lengths):
    check_output_and_every_gradient(tiny(guidance), lengths)


@pytest.mark.parametrize("lengths", [LENGTHS["ragged"]], ids=["ragged"])
@pytest.mark.parametrize("guidance", [False, True], ids=["plain", "guidance"])
def test_replaced_first_frame(guidance, lengths):
    cfg = tiny(guidance, image_condition=ImageCondition.token_replace)
    first = torch.arange(3).expand(len(lengths), 3) == 0
    check_output_and_every_gradient(cfg, lengths, given=first)


def test_concatenated_frames_and_mask():
    cfg = tiny(False, image_condition=ImageCondition.concat, in_channels=33)
    check_output_and_every_gradient(cfg, LENGTHS["ragged"])


@pytest.mark.parametrize(
    "changes",
    [
        {"patch_size": [2, 2, 2], "mlp_ratio": 2.0, "refiner_depth": 0},
        {"in_channels": 33, "num_single_blocks": 0},
        {"num_double_blocks": 0, "refiner_depth": 1, "rope_theta": 10000.0},
    ],
    ids=["patch2", "in33-double-only", "single-only"],
)
def test_other_shapes(changes):
    cfg = tiny(False, **changes)
    model = randomised(cfg)
    batch = inputs(cfg, [7, 2])
    batch["latents"] = torch.randn(2, cfg.in_channels, 4, 4, 6)
    with torch.no_grad():
        expected = run_diffusers(as_diffusers(cfg, model), batch)
        assert relative(model(**batch), expected) <= RELATIVE_ERROR
