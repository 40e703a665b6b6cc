"""Compare what a plan predicts with what this device measures, block by block.

The same comparison as ``hunyuan-train plan verify``, for the largest bucket of every stage of the
13B model. Each figure's value is the prediction over the measurement, less 1; memory must not be
predicted too low. On a CPU only what autograd keeps is compared, for a small model.

    python benchmarks/planner_error.py --cluster h200
    python benchmarks/planner_error.py --quick
"""

import argparse
import re

import torch
from _measure import Report, failure, is_full, pick_device, reset_peak

from hunyuan_train.config.compose import compose_config
from hunyuan_train.engine.plan_verify import Figure, verify_plan

MEMORY_ERROR, TIME_ERROR = 0.05, 0.1
BIG = ["model=hunyuan_video_13b", "text=hunyuan", "parallel.compute_dtype=bfloat16"]
SMALL = ["model.hidden_size=192", "model.num_heads=4", "model.rope_axes=[12,18,18]"]
STAGES = (
    "hunyuan_image_256",
    "hunyuan_image_mixed",
    "hunyuan_video_low_short",
    "hunyuan_video_low_long",
    "hunyuan_video_high_long",
)


def add(report: Report, stage: str, figure: Figure) -> None:
    """Add one comparison with its target."""
    name = f"{stage}_{re.sub('[^a-z]+', '_', figure.name)}"
    gib = figure.unit == "GiB"
    low, high = (0.0 if gib else -TIME_ERROR), (MEMORY_ERROR if gib else TIME_ERROR)
    peak = gib and "most" in name
    # What autograd keeps is counted, not bounded: it may be off either way.
    low = low if peak or not gib else -MEMORY_ERROR
    report.add(
        name,
        {
            "value": figure.error,
            "predicted": figure.predicted,
            "measured": figure.measured,
            "unit": figure.unit,
            "target": f"{low:g} to {high:g}",
            "holds": low <= figure.error <= high,
        },
    )


def cluster_here(asked: str) -> str:
    """Return the name of a cluster of this GPU, by the driver's name for it."""
    if asked != "auto":
        return asked
    name = torch.cuda.get_device_name().lower()
    for part, cluster in (("h200", "h200"), ("h800", "h800"), ("h100", "h100"),
                          ("b200", "b200"), ("a100", "a100_80")):  # fmt: skip
        if part in name:
            return cluster
    return "h100"


def main() -> None:
    """Compare every stage; print every figure, and all of them last."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--cluster", default="auto", help="a file of conf/cluster")
    parser.add_argument("--only", choices=STAGES, help="this stage alone")
    parser.add_argument("--minutes", type=float, default=0.0, help="start no figure after these")
    parser.add_argument("--quick", action="store_true", help="one stage")
    options = parser.parse_args()
    device = pick_device(options.device)
    cuda = device.type == "cuda"
    report = Report("planner_error", device, options.minutes)
    stages = [options.only] if options.only else list(STAGES)
    if not cuda:
        stages = ["default"]
    for stage in stages[:1] if options.quick else stages:
        if report.late:
            report.add(stage, {"skipped": "the time was up"})
            continue
        of_model = [*BIG, f"cluster={cluster_here(options.cluster)}"] if cuda else SMALL
        reset_peak(device)
        try:
            cfg = compose_config([*of_model, f"stage={stage}", f"run.device={device.type}"])
            for figure in verify_plan(cfg).figures:
                add(report, stage, figure)
        except (RuntimeError, NotImplementedError, ValueError) as error:
            report.add(stage, {"out_of_memory": True} if is_full(error) else failure(error))
    report.finish()


if __name__ == "__main__":
    main()
