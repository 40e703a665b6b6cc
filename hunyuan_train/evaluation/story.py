"""The story of a curriculum for its report: stages on a time line, losses, data, samples."""

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hunyuan_train.data.buckets import Bucket
from hunyuan_train.evaluation.bucket_stats import BucketStats
from hunyuan_train.evaluation.charts import Points, curve_chart
from hunyuan_train.evaluation.report import Table
from hunyuan_train.evaluation.timeline import StageBar, stages_chart
from hunyuan_train.observability.progress import format_duration

EMA = "ema/"
"""Before the names of what was measured with averaged weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageSpan:
    """What became of one stage."""

    name: str
    after: str = ""
    state: str = ""
    ended_by: str = ""
    pieces: Sequence[tuple[float, float]] = ()
    """Begin and end of every start, in seconds since 1970."""
    steps: int = 0
    samples: int = 0
    tokens: int = 0


def stages_table(stages: Sequence[StageSpan], failures: Sequence[float]) -> Table:
    """Return when each stage ran and what it did, with a chart over time.

    Args:
        stages: In the order they ran.
        failures: When something failed, in seconds since 1970.
    """
    begun = [begin for stage in stages for begin, _ in stage.pieces]
    zero = min(begun, default=0.0)
    bars = [
        StageBar(
            name=stage.name,
            after=stage.after,
            pieces=[(begin - zero, end - zero) for begin, end in stage.pieces],
            done=stage.state == "done",
        )
        for stage in stages
    ]
    rows = [
        [
            stage.name,
            stage.after or "nothing",
            f"{stage.state}, by its {stage.ended_by}" if stage.ended_by else stage.state,
            clock_time(stage.pieces[0][0]) if stage.pieces else "",
            format_duration(sum(end - begin for begin, end in stage.pieces))
            if stage.pieces
            else "",
            f"{len(stage.pieces)}",
            f"{stage.steps:,}",
            f"{stage.samples:,}",
            f"{stage.tokens:,}",
        ]
        for stage in stages
    ]
    total = [sum(getattr(stage, name) for stage in stages) for name in ("samples", "tokens")]
    took = sum(end - begin for stage in stages for begin, end in stage.pieces)
    starts = sum(len(stage.pieces) for stage in stages)
    rows.append(
        [
            "all",
            "",
            "",
            "",
            format_duration(took),
            f"{starts}",
            "",
            *(f"{number:,}" for number in total),
        ]
    )
    return Table(
        title="The curriculum over time",
        columns=[
            *("stage", "starts from", "state", "began", "took", "starts", "updates", "samples"),
            "tokens",
        ],
        rows=rows,
        chart=stages_chart(bars, [at - zero for at in failures]) if begun else b"",
    )


def clock_time(seconds: float) -> str:
    """Return a time since 1970 as UTC."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds))


def data_table(stats: Mapping[str, Mapping[str, BucketStats]]) -> Table | None:
    """Return what each stage has seen of images and clips; None without any.

    Args:
        stats: Of ``read_bucket_stats``, by stage.
    """
    rows, sums = [], [0] * 5
    for stage, buckets in stats.items():
        counts = [0] * 5
        for name, bucket in buckets.items():
            size = Bucket.parse(name)
            video = size.media == "video"
            counts[int(video)] += bucket.samples
            counts[2] += bucket.samples * size.frames if video else 0
            counts[3] += bucket.tokens
            counts[4] += 1
        sums = [a + b for a, b in zip(sums, counts, strict=True)]
        rows.append([stage, *(f"{count:,}" for count in counts)])
    if not rows:
        return None
    rows.append(["all", *(f"{count:,}" for count in sums[:-1]), ""])
    return Table(
        title="Data seen",
        columns=["stage", "images", "clips", "frames of clips", "tokens", "buckets"],
        rows=rows,
        note="Samples as often as they were drawn. The tokens of an update that was done again "
        "count once.",
    )


def held_out_tables(stages: Mapping[str, Path]) -> list[Table]:
    """Return the held-out losses of all stages: one overview, then the last of each in full.

    Args:
        stages: Name to ``evaluation.jsonl``, which may be missing.
    """
    found = {name: rows for name, path in stages.items() if (rows := read_lines(path))}
    if not found:
        return []
    overview, series, tables = [], {}, []
    for name, rows in found.items():
        prefix = EMA if f"{EMA}loss" in rows[-1] else ""
        points: Points = [(row["step"], row[f"{prefix}loss"]) for row in rows]
        series[name] = points
        values = [loss for _, loss in points]
        raw = rows[-1]["loss"]
        overview.append(
            [name, f"{len(rows)}", *(f"{v:.4f}" for v in (values[0], min(values), values[-1], raw))]
        )
        tables.append(_last_evaluation(name, rows[-1], prefix))
    chart = curve_chart(series, x_label="step", y_label="held-out loss", end_to_end=True)
    first = Table(
        title="Held-out loss",
        columns=["stage", "measured", "first", "lowest", "last", "last, not averaged"],
        rows=overview,
        note="At fixed noise, of averaged weights where there are any. Stages differ in buckets "
        "and in their noise levels: compare within a stage.",
        chart=chart,
    )
    return [first, *tables]


def _last_evaluation(stage: str, row: Mapping[str, Any], prefix: str) -> Table:
    cells = {name.removeprefix(prefix): v for name, v in row.items() if name.startswith(prefix)}
    levels = [name for name in cells if name.startswith("q")]
    buckets = [name for name in cells if "/" not in name and name[0].isdigit()]
    if not levels:
        scores = {name: v for name, v in cells.items() if name.startswith(("image/", "video/"))}
        return Table(
            title=f"Reconstruction of held-out clips after update {row['step']:,} of stage {stage}",
            columns=["score", "value"],
            rows=[[name, f"{value:.4f}"] for name, value in scores.items()],
        )
    return Table(
        title=f"Held-out loss after update {row['step']:,} of stage {stage}",
        columns=["bucket", "all noise levels", *levels],
        rows=[
            [bucket, *(_number(cells.get(name)) for name in (bucket, *_crossed(bucket, levels)))]
            for bucket in buckets
        ]
        + [["all", *(_number(cells.get(name)) for name in ("loss", *levels))]],
        note="q0.3 is the noise level below which training draws 30 % of its levels.",
    )


def _crossed(bucket: str, levels: Sequence[str]) -> list[str]:
    return [f"{bucket}/{level}" for level in levels]


def loss_table(stage: str, path: Path) -> Table | None:
    """Return the late training losses by source, bucket and noise level; None without the file."""
    rows = read_lines(path)
    if not rows:
        return None
    tail = rows[-max(1, len(rows) // 10) :]
    sums: dict[tuple[str, str], dict[str, list[float]]] = {}
    for row in tail:
        for name, loss in row.items():
            if not name.endswith("/loss") or loss is None:
                continue
            source, bucket, level = name.removesuffix("/loss").rsplit("/", 2)
            tokens = row[f"{source}/{bucket}/{level}/tokens"]
            cell = sums.setdefault((source, bucket), {}).setdefault(level, [0.0, 0.0])
            cell[0] += loss * tokens
            cell[1] += tokens
    levels = sorted({level for cells in sums.values() for level in cells}, key=_level)
    named = any(source for source, _ in sums)
    kinds = sorted(sums, key=lambda kind: (kind[0], Bucket.parse(kind[1])))
    return Table(
        title=f"Training loss by noise level, stage {stage}",
        columns=[*(["source"] if named else []), "bucket", *levels],
        rows=[
            [
                *([source] if named else []),
                bucket,
                *(_mean(sums[source, bucket].get(level)) for level in levels),
            ]
            for source, bucket in kinds
        ],
        note=f"Of the last {len(tail)} of {len(rows)} rows, each sample under the nearest level.",
    )


def _level(name: str) -> float:
    return float(name.removeprefix("q"))


def _mean(cell: Sequence[float] | None) -> str:
    return f"{cell[0] / cell[1]:.4f}" if cell and cell[1] else ""


def _number(value: object) -> str:
    finite = isinstance(value, int | float) and math.isfinite(value)
    return f"{value:.4f}" if finite else ""


def spread(items: Sequence[Any], most: int) -> Iterator[Any]:
    """Yield at most ``most`` of the items, evenly spread, the last one among them."""
    count = min(most, len(items))
    for place in range(1, count + 1):
        yield items[place * len(items) // count - 1]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the whole rows of a JSONL file; none without a file."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:  # cut off when its process died
            continue
    return rows
