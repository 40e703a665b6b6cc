"""A plan as text, as JSON and as a chart."""

import dataclasses
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hunyuan_train.data.buckets import Bucket
from hunyuan_train.memory.cluster import ClusterConfig
from hunyuan_train.memory.estimate import Layout
from hunyuan_train.memory.planner import Choice, LayoutPlan

JSON_NAME = "plan.json"
CHART_NAME = "plan.png"
OVERRIDES_NAME = "plan_overrides.txt"
"""One argument of ``train`` per line: ``hunyuan-train train $(cat runs/x/plan_overrides.txt)``."""
SHOWN = 5
"""Layouts that are printed per bucket; plan.json has more."""
_KEPT = 50
_LONG = 110
_GIB = 2**30
_PARTS = {
    "weights": ("parameters", "teacher"),
    "grads": ("gradients",),
    "optim": ("optimizer",),
    "ema": ("average",),
    "gather": ("gathered",),
    "kept": ("activations",),
    "work": ("working", "exchange", "attention"),
    "ends": ("ends",),
}
"""Columns of the table and the parts that each adds up."""
_COLORS = (
    "#3b6fb6", "#6f9bd1", "#9bb3d3", "#c9d6e8", "#8c6bb1", "#d9822b", "#f0b375", "#7a7f87",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """The answer of ``hunyuan-train plan``."""

    cluster: ClusterConfig
    origin: str
    """Where the buckets are from."""
    free_bytes: float
    """Of one GPU, less its reserve."""
    classes: dict[str, int]
    """Buckets of like size, by the largest of them."""
    ranked: list[LayoutPlan]
    """Layouts in which every bucket fits, the fastest first."""
    chosen: LayoutPlan
    choices: dict[Bucket, Choice]
    """Of the chosen layout, for every bucket."""
    overrides: list[str]

    def __str__(self) -> str:
        """Return the plan as text."""
        cluster = self.cluster
        head = (
            f"{cluster.nodes} x {cluster.gpus_per_node} {cluster.gpu}: {cluster.memory_gib:.1f} "
            f"GiB per GPU, {self.free_bytes / _GIB:.1f} to plan with\n"
            f"{len(self.choices)} buckets of {self.origin}, joined by size to {len(self.classes)}; "
            f"{len(self.ranked)} layouts fit all of them"
        )
        parts = [head, *(self._class_text(number) for number in range(len(self.classes)))]
        chosen = self.chosen
        parts.append(
            f"chosen for the run: {layout_name(chosen.layout)}, {chosen.gpu_seconds:.3g} GPU-s "
            f"per sample of the mixture, MFU {chosen.mfu:.1%}\n" + _table(list(chosen.choices))
        )
        lines = [line if len(line) <= _LONG else f"{line[:_LONG]}..." for line in self.overrides]
        parts.append(f"overrides, whole in {OVERRIDES_NAME}\n  " + "\n  ".join(lines))
        return "\n\n".join(parts)

    def _class_text(self, number: int) -> str:
        plans = sorted(self.ranked, key=lambda p: p.choices[number].prediction.gpu_seconds)
        shape = plans[0].choices[number].shape
        more = self.classes[shape.name] - 1
        title = f"{shape.name}, {shape.img_tokens:,} image tokens"
        title += f", and {more} like it" if more else ""
        names = [layout_name(plan.layout) for plan in plans[:SHOWN]]
        return f"{title}\n" + _table([plan.choices[number] for plan in plans[:SHOWN]], names)

    def to_json(self) -> dict[str, Any]:
        """Return the plan for a JSON file."""
        return {
            "cluster": dataclasses.asdict(self.cluster),
            "free_gib": self.free_bytes / _GIB,
            "origin": self.origin,
            "classes": self.classes,
            "overrides": self.overrides,
            "chosen": _plan_json(self.chosen),
            "buckets": {str(b): _choice_json(choice) for b, choice in self.choices.items()},
            "layouts": [_plan_json(plan) for plan in self.ranked[:_KEPT]],
        }

    def write(self, folder: Path) -> None:
        """Write the JSON file, the overrides and the chart into ``folder``."""
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.to_json(), indent=1)
        (folder / JSON_NAME).write_text(text + "\n", encoding="utf-8")
        (folder / OVERRIDES_NAME).write_text("\n".join(self.overrides) + "\n", encoding="utf-8")
        (folder / CHART_NAME).write_bytes(plan_chart(self))


def layout_name(layout: Layout) -> str:
    """Return a layout in one word."""
    tp = f"tp{layout.tp}{'+sp' if layout.sp else ''}" if layout.tp > 1 else ""
    parts = [
        tp,
        f"ulysses{layout.cp_ulysses}" if layout.cp_ulysses > 1 else "",
        f"ring{layout.cp_ring}" if layout.cp_ring > 1 else "",
        f"zero{layout.zero_stage}/{layout.zero_ranks}",
        f"x{layout.dp_replicate}" if layout.dp_replicate > 1 else "",
    ]
    return " ".join(part for part in parts if part)


def part_gib(choice: Choice) -> dict[str, float]:
    """Return the columns of memory of a point, GiB per GPU."""
    memory = choice.memory
    return {
        name: sum(getattr(memory, field) for field in fields) / _GIB
        for name, fields in _PARTS.items()
    }


def plan_chart(plan: RunPlan) -> bytes:
    """Draw memory by part and MFU of the chosen layout, one bar per size, and return a PNG."""
    choices = plan.chosen.choices
    figure = Figure(figsize=(10.0, 1.6 + 0.4 * len(choices)), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(2, 1))
    places = np.arange(len(choices), dtype=float)
    start = np.zeros(len(choices))
    for name, color in zip(_PARTS, _COLORS, strict=True):
        width = np.array([part_gib(choice)[name] for choice in choices])
        left.barh(places, width, 0.7, left=start, color=color, label=name)
        start += width
    left.axvline(plan.free_bytes / _GIB, color="#b03a2e", lw=1.0)
    left.set_xlabel("GiB per GPU; the line is what can be planned", fontsize=8)
    left.legend(fontsize=7, frameon=False, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    labels = [
        f"{c.shape.name}  x{c.work.batch}  {c.work.recompute.value}"
        f"{' offload' if c.work.offload_share else ''}"
        for c in choices
    ]
    left.set_yticks(places, labels)
    left.set_ylim(len(choices) - 0.4, -0.6)
    for offset, field, color in ((-0.17, "mfu", "#3b6fb6"), (0.17, "hfu", "#c9d6e8")):
        values = [100 * getattr(c.prediction, field) for c in choices]
        right.barh(places + offset, values, 0.34, color=color, label=field.upper())
    right.set_xlabel("% of the peak", fontsize=8)
    right.legend(fontsize=7, frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", color="#e4e6ea", lw=0.7)
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=7, colors="#444")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()


def _table(choices: Sequence[Choice], names: Sequence[str] | None = None) -> str:
    """Return points as aligned lines: GiB per GPU by part, time, utilisation."""
    head = ("layout" if names else "bucket", "batch", "recompute", "offload", *_PARTS, "GiB")
    lines: list[tuple[str, ...]] = [(*head, "s/step", "GPU-s/sample", "MFU %", "HFU %")]
    for number, choice in enumerate(choices):
        prediction, work = choice.prediction, choice.work
        moved = f"{choice.memory.host / _GIB:.0f} GiB" if work.offload_share else "no"
        lines.append(
            (
                names[number] if names else choice.shape.name,
                *(str(work.batch), work.recompute.value, moved),
                *(f"{gib:.1f}" for gib in part_gib(choice).values()),
                f"{choice.memory.total / _GIB:.1f}",
                *(f"{prediction.seconds:.3g}", f"{prediction.gpu_seconds:.3g}"),
                *(f"{100 * prediction.mfu:.1f}", f"{100 * prediction.hfu:.1f}"),
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  "
        + "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def _plan_json(plan: LayoutPlan) -> dict[str, Any]:
    return {
        "layout": dataclasses.asdict(plan.layout),
        "gpu_seconds": plan.gpu_seconds,
        "mfu": plan.mfu,
        "buckets": [_choice_json(choice) for choice in plan.choices],
    }


def _choice_json(choice: Choice) -> dict[str, Any]:
    return {
        "bucket": choice.shape.name,
        "share": choice.shape.share,
        "batch": choice.work.batch,
        "recompute": choice.work.recompute.value,
        "offload_share": choice.work.offload_share,
        "bytes": {**dataclasses.asdict(choice.memory), "total": choice.memory.total},
        "prediction": dataclasses.asdict(choice.prediction),
    }
