"""Real clips and images, read in place; the tests are skipped where the folder is absent."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from media_factory import SAMPLE_MEDIA

from hunyuan_train.data.config import DataConfig
from hunyuan_train.data.dataset import decode_samples
from hunyuan_train.data.manifest import list_sources
from hunyuan_train.data.quarantine import MediaError

pytestmark = pytest.mark.skipif(
    not (SAMPLE_MEDIA / "manifest.jsonl").is_file(), reason=f"no sample media in {SAMPLE_MEDIA}"
)

CAUSES = {
    "videos/broken_audio_only.mp4": "no video stream",
    "videos/broken_corrupted_h264.mp4": "packets that do not decode: 1",
    "videos/broken_header_garbage.mp4": "header is garbage",
    "videos/broken_jpeg_named_as.mp4": "a JPEG image named .mp4",
    "videos/broken_text_file.mp4": "plain text named .mp4",
    "videos/broken_truncated_no_moov.mp4": "index (moov box) is missing",
    "videos/broken_zero_byte.mp4": "empty (0 bytes)",
    "images/broken_half_peacock.jpg": "ends too early",
    "images/broken_text_file.png": "plain text named .png",
    "images/broken_truncated.jpg": "ends too early",
    "images/broken_zero_byte.jpg": "empty (0 bytes)",
}


@pytest.fixture(scope="module")
def results():
    """Decode everything once: file -> samples, or the error."""
    cfg = DataConfig(anchors=[64, 128], durations=[1, 5, 17], assign="every")
    table = cfg.bucket_table()

    def decode(source):
        try:
            return source.file, decode_samples(source.path, source.media, cfg, table)
        except MediaError as error:
            return source.file, error

    with ThreadPoolExecutor(2) as pool:
        return dict(pool.map(decode, list_sources(str(SAMPLE_MEDIA)).sources))


@pytest.fixture(scope="module")
def manifest():
    lines = (SAMPLE_MEDIA / "manifest.jsonl").read_text().splitlines()
    return {row["file"]: row for row in map(json.loads, lines)}


def test_every_broken_file_is_rejected_for_its_true_cause(results, manifest):
    broken = {file for file, row in manifest.items() if row["expect"] == "broken"}
    assert broken == set(CAUSES)
    for file in broken:
        assert isinstance(results[file], MediaError), file
        assert CAUSES[file] in results[file].detail, (file, results[file].detail)


def test_no_good_file_is_rejected_and_each_gets_the_samples_its_length_allows(results, manifest):
    for file, row in manifest.items():
        if row["expect"] != "ok":
            continue
        assert not isinstance(results[file], MediaError), (file, results[file])
        have = {sample.bucket.frames for sample in results[file]}
        # No file is faster than 30 fps, so every frame counts.
        assert have == {d for d in (1, 5, 17) if d <= row.get("frames", 1)}, file


def test_bucket_follows_the_upright_aspect(results, manifest):
    for file in ("videos/keyboard_rotated_90.mov", "images/hummingbird_white_bg.jpg"):
        row = manifest[file]
        sample = results[file][0]
        assert row["height"] > row["width"]
        assert sample.bucket.height > sample.bucket.width, file


def test_one_pixel_picture_is_enlarged_to_the_smallest_anchor(results):
    (sample,) = results["images/d_one_pixel.png"]
    assert (sample.anchor, sample.scale) == (64, 64)
