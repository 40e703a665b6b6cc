"""The data engine as users meet it: damaged stores, other ranks, several sources, no precompute."""

import json
import shutil
from pathlib import Path

import pytest
from tiny_run import make_data, overrides, rows, run_verb

from hunyuan_train.data.config import DataConfig
from hunyuan_train.data.store import LatentStore, shard_file

pytestmark = [pytest.mark.dist, pytest.mark.slow]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


def flip_a_bit(store: Path) -> str:
    """Damage the latents of one sample and return its id."""
    index = LatentStore.open(store, DataConfig()).index
    group = max(index.groups, key=lambda group: group.count)
    row = index.row(group.first)
    path = store / shard_file(row.latents.shard)
    raw = bytearray(path.read_bytes())
    raw[row.latents.offset + 1] ^= 4
    path.write_bytes(raw)
    return row.sample_id


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(["parallel.tp=2"], id="one group"),
        pytest.param([], id="two groups", marks=pytest.mark.again),
    ],
)
def test_a_damaged_sample_is_replaced_listed_and_counted(
    data: Path, tmp_path: Path, layout: list[str]
) -> None:
    shutil.copytree(data / "latents", tmp_path / "latents")
    damaged = flip_a_bit(tmp_path / "latents")
    arguments = overrides(data, tmp_path / "run", f"data.latents={tmp_path / 'latents'}", *layout)
    # Every sample comes up at least once.
    done = run_verb("train", [*arguments, "data.global_samples=24", "data.max_bad_share=0.2"], 2)
    assert done.returncode == 0, done.stderr
    # A group lists it once; the other group may meet it in another epoch.
    lines = (tmp_path / "run/quarantine.jsonl").read_text().splitlines()
    entry, *more = [json.loads(line) for line in lines]
    assert len(more) < (1 if layout else 2)
    assert {found["sample_id"] for found in [entry, *more]} == {damaged}
    assert entry["reason"] == "checksum"
    assert "are not what precompute wrote" in entry["detail"]
    assert entry["replaced_by"] not in ("", damaged)
    last = rows(tmp_path / "run")[-1]
    assert last["replaced_samples"] >= 1
    assert last["samples"] == 6 * 24
    report = run_verb("report", [f"run.dir={tmp_path / 'run'}"])
    assert report.returncode == 0, report.stderr
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Samples that training could not use" in page
    assert damaged in page
    assert "Buckets of stage run" in page


def test_too_many_damaged_samples_stop_the_run_in_one_sentence(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data / "latents", tmp_path / "latents")
    flip_a_bit(tmp_path / "latents")
    arguments = overrides(data, tmp_path / "run", f"data.latents={tmp_path / 'latents'}")
    done = run_verb("train", [*arguments, "data.global_samples=50", "data.max_bad_share=0.001"])
    assert done.returncode != 0
    assert "samples were unusable (" in done.stderr
    assert "more than data.max_bad_share=0.001; repair the data or raise" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_run_goes_on_with_the_same_samples_on_fewer_ranks(data: Path, tmp_path: Path) -> None:
    """Two ranks all the way, against two ranks and then one."""
    extra = ["data.global_samples=14", "stage.steps=6", "checkpoint.every_steps=3"]
    straight, relay = tmp_path / "straight", tmp_path / "relay"
    done = run_verb("train", overrides(data, straight, *extra), 2)
    assert done.returncode == 0, done.stderr
    first = overrides(data, relay, *extra, "stage.steps=3")
    done = run_verb("train", first, 2)
    assert done.returncode == 0, done.stderr
    done = run_verb("train", overrides(data, relay, *extra, "run.accept_changes=true"), 1)
    assert done.returncode == 0, done.stderr
    left, right = rows(straight), rows(relay)
    assert [row["step"] for row in right] == list(range(1, 7))
    for one, other in zip(left, right, strict=True):
        assert (one["samples"], one["tokens"]) == (other["samples"], other["tokens"])
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


def test_sources_are_mixed_by_weight(data: Path, tmp_path: Path) -> None:
    """The same store twice: three quarters of the samples are of one."""
    shutil.copytree(data / "latents", tmp_path / "other")
    arguments = [a for a in overrides(data, tmp_path / "run") if not a.startswith("data.latents")]
    done = run_verb(
        "train",
        [
            *arguments,
            f"data.sources.one={{latents: {data / 'latents'}, weight: 3}}",
            f"data.sources.other={{latents: {tmp_path / 'other'}, weight: 1}}",
            "data.media_shares={image:0.5,video:0.5}",
            "data.global_samples=16",
        ],
    )
    assert done.returncode == 0, done.stderr
    counts: dict[str, int] = {}
    for line in (tmp_path / "run" / "buckets.jsonl").read_text().splitlines():
        for key, value in json.loads(line).items():
            if key.endswith("/samples"):
                media = "image" if key.startswith("1x") else "video"
                counts[media] = counts.get(media, 0) + value
    assert sum(counts.values()) == 6 * 16
    assert abs(counts["image"] - counts["video"]) <= 10


def test_clips_are_trained_on_without_precompute(data: Path, tmp_path: Path) -> None:
    """The same draws, encoded while training, give the losses of the stored latents."""
    shape = ["data.anchors=[64]", "data.durations=[1,5]", "data.assign=every",
             "data.bucket_stride=32", f"data.source={data / 'clips'}"]  # fmt: skip
    # Unit sizes follow costs, which hang on the lengths of captions that only precompute knows.
    shape += ["data.max_batch=1", "data.global_samples=8"]
    stored, online = tmp_path / "stored", tmp_path / "online"
    done = run_verb("train", overrides(data, stored, *shape))
    assert done.returncode == 0, done.stderr
    arguments = overrides(data, online, *shape, "data.encode=online")
    done = run_verb("train", [*arguments, f"data.latents={tmp_path / 'index'}"])
    assert done.returncode == 0, done.stderr
    for one, other in zip(rows(stored), rows(online), strict=True):
        assert (one["samples"], one["tokens"]) == (other["samples"], other["tokens"])
        assert one["loss"] == pytest.approx(other["loss"], rel=2e-3)
