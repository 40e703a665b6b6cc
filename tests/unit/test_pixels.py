"""Clips as pixels: how they are cut in every epoch, and batches of them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from hunyuan_train.config.compose import compose_config
from hunyuan_train.data.buckets import Bucket
from hunyuan_train.data.collate import new_batch
from hunyuan_train.data.dataset import Window, decode_samples, widest_interval
from hunyuan_train.data.pixels import PixelStore
from hunyuan_train.data.quarantine import SampleError
from hunyuan_train.data.shapes import write_shapes_dataset
from hunyuan_train.engine.reconstruction import cut, cut_size, forward_flops, frozen, to_network
from hunyuan_train.evaluation.video import write_mp4


def config(folder: Path, *extra: str):
    return compose_config(
        [
            "data=shapes",
            f"data.source={folder}",
            "data.anchors=[64]",
            "data.durations=[1,5]",
            "data.assign=every",
            *extra,
        ]
    )


@pytest.fixture(scope="module")
def ramp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clip of 33 grey frames, each brighter than the one before, without any caption."""
    folder = tmp_path_factory.mktemp("ramp")
    levels = torch.linspace(-0.8, 0.8, 33).view(1, 33, 1, 1).expand(3, 33, 64, 64)
    write_mp4(folder / "ramp.mp4", levels, fps=8, crf=10)
    return folder


def levels_of(pixels: np.ndarray) -> list[int]:
    """Return the numbers of a sample's frames in the ramp."""
    means = pixels.reshape(len(pixels), -1).mean(axis=1) / 127.5 - 1
    return [round((mean + 0.8) / 1.6 * 32) for mean in means]


def test_frames_are_an_even_interval_apart_that_changes_from_epoch_to_epoch(
    ramp: Path, tmp_path: Path
) -> None:
    store = PixelStore(config(ramp).data, str(tmp_path), seed=0, max_interval=8)
    (number,) = [n for n in range(len(store.index)) if store.index.row(n).bucket.frames == 5]
    row = store.index.row(number)
    found = set()
    for epoch in range(12):
        shown = levels_of(store.decode(*store.job(row, epoch)))
        steps = set(np.diff(shown).tolist())
        assert len(steps) == 1, shown
        assert 0 <= shown[0] <= shown[-1] <= 32
        found.add((shown[0], steps.pop()))
        assert levels_of(store.decode(*store.job(row, epoch))) == shown, "the same every time"
    assert {interval for _, interval in found} >= {1, 8}
    assert len({first for first, _ in found}) > 4


def test_an_interval_is_as_wide_as_the_clip_allows(ramp: Path) -> None:
    assert widest_interval(33, 5, 1, 8) == 8
    assert widest_interval(33, 17, 1, 8) == 2
    assert widest_interval(33, 17, 2, 8) == 1
    assert widest_interval(33, 1, 1, 8) == 8
    data = config(ramp, "data.durations=[17]").data
    for offset, first in ((0.0, 0), (0.999, 0)):
        window = Window(interval=8, offset=offset)
        path = ramp / "ramp.mp4"
        (sample,) = decode_samples(path, "video", data, data.bucket_table(), window)
        assert levels_of(sample.pixels) == list(range(first, 33, 2))


def test_batches_hold_bytes_and_what_is_misshapen_is_refused(tmp_path: Path) -> None:
    write_shapes_dataset(tmp_path / "clips", 2, 1, 0, frame_sizes=[(64, 64)], clip_frames=[9])
    store = PixelStore(config(tmp_path / "clips").data, str(tmp_path), seed=0)
    bucket = Bucket(5, 64, 64)
    number = next(n for n in range(len(store.index)) if store.index.row(n).bucket == bucket)
    row, sample = store.index.row(number), store.load(number, 0)
    store.check(sample, row)
    with pytest.raises(SampleError, match=r"have shape \[4, 64, 64, 3\] instead of \[5, 64, 64"):
        store.check(sample[:4], row)
    batch = new_batch(store, bucket, 2, 1.0)
    batch.put(1, row, 3, 0, sample)
    assert batch.sample_ids == ["", row.sample_id]
    assert batch.epochs[1] == 3
    assert not batch.pixels[0].any()
    assert torch.equal(batch.pixels[1], torch.from_numpy(sample))
    assert store.batch_bytes(bucket, 2) == batch.pixels.numel()
    batch.clear()
    assert not batch.pixels.any()
    assert batch.weight == 0


def test_a_batch_is_cut_alike_and_anew_by_its_first_sample(tmp_path: Path) -> None:
    write_shapes_dataset(tmp_path / "clips", 1, 1, 0, frame_sizes=[(64, 64)], clip_frames=[9])
    cfg = config(tmp_path / "clips", "vae_training.crop_px=32")
    store = PixelStore(cfg.data, str(tmp_path), seed=0)
    batch = store.empty_batch(Bucket(1, 64, 96), 2, 1.0)
    batch.pixels.copy_(torch.randint(0, 256, batch.pixels.shape))
    corners = set()
    for epoch in range(8):
        batch.epochs[0] = epoch
        part = cut(batch, cfg)
        assert part.shape == (2, 1, 32, 32, 3)
        corners.add(part.storage_offset())
        assert torch.equal(part, cut(batch, cfg))
    assert len(corners) > 4
    whole = to_network(batch.pixels, torch.device("cpu"), torch.float32)
    assert whole.shape == (2, 3, 1, 64, 96)
    assert -1 <= whole.min() < -0.9 < 0.9 < whole.max() <= 1
    no_crop = replace(cfg.vae_training, crop_px=0)
    assert cut_size(64, 96, no_crop) == (64, 96)


def test_flops_of_a_vae_grow_with_the_pixels_it_sees() -> None:
    key = frozen(compose_config(["vae=tiny"]))
    image, clip = forward_flops(key, 1, 64, 64), forward_flops(key, 17, 64, 64)
    assert forward_flops(key, 1, 64, 128) == pytest.approx(2 * image, rel=0.05)
    # An image takes a third of the taps: its past are copies of itself.
    assert 17 * image < clip < 3.5 * 17 * image
