"""Path, target, model time, and what is fed beside them."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from hunyuan_train.objectives.conditioning import (
    apply_text_drop,
    check_text_mask,
    guidance_input,
    text_drop_mask,
)
from hunyuan_train.objectives.flow_matching import (
    interpolate,
    keyed_noise,
    model_time,
    velocity_target,
)


def random_pair(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def test_sigma_one_is_noise_and_sigma_zero_is_data() -> None:
    latents, noise = random_pair(2, 3, 2, 4, 4)
    mixed = interpolate(latents, noise, torch.tensor([0.0, 1.0]))
    assert torch.equal(mixed[0], latents[0])
    assert torch.equal(mixed[1], noise[1])


def test_target_is_the_derivative_of_the_path() -> None:
    latents, noise = (x.double() for x in random_pair(2, 3, 2, 4, 4))
    sigma = torch.tensor([0.3, 0.8], dtype=torch.float64)
    step = 1e-3
    slope = (interpolate(latents, noise, sigma + step) - interpolate(latents, noise, sigma)) / step
    torch.testing.assert_close(slope, velocity_target(latents, noise), rtol=0, atol=1e-9)


def test_path_equals_the_one_of_diffusers() -> None:
    latents, noise = random_pair(4, 3, 2, 4, 4)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    times = scheduler.timesteps[[0, 250, 600, 999]]
    expected = scheduler.scale_noise(latents, times, noise)
    torch.testing.assert_close(interpolate(latents, noise, times / 1000), expected)


def test_one_exact_euler_step_over_the_target_returns_the_data() -> None:
    latents, noise = random_pair(2, 3, 2, 4, 4)
    sigma = torch.tensor([0.25, 0.9])
    mixed = interpolate(latents, noise, sigma)
    back = mixed - sigma.view(-1, 1, 1, 1, 1) * velocity_target(latents, noise)
    torch.testing.assert_close(back, latents, rtol=0, atol=1e-6)


def test_model_time_stays_float32() -> None:
    time = model_time(torch.tensor([0.0, 0.98638, 1.0]).double())
    assert time.dtype == torch.float32
    torch.testing.assert_close(time, torch.tensor([0.0, 986.38, 1000.0]))


def test_guidance_input_is_not_rounded_to_bfloat16() -> None:
    guidance = guidance_input(6.0, 2, "cpu")
    assert guidance.dtype == torch.float32
    assert guidance.tolist() == [6000.0, 6000.0]
    # What the released pipelines feed for 6.0, and how to feed it here.
    released = torch.tensor([6.0], dtype=torch.bfloat16) * 1000.0
    assert released.item() == 6016.0
    torch.testing.assert_close(guidance_input(6.016, 1, "cpu"), released.float())


def test_noise_is_keyed_by_purpose_sample_and_epoch() -> None:
    noise = keyed_noise((3, 2, 4, 4), 0, "noise", ["a", "b"], [0, 0])
    assert noise.shape == (2, 3, 2, 4, 4)
    assert torch.equal(keyed_noise((3, 2, 4, 4), 0, "noise", ["b"], [0])[0], noise[1])
    for changed in (
        keyed_noise((3, 2, 4, 4), 0, "posterior", ["a", "b"], [0, 0]),
        keyed_noise((3, 2, 4, 4), 0, "noise", ["a", "b"], [1, 1]),
        keyed_noise((3, 2, 4, 4), 1, "noise", ["a", "b"], [0, 0]),
    ):
        assert (changed != noise).float().mean() > 0.99


def test_text_drop_has_its_rate_and_its_keys() -> None:
    ids = list(range(4000))
    drop = text_drop_mask(0, ids, [0] * 4000, 0.1)
    assert abs(drop.float().mean() - 0.1) < 0.02
    assert torch.equal(text_drop_mask(0, ids[::-1], [0] * 4000, 0.1), drop.flip(0))
    assert not torch.equal(text_drop_mask(0, ids, [1] * 4000, 0.1), drop)
    assert not text_drop_mask(0, ids, [0] * 4000, 0.0).any()
    assert text_drop_mask(0, ids, [0] * 4000, 1.0).all()


def test_dropped_samples_get_the_empty_caption() -> None:
    text, mask, pooled = torch.randn(2, 3, 4), torch.ones(2, 3, dtype=torch.bool), torch.randn(2, 5)
    empty = torch.randn(3, 4), torch.tensor([True, False, False]), torch.randn(5)
    new = apply_text_drop(torch.tensor([False, True]), text, mask, pooled, *empty)
    for result, kept, replaced in zip(new, (text, mask, pooled), empty, strict=True):
        assert torch.equal(result[0], kept[0])
        assert torch.equal(result[1], replaced)


def test_empty_and_left_padded_masks_are_refused_by_name() -> None:
    good = torch.tensor([[True, True, False], [True, False, False]])
    check_text_mask(good, ["a", "b"])
    with pytest.raises(ValueError, match="sample b has an empty caption mask"):
        check_text_mask(good & torch.tensor([[True], [False]]), ["a", "b"])
    with pytest.raises(ValueError, match="sample a has a caption mask that is not right-padded"):
        check_text_mask(good.flip(1), ["a", "b"])
