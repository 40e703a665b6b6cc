"""Frames encoded alone: made by precompute and on-line, stored beside their clip, in the batch."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from media_factory import FakePosterior, FakeText, FakeVae, marked_frames, write_image, write_video
from sample_store import make_loader

from hunyuan_train.data.buckets import Bucket
from hunyuan_train.data.collate import batch_bytes, check_sample, empty_batch
from hunyuan_train.data.config import DataConfig
from hunyuan_train.data.online import OnlineStore
from hunyuan_train.data.quarantine import SampleError
from hunyuan_train.data.stills import encode_stills
from hunyuan_train.data.store import LatentStore
from hunyuan_train.encoders.latents import LatentEncoder
from hunyuan_train.engine.precompute import precompute
from hunyuan_train.engine.precompute_work import config_hash

BOTH = ["first", "last"]


class WholeClipVae(FakeVae):
    """As the released VAE: what a frame becomes depends on all frames beside it."""

    def encode(self, pixels: torch.Tensor) -> FakePosterior:
        posterior = super().encode(pixels)
        shift = pixels.mean(dim=(1, 2, 3, 4), keepdim=True)
        return FakePosterior(posterior.mean + shift, posterior.std * (2 + shift))


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Three clips of 9 frames and two images."""
    root = tmp_path_factory.mktemp("stills") / "clips"
    for index in range(3):
        write_video(root / f"v{index}.mp4", marked_frames(9, 48, 64))
        (root / f"v{index}.txt").write_text(f"clip {index}")
    for index in range(2):
        write_image(root / f"i{index}.png", level=40 + 100 * index)
        (root / f"i{index}.txt").write_text(f"image {index}")
    return root


def config(clips, store, **settings) -> DataConfig:
    sizes = {"anchors": [48], "durations": [1, 9], "storage_dtype": "float32", "max_tokens": 64}
    return DataConfig(source=str(clips), latents=str(store), **(sizes | settings))


def made(cfg: DataConfig) -> LatentStore:
    precompute(cfg, LatentEncoder(WholeClipVae()), FakeText())
    return LatentStore.open(cfg.latents, cfg, "data")


def test_stills_are_the_frames_encoded_alone():
    generator = np.random.default_rng(0)
    clips = [generator.integers(0, 256, (5, 16, 24, 3), np.uint8) for _ in range(2)]
    vae = LatentEncoder(WholeClipVae())
    stills = encode_stills(vae.encode, clips, BOTH)
    assert stills.shape == (2, 2, 4, 2, 2, 3)
    for row, clip in enumerate(clips):
        for place, frame in enumerate((clip[:1], clip[-1:])):
            mean, std = vae.encode([frame])
            torch.testing.assert_close(stills[row, 0, :, place], mean[0, :, 0])
            torch.testing.assert_close(stills[row, 1, :, place], std[0, :, 0])
    assert (stills[:, 0, :, 0] - vae.encode(clips)[0][:, :, 0]).abs().min() > 1e-3


def test_precompute_stores_them_beside_clips_only(clips, tmp_path):
    plain, store = (
        made(config(clips, tmp_path / "a")),
        made(config(clips, tmp_path / "b", condition_frames=["last", "first"], encode_pixels=1)),
    )
    assert store.meta.condition_frames == BOTH
    assert store.meta.latent_channels == plain.meta.latent_channels == 4
    online = OnlineStore(
        config(clips, tmp_path / "on", condition_frames=BOTH),
        LatentEncoder(WholeClipVae()),
        FakeText(),
        "data",
    )
    assert len(store.index) == 5
    for number in range(5):
        row, sample, before = store.index.row(number), store.load(number, 0), plain.load(number, 0)
        assert torch.equal(sample.mean, before.mean)
        assert torch.equal(sample.std, before.std)
        assert before.stills is None
        if row.bucket.frames == 1:
            assert sample.stills is None
            continue
        assert sample.stills is not None
        assert sample.stills.shape == (2, 4, 2, *row.bucket.latent_shape[1:])
        assert (sample.stills[0, :, 0] - sample.stills[0, :, 1]).abs().max() > 0.1
        other = online.load(number, 0).stills
        assert other is not None
        torch.testing.assert_close(other, sample.stills)


def test_only_naming_frames_makes_a_store_again(clips, tmp_path):
    plain, both = config(clips, tmp_path), config(clips, tmp_path, condition_frames=BOTH)
    one = config(clips, tmp_path, condition_frames=["first"])
    assert len({config_hash(cfg, "vae") for cfg in (plain, one, both)}) == 3
    store = made(plain)
    raw = json.loads((tmp_path / "meta.json").read_text())
    assert raw.pop("condition_frames") == []
    (tmp_path / "meta.json").write_text(json.dumps(raw))  # as before there were any
    assert LatentStore.open(tmp_path, plain).meta == store.meta


def test_batches_hold_them(clips, tmp_path):
    cfg = config(clips, tmp_path / "store", condition_frames=BOTH, media_shares={"video": 1})
    store = made(cfg)
    loader = make_loader([store], cfg)
    for batch in loader.next_step():
        samples = {
            store.index.row(number).sample_id: store.load(number, 0).stills
            for number in range(len(store.index))
        }
        assert batch.still_frames == BOTH
        for place, name in enumerate(batch.sample_ids):
            assert torch.equal(batch.stills[place], samples[name])
        assert batch.stills.abs().min() > 0
        batch.clear()
        assert not batch.stills.any()
    loader.close()


def test_what_a_batch_takes_and_refuses(clips, tmp_path):
    store = made(config(clips, tmp_path / "store", condition_frames=["first"]))
    video, image = Bucket(9, 32, 48), Bucket(1, 32, 48)
    batch = empty_batch(store, video, 2, 1.0)
    assert batch.stills.shape == (2, 2, 4, 1, 4, 6)
    assert empty_batch(store, image, 2, 1.0).stills is None
    before = dataclasses.replace(store.meta, condition_frames=[])
    more = batch_bytes(store.meta, video, 2) - batch_bytes(before, video, 2)
    assert more == batch.stills.numel() * 4
    assert batch_bytes(store.meta, image, 2) == batch_bytes(before, image, 2)
    number = next(n for n in range(5) if store.index.row(n).bucket.frames > 1)
    sample, row = store.load(number, 0), store.index.row(number)
    check_sample(sample, row, store.meta)
    for stills in (None, sample.stills[:, :, :, :2]):
        with pytest.raises(SampleError, match="block of frames encoded alone has shape"):
            check_sample(dataclasses.replace(sample, stills=stills), row, store.meta)


def test_unknown_frames_are_refused():
    with pytest.raises(ValueError, match="names 'middle'; choose from first, last"):
        DataConfig(condition_frames=["first", "middle"])
