import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from media_factory import FakeText, FakeVae, marked_frames, write_image, write_video

from hunyuan_train.data.config import DataConfig, StorageDtype
from hunyuan_train.data.index import SampleRow
from hunyuan_train.data.manifest import list_sources
from hunyuan_train.data.store import LatentStore, Sample
from hunyuan_train.encoders.latents import LatentEncoder
from hunyuan_train.engine import precompute_merge
from hunyuan_train.engine.precompute import precompute, split_units
from hunyuan_train.engine.precompute_merge import merge
from hunyuan_train.engine.precompute_work import Worker


@pytest.fixture
def clips(tmp_path) -> Path:
    """Three clips and two images with captions in text files."""
    folder = tmp_path / "clips"
    for index in range(3):
        write_video(folder / f"v{index}.mp4", marked_frames(6 + index, 48, 64))
        (folder / f"v{index}.txt").write_text(f"clip number {index}")
    for index in range(2):
        write_image(folder / f"i{index}.png", level=40 + 100 * index)
        (folder / f"i{index}.txt").write_text(f"image {index}")
    return folder


def config(clips: Path, **settings) -> DataConfig:
    defaults = {
        "source": str(clips),
        "latents": str(clips.parent / "store"),
        "anchors": [48],
        "durations": [1, 5],
        "assign": "every",
        "shard_sources": 2,
        "storage_dtype": StorageDtype.float32,
    }
    return DataConfig(**{**defaults, **settings})


def run(cfg: DataConfig, vae: FakeVae | None = None, text: FakeText | None = None, **kwargs):
    vae, text = vae or FakeVae(), text or FakeText()
    summary = precompute(cfg, LatentEncoder(vae), text, **kwargs)
    return summary, vae, text


def open_store(clips: Path, name: str = "store") -> LatentStore:
    return LatentStore.open(clips.parent / name, DataConfig())


def rows_of(store: LatentStore) -> list[SampleRow]:
    return [store.index.row(number) for number in range(len(store.index))]


def load(store: LatentStore, sample_id: str) -> Sample:
    ids = [row.sample_id for row in rows_of(store)]
    return store.load(ids.index(sample_id), 0)


def settle(clips: Path) -> None:
    """Date all files a minute back: a file that was just written is always read again."""
    for path in clips.rglob("*"):
        stat = path.stat()
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns - 60_000_000_000))


def test_store_holds_unscaled_moments_and_trimmed_text(clips):
    summary, vae, text = run(config(clips))
    assert (summary.sources, summary.ok, summary.encoded, summary.cached) == (5, 5, 5, 0)
    assert summary.samples == 3 * 2 + 2
    assert summary.quarantined == {}
    store = open_store(clips)
    assert [row.sample_id for row in rows_of(store)] == [
        "i0.png@48:1x32x48",
        "i1.png@48:1x32x48",
        *(f"v{index}.mp4@48:{frames}x32x48" for frames in (1, 5) for index in range(3)),
    ]
    assert [(group.bucket.frames, group.first, group.count) for group in store.index.groups] == [
        (1, 0, 5),
        (5, 5, 3),
    ]
    sample = load(store, "i1.png@48:1x32x48")
    torch.testing.assert_close(sample.mean, torch.full((4, 1, 4, 6), 140 / 127.5 - 1))
    torch.testing.assert_close(sample.std, torch.full((4, 1, 4, 6), 0.25))
    assert sample.text.states.tolist() == [[5] * 3, [1] * 3]
    assert sample.text.pooled.tolist() == [1, 1]  # the image template
    clip = store.load(7, 0)
    assert clip.mean.shape == clip.std.shape == (4, 2, 4, 6)
    assert clip.text.pooled.tolist() == [2, 2]  # the video template
    assert store.empty("video").states.shape == (1, 3)
    meta = store.meta
    assert (meta.latent_channels, meta.text_length, meta.text_dim, meta.pooled_dim) == (4, 6, 3, 2)
    assert meta.text_fingerprint == text.fingerprint
    assert meta.vae_fingerprint == LatentEncoder(vae).fingerprint


def test_clips_of_one_bucket_are_encoded_together(clips):
    _, vae, _ = run(config(clips, shard_sources=64))
    assert (vae.clips, vae.calls) == (8, 2)
    _, vae, _ = run(config(clips, latents=str(clips.parent / "one"), encode_pixels=1))
    assert (vae.clips, vae.calls) == (8, 8)


def test_batching_does_not_change_what_is_stored(clips):
    run(config(clips))
    run(config(clips, latents=str(clips.parent / "one"), encode_pixels=1, shard_sources=64))
    first, second = (open_store(clips, name) for name in ("store", "one"))
    assert len(first.index) == len(second.index) == 8
    for number in range(8):
        assert first.index.row(number).sample_id == second.index.row(number).sample_id
        one, two = first.load(number, 0), second.load(number, 0)
        for name in ("mean", "std"):
            assert torch.equal(getattr(one, name), getattr(two, name))
        assert torch.equal(one.text.states, two.text.states)


def test_second_run_does_nothing(clips):
    settle(clips)
    run(config(clips))
    before = sorted((clips.parent / "store").rglob("*.*"))
    summary, vae, text = run(config(clips))
    assert (summary.ok, summary.encoded, summary.cached, summary.texts) == (5, 0, 5, 0)
    assert (vae.clips, text.captions) == (0, [])
    assert sorted((clips.parent / "store").rglob("*.*")) == before


def test_changed_caption_redoes_only_its_text(clips):
    run(config(clips))
    (clips / "v1.txt").write_text("another thing entirely")
    summary, vae, text = run(config(clips))
    assert vae.clips == 0
    assert text.captions == ["another thing entirely"] * 2  # as image and as video
    assert summary.encoded == 0
    rows = rows_of(open_store(clips))
    assert {row.texts[0].caption for row in rows if row.source == "v1.mp4"} == {
        "another thing entirely"
    }


def test_every_rendering_of_a_caption_is_encoded(clips, monkeypatch):
    variants = ("a red ball", "a ball", "?")  # the fake encoder sees no token in the last

    def listed(*args: object):
        listing = list_sources(str(clips))
        changes = {"captions": variants, "concept": "toy", "repeat": 3}
        sources = [
            dataclasses.replace(source, **changes) if source.file == "v0.mp4" else source
            for source in listing.sources
        ]
        return dataclasses.replace(listing, sources=sources)

    monkeypatch.setattr("hunyuan_train.engine.precompute.list_sources", listed)
    _, _, text = run(config(clips))
    assert {*variants} < {*text.captions}
    store = open_store(clips)
    rows = {row.sample_id: row for row in rows_of(store)}
    row = rows["v0.mp4@48:5x32x48"]
    assert [text.caption for text in row.texts] == ["a red ball", "a ball"]
    assert (row.concept, row.repeat) == ("toy", 3)
    number = list(rows).index(row.sample_id)
    assert store.load(number, 0).text.states[:, 0].tolist() == [1, 3, 4]
    assert store.load(number, 1).text.states[:, 0].tolist() == [1, 4]
    groups = [(group.concept, group.repeat, group.count) for group in store.index.groups]
    assert groups == [("", 1, 4), ("", 1, 2), ("toy", 3, 1), ("toy", 3, 1)]


def test_a_list_of_the_former_format_is_redone(clips):
    run(config(clips))
    store = open_store(clips)
    for path in (clips.parent / "store" / "parts").glob("*.jsonl"):
        entries = [json.loads(line) for line in path.read_text().splitlines()]
        for entry in entries:
            if "text" in entry:
                entry["text"] = f"former-{entry['text']}"
                for name in ("offset", "nbytes", "digest"):
                    del entry[name]
        path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    _, vae, text = run(config(clips))
    assert vae.clips == 0
    assert len(text.captions) > 0
    assert [row.sample_id for row in rows_of(open_store(clips))] == [
        row.sample_id for row in rows_of(store)
    ]


def test_changed_added_and_removed_files(clips):
    run(config(clips))
    write_image(clips / "i0.png", level=200)
    write_image(clips / "new.png", level=10)
    (clips / "new.txt").write_text("a new one")
    (clips / "v2.mp4").unlink()
    summary, vae, _ = run(config(clips))
    assert (vae.clips, summary.encoded, summary.cached) == (2, 2, 3)
    store = open_store(clips)
    assert {row.source for row in rows_of(store)} == {
        "i0.png",
        "i1.png",
        "new.png",
        "v0.mp4",
        "v1.mp4",
    }
    assert load(store, "i0.png@48:1x32x48").mean[0, 0, 0, 0] == pytest.approx(200 / 127.5 - 1)


def test_renamed_file_keeps_its_latents(clips):
    run(config(clips))
    (clips / "v0.mp4").rename(clips / "other.mp4")
    (clips / "v0.txt").rename(clips / "other.txt")
    summary, vae, text = run(config(clips))
    assert (vae.clips, text.captions, summary.ok) == (0, [], 5)


@pytest.mark.parametrize(
    "settings",
    [
        {"anchors": [64]},
        {"max_fps": 20.0},
        {"max_crop_loss": 0.9},
        {"storage_dtype": StorageDtype.bfloat16},
    ],
)
def test_changed_setting_redoes_everything(clips, settings):
    run(config(clips))
    summary, _, _ = run(config(clips, **settings))
    assert (summary.encoded, summary.cached) == (5, 0)


def test_changed_encoders_redo_their_part(clips):
    run(config(clips))
    _, vae, text = run(config(clips), vae=FakeVae(gain=2.0))
    assert (vae.clips, text.captions) == (8, [])
    _, vae, text = run(config(clips), vae=FakeVae(gain=2.0), text=FakeText("fake-text-2"))
    assert vae.clips == 0
    assert text.captions.count("") == 2


def test_unused_parts_are_deleted(clips):
    run(config(clips))
    first = {path.name for path in (clips.parent / "store" / "parts").iterdir()}
    run(config(clips), vae=FakeVae(gain=2.0), text=FakeText("fake-text-2"))
    settle(clips)
    second = {path.name for path in (clips.parent / "store" / "parts").iterdir()}
    assert not {name for name in first & second if name.endswith(".safetensors")}
    assert len(list((clips.parent / "store").glob("index-*"))) == 1


def test_bad_sources_are_quarantined_and_counted_and_the_run_goes_on(clips):
    (clips / "v0.txt").unlink()
    (clips / "v1.txt").write_text("?")  # the fake encoder sees no token in it
    (clips / "empty.mp4").write_bytes(b"")
    (clips / "text.mp4").write_text("words, without a caption")
    write_video(clips / "short.mp4", marked_frames(2))
    (clips / "short.txt").write_text("short")
    summary, vae, _ = run(config(clips, durations=[5]))
    assert vae.clips == 2  # v1 and v2: a file without caption is only checked
    assert summary.quarantined == {
        "empty": 1,
        "mislabelled": 1,
        "no_caption": 2,
        "too_short": 3,
    }
    assert (summary.ok, summary.samples) == (1, 1)
    lines = (clips.parent / "store" / "quarantine.jsonl").read_text().splitlines()
    rows = {row["file"]: (row["reason"], row["detail"]) for row in map(json.loads, lines)}
    assert rows["v0.mp4"] == ("no_caption", "no caption: v0.txt is missing")
    assert rows["v1.mp4"] == ("no_caption", "no caption: the text encoder sees no token in it")
    assert rows["text.mp4"] == ("mislabelled", "plain text named .mp4, not a video")
    assert rows["short.mp4"][0] == "too_short"
    assert rows["i0.png"][0] == "too_short"
    again, vae, _ = run(config(clips, durations=[5]))
    assert again.quarantined == summary.quarantined
    assert vae.clips == 0
    (clips / "v0.txt").write_text("now it has one")
    assert run(config(clips, durations=[5]))[0].ok == 2


def test_latents_that_overflow_the_storage_format_are_quarantined(clips):
    summary, _, _ = run(config(clips, storage_dtype=StorageDtype.float16), vae=FakeVae(gain=1e6))
    assert summary.quarantined == {"not_finite": 5}
    assert summary.ok == 0


def test_missing_file_of_a_manifest_is_quarantined(clips):
    rows = [{"file": "v0.mp4", "caption": "a"}, {"file": "gone.mp4", "caption": "b"}]
    (clips / "manifest.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    summary, _, _ = run(config(clips))
    assert (summary.ok, summary.quarantined) == (1, {"missing": 1})


def test_same_bytes_under_two_names_are_two_samples(clips):
    (clips / "copy.png").write_bytes((clips / "i0.png").read_bytes())
    (clips / "copy.txt").write_text("a copy")
    summary, vae, _ = run(config(clips, shard_sources=64))
    assert (summary.ok, vae.clips) == (6, 8)


def test_progress_is_reported(clips):
    seen = []
    run(config(clips), progress=seen.append)
    assert seen[-1].done == seen[-1].total == 5
    assert seen[-1].encoded == 5


def test_units_do_not_depend_on_what_is_done(clips):
    sources = list_sources(str(clips)).sources
    units = split_units(sources, 2)
    assert sorted(s.file for _, unit in units for s in unit) == [s.file for s in sources]
    assert [name for name, _ in units] == [name for name, _ in split_units(sources[::-1], 2)]


def test_empty_latents_setting_is_refused(clips):
    with pytest.raises(ValueError, match=r"data.latents is empty; set it to a folder"):
        run(config(clips, latents=""))


class SeeingText(FakeText):
    """Its pooled vector is the mean level of the picture it is shown; -1 without."""

    sees_images = True

    def encode(self, captions, media, images=None):
        features = super().encode(captions, media)
        for row, image in enumerate(images):
            features.pooled[row] = -1 if image is None else float(image.mean())
        return features


def test_text_features_follow_the_first_frame_of_their_clip(clips):
    settle(clips)
    (clips / "v1.txt").write_text("clip number 0")  # as v0, of which the picture is another one
    write_video(clips / "v1.mp4", [frame + 40 for frame in marked_frames(7, 48, 64)])
    text = SeeingText("seeing")
    summary, vae, _ = run(config(clips), text=text)
    assert summary.ok == 5
    store = open_store(clips)
    assert store.meta.text_images
    levels = {
        row.sample_id: load(store, row.sample_id).text.pooled[0].item() for row in rows_of(store)
    }
    assert levels["v0.mp4@48:1x32x48"] == levels["i0.png@48:1x32x48"] == -1  # nothing begins there
    assert levels["v0.mp4@48:5x32x48"] == pytest.approx(16, abs=2)
    assert levels["v1.mp4@48:5x32x48"] == pytest.approx(56, abs=2)
    assert store.empty("video").pooled.tolist() == [0, 0]  # a black picture
    again = SeeingText("seeing")
    _, vae, _ = run(config(clips), text=again)
    assert (vae.clips, again.captions) == (0, [])
    (clips / "v2.txt").write_text("a new caption")  # its clip is decoded again, not encoded
    _, vae, _ = run(config(clips), text=again)
    assert (vae.clips, again.captions) == (0, ["a new caption"] * 2)
    write_video(clips / "v0.mp4", [frame + 80 for frame in marked_frames(6, 48, 64)])
    run(config(clips), text=again)
    assert load(open_store(clips), "v0.mp4@48:5x32x48").text.pooled[0] == pytest.approx(96, abs=2)


WORKER = """
import os, signal, sys, time
from pathlib import Path
sys.path[:0] = [{support!r}, {root!r}]
import torch
torch.set_num_threads(1)
from media_factory import FakeText, FakeVae
from hunyuan_train.data.config import DataConfig
from hunyuan_train.encoders.latents import LatentEncoder
from hunyuan_train.engine.precompute import precompute

class Vae(FakeVae):
    def encode(self, pixels):
        if self.calls == {kill_after}:
            folder = Path({latents!r}).parent
            (folder / "doomed").touch()
            while not (folder / "release").exists():
                time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGKILL)
        if {kill_after} > 0:
            time.sleep(0.3)  # long enough for what came before to be written
        return super().encode(pixels)

cfg = DataConfig(source={source!r}, latents={latents!r}, anchors=[48], durations=[1, 5],
                 assign="every", shard_sources=1, storage_dtype="float32")
vae = Vae()
summary = precompute(cfg, LatentEncoder(vae), FakeText(), {process}, {processes})
print(vae.clips, summary.ok, summary.samples)
"""


def start(clips: Path, process: int = 0, processes: int = 1, kill_after: int = -1):
    script = WORKER.format(
        support=str(Path(__file__).resolve().parents[1] / "support"),
        root=str(Path(__file__).resolve().parents[2]),
        source=str(clips),
        latents=str(clips.parent / "store"),
        kill_after=kill_after,
        process=process,
        processes=processes,
    )
    return subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)


def wait_for(path: Path, done=None):
    deadline = time.monotonic() + 60
    while not (done() if done else path.exists()):
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.05)


def counts(store: LatentStore) -> list[tuple[str, str, int]]:
    """Return (sample, name of its source, digest of its latents) of all rows."""
    return [(row.sample_id, row.source, row.latents.digest) for row in rows_of(store)]


def num_lists(clips: Path) -> int:
    return len(list((clips.parent / "store" / "parts").glob("*.jsonl")))


def test_four_processes_of_which_one_is_killed_twice_leave_what_one_undisturbed_leaves(clips):
    for index in range(12):
        write_image(clips / f"more{index}.png", level=20 * index)
        (clips / f"more{index}.txt").write_text(f"more {index}")
    run(config(clips, latents=str(clips.parent / "alone"), shard_sources=1))
    (clips.parent / "release").touch()
    killed = start(clips, 3, 4, kill_after=2)
    assert killed.wait(60) == -signal.SIGKILL
    before = num_lists(clips)
    for name in ("release", "doomed"):
        (clips.parent / name).unlink()
    killed = start(clips, 3, 4, kill_after=0)
    wait_for(clips.parent / "doomed")  # it holds a unit, which the others need to end
    workers = [start(clips, number, 4) for number in range(3)]
    wait_for(clips.parent / "store", lambda: num_lists(clips) > before)
    (clips.parent / "release").touch()
    assert killed.wait(60) == -signal.SIGKILL
    workers.append(start(clips, 3, 4))
    results = [worker.communicate(timeout=100)[0].split() for worker in workers]
    assert [result[1:] for result in results] == [["17", "20"]] * 4
    store, alone = open_store(clips), open_store(clips, "alone")
    assert counts(store) == counts(alone)  # every sample once, with the same latents
    for number in range(20):
        one, two = store.load(number, 0), alone.load(number, 0)  # checks the digests
        assert torch.equal(one.text.states, two.text.states)
    figures = json.loads((clips.parent / "store" / "precompute.json").read_text())
    assert figures["processes"]  # of those that came before all was done
    vae = figures["total"]["stages"]["vae"]["items"]
    assert vae == sum(int(result[0]) for result in results) < 20  # the killed one left some
    assert figures["total"]["stages"]["write"]["items"] == figures["total"]["encoded"]


def test_a_shard_that_lost_bytes_is_made_again(clips):
    settle(clips)
    run(config(clips, shard_sources=64))
    (shard,) = (clips.parent / "store" / "parts").glob("*.safetensors")
    os.truncate(shard, shard.stat().st_size - 1)
    summary, vae, _ = run(config(clips, shard_sources=64))
    assert (summary.ok, summary.encoded, vae.clips) == (5, 5, 8)
    for number in range(8):
        open_store(clips).load(number, 0)
    parts = list((clips.parent / "store" / "parts").iterdir())
    assert len({path.stem for path in parts}) == 1


def test_the_index_is_made_once_for_what_has_not_changed(clips, monkeypatch):
    settle(clips)
    first, _, _ = run(config(clips))
    made = []
    write = precompute_merge.write_index
    monkeypatch.setattr(
        precompute_merge, "write_index", lambda *args: made.append(1) or write(*args)
    )
    again, _, _ = run(config(clips))
    assert (again.ok, again.samples, again.quarantined) == (first.ok, first.samples, {})
    assert made == []
    (clips / "v1.txt").write_text("another caption")
    run(config(clips))
    (clips / "v2.mp4").unlink()
    run(config(clips))
    assert len(made) == 2


def test_what_a_process_with_a_newer_list_did_is_not_dropped(clips):
    """Its parts came after this process began and are in no row of this one's index."""
    worker = Worker(config(clips), LatentEncoder(FakeVae()), FakeText())
    listing = list_sources(str(clips))
    known = worker.store.parts
    write_image(clips / "new.png", level=10)
    (clips / "new.txt").write_text("a new one")
    run(config(clips))
    merge(worker, listing, known)
    summary, vae, _ = run(config(clips))
    assert (summary.ok, summary.encoded, vae.clips) == (6, 0, 0)


def test_killed_run_loses_only_its_unit(clips):
    (clips.parent / "release").touch()
    killed = start(clips, kill_after=4)
    assert killed.wait(120) == -signal.SIGKILL
    parts = (clips.parent / "store" / "parts").glob("*.jsonl")
    kept = sum(path.read_text().count('"source":') for path in parts)
    assert 1 <= kept < 5
    with pytest.raises(ValueError, match=r"meta.json does not exist: no latent store there"):
        open_store(clips)
    summary, vae, _ = run(config(clips, shard_sources=1))
    assert summary.ok == 5
    assert summary.cached == kept
    assert 0 < vae.clips < 8


@pytest.mark.again
def test_processes_share_the_work_and_survive_a_killed_one(clips):
    for index in range(6):
        write_image(clips / f"more{index}.png", level=30 * index)
        (clips / f"more{index}.txt").write_text(f"more {index}")
    killed = start(clips, 0, 3, kill_after=0)
    wait_for(clips.parent / "doomed")
    workers = [start(clips, 1, 3), start(clips, 2, 3)]
    parts = clips.parent / "store" / "parts"
    wait_for(parts, lambda: any(parts.glob("*.jsonl")))
    (clips.parent / "release").touch()
    results = [worker.communicate(timeout=200)[0].split() for worker in workers]
    assert killed.wait(60) == -signal.SIGKILL
    assert results[0][1:] == results[1][1:] == ["11", "14"]
    assert int(results[0][0]) + int(results[1][0]) == 14
    store = open_store(clips)
    assert len(store.index) == 14
    for number in range(14):
        store.load(number, 0)
    summary, vae, _ = run(config(clips, shard_sources=1))
    assert (summary.encoded, vae.clips) == (0, 0)
