"""The prompt-following score: right on drawn clips, near chance without a signal."""

import pytest
import torch
from torch import Tensor

from hunyuan_train.data.shapes import (
    COLOURS,
    DIRECTIONS,
    SHAPES,
    Combination,
    draw_clip,
    held_out_prompts,
)
from hunyuan_train.evaluation.prompt_following import (
    Observation,
    chance_scores,
    mean_scores,
    observe,
    score_video,
    score_videos,
)
from hunyuan_train.runtime.seed import keyed_generator, keyed_normal

SIZES = [(64, 64), (80, 48), (48, 80), (96, 96)]


def drawn(prompt: str, number: int, frames: int = 17, size: tuple[int, int] = (64, 64)) -> Tensor:
    clip = draw_clip(Combination.parse(prompt), frames, *size, keyed_generator(0, "test", number))
    return torch.from_numpy(clip).permute(3, 0, 1, 2).float() / 127.5 - 1


@pytest.mark.parametrize("frames", [5, 17])
@pytest.mark.parametrize("size", SIZES)
def test_drawn_clips_score_full_marks(frames, size):
    prompts = held_out_prompts()
    videos = [drawn(prompt, number, frames, size) for number, prompt in enumerate(prompts)]
    assert score_videos(videos, prompts) == {"colour": 1.0, "shape": 1.0, "direction": 1.0}


@pytest.mark.parametrize("size", SIZES)
def test_blurred_noisy_clips_still_score_high(size):
    prompts = held_out_prompts()
    videos = []
    for number, prompt in enumerate(prompts):
        video = drawn(prompt, number, 17, size).transpose(0, 1)
        small = torch.nn.functional.avg_pool2d(
            video, 5, stride=1, padding=2, count_include_pad=False
        )
        videos.append(
            small.transpose(0, 1) + 0.1 * keyed_normal(small.transpose(0, 1).shape, 1, "n", number)
        )
    scores = score_videos(videos, prompts)
    assert scores["colour"] == 1.0
    assert scores["direction"] == 1.0
    assert scores["shape"] >= 0.9


def test_wrong_word_is_wrong_in_its_own_aspect_only():
    video = drawn("a red circle moving left", 0)
    assert score_video(video, "a blue circle moving left") == {
        "colour": False,
        "shape": True,
        "direction": True,
    }
    assert score_video(video, "a red pillar moving left")["shape"] is False
    assert score_video(video, "a red circle moving up")["direction"] is False


def test_every_word_is_told_apart():
    for shape in SHAPES:
        for colour in COLOURS:
            still = observe(drawn(f"a {colour} {shape}", 1, frames=1))
            assert still == Observation(colour=colour, shape=shape)
    for direction in DIRECTIONS:
        assert observe(drawn(f"a cyan pillar moving {direction}", 2)).direction == direction


def test_image_prompt_has_no_direction():
    assert set(score_video(drawn("a red circle", 0, 1), "a red circle")) == {"colour", "shape"}


def test_clip_standing_still_has_no_direction():
    assert observe(drawn("a red circle", 0, 17)).direction == ""


@pytest.mark.parametrize(
    "video",
    [torch.zeros(3, 5, 64, 64), torch.full((3, 5, 64, 64), -5.0), torch.ones(3, 1, 32, 32)],
    ids=["grey", "below range", "white image"],
)
def test_nothing_to_see_scores_nothing(video):
    assert observe(video) == Observation()
    assert not any(score_video(video, "a red circle moving left").values())


def test_grey_shape_has_a_form_but_no_colour():
    video = drawn("a red circle moving left", 0)
    shown = observe(video.mean(dim=0, keepdim=True).expand(3, -1, -1, -1))
    assert shown.colour == ""
    assert shown.shape == "circle"


@pytest.mark.parametrize("coarse", [1, 8])
def test_noise_scores_no_more_than_chance(coarse):
    prompts = held_out_prompts()
    videos = []
    for number in range(len(prompts)):
        noise = keyed_normal((3, 17, 64 // coarse, 64 // coarse), 0, "test_noise", number)
        videos.append(noise.repeat_interleave(coarse, 2).repeat_interleave(coarse, 3).clamp(-1, 1))
    scores = score_videos(videos, prompts)
    for aspect, chance in chance_scores().items():
        assert scores[aspect] <= chance + 0.15  # about two standard errors at 32 prompts


def test_chance_is_one_over_the_number_of_words():
    assert chance_scores() == {"colour": 1 / 6, "shape": 1 / 4, "direction": 1 / 4}


def test_mean_counts_each_aspect_over_prompts_that_name_it():
    scores = [
        {"colour": True, "shape": False, "direction": True},
        {"colour": False, "shape": False},
    ]
    assert mean_scores(scores) == {"colour": 0.5, "shape": 0.0, "direction": 1.0}


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match=r"pixels have shape \[5, 3, 8, 8\]; give one clip"):
        observe(torch.zeros(5, 3, 8, 8))
    with pytest.raises(ValueError, match="is not of the moving-shapes data"):
        score_video(drawn("a red circle", 0), "a brown bear")
