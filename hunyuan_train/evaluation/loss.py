"""The held-out loss: which samples at which noise levels, and what they add up to.

Everything is fixed by the store and the objective: samples are chosen by their place, noise is
keyed by the sample and never by step or run. So the losses of two steps, two layouts or two runs
differ only by their weights.
"""

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import NormalDist

import torch
from torch import Tensor

from hunyuan_train.data.buckets import Bucket
from hunyuan_train.data.mixture import Cell
from hunyuan_train.objectives.config import FlowMatchingConfig
from hunyuan_train.objectives.timesteps import shift_of

FILE_NAME = "evaluation.jsonl"
SEED = -1
"""Keys all draws of an evaluation; no run has it."""
_NORMAL = NormalDist()


def sigma_at(quantile: float, cfg: FlowMatchingConfig, tokens: int) -> float:
    """Return the sigma below which training draws a share of ``quantile`` of its sigmas.

    Args:
        quantile: Between 0 and 1.
        cfg: Distribution of the training sigmas.
        tokens: Image tokens of the sample.
    """
    # The shift adds ln(shift) to the logit.
    logit = cfg.time_mean + cfg.time_std * _NORMAL.inv_cdf(quantile)
    return 1 / (1 + math.exp(-(logit + math.log(shift_of(cfg, tokens)))))


def quantile_numbers(
    sigmas: Tensor, quantiles: Sequence[float], cfg: FlowMatchingConfig, tokens: int
) -> Tensor:
    """Return the number of the nearest of ``quantiles`` for each sigma: [B] int64 on the CPU."""
    edges = [sigma_at((low + high) / 2, cfg, tokens) for low, high in pairwise(quantiles)]
    return torch.tensor([bisect_right(edges, s) for s in sigmas.tolist()], dtype=torch.int64)


@dataclass(frozen=True, slots=True)
class Probe:
    """One held-out sample at one noise level."""

    row: int
    """Of the store."""
    quantile: int
    """Place in ``evaluation.quantiles``."""


@dataclass(frozen=True, slots=True)
class ProbeBatch:
    """Probes that go through the model at once."""

    bucket: Bucket
    probes: tuple[Probe, ...]


def choose_rows(cells: Sequence[Cell], count: int) -> dict[Bucket, list[int]]:
    """Return ``count`` rows of each bucket, or all it has, spread evenly over its cells."""
    rows: dict[Bucket, list[range]] = {}
    for cell in cells:
        rows.setdefault(cell.bucket, []).append(range(cell.first, cell.first + cell.count))
    chosen: dict[Bucket, list[int]] = {}
    for bucket in sorted(rows):
        total = sum(len(part) for part in rows[bucket])
        wanted = [place * total // min(count, total) for place in range(min(count, total))]
        chosen[bucket] = [_nth(rows[bucket], place) for place in wanted]
    return chosen


def _nth(parts: Sequence[range], place: int) -> int:
    for part in parts:
        if place < len(part):
            return part[place]
        place -= len(part)
    raise AssertionError("beyond the last row")


def probe_batches(
    rows: Mapping[Bucket, Sequence[int]], quantiles: int, largest: Mapping[Bucket, int]
) -> list[ProbeBatch]:
    """Return all probes in batches of one bucket, the most expensive first.

    Args:
        rows: Of each bucket.
        quantiles: Noise levels of each row.
        largest: Samples of a bucket that fit into one batch.
    """
    batches = []
    for bucket, numbers in rows.items():
        probes = [Probe(row, level) for row in numbers for level in range(quantiles)]
        size = largest[bucket]
        batches += [
            ProbeBatch(bucket, tuple(probes[start : start + size]))
            for start in range(0, len(probes), size)
        ]
    return sorted(batches, key=lambda batch: -batch.bucket.tokens * len(batch.probes))


class LossTable:
    """Sums of losses and of the tokens they count, by bucket and noise level."""

    def __init__(self, buckets: Sequence[Bucket], quantiles: Sequence[float]) -> None:
        """Start empty; all ranks list the same buckets and quantiles."""
        self._rows = {bucket: row for row, bucket in enumerate(buckets)}
        self._quantiles = list(quantiles)
        self.sums = torch.zeros(len(buckets), len(quantiles), 2, dtype=torch.float64)
        """[buckets, quantiles, (loss, tokens)] on the CPU."""

    def add(self, bucket: Bucket, quantile: int, loss_sum: float, tokens: float) -> None:
        """Count one sample."""
        self.sums[self._rows[bucket], quantile] += torch.tensor([loss_sum, tokens]).double()

    @property
    def mean(self) -> float:
        """Mean loss over all tokens; NaN without any."""
        return _mean(self.sums.sum(dim=(0, 1)))

    def row(self, prefix: str = "") -> dict[str, float]:
        """Return the mean of everything, of buckets, of noise levels and of both, by name.

        Names are ``loss``, ``17x256x256``, ``q0.5`` and ``17x256x256/q0.5``, behind the prefix.
        What was not measured is left out.
        """
        levels = [f"q{quantile:g}" for quantile in self._quantiles]
        values = {"loss": self.mean}
        for number, level in enumerate(levels):
            values[level] = _mean(self.sums[:, number].sum(dim=0))
        for bucket, number in self._rows.items():
            values[str(bucket)] = _mean(self.sums[number].sum(dim=0))
            for place, level in enumerate(levels):
                values[f"{bucket}/{level}"] = _mean(self.sums[number, place])
        return {f"{prefix}{name}": v for name, v in values.items() if not math.isnan(v)}


def _mean(sums: Tensor) -> float:
    loss, tokens = sums.tolist()
    return loss / tokens if tokens else math.nan
