"""Training losses by noise level, bucket and source."""

import json
from pathlib import Path

import pytest
import torch
from distributed import run_distributed

from hunyuan_train.data.buckets import Bucket
from hunyuan_train.engine.loss_meter import LossMeter
from hunyuan_train.engine.task import MicroStep
from hunyuan_train.evaluation.loss import sigma_at
from hunyuan_train.objectives.config import FlowMatchingConfig
from hunyuan_train.parallel.config import ParallelConfig
from hunyuan_train.parallel.mesh import Axes, build_axes

IMAGE, VIDEO = Bucket(1, 64, 64), Bucket(5, 64, 96)
KINDS = [("films", IMAGE), ("films", VIDEO), ("stills", IMAGE)]
LEVELS = [0.2, 0.8]
CFG = FlowMatchingConfig(shift=3.0, shift_tokens=40)
CPU = torch.device("cpu")


def micro(source: str, bucket: Bucket, losses: list[float], quantiles: list[float]) -> MicroStep:
    """Samples of these mean losses; the last of a video has half its frames given."""
    counted = torch.full((len(losses),), float(bucket.tokens), dtype=torch.float64)
    if bucket is VIDEO:
        counted[-1:] /= 2
    return MicroStep(
        bucket=bucket,
        source=source,
        samples=len(losses),
        tokens=len(losses) * bucket.tokens,
        loss_sums=torch.tensor(losses) * counted.float(),
        loss_tokens=int(counted.sum()),
        sample_ids=[str(number) for number in range(len(losses))],
        sigmas=torch.tensor([sigma_at(q, CFG, bucket.tokens) for q in quantiles]),
        counted=counted,
    )


def test_losses_are_booked_by_source_bucket_and_noise(tmp_path: Path) -> None:
    path = tmp_path / "loss_table.jsonl"
    meter = LossMeter(KINDS, LEVELS, CFG, Axes.alone(), CPU, path, 0)
    meter.add([micro("films", IMAGE, [1.0, 3.0, 5.0], [0.1, 0.45, 0.55])])
    meter.add([micro("stills", IMAGE, [7.0], [0.9]), micro("films", VIDEO, [], [])])
    meter.emit(10)
    meter.add([micro("films", VIDEO, [1.0, 4.0], [0.2, 0.3])])
    meter.emit(20)
    meter.close()
    first, second = (json.loads(line) for line in path.read_text().splitlines())
    del first["time"], second["time"]
    assert first == {
        "step": 10,
        "films/1x64x64/q0.2/loss": 2.0,
        "films/1x64x64/q0.2/tokens": 2 * IMAGE.tokens,
        "films/1x64x64/q0.8/loss": 5.0,
        "films/1x64x64/q0.8/tokens": IMAGE.tokens,
        "stills/1x64x64/q0.8/loss": 7.0,
        "stills/1x64x64/q0.8/tokens": IMAGE.tokens,
    }
    assert second == {
        "step": 20,
        "films/5x64x96/q0.2/loss": 2.0,  # the second counts half as many tokens
        "films/5x64x96/q0.2/tokens": 1.5 * VIDEO.tokens,
    }


def _on_rank(rank: int, world: int, folder: str) -> None:
    axes = build_axes(ParallelConfig(tp=2, zero_stage=0), "cpu", world)
    path = Path(folder) / "table.jsonl" if rank == 0 else None
    meter = LossMeter(KINDS, LEVELS, CFG, axes, CPU, path, 0)
    if axes.rank("dp") == 0:
        meter.add([micro("films", IMAGE, [1.0], [0.1])])
    else:
        meter.add([micro("films", IMAGE, [2.0, 3.0], [0.1, 0.1])])
    meter.emit(1)
    meter.close()


@pytest.mark.dist
def test_ranks_that_share_a_batch_count_once(tmp_path: Path) -> None:
    run_distributed(_on_rank, 4, str(tmp_path))
    row = json.loads((tmp_path / "table.jsonl").read_text())
    assert row["films/1x64x64/q0.2/tokens"] == 3 * IMAGE.tokens
    assert row["films/1x64x64/q0.2/loss"] == pytest.approx(2.0)
