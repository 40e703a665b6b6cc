import json
import threading
import time

import pytest
import torch
from media_factory import FakeText, FakeVae, marked_frames, write_image, write_video

from hunyuan_train.data.config import DataConfig
from hunyuan_train.data.index import LatentStore
from hunyuan_train.data.loader import BucketLoader
from hunyuan_train.encoders.latents import LatentEncoder
from hunyuan_train.engine.precompute import precompute


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A store of 7 images and 5 clips in two shapes, anchors 48 and 64, 1 and 5 frames."""
    root = tmp_path_factory.mktemp("loader")
    for index in range(7):
        write_image(root / "clips" / f"i{index}.png", 64, 64 + 32 * (index % 2), level=30 * index)
        (root / "clips" / f"i{index}.txt").write_text(" ".join(["word"] * (1 + index % 3)))
    for index in range(5):
        write_video(root / "clips" / f"v{index}.mp4", marked_frames(6, 64, 64))
        (root / "clips" / f"v{index}.txt").write_text(f"clip {index}")
    cfg = DataConfig(
        source=str(root / "clips"),
        latents=str(root / "store"),
        anchors=[48, 64],
        durations=[1, 5],
        assign="every",
    )
    precompute(cfg, LatentEncoder(FakeVae()), FakeText())
    return root / "store"


@pytest.fixture
def store(folder):
    return LatentStore.open(folder)


def config(**settings):
    return DataConfig(**{"max_tokens": 40, "max_batch": 3, **settings})


def ids(batches):
    return [batch.sample_ids for batch in batches]


def test_batch_has_the_agreed_shapes(store):
    loader = BucketLoader(store, config(train_durations=[5]), seed=0)
    (batch,) = loader.next_step(1)
    size, (frames, height, width) = len(batch.sample_ids), batch.bucket.latent_shape
    assert batch.mean.shape == batch.std.shape == (size, 4, frames, height, width)
    assert batch.text.shape == (size, 6, 3)
    assert batch.text_mask.shape == (size, 6)
    assert batch.pooled.shape == (size, 2)
    assert batch.empty_text.shape == (6, 3)
    assert batch.empty_mask.tolist() == [True] + [False] * 5
    assert batch.empty_pooled.tolist() == [2, 2]
    assert batch.epochs == [0] * size
    assert len(batch.captions) == size
    for tensor in (batch.mean, batch.std, batch.text, batch.pooled, batch.empty_text):
        assert tensor.dtype == torch.float32
    loader.close()


def test_batch_holds_what_the_store_holds(store):
    rows = {row.sample_id: row for row in store.rows}
    loader = BucketLoader(store, config(), seed=3)
    for batch in loader.next_step(loader.batches_per_epoch):
        for index, name in enumerate(batch.sample_ids):
            sample = store.load(rows[name])
            assert rows[name].bucket == batch.bucket
            assert batch.captions[index] == rows[name].caption
            assert torch.equal(batch.mean[index], sample["mean"])
            assert torch.equal(batch.std[index], sample["std"])
            assert torch.equal(batch.text[index], sample["states"])
            assert torch.equal(batch.text_mask[index], sample["mask"])
            assert torch.equal(batch.pooled[index], sample["pooled"])
    loader.close()


def test_every_sample_once_per_epoch_in_a_new_order(store):
    loader = BucketLoader(store, config(), seed=1)
    epochs = [loader.next_step(loader.batches_per_epoch) for _ in range(3)]
    for number, batches in enumerate(epochs):
        names = [name for batch in batches for name in batch.sample_ids]
        assert sorted(names) == sorted(row.sample_id for row in store.rows)
        assert {epoch for batch in batches for epoch in batch.epochs} == {number}
    assert ids(epochs[0]) != ids(epochs[1])
    loader.close()


def test_another_seed_is_another_order_and_no_shuffle_keeps_one(store):
    first, second = (BucketLoader(store, config(), seed=seed) for seed in (1, 2))
    number = first.batches_per_epoch
    assert ids(first.next_step(number)) != ids(second.next_step(number))
    plain = BucketLoader(store, config(shuffle=False), seed=1)
    assert ids(plain.next_step(number)) == ids(plain.next_step(number))


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_together_read_the_stream_of_one(store, world_size):
    alone = BucketLoader(store, config(), seed=0)
    stream = ids(alone.next_step(2 * 3 * world_size))
    ranks = [BucketLoader(store, config(), 0, rank, world_size) for rank in range(world_size)]
    together = []
    for _ in range(2):
        steps = [ids(loader.next_step(3)) for loader in ranks]
        together += [steps[rank][micro] for micro in range(3) for rank in range(world_size)]
    assert together == stream


def test_batch_sizes_follow_the_token_budget_and_partial_batches_stay(store):
    loader = BucketLoader(store, config(train_anchors=[64], train_durations=[1]), seed=0)
    batches = loader.next_step(loader.batches_per_epoch)
    # 1x64x64 has 16 tokens: two fit in 40. Nine samples (4 images, 5 clips) make 5 batches.
    square = sorted(len(b.sample_ids) for b in batches if str(b.bucket) == "1x64x64")
    assert square == [1, 2, 2, 2, 2]
    lines = loader.describe().splitlines()
    assert lines[0].split() == ["bucket", "samples", "tokens", "batch", "batches/epoch"]
    assert ["1x64x64", "9", "16", "2", "5"] in [line.split() for line in lines]
    assert lines[-1].split() == ["total", "12", str(len(batches))]
    big = BucketLoader(store, config(max_tokens=1), seed=0)
    assert {len(batch.sample_ids) for batch in big.next_step(20)} == {1}


def test_resume_counts_consumed_steps_only_and_works_for_other_ranks(store):
    straight = BucketLoader(store, config(prefetch_batches=8), seed=5)
    steps = [ids(straight.next_step(2)) for _ in range(12)]
    cut = BucketLoader(store, config(prefetch_batches=8), seed=5)
    for _ in range(5):
        cut.next_step(2)
    time.sleep(0.3)  # let it read ahead
    state = json.loads(json.dumps(cut.state_dict()))
    assert state["position"] == 10
    resumed = BucketLoader(store, config(), seed=5)
    resumed.next_step(1)
    resumed.load_state_dict(state)
    assert [ids(resumed.next_step(2)) for _ in range(7)] == steps[5:]
    pair = [BucketLoader(store, config(), 5, rank, 2) for rank in range(2)]
    for loader in pair:
        loader.load_state_dict(state)
    halves = [[ids(loader.next_step(1))[0] for loader in pair] for _ in range(7)]
    assert halves == steps[5:]
    assert pair[0].state_dict()["position"] == pair[1].state_dict()["position"] == 24


@pytest.mark.parametrize(
    ("settings", "seed", "message"),
    [
        ({}, 6, r"seed=5 then, seed=6 now"),
        ({"max_tokens": 90}, 5, r"batches=\w+ then, batches=\w+ now"),
        ({"train_anchors": [64]}, 5, r"samples=\w+ then, samples=\w+ now"),
    ],
)
def test_resume_on_other_data_is_refused_by_name(store, settings, seed, message):
    state = BucketLoader(store, config(), seed=5).state_dict()
    with pytest.raises(ValueError, match=message):
        BucketLoader(store, config(**settings), seed=seed).load_state_dict(state)


def test_selection_without_samples_names_what_the_store_has(store):
    with pytest.raises(
        ValueError,
        match=r"no usable sample: data.train_anchors=\[256\] and data.train_durations=\[17\] .*"
        r"anchor 48: 1x48x48 \(9\), .*anchor 64: 5x64x64 \(5\)",
    ):
        BucketLoader(store, config(train_anchors=[256], train_durations=[17]), seed=0)


@pytest.mark.parametrize("cache_gib", [0.0, 1.0])
def test_damaged_shard_surfaces_in_next_step_every_time(folder, tmp_path, cache_gib):
    copy = tmp_path / "store"
    (copy / "parts").mkdir(parents=True)
    for path in folder.rglob("*.*"):
        if path.suffix != ".lock":
            (copy / path.relative_to(folder)).write_bytes(path.read_bytes())
    for path in (copy / "parts").glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:200])
    loader = BucketLoader(LatentStore.open(copy), config(cache_gib=cache_gib), seed=0)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"safetensors is missing or damaged .* precompute"):
            loader.next_step(1)


def test_reader_thread_that_dies_without_a_word_is_noticed(store, monkeypatch):
    monkeypatch.setattr("hunyuan_train.data.loader._read_ahead", lambda *arguments: None)
    with pytest.raises(RuntimeError, match="thread ended without an error"):
        BucketLoader(store, config(), seed=0).next_step(1)


def test_reader_reads_a_bounded_number_ahead(store, monkeypatch):
    made = []
    collate = __import__("hunyuan_train.data.loader", fromlist=["collate"]).collate
    monkeypatch.setattr(
        "hunyuan_train.data.loader.collate", lambda *args: made.append(1) or collate(*args)
    )
    loader = BucketLoader(store, config(prefetch_batches=2), seed=0)
    loader.next_step(1)
    time.sleep(0.5)
    assert 2 <= len(made) <= 4  # one consumed, two queued, one waiting to be queued
    loader.close()


def test_reader_thread_ends_with_its_loader(store):
    loader = BucketLoader(store, config(), seed=0)
    loader.next_step(1)
    (thread,) = [t for t in threading.enumerate() if t is loader._reader._thread]
    del loader
    thread.join(5)
    assert not thread.is_alive()


def test_small_store_is_read_once_and_kept(store, folder):
    loader = BucketLoader(store, config(cache_gib=1.0), seed=0)
    loader.next_step(loader.batches_per_epoch)
    loader.close()
    store._shards.clear()  # a second read would open the files again
    loader.next_step(loader.batches_per_epoch)
    assert not store._shards
    loader.close()


def test_missing_store_index_and_shard_are_named(folder, tmp_path):
    with pytest.raises(ValueError, match=r"nothing/meta.json does not exist: no latent store"):
        LatentStore.open(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"data.latents is empty"):
        LatentStore.open("")
    meta = json.loads((folder / "meta.json").read_text())
    (tmp_path / "meta.json").write_text("{")
    with pytest.raises(ValueError, match=r"meta.json is not JSON .* precompute"):
        LatentStore.open(tmp_path)
    (tmp_path / "meta.json").write_text(json.dumps({**meta, "format": 99}))
    with pytest.raises(ValueError, match=r"meta.json has store format 99, this is 1"):
        LatentStore.open(tmp_path)
    (tmp_path / "meta.json").write_text(json.dumps({**meta, "extra": 1}))
    with pytest.raises(ValueError, match=r"comes from another version \(field extra\)"):
        LatentStore.open(tmp_path)
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match=r"index-\w+.jsonl is missing from the store"):
        LatentStore.open(tmp_path)
    (tmp_path / meta["index"]).write_text((folder / meta["index"]).read_text())
    with pytest.raises(ValueError, match=r"parts/\w+.safetensors is missing from the store"):
        LatentStore.open(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"durations": [16]}, r"duration=16 is not 4n\+1 .* use 13 or 17"),
        ({"train_durations": [8]}, r"data.train_durations entry=8 is not 4n\+1"),
        ({"max_batch": 0}, r"data.max_batch=0 is below 1; set it to 1 or more"),
        ({"max_upscale": 0.5}, r"data.max_upscale=0.5 is below 1"),
        ({"bucket_stride": 24}, r"bucket stride=24 is not a multiple of 16"),
    ],
)
def test_config_names_field_value_and_fix(settings, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**settings)
