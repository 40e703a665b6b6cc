"""Training losses by noise level, bucket and source between two rows of metrics."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from hunyuan_train.data.buckets import Bucket
from hunyuan_train.engine.task import MicroStep
from hunyuan_train.evaluation.loss import quantile_numbers
from hunyuan_train.objectives.config import FlowMatchingConfig
from hunyuan_train.observability.trackers import JsonlTracker
from hunyuan_train.parallel.mesh import Axes

FILE_NAME = "loss_table.jsonl"


class LossMeter:
    """Adds up losses over all ranks and writes one row of ``loss_table.jsonl``.

    A row holds ``SOURCE/BUCKET/q0.5/loss`` (mean over the tokens the loss counts, weighted as in
    training) and ``.../tokens`` of what occurred since the row before. A sample is booked under the
    quantile of ``evaluation.quantiles`` that is nearest to the quantile of its sigma.
    """

    def __init__(
        self,
        kinds: Sequence[tuple[str, Bucket]],
        quantiles: Sequence[float],
        objective: FlowMatchingConfig,
        axes: Axes,
        device: torch.device,
        path: Path | None,
        start_step: int,
    ) -> None:
        """Start counting.

        Args:
            kinds: All pairs of source and bucket of the run, the same on every rank.
            quantiles: Noise levels, as quantiles of the training sigmas.
            objective: Their distribution.
            axes: This rank's place; ranks that share a batch count once.
            device: Where losses are.
            path: File to write; None on all ranks but one.
            start_step: Updates done; rows after it are dropped, they will be written again.
        """
        self._rows = {kind: row for row, kind in enumerate(kinds)}
        self._quantiles, self._objective = list(quantiles), objective
        self._axes, self._device = axes, device
        self._tracker = None if path is None else JsonlTracker(path, start_step)
        self._clear()

    def add(self, micro_steps: Sequence[MicroStep]) -> None:
        """Count the micro-steps of one update of this rank; waits for nothing."""
        for part in micro_steps:
            if not part.samples:
                continue
            first = self._rows[part.source, part.bucket] * len(self._quantiles)
            cells = first + quantile_numbers(
                part.sigmas, self._quantiles, self._objective, part.bucket.tokens
            )
            self._cells.append(cells)
            self._tokens.index_add_(0, cells, part.counted)
            self._losses.append(part.loss_sums)

    def emit(self, step: int) -> None:
        """Write what was counted since the last row; every rank calls it at the same step."""
        losses = torch.zeros_like(self._tokens)
        if self._losses:
            losses.index_add_(0, torch.cat(self._cells), torch.cat(self._losses).double().cpu())
        sums = torch.stack([losses, self._tokens], dim=1).to(self._device)
        totals = self._axes.sum(sums, "dp").tolist()
        self._clear()
        if self._tracker is None:
            return
        row: dict[str, float] = {}
        for (source, bucket), number in self._rows.items():
            for place, quantile in enumerate(self._quantiles):
                loss, tokens = totals[number * len(self._quantiles) + place]
                if tokens:
                    name = f"{source}/{bucket}/q{quantile:g}"
                    row |= {f"{name}/loss": loss / tokens, f"{name}/tokens": tokens}
        self._tracker.log(step, row)

    def close(self) -> None:
        """Close the file."""
        if self._tracker is not None:
            self._tracker.close()

    def _clear(self) -> None:
        cells = len(self._rows) * len(self._quantiles)
        self._tokens = torch.zeros(cells, dtype=torch.float64)
        self._cells: list[Tensor] = []
        self._losses: list[Tensor] = []
