"""The patch discriminator: sizes, independence of samples, images as still clips, its start."""

import pytest
import torch

from hunyuan_train.models.vae.discriminator import PatchDiscriminator
from hunyuan_train.models.vae.discriminator_config import DiscriminatorConfig
from hunyuan_train.objectives.vae_loss import discriminator_loss


def tiny(**changes) -> DiscriminatorConfig:
    return DiscriminatorConfig(**({"base_channels": 8, "layers": 2, "norm_groups": 2} | changes))


def new(cfg: DiscriminatorConfig, seed: int = 0) -> PatchDiscriminator:
    torch.manual_seed(seed)
    return PatchDiscriminator(cfg)


@pytest.mark.parametrize(
    ("layers", "size", "logits"),
    [
        (3, (1, 8, 8), (1, 1, 1)),
        (3, (5, 8, 24), (1, 1, 3)),
        (3, (17, 64, 40), (3, 8, 5)),
        (2, (9, 16, 12), (3, 4, 3)),
        (1, (1, 9, 7), (1, 5, 4)),
        (5, (1, 8, 8), (1, 1, 1)),
    ],
)
def test_halves_every_side_rounded_up(layers, size, logits):
    network = new(tiny(layers=layers))
    pixels = torch.zeros(2, 3, *size)
    assert network(pixels).shape == (2, 1, *logits)


def test_default_patch_is_54_pixels_wide():
    network = new(DiscriminatorConfig(base_channels=4, norm_groups=0)).double()
    pixels = torch.randn(1, 3, 1, 96, 96, dtype=torch.float64, requires_grad=True)
    network(pixels)[0, 0, 0, 6, 6].backward()
    assert pixels.grad is not None
    touched = pixels.grad[0, :, 0].abs().sum(dim=0).nonzero()
    assert (touched.amax(dim=0) - touched.amin(dim=0) + 1).tolist() == [54, 54]


@pytest.mark.parametrize("norm_groups", [0, 2])
def test_a_sample_is_judged_alone(norm_groups):
    network = new(tiny(norm_groups=norm_groups))
    pixels = torch.rand(3, 3, 5, 16, 16) * 2 - 1
    alone = torch.cat([network(sample[None]) for sample in pixels])
    torch.testing.assert_close(network(pixels), alone, rtol=1e-5, atol=1e-6)
    network.train()
    torch.testing.assert_close(network(pixels.flip(0)).flip(0), alone, rtol=1e-5, atol=1e-6)


def test_an_image_is_a_clip_that_stands_still():
    network = new(tiny())
    image = torch.rand(2, 3, 1, 16, 24) * 2 - 1
    # Eight equal frames: two logit frames, the same as the single one of the image.
    clip = network(image.expand(-1, -1, 8, -1, -1))
    torch.testing.assert_close(clip, network(image).expand_as(clip), rtol=1e-4, atol=1e-5)


def test_every_pixel_moves_the_logits_alike():
    """A kernel that is no multiple of its stride would favour every other pixel."""
    network = new(tiny(layers=1, norm_groups=0)).double()
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, torch.nn.Conv3d):
                module.weight.fill_(0.1)
    pixels = torch.ones(1, 3, 9, 16, 16, dtype=torch.float64, requires_grad=True)
    network(pixels).sum().backward()
    assert pixels.grad is not None
    inside = pixels.grad[:, :, 4:-4, 6:-6, 6:-6]
    torch.testing.assert_close(inside, inside[..., :1, :1, :1].expand_as(inside))


def test_start_is_a_function_of_the_seed_also_from_the_meta_device():
    with torch.device("meta"):
        network = PatchDiscriminator(tiny())
    network.to_empty(device="cpu")
    for parameter in network.parameters():
        torch.nn.init.constant_(parameter, float("nan"))
    built = new(tiny())
    for either in (network, built):
        torch.manual_seed(3)
        either.init_weights()
    expected = built.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in network.state_dict().items())


def test_logits_start_near_zero_at_any_depth():
    for layers in (2, 4):
        for norm_groups in (0, 2):
            network = new(tiny(layers=layers, norm_groups=norm_groups))
            logits = network(torch.rand(2, 3, 5, 32, 32) * 2 - 1)
            assert 1e-4 < logits.abs().mean() < 0.5


def test_channels_last_gives_the_same_logits():
    network = new(tiny())
    pixels = torch.rand(2, 3, 5, 16, 16)
    expected = network(pixels)
    network.to(memory_format=torch.channels_last_3d)  # pyright: ignore[reportCallIssue]
    got = network(pixels.contiguous(memory_format=torch.channels_last_3d))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("frames", [1, 5])
def test_learns_to_tell_stripes_from_noise(frames):
    network = new(tiny())
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3, betas=(0.5, 0.9))
    generator = torch.Generator().manual_seed(0)
    stripes = torch.tensor([1.0, -1.0]).repeat(8).view(1, 1, 1, 1, 16)

    def draw() -> tuple[torch.Tensor, torch.Tensor]:
        noise = torch.randn(8, 3, frames, 16, 16, generator=generator)
        return 0.5 * stripes + 0.5 * noise, 0.7 * torch.randn(noise.shape, generator=generator)

    for _ in range(25):
        real, fake = draw()
        optimizer.zero_grad()
        discriminator_loss(network(real), network(fake)).mean().backward()
        optimizer.step()
    real, fake = draw()
    with torch.no_grad():
        assert network(real).mean() > 0.5
        assert network(fake).mean() < -0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 0}, "vae_loss.discriminator.layers=0 must be at least 1"),
        ({"norm_groups": -1}, "discriminator.norm_groups=-1 must not be negative"),
        (
            {"norm_groups": 3},
            r"discriminator.norm_groups=3 must divide vae_loss.discriminator.base_channels=8",
        ),
    ],
)
def test_config_names_the_wrong_field(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(**changes)
