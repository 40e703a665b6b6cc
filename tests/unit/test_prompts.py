"""Lists of prompts with pictures, what noise depends on, and sampling around given frames."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.pipelines.mochi.pipeline_mochi import linear_quadratic_schedule
from media_factory import FakePosterior, FakeText, write_image
from PIL import Image
from torch import Tensor, nn

from hunyuan_train.data.buckets import Bucket
from hunyuan_train.evaluation.config import SampleConfig, Schedule
from hunyuan_train.evaluation.given import encode_given
from hunyuan_train.evaluation.prompts import (
    Prompt,
    captions_of,
    encode_captions,
    negative,
    positive,
    read_picture,
    read_prompts,
)
from hunyuan_train.evaluation.sample import SampledVideo, sample_videos
from hunyuan_train.evaluation.schedules import sigma_schedule
from hunyuan_train.models.hunyuan.config import HunyuanConfig, ImageCondition
from hunyuan_train.models.hunyuan.model import HunyuanVideo
from hunyuan_train.models.vae.config import VaeConfig
from hunyuan_train.models.vae.tile_work import TileWork

HEIGHT, WIDTH = 32, 48
REPLACE, CONCAT = ImageCondition.token_replace, ImageCondition.concat


class PoolingVae(nn.Module):
    """Averages 8 x 8 blocks of every fourth frame, and spreads them out again."""

    cfg = VaeConfig(latent_channels=3)

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.work = TileWork()

    def encode(self, pixels: Tensor) -> FakePosterior:
        mean = nn.functional.avg_pool3d(pixels[:, :, ::4], (1, 8, 8))
        return FakePosterior(mean, torch.full_like(mean, 0.5))

    def decode(self, latents: Tensor) -> Tensor:
        wide = latents.repeat_interleave(8, 3).repeat_interleave(8, 4)
        return torch.cat([wide[:, :, :1], wide[:, :, 1:].repeat_interleave(4, 2)], dim=2)

    def scale(self, latents: Tensor) -> Tensor:
        return latents * 0.5

    def unscale(self, latents: Tensor) -> Tensor:
        return latents / 0.5


def model_of(form: ImageCondition) -> HunyuanVideo:
    torch.manual_seed(0)
    cfg = HunyuanConfig(
        hidden_size=32, num_heads=2, num_double_blocks=1, num_single_blocks=1,
        rope_axes=[4, 6, 6], text_dim=3, pooled_dim=2, refiner_depth=1, out_channels=3,
        in_channels=7 if form is CONCAT else 3, image_condition=form,
    )  # fmt: skip
    model = HunyuanVideo(cfg)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.1)
    return model


def config(**changes) -> SampleConfig:
    sizes = {"frames": 9, "height": HEIGHT, "width": WIDTH, "steps": 3}
    return SampleConfig(**(sizes | changes))


@pytest.fixture
def pictures(tmp_path: Path) -> tuple[str, str]:
    """A wide red picture and a tall blue one."""
    for name, size, colour in (("red", (96, 32), (255, 0, 0)), ("blue", (48, 64), (0, 0, 255))):
        Image.new("RGB", size, colour).save(tmp_path / f"{name}.png")
    return str(tmp_path / "red.png"), str(tmp_path / "blue.png")


def sample(
    prompts: list[Prompt], form: ImageCondition = ImageCondition.none, **changes
) -> list[SampledVideo]:
    cfg = config(**changes)
    return list(sample_videos(model_of(form), PoolingVae(), FakeText(), prompts, cfg))


def test_lists_in_both_forms(tmp_path: Path, pictures: tuple[str, str]):
    rows = [
        {"prompt": "a", "negative_prompt": "ugly", "seed": 5},
        {"prompt": "b", "image": "red.png", "last_image": "blue.png"},
    ]
    listed = tmp_path / "list.jsonl"
    listed.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    cfg = config(prompts=["first"], prompts_file=str(listed), negative_prompt="bad", seed=2)
    first, a, b = read_prompts(cfg)
    assert first == Prompt(prompt="first", negative_prompt="bad", seed=2)
    assert a == Prompt(prompt="a", negative_prompt="ugly", seed=5)
    assert (b.image, b.last_image) == pictures
    assert (b.negative_prompt, b.seed) == ("bad", 2)
    texts = captions_of([first, a, b])
    assert [text for text, _ in texts] == ["first", "bad", "a", "ugly", "b", "bad"]
    assert [bool(shown) for _, shown in texts] == [False, False, False, False, True, True]
    assert texts[4] == positive(b) == ("b", pictures[0])
    assert texts[5] == negative(b) != negative(first)
    lines = tmp_path / "list.txt"
    lines.write_text(' {"prompt": 1}\n\n c ')
    given = read_prompts(config(prompts_file=str(lines), image=pictures[0]))
    assert [(p.prompt, p.image) for p in given] == [
        ('{"prompt": 1}', pictures[0]),
        ("c", pictures[0]),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "list.jsonl line 2: not JSON"),
        ('{"text": "a"}', "line 2: no prompt"),
        ('{"prompt": "a", "images": "x"}', "line 2: unknown field 'images'; choose from prompt,"),
        ('{"prompt": "a", "seed": "x"}', "line 2: seed='x' is not of type int"),
        ('{"prompt": "a", "image": "gone.png"}', "gone.png does not exist"),
        ('{"prompt": "a", "last_image": "red.png"}', "has no image beside it"),
    ],
)
def test_lines_that_are_wrong(line: str, message: str, tmp_path: Path, pictures: tuple[str, str]):
    listed = tmp_path / "list.jsonl"
    listed.write_text('{"prompt": "fine"}\n' + line)
    with pytest.raises(ValueError, match=message):
        read_prompts(config(prompts_file=str(listed)))


def test_pictures_that_cannot_be_given(tmp_path: Path, pictures: tuple[str, str]):
    with pytest.raises(ValueError, match=r"begins a video, but sample\.frames=1"):
        read_prompts(config(prompts=["a"], image=pictures[0], frames=1))
    with pytest.raises(ValueError, match=r"model\.image_condition=none"):
        sample([Prompt(prompt="a", image=pictures[0])])
    (tmp_path / "broken.png").write_bytes(b"\x89PNG no")
    with pytest.raises(ValueError, match=r"broken\.png cannot be read"):
        read_picture(str(tmp_path / "broken.png"), config().bucket)


def test_pictures_cover_the_video_and_are_cut_at_the_centre(tmp_path: Path):
    wide = np.zeros((32, 96, 3), np.uint8)
    wide[:, 24:72] = 200  # what the crop leaves
    Image.fromarray(wide).save(tmp_path / "wide.png")
    found = read_picture(str(tmp_path / "wide.png"), config().bucket)
    assert found.shape == (1, HEIGHT, WIDTH, 3)
    assert (found == 200).all()


@pytest.mark.parametrize("form", [REPLACE, CONCAT])
def test_a_video_depends_on_its_prompt_and_pictures_alone(
    form: ImageCondition, pictures: tuple[str, str], tmp_path: Path
):
    red, blue = pictures
    wanted = Prompt(prompt="a cat", image=red, negative_prompt="ugly")
    others = [Prompt(prompt="dogs and more"), Prompt(prompt="a cat", image=red, last_image=blue)]
    (alone,) = sample([wanted], form, cfg_scale=3.0)
    among = sample([*others, wanted], form, cfg_scale=3.0, batch_size=3)
    torch.testing.assert_close(among[2].pixels, alone.pixels, rtol=0, atol=1e-5)
    (tmp_path / "copy.png").write_bytes(Path(red).read_bytes())
    copy = Prompt(prompt="a cat", image=str(tmp_path / "copy.png"))
    assert copy.key() == wanted.key()
    keys = {p.key() for p in (wanted, *others, Prompt(prompt="a cat"))}
    assert len(keys) == 4
    different = [
        Prompt(prompt="a cat", image=red, negative_prompt="bad"),
        Prompt(prompt="a cat", image=red, negative_prompt="ugly", seed=1),
        Prompt(prompt="a dog", image=red, negative_prompt="ugly"),
    ]
    for video in sample(different, form, cfg_scale=3.0):
        assert (video.pixels - alone.pixels).abs().max() > 1e-3


def test_replaced_frames_come_out_as_they_went_in(pictures: tuple[str, str]):
    red, blue = pictures
    (video,) = sample([Prompt(prompt="a", image=red, last_image=blue)], REPLACE)
    torch.testing.assert_close(video.pixels[:, 0, 0, 0], torch.tensor([1.0, -1.0, -1.0]))
    torch.testing.assert_close(video.pixels[:, -1, 0, 0], torch.tensor([-1.0, -1.0, 1.0]))
    assert (video.pixels[:, 2] - video.pixels[:, 0]).abs().mean() > 0.1


def test_what_the_model_is_told(pictures: tuple[str, str]):
    red, blue = pictures
    prompts = [Prompt(prompt="a"), Prompt(prompt="b", image=red, last_image=blue)]
    bucket, cpu = config().bucket, torch.device("cpu")
    given = encode_given(PoolingVae(), prompts, bucket, REPLACE, cpu)
    assert given is not None
    assert given.mask.int().tolist() == [[0, 0, 0], [1, 0, 1]]
    assert given.latents.shape == (2, 3, 3, 4, 6)
    assert given.latents[1, :, 0].mean(dim=(1, 2)).tolist() == [0.5, -0.5, -0.5]
    assert given.latents[1, :, 2].mean(dim=(1, 2)).tolist() == [-0.5, -0.5, 0.5]
    assert not given.latents[0].any()
    assert encode_given(PoolingVae(), prompts[:1], bucket, REPLACE, cpu) is None
    told = encode_given(PoolingVae(), prompts[:1], bucket, CONCAT, cpu)
    assert told is not None
    assert not told.mask.any()


@pytest.mark.parametrize("steps", [2, 5, 10, 50, 64])
def test_linear_quadratic_is_that_of_mochi(steps: int):
    found = sigma_schedule(steps, schedule=Schedule.linear_quadratic)
    wanted = [*linear_quadratic_schedule(steps, 0.025, steps // 2)[:steps], 0.0]
    torch.testing.assert_close(found, torch.tensor(wanted), rtol=0, atol=1e-6)


def test_schedules():
    assert sigma_schedule(4, schedule=Schedule.linear).tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert sigma_schedule(1, schedule=Schedule.linear_quadratic).tolist() == [1.0, 0.0]
    assert torch.equal(sigma_schedule(10), sigma_schedule(10, 17.0))
    assert torch.equal(sigma_schedule(50), sigma_schedule(50, 7.0))
    prompts = [Prompt(prompt="a")]
    videos = [sample(prompts, schedule=schedule)[0].pixels for schedule in Schedule]
    assert (videos[0] - videos[1]).abs().max() > 1e-3
    assert (videos[1] - videos[2]).abs().max() > 1e-3
    with pytest.raises(ValueError, match=r"sample\.shift=7\.0 belongs to sample\.schedule=shifted"):
        config(schedule=Schedule.linear, shift=7.0)


class SeeingText(FakeText):
    """Says what it is shown."""

    sees_images = True

    def encode(self, captions, media, images=None):
        features = super().encode(captions, media)
        for row, image in enumerate(images):
            features.pooled[row] = -1 if image is None else float(image.mean())
        return features


def test_an_encoder_that_sees_is_shown_the_picture_and_black_beside_the_negative(tmp_path):
    write_image(tmp_path / "a.png", level=90)
    given = Prompt(prompt="a cat", negative_prompt="ugly", image=str(tmp_path / "a.png"))
    plain = Prompt(prompt="a dog", negative_prompt="")
    captions = captions_of([given, plain])
    features = encode_captions(SeeingText(), captions, Bucket(5, 48, 64))
    assert [text for text, _ in captions] == ["a cat", "ugly", "a dog", ""]
    assert [float(part.pooled[0, 0]) for part in features] == [90, 0, -1, 0]
