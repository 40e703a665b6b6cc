"""Our VAE against diffusers' AutoencoderKLHunyuanVideo, float32, every weight random.

diffusers tiles in time by default; each test sets its flags and tile sizes to ours.
"""

import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo
from torch import Tensor

from hunyuan_train.models.vae.base import Vae
from hunyuan_train.models.vae.build import build_vae
from hunyuan_train.models.vae.config import VaeConfig
from hunyuan_train.models.vae.state_dict import config_from_released, config_to_released

RELATIVE_ERROR = 2e-5


def tiny(**changes) -> VaeConfig:
    sizes = {
        "latent_channels": 4,
        "block_channels": [8, 16, 16, 16],
        "layers_per_block": 1,
        "norm_groups": 4,
        "tile_spatial": False,
        "tile_temporal": False,
    }
    return VaeConfig(**(sizes | changes))


def pair(cfg: VaeConfig) -> tuple[Vae, AutoencoderKLHunyuanVideo]:
    """Return ours with random weights and theirs with the same."""
    ours = build_vae(cfg)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            neutral = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.normal_(neutral, 0.1, generator=generator)
    theirs = AutoencoderKLHunyuanVideo(**config_to_released(cfg))
    theirs.load_state_dict(ours.state_dict(), strict=True)
    theirs.use_framewise_encoding = theirs.use_framewise_decoding = cfg.tile_temporal
    if cfg.tile_spatial:
        theirs.enable_tiling()
    theirs.tile_sample_min_height = theirs.tile_sample_min_width = cfg.tile_size_px
    theirs.tile_sample_stride_height = theirs.tile_sample_stride_width = cfg.tile_stride_px
    theirs.tile_sample_min_num_frames = cfg.tile_frames
    theirs.tile_sample_stride_num_frames = cfg.tile_stride_frames
    return ours, theirs


def video(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 2 - 1


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    assert (ours - theirs).norm() / theirs.norm() <= RELATIVE_ERROR


def compare(cfg: VaeConfig, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Compare both directions; return our mean and our decoded pixels."""
    ours, theirs = pair(cfg)
    with torch.no_grad():
        expected = theirs.encode(pixels).latent_dist
        posterior = ours.encode(pixels)
        assert_close(posterior.mean, expected.mean)
        assert_close(posterior.logvar, expected.logvar)
        assert_close(posterior.std, expected.std)
        decoded = ours.decode(expected.mean)
        assert_close(decoded, theirs.decode(expected.mean).sample)
    return posterior.mean, decoded


@pytest.mark.parametrize(
    "shape",
    [(1, 3, 1, 32, 32), (3, 3, 1, 24, 40), (2, 3, 9, 40, 24), (1, 3, 33, 32, 16)],
    ids=["image", "images", "clips", "long_clip"],
)
def test_untiled(shape):
    latents, decoded = compare(tiny(), video(*shape))
    batch, _, frames, height, width = shape
    assert latents.shape == (batch, 4, (frames - 1) // 4 + 1, height // 8, width // 8)
    assert decoded.shape == shape


@pytest.mark.parametrize(
    "changes",
    [
        {"mid_attention": False},
        {"layers_per_block": 2, "norm_groups": 2},
        {"block_channels": [4, 8, 12, 20], "latent_channels": 3},
    ],
    ids=["no_attention", "two_layers", "widths"],
)
def test_other_architectures(changes):
    compare(tiny(**changes), video(1, 3, 5, 16, 24))


# Tile 64 and stride 48 px: 96 is two strides, 104 leaves a tile 8 px wide, 136 is no multiple.
@pytest.mark.parametrize("size", [(72, 64), (64, 136), (96, 104), (152, 136)])
def test_spatial_tiles(size):
    cfg = tiny(tile_spatial=True, tile_size_px=64)
    pixels = video(1, 3, 1 if max(size) > 104 else 5, *size)
    tiled_mean, _ = compare(cfg, pixels)
    untiled_mean, _ = compare(tiny(), pixels)
    # The case would prove nothing if tiling were never reached.
    assert not torch.allclose(tiled_mean, untiled_mean, atol=1e-4)


# Tile 16 and stride 12 frames: 25 leaves one frame for the last tile, which is dropped.
@pytest.mark.parametrize("frames", [21, 25, 33, 37])
def test_temporal_tiles(frames):
    cfg = tiny(tile_temporal=True, tile_frames=16)
    pixels = video(1, 3, frames, 24, 16)
    tiled_mean, _ = compare(cfg, pixels)
    untiled_mean, _ = compare(tiny(), pixels)
    assert not torch.allclose(tiled_mean, untiled_mean, atol=1e-4)


def test_tiles_in_time_and_space():
    cfg = tiny(tile_spatial=True, tile_temporal=True, tile_size_px=32, tile_frames=16)
    compare(cfg, video(2, 3, 21, 56, 40))


# Tile 16/12 frames and 32/24 px: 37 frames leave one alone, 40 x 72 px a strip of 16 and of 24.
@pytest.mark.parametrize("shape", [(37, 40, 72), (25, 32, 56), (17, 8, 40), (5, 88, 8)])
def test_odd_sizes_in_time_and_space(shape):
    cfg = tiny(tile_spatial=True, tile_temporal=True, tile_size_px=32, tile_frames=16)
    compare(cfg, video(1, 3, *shape))


@pytest.mark.parametrize("tiles", [False, True], ids=["whole", "tiled"])
def test_the_first_frame_alone_is_an_image(tiles):
    cfg = tiny(tile_spatial=tiles, tile_temporal=tiles, tile_size_px=32, tile_frames=16)
    ours, theirs = pair(cfg)
    pixels = video(1, 3, 21, 56, 40)
    with torch.no_grad():
        alone, image = ours.encode(pixels[:, :, :1]), theirs.encode(pixels[:, :, :1]).latent_dist
        clip = ours.encode(pixels)
    assert_close(alone.mean, image.mean)
    assert_close(alone.std, image.std)
    # Norms run over the whole clip: its first latent is another.
    assert not torch.allclose(alone.mean, clip.mean[:, :, :1], atol=1e-4)


def test_other_overlap():
    cfg = tiny(tile_spatial=True, tile_size_px=64, tile_overlap=0.5)
    compare(cfg, video(1, 3, 1, 104, 88))


@pytest.mark.slow
def test_published_tile_sizes():
    cfg = tiny(block_channels=[4, 4, 4, 4], norm_groups=2, tile_spatial=True, tile_temporal=True)
    assert (cfg.tile_size_px, cfg.tile_stride_px) == (256, 192)
    assert (cfg.tile_frames, cfg.tile_stride_frames) == (64, 48)
    compare(cfg, video(1, 3, 69, 264, 32))
    compare(cfg, video(1, 3, 1, 272, 456))


def test_gradients():
    ours, theirs = pair(tiny())
    pixels, noise = video(2, 3, 5, 24, 16), video(2, 4, 2, 3, 2)
    expected = theirs.encode(pixels).latent_dist
    latents = expected.mean + expected.std * noise
    theirs.decode(latents).sample.square().mean().backward()
    ours.decode(ours.encode(pixels).sample(noise)).square().mean().backward()
    wanted = {name: value.grad for name, value in theirs.named_parameters()}
    for name, value in ours.named_parameters():
        # A key bias shifts all scores of a query alike: its gradient is rounding noise around 0.
        if not name.endswith("to_k.bias"):
            error = (value.grad - wanted[name]).norm() / wanted[name].norm()
            assert error <= RELATIVE_ERROR, name


def test_config_round_trip():
    cfg = VaeConfig()
    with torch.device("meta"):
        defaults = dict(AutoencoderKLHunyuanVideo().config)
    assert config_from_released(defaults) == cfg
    assert (
        config_to_released(cfg).items()
        <= {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in defaults.items()
        }.items()
    )
