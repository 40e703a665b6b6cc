"""Per-bucket numbers: counted while training, added up over ranks, shown in the report."""

import json
from pathlib import Path

import pytest
import torch
from distributed import run_distributed

from hunyuan_train.data.buckets import Bucket
from hunyuan_train.engine.bucket_meter import BucketMeter
from hunyuan_train.engine.task import MicroStep
from hunyuan_train.evaluation.bucket_stats import (
    bucket_table,
    quarantine_table,
    read_bucket_stats,
)
from hunyuan_train.parallel.config import ParallelConfig
from hunyuan_train.parallel.mesh import Axes, build_axes

SMALL, LARGE = Bucket(1, 64, 64), Bucket(5, 64, 96)
CPU = torch.device("cpu")


def micro(bucket: Bucket, samples: int, loss: float) -> MicroStep:
    tokens = samples * bucket.tokens
    return MicroStep(
        bucket=bucket,
        source="",
        samples=samples,
        tokens=tokens,
        loss_sums=torch.full((samples,), loss * bucket.tokens),
        loss_tokens=tokens,
        sample_ids=[str(number) for number in range(samples)],
        sigmas=torch.full((samples,), 0.5),
        counted=torch.full((samples,), float(bucket.tokens), dtype=torch.float64),
    )


def test_rows_hold_sums_and_means_of_what_occurred(tmp_path: Path) -> None:
    path = tmp_path / "buckets.jsonl"
    meter = BucketMeter([SMALL, LARGE], Axes.alone(), CPU, path, 0)
    meter.add([micro(SMALL, 2, 0.5), micro(SMALL, 6, 1.5), micro(LARGE, 0, 0.0)], [1.0, 2.0, 9.0])
    meter.emit(10)
    meter.add([micro(LARGE, 3, 0.25)], [4.0])
    meter.emit(20)
    meter.close()
    first, second = (json.loads(line) for line in path.read_text().splitlines())
    assert first["1x64x64/samples"] == 8
    assert first["1x64x64/loss"] == pytest.approx((2 * 0.5 + 6 * 1.5) / 8)
    assert first["1x64x64/seconds"] == 3.0
    assert not any(key.startswith("5x64x96") for key in first)  # a filler counts nothing
    assert second["5x64x96/tokens"] == 3 * LARGE.tokens
    assert not any(key.startswith("1x64x64") for key in second)


def test_rows_after_the_restored_step_are_written_anew(tmp_path: Path) -> None:
    path = tmp_path / "buckets.jsonl"
    for start in (0, 10):
        meter = BucketMeter([SMALL], Axes.alone(), CPU, path, start)
        for step in (start + 10, start + 20):
            meter.add([micro(SMALL, 1, 1.0)], [1.0])
            meter.emit(step)
        meter.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [10, 20, 30]


def _count(rank: int, world: int, path: str) -> None:
    axes = build_axes(ParallelConfig(tp=2), "cpu", world)
    meter = BucketMeter([SMALL, LARGE], axes, CPU, Path(path) if rank == 0 else None, 0)
    bucket = SMALL if axes.rank("dp") == 0 else LARGE
    meter.add([micro(bucket, 1 + axes.rank("dp"), 1.0)], [1.0])
    meter.emit(1)
    meter.close()


@pytest.mark.dist
def test_ranks_that_share_a_batch_count_once(tmp_path: Path) -> None:
    path = tmp_path / "buckets.jsonl"
    run_distributed(_count, 4, str(path))
    row = json.loads(path.read_text())
    assert (row["1x64x64/samples"], row["5x64x96/samples"]) == (1, 2)
    assert row["5x64x96/loss"] == 1.0


def test_the_table_shows_shares_and_late_loss(tmp_path: Path) -> None:
    path = tmp_path / "buckets.jsonl"
    meter = BucketMeter([SMALL, LARGE], Axes.alone(), CPU, path, 0)
    for step in range(1, 21):
        meter.add([micro(SMALL, 3, 1.0 / step), micro(LARGE, 1, 2.0)], [1.0, 3.0])
        meter.emit(step)
    meter.close()
    stats = read_bucket_stats(path)
    assert list(stats) == ["1x64x64", "5x64x96"]
    table = bucket_table("images", stats)
    small, large = table.rows
    assert small[:4] == ["1x64x64", "60", f"{48 / (48 + LARGE.tokens):.1%}", "25.0%"]
    assert float(small[4]) == pytest.approx((1 / 19 + 1 / 20) / 2, abs=1e-4)
    assert large[5] == f"{LARGE.tokens / 3:,.0f}"
    assert table.chart.startswith(b"\x89PNG")
    assert read_bucket_stats(tmp_path / "none.jsonl") == {}


def test_quarantine_lists_are_counted_and_named(tmp_path: Path) -> None:
    rows = [{"file": f"{n}.mp4", "reason": "damaged", "detail": "cut"} for n in range(30)]
    rows += [{"sample_id": "a@64:1x64x64", "reason": "checksum", "detail": "shard s bytes 1-2"}]
    path = tmp_path / "quarantine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[::-1]))
    table = quarantine_table("Left out", [path, tmp_path / "none.jsonl"])
    assert table is not None
    assert table.note == "31 left out: 30 damaged, 1 checksum; the first 20 are shown."
    assert table.rows[0] == ["a@64:1x64x64", "checksum", "shard s bytes 1-2"]
    assert len(table.rows) == 20
    assert quarantine_table("Left out", [tmp_path / "none.jsonl"]) is None
