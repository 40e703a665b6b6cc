"""The moving-shapes generator: what it draws, what it holds out, what it writes."""

import json
from itertools import combinations

import av
import numpy as np
import pytest
from PIL import Image

from hunyuan_train.data.shapes import (
    CLIP_FRAMES,
    COLOURS,
    DIRECTIONS,
    FRAME_SIZES,
    SHAPES,
    Combination,
    draw_clip,
    draw_sample,
    held_out_combinations,
    held_out_prompts,
    shape_coverage,
    training_combinations,
    write_shapes_dataset,
)
from hunyuan_train.runtime.seed import keyed_generator


def test_held_out_combinations_are_32_and_never_trained_on():
    held, trained = set(held_out_combinations()), set(training_combinations())
    assert len(held) == 32
    assert len(trained) == 64
    assert not held & trained
    assert len(held | trained) == len(COLOURS) * len(SHAPES) * len(DIRECTIONS)


def test_every_pair_of_words_is_seen_in_training():
    words = [(combo.colour, combo.shape, combo.direction) for combo in training_combinations()]
    sizes = (len(COLOURS), len(SHAPES), len(DIRECTIONS))
    for first, second in combinations(range(3), 2):
        assert len({(row[first], row[second]) for row in words}) == sizes[first] * sizes[second]


def test_held_out_prompts_are_fixed_and_balanced():
    prompts = held_out_prompts()
    assert prompts == held_out_prompts()
    assert sorted(prompts) == sorted(combo.caption for combo in held_out_combinations())
    for words, least in ((COLOURS, 5), (SHAPES, 8), (DIRECTIONS, 8)):
        assert all(sum(word in prompt.split() for prompt in prompts) >= least for word in words)


@pytest.mark.parametrize("text", ["a red circle", "a blue pillar moving up"])
def test_caption_round_trip(text):
    assert Combination.parse(text).caption == text


@pytest.mark.parametrize(
    "text", ["red circle", "a pink circle", "a red circle moving", "a red dog"]
)
def test_foreign_caption_is_refused(text):
    with pytest.raises(ValueError, match="is not of the moving-shapes data"):
        Combination.parse(text)


def test_coverage_has_the_area_of_the_figure():
    areas = {"circle": np.pi / 4, "triangle": 0.5, "bar": 0.42, "pillar": 0.42}
    for shape, share in areas.items():
        cover = shape_coverage(shape, 30.3, 33.7, 20.0, 64, 64)
        assert cover.sum() == pytest.approx(share * 1600, rel=0.01)


def test_unknown_shape_is_refused():
    with pytest.raises(ValueError, match="shape 'star' is unknown; choose from circle"):
        shape_coverage("star", 8, 8, 4, 16, 16)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("size", FRAME_SIZES)
def test_shape_moves_steadily_and_stays_inside(direction, size):
    for number in range(6):
        generator = keyed_generator(3, "test_clip", number)
        clip = draw_clip(Combination("red", "circle", direction), 25, *size, generator)
        moving = np.abs(clip.astype(int) - clip[0, 0, 0].astype(int)).sum(axis=-1) > 120
        assert not moving[:, [0, -1]].any()
        assert not moving[:, :, [0, -1]].any()
        rows = np.array([np.argwhere(frame).mean(axis=0) for frame in moving])
        steps = np.diff(rows[:, ::-1], axis=0)
        along, across = steps @ DIRECTIONS[direction], steps @ np.array(DIRECTIONS[direction])[::-1]
        assert along.min() > 0
        assert np.ptp(along) <= 1.01  # the outline is thresholded to whole pixels
        assert np.abs(across).max() < 0.01


def test_short_clips_move_as_fast_as_long_ones():
    combo = Combination("red", "circle", "left")
    short = draw_clip(combo, 5, 160, 96, keyed_generator(0, "test_clip", 1))
    long = draw_clip(combo, 17, 160, 96, keyed_generator(0, "test_clip", 1))
    assert _centre_x(short[0]) - _centre_x(short[4]) == pytest.approx(
        _centre_x(long[0]) - _centre_x(long[4]), abs=0.1
    )


def _centre_x(frame):
    cover = (frame.astype(int) - frame[0, 0].astype(int))[..., 0].astype(float)
    return (cover.sum(axis=0) * np.arange(cover.shape[1])).sum() / cover.sum()


def test_rounds_show_every_training_combination_once():
    sizes = [(32, 32)]
    shown = [draw_sample(i, "video", 5, sizes, [1]).combo for i in range(128)]
    assert sorted(shown[:64]) == sorted(training_combinations())
    assert sorted(shown[64:]) == sorted(training_combinations())
    assert shown[:64] != shown[64:]
    pairs = {draw_sample(i, "image", 5, sizes, [5]).combo for i in range(24)}
    assert len(pairs) == 24
    assert all(combo.direction == "" for combo in pairs)


def test_dataset_on_disk_is_what_was_drawn(tmp_path):
    manifest = write_shapes_dataset(tmp_path, 5, 4, seed=7)
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    assert [row["media"] for row in rows] == ["video"] * 5 + ["image"] * 4
    for index, row in enumerate(rows[:5]):
        with av.open(str(tmp_path / row["file"])) as container:
            frames = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
        drawn = draw_sample(index, "video", 7, list(FRAME_SIZES), list(CLIP_FRAMES))
        assert row["caption"] == drawn.combo.caption
        assert [row["frames"], row["height"], row["width"]] == list(np.shape(frames)[:3])
        error = np.abs(np.stack(frames).astype(int) - drawn.pixels.astype(int))
        assert error.mean() < 1.0
    for index, row in enumerate(rows[5:]):
        pixels = np.asarray(Image.open(tmp_path / row["file"]))
        drawn = draw_sample(index, "image", 7, list(FRAME_SIZES), [5])
        assert row["caption"] == drawn.combo.caption
        np.testing.assert_array_equal(pixels, drawn.pixels[0])


def test_second_writing_is_the_same_and_another_seed_is_not(tmp_path):
    for name, seed in (("one", 1), ("two", 1), ("other", 2)):
        write_shapes_dataset(tmp_path / name, 2, 1, seed=seed)
    files = ["videos/00000.mp4", "videos/00001.mp4", "images/00000.png", "manifest.jsonl"]
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    assert (tmp_path / "one" / files[0]).read_bytes() != (
        tmp_path / "other" / files[0]
    ).read_bytes()


def test_empty_dataset_is_refused(tmp_path):
    with pytest.raises(ValueError, match="num_clips=0 and num_images=0: ask for at least one"):
        write_shapes_dataset(tmp_path, 0, 0, seed=0)
