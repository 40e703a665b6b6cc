"""The terms of a VAE's loss by hand, per sample; the verdict, its weight, and what is refused."""

import copy
from dataclasses import fields

import pytest
import torch
from torch import Tensor, nn

from hunyuan_train.models.vae.discriminator import PatchDiscriminator
from hunyuan_train.models.vae.discriminator_config import DiscriminatorConfig
from hunyuan_train.objectives.perceptual import build_perceptual
from hunyuan_train.objectives.vae_loss import (
    VaeLoss,
    adaptive_ratio,
    adversarial_term,
    discriminator_loss,
    gradient_penalty,
    reconstruction_loss,
)
from hunyuan_train.objectives.vae_loss_config import VaeLossConfig


def random_clips(frames: int = 5, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.rand(3, 3, frames, 16, 24, generator=generator) * 2 - 1
    decoded = pixels + 0.3 * torch.randn(pixels.shape, generator=generator)
    return decoded, pixels, torch.tensor([10.0, 20.0, 40.0])


def terms(loss: VaeLoss) -> dict[str, Tensor]:
    return {term.name: getattr(loss, term.name) for term in fields(loss)}


def test_defaults_are_the_reports():
    cfg = VaeLossConfig()
    weights = (cfg.absolute, cfg.squared, cfg.gradient, cfg.perceptual, cfg.adversarial, cfg.kl)
    assert weights == (1.0, 0.0, 0.0, 0.1, 0.05, 1e-6)
    assert cfg.discriminator == DiscriminatorConfig()


def test_terms_by_hand():
    cfg = VaeLossConfig(absolute=7.0, squared=2.0, gradient=3.0, kl=0.5, perceptual=0.0)
    pixels = torch.zeros(2, 1, 1, 2, 2)
    decoded = torch.tensor([[[0.0, 1.0], [0.0, -2.0]], [[1.0, 1.0], [1.0, 1.0]]])
    loss = reconstruction_loss(decoded.view(2, 1, 1, 2, 2), pixels, torch.tensor([4.0, 8.0]), cfg)
    assert loss.absolute.tolist() == [0.75, 1.0]
    assert loss.squared.tolist() == [1.25, 1.0]
    # Of the first, differences along width are 1 and -2, along height 0 and -3.
    assert loss.gradient.tolist() == [1.5, 0.0]
    assert loss.kl.tolist() == [1.0, 2.0]
    assert loss.perceptual.tolist() == [0.0, 0.0]
    assert loss.total.tolist() == [7 * 0.75 + 2 * 1.25 + 3 * 1.5 + 0.5, 7 + 2 + 0 + 0.5 * 2]
    assert loss.mean().absolute.item() == 0.875
    assert loss.mean().total.item() == loss.total.mean().item()


def test_kl_weight_is_that_of_sums_over_a_sample():
    """Summing L1 and KL over every sample is this loss times the number of pixel values."""
    cfg = VaeLossConfig(kl=1e-2, perceptual=0.0)
    decoded, pixels, kl = random_clips()
    loss = reconstruction_loss(decoded, pixels, kl, cfg)
    summed = (decoded - pixels).abs().flatten(1).sum(dim=1) + 1e-2 * kl
    torch.testing.assert_close(loss.total * pixels[0].numel(), summed)


def test_parts_of_a_clip_add_up_by_their_pixel_values():
    """Ranks that hold frames of one clip get its loss from their shares."""
    cfg = VaeLossConfig(squared=1.0, gradient=1.0, kl=0.1)
    perceptual = build_perceptual("", "cpu")
    decoded, pixels, kl = random_clips(frames=6)
    whole = reconstruction_loss(decoded, pixels, kl, cfg, perceptual)
    cuts = [(slice(0, 2), 0.25 * kl), (slice(2, 6), 0.75 * kl)]
    parts = [
        reconstruction_loss(decoded[:, :, cut], pixels[:, :, cut], share, cfg, perceptual)
        for cut, share in cuts
    ]
    for name, value in terms(whole).items():
        first, second = (terms(part)[name] for part in parts)
        torch.testing.assert_close((2 * first + 4 * second) / 6, value, rtol=1e-5, atol=1e-6)


def test_samples_do_not_depend_on_their_batch():
    cfg = VaeLossConfig(squared=1.0, gradient=1.0)
    perceptual = build_perceptual("", "cpu")
    decoded, pixels, kl = random_clips()
    whole = reconstruction_loss(decoded, pixels, kl, cfg, perceptual)
    alone = [
        reconstruction_loss(decoded[[row]], pixels[[row]], kl[[row]], cfg, perceptual)
        for row in range(3)
    ]
    for name, value in terms(whole).items():
        torch.testing.assert_close(torch.cat([terms(loss)[name] for loss in alone]), value)


def test_perceptual_distance_is_added_and_only_the_total_has_a_graph():
    decoded, pixels, kl = random_clips()
    decoded.requires_grad_()
    perceptual = build_perceptual("", "cpu")
    loss = reconstruction_loss(decoded, pixels, kl, VaeLossConfig(perceptual=0.4), perceptual)
    torch.testing.assert_close(loss.perceptual, perceptual(decoded, pixels).detach())
    without = reconstruction_loss(decoded, pixels, kl, VaeLossConfig(perceptual=0.0))
    torch.testing.assert_close(loss.total, without.total + 0.4 * loss.perceptual)
    assert [name for name, term in terms(loss).items() if term.requires_grad] == ["total"]
    assert not loss.detached().total.requires_grad
    loss.total.sum().backward()
    assert decoded.grad is not None
    slope = torch.autograd.grad(perceptual(decoded, pixels).sum(), decoded)[0]
    expected = (decoded - pixels).sign() / pixels[0].numel() + 0.4 * slope
    torch.testing.assert_close(decoded.grad, expected.detach())


def test_a_line_of_pixels_has_edges_along_it_alone():
    cfg = VaeLossConfig(perceptual=0.0, gradient=1.0)
    line = torch.tensor([0.0, 1.0]).view(1, 1, 1, 1, 2)
    loss = reconstruction_loss(line, torch.zeros_like(line), torch.zeros(1), cfg)
    assert loss.gradient.item() == 0.5
    dot = line[..., :1]
    assert reconstruction_loss(dot, dot, torch.zeros(1), cfg).gradient.item() == 0


def test_hinge_by_hand():
    real = torch.tensor([[2.0, 0.5], [-1.0, 1.0]]).view(2, 1, 1, 1, 2)
    fake = torch.tensor([[-2.0, -0.5], [0.0, 3.0]]).view(2, 1, 1, 1, 2)
    # Real: (0 + 0.5) / 2 and (2 + 0) / 2. Fake: (0 + 0.5) / 2 and (1 + 4) / 2.
    assert discriminator_loss(real, fake).tolist() == [0.25, 1.75]
    assert discriminator_loss(0 * real, 0 * fake).tolist() == [1.0, 1.0]
    assert adversarial_term(fake).tolist() == [1.25, -1.5]


def test_gradient_penalty_by_hand():
    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([3.0, 4.0]))

        def forward(self, pixels: Tensor) -> Tensor:
            return (pixels * self.weight).sum(dim=-1, keepdim=True)

    discriminator = Linear()
    penalty = gradient_penalty(discriminator, torch.ones(2, 1, 1, 1, 2))
    assert penalty.tolist() == [25.0, 25.0]
    penalty.sum().backward()
    assert discriminator.weight.grad is not None
    assert discriminator.weight.grad.tolist() == [12.0, 16.0]


@pytest.mark.parametrize("frames", [1, 5])
def test_gradient_penalty_reaches_every_kernel_of_the_discriminator(frames):
    torch.manual_seed(0)
    cfg = DiscriminatorConfig(base_channels=4, layers=2, norm_groups=2)
    discriminator = PatchDiscriminator(cfg)
    pixels = torch.rand(2, 3, frames, 8, 8)
    penalty = gradient_penalty(discriminator, pixels)
    assert penalty.shape == (2,)
    penalty.sum().backward()
    kernels = [(n, p) for n, p in discriminator.named_parameters() if p.ndim > 1]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for _, p in kernels)
    assert not pixels.requires_grad


def decoder() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv3d(2, 4, 1), nn.SiLU(), nn.Conv3d(4, 3, 1))


def test_adaptive_ratio_is_that_of_the_gradient_norms():
    generator = torch.Generator().manual_seed(0)
    terms, verdict = torch.randn(2, 40, generator=generator).unbind()
    squares = torch.stack([terms.square().sum(), verdict.square().sum()])
    found = adaptive_ratio(squares, most=1e4)
    assert found.item() == pytest.approx((terms.norm() / verdict.norm()).item(), rel=1e-5)
    assert adaptive_ratio(squares, most=0.5).item() == 0.5
    # Squares of ranks add up to those of their batch.
    parts = [torch.stack([x[half].square().sum() for x in (terms, verdict)])
             for half in (slice(0, 20), slice(20, 40))]  # fmt: skip
    torch.testing.assert_close(adaptive_ratio(parts[0] + parts[1], most=1e4), found)


def test_adaptive_ratio_survives_a_verdict_without_a_gradient():
    assert adaptive_ratio(torch.tensor([1.0, 0.0]), most=1e4).item() == 1e4
    assert adaptive_ratio(torch.tensor([0.0, 1.0]), most=1e4).item() == 0


def test_the_verdict_moves_the_decoder_and_not_the_discriminator():
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(DiscriminatorConfig(base_channels=4, norm_groups=2))
    before = copy.deepcopy(discriminator.state_dict())
    decoded = torch.rand(2, 3, 1, 16, 16, requires_grad=True)
    discriminator.requires_grad_(False)
    adversarial_term(discriminator(decoded)).mean().backward()
    assert decoded.grad is not None
    with torch.no_grad():
        better = discriminator(decoded - 5 * decoded.grad).mean()
        assert better > discriminator(decoded).mean()
    assert all(parameter.grad is None for parameter in discriminator.parameters())
    assert all(torch.equal(v, before[k]) for k, v in discriminator.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kl": -1.0}, "vae_loss.kl=-1.0 must be a number that is not negative"),
        ({"perceptual": float("nan")}, "vae_loss.perceptual=nan must be a number"),
        ({"adversarial": float("inf")}, "vae_loss.adversarial=inf must be a number"),
        ({"gradient_penalty": -0.1}, "vae_loss.gradient_penalty=-0.1 must be"),
        ({"absolute": 0.0}, "vae_loss.absolute and vae_loss.squared are both 0"),
        ({"adversarial_start": -1}, "vae_loss.adversarial_start=-1 must not be negative"),
        ({"adaptive_most": 0.0}, "vae_loss.adaptive_most=0.0 must be a number above 0"),
        ({"discriminator_lr": 0.0}, "vae_loss.discriminator_lr=0.0 must be a number above 0"),
        ({"discriminator_beta1": 1.0}, r"vae_loss.discriminator_beta1=1.0 must be in \[0, 1\)"),
        (
            {"perceptual": 0.0, "perceptual_folder": "weights"},
            "vae_loss.perceptual_folder=weights is given but vae_loss.perceptual=0 never uses it",
        ),
    ],
)
def test_config_names_the_wrong_field(changes, message):
    with pytest.raises(ValueError, match=message):
        VaeLossConfig(**changes)
