"""VAE training on pixels: what is minimised, what is learned, and the latent scale it reports."""

import json
import math

import pytest
import torch
from torch import Tensor

from hunyuan_train.engine.vae_optimizer import VaeOptimizer
from hunyuan_train.engine.vae_training import crop, train_vae
from hunyuan_train.models.vae.base import Vae
from hunyuan_train.models.vae.build import build_vae
from hunyuan_train.models.vae.config import VaeConfig
from hunyuan_train.models.vae.state_dict import load_vae, save_vae
from hunyuan_train.objectives.vae_config import VaeTrainingConfig
from hunyuan_train.objectives.vae_loss import vae_loss
from hunyuan_train.runtime.seed import keyed_generator

CONFIG = VaeConfig(
    latent_channels=4,
    block_channels=[8, 8, 8, 16],
    layers_per_block=1,
    norm_groups=1,
    scaling_factor=1.0,
)


def patches(step: int) -> Tensor:
    """Eight images or clips of four plain patches: what a VAE begins to learn in seconds."""
    generator = keyed_generator(3, "patches", step)
    frames = int(generator.choice([1, 1, 5]))
    colours = torch.from_numpy(generator.uniform(-1, 1, (8, 3, 1, 2, 2))).float()
    return torch.nn.functional.interpolate(colours, size=(frames, 16, 16), mode="nearest")


def new_vae() -> Vae:
    torch.manual_seed(0)
    return build_vae(CONFIG)


def test_loss_terms_by_hand():
    cfg = VaeTrainingConfig(mse_weight=2.0, gradient_weight=3.0, kl_weight=0.5)
    pixels = torch.zeros(2, 1, 1, 2, 2)
    decoded = torch.tensor([[0.0, 1.0], [0.0, -2.0]]).view(1, 1, 1, 2, 2).expand(2, -1, -1, -1, -1)
    loss = vae_loss(decoded, pixels, torch.tensor([4.0, 8.0]), cfg)
    assert loss.absolute.item() == pytest.approx(3 / 4)
    assert loss.squared.item() == pytest.approx(5 / 4)
    # Differences along width: 1 and -2; along height: 0 and -3.
    assert loss.gradient.item() == pytest.approx((1.5 + 1.5) / 2)
    # Mean KL of 6 nats over the 4 pixel values of a sample.
    assert loss.kl.item() == pytest.approx(1.5)
    assert loss.total.item() == pytest.approx(0.75 + 2 * 1.25 + 3 * 1.5 + 0.5 * 1.5)


def test_kl_does_not_depend_on_the_size_of_a_sample():
    # Twice the clip has twice the nats and twice the pixel values.
    cfg = VaeTrainingConfig()
    small, large = torch.zeros(1, 3, 1, 8, 8), torch.zeros(1, 3, 1, 8, 16)
    kl = torch.tensor([10.0])
    assert vae_loss(small, small, kl, cfg).kl == vae_loss(large, large, 2 * kl, cfg).kl


def test_training_learns_and_measures_the_latent_scale(tmp_path):
    vae = new_vae()
    rows: list[dict[str, float]] = []
    cfg = VaeTrainingConfig(steps=40, warmup_steps=5, measure_batches=6)
    summary = train_vae(vae, cfg, patches, seed=0, on_step=rows.append)
    assert summary.steps == 40
    assert summary.skipped == 0
    assert rows == summary.curve
    assert [row["step"] for row in rows] == list(range(40))
    assert sum(row["absolute"] for row in rows[-5:]) / 5 < 0.85 * rows[0]["absolute"]
    # Beating the mean colour: the error of predicting 0 is 1/3, which is 10.8 dB under the peak.
    assert summary.psnr_db > 11.2
    assert summary.scaling_factor == pytest.approx(1 / summary.latent_std)
    save_vae(vae, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["scaling_factor"] == pytest.approx(
        summary.scaling_factor
    )
    loaded = load_vae(tmp_path)
    with torch.no_grad():
        values = [
            loaded.scale(loaded.encode(patches(step)).mode()).flatten() for step in range(40, 46)
        ]
    assert torch.cat(values).std().item() == pytest.approx(1.0, abs=0.02)


def test_training_is_a_function_of_the_seed():
    cfg = VaeTrainingConfig(steps=3, measure_batches=1)
    weights: list[dict[str, Tensor]] = []
    for seed in (0, 0, 1):
        vae = new_vae()
        train_vae(vae, cfg, patches, seed=seed)
        weights.append(vae.state_dict())
    same = [torch.equal(weights[0][key], weights[1][key]) for key in weights[0]]
    other = [torch.equal(weights[0][key], weights[2][key]) for key in weights[0]]
    assert all(same)
    assert not all(other)


def test_a_batch_that_is_not_finite_is_skipped():
    def spoilt(step: int) -> Tensor:
        return patches(step) * (math.nan if step == 1 else 1.0)

    vae = new_vae()
    summary = train_vae(vae, VaeTrainingConfig(steps=3, measure_batches=1), spoilt, seed=0)
    assert summary.skipped == 1
    assert all(parameter.isfinite().all() for parameter in vae.parameters())


def test_kernels_move_by_equal_singular_values():
    vae = new_vae()
    vae.to(memory_format=torch.channels_last_3d)
    cfg = VaeTrainingConfig(steps=10, warmup_steps=0, kernel_lr=0.5, lr=0.25)
    optimizer = VaeOptimizer(vae, cfg)
    before = {name: value.detach().clone() for name, value in vae.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    for parameter in vae.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    assert optimizer.step(0)
    for name, value in vae.named_parameters():
        moved = value.detach() - before[name]
        if value.ndim > 1:
            moved = moved.flatten(1)
            widths = max(1.0, moved.shape[0] / moved.shape[1]) ** 0.5
            # The Newton-Schulz iteration ends between 0.6 and 1.3 of the orthogonal step.
            values = torch.linalg.svdvals(moved) / (0.5 * widths)
            assert 0.5 < values.min() <= values.max() < 1.4, name
        else:
            # Adam's first step is the rate, in the sign of the gradient.
            torch.testing.assert_close(moved, -0.25 * value.grad.sign(), rtol=0.05, atol=0.01)


def test_crops_stay_legal_and_affordable():
    cfg = VaeTrainingConfig(crop_frames=9, crop_px=32, batch_pixels=16000)
    batch = torch.zeros(8, 3, 17, 48, 24)
    shapes = {tuple(crop(batch, cfg, 0, step).shape) for step in range(50)}
    assert shapes == {(4, 3, 5, 32, 24), (2, 3, 9, 32, 24)}  # 16000 // 3840 and 16000 // 6912
    assert crop(batch[:, :, :1], cfg, 0, 0).shape == (8, 3, 1, 32, 24)
    assert crop(batch[:1], cfg, 0, 0).shape[0] == 1
    # Two samples stay although they cost more.
    assert crop(batch, VaeTrainingConfig(batch_pixels=1), 0, 0).shape[0] == 2
    # Smaller than the crop: left as it is.
    assert crop(batch[:, :, :1, :8, :8], cfg, 0, 0).shape == (8, 3, 1, 8, 8)
    corners = {crop(batch, cfg, 0, step).storage_offset() for step in range(50)}
    assert len(corners) > 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "vae_training.steps=0 must be at least 1"),
        ({"lr": 0.0}, "vae_training.lr=0.0 must be above 0"),
        ({"kl_weight": -1.0}, "vae_training.kl_weight=-1.0 must not be negative"),
        ({"ema_decay": 1.0}, r"vae_training.ema_decay=1.0 must be in \[0, 1\)"),
        ({"crop_frames": 8}, r"vae_training.crop_frames=8 must be 4n\+1"),
        ({"crop_px": 20}, "vae_training.crop_px=20 must be a multiple of 8"),
    ],
)
def test_config_names_the_wrong_field(changes, message):
    with pytest.raises(ValueError, match=message):
        VaeTrainingConfig(**changes)
