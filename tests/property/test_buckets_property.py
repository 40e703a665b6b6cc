import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hunyuan_train.data.buckets import Assign, Bucket, BucketTable, cover_crop
from hunyuan_train.data.quarantine import MediaError

SIDES = st.integers(min_value=1, max_value=4000)
ANCHORS = st.integers(min_value=32, max_value=1024)
ASPECTS = st.floats(min_value=1.0, max_value=5.0)


@settings(max_examples=60, deadline=None)
@given(anchor=ANCHORS, stride=st.sampled_from([16, 32]), max_aspect=ASPECTS)
def test_every_size_is_legal_within_area_and_aspect(anchor, stride, max_aspect):
    sizes = BucketTable([anchor], [1], max_aspect, stride).sizes[anchor]
    cells = round((anchor / stride) ** 2)
    assert len(set(sizes)) == len(sizes)
    for height, width in sizes:
        Bucket(1, height, width)
        assert height % stride == width % stride == 0
        assert (height // stride) * (width // stride) <= cells
        assert max(height, width) <= max_aspect * min(height, width) + 1e-9
    # Maximal: a square of whole cells fits under the area, so the table always has one.
    assert any(height == width for height, width in sizes)


@settings(max_examples=80, deadline=None)
@given(height=SIDES, width=SIDES, anchor=st.sampled_from([64, 96, 256, 540]))
def test_nearest_size_is_nearest_in_log_aspect(height, width, anchor):
    table = BucketTable([anchor], [1])
    chosen = table.nearest_size(anchor, height, width)

    def distance(size):
        return abs(math.log(size[1] / size[0]) - math.log(width / height))

    assert chosen in table.sizes[anchor]
    assert distance(chosen) <= min(map(distance, table.sizes[anchor])) + 1e-8


@settings(max_examples=100, deadline=None)
@given(
    height=SIDES,
    width=SIDES,
    bucket_height=st.integers(1, 60).map(lambda cells: 16 * cells),
    bucket_width=st.integers(1, 60).map(lambda cells: 16 * cells),
)
def test_cover_contains_the_bucket_and_touches_it_on_one_side(
    height, width, bucket_height, bucket_width
):
    cover = cover_crop(height, width, Bucket(1, bucket_height, bucket_width))
    assert 0 <= cover.top <= cover.resize_height - bucket_height
    assert 0 <= cover.left <= cover.resize_width - bucket_width
    assert cover.resize_height == bucket_height or cover.resize_width == bucket_width
    assert 0 <= cover.crop_loss < 1
    # The resize keeps the aspect: each side is the scaled one, up to rounding to whole pixels.
    assert abs(cover.resize_height - height * cover.scale) <= 0.5 + 1e-6
    assert abs(cover.resize_width - width * cover.scale) <= 0.5 + 1e-6


@settings(max_examples=80, deadline=None)
@given(
    height=SIDES,
    width=SIDES,
    frames=st.integers(1, 200),
    durations=st.sets(st.integers(0, 20).map(lambda n: 4 * n + 1), min_size=1, max_size=4),
    max_upscale=st.floats(1.0, 2.0),
)
def test_nearest_is_the_largest_of_every(height, width, frames, durations, max_upscale):
    table = BucketTable([64, 128, 256], durations)
    every = table.assign(height, width, frames, Assign.every, max_upscale)
    nearest = table.assign(height, width, frames, Assign.nearest, max_upscale)
    assert bool(every) == (frames >= min(durations))
    assert nearest == every[-1:]
    for item in every:
        assert item.bucket.frames <= frames
        assert item.anchor == 64 or item.cover.scale <= max_upscale + 1e-6
    if every:
        assert nearest[0].bucket.frames == max(d for d in durations if d <= frames)
        assert nearest[0].anchor == max(item.anchor for item in every)


@settings(max_examples=80, deadline=None)
@given(
    height=SIDES,
    width=SIDES,
    frames=st.integers(1, 20),
    limit=st.floats(0.0, 1.0),
    mode=st.sampled_from(list(Assign)),
)
def test_no_crop_above_the_limit_is_taken_and_none_below_it_refused(
    height, width, frames, limit, mode
):
    table = BucketTable([16, 64, 256], [1, 5, 17])
    every = table.assign(height, width, frames, Assign.every)
    within = [item for item in every if item.cover.crop_loss <= limit + 1e-9]
    if every and not within:
        with pytest.raises(MediaError):
            table.assign(height, width, frames, mode, max_crop_loss=limit)
    else:
        taken = table.assign(height, width, frames, mode, max_crop_loss=limit)
        assert taken == (within if mode == Assign.every else within[-1:])


@settings(max_examples=80, deadline=None)
@given(aspect=st.floats(-math.log(4), math.log(4)), anchor=st.integers(64, 1024))
def test_aspects_within_the_table_lose_less_than_a_quarter(aspect, anchor):
    height, width = round(2000 * math.exp(-aspect / 2)), round(2000 * math.exp(aspect / 2))
    size = BucketTable([anchor], [1]).nearest_size(anchor, height, width)
    assert cover_crop(height, width, Bucket(1, *size)).crop_loss < 0.25
