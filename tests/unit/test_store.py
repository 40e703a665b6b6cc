import dataclasses
import json
import os
import pickle
import shutil
import struct
import threading
from pathlib import Path

import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from hunyuan_train.data.blobs import RemoteBlobs
from hunyuan_train.data.buckets import Bucket
from hunyuan_train.data.config import DataConfig
from hunyuan_train.data.index import FORMAT, Blob, SampleRow, TextRef
from hunyuan_train.data.index_writer import write_index
from hunyuan_train.data.parts import Part, PartStore, key_of
from hunyuan_train.data.quarantine import Reason, SampleError
from hunyuan_train.data.store import LatentStore, StoreMeta

BUCKETS = (Bucket(1, 32, 48), Bucket(5, 32, 32))
CHANNELS, DIM, POOLED = 4, 3, 2


def moments(number: int) -> torch.Tensor:
    """Mean and std of sample ``number``; every value fits every storage format."""
    shape = (2, CHANNELS, *BUCKETS[number % 2].latent_shape)
    generator = torch.Generator().manual_seed(number)
    return torch.randint(-64, 64, shape, generator=generator).float()


def make_store(
    folder: Path, count: int = 6, dtype: str = "float32", poison: float | None = None
) -> LatentStore:
    """Write a store of two parts; sample ``n`` has ``1 + n % 2`` captions of ``1 + n`` tokens."""
    parts = PartStore(folder)
    stored: torch.dtype = getattr(torch, dtype)
    rows: list[SampleRow] = []
    for half in (range(count // 2), range(count // 2, count)):
        part = Part()
        for number in half:
            key = key_of("source", str(number))
            part.sources[key] = {"rows": [{}]}
            mean, std = moments(number).to(stored)
            if poison is not None and number == 1:
                std[0, 0, 0, 1] = poison
            part.tensors |= {f"{key}/0/mean": mean, f"{key}/0/std": std}
            for variant in range(1 + number % 2):
                text = key_of("text", str(number), str(variant))
                part.texts[text] = {"tokens": 1 + number}
                states = torch.full((1 + number, DIM), float(number + 10 * variant))
                part.tensors[f"{text}/states"] = states.to(stored)
                part.tensors[f"{text}/pooled"] = torch.full((POOLED,), float(number)).to(stored)
        name = parts.commit(part)
        for number in half:
            places = [
                part.texts[key_of("text", str(number), str(variant))]
                for variant in range(1 + number % 2)
            ]
            rows.append(
                SampleRow(
                    sample_id=f"{number}.mp4@32:{BUCKETS[number % 2]}",
                    source=f"{number}.mp4",
                    bucket=BUCKETS[number % 2],
                    anchor=32,
                    concept="",
                    repeat=1,
                    fps=24.0,
                    scale=0.5,
                    crop_loss=0.1,
                    latents=Blob(
                        name, **part.sources[key_of("source", str(number))]["rows"][0]["latents"]
                    ),
                    texts=tuple(
                        TextRef(
                            caption=f"{number}/{variant}",
                            blob=Blob(name, place["offset"], place["nbytes"], place["digest"]),
                            tokens=place["tokens"],
                        )
                        for variant, place in enumerate(places)
                    ),
                )
            )
    empty = rows[0].texts[0]
    entry = {**dataclasses.asdict(empty.blob), "tokens": empty.tokens}
    write_meta(folder, write_index(folder, rows), dtype, entry)
    return open_store(folder)


def write_meta(folder: Path, index: str, dtype: str, empty: dict) -> None:
    meta = StoreMeta(
        format=FORMAT,
        index=index,
        storage_dtype=dtype,
        latent_channels=CHANNELS,
        text_length=8,
        text_dim=DIM,
        pooled_dim=POOLED,
        vae_fingerprint="vae",
        scaling_factor=0.5,
        text_fingerprint="text",
        config_hash="config",
        empty_texts={"image": empty, "video": empty},
    )
    (folder / "meta.json").write_text(json.dumps(dataclasses.asdict(meta)))


def open_store(folder: Path | str, **settings) -> LatentStore:
    return LatentStore.open(folder, DataConfig(**settings))


def number_of(store: LatentStore, sample: int) -> int:
    """Return the row number of ``sample``."""
    ids = [store.index.row(number).source for number in range(len(store.index))]
    return ids.index(f"{sample}.mp4")


def shard_path(store: LatentStore, blob: Blob) -> Path:
    return Path(store.location) / "parts" / f"{blob.shard}.safetensors"


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_samples_come_back(tmp_path, dtype):
    store = make_store(tmp_path, dtype=dtype)
    for sample in range(6):
        number = number_of(store, sample)
        for variant in range(1 + sample % 2):
            loaded = store.load(number, variant)
            mean, std = moments(sample)
            assert loaded.mean.dtype == loaded.std.dtype == torch.float32
            assert torch.equal(loaded.mean, mean)
            assert torch.equal(loaded.std, std)
            states = torch.full((1 + sample, DIM), float(sample + 10 * variant))
            assert torch.equal(loaded.text.states, states)
            assert torch.equal(loaded.text.pooled, torch.full((POOLED,), float(sample)))
    assert store.empty("video").states.shape == (1, DIM)
    assert store.empty("video") is store.empty("video")


def test_what_is_loaded_is_the_callers_own(tmp_path):
    store = make_store(tmp_path)
    store.load(0, 0).mean.fill_(9)
    assert torch.equal(store.load(0, 0).mean, moments(0)[0])


def test_pieces_are_joined(tmp_path, monkeypatch):
    monkeypatch.setattr("hunyuan_train.data.blobs.PIECE", 24)
    store = make_store(tmp_path, dtype="float16")
    for sample in range(6):
        loaded = store.load(number_of(store, sample), 0)
        assert torch.equal(torch.stack([loaded.mean, loaded.std]), moments(sample))


@pytest.mark.parametrize("what", ["mean", "std", "pooled", "states"])
def test_a_flipped_bit_fails_its_sample_only(tmp_path, what):
    store = make_store(tmp_path)
    number = number_of(store, 3)
    row = store.index.row(number)
    blob = row.latents if what in ("mean", "std") else row.texts[1].blob
    place = blob.offset if what in ("mean", "pooled") else blob.offset + blob.nbytes - 1
    path = shard_path(store, blob)
    overwrite(path, place, bytes([path.read_bytes()[place] ^ 1]))
    with pytest.raises(SampleError) as caught:
        store.load(number, 1)
    assert caught.value.sample_id == row.sample_id
    assert caught.value.reason == Reason.checksum
    assert caught.value.detail == (
        f"{path} bytes {blob.offset}-{blob.offset + blob.nbytes}: they are not what precompute "
        "wrote"
    )
    for other in set(range(6)) - {number}:
        store.load(other, 0)
    open_store(tmp_path, verify=False).load(number, 1)  # nothing compares
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.sample_id, again.reason, again.detail) == (
        caught.value.sample_id,
        caught.value.reason,
        caught.value.detail,
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_stored_nan_and_infinity_are_found(tmp_path, value, dtype):
    store = make_store(tmp_path, dtype=dtype, poison=value)
    with pytest.raises(SampleError, match=r"not_finite: .*: they hold NaN or infinity") as caught:
        store.load(number_of(store, 1), 0)
    assert caught.value.reason == Reason.not_finite
    store.load(number_of(store, 0), 0)


def test_numbers_whose_sum_overflows_are_fine(tmp_path):
    store = make_store(tmp_path, poison=3e38)
    number = number_of(store, 1)
    blob = store.index.row(number).latents
    huge = struct.pack("<f", 3e38) * (blob.nbytes // 4)
    overwrite(shard_path(store, blob), blob.offset, huge)
    loaded = open_store(tmp_path, verify=False).load(number, 0)
    assert float(loaded.mean.max()) == pytest.approx(3e38)


def test_shards_that_vanish_or_shrink_meanwhile(tmp_path):
    store = make_store(tmp_path)
    first, last = store.index.row(number_of(store, 0)), store.index.row(number_of(store, 5))
    shard_path(store, first.latents).unlink()
    with pytest.raises(SampleError, match=r"missing: .*the file does not exist") as caught:
        store.load(number_of(store, 0), 0)
    assert caught.value.reason == Reason.missing
    store.load(number_of(store, 5), 0)
    os.truncate(shard_path(store, last.latents), last.latents.offset + 4)  # while it is open
    with pytest.raises(SampleError, match=r"unreadable: .*ends at byte") as caught:
        store.load(number_of(store, 5), 0)
    assert caught.value.reason == Reason.unreadable


def test_a_missing_or_short_shard_is_found_when_opening(tmp_path):
    store = make_store(tmp_path)
    path = shard_path(store, store.index.row(0).latents)
    size = path.stat().st_size
    os.truncate(path, size - 1)
    with pytest.raises(
        ValueError, match=rf"{path} has {size - 1} bytes, but the index has samples up to byte"
    ):
        open_store(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match=rf"{path} is missing from the store; run `hunyuan-train"):
        open_store(tmp_path)


def test_shards_beyond_the_checked_ones_are_found_when_reading(tmp_path, monkeypatch):
    monkeypatch.setattr("hunyuan_train.data.store._CHECKED_LOCAL", 0)
    store = make_store(tmp_path)
    shard_path(store, store.index.row(0).latents).unlink()
    with pytest.raises(SampleError) as caught:
        open_store(tmp_path).load(0, 0)
    assert caught.value.reason == Reason.missing


def test_an_index_of_another_store_is_refused(tmp_path):
    one, two = make_store(tmp_path / "one"), make_store(tmp_path / "two", count=8)
    shutil.copytree(tmp_path / "two" / two.meta.index, tmp_path / "one" / two.meta.index)
    meta = json.loads((tmp_path / "one" / "meta.json").read_text())
    changed = json.dumps({**meta, "index": two.meta.index})
    (tmp_path / "one" / "meta.json").write_text(changed)
    with pytest.raises(ValueError, match=r"parts/\w+.safetensors is missing from the store"):
        open_store(one.location)


def test_an_index_that_disagrees_with_the_meta_data(tmp_path):
    make_store(tmp_path)
    meta = json.loads((tmp_path / "meta.json").read_text())
    (tmp_path / "meta.json").write_text(json.dumps({**meta, "storage_dtype": "float16"}))
    with pytest.raises(SampleError, match=r"they are not 192 numbers of torch.float16"):
        open_store(tmp_path).load(0, 0)


def test_broken_stores_end_in_one_sentence(tmp_path):
    make_store(tmp_path)
    meta = json.loads((tmp_path / "meta.json").read_text())
    with pytest.raises(ValueError, match=r"meta.json does not exist: no latent store there; run"):
        open_store(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"data.latents is empty; set it to"):
        open_store("")
    for content, message in (
        ("{", r"meta.json is not JSON"),
        (json.dumps({**meta, "format": 1}), r"meta.json has store format 1, this is 2; run"),
        ("[]", r"meta.json has store format None"),
        (json.dumps({**meta, "more": 1}), r"comes from another version \(field more\)"),
        (json.dumps({**meta, "index": "index-0"}), r"index-0/header.json cannot be read"),
    ):
        (tmp_path / "meta.json").write_text(content)
        with pytest.raises(ValueError, match=message) as caught:
            open_store(tmp_path)
        assert "\n" not in str(caught.value)


def test_a_damaged_empty_caption_ends_in_one_sentence(tmp_path):
    store = make_store(tmp_path)
    blob = store.index.row(number_of(store, 0)).texts[0].blob
    overwrite(shard_path(store, blob), blob.offset, b"x")
    with pytest.raises(ValueError, match=r"the empty caption: checksum: .*; run `hunyuan-train"):
        open_store(tmp_path).empty("image")


def test_threads_read_their_own_samples(tmp_path):
    store = make_store(tmp_path, count=40)
    numbers = {sample: number_of(store, sample) for sample in range(40)}
    wrong: list[int] = []

    def work(first: int) -> None:
        for turn in range(200):
            sample = (first + 7 * turn) % 40
            loaded = store.load(numbers[sample], 0)
            right = torch.equal(torch.stack([loaded.mean, loaded.std]), moments(sample))
            if not right or loaded.text.states[0, 0] != sample:
                wrong.append(sample)

    threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.fixture
def remote(tmp_path) -> str:
    """A store in memory, as an object store would hold it."""
    make_store(tmp_path / "local")
    filesystem = MemoryFileSystem()
    root = f"/{key_of(str(tmp_path))}"
    for path in (tmp_path / "local").rglob("*"):
        if path.is_file():
            relative = path.relative_to(tmp_path / "local")
            filesystem.pipe_file(f"{root}/{relative}", path.read_bytes())
    return f"memory:/{root}"


def test_remote_stores_read_the_same(tmp_path, remote):
    cache = tmp_path / "cache"
    local, store = open_store(tmp_path / "local"), open_store(remote, local_cache=str(cache))
    for number in range(6):
        assert store.index.row(number) == local.index.row(number)
        assert torch.equal(store.load(number, 0).mean, local.load(number, 0).mean)
    copies = list(cache.rglob("rows.bin"))
    changed = [path.stat().st_mtime_ns for path in copies]
    open_store(remote, local_cache=str(cache))
    assert [path.stat().st_mtime_ns for path in copies] == changed
    os.truncate(copies[0], 3)  # a damaged copy is made again
    (cache / f".{store.meta.index}.tmp").mkdir()  # what a killed process leaves
    assert len(open_store(remote, local_cache=str(cache)).index) == 6


def test_damaged_remote_indexes_and_missing_stores(tmp_path, remote):
    filesystem, cache = MemoryFileSystem(), str(tmp_path / "cache")
    index = open_store(tmp_path / "local").meta.index
    path = f"{remote.removeprefix('memory:/')}/{index}/strings.bin"
    data = filesystem.cat_file(path)
    filesystem.pipe_file(path, data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"memory://.*strings.bin is damaged; run"):
        open_store(remote, local_cache=cache)
    filesystem.rm(path)
    with pytest.raises(ValueError, match=rf"memory://.*{index} cannot be copied: .*strings.bin"):
        open_store(remote, local_cache=cache)
    assert [path.name for path in Path(cache).iterdir()] == [f".{index}.lock"]
    with pytest.raises(ValueError, match=r"memory:///none/meta.json does not exist: no latent"):
        open_store("memory://none", local_cache=cache)


def test_remote_failures_are_survived_or_named(tmp_path, remote, monkeypatch):
    monkeypatch.setattr("hunyuan_train.data.blobs._FIRST_WAIT_S", 0.0)
    store = open_store(remote, local_cache=str(tmp_path / "cache"), retries=2)
    assert isinstance(store._blobs, RemoteBlobs)
    original, calls = MemoryFileSystem.cat_file, []

    def broken(self, path, start=None, end=None, **kwargs):
        calls.append(path)
        if len(calls) <= failures:
            raise TimeoutError("no answer")
        return original(self, path, start, end, **kwargs)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", broken)
    failures = 2
    assert torch.equal(store.load(number_of(store, 0), 0).mean, moments(0)[0])
    assert store._blobs.retried == 2
    calls.clear()
    failures = 99
    with pytest.raises(SampleError, match=r"unreadable: memory://.*no answer.*3 attempts$"):
        store.load(0, 0)
    assert len(calls) == 3
