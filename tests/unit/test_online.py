import json
import logging
import os
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from hunyuan_train.config.compose import compose_config
from hunyuan_train.data import scan
from hunyuan_train.data.buckets import Bucket
from hunyuan_train.data.config import DataConfig
from hunyuan_train.data.decode_job import decode_clip
from hunyuan_train.data.fetch import EncodingStore, Request
from hunyuan_train.data.online import OnlineStore
from hunyuan_train.data.quarantine import Reason, SampleError
from hunyuan_train.data.scan import index_sources
from hunyuan_train.data.store import LatentStore
from hunyuan_train.encoders.latents import LatentEncoder
from hunyuan_train.encoders.text import build_text_encoder
from hunyuan_train.engine.precompute import precompute
from hunyuan_train.models.vae.state_dict import load_vae
from tests.support.media_factory import (
    FakeText,
    FakeVae,
    marked_frames,
    write_image,
    write_video,
)
from tests.support.sample_store import make_loader
from tests.support.tiny_run import make_data


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """5 images, 4 clips, and a clip that is no video."""
    root = tmp_path_factory.mktemp("online") / "clips"
    for index in range(5):
        write_image(root / f"i{index}.png", 64, 64 + 32 * (index % 2), level=30 * index)
        (root / f"i{index}.txt").write_text(" ".join(["word"] * (1 + index % 3)))
    for index in range(4):
        write_video(root / f"v{index}.mp4", marked_frames(6 + 4 * (index % 2), 64, 64))
        (root / f"v{index}.txt").write_text(f"clip {index}")
    (root / "broken.mp4").write_bytes(b"not a video at all" * 100)
    (root / "broken.txt").write_text("broken")
    write_image(root / "silent.png")
    return root


def config(clips, latents, **settings):
    return DataConfig(
        **{
            "source": str(clips),
            "latents": str(latents),
            "anchors": [48, 64],
            "durations": [1, 5, 9],
            "assign": "every",
            "max_tokens": 64,
            "max_batch": 3,
            **settings,
        }
    )


def open_online(cfg):
    return OnlineStore(cfg, LatentEncoder(FakeVae()), FakeText(), "data")


def listed(path):
    return {row["file"]: row["reason"] for row in map(json.loads, path.read_text().splitlines())}


def ids(store):
    return [store.index.row(number).sample_id for number in range(len(store.index))]


def test_samples_are_those_of_precompute(clips, tmp_path):
    cfg = config(clips, tmp_path / "ahead")
    precompute(cfg, LatentEncoder(FakeVae()), FakeText())
    ahead = LatentStore.open(str(tmp_path / "ahead"), cfg, "data")
    online = open_online(config(clips, tmp_path / "on"))
    assert isinstance(online, EncodingStore)
    assert not isinstance(ahead, EncodingStore)
    assert ids(online) == ids(ahead)
    assert len(online.index) > 15
    for number in range(len(online.index)):
        ours, theirs = online.load(number, 0), ahead.load(number, 0)
        row, stored = online.index.row(number), ahead.index.row(number)
        assert (row.fps, row.scale, row.crop_loss) == (stored.fps, stored.scale, stored.crop_loss)
        assert torch.equal(ours.mean.half().float(), theirs.mean)
        assert torch.equal(ours.std.half().float(), theirs.std)
        assert torch.equal(ours.text.states.half().float(), theirs.text.states)
        assert torch.equal(ours.text.pooled.half().float(), theirs.text.pooled)
    for media in ("image", "video"):
        assert torch.equal(online.empty(media).states, ahead.empty(media).states)
    assert listed(tmp_path / "on" / "online" / "quarantine.jsonl") == {
        "broken.mp4": "mislabelled",
        "silent.png": "no_caption",
    }


def test_loader_serves_clips_like_a_store_of_them(clips, tmp_path):
    cfg = config(clips, tmp_path / "ahead")
    precompute(cfg, LatentEncoder(FakeVae()), FakeText())
    ahead = LatentStore.open(str(tmp_path / "ahead"), cfg, "data")
    online = open_online(config(clips, tmp_path / "on"))
    loaders = [make_loader([store], cfg, seed=3) for store in (ahead, online)]
    for _ in range(6):
        for stored, fresh in zip(*(loader.next_step() for loader in loaders), strict=True):
            assert stored.sample_ids == fresh.sample_ids
            assert stored.captions == fresh.captions
            assert torch.equal(stored.mean, fresh.mean.half().float())
            assert torch.equal(stored.text, fresh.text)
            assert torch.equal(stored.text_mask, fresh.text_mask)
            assert torch.equal(stored.pooled, fresh.pooled)
            assert torch.equal(stored.empty_text, fresh.empty_text)
            assert torch.equal(stored.empty_mask, fresh.empty_mask)
    for loader in loaders:
        loader.close()


def test_clips_of_a_unit_are_encoded_together_within_the_limit(clips, tmp_path):
    vae, text = FakeVae(), FakeText()
    cfg = config(
        clips, tmp_path, train_durations=[5], train_anchors=[48], max_batch=4, max_tokens=90
    )
    store = OnlineStore(cfg, LatentEncoder(vae), text)
    vae.calls = vae.clips = 0
    loader = make_loader([store], cfg)
    loader.next_step()
    loader.close()
    assert vae.clips / vae.calls == 4
    text.captions.clear()
    loader = make_loader([store], cfg)
    for _ in range(6):
        loader.next_step()
    loader.close()
    assert text.captions == [], "the features of a few captions are kept"
    small = config(
        clips, tmp_path, train_durations=[5], train_anchors=[48], max_batch=4, max_tokens=90
    )
    small.encode_pixels = 2 * 5 * 48 * 48
    store = OnlineStore(small, LatentEncoder(vae), text)
    vae.calls = vae.clips = 0
    loader = make_loader([store], small)
    loader.next_step()
    loader.close()
    assert vae.clips / vae.calls == 2


def test_second_start_opens_no_file_and_finds_what_changed(clips, tmp_path, monkeypatch):
    copy = tmp_path / "clips"
    copy.mkdir()
    for path in clips.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    looked: list[str] = []
    probed = scan._probed

    def spy(pending, cfg):
        looked.extend(source.file for source, _ in pending)
        return probed(pending, cfg)

    monkeypatch.setattr(scan, "_probed", spy)
    cfg = config(copy, tmp_path / "index")
    first = index_sources(cfg, 6)
    assert len(looked) == 10
    looked.clear()
    assert index_sources(cfg, 6) == first
    assert looked == []
    write_image(copy / "i0.png", 64, 64, level=77)
    os.utime(copy / "i0.png", (1, 1))
    (copy / "v0.mp4").unlink()
    write_image(copy / "new.png", 64, 64)
    (copy / "new.txt").write_text("new")
    second = index_sources(cfg, 6)
    assert sorted(looked) == ["i0.png", "new.png"]
    assert second != first
    assert first.is_dir(), "another process may be about to open it"
    os.utime(first, (1, 1))
    assert index_sources(cfg, 6) == second
    assert not first.exists()
    (probes,) = second.parent.glob("probes-*.jsonl")
    assert "v0.mp4" not in probes.read_text()
    looked.clear()
    index_sources(config(copy, tmp_path / "index", max_crop_loss=0.25), 6)
    assert len(looked) == 10, "other buckets are other samples"


def test_killed_scan_leaves_a_cut_line_that_is_looked_at_again(clips, tmp_path):
    cfg = config(clips, tmp_path)
    folder = index_sources(cfg, 6)
    (probes,) = folder.parent.glob("probes-*.jsonl")
    lines = probes.read_text().splitlines()
    probes.write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:20])
    assert index_sources(cfg, 6) == folder
    assert len(probes.read_text().splitlines()) == len(lines)


def test_nothing_usable_is_one_sentence(tmp_path):
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "a.mp4").write_bytes(b"")
    (tmp_path / "clips" / "a.txt").write_text("a")
    with pytest.raises(ValueError, match=r"no usable file \(1 empty\); .*quarantine.jsonl says"):
        index_sources(config(tmp_path / "clips", tmp_path / "index"), 6)
    with pytest.raises(ValueError, match=r"data.latents is empty"):
        index_sources(config(tmp_path / "clips", ""), 6)


def test_clip_that_breaks_during_training_is_replaced(clips, tmp_path, caplog):
    copy = tmp_path / "clips"
    copy.mkdir()
    for path in clips.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    cfg = config(copy, tmp_path / "index", max_bad_share=1.0)
    store = open_online(cfg)
    (copy / "v1.mp4").write_bytes((copy / "v1.mp4").read_bytes()[:900])
    (copy / "i2.png").unlink()
    write_image(copy / "i3.png", 16, 16)
    path = tmp_path / "bad.jsonl"
    # A clip that is alone in its bucket cannot be replaced, so only those that are not are drawn.
    cfg.train_durations = [1, 5]
    loader = make_loader([store], cfg, quarantine=path)
    drawn = {n for _ in range(8) for batch in loader.next_step() for n in batch.sample_ids}
    loader.close()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    reasons = {row["sample_id"].split("@")[0]: row["reason"] for row in rows}
    assert reasons["v1.mp4"] == "truncated"
    assert reasons["i2.png"] == "unreadable"
    assert not {name for name in drawn if name.startswith(("v1", "i2"))}


def test_file_of_another_shape_than_when_it_was_probed_is_bad(clips, tmp_path):
    path = write_image(tmp_path / "wide.png", 32, 64)
    cfg = config(clips, tmp_path)
    with pytest.raises(Exception, match="does not fit bucket 1x64x64 now"):
        decode_clip(str(path), "image", Bucket(1, 64, 64), 64, cfg)


def test_pixels_and_latents_that_cannot_be_used_are_bad_samples(clips, tmp_path):
    cfg = config(clips, tmp_path)
    store = OnlineStore(cfg, LatentEncoder(FakeVae(gain=float("inf"))), FakeText())
    with pytest.raises(SampleError, match="not finite") as raised:
        store.load(0, 0)
    assert raised.value.reason == Reason.not_finite
    store = open_online(cfg)
    row = store.index.row(0)
    shape = (row.bucket.frames, row.bucket.height, row.bucket.width, 3)
    requests = [
        Request(place=place, number=0, row=row, epoch=0, variant=0, future=None)
        for place in range(3)
    ]
    pixels = [np.zeros(shape, np.uint8), np.zeros((1, 8, 8, 3), np.uint8), np.ones(shape, np.uint8)]
    good, bad, other = store.encode(requests, pixels)
    assert "pixels have shape [1, 8, 8, 3]" in bad.detail
    assert torch.equal(good.std, other.std)
    assert not torch.equal(good.mean, other.mean)


def test_processes_started_together_look_into_the_files_once(clips, tmp_path, caplog):
    cfg = config(clips, tmp_path)
    with caplog.at_level(logging.INFO), ThreadPoolExecutor(3) as pool:
        started = time.monotonic()
        folders = set(pool.map(lambda _: index_sources(cfg, 6), range(3)))
        assert time.monotonic() - started < 60
    (folder,) = folders
    (probes,) = folder.parent.glob("probes-*.jsonl")
    files = [json.loads(line)["file"] for line in probes.read_text().splitlines()]
    assert len(files) == len(set(files)) == 10


def test_real_vae_and_text_encoder_give_the_stored_numbers(tmp_path):
    data = make_data(tmp_path, num_clips=4, num_images=2)
    settings = {"anchors": [64], "durations": [1, 5], "bucket_stride": 32}
    cfg = config(data / "clips", tmp_path / "index", **settings)
    text = build_text_encoder(compose_config([]).text)
    online = OnlineStore(cfg, LatentEncoder(load_vae(data / "vae")), text, "data")
    ahead = LatentStore.open(str(data / "latents"), cfg, "data")
    assert ids(online) == ids(ahead)
    loaders = [make_loader([store], cfg) for store in (ahead, online)]
    for _ in range(4):
        for stored, fresh in zip(*(loader.next_step() for loader in loaders), strict=True):
            assert stored.sample_ids == fresh.sample_ids
            # float16 keeps 11 bits.
            torch.testing.assert_close(fresh.mean, stored.mean, rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(fresh.std, stored.std, rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(fresh.text, stored.text, rtol=1e-3, atol=1e-4)
    for loader in loaders:
        loader.close()
