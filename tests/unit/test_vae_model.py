"""The VAE's shape on the meta device, its posterior, what it refuses, and its folder on disk."""

import json
import math

import pytest
import torch
from torch import Tensor

from hunyuan_train.config.compose import compose_config
from hunyuan_train.models.vae.base import Posterior, check_pixels
from hunyuan_train.models.vae.build import build_vae
from hunyuan_train.models.vae.config import VaeConfig
from hunyuan_train.models.vae.layers import CausalConv3d, FrameCausalAttention
from hunyuan_train.models.vae.state_dict import load_vae, save_vae


def tiny(**changes) -> VaeConfig:
    sizes = {
        "latent_channels": 4,
        "block_channels": [4, 4, 8, 8],
        "layers_per_block": 1,
        "norm_groups": 2,
    }
    return VaeConfig(**(sizes | changes))


def randomised(module: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0.0, 0.2, generator=generator)
    return module


def test_released_size_and_keys():
    with torch.device("meta"):
        state = build_vae(VaeConfig()).state_dict()
    assert len(state) == 248
    assert sum(value.numel() for value in state.values()) == 246_478_803
    assert sum(v.numel() for k, v in state.items() if k.startswith("encoder.")) == 100_341_408
    assert sum(v.numel() for k, v in state.items() if k.startswith("decoder.")) == 146_136_067
    # One key of every kind the released file has.
    assert {
        "encoder.conv_in.conv.weight",
        "encoder.down_blocks.1.resnets.0.conv_shortcut.conv.bias",
        "encoder.down_blocks.2.downsamplers.0.conv.conv.weight",
        "encoder.mid_block.attentions.0.to_out.0.weight",
        "encoder.mid_block.attentions.0.group_norm.bias",
        "encoder.conv_norm_out.weight",
        "encoder.conv_out.conv.weight",
        "decoder.mid_block.resnets.1.norm2.weight",
        "decoder.up_blocks.3.resnets.0.conv_shortcut.conv.weight",
        "decoder.up_blocks.0.upsamplers.0.conv.conv.bias",
        "quant_conv.weight",
        "post_quant_conv.bias",
    } <= state.keys()
    assert "encoder.down_blocks.3.downsamplers.0.conv.conv.weight" not in state


@pytest.mark.parametrize("name", ["hunyuan_884", "tiny"])
def test_shipped_configs(name):
    cfg = compose_config([f"vae={name}"]).vae
    if name == "hunyuan_884":
        assert cfg == VaeConfig()
    assert cfg.latent_channels == 16


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 6, 16, 16), r"6 frames .* 4n\+1, nearest are 5 and 9"),
        ((1, 3, 0, 16, 16), r"0 frames .* nearest are 1 and 5"),
        ((1, 3, 5, 20, 16), "height of 20 px .* multiple of 8, nearest are 16 and 24"),
        ((1, 3, 5, 16, 4), "width of 4 px .* nearest are 8 and 16"),
        ((1, 4, 5, 16, 16), r"\[1, 4, 5, 16, 16\] .* \[batch, 3, frames, height, width\]"),
    ],
)
def test_refuses_pixels_that_do_not_fit(shape, message):
    with pytest.raises(ValueError, match=message):
        build_vae(tiny()).encode(torch.zeros(shape))


def test_refuses_a_video_without_its_batch():
    with pytest.raises(ValueError, match=r"\[3, 5, 16, 16\] cannot be encoded"):
        check_pixels(torch.Size((3, 5, 16, 16)), tiny())


def test_refuses_foreign_latents():
    with pytest.raises(ValueError, match=r"\[1, 16, 1, 2, 2\] cannot be decoded; .*\[batch, 4,"):
        build_vae(tiny()).decode(torch.zeros(1, 16, 1, 2, 2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "vae_16"}, "vae.kind='vae_16' is unknown"),
        ({"block_channels": [8, 8]}, r"vae.block_channels=\[8, 8\] needs 4 entries"),
        ({"norm_groups": 3}, r"vae.norm_groups=3 must divide every entry"),
        ({"scaling_factor": 0.0}, "vae.scaling_factor=0.0 must be positive"),
        ({"tile_overlap": 1.0}, r"vae.tile_overlap=1.0 must be in \[0, 1\)"),
        ({"tile_size_px": 100}, "vae.tile_size_px=100 .* stride of 75; .* multiples of 8"),
        ({"tile_frames": 8}, "vae.tile_frames=8 .* stride of 6; .* multiples of 4"),
        ({"latent_channels": 0}, "vae.latent_channels=0 must be at least 1"),
    ],
)
def test_config_names_the_wrong_field(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


def test_posterior():
    mean, std = torch.tensor([[[1.0, -2.0]]]), torch.tensor([[[0.5, 2.0]]])
    posterior = Posterior(mean, std)
    noise = torch.tensor([[[3.0, -1.0]]])
    assert torch.equal(posterior.mode(), mean)
    assert torch.equal(posterior.sample(noise), torch.tensor([[[2.5, -4.0]]]))
    oracle = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, std), torch.distributions.Normal(0.0, 1.0)
    )
    torch.testing.assert_close(posterior.kl(), oracle.sum(dim=(1, 2)))
    assert Posterior(torch.zeros(3, 2, 2, 2, 2), torch.ones(3, 2, 2, 2, 2)).kl().tolist() == [0] * 3


def test_standard_deviation_is_clamped():
    vae = build_vae(tiny())
    with torch.no_grad():
        vae.quant_conv.bias[4:6] = 1e4
        vae.quant_conv.bias[6:] = -1e4
        std = vae.encode(torch.zeros(1, 3, 1, 8, 8)).std
    assert std[:, :2].unique().item() == pytest.approx(math.exp(10), rel=1e-5)
    assert std[:, 2:].unique().item() == pytest.approx(math.exp(-15), rel=1e-5)


def test_scale_and_unscale():
    vae = build_vae(tiny(scaling_factor=0.25))
    latents = torch.tensor([4.0, -8.0]).view(1, 2, 1, 1, 1)
    assert vae.scale(latents).flatten().tolist() == [1.0, -2.0]
    assert torch.equal(vae.unscale(vae.scale(latents)), latents)


@pytest.mark.parametrize("stride", [(1, 1, 1), (2, 2, 2)])
def test_convolution_is_causal(stride):
    conv = randomised(CausalConv3d(3, 4, stride=stride))
    past = torch.randn(2, 3, 9, 8, 8, generator=torch.Generator().manual_seed(1))
    future = past.clone()
    future[:, :, 5:] += 1.0
    before, after = conv(past), conv(future)
    first = 5 if stride[0] == 1 else 3  # the first output frame that reads frame 5
    torch.testing.assert_close(before[:, :, :first], after[:, :, :first])
    assert not torch.allclose(before[:, :, first], after[:, :, first])


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("frames", [1, 5])
def test_convolution_shortcuts_change_nothing(grad, frames):
    # One frame runs as a 2-D convolution, a batch of one goes to oneDNN when no gradient is wanted.
    conv = randomised(CausalConv3d(3, 4, stride=(2, 2, 2)))
    x = torch.randn(1, 3, frames, 8, 16, generator=torch.Generator().manual_seed(1))
    padded = torch.nn.functional.pad(x, (1, 1, 1, 1, 2, 0), mode="replicate")
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(conv(x), conv.conv(padded), rtol=1e-5, atol=1e-5)


def test_attention_sees_no_later_frame():
    attention = randomised(FrameCausalAttention(8, 2))
    attention.group_norm = torch.nn.Identity()  # its statistics are not causal, see the module
    past = torch.randn(1, 8, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    future = past.clone()
    future[:, :, 2] += 1.0
    before, after = attention(past), attention(future)
    assert torch.equal(before[:, :, :2], after[:, :, :2])
    assert not torch.allclose(before[:, :, 2], after[:, :, 2])
    # Within a frame the later positions count.
    future = past.clone()
    future[:, :, 0, 1, 1] += 1.0
    assert not torch.allclose(before[:, :, 0, 0, 0], attention(future)[:, :, 0, 0, 0])


def test_group_norm_leaks_the_future():
    # The released architecture does this; a change would no longer load its weights faithfully.
    vae = randomised(build_vae(tiny()))
    video = torch.rand(1, 3, 9, 16, 16, generator=torch.Generator().manual_seed(1))
    changed = video.clone()
    changed[:, :, 5:] = -1.0
    assert not torch.allclose(vae.encode(video).mean[:, :, 0], vae.encode(changed).mean[:, :, 0])


def test_initial_weights():
    with torch.device("meta"):
        vae = build_vae(tiny())
    vae = vae.to_empty(device="cpu")
    for parameter in vae.parameters():
        torch.nn.init.constant_(parameter, math.nan)
    vae.init_weights()
    assert all(parameter.isfinite().all() for parameter in vae.parameters())
    posterior = vae.encode(torch.rand(2, 3, 5, 16, 16) * 2 - 1)
    assert 0.01 < posterior.std.mean() < 0.2
    block = vae.encoder.down_blocks[0].resnets[0]
    x = torch.randn(1, 4, 1, 4, 4)
    assert torch.equal(block(x), x)


def test_folder_round_trip(tmp_path):
    vae = randomised(build_vae(tiny(scaling_factor=0.7)))
    save_vae(vae, tmp_path / "vae")
    again = load_vae(tmp_path / "vae")
    assert again.cfg == vae.cfg
    assert not again.training
    state: dict[str, Tensor] = again.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in vae.state_dict().items())
    assert sorted(path.name for path in (tmp_path / "vae").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


def test_load_says_what_is_missing_or_wrong(tmp_path):
    with pytest.raises(ValueError, match=r"config.json does not exist; a VAE folder holds config"):
        load_vae(tmp_path)
    save_vae(build_vae(tiny()), tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    good = weights.read_bytes()
    weights.unlink()
    with pytest.raises(
        ValueError, match=r"model.safetensors does not exist; .*hunyuan-train convert"
    ):
        load_vae(tmp_path)
    weights.write_bytes(good[: len(good) // 2])
    with pytest.raises(ValueError, match=r"model.safetensors is damaged \(.*copy or make it again"):
        load_vae(tmp_path)
    weights.write_bytes(good)
    fields = json.loads(config.read_text())
    config.write_text(json.dumps(fields | {"latent_channels": 6}))
    with pytest.raises(ValueError, match=r"quant_conv.weight|conv_out.* has shape .* needs"):
        load_vae(tmp_path)
    config.write_text(json.dumps(fields | {"mid_attention": False}))
    with pytest.raises(ValueError, match=r"has the unknown key .*attentions.0.* and 19 more"):
        load_vae(tmp_path)
    config.write_text(json.dumps(fields | {"colour": 1}))
    with pytest.raises(ValueError, match=r"config.json has the unknown field 'colour'"):
        load_vae(tmp_path)
    config.write_text("{")
    with pytest.raises(ValueError, match=r"config.json is not JSON"):
        load_vae(tmp_path)
