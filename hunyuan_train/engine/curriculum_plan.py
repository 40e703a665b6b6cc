"""What a curriculum would take on a cluster: layout, updates, samples and GPU hours of each stage.

Step times are the predictions of ``hunyuan-train plan``; neither a GPU nor the data are needed.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hunyuan_train.config.root import RunConfig
from hunyuan_train.config.run import Trains
from hunyuan_train.engine.ending import End
from hunyuan_train.engine.plan_report import RunPlan, layout_name
from hunyuan_train.engine.planning_run import plan_run

JSON_NAME = "curriculum_plan.json"
_HEAD = ("stage", "after", "layout", "steps", "samples", "tokens", "PFLOP", "s/step", "GPU hours")


@dataclass(frozen=True, kw_only=True, slots=True)
class StageCost:
    """What one stage takes."""

    name: str
    after: str
    layout: str
    ended_by: str
    """steps, samples or tokens: what is expected to end it."""
    at_most: bool
    """Whether a plateau may end it earlier."""
    steps: int
    samples: float
    tokens: float
    """Of images and videos."""
    pflop: float
    """Of the model, forward and backward."""
    step_s: float
    gpu_hours: float
    mfu: float


@dataclass(frozen=True, kw_only=True, slots=True)
class CurriculumPlan:
    """The answer of ``hunyuan-train curriculum --dry-run``."""

    cluster: str
    """Its machines, in words."""
    gpus: int
    stages: list[StageCost]

    @property
    def totals(self) -> dict[str, float]:
        """Sums over the stages, and the days they take one after the other."""
        names = ("steps", "samples", "tokens", "pflop", "gpu_hours")
        sums = {name: sum(getattr(stage, name) for stage in self.stages) for name in names}
        return {**sums, "days": sums["gpu_hours"] / self.gpus / 24}

    def to_json(self) -> dict[str, Any]:
        """Return the plan for a JSON file."""
        stages = {stage.name: asdict(stage) for stage in self.stages}
        return {"cluster": self.cluster, "stages": stages, "totals": self.totals}

    def write(self, folder: Path) -> Path:
        """Write the JSON file into ``folder`` and return its path."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / JSON_NAME
        path.write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")
        return path

    def __str__(self) -> str:
        """Return the table."""
        lines: list[tuple[str, ...]] = [_HEAD]
        for stage in self.stages:
            steps = f"{'<= ' if stage.at_most else ''}{stage.steps:,}"
            lines.append(
                (
                    *(stage.name, stage.after or "-", stage.layout, steps),
                    *(_short(stage.samples), _short(stage.tokens), f"{stage.pflop:.3g}"),
                    *(f"{stage.step_s:.3g}", f"{stage.gpu_hours:,.0f}"),
                )
            )
        sums = self.totals
        lines.append(
            (
                *("all", "", "", f"{sums['steps']:,.0f}", _short(sums["samples"])),
                *(_short(sums["tokens"]), f"{sums['pflop']:.3g}", "", f"{sums['gpu_hours']:,.0f}"),
            )
        )
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = "\n".join(
            "  ".join(
                cell.ljust(width) if column < 3 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        )
        days = f"{sums['days']:,.1f} days one after the other, as predicted"
        return f"{self.cluster}\n{table}\n{days}; nothing here was measured"


def plan_curriculum(
    cfg: RunConfig, stages: Mapping[str, RunConfig], chosen: Sequence[str]
) -> CurriculumPlan:
    """Plan the chosen stages on ``cfg.cluster``.

    Raises:
        ValueError: a stage fits no layout, or trains the VAE; the message names it.
    """
    costs = []
    for name in chosen:
        if stages[name].stage.trains is Trains.vae:
            raise ValueError(
                f"stage {name} trains the VAE, and predictions are of the diffusion model; plan "
                "the other stages with --from and --until"
            )
        try:
            plan = plan_run(stages[name])
        except ValueError as error:
            raise ValueError(f"stage {name}: {error}") from error
        costs.append(stage_cost(name, cfg.curriculum.stages[name].after, stages[name], plan))
    cluster = cfg.cluster
    return CurriculumPlan(
        cluster=f"{cluster.nodes} x {cluster.gpus_per_node} {cluster.gpu}",
        gpus=cluster.world,
        stages=costs,
    )


def stage_cost(name: str, after: str, cfg: RunConfig, plan: RunPlan) -> StageCost:
    """Return what a stage takes in the layout chosen for it.

    Buckets come up by their shares, so an update holds as many samples of each as its largest
    micro-batch, weighted by how often it is drawn.
    """
    chosen, stage, data = plan.chosen, cfg.stage, cfg.data
    shares = [choice.shape.share for choice in chosen.choices]
    whole = sum(shares)
    tokens = sum(c.shape.share * c.shape.img_tokens for c in chosen.choices) / whole
    batch = whole / sum(c.shape.share / c.work.batch for c in chosen.choices)
    ranks = chosen.layout.world // chosen.layout.ranks_per_batch
    per_step = batch * ranks * stage.micro_steps
    if data.global_samples:
        per_step = float(data.global_samples)
    elif data.global_tokens:
        per_step = data.global_tokens / tokens
    limits = {End.steps: stage.steps}
    if stage.samples:
        limits[End.samples] = math.ceil(stage.samples / per_step)
    if stage.tokens:
        limits[End.tokens] = math.ceil(stage.tokens / (per_step * tokens))
    end = min(limits, key=lambda limit: limits[limit])
    samples = limits[end] * per_step
    gpu_s = samples * chosen.gpu_seconds
    peak = (cfg.cluster.measured_peak_tflops or cfg.cluster.peak_tflops) * 1e12
    return StageCost(
        name=name,
        after=after,
        layout=layout_name(chosen.layout),
        ended_by=str(end),
        at_most=bool(stage.plateau),
        steps=limits[end],
        samples=samples,
        tokens=samples * tokens,
        pflop=gpu_s * chosen.mfu * peak / 1e15,
        step_s=per_step * chosen.gpu_seconds / chosen.layout.world,
        gpu_hours=gpu_s / 3600,
        mfu=chosen.mfu,
    )


def _short(value: float) -> str:
    """Return a count with three digits and its unit."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f}"
