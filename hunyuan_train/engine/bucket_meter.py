"""What each bucket came to between two rows of metrics: samples, loss, time."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from hunyuan_train.data.buckets import Bucket
from hunyuan_train.engine.task import MicroStep
from hunyuan_train.observability.trackers import JsonlTracker
from hunyuan_train.parallel.mesh import Axes

FILE_NAME = "buckets.jsonl"
COLUMNS = ("samples", "tokens", "loss", "seconds")


class BucketMeter:
    """Adds up micro-steps per bucket over all ranks and writes one row of ``buckets.jsonl``.

    A row holds ``BUCKET/samples``, ``/tokens``, ``/loss`` (mean over the tokens the loss counts)
    and ``/seconds`` (of forward and backward, waiting for others included, summed over
    data-parallel ranks) of each bucket that occurred since the row before.
    """

    def __init__(
        self,
        buckets: Sequence[Bucket],
        axes: Axes,
        device: torch.device,
        path: Path | None,
        start_step: int,
    ) -> None:
        """Start counting.

        Args:
            buckets: All buckets of the run, the same on every rank.
            axes: This rank's place; ranks that share a batch count once.
            device: Where losses are.
            path: File to write; None on all ranks but one.
            start_step: Updates done; rows after it are dropped, they will be written again.
        """
        self._rows = {bucket: row for row, bucket in enumerate(buckets)}
        self._axes = axes
        self._device = device
        self._tracker = None if path is None else JsonlTracker(path, start_step)
        self._clear()

    def add(self, micro_steps: Sequence[MicroStep], seconds: Sequence[float]) -> None:
        """Count the micro-steps of one update of this rank and the seconds they took."""
        for part, took in zip(micro_steps, seconds, strict=True):
            row = self._rows[part.bucket]
            self._counts[row] += torch.tensor(
                [part.samples, part.tokens, part.loss_tokens, took], dtype=torch.float64
            )
            self._losses[row] += part.loss_sum.double()

    def emit(self, step: int) -> None:
        """Write what was counted since the last row; every rank calls it at the same step."""
        columns = torch.cat([self._counts, self._losses.cpu()[:, None]], dim=1)
        totals = self._axes.sum(columns.to(self._device), "dp").tolist()
        self._clear()
        if self._tracker is None:
            return
        row: dict[str, float] = {}
        for bucket, total in zip(self._rows, totals, strict=True):
            samples, tokens, counted, seconds, loss_sum = total
            if tokens:
                values = (samples, tokens, loss_sum / counted, seconds)
                row |= {f"{bucket}/{name}": v for name, v in zip(COLUMNS, values, strict=True)}
        self._tracker.log(step, row)

    def close(self) -> None:
        """Close the file."""
        if self._tracker is not None:
            self._tracker.close()

    def _clear(self) -> None:
        self._counts: Tensor = torch.zeros(len(self._rows), 4, dtype=torch.float64)
        self._losses: Tensor = torch.zeros(len(self._rows), dtype=torch.float64).to(self._device)
