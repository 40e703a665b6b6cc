"""Given frames in the model: which tokens they are, wherever these are in the video."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hunyuan_train.models.hunyuan.config import HunyuanConfig, ImageCondition
from hunyuan_train.models.hunyuan.model import HunyuanVideo
from hunyuan_train.models.rope import Rope

SIZES = {
    "hidden_size": 32,
    "num_heads": 2,
    "num_double_blocks": 1,
    "num_single_blocks": 2,
    "in_channels": 4,
    "out_channels": 4,
    "rope_axes": [4, 6, 6],
    "text_dim": 10,
    "pooled_dim": 6,
    "refiner_depth": 1,
    "guidance_embed": True,
    "image_condition": ImageCondition.token_replace,
}
Predict = Callable[[Tensor, Tensor | None], Tensor]


def model_of(**changes) -> HunyuanVideo:
    torch.manual_seed(0)
    model = HunyuanVideo(HunyuanConfig(**(SIZES | changes)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.1)
    return model


def predictor(model: HunyuanVideo, time: float = 700.0, guidance: float = 4000.0) -> Predict:
    """Return the model as a function of latents and given frames, with one and the same text."""
    generator = torch.Generator().manual_seed(1)
    text = torch.randn(1, 5, 10, generator=generator)
    pooled = torch.randn(1, 6, generator=generator)

    def predict(latents: Tensor, given: Tensor | None) -> Tensor:
        rows = len(latents)
        with torch.no_grad():
            return model(
                latents,
                torch.full((rows,), time),
                text.expand(rows, -1, -1),
                None,
                pooled.expand(rows, -1),
                torch.full((rows,), guidance),
                given,
            )

    return predict


def without_positions(model: HunyuanVideo) -> HunyuanVideo:
    """Take the rotations away, so that tokens are a set."""
    table = model.rope_cache.get

    def flat(*arguments) -> Rope:
        rope = table(*arguments)
        return Rope(torch.ones_like(rope.cos), torch.zeros_like(rope.sin))

    model.rope_cache.get = flat
    return model


@pytest.mark.parametrize("order", [[2, 1, 0, 3], [1, 3, 0, 2]])
def test_any_frame_may_be_given(order):
    """Where the first frame is right, which parity shows, each other is."""
    predict = predictor(without_positions(model_of()))
    latents = torch.randn(2, 4, 4, 4, 6)
    given = torch.tensor([[True, False, False, False], [True, False, False, True]])
    moved = predict(latents[:, :, order], given[:, order])
    torch.testing.assert_close(moved, predict(latents, given)[:, :, order], rtol=1e-5, atol=1e-6)
    assert (moved - predict(latents[:, :, order], given)).abs().max() > 1e-3


def test_two_given_frames_are_one_of_twice_the_height():
    predict = predictor(without_positions(model_of()))
    latents = torch.randn(1, 4, 4, 4, 6)
    given = torch.tensor([[True, True, False, False]])
    high = predict(latents.reshape(1, 4, 2, 8, 6), torch.tensor([[True, False]]))
    torch.testing.assert_close(
        high.reshape(1, 4, 4, 4, 6), predict(latents, given), rtol=1e-5, atol=1e-6
    )


def test_no_frame_given_is_text_to_video():
    predict = predictor(model_of())
    latents = torch.randn(3, 4, 2, 4, 6)
    given = torch.tensor([[False, False], [True, False], [False, False]])
    mixed, plain = predict(latents, given), predict(latents, None)
    torch.testing.assert_close(mixed[[0, 2]], plain[[0, 2]], rtol=1e-5, atol=1e-6)
    assert (mixed[1] - plain[1]).abs().max() > 1e-3


def test_given_tokens_know_neither_time_nor_guidance():
    """Without text and other frames to attend to, their tokens come out of the blocks the same."""
    model = model_of(num_single_blocks=0)
    block, seen = model.double_blocks[0], []
    block.core.forward = lambda q, k, v, mask: v.flatten(2)  # each token attends to itself
    block.register_forward_hook(lambda *call: seen.append(call[2][0]))
    latents, given = torch.randn(1, 4, 2, 4, 6), torch.tensor([[False, True]])
    for time, guidance in ((700.0, 4000.0), (20.0, 8000.0)):
        predictor(model, time, guidance)(latents, given)
    first, second = (tokens.unflatten(1, (2, -1)) for tokens in seen)
    assert torch.equal(first[:, 1], second[:, 1])
    assert (first[:, 0] - second[:, 0]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_condition": ImageCondition.concat}, "in_channels=4 must be 2 .* = 9"),
        ({"patch_size": [2, 2, 2]}, "tokens of one latent frame, but model.patch_size"),
    ],
)
def test_impossible_configs(changes, message):
    with pytest.raises(ValueError, match=message):
        HunyuanConfig(**(SIZES | changes))


def test_a_mask_that_does_not_fit():
    latents, given = torch.zeros(1, 4, 2, 4, 6), torch.ones(1, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"shape \[1, 2\], but the latents are 1 samples of 3"):
        predictor(model_of())(torch.zeros(1, 4, 3, 4, 6), given)
    with pytest.raises(ValueError, match=r"model\.image_condition=none; only token_replace"):
        predictor(model_of(image_condition=ImageCondition.none))(latents, given)
