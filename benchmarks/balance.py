"""How even the drawn work lies on the ranks, and how close the mixture comes to what was asked.

Five stages like those of the HunyuanVideo paper are drawn from made-up groups with long-tailed
aspect ratios and durations, for 8, 64 and 512 data-parallel ranks, once with the `balanced` policy
and once with `random`, where every rank draws a random bucket with its largest batch. Both do the
same work per rank and update, as near as whole micro-batches allow. Costs are the predicted FLOPs
of the 13B model, with 256 text tokens. The figures per stage are means over the steps:

    balance      average over largest cost of a rank
    lockstep     the same where all ranks wait for each other after every micro-batch
    mixture      largest relative deviation from the configured shares of media, anchors and sources
    random_work  work per rank and update of `random`, over that of `balanced`
    plan_ms      median CPU time of drawing a step and sharing it out, one thread

    python benchmarks/balance.py
    python benchmarks/balance.py --quick
"""

import argparse
import json
import math
import platform
import statistics
import time
from dataclasses import dataclass, field

import numpy as np

from hunyuan_train.data.buckets import Bucket, BucketTable
from hunyuan_train.data.config import DataConfig, Policy, SourceConfig
from hunyuan_train.data.cost import sample_cost
from hunyuan_train.data.mixture import Cell
from hunyuan_train.data.planner import StepPlanner
from hunyuan_train.models.hunyuan.config import HunyuanConfig

RANKS = (8, 64, 512)
TEXT_TOKENS = 256
MAX_TOKENS = 122_880
MAX_BATCH = 64
ROUNDS = 4
SOURCES = {"broad": 0.7, "fine": 0.3}
VIDEO_TARGET, SCALE_TARGET, MIXTURE_TARGET, PLAN_TARGET_MS = 0.97, 0.95, 0.01, 2.0


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A mixture: samples of images and videos by anchor, and the asked shares."""

    name: str
    images: dict[int, int] = field(default_factory=dict)
    videos: dict[int, int] = field(default_factory=dict)
    durations: tuple[int, ...] = ()
    media: dict[str, float] = field(default_factory=dict)
    anchors: dict[str, float] = field(default_factory=dict)


STAGES = (
    Stage(name="images_256", images={256: 20_000_000}),
    Stage(
        name="images_mixed_scale",
        images={256: 20_000_000, 512: 8_000_000},
        anchors={"256": 0.5, "512": 0.5},
    ),
    Stage(
        name="video_low",
        images={256: 20_000_000},
        videos={256: 5_000_000},
        durations=(33, 65, 129),
        media={"image": 0.3, "video": 0.7},
    ),
    Stage(
        name="video_mid",
        images={256: 8_000_000, 544: 4_000_000},
        videos={544: 1_500_000},
        durations=(33, 65, 97, 129),
        media={"image": 0.2, "video": 0.8},
    ),
    Stage(
        name="video_720p",
        images={256: 4_000_000, 544: 2_000_000, 960: 1_000_000},
        videos={256: 1_000_000, 544: 600_000, 960: 400_000},
        durations=(65, 129),
        media={"image": 0.2, "video": 0.8},
        anchors={"256": 0.2, "544": 0.3, "960": 0.5},
    ),
)


def aspect_weight(bucket: Bucket) -> float:
    """Return how common an aspect ratio is: peaks at usual ones over a long tail."""
    aspect = math.log(bucket.width / bucket.height)
    usual = {16 / 9: 0.55, 9 / 16: 0.2, 4 / 3: 0.12, 3 / 4: 0.05, 1.0: 0.06}
    peaks = sum(w * math.exp(-(((aspect - math.log(a)) / 0.06) ** 2)) for a, w in usual.items())
    return peaks + 0.002 * math.exp(-abs(aspect))


def cells_of_stage(stage: Stage) -> list[Cell]:
    """Make the cells of a stage; counts are spread over sources, durations and aspect ratios."""
    cells: list[Cell] = []
    for source, part in SOURCES.items():
        parts = [(anchor, 1, count) for anchor, count in stage.images.items()]
        weights = [math.exp(-frames / 60) for frames in stage.durations]
        for anchor, count in stage.videos.items():
            parts += [
                (anchor, frames, count * weight / sum(weights))
                for frames, weight in zip(stage.durations, weights, strict=True)
            ]
        first = 0
        for anchor, frames, count in parts:
            buckets = BucketTable([anchor], [frames], stride=16 if anchor < 512 else 32).buckets()
            total = sum(map(aspect_weight, buckets))
            for bucket in buckets:
                rows = max(1, round(count * part * aspect_weight(bucket) / total))
                cells.append(
                    Cell(
                        name=f"{source}//{bucket}@{anchor}x1",
                        store=0,
                        first=first,
                        count=rows,
                        repeat=1,
                        bucket=bucket,
                        anchor=anchor,
                        concept="",
                        source=source,
                    )
                )
                first += rows
    return sorted(cells, key=lambda cell: cell.name)


class Setup:
    """The planner of a stage, by policy, ranks and rounds."""

    def __init__(self, stage: Stage) -> None:
        model = HunyuanConfig()
        self.cells = cells_of_stage(stage)
        self.costs = [sample_cost(cell.bucket, TEXT_TOKENS, model) for cell in self.cells]
        self.batches = [
            max(1, min(MAX_TOKENS // cell.bucket.tokens, MAX_BATCH)) for cell in self.cells
        ]
        self._stage = stage

    def planner(self, policy: Policy, ranks: int, rounds: int) -> StepPlanner:
        cfg = DataConfig(
            policy=policy,
            media_shares=self._stage.media,
            anchor_shares=self._stage.anchors,
            sources={
                name: SourceConfig(latents=name, weight=weight) for name, weight in SOURCES.items()
            },
        )
        return StepPlanner(self.cells, self.costs, self.batches, cfg, 7, ranks, rounds)

    def unit_cost(self, policy: Policy) -> float:
        """Return the expected cost of a unit."""
        planner = self.planner(policy, 1, 1)
        units = sum(planner.shares / np.array(planner.unit_sizes))
        return float((planner.shares * np.array(self.costs)).sum() / units)

    def mixture_error(self, planner: StepPlanner, drawn: np.ndarray) -> float:
        """Return the largest relative deviation of a share of media, anchors and sources."""
        worst = 0.0
        for attribute in ("media", "anchor", "source"):
            values = np.array([str(getattr(cell, attribute)) for cell in self.cells])
            for value in np.unique(values):
                asked = planner.shares[values == value].sum()
                worst = max(worst, abs(drawn[values == value].sum() / drawn.sum() / asked - 1))
        return worst


def measure(setup: Setup, policy: Policy, ranks: int, rounds: int, steps: int) -> dict[str, float]:
    """Draw ``steps`` updates and return their figures."""
    planner = setup.planner(policy, ranks, rounds)
    drawn = np.zeros(len(setup.cells))
    costs = np.array(setup.costs)
    balance, lockstep, seconds = [], [], []
    for _ in range(steps):
        began = time.thread_time()
        plan = planner.next_step()
        plan.assign(ranks)
        seconds.append(time.thread_time() - began)
        even = plan.balance(ranks)
        balance.append(even.step)
        lockstep.append(even.lockstep)
        drawn += np.bincount(plan.table.cell, plan.table.count, len(drawn))
    return {
        "rounds": rounds,
        "work": float((drawn * costs).sum() / steps / ranks),
        "balance": statistics.mean(balance),
        "lockstep": statistics.mean(lockstep),
        "mixture": setup.mixture_error(planner, drawn),
        "plan_ms": statistics.median(seconds) * 1e3,
        "state_bytes": len(json.dumps(planner.state_dict())),
    }


def stage_figures(stage: Stage, steps: int) -> dict[str, dict[str, object]]:
    """Return the figures of one stage on every number of ranks, under both policies."""
    setup = Setup(stage)
    ratio = setup.unit_cost(Policy.random) / setup.unit_cost(Policy.balanced)
    random_rounds = max(1, round(ROUNDS / ratio))
    rounds = max(1, round(random_rounds * ratio))
    target = VIDEO_TARGET if stage.videos or len(stage.images) == 1 else SCALE_TARGET
    figures: dict[str, dict[str, object]] = {}
    for ranks in RANKS:
        even = measure(setup, Policy.balanced, ranks, rounds, steps)
        random = measure(setup, Policy.random, ranks, random_rounds, steps)
        held = [even["balance"] >= target, even["mixture"] <= MIXTURE_TARGET]
        asked = f"balance >= {target}, mixture <= {MIXTURE_TARGET}"
        if ranks == max(RANKS):
            held.append(even["plan_ms"] <= PLAN_TARGET_MS)
            asked += f", plan_ms <= {PLAN_TARGET_MS}"
        figures[f"{stage.name}_{ranks}"] = {
            "value": even["balance"],
            **{name: value for name, value in even.items() if name not in ("balance", "work")},
            "random_work": random["work"] / even["work"],
            **{f"random_{name}": random[name] for name in ("rounds", "balance", "lockstep")},
            "target": asked,
            "holds": all(held),
        }
        print(
            f"{stage.name:>20} {ranks:>4} ranks: balance {even['balance']:.4f} "
            f"lockstep {even['lockstep']:.4f} (random {random['balance']:.4f} "
            f"{random['lockstep']:.4f}), mixture off by {even['mixture']:.4%}, "
            f"{even['plan_ms']:.2f} ms, {even['state_bytes']:.0f} bytes, "
            f"{rounds} and {random_rounds} rounds, work {random['work'] / even['work']:.2f}",
            flush=True,
        )
    return figures


def main() -> None:
    """Measure and print one JSON object last."""
    formatter = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--steps", type=int, default=1000, help="updates drawn per setting")
    parser.add_argument("--quick", action="store_true", help="50 updates per setting")
    arguments = parser.parse_args()
    steps = 50 if arguments.quick else arguments.steps
    figures: dict[str, dict[str, object]] = {}
    for stage in STAGES:
        figures |= stage_figures(stage, steps)
    machine = {"device": platform.machine(), "numpy": np.__version__, "threads": 1}
    print(
        json.dumps({"benchmark": "balance", "machine": machine, "steps": steps, "figures": figures})
    )


if __name__ == "__main__":
    main()
