"""Tables of a report about its data: what each bucket gave, and what could not be used."""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hunyuan_train.evaluation.charts import Points, curve_chart
from hunyuan_train.evaluation.report import Table

EXAMPLES = 20
"""Quarantined samples that a report names."""
CURVES = 8
"""Buckets with the most tokens, whose loss a report draws."""


@dataclass(slots=True)
class BucketStats:
    """What one bucket came to in a stage."""

    samples: int = 0
    tokens: int = 0
    seconds: float = 0.0
    losses: list[tuple[int, float, int]] = field(default_factory=list)
    """(step, mean loss, tokens) of every row it occurs in."""

    @property
    def late_loss(self) -> float:
        """Mean loss over the tokens of the last tenth of its rows; NaN if it never occurred."""
        tail = self.losses[-max(1, len(self.losses) // 10) :]
        tokens = sum(count for _, _, count in tail)
        return sum(loss * count for _, loss, count in tail) / tokens if tokens else math.nan


def read_bucket_stats(path: Path) -> dict[str, BucketStats]:
    """Add up the rows of a ``buckets.jsonl``, by bucket; empty if there is no such file."""
    stats: dict[str, BucketStats] = defaultdict(BucketStats)
    for row in _lines(path):
        for name in [key.removesuffix("/samples") for key in row if key.endswith("/samples")]:
            bucket, tokens = stats[name], int(row[f"{name}/tokens"])
            bucket.samples += int(row[f"{name}/samples"])
            bucket.tokens += tokens
            bucket.seconds += row[f"{name}/seconds"]
            loss = row[f"{name}/loss"]
            if loss is not None:
                bucket.losses.append((row["step"], loss, tokens))
    return dict(sorted(stats.items(), key=lambda item: _shape(item[0])))


def bucket_table(stage: str, stats: dict[str, BucketStats]) -> Table:
    """Return samples, shares, loss and speed of every bucket of a stage, and its loss curves."""
    tokens = sum(bucket.tokens for bucket in stats.values())
    seconds = sum(bucket.seconds for bucket in stats.values())
    rows = [
        [
            name,
            f"{bucket.samples:,}",
            f"{bucket.tokens / tokens:.1%}",
            f"{bucket.seconds / seconds:.1%}" if seconds else "",
            f"{bucket.late_loss:.4f}",
            f"{bucket.tokens / bucket.seconds:,.0f}" if bucket.seconds else "",
        ]
        for name, bucket in stats.items()
    ]
    most = sorted(stats, key=lambda name: -stats[name].tokens)[:CURVES]
    series: dict[str, Points] = {
        name: [(step, loss) for step, loss, _ in stats[name].losses] for name in most
    }
    note = f"The curves are of the {CURVES} buckets with the most tokens."
    return Table(
        title=f"Buckets of stage {stage}",
        columns=["bucket", "samples", "of the tokens", "of the time", "late loss", "tokens/s"],
        rows=rows,
        note=note if len(stats) > CURVES else "",
        chart=curve_chart(series, x_label="step", y_label="loss"),
    )


def quarantine_table(title: str, paths: Sequence[Path]) -> Table | None:
    """Return the counts and first entries of quarantine lists, None if all are empty."""
    # Groups of ranks list a sample each when they meet it.
    entries = list({_name(row): row for path in paths for row in _lines(path)}.values())
    if not entries:
        return None
    counts = Counter(str(row["reason"]) for row in entries)
    listed = ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
    rows = [[_name(row), str(row["reason"]), str(row["detail"])] for row in entries[:EXAMPLES]]
    shown = f"; the first {EXAMPLES} are shown" if len(entries) > EXAMPLES else ""
    return Table(
        title=title,
        columns=["what", "reason", "detail"],
        rows=rows,
        note=f"{len(entries)} left out: {listed}{shown}.",
    )


def _name(row: dict[str, Any]) -> str:
    return str(row.get("file") or row.get("sample_id", ""))


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def _shape(name: str) -> tuple[int, ...]:
    return tuple(int(part) for part in name.split("x"))
