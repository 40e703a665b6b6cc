"""HunyuanVideo-1.5's VAE against diffusers' AutoencoderKLHunyuanVideo15, float32, all random."""

from functools import cache

import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo15
from torch import Tensor

from hunyuan_train.cli.main import main
from hunyuan_train.config.compose import compose_config
from hunyuan_train.models.vae.base import Vae
from hunyuan_train.models.vae.build import build_vae
from hunyuan_train.models.vae.config import VaeConfig
from hunyuan_train.models.vae.state_dict import (
    RELEASED_CLASSES,
    config_from_released,
    config_to_released,
    hunyuan_15_config,
    load_vae,
    save_vae,
)

RELATIVE_ERROR = 2e-5


def tiny(**changes) -> VaeConfig:
    sizes = {
        "kind": "vae_hy15",
        "latent_channels": 4,
        "block_channels": [4, 8, 16, 16, 16],
        "layers_per_block": 1,
        "tile_spatial": False,
        "tile_temporal": False,
    }
    return VaeConfig(**(sizes | changes))


@cache
def weights(seed: int = 0) -> dict[str, Tensor]:
    """Return values for every parameter of the tiny VAE, gains near 1."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.empty_like(value).normal_(float("gamma" in name), 0.1, generator=generator)
        for name, value in build_vae(tiny()).state_dict().items()
    }


def pair(**changes) -> tuple[Vae, AutoencoderKLHunyuanVideo15]:
    """Return ours with random weights and theirs with the same."""
    cfg = tiny(**changes)
    ours, theirs = build_vae(cfg), AutoencoderKLHunyuanVideo15(**config_to_released(cfg))
    ours.load_state_dict(weights())
    theirs.load_state_dict(weights(), strict=True)
    theirs.use_slicing = True  # its attention mask takes a batch of one only
    if cfg.tile_spatial:
        size = cfg.tile_size_px
        theirs.enable_tiling(size, size, size // 16, size // 16, cfg.tile_overlap)
    return ours, theirs


def video(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 2 - 1


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    assert (ours - theirs).norm() / theirs.norm() <= RELATIVE_ERROR


def compare(pixels: Tensor, **changes) -> Tensor:
    """Compare both directions; return our mean."""
    ours, theirs = pair(**changes)
    with torch.no_grad():
        expected, posterior = theirs.encode(pixels).latent_dist, ours.encode(pixels)
        assert_close(posterior.mean, expected.mean)
        assert_close(posterior.logvar, expected.logvar)
        decoded = ours.decode(expected.mean)
        assert_close(decoded, theirs.decode(expected.mean).sample)
    assert decoded.shape == pixels.shape
    return posterior.mean


@pytest.mark.parametrize(
    "shape",
    [(2, 3, 1, 32, 48), (1, 3, 5, 16, 80), (2, 3, 17, 48, 16)],
    ids=["images", "clip", "clips"],
)
def test_untiled(shape):
    latents = compare(video(*shape))
    batch, _, frames, height, width = shape
    assert latents.shape == (batch, 4, (frames - 1) // 4 + 1, height // 16, width // 16)


# Tile 64 and stride 48 px: 80 leaves a tile 32 px wide, 112 one of 16, 96 is two strides.
@pytest.mark.parametrize(
    "shape",
    [(1, 80, 48), (5, 112, 80), (1, 64, 176), (1, 96, 96)],
    ids=lambda s: "x".join(map(str, s)),
)
def test_tiled(shape):
    pixels = video(1, 3, *shape)
    tiled = compare(pixels, tile_spatial=True, tile_size_px=64)
    with torch.no_grad():
        whole = pair()[0].encode(pixels).mean
    assert not torch.allclose(tiled, whole, atol=1e-4)


def test_gradients():
    ours, theirs = pair()
    pixels, noise = video(1, 3, 5, 32, 16), video(1, 4, 2, 2, 1)
    expected = theirs.encode(pixels).latent_dist
    theirs.decode(expected.mean + expected.std * noise).sample.square().mean().backward()
    ours.decode(ours.encode(pixels).sample(noise)).square().mean().backward()
    wanted = {name: value.grad for name, value in theirs.named_parameters()}
    for name, value in ours.named_parameters():
        if not name.endswith("to_k.bias"):  # rounding noise around 0
            assert (value.grad - wanted[name]).norm() <= 5e-5 * wanted[name].norm(), name


def test_the_past_does_not_change_with_the_future():
    vae = pair()[0]
    pixels = video(1, 3, 17, 32, 32)
    changed = pixels.clone()
    changed[:, :, 9:] = video(1, 3, 8, 32, 32) * 0.5
    with torch.no_grad():
        before, after = vae.encode(pixels).mean, vae.encode(changed).mean
        decoded = vae.decode(before), vae.decode(after)
    assert (before[:, :, :3] - after[:, :, :3]).abs().max() == 0.0
    assert not torch.allclose(before[:, :, 3], after[:, :, 3])
    assert (decoded[0][:, :, :9] - decoded[1][:, :, :9]).abs().max() == 0.0


def test_an_image_is_the_first_frame_of_a_clip():
    ours, theirs = pair()
    pixels = video(1, 3, 9, 48, 32)
    with torch.no_grad():
        clip, image = ours.encode(pixels), ours.encode(pixels[:, :, :1])
        oracle = theirs.encode(pixels[:, :, :1]).latent_dist
    assert_close(image.mean, clip.mean[:, :, :1])
    assert_close(image.std, clip.std[:, :, :1])
    assert_close(image.mean, oracle.mean)


def test_released_sizes_and_keys():
    wide = ["model.in_channels=32", "model.out_channels=32"]
    assert compose_config(["vae=hunyuan_15", *wide]).vae == hunyuan_15_config()
    with torch.device("meta"):
        ours, theirs = build_vae(hunyuan_15_config()), AutoencoderKLHunyuanVideo15()
    shapes = {key: value.shape for key, value in ours.state_dict().items()}
    assert shapes == {key: value.shape for key, value in theirs.state_dict().items()}
    assert sum(value.numel() for value in ours.parameters()) == 1_260_634_115
    assert config_from_released(dict(theirs.config)) == hunyuan_15_config()
    fields = config_to_released(hunyuan_15_config())
    assert {name: value for name, value in theirs.config.items() if name[0] != "_"} == {
        **fields,
        "block_out_channels": tuple(fields["block_out_channels"]),
    }


def test_a_folder_of_diffusers_loads_and_ours_comes_back(tmp_path):
    ours, theirs = pair()
    save_vae(ours, tmp_path / "ours")
    again = load_vae(tmp_path / "ours")
    assert again.cfg == ours.cfg
    pixels = video(1, 3, 5, 16, 16)
    with torch.no_grad():
        assert_close(again.encode(pixels).mean, theirs.encode(pixels).latent_dist.mean)
    theirs.save_pretrained(tmp_path / "theirs")
    fields = AutoencoderKLHunyuanVideo15.load_config(tmp_path / "theirs")
    assert fields["_class_name"] == RELEASED_CLASSES["vae_hy15"]
    assert config_from_released(fields) == tiny(tile_spatial=True)
    for start, source, target, end in (
        ("theirs", "diffusers", "ours", "made"), ("made", "ours", "diffusers", "back")
    ):  # fmt: skip
        ends = [f"input={tmp_path / start}", f"output={tmp_path / end}"]
        assert main(["convert", "model=vae", f"from={source}", f"to={target}", *ends]) == 0
    state = load_vae(tmp_path / "made").state_dict()
    assert all(torch.equal(state[name], value) for name, value in weights().items())
    back = AutoencoderKLHunyuanVideo15.from_pretrained(tmp_path / "back").state_dict()
    assert all(torch.equal(back[name], value) for name, value in weights().items())


def test_initial_weights_pass_the_picture_on():
    vae = build_vae(tiny())
    posterior = vae.encode(video(1, 3, 5, 32, 32))
    assert 0.01 < posterior.std.mean() < 0.2
    assert vae.decode(posterior.mode()).std() > 1e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tile_temporal": True}, "vae.tile_temporal=true does not exist for vae.kind=vae_hy15"),
        ({"mid_attention": False}, "vae.mid_attention=false does not exist"),
        ({"block_channels": [4, 8, 16, 16]}, r"needs 5 entries, .*1/16"),
        ({"block_channels": [4, 8, 12, 16, 16]}, "entry 2 must be a multiple of 4 and divide 4"),
        ({"block_channels": [4, 8, 16, 12, 16]}, "entry 3 must be a multiple of 8"),
        ({"latent_channels": 5}, "vae.latent_channels=5: twice that must divide"),
        ({"tile_size_px": 32}, "stride of 24; .* multiples of 16"),
    ],
)
def test_config_names_the_wrong_field(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


def test_other_ratios_are_refused():
    with pytest.raises(ValueError, match="shrinks space by 32 and time by 4"):
        config_from_released({"_class_name": "AutoencoderKLHunyuanVideo15", "ffactor_spatial": 32})
    with pytest.raises(ValueError, match="downsample_match_channel=false"):
        config_from_released({"ffactor_spatial": 16, "downsample_match_channel": False})
    with pytest.raises(
        ValueError, match=r"height of 24 px .* multiple of 16, nearest are 16 and 32"
    ):
        build_vae(tiny()).encode(torch.zeros(1, 3, 1, 24, 16))
