"""Training sigmas: distribution, shift, and keys."""

import math

import pytest
import torch

from hunyuan_train.objectives.config import FlowMatchingConfig, Weighting
from hunyuan_train.objectives.timesteps import (
    loss_weights,
    sample_sigmas,
    shift_of,
    shift_sigmas,
)

IDS = [f"clip-{number}" for number in range(4000)]
EPOCHS = [0] * len(IDS)
TOKENS = 256


@pytest.mark.parametrize(
    ("mean", "std", "shift"), [(0.0, 1.0, 1.0), (-0.5, 0.7, 1.0), (0.0, 1.0, 7.0)]
)
def test_logits_are_normal_and_shift_adds_its_logarithm(
    mean: float, std: float, shift: float
) -> None:
    cfg = FlowMatchingConfig(time_mean=mean, time_std=std, shift=shift)
    sigmas = sample_sigmas(cfg, 3, IDS, EPOCHS, TOKENS)
    assert sigmas.dtype == torch.float32
    assert ((sigmas > 0) & (sigmas < 1)).all()
    logits = torch.logit(sigmas.double())
    # Standard errors with 4000 draws: std / 63 for the mean, std / 89 for the deviation.
    assert abs(logits.mean() - (mean + math.log(shift))) < 4 * std / 63
    assert abs(logits.std() - std) < 4 * std / 89
    inside = ((logits - logits.mean()).abs() < std).double().mean()
    assert abs(inside - 0.6827) < 0.03


def test_a_sample_keeps_its_sigma_on_any_rank_and_changes_it_with_epoch_and_seed() -> None:
    cfg = FlowMatchingConfig()
    whole = sample_sigmas(cfg, 0, ["a", "b", "c"], [0, 0, 0], TOKENS)
    part = sample_sigmas(cfg, 0, ["c", "a"], [0, 0], TOKENS)
    assert torch.equal(whole[[2, 0]], part)
    assert (sample_sigmas(cfg, 0, ["a", "b", "c"], [1, 1, 1], TOKENS) != whole).all()
    assert (sample_sigmas(cfg, 1, ["a", "b", "c"], [0, 0, 0], TOKENS) != whole).all()


def test_shift_is_the_published_map() -> None:
    sigmas = torch.linspace(0, 1, 11)
    assert torch.equal(shift_sigmas(sigmas, 1.0), sigmas)
    shifted = shift_sigmas(sigmas, 7.0)
    assert shifted[0] == 0
    assert shifted[-1] == 1
    torch.testing.assert_close(shifted[5], torch.tensor(7 / 8))  # 7 * 0.5 / (1 + 6 * 0.5)
    torch.testing.assert_close(shift_sigmas(shifted, 1 / 7), sigmas)


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match="zip"):
        sample_sigmas(FlowMatchingConfig(), 0, ["a", "b"], [0], TOKENS)


@pytest.mark.parametrize(
    ("field", "value"),
    [("time_std", 0.0), ("shift", 0.0), ("text_drop", 1.5), ("train_guidance", -1.0)],
)
def test_config_names_the_field_and_the_value(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"objective\.{field}={value} must"):
        FlowMatchingConfig(**{field: value})


def test_shift_grows_with_the_root_of_the_tokens_and_the_draws_stay() -> None:
    cfg = FlowMatchingConfig(shift=3.0, shift_tokens=1024)
    assert shift_of(cfg, 1024) == 3.0
    assert shift_of(cfg, 4096) == 6.0
    assert shift_of(FlowMatchingConfig(shift=3.0), 4096) == 3.0
    small, large = (sample_sigmas(cfg, 0, IDS, EPOCHS, tokens) for tokens in (256, 4096))
    # The same draws, moved by another shift: 1.5 and 6.
    unshifted = sample_sigmas(FlowMatchingConfig(), 0, IDS, EPOCHS, 7)
    torch.testing.assert_close(small, shift_sigmas(unshifted, 1.5))
    torch.testing.assert_close(large, shift_sigmas(unshifted, 6.0))


@pytest.mark.parametrize("weighting", [Weighting.cosmap, Weighting.sigma_sqrt])
def test_weights_are_those_of_diffusers(weighting: Weighting) -> None:
    from diffusers.training_utils import compute_loss_weighting_for_sd3

    sigma = torch.linspace(0.2, 1.0, 9)  # below, ours is cut off
    ours = loss_weights(weighting, sigma)
    assert ours is not None
    torch.testing.assert_close(ours, compute_loss_weighting_for_sd3(weighting.value, sigma))


def test_weights_near_the_data_are_finite_and_none_is_one() -> None:
    sigma = torch.tensor([0.0, 1e-4, 0.2, 0.4])
    found = loss_weights(Weighting.sigma_sqrt, sigma)
    assert found is not None
    torch.testing.assert_close(found, torch.tensor([25.0, 25.0, 25.0, 6.25]))
    assert loss_weights(Weighting.none, sigma) is None
