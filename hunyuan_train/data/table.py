"""The bucket table: what a selection of cells holds and costs, as aligned text and as a chart."""

import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hunyuan_train.data.buckets import Bucket
from hunyuan_train.data.mixture import Cell

MAX_LINES = 60
"""Buckets that are printed one by one; of more, the costliest are."""
_MAX_BARS = 200
_HEAD = (
    *("bucket", "anchor", "samples", "tokens", "batch"),
    *("samples %", "compute %", "crop loss %", "last batch %"),
)
_DPI = 100


@dataclass(frozen=True, kw_only=True, slots=True)
class BucketRow:
    """All cells of one bucket and anchor."""

    bucket: Bucket
    anchor: int
    samples: int
    """Different samples."""
    draws: int
    """Samples of an epoch: with repeats."""
    batch: int
    """Samples of a full unit; the smallest where cells differ."""
    share: float
    """Share of the samples drawn."""
    compute: float
    """Share of the predicted cost of the samples drawn."""
    crop_loss: float
    """Mean share of the resized pictures that the crops remove."""
    last_fill: float
    """Filled share of the last unit of an epoch, on average over the cells."""

    @property
    def tokens(self) -> int:
        """Image tokens of a sample."""
        return self.bucket.tokens

    def to_json(self) -> dict[str, Any]:
        """Return the row for a JSON file."""
        return {**asdict(self), "bucket": str(self.bucket), "tokens": self.tokens}


def bucket_rows(
    cells: Sequence[Cell],
    shares: Sequence[float],
    costs: Sequence[float],
    batches: Sequence[int],
    crop_losses: Sequence[float],
) -> list[BucketRow]:
    """Add up cells by bucket and anchor.

    Args:
        cells: What is drawn from.
        shares: Per cell, its share of the samples drawn.
        costs: Per cell, predicted cost of a sample, in any unit.
        batches: Per cell, samples of a full unit.
        crop_losses: Per cell, mean share that the crops remove.

    Returns:
        Rows in the order of bucket and anchor.
    """
    compute = np.asarray(shares, np.float64) * np.asarray(costs, np.float64)
    compute /= compute.sum()
    members: dict[tuple[Bucket, int], list[int]] = {}
    for number, cell in enumerate(cells):
        members.setdefault((cell.bucket, cell.anchor), []).append(number)
    rows: list[BucketRow] = []
    for (bucket, anchor), numbers in sorted(members.items()):
        counts = [cells[number].count for number in numbers]
        draws = [cells[number].count * cells[number].repeat for number in numbers]
        sizes = [batches[number] for number in numbers]
        fills = [((drawn - 1) % size + 1) / size for drawn, size in zip(draws, sizes, strict=True)]
        rows.append(
            BucketRow(
                bucket=bucket,
                anchor=anchor,
                samples=sum(counts),
                draws=sum(draws),
                batch=min(sizes),
                share=float(sum(shares[number] for number in numbers)),
                compute=float(compute[numbers].sum()),
                crop_loss=float(np.average([crop_losses[n] for n in numbers], weights=counts)),
                last_fill=float(np.mean(fills)),
            )
        )
    return rows


def table_text(rows: Sequence[BucketRow]) -> str:
    """Return the table as aligned lines with a total.

    Of more than ``MAX_LINES`` buckets the costliest are shown and the rest is one line.
    """
    shown, folded = _fold(rows, MAX_LINES)
    lines = [_HEAD, *(_line(row) for row in shown)]
    if folded:
        lines.append(_sum_line(f"{len(folded)} cheaper", folded))
    lines.append(_sum_line(f"{len(rows)} buckets", rows))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = "\n".join(
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
    small = sum(row.draws < row.batch for row in rows)
    if small:
        text += f"\n{small} of them hold less than one full batch; their units are smaller."
    return text


def table_chart(rows: Sequence[BucketRow]) -> bytes:
    """Draw samples, tokens and shares per bucket as bars and return a PNG.

    One line of bars for each bucket, so the picture grows with their number; beyond 200 buckets the
    costliest are drawn.
    """
    shown, folded = _fold(rows, _MAX_BARS)
    figure = Figure(figsize=(11.0, 1.6 + 0.17 * len(shown)), layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3, sharey=True, width_ratios=(1, 1, 1.3))
    places = np.arange(len(shown), dtype=float)
    _bars(left, places, [row.samples for row in shown], "samples")
    _bars(middle, places, [row.tokens for row in shown], "image tokens of a sample")
    compute = [100 * row.compute for row in shown]
    share = [100 * row.share for row in shown]
    right.barh(places, compute, 0.78, color="#3b6fb6", label="% of compute")
    right.plot(share, places, "o", ms=3.5, color="#d9822b", label="% of samples drawn")
    right.set_xlim(left=0)
    right.set_xlabel("share", fontsize=8)
    right.xaxis.set_major_formatter("{x:g} %")
    right.legend(fontsize=7.5, frameon=False, loc="best")
    labels = [f"{row.bucket}" for row in shown]
    repeated = {label for label in labels if labels.count(label) > 1}
    left.set_yticks(
        places,
        [
            f"{label} @{row.anchor}" if label in repeated else label
            for label, row in zip(labels, shown, strict=True)
        ],
    )
    left.set_ylim(len(shown) - 0.4, -0.6)
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", color="#e4e6ea", lw=0.7)
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=7, colors="#444")
    title = f"{len(rows)} buckets (frames x height x width)"
    if folded:
        rest = 100 * sum(row.compute for row in folded)
        title += f"; {len(folded)} with {rest:.2g} % of compute are not drawn"
    figure.suptitle(title, fontsize=9, x=0.01, ha="left")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)
    return buffer.getvalue()


def _fold(rows: Sequence[BucketRow], limit: int) -> tuple[list[BucketRow], list[BucketRow]]:
    """Split into the ``limit`` costliest rows and the others, both in their order."""
    by_cost = sorted(range(len(rows)), key=lambda index: -rows[index].compute)
    kept = set(by_cost[:limit])
    shown = [row for index, row in enumerate(rows) if index in kept]
    return shown, [row for index, row in enumerate(rows) if index not in kept]


def _line(row: BucketRow) -> tuple[str, ...]:
    numbers = (row.anchor, row.samples, row.tokens, row.batch)
    shares = _percent(row.share, row.compute, row.crop_loss, row.last_fill)
    return (str(row.bucket), *map(str, numbers), *shares)


def _sum_line(name: str, rows: Sequence[BucketRow]) -> tuple[str, ...]:
    samples = sum(row.samples for row in rows)
    loss = sum(row.crop_loss * row.samples for row in rows) / samples
    shares = _percent(sum(row.share for row in rows), sum(row.compute for row in rows), loss)
    return (name, "", str(samples), "", "", *shares, "")


def _percent(*shares: float) -> tuple[str, ...]:
    return tuple(f"{100 * share:.1f}" for share in shares)


def _bars(axes: Axes, places: np.ndarray, values: list[int], label: str) -> None:
    axes.barh(places, values, 0.78, color="#9bb3d3")
    if min(values) > 0 and max(values) > 100 * min(values):
        axes.set_xscale("log")
        label += " (logarithmic)"
    axes.set_xlabel(label, fontsize=8)
