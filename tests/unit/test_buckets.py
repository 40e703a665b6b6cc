import pytest

from hunyuan_train.data.buckets import Assign, Bucket, BucketTable, check_vae, cover_crop
from hunyuan_train.data.quarantine import MediaError, Reason
from hunyuan_train.models.vae.config import VaeConfig
from hunyuan_train.models.vae.state_dict import hunyuan_15_config


@pytest.mark.parametrize(
    ("anchor", "stride", "count"),
    [
        (256, 32, 25),
        (256, 16, 49),
        (360, 32, 31),
        (480, 32, 43),
        (540, 32, 49),
        (720, 32, 67),
        (960, 32, 91),
        (640, 16, 121),
        (960, 16, 181),
    ],
)
def test_table_has_the_published_number_of_sizes(anchor, stride, count):
    table = BucketTable([anchor], [1], 4.0, stride)
    assert len(table.sizes[anchor]) == count


def test_tiny_anchor_gives_a_small_symmetric_table_from_wide_to_tall():
    sizes = BucketTable([64], [1]).sizes[64]
    assert sizes[0] == (32, 128)
    assert (64, 64) in sizes
    assert len(sizes) == 13
    assert [(width, height) for height, width in reversed(sizes)] == sizes


def test_table_does_not_depend_on_the_order_of_its_arguments():
    assert BucketTable([96, 64], [17, 1]).buckets() == BucketTable([64, 96], [1, 17, 1]).buckets()


def test_bucket_counts_latents_and_tokens():
    bucket = Bucket(17, 64, 96)
    assert bucket.latent_shape == (5, 8, 12)
    assert bucket.tokens == 5 * 4 * 6
    assert str(bucket) == "17x64x96"
    assert Bucket.parse("17x64x96") == bucket
    assert bucket.media == "video"
    assert Bucket(1, 64, 96).media == "image"
    assert sorted([Bucket(5, 16, 16), Bucket(1, 32, 32)])[0] == Bucket(1, 32, 32)


def test_published_720p_shape_has_the_published_token_count():
    assert Bucket(129, 720, 1280).tokens == 33 * 45 * 80


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((17, 250, 256), r"height=250 is not a multiple of 16; use 240 or 256"),
        ((17, 256, 8), r"width=8 is not a multiple of 16; use 16"),
        ((16, 256, 256), r"frames=16 is not 4n\+1 .*; use 13 or 17"),
        ((0, 256, 256), r"frames=0 is not 4n\+1 .*; use 1"),
    ],
)
def test_illegal_bucket_is_named_with_the_nearest_legal_values(shape, message):
    with pytest.raises(ValueError, match=message):
        Bucket(*shape)


@pytest.mark.parametrize("text", ["17x64", "17x64x9a", "17,64,96"])
def test_unreadable_bucket_text_is_refused(text):
    with pytest.raises(ValueError, match="is not FRAMESxHEIGHTxWIDTH"):
        Bucket.parse(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], [1]), "must not be empty"),
        (([8], [1]), "anchor=8 is below the bucket stride 16"),
        (([256], [16]), r"duration=16 is not 4n\+1"),
        (([256], [1], 0.5), "max_aspect=0.5 is below 1"),
        (([256], [1], 4.0, 24), "stride=24 is not a multiple of 16"),
    ],
)
def test_illegal_table_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        BucketTable(*arguments)


def test_nearest_takes_the_largest_covered_anchor_and_the_longest_duration():
    table = BucketTable([64, 128, 256], [1, 5, 17])
    (chosen,) = table.assign(180, 180, 16)
    assert chosen.anchor == 128
    assert chosen.bucket == Bucket(5, 128, 128)
    assert chosen.cover.scale == pytest.approx(128 / 180)


def test_every_makes_one_sample_per_anchor_and_duration_that_fit():
    table = BucketTable([64, 128, 256], [1, 5, 17])
    chosen = table.assign(180, 180, 17, Assign.every)
    assert [(item.anchor, item.bucket.frames) for item in chosen] == [
        (64, 1),
        (64, 5),
        (64, 17),
        (128, 1),
        (128, 5),
        (128, 17),
    ]


def test_max_upscale_lets_a_larger_anchor_in():
    table = BucketTable([128, 256], [1])
    assert table.assign(180, 180, 1)[0].anchor == 128
    assert table.assign(180, 180, 1, max_upscale=1.5)[0].anchor == 256


def test_smaller_than_every_anchor_is_enlarged_to_the_smallest():
    (chosen,) = BucketTable([64, 128], [1]).assign(1, 1, 1)
    assert chosen.bucket == Bucket(1, 64, 64)
    assert chosen.cover.scale == 64


def test_shorter_than_every_duration_has_no_bucket():
    assert BucketTable([64], [5, 17]).assign(480, 640, 4) == []


def test_crop_beyond_the_limit_is_refused_with_aspect_bucket_and_loss():
    table = BucketTable([64, 128], [1, 5])
    with pytest.raises(MediaError) as refused:
        table.assign(400, 8000, 5, max_crop_loss=0.5)
    assert refused.value.reason == Reason.crop
    assert refused.value.detail == (
        "aspect 20:1 is too far from every bucket: a crop to the nearest, 5x64x256, loses 80.0% of "
        "the picture, and data.max_crop_loss is 50.0%"
    )
    with pytest.raises(MediaError, match=r"aspect 1:20 .* nearest, 1x256x64, loses 80\.0%"):
        table.assign(8000, 400, 1, max_crop_loss=0.5)


def test_crop_at_the_limit_is_taken_and_a_source_too_short_is_not_called_cropped():
    table = BucketTable([64], [5])
    (chosen,) = table.assign(64, 512, 5, max_crop_loss=0.5)
    assert (chosen.bucket, chosen.cover.crop_loss) == (Bucket(5, 32, 128), 0.5)
    with pytest.raises(MediaError):
        table.assign(64, 520, 5, max_crop_loss=0.5)
    assert table.assign(64, 520, 4, max_crop_loss=0.5) == []


@pytest.mark.parametrize("mode", list(Assign))
def test_only_the_anchors_that_crop_too_much_are_left_out(mode):
    table = BucketTable([16, 64], [1])  # one square, and 13 sizes up to 4:1
    assert {item.anchor for item in table.assign(100, 300, 1, Assign.every)} == {16, 64}
    assert [item.anchor for item in table.assign(100, 300, 1, mode, max_crop_loss=0.5)] == [64]


@pytest.mark.parametrize(
    ("anchor", "count", "sizes"),
    [
        (256, 49, {(256, 256), (208, 304), (192, 336)}),
        (512, 97, {(512, 512), (384, 672)}),
        (540, 101, {(528, 528), (400, 720)}),
        (720, 133, {(720, 720), (528, 944)}),
        (960, 181, {(960, 960), (720, 1280), (832, 1104)}),
    ],
)
def test_anchors_of_the_published_stages_hold_legal_sizes_near_their_area(anchor, count, sizes):
    made = BucketTable([anchor], [1]).sizes[anchor]
    assert len(made) == count
    assert sizes <= set(made)
    for height, width in made:
        assert height % 16 == width % 16 == 0
        assert 0.87 * anchor**2 <= height * width <= anchor**2 + 128


def test_portrait_and_landscape_are_mirror_images():
    table = BucketTable([256], [1])
    for height, width in [(404, 720), (416, 1244), (241, 427), (1000, 100)]:
        tall, wide = table.nearest_size(256, height, width), table.nearest_size(256, width, height)
        assert tall == wide[::-1]


def test_cover_crop_takes_the_centre_and_reports_what_it_loses():
    cover = cover_crop(100, 200, Bucket(1, 64, 64))
    assert (cover.resize_height, cover.resize_width) == (64, 128)
    assert (cover.top, cover.left) == (0, 32)
    assert cover.crop_loss == 0.5


def test_latents_of_another_size_are_refused():
    check_vae(VaeConfig())
    with pytest.raises(ValueError, match=r"vae_hy15\) makes one latent of 16 x 16 .* count 8 x 8"):
        check_vae(hunyuan_15_config())
